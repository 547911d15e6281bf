"Reference entries: what a name is, its signature and a table of its parameters, from the library itself."
import ast
import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from textwrap import dedent, wrap
from typing import Any

import text
from fastcore.docments import docments
from nbdev.doclinks import patch_name

Def = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Param:
    "One parameter, as its author wrote it."
    name: str # with its stars
    type: str = '' # annotation, '' without one
    default: str = '' # '' without one
    doc: str = '' # the comment beside it, or a field's help
    keyword: bool = False # whether it can only be given by name

    @property
    def in_signature(self) -> str: return f'{self.name}={self.default}' if self.default else self.name


@dataclass(frozen=True)
class Entry:
    "A public name and where it is."
    name: str # `BatchMix` or `BatchMix.draw`
    module: str # `mstoolkit.callback.mix`
    obj: Any
    line: int # of its definition in the module's file
    anchor: str # as nbdev's index has it: in lower case, unless `Noise` and `noise` are on one page

    @property
    def kind(self) -> str:
        o = self.obj
        if inspect.isclass(o): return 'class'
        if isinstance(o, property): return 'property'
        if '.' in self.name: return 'method'
        return 'function' if inspect.isroutine(inspect.unwrap(o) if callable(o) else o) else 'constant'

    @property
    def doc(self) -> str:
        "Its docstring, or the comment beside what a property returns; '' if it has none of its own."
        if self.kind == 'constant': return ''
        o = self.obj
        if isinstance(o, property): return o.fget.__doc__ or returns(o.fget)[1]
        own = vars(o).get('__doc__') if inspect.isclass(o) else function(o).__doc__
        generated = is_dataclass(o) and own and own.startswith(f'{o.__name__}(')
        return inspect.cleandoc(own) if own and not generated else ''

    @property
    def owner(self) -> type|None:
        "The class of a method."
        return getattr(importlib.import_module(self.module), self.name.split('.')[0]) if '.' in self.name else None


# --- which names there are ---

@cache
def module_tree(name: str) -> ast.Module:
    return ast.parse(Path(importlib.import_module(name).__file__).read_text(encoding='utf-8'))


def names_of(node: ast.stmt) -> list[str]:
    "The names that a top-level statement defines."
    if isinstance(node, Def): return [*(n if isinstance(n := patch_name(node), list) else [n])]
    if isinstance(node, ast.ClassDef): return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [o.id for t in targets for o in ast.walk(t) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)]


def defined(source: str) -> list[str]: return [n for node in ast.parse(source).body for n in names_of(node)]


@cache
def entries(module: str) -> dict[str, Entry]:
    "The public names of a module and the public methods of its classes, in the order of its source."
    m, res = importlib.import_module(module), {}
    public = set(getattr(m, '__all__', []))
    lower = Counter(n.lower() for n in public)
    def make(name, node):
        first, _, last = name.partition('.')
        obj = vars(getattr(m, first)).get(last) if last else getattr(m, name, None)
        return Entry(name, module, obj, node.lineno, name if lower[first.lower()] > 1 else name.lower())
    for node in module_tree(module).body:
        for name in names_of(node):
            if name.split('.')[0] not in public: continue
            res.setdefault(name, make(name, node))
            for o in node.body if isinstance(node, ast.ClassDef) else []:
                if not isinstance(o, Def) or o.name.startswith('_'): continue
                method = make(f'{name}.{o.name}', o)
                if method.doc: res[method.name] = method
    return res


# --- what their sources say ---

def function(o: Any) -> Any:
    "The function whose signature describes `o`; None where that is not in the source of `o` itself."
    if isinstance(o, (classmethod, staticmethod)): return o.__func__
    if isinstance(o, property): return o.fget
    if inspect.isclass(o): return vars(o).get('__init__') or vars(o).get('__new__')
    return o


def tree(f: Any) -> ast.FunctionDef|None:
    "The definition of a function; None for one that has no source, such as a `partial`."
    try: node = ast.parse(dedent(inspect.getsource(inspect.unwrap(f)))).body[0]
    except (TypeError, OSError, SyntaxError): return None
    return node if isinstance(node, Def) else None


def written(node: ast.expr|None) -> str:
    "An annotation or a default as it is written; of `Annotated` the type alone."
    if isinstance(node, ast.Subscript) and getattr(node.value, 'id', '') == 'Annotated': node = node.slice.elts[0]
    return '' if node is None else ast.unparse(node)


