"""Label errors that were planted: how many of them are at the head of the list that folds leave, for somebody to look at.

    python benchmarks/labels.py                   # navon, the global letter, 2,000 images, 2 % of the labels changed
    python benchmarks/labels.py --seeds 5
    python benchmarks/labels.py --weights-file W   # EfficientNet-Lite0's: a head on features computed once, in a minute a seed

Each seed draws other images whose label is changed to another class. Five folds are trained, and the page's list (the images whose label
is contradicted most surely by the fold that held them out) is read as far as there are planted errors, and twice and four times as far.
"""
import argparse
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from machine import machine
from mstoolkit.data.make import make_navon
from mstoolkit.evaluate.interpret import label_errors
from mstoolkit.recipe import Recipe
from mstoolkit.several.folds import train_folds


def plant(train: Path, share: float, seed: int) -> set: # names of the files
    "Move a share of the images into the folder of another class."
    rng, files = random.Random(seed), sorted(train.glob('*/*'))
    classes, chosen = sorted(o.name for o in train.iterdir()), rng.sample(files, round(share*len(files)))
    for f in chosen: f.rename(train/rng.choice([c for c in classes if c != f.parent.name])/f.name)
    return {f.name for f in chosen}


def one(o, seed: int) -> tuple[int, list[int], float]: # planted, found in the first 1, 2 and 4 times as many, accuracy out of fold
    with tempfile.TemporaryDirectory() as tmp:
        data = make_navon(Path(tmp)/'data', n_train=o.n, n_valid=10, n_test=10, size=48, seed=seed, label='global')
        planted = plant(data/'train', o.share, seed)
        r = Recipe(backbone='resnet10t', pretrained=False, size=48, augment='none', epochs=o.epochs, lr=4e-3, opt='adamw', wd=.05, schedule='one-cycle',
                   cutmix=0., plateau_patience=-1, stop_patience=0, num_workers=0, seed=seed)
        if o.weights_file:
            r = replace(r, backbone='tf_efficientnet_lite0', weights_file=o.weights_file, size=96, schedule='fine-tune', epochs=1, probe=True,
                        frozen_stages=4, keep_bn=True, lr=1e-3)
        s = train_folds(r, data, Path(tmp)/'folds', folds=5, valid='none')
        listed = [Path(name).name for name in label_errors(s.preds).image]
        k = len(planted)
        return k, [len(planted & set(listed[:m*k])) for m in (1, 2, 4)], s.accuracy


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=2000, help='images')
    p.add_argument('--share', type=float, default=.02, help='of the labels that is changed')
    p.add_argument('--epochs', type=int, default=12)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--weights-file', default='')
    o = p.parse_args()
    rows = [one(o, s) for s in range(o.seeds)]
    k = rows[0][0]
    print(f"\n{time.strftime('%Y-%m-%d')}, {machine()}; {o.n:,} images, {k} labels of them changed.\n")
    print(f'| seed | accuracy out of fold | among the first {k} | first {2*k} | first {4*k} |\n|---|---|---|---|---|')
    for s, (_, found, acc) in enumerate(rows): print(f"| {s} | {acc:.3f} | {' | '.join(f'{f} of {k}' for f in found)} |")
    print(f'\nMedian share among as many as were planted: {statistics.median(f[0]/k for _, f, _ in rows):.2f}.')


if __name__ == '__main__': main()
