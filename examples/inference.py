"""Predict a folder of images with a trained model, under Report A's command line.

    python examples/inference.py --model gate --weights runs/gate/model.safetensors --images datasets/data/test
    python examples/inference.py --model gate --weights gate_best.pt                  # a checkpoint of the report's own scripts
"""
import argparse
import sys

from mstoolkit.classifier import Classifier
from mstoolkit.predict import predict_folder, write_predictions

HEADS = dict(resnest='plain', pyramid='pyramid', gate='gated')


def parse(args=None):
    "Read the command line."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', choices=HEADS, required=True, help="which of the three models the weights are of")
    p.add_argument('--weights', required=True, help="model file, run folder, or .pt checkpoint of the report's scripts")
    p.add_argument('--images', default='datasets/data/test', help="folder of images")
    p.add_argument('--out', default='prediction.csv', help="CSV to write")
    return p.parse_args(args)


def main(args=None):
    "Load, check, predict, write."
    a = parse(args)
    clf = Classifier.load(a.weights)
    head = clf.header.config['head']
    if head != HEADS[a.model]:
        raise ValueError(f"{a.weights} holds a model with the {head} head, and --model {a.model} has the {HEADS[a.model]} head")
    print(f'predictions in {write_predictions(predict_folder(clf, a.images), a.out)}')


if __name__ == '__main__':
    try: main()
    except (ValueError, OSError) as e: sys.exit(f'{e}')
