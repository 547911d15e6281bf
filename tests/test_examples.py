"Every example script runs on a tiny folder, as its docstring says."
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY

EXAMPLES = Path(__file__).parent.parent/'examples'


def run(script, *args):
    out = subprocess.run([sys.executable, EXAMPLES/f'{script}.py', *map(str, args)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.mark.parametrize('script,head', [('train_resnest', 'plain'), ('train_pyramid', 'pyramid'), ('train_gate', 'gated'), ('train_mix', 'mlp')])
def test_train_scripts(script, head, image_folder, tiny_options, tmp_path):
    out = run(script, image_folder, '--out', tmp_path/'run', *tiny_options[2:])
    assert f'{head} head on {TINY["backbone"]}' in out and (tmp_path/'run'/'model.safetensors').exists()


def test_inference(image_folder, tiny_options, tmp_path):
    run('train_gate', image_folder, '--out', tmp_path/'run', *tiny_options[2:])
    csv = tmp_path/'p.csv'
    run('inference', '--model', 'gate', '--weights', tmp_path/'run'/'model.safetensors', '--images', image_folder/'test', '--out', csv)
    assert len(pd.read_csv(csv)) == 9
    args = '--model', 'pyramid', '--weights', tmp_path/'run', '--images', image_folder/'test'
    wrong = subprocess.run([sys.executable, EXAMPLES/'inference.py', *args], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.strip().endswith('--model pyramid has the pyramid head') and 'Traceback' not in wrong.stderr


def test_parameter_calculate(): assert '51,704,004' in run('parameter_calculate')


def test_fashion_mnist(image_folder, tmp_path):
    out = run('fashion_mnist', '--data', image_folder, '--out', tmp_path/'run', '--minutes', .05, '--size', 32, '--backbone', 'test_resnet')
    assert re.search(r'test accuracy [01]\.\d{4} on 9 images', out)
