"""A training step on the CPU with and without `keep_freed_memory`: each in processes of its own, in turn.

    python benchmarks/memory.py
    python benchmarks/memory.py --net tf_efficientnet_lite1 --size 256 --bs 32 --steps 5
"""
import argparse
import json
import resource
import subprocess
import sys
from statistics import median
from time import perf_counter


def steps(keep: bool, net: str, size: int, bs: int, n: int) -> dict:
    "Median seconds of a training step and its page faults, in this process."
    import torch
    from mstoolkit.core import keep_freed_memory
    from mstoolkit.models.fusion import multiscale_model
    if keep: keep_freed_memory()
    model = multiscale_model(net, 'gated', 10, pretrained=False).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters())
    x, y, seconds = torch.randn(bs, 3, size, size).to(memory_format=torch.channels_last), torch.randint(10, (bs,)), []
    for i in range(n+5):
        if i == 5: faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = perf_counter()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
        if i >= 5: seconds.append(perf_counter()-start)
    return dict(seconds=median(seconds), faults=(resource.getrusage(resource.RUSAGE_SELF).ru_minflt-faults)/n)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--net', default='test_resnet')
    p.add_argument('--size', type=int, default=56)
    p.add_argument('--bs', type=int, default=64)
    p.add_argument('--steps', type=int, default=30)
    p.add_argument('--one', choices=['keep', 'plain'], help="measure once in this process and print JSON")
    a = p.parse_args()
    if a.one: print(json.dumps(steps(a.one == 'keep', a.net, a.size, a.bs, a.steps)))
    else:
        what = [f'--{k}={getattr(a, k)}' for k in ('net', 'size', 'bs', 'steps')]
        run = lambda how: json.loads(subprocess.run([sys.executable, __file__, '--one', how, *what], capture_output=True, text=True, check=True).stdout)
        pairs = [(run('plain'), run('keep')) for _ in range(a.rounds)]
        for how, i in (('plain', 0), ('keep_freed_memory', 1)):
            print(f"{how:<18} {1e3*median(o[i]['seconds'] for o in pairs):6.1f} ms a step, {median(o[i]['faults'] for o in pairs):7.0f} page faults a step")
        print(f"plain ÷ kept       {median(o[0]['seconds']/o[1]['seconds'] for o in pairs):6.2f}   (median of {a.rounds} pairs)")