def one_line(o: str|None) -> str: return ' '.join((o or '').split())


def function_params(f: Any) -> list[Param]:
    "The parameters of a function, without `self`."
    node = tree(f)
    if node is None: return []
    a, docs = node.args, docments(inspect.unwrap(f), args_kwargs=True, returns=False)
    def param(arg, default=None, stars='', keyword=False):
        return Param(stars + arg.arg, written(arg.annotation), written(default), one_line(docs.get(arg.arg)), keyword)
    by_place = [*a.posonlyargs, *a.args]
    res = [param(o, d) for o, d in zip(by_place, [None]*(len(by_place) - len(a.defaults)) + a.defaults)]
    if a.vararg: res.append(param(a.vararg, stars='*'))
    res += [param(o, d, keyword=not a.vararg) for o, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: res.append(param(a.kwarg, stars='**'))
    return res[1:] if res and res[0].name in ('self', 'cls') else res


def returns(f: Any) -> tuple[str, str]:
    "What a function returns: its annotation and the comment beside it."
    node = tree(f)
    if node is None or not node.returns: return '', ''
    return written(node.returns), one_line(docments(inspect.unwrap(f)).get('return'))


def limits(m: dict) -> str:
    "What a field's metadata says about its good values."
    lo, hi, above = m.get('lo'), m.get('hi'), m.get('above')
    if m.get('choices'): return 'one of ' + ', '.join(f'`{c}`' for c in m['choices'])
    if above is not None: return f'above {above}' + ('' if hi is None else f', at most {hi}')
    if lo is not None: return f'{lo} or more' if hi is None else f'{lo} to {hi}'
    return '' if hi is None else f'at most {hi}'


def field_params(cls: type) -> list[Param]:
    "The fields of a dataclass or a named tuple; what they mean is in their metadata or in the comment beside them."
    lines = dedent(inspect.getsource(cls)).splitlines()
    own = {o.target.id: o for o in ast.parse('\n'.join(lines)).body[0].body if isinstance(o, ast.AnnAssign)}
    beside = {n: one_line(lines[o.end_lineno-1][o.end_col_offset:].partition('#')[2]) for n, o in own.items()}
    if not is_dataclass(cls):
        return [Param(n, written(own[n].annotation), written(own[n].value), beside[n]) for n in cls._fields]
    docs, res = docments(cls), []
    for f in fields(cls):
        if not f.init: continue
        default = repr(f.default) if f.default is not MISSING else ''
        if f.default_factory is not MISSING: default = f'{f.default_factory.__name__}()'
        doc, good = f.metadata.get('help') or one_line(docs.get(f.name)), limits(f.metadata)
        if good and good not in doc: doc = f'{doc} ({good})'
        kind = written(own[f.name].annotation) if f.name in own else getattr(f.type, '__name__', str(f.type))
        res.append(Param(f.name, kind, default, doc, f.kw_only))
    return res


def params(e: Entry) -> list[Param]:
    "The parameters that the source of `e` has; one without a comment has that of the method it overrides."
    if e.kind in ('constant', 'property'): return []
    if e.kind == 'class' and (is_dataclass(e.obj) or hasattr(e.obj, '_fields')): return field_params(e.obj)
    f = function(e.obj)
    return [p if p.doc else replace(p, doc=inherited(p, e)) for p in function_params(f)] if f else []


def inherited(p: Param, e: Entry) -> str:
    for base in e.owner.__mro__[1:] if e.owner else []:
        f = function(vars(base).get(e.name.split('.')[1]))
        for o in function_params(f) if inspect.isfunction(f) else []:
            if o.name == p.name and o.doc: return o.doc
    return ''


def overrides(e: Entry) -> bool:
    "Whether a method has its meaning, and its parameters theirs, from a class of another library."
    library, name = lambda module: module.partition('.')[0], e.name.rpartition('.')[2]
    bases = e.owner.__mro__[1:] if e.owner else []
    return any(name in vars(b) and library(b.__module__) != library(e.module) for b in bases)


def lacking(e: Entry) -> list[str]:
    "What an entry lacks: its docstring, or comments of parameters."
    lack = [] if e.doc or e.kind == 'constant' else ['docstring']
    return lack + [p.name for p in params(e) if not p.doc and not overrides(e)]


# --- as Markdown ---

def signature(e: Entry, width: int = 84, most: int = 12) -> str:
    "How `e` is called: a line, or a parameter a line where one is too short; more than `most` parameters share lines."
    ps = params(e)
    parts = [p.in_signature for p in ps]
    star = next((i for i, p in enumerate(ps) if p.keyword and not p.name.startswith('**')), None)
    if star is not None: parts.insert(star, '*')
    ret = '' if e.kind == 'class' else returns(function(e.obj))[0]
    ret = f' -> {ret}' if ret else ''
    line = f"{e.name}({', '.join(parts)}){ret}"
    if len(line) <= width: return line
    if len(parts) > most: parts = wrap(', '.join(parts), width-4, break_long_words=False, break_on_hyphens=False)
    parts = [o.removesuffix(',') for o in parts]
    return f'{e.name}(\n' + ',\n'.join(f'    {o}' for o in parts) + f'\n){ret}'


def value(e: Entry, width: int = 84, most: int = 8) -> str:
    "A constant: its definition where that is short, else its type and the names that it holds."
    node = next(o for o in module_tree(e.module).body if e.name in names_of(o))
    if len(ast.unparse(node)) <= width: return ast.unparse(node)
    if not isinstance(e.obj, dict): return f'{e.name}: {type(e.obj).__name__}'
    keys = [getattr(k, '__name__', None) or repr(k) for k in e.obj]
    return f"{e.name}: dict  # {', '.join(keys[:most])}" + (', …' if len(keys) > most else '')


def base_name(b: type, e: Entry) -> str:
    "A class that another builds on; one of a library that is not made with nbdev is no link."
    library = b.__module__.partition('.')[0]
    own = library in ('fastai', e.module.partition('.')[0])
    return f'`{b.__name__}`' if own else f'`{b.__name__}`{{ .n }} of {library}'


def heading(e: Entry, source: str) -> str:
    "The heading of an entry, what kind of thing it is, and a link to its source."
    kind = 'dataclass' if e.kind == 'class' and is_dataclass(e.obj) else e.kind
    bases = [base_name(b, e) for b in e.obj.__bases__ if b not in (object, tuple)] if e.kind == 'class' else []
    note = kind + (', extends ' + ', '.join(bases) if bases else '')
    level = '####' if '.' in e.name else '###'
    below = f'<div class="kind" markdown="span">{note} · [source]({source})</div>'
    return f'{level} {e.name} {{ #{e.anchor} .entry }}\n\n{below}'


def params_table(e: Entry) -> str:
    "The parameters: name, type, default, what they mean; and what is returned."
    row = lambda *cells: [cells[0], *map(text.code_in_table, cells[1:-1]), text.in_table(cells[-1])]
    rows = [row(f'`{p.name}`{{ .n }}', p.type, p.default, p.doc) for p in params(e)]
    kind, doc = ('', '') if e.kind == 'class' else returns(function(e.obj))
    if doc: rows.append(row('*returns*', kind, '', doc))
    return text.table(['Name', 'Type', 'Default', 'Meaning'], rows, 'params')


def brief_table(methods: list[Entry]) -> str:
    "Methods and properties that take nothing, a row each."
    name = lambda m: f'<span id="{m.anchor}"></span>`{m.name.rpartition(".")[2]}`{{ .n }}'
    rows = [[name(m), text.code_in_table(returns(function(m.obj))[0]), text.in_table(m.doc)] for m in methods]
    return text.table(['Method or property', 'Type', 'Meaning'], rows, 'params brief')


def entry_markdown(
    e: Entry,
    source: Callable[[Entry], str], # from an entry to the address of its source
    methods: list[Entry] = () # of a class; those whose parameters are explained have entries of their own
) -> str:
    "A whole entry: heading, signature, docstring, parameters; then the methods of a class."
    full = [m for m in methods if m.kind == 'method' and any(p.doc for p in params(m))]
    call = value(e) if e.kind == 'constant' else signature(e)
    table = '' if e.kind == 'constant' else params_table(e)
    return text.blocks(heading(e, source(e)), text.fenced(call, 'python', '.sig'), text.escape_tags(e.doc), table,
                       brief_table([m for m in methods if m not in full]), *(entry_markdown(m, source) for m in full))


def command_markdown(e: Entry, source: str, command: str) -> str:
    "The entry of a function that is a command: its options are on the page of commands."
    return text.blocks(heading(e, source), text.escape_tags(e.doc), f'On the command line it is `{command}`.')
