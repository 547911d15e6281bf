"Which pages the site has, in which order, and what is on those that no file holds."
import importlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import commands
import notebooks
import text
import yaml
from links import DocsError, Links, Page, names_of_others

try: import tomllib
except ImportError: import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT/'docs'

# Tabs in their order: the folder of notebooks that fills each, its title, what it is for; other folders come after.
TABS = {
    'start': ('Get started', 'Install it, train something, look at what came out'),
    'tutorials': ('Tutorials', 'Lessons to follow from top to bottom'),
    'howto': ('How-to', 'One task each, for those who know what they want'),
    'explain': ('Explanations', 'Why things are as they are, and how they work inside'),
}

# Rooms of the reference, what a user calls first coming first: the first of a notebook's three digits, its title.
ROOMS = {'1': 'Data', '6': 'Learners', '7': 'Train, predict, report', '9': 'Ship', '2': 'Networks', '3': 'Losses and callbacks',
         '4': 'Recipes and runs', '5': 'Judging', '8': 'Command line', '0': 'Ground'}


@dataclass
class Project:
    "What pyproject.toml says."
    name: str
    title: str
    about: str
    repo: str # address of the repository
    url: str # address of the site
    branch: str # that links to sources lead to
    needs: list[str] # names of the libraries that it needs

    @property
    def blob(self) -> str: return f'{self.repo}/blob/{self.branch}'


def project() -> Project:
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))
    p, nbdev = toml['project'], toml['tool']['nbdev']
    urls = p['urls']
    title, branch = nbdev.get('title', p['name']), nbdev.get('branch', 'main')
    return Project(p['name'], title, p['description'], urls['Repository'].rstrip('/'), urls['Documentation'], branch,
                   [re.match(r'[\w.-]+', o)[0] for o in p['dependencies']])


# --- pages that are files ---

_h1 = re.compile(r'\A\s*#\s+([^\n]+)\n(?:\s*>\s+([^\n]+)\n)?')


def markdown_page(path: Path, out: str, title: str = '', subtitle: str = '') -> Page:
    "A Markdown file of the repository as a page."
    md = path.read_text(encoding='utf-8')
    m = _h1.match(md)
    if not m: raise DocsError(f"{path.relative_to(ROOT)}: the first line must be a title, '# …'")
    return Page(path.relative_to(ROOT), out, title or m[1], subtitle or m[2] or '', body=md[m.end():])


def in_numbers(path: Path) -> list[tuple]:
    "Sorts the numbers of a path as numbers."
    return [(o == '', int(o or 0), word) for o, word in re.findall(r'(\d*)(\D*)', str(path))]


def notebook_pages() -> list[Page]:
    "A page for each notebook that `proc_nbs` finds, in the order of folder and number: 20 before 100."
    folder = notebooks.processed()
    found = [notebooks.notebook_page(f, folder) for f in sorted(folder.rglob('*.ipynb'), key=in_numbers)]
    for p in found:
        same = [str(o.source) for o in found if o.out == p.out]
        if len(same) > 1: raise DocsError(f"{' and '.join(same)} have the same page, {p.out}: give one another name")
    return found


def benchmark_pages() -> list[Page]:
    "`benchmarks/*.md`, in the order in which their README names them."
    folder = ROOT/'benchmarks'
    named = re.findall(r'\]\((\w[\w-]*\.md)\)', (folder/'README.md').read_text(encoding='utf-8'))
    files = sorted(f for f in folder.glob('*.md') if f.name != 'README.md')
    files.sort(key=lambda f: (named + [f.name]).index(f.name))
    about = 'What was measured, each with its command, machine and date'
    first = markdown_page(folder/'README.md', 'benchmarks/index.html', 'Benchmarks', about)
    return [first, *(markdown_page(f, f'benchmarks/{f.stem}.html') for f in files)]


def tab(p: Page) -> str:
    "The tab of a notebook: the reference for the notebook of a module, else that of its folder; '' for none."
    folders = p.source.parts[1:-1]
    if p.out in ('index.html', 'readme.html'): return ''
    return 'reference' if p.module else folders[0] if folders else 'start' if p.name == 'start' else 'tutorials'


