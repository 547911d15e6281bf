"The notebooks and the library agree, the metadata agrees, and what is built can be installed and imported."
import configparser
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

try: import tomllib
except ImportError: import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCES = 'nbs mstoolkit pyproject.toml README.md LICENSE CHANGELOG.md CITATION.cff MANIFEST.in'.split()
GITHUB = ROOT/'.github'


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
    assert p['requires-python'].startswith(f">={s['min_python']},")
    assert s['license'] == p['license']
    nbdev = pyproject['tool']['nbdev']
    assert (s['nbs_path'], s['doc_path'], s['readme_nb']) == tuple(nbdev.get(k, d) for k, d in
                                                                  (('nbs_path', 'nbs'), ('doc_path', '_docs'), ('readme_nb', 'index.ipynb')))


def test_constraints_are_names_and_versions_alone():
    for line in (ROOT/'constraints.txt').read_text().splitlines():
        assert line.startswith('#') or line.split(';')[0].count('==') == 1 and '/' not in line and '@' not in line, line


def test_the_install_page_lists_every_extra():
    page = ''.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/'howto'/'05_install.ipynb').read_text(encoding='utf-8'))['cells'])
    extras = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['optional-dependencies']
    assert re.findall(r'^\| `(\w+)` \|', page.partition('## Extras')[2].partition('\n## ')[0], re.M) == list(extras)


def pythons() -> list[str]:
    "The versions that pyproject.toml names, oldest first."
    rows = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['classifiers']
    return [v for o in rows if re.fullmatch(r'3\.\d+', v := o.rpartition(' ')[2])]


def test_the_versions_of_python_are_the_same_everywhere():
    first, *_, last = versions = pythons()
    after = f"3.{int(last[2:])+1}"
    assert tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['requires-python'] == f'>={first},<{after}'
    assert versions == [f'3.{i}' for i in range(int(first[2:]), int(after[2:]))]
    makefile = (ROOT/'Makefile').read_text()
    assert f'Python {first} to {last}' in makefile and str(tuple(map(int, after.split('.')))) in makefile
    jobs = yaml.safe_load((GITHUB/'workflows'/'tests.yml').read_text())['jobs']
    assert jobs['test']['strategy']['matrix']['python'] == versions
    assert jobs['install']['strategy']['matrix']['python'] == [first, last]


@pytest.mark.parametrize('version', [(3, 9, 1), (3, 15, 0)])
def test_make_refuses_another_python_in_one_line(version, tmp_path):
    for f in ('Makefile', 'pyproject.toml', 'constraints.txt'): shutil.copy(ROOT/f, tmp_path)
    other = tmp_path/'python-other'
    other.write_text(f"""#!/bin/sh
exec '{sys.executable}' -c "import sys; sys.version_info, sys.version = {version}, '{'.'.join(map(str, version))}'; exec(sys.argv.pop())" "$2"
""")
    other.chmod(0o755)
    r = subprocess.run(['make', f'PYTHON={other}', 'demo'], cwd=tmp_path, capture_output=True, text=True)
    mine = [o for o in r.stderr.splitlines() if not o.startswith('make')]
    assert r.returncode and len(mine) == 1 and mine[0].startswith('mstoolkit needs Python 3') and 'make PYTHON=' in mine[0]
    assert not (tmp_path/'.venv').exists()


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "A folder with what a release uploads: the archive of the sources, and the wheel that is built from it."
    tmp = tmp_path_factory.mktemp('dist')
    copy_sources(tmp/'src')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp/'dist', cwd=tmp/'src')
    return tmp/'dist'


@pytest.fixture(scope='module')
def wheel(dist): return next(dist.glob('*.whl'))


@pytest.fixture(scope='module')
def sdist(dist): return next(dist.glob('*.tar.gz'))


def test_twine_finds_nothing(wheel, sdist):
    r = subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', wheel, sdist], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.count('PASSED') == 2, r.stdout


