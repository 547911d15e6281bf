"Where things are: pages by their source, public names by their spelling, everything else in the repository."
import base64
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urljoin

import text
from fastcore.nbio import NbCell
from PIL import Image
from reference import Entry, entries

PICTURES = {'.png': 'image/png', '.jpg': 'image/jpeg', '.svg': 'image/svg+xml', '.gif': 'image/gif',
            '.webp': 'image/webp'}
LARGE = 50_000 # bytes of a PNG


class DocsError(Exception):
    "A mistake in what the site is made from; its text names the page."


@dataclass
class Page:
    "One page of the site and what it is made from."
    source: Path # in the repository, relative to its root
    out: str # 'callback.mix.html', as nbdev's index has it
    title: str
    subtitle: str = ''
    module: str = '' # 'callback.mix'; '' for a page that is not the reference of a module
    cells: list[NbCell] = field(default_factory=list, repr=False)
    body: str = field(default='', repr=False) # the Markdown that becomes the page, below its title
    thumb: tuple[str, str] = () # its first picture, and whether that is of lines or a photograph

    @property
    def stem(self) -> str: return self.out.removesuffix('.html')
    @property
    def md(self) -> str: return f'{self.stem}.md'
    @property
    def folder(self) -> str: return os.path.dirname(self.out)
    @property
    def name(self) -> str: return os.path.basename(self.stem)


def names_of_others(
    dists: list[str] # libraries that were made with nbdev, as the package index calls them
) -> dict[str, str]: # addresses
    "What nbdev's indexes of other libraries say: their names that could not be words."
    res = {}
    for o in entry_points(group='nbdev'):
        if not o.dist or o.dist.name not in dists: continue
        d = o.load()
        base = urljoin(d['settings']['doc_host'] + '/', d['settings']['doc_baseurl']).rstrip('/') + '/'
        for module, syms in d['syms'].items():
            for name, (page, _) in syms.items():
                short = name.removeprefix(f'{module}.')
                word = '_' not in short and not re.match(r'[A-Z][a-z]+\w', short)
                if short[0] != '_' and not word: res.setdefault(short, base + page)
    return res


