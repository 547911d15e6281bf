"""Does sharpness-aware minimisation (SAM, Foret et al. 2021, arXiv:2010.01412) pay at equal time?

    python benchmarks/sam.py DATA --recipe benchmarks/parts-navon-recipe.toml               # 64 px from scratch
    python benchmarks/sam.py DATA --recipe benchmarks/parts-recipe.toml --weights-file W    # fine-tuning

Every step of SAM is two: up the gradient to the worst weights within a radius, and down from where one was with the gradient found there.
So the cell with SAM has half the epochs. DATA has train/CLASS and val/CLASS; what counts is the best epoch's model, as in every run.
"""
import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from fastai.callback.core import Callback
from machine import machine
from mstoolkit.recipe import load_recipe
from mstoolkit.runs import Run
from mstoolkit.train import train


class SAM(Callback):
    "Step with the gradient at the worst weights within `rho`, as the paper's algorithm 1 has it, in a learner that mixes."
    order = 100  # after whatever else looks at the first gradient
    def __init__(self, rho: float): self.rho = rho

    def before_step(self):
        ps = [p for p in self.model.parameters() if p.grad is not None]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in ps]).norm()
            up = [p.grad*(self.rho/(norm + 1e-12)) for p in ps]
            torch._foreach_add_(ps, up)
        norms = [(m, m.momentum) for m in self.model.modules() if getattr(m, 'momentum', None) is not None]
        for m, _ in norms: m.momentum = 0.  # running statistics are those of the weights that stay
        for p in ps: p.grad = None
        pred, mix = self.model(*self.xb), self.learn.batch_mix
        loss = self.loss_func(pred, *self.yb)
        if mix.mixed: loss = torch.lerp(self.loss_func(pred, *mix.yb_b), loss, mix.lam)
        loss.backward()
        for m, was in norms: m.momentum = was
        with torch.no_grad(): torch._foreach_sub_(ps, up)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data')
    p.add_argument('--recipe', required=True)
    p.add_argument('--weights-file', default='')
    p.add_argument('--rho', type=float, nargs='+', default=[0., .05], help='radii; 0 is without')
    p.add_argument('--seeds', type=int, default=3)
    o = p.parse_args()
    base = replace(load_recipe(o.recipe), weights_file=o.weights_file, device='cpu')
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}\n\n| cell | epochs | accuracy, a seed each | mean | seconds |\n|---|---|---|---|---|", flush=True)
    for rho in o.rho:
        r, found, spent = replace(base, epochs=max(1, base.epochs//2) if rho else base.epochs), [], []
        for seed in range(o.seeds):
            with tempfile.TemporaryDirectory() as tmp:
                start = time.perf_counter()
                train(replace(r, seed=seed), o.data, Path(tmp)/'run', cbs=[SAM(rho)] if rho else None)
                spent.append(time.perf_counter() - start)
                found.append(Run(Path(tmp)/'run').accuracy)
        print(f"| {f'SAM, radius {rho:g}' if rho else 'without'} | {r.epochs} | {', '.join(f'{a:.4f}' for a in found)} | "
              f'{statistics.mean(found):.4f} | {statistics.median(spent):.0f} |', flush=True)


if __name__ == '__main__': main()
