"The command line: what it does, how fast it answers, and one clear line for every mistake."
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields

import pandas as pd
import pytest
from mstoolkit.classifier import read_header
from mstoolkit.cli import main
from mstoolkit.recipe import load_recipe


@pytest.fixture
def run_folder(image_folder, tiny_options, tmp_path):
    assert main(['train', str(image_folder), '--recipe', 'gate', '--out', str(tmp_path/'runs'/'gate'), *tiny_options]) == 0
    return tmp_path/'runs'/'gate'


@pytest.mark.parametrize('code', ['import mstoolkit.cli', 'from mstoolkit.cli import main; main(["--help"])',
                                  'from mstoolkit.cli import main; main(["train", "--help"])'])
def test_help_loads_neither_torch_nor_fastai(code):
    check = f'{code}\nimport sys; print([m for m in ("torch", "fastai", "timm", "albumentations", "pandas", "matplotlib") if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', check], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == '[]'


def test_train_then_predict(run_folder, image_folder, tmp_path, capsys):
    for f in ('recipe.toml', 'history.csv', 'model.safetensors', 'environment.json', 'figures/curves.png'): assert (run_folder/f).stat().st_size, f
    assert len(pd.read_csv(run_folder/'history.csv')) == 1
    assert read_header(run_folder).classes == ['2', '10', 'red apple']
    assert load_recipe(run_folder/'recipe.toml').size == 32
    csv = tmp_path/'prediction.csv'
    assert main(['predict', str(run_folder), str(image_folder/'test'), '--out', str(csv), '--top-k', '2', '--confidence']) == 0
    df = pd.read_csv(csv, dtype={'image_name': str, 'pred_label': str})
    assert list(df) == ['image_name', 'pred_label', 'label_1', 'confidence_1', 'label_2', 'confidence_2']
    assert len(df) == 9 and list(df.image_name) == sorted(df.image_name) and df.image_name[0] == '10/0'
    assert set(df.pred_label) <= {'2', '10', 'red apple'}
    assert ((df.confidence_1 >= df.confidence_2) & (df.confidence_1 + df.confidence_2 <= 1.00001)).all()
    capsys.readouterr()
    assert main(['predict', str(run_folder), str(image_folder/'test'), '--out', str(csv)]) == 2  # nothing is overwritten
    assert 'already exists' in capsys.readouterr().err
    assert main(['predict', str(run_folder), str(image_folder/'test'), '--out', str(csv), '--zip']) == 0
    with zipfile.ZipFile(csv.with_suffix('.zip')) as z: assert z.namelist() == ['prediction.csv']


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_a_name_that_is_not_utf8(run_folder, image_folder, tmp_path, capsys):
    shutil.copy(image_folder/'train'/'2'/'0.png', image_folder/'test'/'2'/os.fsdecode(b'odd\xff.png'))
    capsys.readouterr()
    assert main(['check', str(image_folder), '--json', '--html', str(tmp_path/'page.html')]) == 1  # a leak
    leak = next(f for f in json.loads(capsys.readouterr().out)['findings'] if f['kind'] == 'leak (exact)')
    assert any(p.endswith('odd\udcff.png') for p in leak['files'][0])
    assert r'odd\udcff.png' in (tmp_path/'page.html').read_text(encoding='utf-8')
    assert main(['predict', str(run_folder), str(image_folder/'test'), '--out', str(tmp_path/'p.csv')]) == 0
    assert r'2/odd\udcff' in list(pd.read_csv(tmp_path/'p.csv').image_name)


def test_lists_and_folders_are_not_mixed(image_folder, capsys):
    (image_folder/'val.txt').write_text('val/2/0.png 2\n')
    for command in ('check', 'train'):
        assert main([command, str(image_folder), '--valid', 'val.txt']) == 2
        assert "is a list, and train='train' is not: give two lists, or two folders" in capsys.readouterr().err
    assert main(['check', str(image_folder), '--valid', 'nope.txt']) == 2
    assert 'there is no validation folder or list' in capsys.readouterr().err


