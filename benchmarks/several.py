"""What several models and several views bring on test images: accuracy beside the first model, certainty, and time.

    python benchmarks/several.py TEST single=runs/single folds=runs/folds combined=runs/combined student=runs/student --tta flip

TEST has a folder for each class; each model is a run folder, a folder of folds, or a model file, under a name for the table. Nothing
is chosen here: train and combine first, on validation, then look once. Prints a table for benchmarks/several.md.
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine
from mstoolkit.classifier import Classifier
from mstoolkit.data.sources import image_files
from mstoolkit.evaluate.calibration import sureness
from mstoolkit.evaluate.stats import accuracy_interval, mcnemar, paired_interval
from mstoolkit.predict import predict_probs


def judged(clf: Classifier, files: list, y: torch.Tensor, tta: str) -> tuple: # seconds, right or wrong, certainty
    "The answers of a model to labelled images."
    start = time.perf_counter()
    probs, good, bad = predict_probs(clf, files, tta=tta, device='cpu')
    if bad: raise ValueError(f'{len(bad)} images cannot be read')
    return time.perf_counter() - start, (probs.argmax(1) == y).numpy(), sureness(probs, y)


def row(name: str, took: float, right, sure, base) -> str:
    lo, hi = accuracy_interval(right)
    beside = '' if base is None else '{:+.1f} ({:+.1f} to {:+.1f})'.format(*(100*o for o in paired_interval(right, base)))
    p = '' if base is None else f'{mcnemar(right[None], base[None]).p:.2g}'
    return (f'| {name} | {took:.0f} | {right.mean():.3f} ({lo:.3f} to {hi:.3f}) | {beside} | {p} | {sure.log_loss:.3f} ({sure.perfect_loss_high:.3f}) '
            f'| {sure.ece:.3f} ({sure.perfect_ece_high:.3f}) |')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('test', type=Path)
    p.add_argument('models', nargs='+', help='NAME=PATH; the first is what the others are compared with')
    p.add_argument('--tta', nargs='*', default=[], help='views to try on the first model')
    o = p.parse_args()
    models = dict(m.split('=', 1) for m in o.models)
    files = image_files(o.test)
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}; {len(files):,} images of {o.test.name}. In brackets: intervals; below what a perfect model "
          'of that certainty is in 95 of 100 draws.\n')
    print('| model | seconds | accuracy | points beside the first | p | log loss | ECE |\n|---|---|---|---|---|---|---|')
    base = None
    for name, path in models.items():
        clf = Classifier.load(path)
        y = torch.tensor([list(clf.header.classes).index(f.relative_to(o.test).parts[0]) for f in files])
        ways = [(name, clf, 'none')] + ([(f'{name}, --tta {t}', clf, t) for t in o.tta] if base is None else [])
        if clf.header.temperature != 1: ways.append((f'{name}, not calibrated', Classifier(clf.model, replace(clf.header, temperature=1.)), 'none'))
        for called, c, tta in ways:
            took, right, sure = judged(c, files, y, tta)
            print(row(called, took, right, sure, base), flush=True)
            if base is None: base = right


if __name__ == '__main__': main()