# --- pages that no file holds ---

def page(out: str, title: str, subtitle: str) -> Page: return Page(Path('docs'), out, title, subtitle)


def cards(ps: list[Page], at: Page, links: Links, pictures: bool = True) -> str:
    "Pages as cards: title, subtitle, first picture."
    def card(p):
        pic = ''
        if p.thumb and pictures:
            file, kind = links.to(at, os.path.join(p.folder, p.thumb[0])), p.thumb[1]
            pic = f'<span class="pic"><img class="{kind}" src="{file}" alt="" loading="lazy"></span>'
        words = f'<b>{text.inline_html(p.title)}</b><span>{text.inline_html(p.subtitle)}</span>'
        return f'<a class="card" href="{links.to(at, p.out)}">{pic}{words}</a>'
    return '\n'.join(['<div class="cards">', *map(card, ps), '</div>'])


def tab_page(name: str, ps: list[Page], links: Links) -> Page:
    "The page that a tab opens: a card for each of its pages."
    title, about = TABS.get(name, (name.replace('_', ' ').capitalize(), ''))
    p = page(f'{name}/index.html', title, about)
    p.body = cards(ps, p, links)
    return p


def rooms(ps: list[Page]) -> dict[str, list[Page]]:
    "The modules of each room, by its title; `data.core` is what a user of `data` calls and comes first."
    res = {title: [] for title in ROOMS.values()}
    for p in ps: res.setdefault(ROOMS.get(p.source.name[0], 'More'), []).append(p)
    return {k: sorted(v, key=lambda p: not p.module.endswith('.core')) for k, v in res.items() if v}


def uses(ps: Iterable[Page]) -> Counter:
    "How often the code of tutorials and how-tos has each word."
    return Counter(o for p in ps if not p.module for c in p.cells if c.cell_type == 'code'
                   for o in re.findall(r'\w+', c.source))


def reference_page(ps: list[Page], links: Links) -> Page:
    "Every module by room, every public name with the first line of its docstring, the most used ones first."
    used = uses(links.pages.values())
    at = page('reference.html', 'Reference', 'Every module and every public name, by room')
    def name(p, e):
        told = links.link_names(at, text.in_table(e.doc.partition('\n')[0]), {e.name})
        return [f'[`{e.name}`]({links.to(at, p.md)}#{e.anchor})', told]
    def module(p):
        own = [e for e in links.entries(p).values() if '.' not in e.name]
        names = [name(p, e) for e in sorted(own, key=lambda e: -used[e.name])]
        about = links.link_names(at, text.unlinked(p.subtitle))
        title = f'{links.package}.{p.module}'.replace('_', r'\_') # `__main__` is not a bold "main"
        return text.blocks(f'### [{title}]({links.to(at, p.md)})', about,
                           text.table(['Name', 'What it is'], names, 'names'))
    for room, ms in rooms(ps).items():
        at.body = text.blocks(at.body, f'## {room}', *map(module, ms))
    return at


# --- all of them ---

def item(p: Page) -> dict[str, str]: return {text.plain(p.title): p.md}


def menu(
    tabs: dict[str, Page], # name of a tab -> the page that it opens
    under: dict[str, list[Page]], # name of a tab -> its notebooks
    ref: Page, # of all names
    cmds: Page, # of the command line
    bench: list[Page], # their overview first
    last: list[Page] # tabs of their own
) -> list:
    "The tabs and what is under each."
    res = [{'Home': 'index.md'}]
    for name, p in tabs.items():
        res.append(item(p) if under[name] == [p] else {p.title: [p.md, *map(item, under[name])]})
    in_rooms = [{k: [*map(item, ps)]} for k, ps in rooms(under['reference']).items()]
    res.append({ref.title: [ref.md, item(cmds), *in_rooms]})
    res.append({bench[0].title: [bench[0].md, *map(item, bench[1:])]})
    return res + [*map(item, last)]


