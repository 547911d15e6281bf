"""The accuracy that a time buys: `mstoolkit train --minutes` beside fastai's `fine_tune`, on photographs of your own.

    python benchmarks/accuracy.py DATA TEST --weights-dir W --fastai              # as fastai's tutorial has it: 1+6 epochs at 160 px
    python benchmarks/accuracy.py DATA TEST --weights-dir W --minutes 5 10 20     # ours: each a command, from start to model on disk
    python benchmarks/accuracy.py DATA TEST --weights-dir W --minutes 5 --seeds 3

DATA has train/CLASS and val/CLASS, TEST has CLASS folders that no training and no choice sees. A row is added to
benchmarks/accuracy.csv for each run, with the time by the clock on the wall. fastai gets the same weights for the same network.
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from fastai.vision.all import (CrossEntropyLossFlat, ImageDataLoaders, Normalize, Resize, accuracy, aug_transforms, set_seed, vision_learner)
from mstoolkit.core import write_text
from mstoolkit.models.backbone import read_weights

NET, SIDE = 'tf_efficientnet_lite0', 160


def score(predicted, test):
    "Accuracy of a table of `image_name`, `pred_label` on class folders."
    return float((predicted.pred_label == predicted.image_name.str.split('/').str[0]).mean())


def fastai(o, seed):
    "fastai's own way, with its defaults: presize, its augmentations, its head, `fine_tune(6)`."
    set_seed(seed, reproducible=True)
    dls = ImageDataLoaders.from_folder(o.data, train='train', valid='val', item_tfms=Resize(200), bs=64, seed=seed, device='cpu',
                                       batch_tfms=[*aug_transforms(size=SIDE, min_scale=.75), Normalize.from_stats([.5]*3, [.5]*3)])
    learn = vision_learner(dls, NET, pretrained=False, normalize=False, n_out=dls.c, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    body = learn.model[0].model
    missing = body.load_state_dict(read_weights(next(Path(o.weights_dir).glob(f'{NET}.*'))), strict=False).missing_keys
    assert not [k for k in missing if 'num_batches' not in k], missing
    learn.freeze()
    start = time.perf_counter()
    learn.fine_tune(o.epochs)
    spent, files = time.perf_counter() - start, sorted(Path(o.test).glob('*/*'))
    preds = learn.get_preds(dl=learn.dls.test_dl(files))[0].argmax(1)
    right = [dls.vocab[i] == f.parent.name for i, f in zip(preds.tolist(), files)]
    return spent, float(learn.validate()[1]), sum(right)/len(right)


def ours(o, minutes, seed):
    "One command, then another."
    with tempfile.TemporaryDirectory() as tmp:
        run, csv = Path(tmp)/'run', Path(tmp)/'p.csv'
        command = [sys.executable, '-m', 'mstoolkit']
        start = time.perf_counter()
        subprocess.run([*command, 'train', o.data, '--minutes', str(minutes), '--weights-dir', o.weights_dir, '--seed', str(seed),
                        '--out', str(run), *o.options], check=True)
        spent = time.perf_counter() - start
        subprocess.run([*command, 'predict', str(run), o.test, '--out', str(csv)], check=True)
        valid = pd.read_csv(run/'valid_predictions.csv')
        if o.keep: shutil.copytree(run, Path(o.keep)/f'{minutes:g}-{seed}')
        return spent, float((valid.pred_label == valid.label).mean()) if 'label' in valid else float('nan'), score(pd.read_csv(csv), o.test)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data'); p.add_argument('test')
    p.add_argument('--weights-dir', required=True)
    p.add_argument('--fastai', action='store_true')
    p.add_argument('--epochs', type=int, default=6, help="of fastai's unfrozen phase")
    p.add_argument('--minutes', type=float, nargs='*', default=[])
    p.add_argument('--seeds', type=int, default=1)
    p.add_argument('--keep', help='folder to keep our runs in')
    p.add_argument('--options', nargs=argparse.REMAINDER, default=[], help='further options of `mstoolkit train`; last')
    o = p.parse_args()
    jobs = [('fastai', s) for s in range(o.seeds) if o.fastai] + [(m, s) for m in o.minutes for s in range(o.seeds)]
    for what, seed in jobs:
        spent, valid, test = fastai(o, seed) if what == 'fastai' else ours(o, what, seed)
        row = dict(date=time.strftime('%Y-%m-%d'), data=Path(o.data).name, what=what if what == 'fastai' else f'--minutes {what:g}',
                   options=' '.join(o.options), seed=seed, seconds=round(spent), valid=round(valid, 4), test=round(test, 4),
                   threads=torch.get_num_threads())
        file = Path(__file__).with_suffix('.csv')
        before = pd.read_csv(file) if file.exists() else pd.DataFrame()
        write_text(file, pd.concat([before, pd.DataFrame([row])]).to_csv(index=False))
        print(row, flush=True)


if __name__ == '__main__': main()
