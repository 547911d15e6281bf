"Notebooks, as nbdev processes them, become Markdown pages."
import ast
import re
from pathlib import Path

import nbdev.serve
import reference
import text
from fastcore.nbio import NbCell, read_nb
from links import DocsError, Links, Page
from nbdev.config import nbpath2html
from nbdev.processors import FilterDefaults

_title = re.compile(r'\A\s*#\s+(?P<title>[^\n]+)(?:\n\s*>\s+(?P<subtitle>[^\n]+))?')
_styles = re.compile(r'<(style|script)\b.*?</\1>', re.S)

lack_alt: list[str] = [] # pictures whose cell has no `#| fig-alt: …`


class SiteProcs(FilterDefaults):
    "nbdev's own processing, less what this site does itself: entries, links, title and subtitle, folded code."
    own = '''FrontmatterProc insert_warning add_show_docs clean_show_doc exec_show_docs rm_export add_links add_fold
             mv_exports'''.split()
    def base_procs(self): return [p for p in super().base_procs() if p.__name__ not in self.own]


def processed() -> Path:
    "The folder that `nbdev.serve.proc_nbs` wrote, in this process: no cell is run, the library is imported once."
    old, nbdev.serve.FilterDefaults = nbdev.serve.FilterDefaults, SiteProcs
    try: return nbdev.serve.proc_nbs(n_workers=0, force=True)
    finally: nbdev.serve.FilterDefaults = old


def notebook_page(path: Path, folder: Path) -> Page:
    "Read a processed notebook of `folder`."
    nb, rel = read_nb(path), path.relative_to(folder)
    cells = [c for c in nb.cells if c.source.strip()]
    m = _title.match(cells[0].source) if cells else None
    if not m: raise DocsError(f"nbs/{rel}: the first cell must hold a title, '# …', and a subtitle, '> …'")
    cells[0].set_source(cells[0].source[m.end():].strip())
    module = next((c.directives['default_exp'] for c in cells if 'default_exp' in c.directives), '')
    title, subtitle = m['title'].strip(), (m['subtitle'] or '').strip()
    return Page(Path('nbs')/rel, nbpath2html(rel).as_posix(), title, subtitle, module, cells)


def body(page: Page, links: Links) -> str:
    "The Markdown of a notebook's page, below its title."
    def one(i, c):
        if c.cell_type == 'code' and c.source.strip(): return code_cell(c, page, links, i)
        return links.prose(page, text.formulas(c.source)) if c.cell_type == 'markdown' else ''
    return text.blocks(*(one(i, c) for i, c in enumerate(page.cells)))


def code_cell(cell: NbCell, page: Page, links: Links, number: int) -> str:
    "A code cell and its outputs, as its directives want them."
    d = cell.directives
    if 'default_exp' in d or d.get('include') == 'false': return ''
    cell.remove_directives()
    source = cell.source.strip()
    if not source: return ''
    exported = d.keys() & {'export', 'exports', 'exporti'}
    shown = exported_cell(source, page, links) if exported else '' if d.get('echo') == 'false' else text.fenced(source)
    return text.blocks(shown, '' if d.get('output') == 'false' else outputs(cell, d, page, links, number))


# --- exported cells ---

def exported_cell(source: str, page: Page, links: Links) -> str:
    "The entries of an exported cell's public names, then its code; nothing of one that only imports."
    if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source).body): return ''
    found, names = links.entries(page), [*dict.fromkeys(reference.defined(source))]
    return text.blocks(*(entry(found[n], page, links) for n in names if n in found), folded(source, names))


def entry(e: reference.Entry, page: Page, links: Links) -> str:
    "An entry with its links; a command of the command line refers to the page of commands."
    command = links.commands.get(id(e.obj))
    if command: return links.prose(page, reference.command_markdown(e, links.source(e), f'{links.package} {command}'))
    methods = [o for o in links.entries(page).values() if o.name.startswith(f'{e.name}.')] if e.kind == 'class' else []
    own = {p.name.lstrip('*') for o in [e, *methods] for p in reference.params(o)} # they mean the parameters here
    return links.prose(page, reference.entry_markdown(e, links.source, methods), own | {e.name})


def folded(source: str, names: list[str]) -> str:
    "The code of an exported cell, folded; the helpers of a cell that has nothing else are named."
    helpers = [n for n in names if n.startswith('_')]
    of = ' of ' + ', '.join(f'<code>{n}</code>' for n in helpers) if helpers and len(helpers) == len(names) else ''
    head = f'<details class="src" markdown data-search-exclude><summary>Code{of}</summary>'
    return f'{head}\n\n{text.fenced(source)}\n\n</details>'


# --- outputs ---

def outputs(cell: NbCell, directives: dict, page: Page, links: Links, number: int) -> str:
    "The outputs of a cell: pictures, tables, text."
    parts, n = [], 0
    for o in cell.get('outputs', []):
        if o['output_type'] == 'stream': parts.append(_text(text.terminal(''.join(o['text']))))
        elif o['output_type'] == 'error': parts.append(_text('\n'.join(o['traceback'])))
        elif mime := next((k for k in o['data'] if k.startswith('image/')), None):
            n += 1
            more = f' ({n})' if n > 1 else ''
            name, size = f'{page.name}-{number}' + (f'-{n}' if n > 1 else ''), o.get('metadata', {}).get(mime, {})
            parts.append(links.picture(page, o['data'], mime, name, alt(cell, directives, page) + more, size))
        else: parts.append(_shown({k: ''.join(v) for k, v in o['data'].items() if k.startswith('text/')}))
    return text.blocks(*parts)


def _text(o: str) -> str: return text.fenced(o, 'text', '.output') if o.strip() else ''


def _shown(data: dict[str, str]) -> str:
    "The best form of an output that is no picture."
    if 'text/html' in data:
        html = re.sub(r'\n\s*', '\n', _styles.sub('', data['text/html'])).replace(' border="1"', '').strip()
        return f'<div class="output-html">\n{html}\n</div>' if html else ''
    return data.get('text/markdown') or _text(data.get('text/plain', ''))


def alt(cell: NbCell, directives: dict, page: Page) -> str:
    "The cell's `fig-alt`; without it, which code drew the picture."
    given = directives.get('fig-alt') or directives.get('fig-cap')
    if not given:
        lack_alt.append(f'{page.source} cell {cell.idx_}')
        code = [o.strip() for o in cell.source.splitlines() if o.strip() and not o.lstrip().startswith('#')]
        given = f"Picture in “{page.title}”: output of {code[-1] if code else ''}"
    return given.strip('"\'').translate(str.maketrans('[]`', "()'"))