def test_check(image_folder, tmp_path, capsys):
    page = tmp_path/'check.html'
    assert main(['check', str(image_folder), '--html', str(page)]) == 0
    assert 'nothing here would hurt training' in capsys.readouterr().out and page.read_text().startswith('<!doctype html>')
    shutil.copy(image_folder/'train'/'2'/'0.png', image_folder/'val'/'2'/'leak.png')
    assert main(['check', str(image_folder), '--json']) == 1
    assert 'leak (exact)' in [f['kind'] for f in json.loads(capsys.readouterr().out)['findings']]
    assert main(['check', str(image_folder), '--fast']) == 1  # the same to the byte
    assert main(['check', str(image_folder), '--train', 'no.txt']) == 2
    assert main(['check', str(image_folder/'train'/'2'/'0.png')]) == 2
    assert main(['check', str(image_folder), '--html', str(page)]) == 2  # never overwritten


def test_train_looks_at_the_headers_first(image_folder, tiny_options, tmp_path, capfd):
    (image_folder/'train'/'2'/'0.png').write_bytes(b'GIF89a')
    assert main(['train', str(image_folder), '--out', str(tmp_path/'run'), *tiny_options]) == 2
    out, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and '0.png' in err and 'mstoolkit check' in err and not out and not (tmp_path/'run').exists()
    assert main(['train', str(image_folder), '--out', str(tmp_path/'run'), *tiny_options, '--on-bad', 'skip']) == 0
    assert '0.png' in (tmp_path/'run'/'left_out.txt').read_text()


def test_train_warns_of_leaks(image_folder, tiny_options, tmp_path, capsys):
    shutil.copy(image_folder/'train'/'2'/'0.png', image_folder/'val'/'2'/'leak.png')
    assert main(['train', str(image_folder), '--out', str(tmp_path/'run'), *tiny_options]) == 0
    assert 'warning: the same file in more than one split, 1 time' in capsys.readouterr().out


def test_train_from_lists_and_folds(image_folder, tiny_options, tmp_path, capsys):
    rows = [(p.relative_to(image_folder), p.parent.name) for p in sorted((image_folder/'train').rglob('*.png'))]
    (image_folder/'train.txt').write_text(''.join(f'{p}, {c}\n' for p, c in rows))
    (image_folder/'names.txt').write_text('red apple\n10\n2\n')
    args = ['--train', 'train.txt', '--classes', 'names.txt', '--folds', '4', '--fold', '1', '--balance', 'sampler']
    assert main(['train', str(image_folder), '--out', str(tmp_path/'run'), *tiny_options, *args]) == 0
    assert '18 training and 6 validation images' in capsys.readouterr().out
    assert read_header(tmp_path/'run').classes == ['red apple', '10', '2']


def test_help_lists_what_there_is():
    from mstoolkit.data.augment import augment_recipes
    from mstoolkit.models.fusion import heads
    from mstoolkit.recipe import Recipe
    said = {f.name: set(re.split(r'[ ,:]+', f.metadata['help'])) for f in fields(Recipe)}
    assert set(augment_recipes) <= said['augment'] and set(heads) <= said['head']


def test_a_run_folder_is_never_overwritten(run_folder, image_folder, tiny_options, capsys):
    before = {p: p.read_bytes() for p in run_folder.rglob('*') if p.is_file()}
    assert main(['train', str(image_folder), '--out', str(run_folder), *tiny_options]) == 2
    assert 'already exists and nothing is ever overwritten' in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in run_folder.rglob('*') if p.is_file()}


def test_params(capsys):
    assert main(['params']) == 0
    out = capsys.readouterr().out
    assert [n for n in ('48,275,016', '54,295,236', '51,704,004') if n in out] == ['48,275,016', '54,295,236', '51,704,004']


def test_data(tmp_path, capsys):
    assert main(['data', 'digits', str(tmp_path/'digits')]) == 0
    assert (tmp_path/'digits'/'train'/'7').is_dir()
    assert main(['data', 'digits', str(tmp_path/'digits')]) == 2
    assert main(['data', 'digit', str(tmp_path/'x')]) == 2
    assert "did you mean 'digits'" in capsys.readouterr().err and not (tmp_path/'x').exists()


