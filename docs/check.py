"What a visitor would stumble over, looked for in the built site: links, anchors, pictures and their texts, sizes."
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

MAX_PICTURE, MAX_PAGE = 200_000, 600_000 # bytes: one picture; a page's HTML with its pictures
SUFFIXES = ('.png', '.jpg', '.jpeg', '.svg', '.gif', '.webp')
LOADS = {'img', 'source', 'link', 'script', 'iframe', 'video'}


class Html(HTMLParser):
    "The ids, links and pictures of a page."
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.files, self.no_alt, self.outside = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.append(a['id'])
        if tag == 'a' and a.get('name'): self.ids.append(a['name'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon', 'preload', 'manifest'): self.files.append(a['href'])
        if tag in LOADS and a.get('src'): self.files.append(a['src'])
        if tag == 'img' and 'alt' not in a: self.no_alt.append(a.get('src'))


def read(site: Path) -> dict[str, Html]:
    return {f.relative_to(site).as_posix(): Html(f.read_text(encoding='utf-8')) for f in sorted(site.rglob('*.html'))}


def _target(page: str, href: str) -> tuple[str, str]:
    "The file and the anchor that a relative link on a page leads to."
    path, anchor = urldefrag(href)
    if not path: return page, unquote(anchor)
    parts = [] if path.startswith('/') else page.split('/')[:-1]
    for o in unquote(path.partition('?')[0]).split('/'):
        if o == '..': parts = parts[:-1] if parts else ['..']
        elif o not in ('.', ''): parts.append(o)
    file = '/'.join(parts)
    return (f'{file}/index.html'.lstrip('/') if path.endswith('/') or path in ('.', '..') else file), unquote(anchor)


def _elsewhere(href: str) -> bool: return href.startswith(('http:', 'https:', 'mailto:', 'data:', 'javascript:', '//'))


def problems(site: Path, url: str = '') -> list[str]:
    "As 'page: what': broken links, missing anchors, pictures without text, files from elsewhere, heavy pages."
    htmls, found = read(site), []
    for page, h in htmls.items():
        if page == '404.html': continue
        bad = lambda what: found.append(f'{page}: {what}')
        twice = [k for k, n in Counter(h.ids).items() if n > 1]
        if twice: bad(f"the anchor {twice[0]!r} is there twice")
        for href in dict.fromkeys(h.links):
            local = href.removeprefix(url) if url and href.startswith(url) else href
            if _elsewhere(local): continue
            file, anchor = _target(page if local == href else 'index.html', local or 'index.html')
            if not (site/file).is_file(): bad(f'the link {href!r} leads nowhere')
            elif anchor and file in htmls and anchor not in htmls[file].ids:
                bad(f'the link {href!r} leads to an anchor that is not there')
        for src in dict.fromkeys(h.files):
            if _elsewhere(src):
                if not src.startswith('data:'): bad(f'{src!r} is loaded from elsewhere')
            elif not (site/_target(page, src)[0]).is_file(): bad(f'the file {src!r} is missing')
        for src in h.no_alt: bad(f'the picture {src!r} has no alternative text')
        found += [f'{page}: {what}' for what in weights(site, page, h)]
    return found


def pictures(site: Path, page: str, h: Html) -> dict[str, int]:
    "The pictures of a page and their bytes."
    local = [o.partition('?')[0] for o in h.files if not _elsewhere(o)]
    files = {_target(page, o)[0] for o in local if o.lower().endswith(SUFFIXES)}
    return {f: (site/f).stat().st_size for f in files if (site/f).is_file()}


def weights(site: Path, page: str, h: Html) -> list[str]:
    "Pictures and pages that are heavier than they may be."
    pics = pictures(site, page, h)
    total = (site/page).stat().st_size + sum(pics.values())
    told = lambda what, n, most: f'{what} weighs {n/1000:.0f} KB, and {most//1000} is the most'
    res = [told(f'the picture {f}', n, MAX_PICTURE) for f, n in pics.items() if n > MAX_PICTURE]
    return res + ([told('the page with its pictures', total, MAX_PAGE)] if total > MAX_PAGE else [])
