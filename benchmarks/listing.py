"""Seconds and memory to list and split a folder of very many images: the time should grow with their number, and no faster.

    python benchmarks/listing.py

The files hold a byte each: listing never looks inside.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine
from mstoolkit.core import write_text
from mstoolkit.data.sources import class_names, split_folders, stratified_split

CLASSES = 100


def make(folder, n):
    "`n` files in class folders."
    for c in range(CLASSES): (folder/'train'/f'class {c}').mkdir(parents=True)
    for i in range(n): (folder/'train'/f'class {i % CLASSES}'/f'{i}.jpg').write_bytes(b' ')


def measure(folder):
    "List and split `folder` in this process."
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    samples, _ = split_folders(folder)
    train, valid = stratified_split(samples, .2, 42)
    names, train, valid = class_names(train, valid)
    took = time.perf_counter()-start
    return dict(seconds=took, MiB=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024, train=len(train), valid=len(valid), classes=len(names))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--files', type=int, nargs='+', default=[25_000, 50_000, 100_000, 200_000])
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    p.add_argument('--one', type=Path, help='measure this folder in this process and print JSON')
    args = p.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    for n in args.files:
        with tempfile.TemporaryDirectory() as tmp:
            make(Path(tmp), n)
            runs = [json.loads(subprocess.run([sys.executable, __file__, '--one', tmp], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        r = sorted(runs, key=lambda o: o['seconds'])[1]
        rows.append(f"| {n:,} | {r['train']:,} + {r['valid']:,} | {r['seconds']:.2f} | {1e6*r['seconds']/n:.1f} | {r['MiB']:.0f} |")
    text = '\n'.join(['# Listing and splitting', '', '    python benchmarks/listing.py', '', f'{args.date}, {machine()}; medians of three processes.', '',
                      '| files | training + validation | s | µs a file | MiB more |', '|---|---|---|---|---|', *rows, ''])
    print(text)
    write_text(Path(__file__).with_suffix('.md'), text)


if __name__ == '__main__': main()