def complete(words: str) -> list[str]:
    "What bash is told when the tab key is pressed after `words`."
    env = {**os.environ, '_MSTOOLKIT_COMPLETE': 'complete_bash', 'COMP_WORDS': words, 'COMP_CWORD': str(words.count(' '))}
    code = 'import sys; from mstoolkit.cli import main; main(); print(sorted({"torch", "fastai", "timm", "pandas"} & set(sys.modules)))'
    *lines, slow = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    assert slow == '[]', 'a shell asks at every press of the key'
    return [o for o in lines if o]


@pytest.mark.parametrize('words,says', [
    ('mstoolkit tr', ['train']),
    ('mstoolkit train data --recipe mix-resnet', ['mix-resnet50']),
    ('mstoolkit train data --recipe mine', []), # and bash goes on with files
    ('mstoolkit train data --balance ', ['none', 'logit-adjust', 'sampler', 'weights']),
    ('mstoolkit train data --schedu', ['--schedule']),
])
def test_completion(words, says): assert complete(words) == says


def test_completion_names_what_there_is():
    from mstoolkit.ablation import studies
    from mstoolkit.cli import _names
    from mstoolkit.data.augment import augment_recipes
    from mstoolkit.data.make import data_makers
    from mstoolkit.models.fusion import heads
    there = dict(study=studies, head=heads, augment=augment_recipes, data=data_makers)
    assert {k: _names[k] for k in there} == {k: tuple(v) for k, v in there.items()}


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_a_script_for_every_shell(shell):
    env = {**os.environ, '_MSTOOLKIT_COMPLETE': f'source_{shell}'}
    out = subprocess.run([sys.executable, '-m', 'mstoolkit'], capture_output=True, text=True, check=True, env=env).stdout
    assert '_MSTOOLKIT_COMPLETE' in out and 'mstoolkit' in out.split()[-1]


def test_version(capsys):
    import mstoolkit
    assert main(['--version']) == 0
    out = capsys.readouterr().out
    assert out.startswith(f'mstoolkit {mstoolkit.__version__} (Python 3') and 'torch' in out and out.count('\n') == 1


def test_python_m(): assert 'train' in subprocess.run([sys.executable, '-m', 'mstoolkit', '-h'], capture_output=True, text=True, check=True).stdout


# each: options over the tiny ones, what the message says, how to spoil the folder first
def empty(d): [f.unlink() for f in d.rglob('*.png')]
def one_class(d): [shutil.rmtree(d/s/c) for s in ('train', 'val') for c in ('2', '10')]
def empty_class(d): [f.unlink() for f in (d/'train'/'10').iterdir()]
def stray_class(d): (d/'train'/'2').rename(d/'gone')
def no_folder(d): d.rename(d.with_name('gone'))


