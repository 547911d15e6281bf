"The house: imports point one way, down the list in CONTRIBUTING; lines breathe; the root stays small."
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIB = ROOT/'mstoolkit'


def module_of(path): return path.relative_to(LIB).with_suffix('').as_posix().replace('/', '.')


MODULES = {module_of(p): p for p in sorted(LIB.rglob('*.py')) if p.name not in ('__init__.py', '_modidx.py')}


def listed():
    "The modules in the order of CONTRIBUTING, top to bottom and left to right."
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8').partition('| floor | modules |')[2]
    rows = re.findall(r'^\| [a-z ]+ \| (`.*`) \|', text, re.M)
    return [name for row in rows for name in re.findall(r'`([\w.]+)`', row)]


def imports_of(name):
    "The modules of the library that a module imports, wherever in it."
    package = name.rpartition('.')[0].split('.') if '.' in name else []
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package)-node.level+1]
            yield from resolved('.'.join([*base, *(node.module or '').split('.')]).strip('.'), node)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').partition('.')[0] == 'mstoolkit':
            yield from resolved(node.module.partition('.')[2], node)
        elif isinstance(node, ast.Import):
            yield from (a.name.partition('.')[2] for a in node.names if a.name.startswith('mstoolkit.'))


def resolved(target, node):
    if target in MODULES: yield target
    else: yield from (o for a in node.names if (o := f'{target}.{a.name}'.strip('.')) in MODULES)


def test_contributing_lists_every_module():
    assert sorted(listed()) == sorted(MODULES)


@pytest.mark.parametrize('name', MODULES)
def test_imports_point_down(name):
    order = {m: i for i, m in enumerate(listed())}
    up = [o for o in imports_of(name) if order[o] <= order[name]]
    assert not up, f'{name} imports {up}, which stand above it in CONTRIBUTING'


def test_the_walk_sees_imports_of_every_form():
    assert {'core', 'data.sources', 'recipe'} <= set(imports_of('runs'))
    assert 'callback.core' in set(imports_of('callback.tracker'))
    assert 'train' in set(imports_of('cli')), 'imports inside functions count too'


def test_the_root_stays_small():
    assert len(list(LIB.glob('*.py'))) <= 17


def test_lines_breathe():
    lines = [(p, i, len(l)) for p in MODULES.values() for i, l in enumerate(p.read_text(encoding='utf-8').splitlines(), 1)]
    assert not [(module_of(p), i) for p, i, n in lines if n > 140]
    assert sum(n > 120 for *_, n in lines) <= .02*len(lines)


def test_file_names_of_a_run_are_stated_once():
    "Only `runs` spells them."
    from mstoolkit.runs import run_files, study_files
    names = {Path(o).name for o in (*run_files.values(), *study_files.values())} - {'report.html', 'lock'}  # a template and the cache's lock
    for name, path in MODULES.items():
        if name in ('runs', 'models.backbone'): continue  # the hub's files, too, are called model.safetensors
        texts = [n.value for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert not names & set(texts), f'{name} spells {names & set(texts)}'