class Links:
    "Addresses on the site."
    def __init__(self,
        root: Path, # of the repository
        stage: Path, # folder of the pages in Markdown
        pages: list[Page], # that are made from files
        package: str, # name of the library
        blob: str, # address of the repository's files on its forge
        commands: dict|None = None, # the functions of the command line -> their commands' names
        others: dict|None = None # names of other libraries -> their addresses
    ):
        self.root, self.stage, self.blob, self.package = root, stage, blob, package
        self.pages = {p.source.as_posix(): p for p in pages}
        self.modules = {p.module: p for p in pages if p.module}
        self.commands, self.others = commands or {}, others or {}
        self.names = {} # name -> (page, anchor) of each entry that has it
        for p in self.modules.values():
            for e in self.entries(p).values(): self.names.setdefault(e.name, []).append((p, e.anchor))

    def entries(self, page: Page) -> dict[str, Entry]:
        "The public names of a page's module; `__main__` is not imported, that would run it."
        return entries(f'{self.package}.{page.module}') if page.module and not page.module.startswith('_') else {}

    def to(self, page: Page, file: str) -> str:
        "A file of the site, as a page links to it."
        return os.path.relpath(file, page.folder or '.').replace(os.sep, '/')

    def source(self, e: Entry) -> str: return f"{self.blob}/{e.module.replace('.', '/')}.py#L{e.line}"

    def resolve(self, page: Page, target: str) -> str:
        "What a link on `page` means: a page, a picture, a file of the repository on its forge; else an error."
        inside = target.startswith(self.blob + '/')
        if re.match(r'[a-z][a-z0-9+.-]*:', target) and not inside: return target
        path, sharp, anchor = target.removeprefix(self.blob + '/').partition('#')
        if not path: return sharp + anchor.lower()
        starts = [self.root] if inside else [self.root/page.source.parent, self.root] # the README's start at the root
        files = [(s/unquote(path)).resolve() for s in starts]
        found = next((f for f in files if f.exists() and f.is_relative_to(self.root)), None)
        if not found: raise DocsError(f"{page.source}: there is no {target!r} to link to")
        rel = found.relative_to(self.root).as_posix()
        known = self.pages.get(rel) or self.pages.get(f'{rel}/README.md')
        if known: return self.to(page, known.md) + sharp + anchor.lower()
        if found.suffix.lower() in PICTURES: return self.to(page, self.asset(rel))
        return (self.blob.replace('/blob/', '/tree/') if found.is_dir() else self.blob) + f'/{rel}{sharp}{anchor}'

    def asset(self, rel: str) -> str:
        "Copy a picture of the repository beside the pages; where it is there."
        to = self.stage/rel.removeprefix('nbs/')
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((self.root/rel).read_bytes())
        return rel.removeprefix('nbs/')

    def name(self, page: Page, code: str) -> str:
        "The address of the entry, module or command that `code` names, as `page` links to it; '' if it names none."
        bare, inner = code.removesuffix('()'), code.removesuffix('()').removeprefix(f'{self.package}.')
        command, known = bare.removeprefix(f'{self.package} '), self.commands.values()
        if command != bare: return f"{self.to(page, 'commands.md')}#{command}" if command in known else ''
        if '.' in bare and inner in self.modules: return self.to(page, self.modules[inner].md)
        module, _, last = inner.rpartition('.')
        where = self.names.get(bare) or [o for o in self.names.get(last, []) if o[0].module == module]
        own = next((o for o in where if o[0] is page), None)
        if bare in known and bare == code and not own: return '' # `train` may be a folder or a command
        if not where: return self.others.get(bare) or self.file(page, code)
        p, anchor = own or where[0]
        return f'#{anchor}' if own else f'{self.to(page, p.md)}#{anchor}'

    def file(self, page: Page, code: str) -> str:
        "The address of a file of the repository that `code` names, beside the page's own or, as a path, from the root."
        if not re.fullmatch(r'[\w/.-]+\.(?:py|md|toml|ipynb|txt|yml|ini|cfg)', code): return ''
        here = (self.root/page.source.parent/code).is_file() or ('/' in code and (self.root/code).is_file())
        return self.resolve(page, code) if here else ''

    def link_names(self, page: Page, md: str, skip: set[str] = frozenset()) -> str:
        "Make a link of every public name that stands in backticks in the prose of `md`, but those of `skip`."
        def link(code):
            to = '' if code.removesuffix('()') in skip else self.name(page, code)
            return f'[`{code}`]({to})' if to else f'`{code}`'
        return text.each_code(md, link)

    def fix(self, page: Page, md: str) -> str:
        "Rewrite the links of `md` for the site; an error where one leads nowhere or a picture has no alternative text."
        def one(picture, label, target, title):
            if picture and not label.strip():
                raise DocsError(f"{page.source}: the picture {target!r} has no alternative text: ![what is on it](…)")
            to = self.resolve(page, target)
            there = self.pages.get((page.source.parent/target).as_posix())
            if there and label == target: label = there.title # `[heads.md](heads.md)`
            file = Path(os.path.normpath(self.stage/page.folder/to))
            attrs = picture_attrs(file) if picture and ':' not in to else ''
            return f"{'!' if picture else ''}[{label}]({to}{title}){attrs}"
        return text.each_link(md, one)

    def prose(self, page: Page, md: str, skip: set[str] = frozenset()) -> str:
        return self.link_names(page, self.fix(page, md), skip)

    def picture(self, page: Page, data: dict, mime: str, name: str, alt: str, size: dict) -> str:
        "Write a picture that a cell put out to a file, and refer to it."
        suffix = next((k for k, v in PICTURES.items() if v == mime), None)
        if not suffix: raise DocsError(f"{page.source}: a picture of type {mime} cannot be shown: make it a PNG or SVG")
        raw = ''.join(data[mime])
        file = self.stage/page.folder/'pictures'/f'{name}{suffix}'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw.encode() if suffix == '.svg' else base64.b64decode(raw))
        if suffix == '.png' and file.stat().st_size > LARGE: file = as_webp(file)
        attrs = picture_attrs(file, size)
        page.thumb = page.thumb or (f'pictures/{file.name}', 'line' if '.line' in attrs else 'photo')
        return f'![{alt}](pictures/{file.name}){attrs}'


def as_webp(file: Path) -> Path:
    "A large PNG of photographs as WebP, a quarter as large; a drawing stays as it is."
    with Image.open(file) as im:
        if is_line_art(im): return file
        im.convert('RGBA' if 'A' in im.getbands() else 'RGB').save(file.with_suffix('.webp'), quality=90, method=6)
    file.unlink()
    return file.with_suffix('.webp')


def picture_attrs(
    file: Path,
    size: dict|None = None # a notebook's `width` and `height`
) -> str:
    "What the page says about a picture: whether it can be shown light on dark, and its size, so that nothing jumps."
    if file.suffix.lower() == '.svg': return '{ .line loading="lazy" }'
    with Image.open(BytesIO(file.read_bytes())) as im:
        kind = 'line' if is_line_art(im) else 'photo'
        w, h = im.size
    if size: w, h = size.get('width', w), size.get('height', h)
    return f'{{ .{kind} loading="lazy" width="{w}" height="{h}" }}'


def is_line_art(im: Image.Image) -> bool:
    "Whether a picture is a drawing on white, which can be shown light on dark: four colours make up nearly all of it."
    small = im.convert('RGB')
    small.thumbnail((400, 400), Image.NEAREST)
    top = Counter(zip(*(o.point(lambda v: v >> 5).tobytes() for o in small.split()))).most_common(4)
    total = small.width*small.height
    return top[0][0] == (7, 7, 7) and top[0][1] > .55*total and sum(n for _, n in top) > .9*total
