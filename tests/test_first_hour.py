"What a new user meets in the first hour: odd paths, no home, no network, line ends of Windows, a notebook on a server."
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from mstoolkit.classifier import read_header
from mstoolkit.cli import main
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(image_folder, tmp_path, monkeypatch):
    "A working folder whose name has a space and accents, with data in it."
    where = tmp_path/'Ünsere Bilder'/'été 1'
    where.mkdir(parents=True)
    image_folder.rename(where/'mes données')
    monkeypatch.chdir(where)
    return where


def test_spaces_and_accents_in_the_path(place, tiny_options, capsys):
    assert main(['check', 'mes données', '--html', 'page à lire.html']) == 0
    assert main(['train', 'mes données', '--out', 'essai nº 1', *tiny_options]) == 0
    assert main(['predict', 'essai nº 1', 'mes données/test', '--out', 'prédiction.csv']) == 0
    assert main(['report', 'essai nº 1']) == 0
    assert len(Path('prédiction.csv').read_text(encoding='utf-8').splitlines()) == 10


def windows(name: str, text: str):
    "Write a file as an editor of Windows would."
    Path(name).write_bytes(('\ufeff' + text).replace('\n', '\r\n').encode())


def test_line_ends_of_windows(place, capsys):
    rows = [(p.relative_to('mes données').as_posix(), p.parent.name, p.parts[1]) for p in sorted(Path('mes données').glob('[tv]*[nl]/*/*'))]
    windows('table.csv', 'path,label,split\n' + ''.join(f'{p},{c},{s}\n' for p, c, s in rows))
    for split in ('train', 'val'): windows(f'mes données/{split}.txt', ''.join(f'{p}, {c}\n' for p, c, s in rows if s == split))
    windows('classes.txt', 'red apple\n10\n2\n')
    windows('mine.toml', 'name = "mine"\nbackbone = "test_resnet"\npretrained = false\nsize = 32\nepochs = 1\naugment = "none"\ndevice = "cpu"\n')
    for out, source in (('a', ['--csv', 'table.csv']), ('b', ['--train', 'train.txt', '--valid', 'val.txt'])):
        assert main(['train', 'mes données', *source, '--classes', 'classes.txt', '--recipe', 'mine.toml', '--out', out]) == 0
        assert '24 training and 12 validation images' in capsys.readouterr().out
        assert read_header(out).classes == ['red apple', '10', '2']
    for f in Path('a').glob('*.toml'): windows(str(f), f.read_text(encoding='utf-8'))
    assert main(['predict', 'a', 'mes données/test']) == 0 and main(['report', 'a']) == 0


def run(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-m', 'mstoolkit', *words], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), **env})


def test_a_home_that_cannot_be_written_to(place, tiny_options, tmp_path):
    home = tmp_path/'home'
    home.mkdir(mode=0o555)
    env = dict.fromkeys(('HOME', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME'), '/proc/home' if os.geteuid() == 0 else str(home))
    r = run('train', 'mes données', '--out', 'run', *tiny_options, **env)
    assert r.returncode == 0 and 'Traceback' not in r.stderr, r.stderr


def test_behind_a_proxy_that_is_gone_one_line_says_where_weights_are(place, tmp_path):
    r = run('train', 'mes données', '--recipe', 'gate', HTTPS_PROXY='http://127.0.0.1:9', HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path/'hf'))
    assert r.returncode == 2 and len(r.stderr.splitlines()) == 1 and 'does not answer' in r.stderr
    assert all(o in r.stderr for o in ('huggingface.co/timm/resnest101e.in1k', '--weights-file', '--no-pretrained'))
    assert not Path('runs').exists()


def test_the_five_lines_in_a_notebook(place):
    text = (ROOT/'README.md').read_text(encoding='utf-8').partition('## Five lines of Python')[2].split('```')[1].removeprefix('py\n')
    for old, new in (("'data", "'mes données"), ("'resnest101e'", "'test_resnet', pretrained=False"), ('size=224', 'size=32'), ('fine_tune(20', 'fine_tune(1')):
        assert old in text
        text = text.replace(old, new)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in text.splitlines()])
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    env.pop('MPLBACKEND', None) # as a server starts a kernel
    NotebookClient(nb, timeout=300, resources={'metadata': {'path': str(place)}}).execute(env=env)
    outputs = [o for c in nb.cells for o in c.outputs]
    said = ''.join(o.get('text', '') + ''.join(o.get('data', {}).get('text/html', '')) for o in outputs)
    assert not re.findall('warning|error|ipywidgets', said, re.I), said
    assert 'valid_loss' in said and sum('image/png' in o.get('data', {}) for o in outputs) >= 2
    assert Path('prediction.csv').exists()
