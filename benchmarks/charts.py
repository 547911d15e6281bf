"""Charts from the tables of the pages: run after a page was written anew.

    python benchmarks/charts.py
"""
import re
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

HERE = Path(__file__).parent
BLUE, GREY = '#0072B2', '#999999'  # Okabe and Ito's blue, and a grey that stands on white and on black
rcParams['svg.hashsalt'] = 'mstoolkit'  # the same file from the same numbers


def rows(page: str, heading: str) -> list[list[str]]:
    "The cells of the first table below a heading of a page, without its head."
    text = (HERE/page).read_text(encoding='utf-8').partition(heading)[2]
    table = re.search(r'(?:^\|.*\n)+', text, re.M)[0].splitlines()
    return [[o.strip() for o in line.strip('|').split('|')] for line in table[2:]]


def save(fig: Figure, name: str, heading: str, alt: str):
    "Write the picture beside its page, and see to it that the page shows it below the heading."
    fig.savefig(HERE/f'{name}.svg', metadata={'Date': None})
    page = HERE/f'{name}.md'
    text = page.read_text(encoding='utf-8')
    if f'({name}.svg)' not in text:
        page.write_text(text.replace(f'{heading}\n', f'{heading}\n\n![{alt}]({name}.svg)\n', 1), encoding='utf-8')


def draw_input():
    "Images a second of every contestant, with its multiple of torchvision's."
    table = rows('input.md', '## Generated JPEGs of 500 × 375')
    names, speed = [r[0] for r in table], [float(r[1].replace(',', '')) for r in table]
    base = next(s for n, s in zip(names, speed) if n.startswith('torchvision'))
    fig = Figure(figsize=(7, 2.6), layout='constrained')
    ax = fig.subplots()
    bars = ax.barh(names, speed, color=[BLUE if n.startswith('ours') else GREY for n in names])
    ax.bar_label(bars, [f'{s:,.0f}  ({s/base:.1f} ×)' for s in speed], padding=4, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel='images per second, one thread (× torchvision)', xlim=(0, max(speed)*1.2))
    ax.spines[['top', 'right']].set_visible(False)
    save(fig, 'input', '## Generated JPEGs of 500 × 375', 'Bars of images per second: ours several times torchvision')


def before_now(cell: str) -> list[tuple]:
    "(value, low, high) of the rule before and of the rule now."
    return [tuple(map(float, m)) for m in re.findall(r'([\d.]+) \(([\d.]+)–([\d.]+)\)', cell)]


def draw_verdicts():
    "How many true differences are found, before and now, with intervals."
    table = [r for r in rows('verdicts.md', '## True verdicts') if r[0] in '46']
    fig = Figure(figsize=(7.5, 3), layout='constrained')
    for ax, col, title in zip(fig.subplots(1, 2, sharey=True), (2, 3), ('2 points, spread .3', '5 points, spread 1')):
        for k, (name, color, shift) in enumerate((('each cell by its own seeds', GREY, -.16), ('seeds pooled, with a veto', BLUE, .16))):
            for i, r in enumerate(table):
                v, lo, hi = before_now(r[col])[k]
                ax.errorbar(i+shift, v, [[v-lo], [hi-v]], fmt='o', color=color, ms=4, capsize=2, label=None if i else name)
        ax.set(title=title, xticks=range(len(table)), xlabel='cells × seeds', ylim=(-3, 103))
        ax.set_xticklabels([f'{r[0]} × {r[1]}' for r in table], fontsize=8)
        ax.grid(axis='y', alpha=.3)
    fig.axes[0].set_ylabel('studies that find it, %')
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=2, frameon=False, fontsize=8)
    save(fig, 'verdicts', '## True verdicts', 'Points with intervals: pooling finds more true differences')


if __name__ == '__main__':
    draw_input()
    draw_verdicts()
