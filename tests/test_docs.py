"The documentation site: built from the notebooks, complete, without dead links, missing pictures or errors in a browser."
import functools
import gzip
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
pytest.importorskip('zensical', reason="the site's generator needs Python 3.11: pip install -e '.[docs]'")
sys.path.insert(0, str(ROOT/'docs'))
import assemble  # noqa: E402
import build  # noqa: E402
import check  # noqa: E402
import commands  # noqa: E402
import links as linking  # noqa: E402
import reference  # noqa: E402
import text as texts  # noqa: E402
from mstoolkit._modidx import d as index  # noqa: E402
from mstoolkit.cli import app  # noqa: E402
from nbdev.config import nbpath2html  # noqa: E402

SOURCES = [o for o in ROOT.iterdir() if o.name in 'nbs mstoolkit docs benchmarks examples tests'.split() or o.is_file()]
modules = [m for m in index['syms'] if not m.rpartition('.')[2].startswith('_')]


def copy_sources(to: Path):
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for o in SOURCES: shutil.copytree(o, to/o.name, ignore=skip) if o.is_dir() else shutil.copy(o, to/o.name)


def run(*args, cwd: Path) -> subprocess.CompletedProcess:
    "Run a tool of the environment in a copy of the sources, whose package it imports."
    env = {**os.environ, 'PYTHONPATH': str(cwd), 'NO_ALBUMENTATIONS_UPDATE': '1'}
    return subprocess.run([str(o) for o in args], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope='session')
def site(tmp_path_factory) -> Path:
    "The site, built as `make docs` builds it."
    tmp = tmp_path_factory.mktemp('docs')
    copy_sources(tmp)
    r = run(sys.executable, 'docs/build.py', '--out', tmp/'site', cwd=tmp)
    assert r.returncode == 0, r.stdout + r.stderr
    return tmp/'site'


def pages_of(site: Path) -> list[str]:
    "Every page, but that for what is not there and those that lead elsewhere."
    own = lambda f: f.name != '404.html' and 'http-equiv="refresh"' not in f.read_text(encoding='utf-8')
    return [f.relative_to(site).as_posix() for f in sorted(site.rglob('*.html')) if own(f)]


# --- the pages ---

def test_links_anchors_pictures_and_sizes(site):
    assert not check.problems(site, assemble.project().url)


def test_the_checks_see_what_is_wrong(tmp_path):
    (tmp_path/'a.html').write_text('<img src="no.png"><a href="b.html">b</a><a href="#x">x</a><p id="p"><p id="p">'
                                   '<script src="https://cdn/x.js"></script>')
    (tmp_path/'big.png').write_bytes(b'0'*(check.MAX_PICTURE + 1))
    (tmp_path/'c.html').write_text('<img alt="" src="big.png"><a href="a.html#p">good</a><a href="https://else/x">good</a>')
    found = '\n'.join(check.problems(tmp_path))
    for what in ("'no.png' has no alternative text", "'no.png' is missing", "'b.html' leads nowhere", "'#x' leads to an anchor",
                 "anchor 'p' is there twice", "'https://cdn/x.js' is loaded from elsewhere", 'big.png weighs 200 KB'):
        assert what in found, what
    assert found.count('c.html') == 1


def test_every_notebook_has_the_page_its_module_names(site):
    for m in modules:
        doc = __import__(m, fromlist=['x']).__doc__
        page = re.search(r'Docs: \S*?/mstoolkit/(\S+)\.md', doc)[1]
        assert (site/page).is_file() and (site/(page + '.md')).is_file(), m
    for page in pages_of(site): assert (site/f'{page}.md').is_file(), page


def test_copies_in_markdown_are_markdown(site):
    for f in site.rglob('*.html.md'):
        bare = re.sub(r'^(`{3,}).*?^\1$|`[^`\n]+`', '', f.read_text(encoding='utf-8'), flags=re.M | re.S)
        assert not re.findall(r'</?(?:img|pre|code|div|span|b)\b', bare), f.name
    assert re.search(r'^- \[Fine-tune.*\]\(fine_tune\.html\.md\): ', (site/'tutorials'/'index.html.md').read_text(), re.M)


def test_numbers_sort_as_numbers():
    names = ['tutorials/100_c.ipynb', 'tutorials/20_b.ipynb', 'howto/05_a.ipynb', '110_d.ipynb', '010_e.ipynb']
    assert sorted(map(Path, names), key=assemble.in_numbers) == [Path(names[i]) for i in (4, 3, 2, 1, 0)]


