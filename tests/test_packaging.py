"The notebooks and the library agree, the metadata agrees, and what is built can be installed and imported."
import configparser
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try: import tomllib
except ImportError: import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCES = 'nbs mstoolkit pyproject.toml README.md LICENSE'.split()


def copy_sources(to: Path):
    for name in SOURCES:
        src = ROOT/name
        if src.is_dir(): shutil.copytree(src, to/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        else: shutil.copy(src, to/name)


def run(*args, **kw):
    return subprocess.run(args, check=True, capture_output=True, text=True, **kw)


def test_notebooks_write_the_library(tmp_path):
    copy_sources(tmp_path)
    shutil.rmtree(tmp_path/'mstoolkit')
    (tmp_path/'mstoolkit').mkdir()
    shutil.copy(ROOT/'mstoolkit'/'__init__.py', tmp_path/'mstoolkit')
    run(Path(sys.executable).with_name('nbdev-export'), cwd=tmp_path)
    files = lambda d: sorted(p.relative_to(d).as_posix() for p in d.rglob('*.py'))
    assert files(tmp_path/'mstoolkit') == files(ROOT/'mstoolkit')
    _, differ, _ = filecmp.cmpfiles(tmp_path/'mstoolkit', ROOT/'mstoolkit', files(ROOT/'mstoolkit'), shallow=False)
    assert not differ, f'run `make library`: {differ}'


def test_index_writes_the_readme():
    nbconvert = Path(sys.executable).with_name('jupyter-nbconvert')
    out = run(nbconvert, '--to', 'markdown', '--stdout', '--log-level', 'ERROR', ROOT/'nbs'/'index.ipynb').stdout
    assert out.replace('](images/', '](nbs/images/') == (ROOT/'README.md').read_text(), 'run `make readme`'


def test_settings_ini_says_what_pyproject_says():
    import mstoolkit
    pyproject = tomllib.loads((ROOT/'pyproject.toml').read_text())
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    s, p = ini['DEFAULT'], pyproject['project']
    assert s['lib_name'] == s['lib_path'] == p['name']
    assert s['version'] == mstoolkit.__version__
    assert '>=' + s['min_python'] == p['requires-python']
    assert s['license'] == p['license']
    nbdev = pyproject['tool']['nbdev']
    assert (s['nbs_path'], s['doc_path'], s['readme_nb']) == tuple(nbdev.get(k, d) for k, d in
                                                                  (('nbs_path', 'nbs'), ('doc_path', '_docs'), ('readme_nb', 'index.ipynb')))


def test_constraints_are_names_and_versions_alone():
    for line in (ROOT/'constraints.txt').read_text().splitlines():
        assert line.startswith('#') or line.split(';')[0].count('==') == 1 and '/' not in line and '@' not in line, line


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('wheel')
    copy_sources(tmp)
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp/'dist', cwd=tmp)
    return next((tmp/'dist').glob('*.whl'))


def test_wheel_holds_every_module_and_template(wheel):
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith('mstoolkit/')}
    assert packed == {p.relative_to(ROOT).as_posix() for p in (ROOT/'mstoolkit').rglob('*') if p.suffix in ('.py', '.html')}


def test_wheel_works_outside_the_tree(wheel, tmp_path):
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--disable-pip-version-check', '--target', tmp_path/'site', wheel)
    env = {**os.environ, 'PYTHONPATH': str(tmp_path/'site')}
    code = 'import mstoolkit.all, mstoolkit; print(mstoolkit.__file__)'
    assert run(sys.executable, '-c', code, cwd=tmp_path, env=env).stdout.strip() == str(tmp_path/'site'/'mstoolkit'/'__init__.py')
    assert 'train' in run(sys.executable, '-m', 'mstoolkit', '--help', cwd=tmp_path, env=env).stdout


@pytest.mark.parametrize('notebook', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_outputs_name_no_machine(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    outputs = json.dumps([c['outputs'] for c in cells if c['cell_type'] == 'code'])
    assert not re.findall(r'site-packages|/(tmp|home|root)/', outputs)
