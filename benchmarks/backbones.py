"""Build every architecture timm lists with the pyramid and the gated head, run it, split it: all on the meta device.

    python benchmarks/backbones.py                  # all; writes benchmarks/backbones.md
    python benchmarks/backbones.py --match 'swin*'  # some; prints
"""
import argparse
import collections
import json
import sys
import time
from pathlib import Path

import timm
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent/'tests'))
from sweep import check_backbone  # noqa: E402
from mstoolkit.core import track, write_text  # noqa: E402


def one(name):
    "The row of architecture `name`: what it is like, or why it cannot."
    start = time.perf_counter()
    try: row = check_backbone(name)
    except Exception as e: row = dict(error=f"{type(e).__name__}: {(str(e) or 'no message').splitlines()[0]}")
    return dict(row, name=name, seconds=round(time.perf_counter() - start, 2))


def sweep(names, log=None):
    "Rows of all `names`; those already in file `log` are taken from there, so that an interrupted sweep goes on."
    done = {}
    if log and log.exists(): done = {r['name']: r for r in map(json.loads, log.read_text().splitlines())}
    for name in track([n for n in names if n not in done], 'backbones'):
        done[name] = one(name)
        if log:
            with log.open('a') as f: f.write(json.dumps(done[name]) + '\n')
    return [done[n] for n in names]


def listing(names, width=118):
    lines = ['']
    for n in names:
        if len(lines[-1]) + len(n) + 4 > width: lines.append('')
        lines[-1] += f'`{n}` '
    return '\n'.join(o.rstrip() for o in lines)


def page(rows, date):
    "The report as Markdown."
    good, bad = [r for r in rows if 'error' not in r], [r for r in rows if 'error' in r]
    strides = collections.Counter(' '.join(map(str, r['strides'])) for r in good)
    groups = collections.Counter(r['groups'] for r in good)
    fixed, whole = [r['name'] for r in good if r['fixed']], [r['name'] for r in good if not r['fixed'] and not r['any_size']]
    causes = collections.defaultdict(list)
    for r in bad: causes[r['error'].replace(repr(r['name']), 'NAME')].append(r['name'])
    exceptions = '\n\n'.join(f'{len(v)} × {k}\n\n{listing(v)}' for k, v in sorted(causes.items(), key=lambda o: -len(o[1]))) or 'None.'
    return f"""# Every timm backbone

{len(good):,} of the {len(rows):,} architectures that timm {timm.__version__} lists build with the `pyramid` and the `gated` head on three maps, give logits of the right
shape at their own image size, and split into stages that hold every parameter exactly once. Checked on the meta device, which computes shapes and no numbers;
{sum(r['device'] == 'cpu' for r in good)} models look at numbers on their way and ran for real.

    python benchmarks/backbones.py

{date}, torch {torch.__version__.partition('+')[0]}, CPU, {sum(r['seconds'] for r in rows)/60:.0f} minutes. `tests/test_backbones.py` repeats it: 60 of them always, all with `make test-slow`.

## Exceptions

{exceptions}

## What they are like

| strides of the three maps | architectures |
|---|---|
""" + '\n'.join(f'| {k} | {v} |' for k, v in strides.most_common()) + """

| parameter groups, head included | architectures |
|---|---|
""" + '\n'.join(f'| {k} | {v} |' for k, v in sorted(groups.items())) + f"""

{sum(r['last'] for r in good)} keep their channels last inside; `TimmStages` gives them channels first.

{len(fixed)} are built for one image size, which `img_size=` sets.

{len(whole)} others take whole multiples of their stride only (`TimmStages` says so when it is given `img_size=`):

{listing(whole)}
"""


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--match', help='architectures to try, as a wildcard; prints instead of writing the page')
    p.add_argument('--log', type=Path, help='JSON lines of finished rows, to go on from')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    args = p.parse_args()
    rows = sweep(timm.list_models(args.match or ''), args.log)
    if args.match: print(page(rows, args.date))
    else: write_text(HERE/'backbones.md', page(rows, args.date))
