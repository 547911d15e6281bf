"""`predict --ray` beside `predict`: the same rows, the time of both, a worker killed, everything killed and taken up.

    python benchmarks/cluster.py              # 20,000 drawn images of 64 px, two workers; writes benchmarks/cluster.md
    python benchmarks/cluster.py --n 2000 --dry

Both are whole commands, each in a process of its own, in turns.
"""
import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from machine import machine
from mstoolkit.core import write_text
from mstoolkit.data.make import make_navon
from mstoolkit.recipe import Recipe
from mstoolkit.train import train

HERE = Path(__file__)
TINY = Recipe(name='cluster', backbone='resnet18', head='gated', pretrained=False, size=64, epochs=1, bs=32, augment='none', cutmix=0., num_workers=0,
              schedule='one-cycle', opt='adamw', lr=1e-3, device='cpu', plateau_patience=-1, stop_patience=0)


def command(*words): return [sys.executable, '-m', 'mstoolkit', 'predict', *map(str, words)]


def timed(*words) -> float: # seconds
    start = time.perf_counter()
    subprocess.run(command(*words), check=True, capture_output=True)
    return time.perf_counter() - start


def parts(out): return sorted(out.glob('part-*.csv'))


def rows(out): return pd.concat(map(pd.read_csv, parts(out)), ignore_index=True)


def difference(a, b) -> str:
    "How the rows of two ways differ."
    assert a.image_name.tolist() == b.image_name.tolist()
    return f'{(a.pred_label != b.pred_label).sum()} labels, confidences by {abs(a.confidence - b.confidence).max():.0e} at the most'


def killed(words, out: Path, n: int, whom: str) -> int: # parts that were there
    "Start a command, wait for `n` parts, and kill a worker of it, or all of it."
    p = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(parts(out)) < n and p.poll() is None: time.sleep(.02)
    there = len(parts(out))
    if whom == 'all':
        p.kill()
        p.wait()
        return there
    r = subprocess.run(['pgrep', '-f', 'ray::.*MapWorker|ray::.*_Worker'], capture_output=True, text=True)
    os.kill(int(random.choice(r.stdout.split())), signal.SIGKILL)
    if p.wait(): raise RuntimeError('the command failed after a worker was killed')
    return there


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=20_000)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--part', type=int, default=1024)
    p.add_argument('--dry', action='store_true', help='print, write nothing')
    o = p.parse_args()
    load, took = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        data = make_navon(tmp/'navon', n_train=400, n_valid=40, n_test=o.n, size=64)
        run, images = train(TINY, data, tmp/'run').path, data/'test'
        ray = lambda out: [run, images, '--confidence', '--ray', '--workers', 2, '--part-images', o.part, '--out', out]
        for i in range(o.rounds):
            pair = {}
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                pair[side] = timed(*(ray(tmp/f'parts{i}') if side else [run, images, '--confidence', '--out', tmp/f'{i}.csv']))
            took.append((pair[0], pair[1]))
            print(f'round {i+1}: predict {pair[0]:.1f} s, with --ray {pair[1]:.1f} s', flush=True)
        plain = pd.read_csv(tmp/'0.csv')
        same, worker, every = difference(plain, rows(tmp/'parts0')), tmp/'worker', tmp/'every'
        at_worker = killed(ray(worker), worker, 2, 'worker')
        at_all = killed(ray(every), every, 3, 'all')
        said = subprocess.run(command(*ray(every)), check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
        n = len(parts(tmp/'parts0'))
        text = f'''# Prediction in parts

    python benchmarks/cluster.py {' '.join(sys.argv[1:])}

{time.strftime('%Y-%m-%d')}, {machine()}, torch {torch.__version__.partition('+')[0]}; load of the machine before it began: {load:.1f}.

{o.n:,} drawn images of 64 px in files, ResNet-18 with the gated head, fp32. Whole commands, the start of Ray within them; two workers of a thread each beside one process
with all threads.

| round | `predict`, s | `predict --ray`, s | images/s, Ray ÷ plain |
|---|---|---|---|
{chr(10).join(f'| {i} | {a:.1f} | {b:.1f} | {a/b:.2f} |' for i, (a, b) in enumerate(took, 1))}

Median ratio: **{statistics.median(a/b for a, b in took):.2f}**.

| | parts there | rows beside those of `predict` |
|---|---|---|
| undisturbed | {n} of {n} | differ in {same} |
| a worker killed with {at_worker} parts there | {len(parts(worker))} of {n} | differ in {difference(plain, rows(worker))} |
| all killed with {at_all} parts there, the same command again | {len(parts(every))} of {n} | differ in {difference(plain, rows(every))} |

The second command said: "{said.replace(str(tmp), '…')}".
'''
    print(text)
    if not o.dry: write_text(HERE.with_suffix('.md'), text)


if __name__ == '__main__': main()