def test_defaults_of_recipe_options_are_on_the_page_of_commands():
    train = commands.commands(app)['train']
    told = {p.name: commands.default(p, commands.of_fields(train)) for p in commands.shown(train)}
    assert (told['backbone'], told['lr'], told['minutes'], told['train_bn'], told['epochs']) == ('`chosen`', '`chosen`', '`20.0`', 'off', '')
    ablate = commands.commands(app)['ablate']
    told = {p.name: commands.default(p, commands.of_fields(ablate)) for p in commands.shown(ablate)}
    assert (told['backbone'], told['lr'], told['pretrained'], told['weights_file']) == ('`resnest101e`', '`0.0001`', 'on', '')


def test_the_page_for_what_is_not_there_loads_nothing(site):
    h = check.Html((site/'404.html').read_text(encoding='utf-8'))
    assert not h.files and h.links == [assemble.project().url]


def test_index_anchors_of_nbdev_lead_to_entries(site):
    htmls = check.read(site)
    for m in modules:
        for e in reference.entries(m).values():
            page, _, anchor = index['syms'][m].get(f'{m}.{e.name}', ('#',))[0].partition('#')
            if page: assert {anchor, e.name} & set(htmls[page].ids), f'{m}.{e.name}'


@pytest.mark.parametrize('module', modules)
def test_every_public_name_is_documented(module):
    entries = reference.entries(module)
    assert {n for n in __import__(module, fromlist=['x']).__all__} == {n for n in entries if '.' not in n}
    registered = commands.functions(app)
    lack = {n: reference.lacking(e) for n, e in entries.items() if id(e.obj) not in registered}
    assert not {n: o for n, o in lack.items() if o}


def test_every_option_is_on_the_page_of_commands(site):
    page, ids = (site/'commands.html').read_text(), check.Html((site/'commands.html').read_text()).ids
    for name, command in commands.commands(app).items():
        assert name in ids
        told = CliRunner().invoke(app, [name, '--help'], env={'NO_COLOR': '1'}, terminal_width=400).stdout
        options = set(re.findall(r'(?<![\w-])--[a-z][\w-]*', re.sub(r'^.*│.*?  (?=[a-z])', '', told))) - {'--help'}
        assert options <= set(re.findall(r'--[a-z][\w-]*', page)), name
        for p in commands.shown(command): assert commands.anchor(name, p) in ids


def test_numbers_of_the_landing_page_are_those_of_the_benchmarks():
    text = (ROOT/'docs'/'content'/'index.md').read_text()
    for tile in text.split('<div class="tile"')[1:]:
        source = re.search(r'\((benchmarks/[\w-]+\.md)\)', tile)
        if not source: continue
        measured = (ROOT/source[1]).read_text().replace('−', '-')
        numbers = re.findall(r'class="v"[^>]*>([\d.]+)|minus (\d\.\d)|to (\d\.\d)', tile)
        assert numbers and all(max(n) in measured for n in numbers), (source[1], numbers)


def landing_commands() -> list[str]:
    "Those of `mstoolkit`, below the line that installs it."
    block = re.search(r'```sh\n(.*?)```', (ROOT/'docs'/'content'/'index.md').read_text(), re.S)[1]
    return [o for o in block.strip().splitlines() if o.startswith('mstoolkit ')]


def test_commands_of_the_landing_page_exist():
    known = commands.commands(app)
    for line in landing_commands():
        _, name, *args = line.split()
        assert {a for a in args if a.startswith('--')} <= {o for p in known[name].params for o in commands.flags(p)}


@pytest.mark.slow
def test_commands_of_the_landing_page_work(tmp_path):
    for line in landing_commands():
        subprocess.run([Path(sys.executable).with_name('mstoolkit'), *line.split()[1:]], cwd=tmp_path, check=True)
    assert (tmp_path/'prediction.csv').exists()


def test_nothing_on_the_site_names_a_machine(site):
    for f in [*site.rglob('*.html'), *site.rglob('*.md'), *site.rglob('*.json')]:
        assert not re.findall(r'site-packages/|/(?:tmp|home|root)/\w+', f.read_text(encoding='utf-8')), f


# --- mistakes in the sources ---

