"The command line as a page: every command, argument and option of the typer app."
from dataclasses import MISSING, asdict, fields
from typing import Any

import text
from mstoolkit.data.sources import DataSource
from mstoolkit.plan import DataFacts, default_minutes, training_fields
from mstoolkit.recipe import Recipe, load_recipe
from typer.main import get_command, get_command_name


def commands(app) -> dict[str, Any]: return get_command(app).commands


def functions(app) -> dict[int, str]:
    "The identity of each function that is a command -> the command's name."
    return {id(c.callback): c.name or get_command_name(c.callback.__name__) for c in app.registered_commands}


def shown(command) -> list: return [p for p in command.params if not getattr(p, 'hidden', False)]


def flags(p) -> list[str]: return [*p.opts, *p.secondary_opts]


def is_argument(p) -> bool: return not p.opts[0].startswith('-')


def anchor(command: str, p) -> str: return f"{command}-{max(p.opts, key=len).lstrip('-')}"


def takes(p) -> str:
    "What a parameter takes; a switch takes nothing."
    if getattr(p, 'is_flag', False): return ''
    if p.metavar: return p.metavar
    kind = p.type_descriptor.annotation
    inner = next(iter(getattr(kind, '__args__', ())), kind)
    name = {'str': 'text', 'Path': 'path'}.get(inner.__name__, inner.__name__)
    return name if inner is kind else f'{name} …'


def of_fields(command) -> dict[str, Any]:
    "What the options that make up a recipe and a data source are without being given: their fields' own values."
    recipe = next((p.default for p in command.params if p.name == 'recipe'), None)
    source = {f.name: f.default for f in fields(DataSource) if f.default is not MISSING}
    if recipe != 'auto': return {**source, **(asdict(load_recipe(recipe)) if recipe else {})}
    trained = training_fields(DataFacts(99, 9, (99,), 224, False), True, 99.)
    chosen = ['backbone', 'head', 'size', 'bs', 'pretrained', 'weights_file', *trained]
    return {**source, **asdict(Recipe()), **dict.fromkeys(chosen, 'chosen'), 'minutes': default_minutes, 'epochs': ''}


def default(p, own: dict[str, Any]) -> str:
    "The value of a parameter that is not given, as one would type it; '' for none and for a switch that is off."
    if p.required: return 'required'
    value = own.get(p.name) if p.default is None else p.default
    if value is None or value in ('', ()) or (getattr(p, 'is_flag', False) and p.default is False): return ''
    if isinstance(value, bool): return 'on' if value else 'off'
    return text.code_in_table(','.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value))


def row(command: str, p, own: dict[str, Any]) -> list[str]:
    names = [p.name.upper()] if is_argument(p) else flags(p)
    name = f'<span id="{anchor(command, p)}"></span>' + '<br>'.join(f'`{o}`{{ .n }}' for o in names)
    return [name, text.code_in_table(takes(p)), default(p, own), text.in_table(p.help or '')]


def usage(program: str, name: str, command) -> str:
    "How a command is called."
    def arg(p): return (p.name.upper() if p.required else f'[{p.name.upper()}]') + ('…' if p.nargs == -1 else '')
    return ' '.join([program, name, *(arg(p) for p in shown(command) if is_argument(p)), '[OPTIONS]'])


def command_markdown(program: str, name: str, command) -> str:
    "One command: what it does, how it is called, its options by group."
    groups, head, own = {}, ['Name', 'Takes', 'Default', 'Meaning'], of_fields(command)
    for p in shown(command):
        groups.setdefault('Arguments' if is_argument(p) else p.rich_help_panel or 'Options', []).append(row(name, p, own))
    tables = [f'**{title}**\n\n' + text.table(head, rows, 'params options') for title, rows in groups.items()]
    call = text.fenced(usage(program, name, command), 'sh')
    return text.blocks(f'## {program} {name} {{ #{name} }}', command.help or '', call, *tables)


def commands_markdown(app, program: str) -> str:
    "The whole page, below its title."
    cs = commands(app)
    rows = [[f'[`{program} {n}`](#{n})', text.in_table(c.help or '')] for n, c in cs.items()]
    index = text.table(['Command', 'What it does'], rows)
    more = f'Every command answers `--help`. Where the script is not on the path, `python -m {program}` is the same.'
    return text.blocks(index, more, *(command_markdown(program, n, c) for n, c in cs.items()))
