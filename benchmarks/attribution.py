"""Which scale answers when the class depends on the small letters alone, and which when it depends on the large ones alone.

    python benchmarks/attribution.py

Trains a small network from scratch on the same hierarchical letters twice: labelled with the small letter (`label='local'`) and with the large one
(`label='global'`). Small letters take more practice, so that they get more epochs. The shares of the scales are those of the lead of the right class
over the mean of all others (`scale_shares`), averaged over the validation images; an attribution that means something gives the shallow scale more
of it where the small letters decide. Five minutes on two CPU cores.
"""
import argparse
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from machine import machine
from mstoolkit.evaluate.attribution import scale_shares
from mstoolkit.core import write_text
from mstoolkit.data.make import make_navon
from mstoolkit.recipe import recipes
from mstoolkit.train import train

epochs = dict(local=8, **{'global': 4})


def measure(label, head, seed, folder):
    "Train one network; return its accuracy and its mean shares and gates."
    data = folder/label
    if not data.exists(): make_navon(data, n_train=6000, n_valid=1000, n_test=10, label=label)
    t = time.perf_counter()
    recipe = replace(recipes['demo'], head=head, epochs=epochs[label], seed=seed, memory_format='channels-last')
    with redirect_stdout(StringIO()): learn = train(recipe, data, folder/f'{label}-{head}-{seed}')
    df = scale_shares(learn, learn.dls.valid)
    mean = {k: np.average(df[k], weights=df.n) for k in df if k != 'n'}
    row = dict(label=label, head=head, seed=seed, accuracy=learn.validate()[1], **mean, seconds=time.perf_counter()-t)
    print(' '.join(f'{k} {v:.3f}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()), flush=True)
    return row


def report(df):
    "The measurements as Markdown."
    number = [c for c in df if c.startswith(('share', 'gate'))]
    rows = [[r.label, r['head'], r.seed, f'{r.accuracy:.3f}', *(f'{r[c]:.3f}' if r[c] == r[c] else '' for c in number)] for _, r in df.iterrows()]
    table = [['class is', 'head', 'seed', 'accuracy', *(c.replace('_', ', stride ') for c in number)], ['---']*(4+len(number)), *rows]
    def said(cols):
        by = df[cols].sum(axis=1).groupby([df['head'], df.label]).mean().unstack()
        return '\n'.join(f'* {h}: {r.local:.1%} where the small letter is the class, {r["global"]:.1%} where the large one is' for h, r in by.iterrows())
    lines = '\n'.join('| ' + ' | '.join(map(str, r)) + ' |' for r in table)
    return f"""# Which scale answers

    python benchmarks/attribution.py

{time.strftime('%Y-%m-%d')}, {machine()}, torch {torch.__version__.split('+')[0]}.
`test_resnet` from scratch on 6,000 navon figures of 64 px, {epochs['local']} epochs where the class is the small letter (`local`), {epochs['global']} where it is
the large one (`global`); shares over 1,000 validation images, of the lead of the right class over the mean of all others.

Share of the shallowest scale, stride {number[0].partition('_')[2]}:

{said(number[:1])}

Share of all scales but the deepest:

{said([c for c in number if c.startswith('share')][:-1])}

A small letter is about 7 pixels wide. The gated head closes the gates of scales that it does not need, so that its shares say it all; the pyramid
head has no gates, and what it moves to finer maps it moves to stride 16, whose positions see a whole letter.

{lines}
"""


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=1, help="runs of each network")
    p.add_argument('--out', type=Path, default=Path(__file__).parent, help="folder for attribution.md")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        runs = [measure(label, head, seed, Path(d)) for seed in range(o.seeds) for label in epochs for head in ('pyramid', 'gated')]
    write_text(o.out/'attribution.md', report(pd.DataFrame(runs)))