@pytest.fixture
def links(tmp_path) -> linking.Links:
    "Two pages in a folder of the repository's own."
    page = lambda src, out, module='': linking.Page(Path(src), out, src, module=module)
    ps = [page('nbs/010_one.ipynb', 'one.html'), page('nbs/howto/020_two.ipynb', 'howto/two.html'),
          page('nbs/030_mix.ipynb', 'callback.mix.html', 'callback.mix')]
    for p in ps: (tmp_path/p.source).parent.mkdir(parents=True, exist_ok=True); (tmp_path/p.source).touch()
    (tmp_path/'Makefile').touch(); (tmp_path/'examples').mkdir()
    return linking.Links(tmp_path, tmp_path/'stage', ps, 'mstoolkit', 'https://forge/me/it/blob/main')


def test_links_between_notebooks_and_to_files(links):
    one, two, mix = links.pages.values()
    fixed = lambda p, t: re.search(r'\]\((.*)\)', links.fix(p, f'[x]({t})'))[1]
    assert fixed(one, 'howto/020_two.ipynb#A-Part') == 'howto/two.md#a-part'
    assert fixed(two, '../010_one.ipynb') == '../one.md'
    assert fixed(two, 'nbs/010_one.ipynb') == '../one.md' # as the README has it, from the root
    assert fixed(one, '../Makefile#L3') == 'https://forge/me/it/blob/main/Makefile#L3'
    assert fixed(one, 'examples') == 'https://forge/me/it/tree/main/examples'
    assert fixed(one, 'https://forge/me/it/blob/main/nbs/howto/020_two.ipynb') == 'howto/two.md'
    assert fixed(one, 'https://docs.fast.ai/x.html#Y') == 'https://docs.fast.ai/x.html#Y'
    for same in ('`[x](gone.ipynb)`', '```\n[x](gone.ipynb)\n```', '    [x](gone.ipynb)'):
        assert links.fix(one, same) == same
    wrong = lambda told: pytest.raises(linking.DocsError, match=f'nbs/010_one.ipynb: {told}')
    with wrong("there is no '999_none.ipynb' to link to"): links.fix(one, '[x](999_none.ipynb)')
    with wrong("the picture 'a.png' has no alternative text"): links.fix(one, '![](a.png)')


def test_names_in_backticks_become_links(links):
    one, two, mix = links.pages.values()
    linked = lambda md, page=two, **kw: links.link_names(page, md, **kw)
    assert linked('`BatchMix`') == '[`BatchMix`](../callback.mix.md#batchmix)'
    assert linked('`BatchMix()` and `BatchMix.draw`').count('](../callback.mix.md#batchmix') == 2
    assert linked('`mstoolkit.callback.mix`') == '[`mstoolkit.callback.mix`](../callback.mix.md)'
    assert linked('`BatchMix`', mix) == '[`BatchMix`](#batchmix)'
    for same in ('`batchmix`', '## `BatchMix`', '[`BatchMix`](x.md)', '```py\n`BatchMix`\n```', '``a `BatchMix` ``',
                 '`BatchMix`{ .n }', '    `BatchMix`'):
        assert linked(same) == same
    assert linked('`BatchMix`', skip={'BatchMix'}) == '`BatchMix`'


def test_names_of_files_become_links_and_titles(links):
    one, two, mix = links.pages.values()
    mix.title = 'Mixing'
    assert links.fix(one, '[030_mix.ipynb](030_mix.ipynb)') == '[Mixing](callback.mix.md)'
    assert links.link_names(one, '`030_mix.ipynb`') == '[`030_mix.ipynb`](callback.mix.md)'
    for same in ('`gone.ipynb`', '`../Makefile`', '`mix.py`'): assert links.link_names(one, same) == same


def test_short_code_and_options_are_not_broken():
    assert texts.whole_code('`a-b`, [`c d`](x.md)') == '`a-b`{ .w }, [`c d`{ .w }](x.md)'
    assert texts.whole_code('`mstoolkit train photos --no-pretrained`') == \
        '<code>mstoolkit train photos <span class="w">--no-pretrained</span></code>'
    for same in ('## `a-b`', '`a-b`{ .n }', '```\n`a-b`\n```', f"`{'long '*9}`"): assert texts.whole_code(same) == same


@pytest.mark.slow
def test_a_build_that_fails_says_where_and_leaves_the_old_site(tmp_path):
    copy_sources(tmp_path)
    book = min((tmp_path/'nbs').glob('*.ipynb'))
    nb = json.loads(book.read_text())
    nb['cells'].append(dict(cell_type='markdown', id='x', metadata={}, source='[x](999_none.ipynb)'))
    book.write_text(json.dumps(nb))
    (tmp_path/'site').mkdir(); (tmp_path/'site'/'old.html').touch()
    r = run(sys.executable, 'docs/build.py', '--out', tmp_path/'site', cwd=tmp_path)
    assert r.returncode and (tmp_path/'site'/'old.html').exists()
    assert r.stderr.strip() == f"docs: nbs/{book.name}: there is no '999_none.ipynb' to link to"


