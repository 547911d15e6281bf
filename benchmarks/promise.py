"""The accuracy that `submit` promises beside the one that test images show, over several splits of one set of images.

    python benchmarks/promise.py FOLDER… --recipe demo --set size=32 epochs=6          # from scratch
    python benchmarks/promise.py groc2 groc_test --weights-dir W --minutes 5           # `auto`, five minutes for all folds of a split

All images of the folders (…/CLASS/image) are put together and split by chance, anew for each split; `submit` trains folds on one side and
promises how often it will be right on the other. Promise and outcome belong together only where the images are of one kind, so the splits
are by chance on purpose; a set's own test images may come from elsewhere, which no promise can know.
"""
import argparse
import random
import shutil
import statistics
import tempfile
import time
import tomllib
from pathlib import Path

import pandas as pd
from machine import machine
from mstoolkit.data.sources import image_files
from mstoolkit.several.submit import submit


def value(text: str):
    "The value that TOML reads there; what it cannot read is text."
    try: return tomllib.loads(f'v = {text}')['v']
    except tomllib.TOMLDecodeError: return text


def split(files: list[Path], out: Path, share: float, most: int, seed: int) -> tuple[Path, Path]:
    "Two folders of classes: to train on, and to predict. Classes with fewer than ten images are left out of both."
    rng, per = random.Random(seed), {}
    for f in files: per.setdefault(f.parent.name, []).append(f)
    mine = [f for own in per.values() if len(own) >= 10 for f in own]
    mine = rng.sample(mine, min(most, len(mine)))
    k = round(share*len(mine))
    for side, own in dict(data=mine[:k], images=mine[k:]).items():
        for i, f in enumerate(own):
            to = out/side/f.parent.name/f'{i}{f.suffix}'
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f, to)
    return out/'data', out/'images'


def one(o, files: list[Path], seed: int) -> tuple: # test images, what was promised, accuracy on them
    with tempfile.TemporaryDirectory() as tmp:
        data, images = split(files, Path(tmp), o.share, o.most, seed)
        given = dict(seed=seed) | {k: value(v) for k, v in (s.split('=', 1) for s in o.set)} | (dict(minutes=o.minutes) if o.minutes else {})
        exp = submit(data, images, Path(tmp)/'p.csv', folds=o.folds, recipe=o.recipe, given=given, weights_dir=o.weights_dir, tta=o.tta)
        df = pd.read_csv(Path(tmp)/'p.csv', dtype=str)
        right = (df.pred_label == df.image_name.str.split('/').str[0]).to_numpy()
        return len(right), exp, right.mean()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folders', type=Path, nargs='+')
    p.add_argument('--splits', type=int, default=5)
    p.add_argument('--share', type=float, default=.5, help='of the images, to train on')
    p.add_argument('--most', type=int, default=10**9, help='images of a split, both sides together')
    p.add_argument('--folds', type=int, default=5)
    p.add_argument('--recipe', default='auto')
    p.add_argument('--minutes', type=float, default=0)
    p.add_argument('--weights-dir', default='')
    p.add_argument('--tta', default='none')
    p.add_argument('--set', nargs='*', default=[], metavar='FIELD=VALUE', help="the recipe's fields")
    o = p.parse_args()
    files = [f for d in o.folders for f in image_files(d)]
    rows, gaps = [one(o, files, s) for s in range(o.splits)], []
    print(f"\n{time.strftime('%Y-%m-%d')}, {machine()}; {o.folds} folds each.\n")
    print('| split | test images | promised | its interval | test | inside |\n|---|---|---|---|---|---|')
    for s, (n, exp, test) in enumerate(rows):
        inside = 'yes' if exp.low <= test <= exp.high else '**no**'
        gaps.append(100*(exp.accuracy - test))
        print(f'| {s} | {n:,} | {exp.accuracy:.3f} | {exp.low:.3f} to {exp.high:.3f} | {test:.3f} | {inside} |')
    told = ', '.join(f'{g:+.1f}' for g in gaps)
    print(f'\nPromised less shown, in points: {told}; median {statistics.median(gaps):+.1f}.')


if __name__ == '__main__': main()