@pytest.mark.parametrize('options,says,spoil', [
    ([], 'no such folder|there is no|does not exist', no_folder),
    ([], 'no images', empty),
    ([], 'one class|two classes', one_class),
    ([], "'10'", empty_class),
    ([], "'2'", stray_class),
    (['--backbone', 'resnest101'], 'resnest101e', None),
    (['--head', 'gatd'], "did you mean 'gated'", None),
    (['--recipe', 'gaet'], "did you mean 'gate'", None),
    (['--recipe', 'none.toml'], 'there is no recipe file', None),
    (['--augment', 'ligth'], "did you mean 'light'", None),
    (['--size', '8', '--backbone', 'test_resnet'], 'stride', None),
    (['--device', 'cuda:7'], 'was asked for and torch sees', None),
    (['--pretrained', '--backbone', 'resnet18'], '--weights-file.*--no-pretrained', None),
    (['--weights-file', 'none.safetensors'], 'none.safetensors', None),
    (['--schedule', 'fine-tune'], 'not pretrained', None),
    (['--precision', 'fp16'], 'needs a CUDA GPU', None),
    (['--cutmix', '.7', '--mixup', '.7'], 'sum to 1 or less', None),
    (['--cutmix-alpha', '1,x'], 'neither a number nor a range', None),
    (['--valid', 'vall'], 'vall', None),
    (['--group', 'patient'], 'give csv too', None),
    (['--fold', '1'], 'give folds too', None),
    (['--csv', 't.csv', '--train', 'train.txt'], 'give one of them', None),
    (['--out', '/proc/run'], '/proc/run', None),
])
def test_a_mistake_is_one_line_and_leaves_nothing(options, says, spoil, image_folder, tiny_options, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    if spoil: spoil(image_folder)
    out = [] if '--out' in options else ['--out', str(tmp_path/'runs'/'a')]
    assert main(['train', str(image_folder), *out, *tiny_options, *options]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(says, err, re.I), err
    assert not (tmp_path/'runs').exists()


@pytest.mark.parametrize('content,says', [(b'nothing', 'is not a model file'), (None, 'there is no model file')])
def test_predict_refuses_what_is_no_model(content, says, image_folder, tmp_path, capsys):
    f = tmp_path/'m.safetensors'
    if content: f.write_bytes(content)
    assert main(['predict', str(f), str(image_folder/'test'), '--out', str(tmp_path/'p.csv')]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1 and not (tmp_path/'p.csv').exists()


def test_unreadable_images_are_named(run_folder, image_folder, tmp_path, capsys):
    (image_folder/'test'/'2'/'1.png').write_bytes(b'\x89PNG broken')
    (image_folder/'test'/'10'/'2.png').write_bytes(b'')
    out = tmp_path/'p.csv'
    assert main(['predict', str(run_folder), str(image_folder/'test'), '--out', str(out)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert '2/1.png' in err and '10/2.png' in err and '--on-bad skip' in err and not out.exists()
    assert main(['predict', str(run_folder), str(image_folder/'test'), '--out', str(out), '--on-bad', 'skip']) == 0
    assert '2/1.png' in capsys.readouterr().err and len(pd.read_csv(out)) == 7


def test_demo_leaves_curves_csv_and_model(tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    import mstoolkit.demo
    from mstoolkit.data.make import make_navon
    from mstoolkit.recipe import recipes
    make_navon(tmp_path/'demo'/'data', n_train=200, n_valid=100, n_test=20)  # the demo uses data that is there
    monkeypatch.setitem(recipes, 'demo', replace(recipes['demo'], epochs=1, num_workers=0, device='cpu'))
    assert main(['demo', '--out', str(tmp_path/'demo')]) == 0
    run = tmp_path/'demo'/'runs'/'demo'
    assert 'test accuracy' in capsys.readouterr().out
    assert len(pd.read_csv(run/'predictions.csv')) == 20 and (run/'figures'/'curves.png').stat().st_size
    assert mstoolkit.demo.demo(tmp_path/'demo') >= 0 and (tmp_path/'demo'/'runs'/'demo-2').is_dir()  # a second time keeps the first


@pytest.mark.parametrize('head', ['pyramid', 'gated', 'plain'])
def test_report_checkpoints_predict_and_convert(head, image_folder, tmp_path, capsys):
    import torch
    from test_report_a import report_model
    torch.manual_seed(0)
    pt, classes = tmp_path/'best.pt', tmp_path/'classes.txt'
    torch.save(report_model("resnest14d", head, 3).state_dict(), pt)
    classes.write_text('ant\nbee\ncat\n')
    model = tmp_path/'m.safetensors'
    assert main(['convert', str(pt), str(model), '--classes', str(classes), '--backbone', 'resnest14d', '--size', '64']) == 0
    assert read_header(model).classes == ['ant', 'bee', 'cat'] and read_header(model).config['head'] == head
    assert main(['predict', str(model), str(image_folder/'test'), '--out', str(tmp_path/'p.csv')]) == 0
    assert set(pd.read_csv(tmp_path/'p.csv').pred_label) <= {'ant', 'bee', 'cat'}
