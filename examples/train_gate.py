"""Report A's best model, gated fusion: ResNeSt-101e, CutMix, label smoothing (.920 validation, .95 test there).

    python examples/train_gate.py datasets/data --out runs/gate

Every choice is in the recipe `gate` (`mstoolkit/recipe.py`) and can be overridden here: --epochs 30 --backbone resnet50 --bs 16 …
"""
import sys

from mstoolkit.cli import main

if __name__ == '__main__': sys.exit(main(['train', '--recipe', 'gate', *sys.argv[1:]]))
