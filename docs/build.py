"Build the documentation site from the notebooks, the benchmarks, the changelog and the library itself: `make docs`."
import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from html import escape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import check
import notebooks
import text
from assemble import HERE, ROOT, Project, project, stage
from links import DocsError, Page

_attrs = re.compile(r'(?<=[`)])\{ [^}\n]*\}|(?<=\S) \{ [#.][^}\n]*\}$', re.M)
_tags = re.compile(r'</?(?:div|p|pre|details|summary|span|figure|figcaption|b)\b[^>]*>')
_folded = re.compile(r'<details class="src".*?</details>\n*', re.S)
_front = re.compile(r'\A---\n.*?\n---\n+', re.S)
_as_text = [ # what pages are written in beside Markdown, and what takes its place
    (re.compile(r'<a class="card" href="([^"]*)\.html">.*?<b>(.*?)</b><span>(.*?)</span></a>'), r'- [\2](\1.md): \3'),
    (re.compile(r'<pre\b[^>]*><code>(.*?)</code></pre>', re.S), r'```\n\1\n```'),
    (re.compile(r'<svg\b[^>]*aria-label="([^"]*)".*?</svg>', re.S), r'\1'),
    (re.compile(r'<img\b[^>]*alt="([^"]+)"[^>]*>'), r'\1: '),
    (re.compile(r'<a\b[^>]*href="([^"]*)"[^>]*>(.*?)</a>', re.S), r'[\2](\1)'),
    (re.compile(r'</?code>'), '`'),
]
_page_link = re.compile(r'\]\((?!https?:)([^)#]+)\.md(#[^)]*)?\)')


def render(work: Path):
    "Let zensical make HTML of the pages in Markdown."
    command = [Path(sys.executable).with_name('zensical'), 'build', '-f', work/'mkdocs.yml']
    r = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'NO_COLOR': '1'})
    told = r.stdout + r.stderr
    if r.returncode or 'Warning' in told or 'Error' in told: raise DocsError(f'zensical: {told}')


def plain_markdown(md: str) -> str:
    "A page's Markdown without what only its HTML needs, its links leading to Markdown too."
    md = _attrs.sub('', _folded.sub('', _front.sub('', md)))
    for pattern, instead in _as_text: md = text.prose_blocks(md, lambda o: pattern.sub(instead, o))
    md = text.prose(md, lambda line: _page_link.sub(r'](\1.html.md\2)', _tags.sub('', line)))
    return re.sub(r'\n{3,}', '\n\n', md)


def write_twins(src: Path, site: Path):
    "Write the Markdown of every page beside it: docstrings of modules lead to `core.html.md`, beside `core.html`."
    for f in src.rglob('*.md'):
        twin = site/f.relative_to(src).with_name(f.name.removesuffix('.md') + '.html.md')
        twin.write_text(plain_markdown(f.read_text(encoding='utf-8')), encoding='utf-8')


def llms(ps: list[Page], p: Project) -> str:
    "`llms.txt`: the Markdown of every page, with its subtitle."
    lines = [f'- [{text.plain(o.title)}]({p.url}{o.out}.md): {text.plain(o.subtitle)}' for o in ps]
    return '\n'.join([f'# {p.title}\n\n> {p.about}\n\n## Pages\n', *lines, ''])


def redirects() -> dict[str, str]:
    "Old address -> new address, from docs/redirects.txt."
    lines = (HERE/'redirects.txt').read_text(encoding='utf-8').splitlines()
    return dict(o.split() for o in lines if o.strip() and not o.startswith('#'))


def redirect_page(to: str) -> str:
    "A page that leads to another one, with the part after '#'."
    to = escape(to)
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Moved</title>'
            f'<link rel="canonical" href="{to}"><meta http-equiv="refresh" content="0; url={to}">'
            f'<script>location.replace("{to}" + location.hash)</script></head>'
            f'<body><p>This page is now <a href="{to}">{to}</a>.</p></body></html>\n')


def write_redirects(site: Path):
    for old, new in redirects().items():
        if (site/old).exists(): raise DocsError(f'docs/redirects.txt: {old} is a page')
        there = (site/new.partition('#')[0]).exists()
        if not there: raise DocsError(f'docs/redirects.txt: {old} leads to {new}, which is no page')
        (site/old).parent.mkdir(parents=True, exist_ok=True)
        (site/old).write_text(redirect_page(os.path.relpath(new, os.path.dirname(old) or '.')), encoding='utf-8')


def write_404(site: Path, p: Project):
    "The page for what is not there: it loads nothing, so that it looks the same under whatever address it is served."
    page = (HERE/'theme'/'404.html').read_text(encoding='utf-8')
    (site/'404.html').write_text(page.replace('{{ title }}', escape(p.title)).replace('{{ url }}', escape(p.url)),
                                 encoding='utf-8')


def build(
    out: Path, # folder of the site; what was there goes when the new one is whole
    work: Path = ROOT/'build'/'docs' # folder for the pages in Markdown
) -> list[Page]:
    "Build the site; a `DocsError` says what is wrong with it."
    p = project()
    ps, site = stage(work, p), work/'site'
    render(work)
    write_twins(work/'src', site)
    write_redirects(site)
    write_404(site, p)
    (site/'llms.txt').write_text(llms(ps, p), encoding='utf-8')
    (site/'.nojekyll').touch()
    problems = check.problems(site, p.url)
    if problems: raise DocsError('\n      '.join(problems))
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(site, out)
    return ps


def changed() -> float:
    "When something that the site is made from last changed."
    files = [f for d in ('nbs', 'benchmarks', 'docs') for f in (ROOT/d).rglob('*') if '__pycache__' not in f.parts]
    return max(f.stat().st_mtime for f in [*files, *ROOT.glob('*.md')] if f.is_file())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def serve(out: Path, port: int):
    "Show the site; build it again, in a process of its own, when something that it is made from changes."
    server = ThreadingHTTPServer(('127.0.0.1', port), partial(Quiet, directory=str(out)))
    Thread(target=server.serve_forever, daemon=True).start()
    print(f'http://127.0.0.1:{port}/ follows your edits; ctrl-c ends it')
    seen = 0.
    while True:
        if (now := changed()) > seen:
            seen = now
            subprocess.run([sys.executable, __file__, '--out', out])
        time.sleep(1)


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--out', type=Path, default=ROOT/'_docs', help='folder to write the site to')
    a.add_argument('--serve', action='store_true', help='show the site and keep it up to date')
    a.add_argument('--port', type=int, default=8000, help='of the site that is shown')
    a = a.parse_args()
    out, start = a.out.resolve(), time.time()
    os.chdir(ROOT)
    try:
        if a.serve: return serve(out, a.port)
        ps = build(out)
    except DocsError as e: sys.exit(f'docs: {e}')
    except KeyboardInterrupt: return
    size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())
    print(f'{len(ps) + 1} pages, {size/1e6:.1f} MB in {out} ({time.time()-start:.0f} s)')
    lack = notebooks.lack_alt
    if lack: print(f'{len(lack)} pictures have no `#| fig-alt: …`: {", ".join(lack)}')


if __name__ == '__main__': main()
