"""Two processes with a thread each beside one process with two threads: the same network, the same batches.

    python benchmarks/distributed.py              # ResNet-50 at 160 px, batches of 16; writes benchmarks/distributed.md
    python benchmarks/distributed.py --net resnet18 --size 96 --rounds 2 --dry    # prints, writes nothing

Both sides take turns in one run, each round starts them anew; the figure is the median of the rounds' ratios.
"""
import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from machine import machine
from mstoolkit.callback.distributed import Distributed
from mstoolkit.core import keep_freed_memory, n_processes, process_rank, write_text
from mstoolkit.learner import fusion_learner

HERE = Path(__file__)


class Clock(Callback):
    "The seconds of each step, from one batch's end to the next one's."
    run_valid = False
    def before_fit(self): self.ends = []
    def after_batch(self): self.ends.append(time.perf_counter())


def side(o):
    "One side: train, and let the first process print the seconds of each step but the first two."
    torch.set_num_threads(o.threads)
    keep_freed_memory()
    g = torch.Generator().manual_seed(0)
    images = [(torch.randn(3, o.size, o.size, generator=g), i % 10) for i in range(o.bs*4)]
    dls = DataLoaders.from_dsets(images, images[:o.bs], bs=o.bs, device='cpu', num_workers=0, drop_last=True)
    for dl in dls.loaders: dl.rng = random.Random(0)
    learn = fusion_learner(dls, o.net, head='plain', pretrained=False, n_out=10, normalize=False, cbs=[Distributed(), clock := Clock()])
    with learn.no_bar(), learn.no_logging(): learn.fit(-(-o.steps//4))
    took = [b - a for a, b in zip(clock.ends[1:], clock.ends[2:])]
    inner = [t for i, t in enumerate(took, 2) if i % 4] # the first of an epoch waits for a validation
    if not process_rank(): print('SECONDS', *inner[1:], 'of', n_processes(), flush=True)


def measured(o, n: int, threads: int) -> float: # seconds a step
    "The median of one side's steps."
    start = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}'] if n > 1 else []
    words = [HERE, '--side', '--threads', threads, '--net', o.net, '--size', o.size, '--bs', o.bs, '--steps', o.steps]
    r = subprocess.run([sys.executable, *start, *map(str, words)], capture_output=True, text=True,
                       env=os.environ | dict(OMP_NUM_THREADS=str(threads), GOMP_SPINCOUNT='1000'))
    line = next((line for line in r.stdout.splitlines() if line.startswith('SECONDS')), None)
    if line is None: raise RuntimeError(r.stderr[-3000:])
    return statistics.median(map(float, line.split()[1:-2]))


def page(o, rows, load) -> str:
    "The page, as Markdown."
    table = '\n'.join(f'| {i} | {o.bs/a:.2f} | {o.bs/b:.2f} | {a/b:.2f} |' for i, (a, b) in enumerate(rows, 1))
    return f'''# Many processes

    python benchmarks/distributed.py {' '.join(sys.argv[1:])}

{time.strftime('%Y-%m-%d')}, {machine()}, torch {torch.__version__.partition('+')[0]}; load of the machine before it began: {load:.1f}.

{o.net} at {o.size} px, batches of {o.bs}, fp32, made images; images a second over forward, backward, adding up and step.

| round | one process, two threads | two processes, one thread each | two ÷ one |
|---|---|---|---|
{table}

Median ratio: **{statistics.median(a/b for a, b in rows):.2f}**.
'''


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--net', default='resnet50')
    for name, default in dict(size=160, bs=16, steps=12, rounds=3, threads=2).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--side', action='store_true', help=argparse.SUPPRESS)
    p.add_argument('--dry', action='store_true', help='print, write nothing')
    o = p.parse_args()
    if o.side: return side(o)
    load, rows = os.getloadavg()[0], []
    for i in range(o.rounds):
        sides = [(1, 2), (2, 1)]
        took = {s: measured(o, *s) for s in (sides if i % 2 == 0 else sides[::-1])}
        rows.append((took[1, 2], took[2, 1]))
        print(f'round {i+1}: one process {rows[-1][0]:.3f} s a step, two {rows[-1][1]:.3f} s', flush=True)
    text = page(o, rows, load)
    print(text)
    if not o.dry: write_text(HERE.with_suffix('.md'), text)


if __name__ == '__main__': main()