def test_outputs_are_what_a_terminal_would_show():
    text = f'epoch  loss\n█\r\rEpoch 1/2 : |███-------| 30.00% [1/3 00:01<00:02]\r{" "*60}\r0      1.25\nhalf\rwhole\n'
    assert texts.terminal(text) == 'epoch  loss\n0      1.25\nwhole'


def test_formulas_become_mathml():
    md = texts.formulas('$x_i < y$ costs \\$5 or $6, `$a$`, 7$ and $\n\n$$\n\\sum_i a_i\n$$')
    assert md.count('<math') == 2 and 'costs $5 or $6, `$a$`, 7$ and $' in md and 'display="block"' in md
    assert '<mo><' not in md and 'alttext="x&#95;i &lt; y"' in md


def test_a_notebook_in_the_right_place_appears_in_the_right_place():
    page = lambda source, module='': linking.Page(Path(source), nbpath2html(Path(source[4:])).as_posix(), source, module=module)
    books = [page('nbs/110_data.image.ipynb', 'data.image'), page('nbs/300_study.ipynb'), page('nbs/all.ipynb', 'all'),
             page('nbs/howto/010_resume.ipynb'), page('nbs/index.ipynb'), page('nbs/my_notes/010_x.ipynb'), page('nbs/010_data.core.ipynb', 'data.core')]
    assert [assemble.tab(p) for p in books] == ['reference', 'tutorials', 'reference', 'howto', '', 'my_notes', 'reference']
    assert [*assemble.rooms([p for p in books if p.module])] == ['Data', 'Ground', 'More']
    assemble.place_readme(books)
    assert books[4].out == 'start.html' and assemble.tab(books[4]) == 'start'
    books = [page('nbs/index.ipynb'), page('nbs/start/010_install.ipynb')]
    assemble.place_readme(books)
    assert books[0].out == 'readme.html' and assemble.tab(books[0]) == ''


def test_redirects_keep_the_anchor(tmp_path, monkeypatch):
    (tmp_path/'new').mkdir(); (tmp_path/'new'/'page.html').touch()
    monkeypatch.setattr(build, 'redirects', lambda: {'old/page.html': 'new/page.html', 'gone.html': 'nowhere.html'})
    with pytest.raises(linking.DocsError, match='leads to nowhere.html'): build.write_redirects(tmp_path)
    text = (tmp_path/'old'/'page.html').read_text()
    assert 'url=../new/page.html' in text and 'location.hash' in text


# --- nbdev's own way ---

def test_nbdev_proc_nbs_is_quiet(tmp_path, monkeypatch):
    "Whoever has Quarto can run `nbdev-docs`. Here it is only looked for: without this file nbdev would try to install it."
    copy_sources(tmp_path)
    quarto = tmp_path/'bin'/'quarto'
    quarto.parent.mkdir(); quarto.touch(mode=0o755)
    monkeypatch.setenv('PATH', f"{quarto.parent}{os.pathsep}{os.environ['PATH']}")
    r = run(Path(sys.executable).with_name('nbdev-proc-nbs'), '--n-workers', '2', cwd=tmp_path)
    told = f'cells with imports must hold imports alone:\n{r.stdout[-1000:]}{r.stderr[-3000:]}'
    assert r.returncode == 0 and not r.stderr.strip() and 'Warning' not in r.stdout, told


