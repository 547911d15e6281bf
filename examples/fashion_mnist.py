"""Fashion-MNIST from scratch on a CPU: all 60,000 training images, a small network with the gated head, one cycle.

    python examples/fashion_mnist.py                     # data in data/fashion-mnist, run in runs/fashion-mnist
    python examples/fashion_mnist.py --epochs 1 --out runs/quick

The twelve epochs took 16.7 minutes on two cores (AMD EPYC, 2026-11-22) and gave a test accuracy of .9275.

The test images are looked at after every epoch, to draw the curve; the accuracy reported is that of the last epoch,
so no epoch is chosen by them.
"""
import argparse
from dataclasses import replace
from pathlib import Path

from mstoolkit.data.make import make_data
from mstoolkit.recipe import Recipe
from mstoolkit.train import train

RECIPE = Recipe(name='fashion-mnist', backbone='test_resnet', head='gated', pretrained=False, size=56, augment='shift',
                epochs=12, bs=64, lr=4e-3, wd=.05, opt='adamw', schedule='one-cycle', loss='smoothed', smoothing=.1,
                cutmix=0., plateau_patience=-1, stop_patience=0)


def parse(args=None):
    "Read the command line."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', type=Path, default=Path('data/fashion-mnist'), help="image folder; made when it is not there")
    p.add_argument('--out', type=Path, help="run folder to make")
    p.add_argument('--epochs', type=int, default=RECIPE.epochs)
    p.add_argument('--size', type=int, default=RECIPE.size, help="the 28-pixel images are enlarged to this")
    p.add_argument('--backbone', default=RECIPE.backbone)
    p.add_argument('--lr', type=float, default=RECIPE.lr)
    return p.parse_args(args)


def main(args=None):
    "Make the data if need be, train, and report the test accuracy of the last epoch."
    a = parse(args)
    if not a.data.exists(): make_data('fashion-mnist', a.data)
    r = replace(RECIPE, epochs=a.epochs, size=a.size, backbone=a.backbone, lr=a.lr)
    learn = train(r, a.data, a.out, valid='test')
    rows = learn.run_history.rows
    print(f"test accuracy {rows[-1]['accuracy']:.4f} after epoch {len(rows)} on {len(learn.dls.valid_ds):,} images, "
          f"{sum(o['seconds'] for o in rows)/60:.1f} minutes")


if __name__ == '__main__': main()
