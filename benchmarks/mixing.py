"""What mixing a batch costs: `BatchMix` beside fastai's CutMix, timm's Mixup and torchvision's v2.CutMix.

    python benchmarks/mixing.py                  # on the CPU
    python benchmarks/mixing.py --device cuda

Every batch is cut (probability 1, alpha 1), so that like is compared with like. Timed is all that mixing adds to a step: the
mixed batch, its targets, and the loss they ask for (given the model's output), less the loss of an unmixed step. The loss is
torch's cross entropy, save for fastai's CutMix, which can only take apart fastai's `CrossEntropyLossFlat`. Every step gets another batch, as in training. They
take turns in random order within each round; a figure is the median over the rounds of a round's mean.
fastai's and timm's write into the batch they are given, and so does ours where a loader says that it is nobody else's, as those
of `image_dls` do; torchvision's and ours with any other loader leave it as it is.
"""
import argparse
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from fastai.callback.mixup import CutMix as FastaiCutMix
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from matplotlib.figure import Figure
from machine import machine
from mstoolkit.callback.mix import BatchMix
from mstoolkit.core import keep_freed_memory
from mstoolkit.core import write_text
from timm.data.mixup import Mixup as TimmMixup
from timm.loss import SoftTargetCrossEntropy
from torchvision.transforms import v2

n_classes = 100


def callback_step(cb, own=False):
    "A step of callback `cb` on a learner that is never fitted, whose loader says that batches are its own: mix the batch, then the loss."
    loss_func = torch.nn.CrossEntropyLoss() if isinstance(cb, BatchMix) else CrossEntropyLossFlat()
    learn = Learner(DataLoaders([], []), torch.nn.Identity(), loss_func=loss_func, cbs=cb, default_cbs=False)
    learn.training, learn.dl = True, SimpleNamespace(own_batches=own)
    if isinstance(cb, BatchMix): cb.active = True
    else: cb.before_train()

    def mix(x, y): learn.xb, learn.yb = (x,), (y,); cb.before_batch()

    def loss(pred):
        learn.pred, learn.loss_grad = pred, learn.loss_func(pred, *learn.yb)
        if isinstance(cb, BatchMix): cb.after_loss()
        return learn.loss_grad
    return SimpleNamespace(mix=mix, loss=loss)


def transform_step(transform, loss_func):
    "A step of a transform of (x, y) into mixed images and soft targets."
    step = SimpleNamespace()
    def mix(x, y): step.x, step.y = transform(x, y)
    step.mix, step.loss = mix, lambda pred: loss_func(pred, step.y)
    return step


def plain_step(loss_func):
    "A step without mixing: what the others' loss is compared with."
    step = SimpleNamespace(loss=lambda pred: loss_func(pred, step.y))
    def mix(x, y): step.y = y
    step.mix = mix
    return step


steps = {
    'mstoolkit BatchMix': lambda: callback_step(BatchMix(1., seed=0), own=True),
    'mstoolkit BatchMix, any loader': lambda: callback_step(BatchMix(1., seed=0)),
    'fastai CutMix': lambda: callback_step(FastaiCutMix(1.)),
    'timm Mixup (cutmix)': lambda: transform_step(TimmMixup(mixup_alpha=0., cutmix_alpha=1., label_smoothing=0., num_classes=n_classes),
                                                  SoftTargetCrossEntropy()),
    'torchvision v2.CutMix': lambda: transform_step(v2.CutMix(alpha=1., num_classes=n_classes), F.cross_entropy),
    'fastai unmixed': lambda: plain_step(CrossEntropyLossFlat()),
    'torch unmixed': lambda: plain_step(F.cross_entropy)}
unmixed = {k: 'fastai unmixed' if 'fastai' in k else 'torch unmixed' for k in list(steps)[:5]}


def measure(device, bs, size, rounds, batches):
    "{name: (ms of mixing, ms of the loss)} per batch."
    pool = [(torch.randn(bs, 3, size, size, device=device), torch.randint(n_classes, (bs,), device=device)) for _ in range(batches+1)]
    pred = torch.randn(bs, n_classes, device=device, requires_grad=True)
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    made, times, rng = {k: f() for k, f in steps.items()}, {k: ([], []) for k in steps}, np.random.default_rng(0)
    for r in range(rounds+2):
        for name in rng.permutation(list(steps)):
            step, total = made[name], [0., 0.]
            for b, (x, y) in enumerate(pool):
                sync(); t0 = time.perf_counter()
                step.mix(x, y)
                sync(); t1 = time.perf_counter()
                step.loss(pred)
                sync(); t2 = time.perf_counter()
                if b: total[0] += t1-t0; total[1] += t2-t1  # the first of a turn finds another's memory and caches
            if r > 1:
                for kept, t in zip(times[name], total): kept.append(1e3*t/batches)
    return {k: tuple(map(statistics.median, v)) for k, v in times.items()}


def draw(costs, title):
    "A bar per library: mixing and what the loss takes more."
    names = list(costs)[::-1]
    fig = Figure(figsize=(7.5, 2.6), layout='constrained')
    ax = fig.subplots()
    mix, loss = ([costs[k][i] for k in names] for i in (0, 1))
    ax.barh(names, mix, color='#0072B2', label='images and targets')
    ax.barh(names, loss, left=mix, color='#E69F00', label='loss, beyond the plain one')
    for i, k in enumerate(names): ax.text(sum(costs[k]), i, f' {sum(costs[k]):.2f}', va='center')
    ax.set(xlabel='ms per mixed batch', title=title, xlim=(0, 1.15*max(map(sum, costs.values()))))
    ax.legend(fontsize='small', loc='upper right')
    return fig


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--rounds', type=int, default=60)
    p.add_argument('--batches', type=int, default=6, help='batches a turn')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    p.add_argument('--out', type=Path, default=Path(__file__).parent)
    o = p.parse_args()
    if o.device == 'cpu': keep_freed_memory()  # as `train` does, for all four alike
    ms = measure(o.device, o.bs, o.size, o.rounds, o.batches)
    costs = {k: (ms[k][0], max(ms[k][1] - ms[plain][1], 0.)) for k, plain in unmixed.items()}
    ours = sum(costs['mstoolkit BatchMix'])
    what = f'batch {o.bs} × 3 × {o.size} × {o.size}, float32'
    rows = [f'| {k} | {m:.2f} | {lo:.2f} | {m+lo:.2f} | {(m+lo)/ours:.2f} |' for k, (m, lo) in costs.items()]
    name = 'mixing' if o.device == 'cpu' else 'mixing-cuda'
    draw(costs, f'CutMix, {what}, {o.device}').savefig(o.out/f'{name}.png', dpi=110)
    text = '\n'.join([
        f'# The cost of mixing, {o.device}', '',
        f'`python benchmarks/mixing.py --device {o.device} --rounds {o.rounds} --batches {o.batches}`', '',
        f'{machine(o.device)}; {o.date}; torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}.',
        f'{what}; ms per batch, medians of {o.rounds} rounds in which the libraries take turns. Every batch is mixed.', '',
        '| | images and targets | loss, beyond an unmixed one | together | ÷ ours |', '|---|---|---|---|---|', *rows, '',
        f'![ms per batch]({name}.png)', '',
        "fastai's and timm's write into the batch they are given, ours where it is the loader's own, as those of `image_dls` are, torchvision's never. "
        'All that `BatchMix` draws is drawn on the CPU.', ''])
    print(text)
    write_text(o.out/f'{name}.md', text)


if __name__ == '__main__':
    matplotlib.use('agg')
    main()
