"""Report A's pyramid fusion: ResNeSt-101e, CutMix, label smoothing (.907 validation, .94 test there).

    python examples/train_pyramid.py datasets/data --out runs/pyramid

Every choice is in the recipe `pyramid` (`mstoolkit/recipe.py`) and can be overridden here: --epochs 30 --backbone resnet50 --bs 16 …
"""
import sys

from mstoolkit.cli import main

if __name__ == '__main__': sys.exit(main(['train', '--recipe', 'pyramid', *sys.argv[1:]]))