@pytest.mark.parametrize('notebook', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_title_cells_hold_title_and_subtitle_alone(notebook):
    "nbdev makes front matter of the first cell and drops whatever else is in it."
    if notebook.name == 'index.ipynb': return
    source = ''.join(json.loads(notebook.read_text())['cells'][0]['source'])
    assert re.fullmatch(r'# [^\n]+\n+> [^\n]+\n*', source), f'what follows the subtitle needs a cell of its own: {source[:200]!r}'


def test_pictures_of_notebooks_have_a_text_of_their_own():
    "`#| fig-alt: …` in the cell that draws; the site falls back on the cell's last line."
    lack = []
    for f in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for i, c in enumerate(json.loads(f.read_text(encoding='utf-8'))['cells']):
            drawn = any(k.startswith('image/') for o in c.get('outputs', []) for k in o.get('data', {}))
            if drawn and '#| fig-alt:' not in ''.join(c['source']): lack.append(f'{f.name} cell {i}')
    assert not lack


# --- in a browser ---

WIDTHS, HEIGHT = (1280, 390), 900


@pytest.fixture(scope='session')
def served(site):
    "The site under an address of its own."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown(); server.server_close()


def test_pages_in_a_browser(site, served, browser):
    "No error in the console, no request that fails or leaves the site, no picture missing, nothing wider than the screen."
    page, wrong = browser.new_page(), []
    def note(bad, *what): wrong.append((page.url, *what)) if bad else None
    page.on('console', lambda m: note(m.type in ('error', 'warning'), m.text))
    page.on('pageerror', lambda e: note(True, str(e)))
    page.on('requestfailed', lambda r: note('ABORTED' not in r.failure, 'failed', r.url)) # the next page aborts some
    page.on('response', lambda r: note(r.status >= 400 or not r.url.startswith(served), r.status, r.url))
    for name in pages_of(site):
        for width in WIDTHS:
            page.set_viewport_size(dict(width=width, height=HEIGHT))
            if width == WIDTHS[0]: page.goto(served + name)
            page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
            page.wait_for_function("[...document.images].every(i => i.complete)")
            missing = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
            note(missing, 'no picture', missing)
            over = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            note(over > 0, f'{over} px wider than a screen of {width} px')
    page.close()
    assert not wrong


@pytest.mark.parametrize('query, where', [('BatchMix', 'callback.mix.html'), ('--on-bad', 'commands.html'),
                                          ('resume', 'resume_run|checkpoint|commands.html'), ('no internet', 'no_network'), ('offline', 'no_network'),
                                          ('proxy', 'no_network'), ('transfer learning', 'fine_tune|no_network')])
def test_search_finds(served, browser, query, where):
    page = browser.new_page()
    page.add_init_script("const E = Element.prototype, own = E.attachShadow; "
                         "E.attachShadow = function() { return own.call(this, {mode: 'open'}) }") # results are in a closed one
    page.goto(served + 'index.html')
    page.wait_for_timeout(500)
    page.keyboard.press('Control+k')
    page.wait_for_timeout(300)
    page.keyboard.type(query)
    seen = """() => { const all = [], walk = (r, inside) => { for (const e of r.querySelectorAll('*')) {
        if (inside && e.tagName == 'A') all.push(e.href)
        if (e.shadowRoot) walk(e.shadowRoot, true) } }
        walk(document); return all }"""
    for _ in range(50):
        page.wait_for_timeout(200)
        found = page.evaluate(seen)
        if found: break
    page.close()
    assert any(re.search(where, o) for o in found[:8]), found


def kinds(site: Path) -> list[str]:
    "A page of each kind."
    first = lambda what: next(o for o in pages_of(site) if re.search(what, o))
    return ['index.html', first('^tutorials/|^tutorial'), first('callback.mix.html'), 'reference.html', 'commands.html',
            'benchmarks/heads.html', 'changelog.html']


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_accessibility(site, served, browser, scheme):
    "axe-core finds nothing serious; in the dark only colours can differ."
    axe = pytest.importorskip('axe_playwright_python')
    script = (Path(axe.__file__).parent/'axe.min.js').read_text(encoding='utf-8')
    page, wrong = browser.new_page(viewport=dict(width=1280, height=HEIGHT), color_scheme=scheme, reduced_motion='reduce'), []
    options = {'resultTypes': ['violations'], **({'runOnly': ['color-contrast']} if scheme == 'dark' else {})}
    for name in kinds(site):
        page.goto(served + name)
        page.wait_for_timeout(300)
        page.evaluate(script)
        found = page.evaluate("o => axe.run(document, o)", options)['violations']
        bad = [v for v in found if v['impact'] in ('serious', 'critical')]
        wrong += [(name, v['id'], [n['html'][:120] for n in v['nodes'][:3]]) for v in bad]
    page.close()
    assert not wrong


def sent(response) -> int:
    "Bytes of an answer as servers of static pages send it: text compressed, pictures as they are."
    body, kind = response.body(), response.headers.get('content-type', '')
    return len(gzip.compress(body)) if kind.startswith(('text', 'application')) else len(body)


def test_landing_page_is_light(served, browser):
    page, total = browser.new_page(), []
    page.on('response', lambda r: total.append(sent(r)))
    page.goto(served + 'index.html', wait_until='networkidle')
    page.close()
    assert sum(total) < 600_000
