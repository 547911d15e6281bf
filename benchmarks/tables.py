"""Many small images as files, as Parquet shards mapped into memory, and as a stream: listing, first batch, images per second, memory.

    python benchmarks/tables.py
    python benchmarks/tables.py --n 2000 --no-write

Each way is measured in processes of its own, in turn. The first reading of shards copies them into the cache of `datasets` and is told apart.
At the end a network is trained under a limit on memory (RLIMIT_DATA, which counts what a process writes, not files that are mapped) that
is smaller than the images: both ways of reading tables have to get through, and a copy of the images in memory must not.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

WAYS = dict(files={}, shards=dict(data_format='hf'), stream=dict(data_format='hf', stream=True))
CLASSES = 100
BUFFER = 128 # large images that a stream shuffles


def make(folder: Path, n: int, side: int):
    "`n` JPEGs of blurred noise in class folders, and a twentieth as many to validate on."
    import cv2
    import numpy as np
    rng = np.random.default_rng(0)
    for split, k in (('train', n), ('val', n//20)):
        for c in range(min(CLASSES, k)): (folder/split/f'class {c}').mkdir(parents=True)
        for i in range(k):
            im = cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder/split/f'class {i % min(CLASSES, k)}'/f'{i}.jpg'), im)


def make_large(folder: Path, mb: float):
    "So many MB of PNGs of noise, which nothing compresses."
    import cv2
    import numpy as np
    rng = np.random.default_rng(1)
    for i in range(int(mb*1e6/(3*512*512))):
        f = folder/('val' if i < 20 else 'train')/'ab'[i % 2]/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(f), rng.integers(0, 256, (512, 512, 3), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 0])


def memory(key: str) -> float: # MiB
    "What this process has of a kind of memory: RssAnon is its own, without mapped files."
    return next(int(o.split()[1])/1024 for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key))


def look(way: str, at: Path, workers: int, seconds: float, side: int) -> dict:
    "Open the data, and draw batches for some seconds."
    from mstoolkit.data.core import image_dls
    before, start = memory('RssAnon'), time.perf_counter()
    dls = image_dls(at, size=side, bs=64, augment='light', num_workers=workers, device='cpu', **WAYS[way])
    listed = time.perf_counter()
    n, first, own = 0, None, []
    while first is None or time.perf_counter() < first + seconds:
        for x, _ in dls.train:
            if first is None: first = time.perf_counter()
            else: n += len(x)
            own.append(memory('RssAnon'))
            if time.perf_counter() > first + seconds: break
    return dict(listing=listed - start, first=first - listed, speed=n/(time.perf_counter() - first), MiB=max(own) - before, images=len(dls.train_ds))


def limited(way: str, at: Path, spare: float, side: int) -> dict:
    "Train an epoch with no more memory than `spare` MiB above what the libraries take, or say what was lacking."
    import torch
    from mstoolkit.callback.progress import RunHistory  # noqa: F401  all that is imported is, before the limit
    from mstoolkit.data.core import image_dls
    from mstoolkit.learner import fusion_learner
    torch.set_num_threads(1)
    import datasets  # noqa: F401
    data = next(int(o.split()[1]) for o in Path('/proc/self/status').read_text().splitlines() if o.startswith('VmData'))*1024
    resource.setrlimit(resource.RLIMIT_DATA, (int(data + spare*2**20),)*2)
    try:
        if way == 'copy': held = [bytearray(f.read_bytes()) for f in at.rglob('*.parquet')]; return dict(passed=bool(held), why='')
        dls = image_dls(at, size=side, bs=64, augment='none', num_workers=0, device='cpu', **WAYS[way], **(dict(buffer=BUFFER) if way == 'stream' else {}))
        learn = fusion_learner(dls, 'test_resnet', head='plain', pretrained=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return dict(passed=True, why='', MiB=memory('RssAnon'))
    except (MemoryError, RuntimeError, OSError) as e: return dict(passed=False, why=str(e)[:100] or type(e).__name__)


def child(*words) -> dict:
    "Run this file in another process."
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=100_000)
    p.add_argument('--side', type=int, default=64)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--seconds', type=float, default=15.)
    p.add_argument('--num-workers', type=int, default=1)
    p.add_argument('--where', type=Path, help='folder for the images: a temporary one')
    p.add_argument('--no-write', action='store_true', help='print the page and leave the file alone')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    p.add_argument('--one', nargs=2, metavar=('WHAT', 'DATA'))
    p.add_argument('--large-mb', type=float, default=1500, help='images of the training under a limit')
    p.add_argument('--spare', type=float, default=900, help='MiB that it may take')
    args = p.parse_args()
    if args.one:
        what, at = args.one[0], Path(args.one[1])
        if what.startswith('limited-'): print(json.dumps(limited(what.partition('-')[2], at, args.spare, args.side)))
        else: print(json.dumps(look(what, at, args.num_workers, args.seconds, args.side)))
        return
    with tempfile.TemporaryDirectory(dir=args.where) as tmp:
        os.environ['HF_DATASETS_CACHE'] = f'{tmp}/cache'
        page = measure(Path(tmp), args)
    print(page)
    if not args.no_write:
        from mstoolkit.core import write_text
        write_text(Path(__file__).with_suffix('.md'), page)


def measure(tmp: Path, args) -> str:
    "The page."
    from machine import machine
    from mstoolkit.data.make import pack_images
    make(tmp/'files', args.n, args.side)
    mb = sum(f.stat().st_size for f in (tmp/'files').rglob('*.jpg'))/1e6
    start = time.perf_counter()
    pack_images(tmp/'files', tmp/'shards', shard_mb=max(mb/8, .1))
    packed = time.perf_counter() - start
    at = lambda way: tmp/('files' if way == 'files' else 'shards')
    how = ['--num-workers', args.num_workers, '--seconds', args.seconds, '--side', args.side]
    rows: dict = {'shards, the first time': [child('--one', 'shards', at('shards'), *how)]}
    for _ in range(args.rounds):
        for way in WAYS: rows.setdefault(way, []).append(child('--one', way, at(way), *how))
    mid = lambda k, o: median(r[o] for r in rows[k])
    lines = [f"| {k} | {mid(k, 'listing'):.2f} | {mid(k, 'first'):.2f} | {mid(k, 'speed'):,.0f} | {mid(k, 'speed')/mid('files', 'speed'):.2f} | {mid(k, 'MiB'):.0f} |"
             for k in ('files', 'shards, the first time', 'shards', 'stream')]
    make_large(tmp/'large', args.large_mb)
    pack_images(tmp/'large', tmp/'large-shards', shard_mb=args.large_mb/8)
    os.environ['ARROW_DEFAULT_MEMORY_POOL'] = 'system' # Arrow's own takes addresses beforehand, which count
    tried = {k: child('--one', f'limited-{k}', tmp/'large-shards', '--spare', args.spare, '--side', args.side) for k in ('shards', 'stream', 'copy')}
    told = [f"| {k} | {'yes' if r['passed'] else 'no: ' + r['why']} |" for k, r in tried.items()]
    return '\n'.join(['# Images in tables', '', f"    python benchmarks/tables.py --n {args.n} --num-workers {args.num_workers}", '',
                      f"{args.date}, {machine()}; {args.n:,} JPEGs of {args.side} px, {mb:,.0f} MB; medians of {args.rounds} processes. "
                      f"Packing and checking took {packed:.1f} s.", '',
                      '| | listing, s | first batch, s | images/s | beside files | MiB of its own |', '|---|---|---|---|---|---|', *lines, '',
                      f'A training on {args.large_mb:,.0f} MB of images with {args.spare:,.0f} MiB to spare, and {BUFFER} images in the buffer of the stream:', '', '| | went through |', '|---|---|', *told, ''])


if __name__ == '__main__': main()