def front(p: Page, links: Links) -> str:
    "What the templates of the theme know about a page."
    d = dict(title=text.plain(p.title), description=text.plain(p.subtitle))
    if p.source.suffix == '.ipynb': d['notebook'] = f'{links.blob}/{p.source.as_posix()}'
    if p.module: d['module'] = f'{links.package}.{p.module}'
    if p.module: d['code'] = f"{links.blob}/{d['module'].replace('.', '/')}.py"
    return f'---\n{yaml.safe_dump(d, allow_unicode=True)}---'


def write_page(p: Page, src: Path, links: Links):
    subtitle = f'<p class="subtitle" markdown="span">{links.prose(p, p.subtitle)}</p>' if p.subtitle else ''
    file = src/p.md
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.blocks(front(p, links), f'# {p.title}', subtitle, text.whole_code(p.body)) + '\n',
                    encoding='utf-8')


def write_config(to: Path, p: Project, nav: list):
    "docs/site.yml with the project's names, the folders and the pages."
    mine = dict(site_name=p.title, site_description=p.about, site_url=p.url, repo_url=p.repo,
                repo_name=p.repo.split('/', 3)[-1], docs_dir='src', site_dir='site', nav=nav)
    config = (HERE/'site.yml').read_text(encoding='utf-8')
    config = config.replace('theme:\n', f'theme:\n  custom_dir: {HERE/"theme"}\n', 1)
    (to/'mkdocs.yml').write_text(config + yaml.safe_dump(mine, allow_unicode=True, sort_keys=False), encoding='utf-8')


def place_readme(books: list[Page]):
    "The landing page has the place of `index.ipynb`, which is how one gets started until another notebook says it."
    p = next(o for o in books if o.out == 'index.html')
    started = any(tab(o) == 'start' for o in books)
    p.out, p.title = ('readme.html', 'README') if started else ('start.html', TABS['start'][0])


def stage(to: Path, p: Project) -> list[Page]:
    "Write every page as Markdown, and the site's configuration, to the folder `to`."
    shutil.rmtree(to, ignore_errors=True)
    src = to/'src'
    shutil.copytree(HERE/'content', src)
    app = importlib.import_module(f'{p.name}.cli').app
    books, bench = notebook_pages(), benchmark_pages()
    place_readme(books)
    last = [markdown_page(ROOT/f'{o.upper()}.md', f'{o}.html') for o in ('changelog', 'contributing')]
    files = [*books, *bench, *last]
    links = Links(ROOT, src, files, p.name, p.blob, commands.functions(app), names_of_others(p.needs))
    write_bodies(files, links)
    cmds = page('commands.html', 'Commands', 'Every command of the command line, with every option')
    cmds.body = links.link_names(cmds, commands.commands_markdown(app, p.name))
    names = [o for o in dict.fromkeys([*TABS, *map(tab, books), 'reference']) if o]
    under = {name: [o for o in books if tab(o) == name] for name in names}
    alone = {name: ps[0] for name, ps in under.items() if name == 'start' and len(ps) == 1} # a tab that is one page
    tabs = {k: alone.get(k) or tab_page(k, ps, links) for k, ps in under.items() if ps and k != 'reference'}
    ref = reference_page(under['reference'], links)
    write_home(src/'index.md', [*tabs.values(), ref, cmds, bench[0]], links)
    every = [*files, *(o for o in tabs.values() if o not in files), ref, cmds]
    for o in every: write_page(o, src, links)
    write_config(to, p, menu(tabs, under, ref, cmds, bench, last))
    return every


def write_bodies(files: list[Page], links: Links):
    "The Markdown of all pages that are files; one error tells the first mistake of each."
    wrong = []
    for o in files:
        try: o.body = notebooks.body(o, links) if o.cells else links.prose(o, o.body)
        except DocsError as e: wrong.append(str(e))
    if wrong: raise DocsError('\n      '.join(wrong))


def write_home(file: Path, ps: list[Page], links: Links):
    "The landing page shows where one can go, and where to start."
    home, where = file.read_text(encoding='utf-8'), cards(ps, page('index.html', '', ''), links, pictures=False)
    file.write_text(home.replace('{{ tabs }}', where).replace('{{ start }}', ps[0].md), encoding='utf-8')