def package_files(): return {p.relative_to(ROOT).as_posix() for p in (ROOT/'mstoolkit').rglob('*') if p.suffix in ('.py', '.html', '.js', '.md') or p.name == 'py.typed'}


def test_wheel_holds_every_module_and_template(wheel):
    assert {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith('mstoolkit/')} == package_files()


def test_sdist_holds_the_sources_and_no_more(sdist):
    with tarfile.open(sdist) as t: names = {n.partition('/')[2] for n in t.getnames() if not t.getmember(n).isdir()}
    written = {n for n in names if n.startswith('mstoolkit.egg-info/')} | {'PKG-INFO', 'setup.cfg'}
    assert names - written == package_files() | {'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md', 'CITATION.cff', 'MANIFEST.in'}


def test_the_tree_builds_the_same_wheel_as_the_sdist(wheel, tmp_path):
    copy_sources(tmp_path)
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path/'dist', cwd=tmp_path)
    a, b = (zipfile.ZipFile(o) for o in (wheel, next((tmp_path/'dist').glob('*.whl'))))
    assert {n: a.read(n) for n in a.namelist()} == {n: b.read(n) for n in b.namelist()}


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


def yaml_files(): return sorted([*GITHUB.rglob('*.yml'), ROOT/'CITATION.cff'])


@pytest.mark.parametrize('file', yaml_files(), ids=lambda p: p.name)
def test_yaml_is_well_formed(file): assert isinstance(yaml.safe_load(file.read_text(encoding='utf-8')), dict)


@pytest.mark.parametrize('file', sorted((GITHUB/'workflows').glob('*.yml')), ids=lambda p: p.stem)
def test_workflows_are_whole(file):
    flow = yaml.safe_load(file.read_text(encoding='utf-8'))
    assert {'name', True, 'permissions', 'jobs'} <= set(flow), 'YAML reads `on` as True'
    targets = set(re.findall(r'^([a-z-]+):', (ROOT/'Makefile').read_text(), re.M))
    for name, job in flow['jobs'].items():
        assert {'runs-on', 'steps'} <= set(job) and set([job['needs']] if 'needs' in job else []) <= set(flow['jobs']), name
        for step in job['steps']:
            assert ('uses' in step) != ('run' in step), step
            if 'uses' in step: assert re.fullmatch(r'[\w-]+/[\w-]+@[\w./-]+', step['uses'])
            made = re.match(r'make (?:\w+=\w+ )*([a-z-]+)', step.get('run', ''))
            assert not made or made[1] in targets, step


def test_only_what_publishes_may_write():
    for file in (GITHUB/'workflows').glob('*.yml'):
        assert yaml.safe_load(file.read_text())['permissions'] == {'contents': 'read'}, file.name
    jobs = yaml.safe_load((GITHUB/'workflows'/'release.yml').read_text())['jobs']
    assert jobs['publish']['permissions'] == {'id-token': 'write'} and 'secrets' not in (GITHUB/'workflows'/'release.yml').read_text()


@pytest.mark.parametrize('form', ['bug', 'feature'])
def test_issue_forms_are_whole(form):
    d = yaml.safe_load((GITHUB/'ISSUE_TEMPLATE'/f'{form}.yml').read_text(encoding='utf-8'))
    assert {'name', 'description', 'body'} <= set(d)
    ids = [o['id'] for o in d['body']]
    assert len(set(ids)) == len(ids) and all(o['type'] in ('textarea', 'input', 'dropdown') and o['attributes']['label'] for o in d['body'])


def test_citation_says_what_the_package_says():
    import mstoolkit
    d = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    p = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert {'cff-version', 'message', 'title', 'authors'} <= set(d) and d['cff-version'] == '1.2.0'
    assert (d['title'], d['version'], d['license']) == (p['name'], mstoolkit.__version__, p['license'])
    assert [o['name'] for o in d['authors']] == [o['name'] for o in p['authors']]
    assert (d['repository-code'], d['url']) == (p['urls']['Repository'], p['urls']['Documentation'])
