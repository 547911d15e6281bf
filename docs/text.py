"Markdown as text: what of it is prose, code, a link; formulas; what a terminal leaves behind."
import re
from collections.abc import Callable
from html import escape

_fence = re.compile(r'^\s*(`{3,}|~{3,})')
_block = re.compile(r'^(`{3,}).*?^\1$', re.M | re.S)
_code = re.compile(r'(`+)(?!`)(.+?)(?<!`)\1(?!`)(\{)?')
_link = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*([^)\s]+)(\s+"[^"]*")?\s*\)')
_formula = re.compile(r'(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])')
_display = re.compile(r'^\$\$(.+?)\$\$\s*$', re.M | re.S)
_bar = re.compile(r'\|[█-]{8,}\|\s*\d+\.\d+%|^█?\s*$') # fastai's progress bar, full or partly drawn


def prose(
    md: str, # Markdown
    change: Callable[[str], str], # from a line to what takes its place
    *,
    headings: bool = True # change them as well
) -> str:
    "Change the lines of `md` that are not code."
    res, fence = [], ''
    for line in md.split('\n'):
        m, bare = _fence.match(line), line.lstrip()
        if m and (not fence or m[1].startswith(fence)): fence = '' if fence else m[1]
        elif not fence and (not line.startswith('    ') or bare.startswith(('-', '*', '|'))):
            if headings or not bare.startswith('#'): line = change(line)
        res.append(line)
    return '\n'.join(res)


def prose_blocks(md: str, change: Callable[[str], str]) -> str:
    "Change what stands between fenced blocks of code, whole."
    return outside(_block, md, change)


def outside(pattern: re.Pattern, line: str, change: Callable[[str], str]) -> str:
    "Change the parts of a line, or of more, that do not match."
    res, at = [], 0
    for m in pattern.finditer(line):
        res += [change(line[at:m.start()]), m[0]]
        at = m.end()
    return ''.join(res) + change(line[at:])


def outside_code(line: str, change: Callable[[str], str]) -> str: return outside(_code, line, change)


def each_code(md: str, change: Callable[[str], str]) -> str:
    "Change inline code in prose; not in headings and links, nor where it has attributes or more than one backtick."
    one = lambda m: change(m[2]) if m[1] == '`' and not m[3] else m[0]
    return prose(md, lambda line: outside(_link, line, lambda o: _code.sub(one, o)), headings=False)


def each_link(md: str, change: Callable[[bool, str, str, str], str]) -> str:
    "Change links in prose, given whether they are pictures, their text, target and title."
    def one(m): return change(bool(m[1]), m[2] if m[1] else _link.sub(one, m[2]), m[3], m[4] or '')
    def line(o):
        spans = [m.span() for m in _code.finditer(o)]
        return _link.sub(lambda m: m[0] if any(a < m.start() and m.end() < b for a, b in spans) else one(m), o)
    return prose(md, line)


def unlinked(md: str) -> str: return _link.sub(r'\2', md)


def plain(md: str) -> str: return unlinked(md).replace('`', '') # as text


def inline_html(md: str) -> str:
    "A line of Markdown as HTML: its code, without its links."
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', escape(unlinked(md), quote=False))


def escape_tags(md: str) -> str:
    "`<name>` in prose is text, not HTML."
    return prose(md, lambda line: outside_code(line, lambda o: re.sub(r'<(?=[\w/!])', '&lt;', o)))


def _mathml(tex: str, display: str = 'inline') -> str:
    from latex2mathml.converter import convert
    alt = escape(' '.join(tex.split())).replace('\\', '&#92;').replace('_', '&#95;').replace('*', '&#42;')
    return convert(tex, display=display).replace('<math', f'<math alttext="{alt}"', 1)


def formulas(md: str) -> str:
    "TeX between dollars as MathML, which browsers draw themselves."
    md = _display.sub(lambda m: f'<div class="math">{_mathml(m[1], "block")}</div>', md)
    one = lambda o: _formula.sub(lambda m: _mathml(m[1]), o).replace('\\$', '$')
    return prose(md, lambda line: outside_code(line, one))


def fenced(code: str, lang: str = 'python', attrs: str = '') -> str:
    "A block of code, in as many backticks as it needs."
    ticks = '`'*max(3, 1 + max((len(o) for o in re.findall(r'`+', code)), default=0))
    return f'{ticks}{lang}' + (f' {{ {attrs} }}' if attrs else '') + f'\n{code.rstrip()}\n{ticks}'


def terminal(text: str) -> str:
    "What a terminal would show at the end: carriage returns overwrite, and progress bars are gone."
    lines = []
    for line in text.split('\n'):
        shown = ''
        for part in line.split('\r'): shown = part + shown[len(part):]
        if '\r' not in line or not _bar.search(shown): lines.append(shown.removeprefix('█').rstrip())
    return '\n'.join(lines).strip('\n')


def blocks(*parts: str) -> str: return '\n\n'.join(o for o in parts if o)


def table(head: list[str], rows: list[list[str]], cls: str = '') -> str:
    "A table in Markdown, '' without rows; in a `div` of class `cls`."
    if not rows: return ''
    row = lambda cells: '| ' + ' | '.join(cells) + ' |'
    md = '\n'.join([row(head), '|' + '---|'*len(head), *map(row, rows)])
    return f'<div class="{cls}" markdown>\n\n{md}\n\n</div>' if cls else md


def in_table(md: str) -> str:
    "Text that is safe in a cell of a table."
    return escape_tags(' '.join(md.split())).replace('|', '&#124;')


def whole_code(md: str, most: int = 28) -> str:
    "Marks the code that is not to be broken into lines: what is no longer than `most`, and the options of a command."
    def one(m):
        ticks, code, attrs = m.groups()
        if attrs or ticks != '`': return m[0]
        if len(code) <= most: return f'`{code}`{{ .w }}'
        if ' -' not in code or '__' in code or not re.fullmatch(r'[\w\s./=:,+-]+', code): return m[0]
        option = re.sub(r'(?<=\s)-[\w-]+', r'<span class="w">\g<0></span>', code)
        return f'<code>{option}</code>'
    return prose(md, lambda line: _code.sub(one, line), headings=False)


def code_in_table(code: str) -> str:
    "Code that is safe in a cell of a table."
    if '|' not in code: return f'`{code}`' if code else ''
    return f'<code>{escape(code, quote=False).replace("|", "&#124;")}</code>'
