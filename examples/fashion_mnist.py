"""Fashion-MNIST from scratch on a CPU, in minutes: a small network and one cycle, chosen for the machine.

    python examples/fashion_mnist.py                     # data in data/fashion-mnist, run in runs/auto, 20 minutes
    python examples/fashion_mnist.py --minutes 2 --out runs/quick

A tenth of the training images is held out to choose by; the test images are looked at once, when the training is over.
"""
import argparse
from pathlib import Path

from mstoolkit.data.make import make_data
from mstoolkit.predict import predict_folder
from mstoolkit.train import train


def parse(args=None):
    "Read the command line."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', type=Path, default=Path('data/fashion-mnist'), help="image folder; made when it is not there")
    p.add_argument('--out', type=Path, help="run folder to make")
    p.add_argument('--minutes', type=float, default=20)
    p.add_argument('--size', type=int, help="the 28-pixel images are enlarged to this; chosen where it is not given")
    p.add_argument('--backbone', default='auto')
    return p.parse_args(args)


def main(args=None):
    "Make the data if need be, train, and report the accuracy on the test images."
    a = parse(args)
    if not a.data.exists(): make_data('fashion-mnist', a.data)
    given = dict(minutes=a.minutes, backbone=a.backbone, pretrained=False) | (dict(size=a.size) if a.size else {})
    learn = train('auto', a.data, a.out, given=given, valid='none', valid_pct=.1)
    answers = predict_folder(learn, a.data/'test')
    right = answers.pred_label == [Path(o).parent.name for o in answers.image_name]
    print(f"test accuracy {right.mean():.4f} on {len(right):,} images, training in {learn.path}")


if __name__ == '__main__': main()
