"""Report A's baseline: ResNeSt-101e, CutMix, plain cross entropy (.903 validation, .93 test there).

    python examples/train_resnest.py datasets/data --out runs/resnest

Every choice is in the recipe `resnest` (`mstoolkit/recipe.py`) and can be overridden here: --epochs 30 --backbone resnet50 --bs 16 …
"""
import sys

from mstoolkit.cli import main

if __name__ == '__main__': sys.exit(main(['train', '--recipe', 'resnest', *sys.argv[1:]]))
