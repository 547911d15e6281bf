"What the benchmarks call the machine they ran on."
import platform
from pathlib import Path

import torch


def machine(device: str = 'cpu') -> str:
    "The device in words."
    if device == 'cuda': return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    names = [o.partition(':')[2].strip() for o in info.read_text().splitlines() if o.startswith('model name')] if info.exists() else []
    n = torch.get_num_threads()
    return f'{n} thread{"s"*(n > 1)} of a CPU of type {names[0] if names and names[0] != "unknown" else platform.machine()}'
