"""Predict a folder of images with a trained model, under Report A's command line.

    python examples/inference.py --model gate --weights runs/gate/model.safetensors --images datasets/data/test
"""
import argparse
import sys

from mstoolkit.cli import main

HEADS = dict(resnest='plain', pyramid='pyramid', gate='gated')


def parse(args=None):
    "Read the command line."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', choices=HEADS, required=True, help="which of the three models the weights are of")
    p.add_argument('--weights', required=True, help="model file or run folder")
    p.add_argument('--images', default='datasets/data/test', help="folder of images")
    p.add_argument('--out', default='prediction.csv', help="CSV to write")
    return p.parse_args(args)


def check_model(model, weights):
    "Refuse weights of another model than the one named."
    from mstoolkit.artifact import read_header
    head = read_header(weights).config['head']
    if head != HEADS[model]: sys.exit(f"{weights} holds a model with the {head} head, and --model {model} has the {HEADS[model]} head")


if __name__ == '__main__':
    a = parse()
    check_model(a.model, a.weights)
    sys.exit(main(['predict', a.weights, a.images, '--out', a.out]))
