"""Report B: MixUp or CutMix on a ResNet, ResNeXt or SE-ResNeXt with an MLP head (.907 validation, .93 test there).

    python examples/train_mix.py datasets/data --out runs/mix
    python examples/train_mix.py datasets/data --recipe mix-resnet50 --cutmix .3 --mixup .3

Recipes: mix-resnet50, mix-resnext50, mix-resnext101, mix-seresnextaa101d (the default, the report's best).
"""
import sys

from mstoolkit.cli import main

if __name__ == '__main__': sys.exit(main(['train', '--recipe', 'mix-seresnextaa101d', *sys.argv[1:]]))
