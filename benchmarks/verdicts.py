"""Do verdicts keep their promise? False verdicts and true ones in simulated studies, by the rule before and the rule
now; warnings about calibrated models; and what the sizes are worth that a pilot advises.

    python benchmarks/verdicts.py

Every image has its difficulty (in logits, a normal distribution of standard deviation 2), every cell a taste of its own
for images (.3), every trained network its luck. Mean accuracy is 90 %, on 1,000 images. Spreads are standard deviations,
over seeds, of the accuracy that a network has on infinitely many images. The rule before: each cell by its own seeds and
the baseline's, and McNemar's exact test, both after Holm's correction.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from machine import machine
from mstoolkit.core import write_text
from mstoolkit.evaluate.interpret import calibration_error, calibration_null, calibration_warning
from mstoolkit.evaluate.stats import difference, holm, images_needed, mcnemar, noise, power, seeds_needed, size_range, verdicts
from scipy import optimize, special, stats

images, alpha, taste = 1000, .05, .3
_easy = 2*special.ndtri((np.arange(20_000)+.5)/20_000)
_accuracy = lambda logit: special.expit(logit + _easy).mean()
mean = optimize.brentq(lambda o: _accuracy(o) - .9, 0, 10)
slope = (_accuracy(mean+.01) - _accuracy(mean-.01))/.02


def logits(points):
    "What raises an accuracy of 90 % by so many points."
    return optimize.brentq(lambda o: _accuracy(o) - .9 - points/100, -10, 20) - mean


def study(rng, n_seeds, spreads, effects=None, n_images=images):
    "Cells of a study: seeds × images of each, by spread (in points) and effect (in logits)."
    easy, effects = rng.normal(mean, 2, n_images), [0]*len(spreads) if effects is None else effects
    def answers(sd, e):
        luck = rng.normal(0, sd/100/slope, (n_seeds, 1))
        return rng.random((n_seeds, n_images)) < special.expit(easy + rng.normal(0, taste, n_images) + luck + e)
    return {f'cell {i}': answers(sd, e) for i, (sd, e) in enumerate(zip(spreads, effects))}


def old_rule(cells):
    "Which cells had a verdict before, and (difference, p of both tests) of each."
    base, *rest = cells.values()
    d = np.array([difference(c, base) for c in rest])
    p = np.maximum(holm(d[:, 3]), holm([mcnemar(c, base).p for c in rest]))
    return p <= alpha, d[:, 0]


def rate(k, n):
    "A rate with its exact 95 % interval (Clopper & Pearson 1934), in per cent."
    ci = stats.binomtest(int(k), n).proportion_ci()
    return f'{100*k/n:.1f} ({100*ci.low:.1f}–{100*ci.high:.1f})'


def counted(n, seed, n_seeds, spreads, effects=None, twice=False):
    "(studies with a false verdict before, now; with the better cell found before, now; judged by their own seeds)."
    rng, out = np.random.default_rng(seed), np.zeros(5, int)
    true = np.array(effects or [0]*len(spreads))[1:] > 0
    for _ in range(n):
        cells = study(rng, 1 if twice else n_seeds, spreads, effects)
        if twice: cells = {k: np.repeat(c, n_seeds, 0) for k, c in cells.items()}
        df = verdicts(cells, alpha=alpha, advice=False)
        old, new = old_rule(cells)[0], df.verdict[1:].isin(['better', 'worse']).to_numpy()
        out += [(old & ~true).any(), (new & ~true).any(), (old & true).any(), (new & true).any(),
                bool(df.attrs['warnings'])]
    return out


def row(*cells): return '| ' + ' | '.join(map(str, cells)) + ' |'


def table(columns, rows): return [row(*columns), '|'.join(['', *['---']*len(columns), '']), *rows, '']


def false_verdicts(n, seeds, cells):
    "Studies without any effect, by the spreads of their cells."
    kinds = {'equal': [], 'one cell 3×': [(1, 3)], 'the baseline 3×': [(0, 3)],
             'one cell 10×': [(1, 10)], 'the baseline 10×': [(0, 10)]}
    rows, warned = [], []
    for k in cells:
        for s in seeds:
            got = []
            for i, wide in enumerate(kinds.values()):
                spreads = np.full(k, .3)
                for cell, times in wide: spreads[cell] *= times
                got.append(counted(n, (1, k, s, i), s, spreads))
            rows.append(row(k, s, *(f'{rate(o[0], n)} → {rate(o[1], n)}' for o in got)))
            if k > 3: warned.append(row(k, s, *(rate(o[4], n) for o in got)))
    return ['## False verdicts', '',
            'Per cent of studies without any effect in which some cell is called better or worse, before → now, with '
            f'exact 95 % intervals; 5 are promised. Spread between seeds: .3 points. {n} studies each.', '',
            *table(('cells', 'seeds', *kinds), rows),
            'How often the study notices that its spreads are unequal, and does not pool:', '',
            *table(('cells', 'seeds', *kinds), warned)]


def true_verdicts(n, seeds, cells):
    "Studies in which one cell is better."
    sets, rows = ((2, .3), (5, 1.)), []
    for k in cells:
        for s in seeds:
            got = [counted(n, (2, k, s, i), s, [sd]*k, [0, logits(d), *[0]*(k-2)]) for i, (d, sd) in enumerate(sets)]
            rows.append(row(k, s, *(f'{rate(o[2], n)} → {rate(o[3], n)}' for o in got)))
    return ['## True verdicts', '',
            f'Per cent of studies that find the one better cell, before → now. {n} studies each.', '',
            *table(('cells', 'seeds', *(f'{d} points, spread {sd:g}' for d, sd in sets)), rows)]


def one_run_twice(n):
    got = counted(n, 3, 2, [.3, .3], twice=True), counted(n, 4, 2, [1., 1.], twice=True)
    rows = [row(sd, rate(o[0], n), rate(o[1], n)) for sd, o in zip(('.3', '1'), got)]
    return ['## One network given twice', '',
            f'Two cells of one network each, given as two seeds; no effect. False verdicts, per cent of {n}.', '',
            *table(('spread, points', 'before', 'now'), rows)]


def calibration(n):
    "Models that keep their promises, and models that promise more than they keep."
    rows, rng = [], np.random.default_rng(5)
    for size in (300, 3000):
        for a, b in ((3, 2), (18, 2)):
            for more in (0, .1):
                met = []
                for _ in range(n):
                    c = rng.beta(a, b, size)
                    guess = np.where(rng.random(size) < c - more*c, 'a', 'b')
                    df = pd.DataFrame(dict(label='a', pred_label=guess, confidence=c))
                    met.append((calibration_error(df), calibration_null(df).mean, bool(calibration_warning(df))))
                ece, null, warned = np.array(met).T
                rows.append(row(f'{size:,}', f'{a/(a+b):g}', f'{100*more:.0f} %', f'{ece.mean():.3f}',
                                f'{null.mean():.3f}', rate((ece > .05).sum(), n), rate(warned.sum(), n)))
    return ['## Warnings about calibration', '',
            'Before, an error over .05 was warned about; now it must also be beyond 95 % of what a perfect model has on '
            f'as many images. Per cent of {n} models each: some keep their promises, some are right 10 % less often than '
            'they say.', '', *table(('images', 'confidence', 'right less often by', 'mean ECE', 'of a perfect model',
                                     'warned before', 'warned now'), rows)]


def old_sizes(c, base, d, m):
    "(images, seeds) that were advised before, each None or more than the study had."
    v, s = noise(c, base), len(c)
    n, k = (images_needed(d, v, s, alpha=alpha/m), seeds_needed(d, v, images, alpha=alpha/m)) if d else (None, None)
    return (n if n and n > images else None), (k if k and k > s else None)


def advised(n, seed, n_cells, n_seeds, effect):
    "(speaks before, speaks now) of each pilot's cell 1 without a verdict, and the sizes named."
    rng, m = np.random.default_rng(seed), n_cells-1
    spoke, named = [], dict(old=[], fewest=[], most=[])
    for _ in range(n):
        cells = study(rng, n_seeds, [.3]*n_cells, [0, logits(effect) if effect else 0, *[0]*(n_cells-2)])
        old, d = old_rule(cells)
        base, c = cells['cell 0'], cells['cell 1']
        df = verdicts(cells, alpha=alpha, advice=False)
        r, pool = df.loc['cell 1'], list(cells.values()) if df.test['cell 1'] == 'pooled' else None
        before = (None, None) if old[0] else old_sizes(c, base, d[0], m)
        now = {}
        if r.verdict == 'within noise':
            now = size_range(r.diff_low, r.diff_high, noise(c, base, pool), images, n_seeds, alpha=alpha/m)
        now = {k: o for k, o in now.items() if o[1] > (images if k == 'images' else n_seeds)}
        spoke.append((any(before), bool(now)))
        named['old'].append(before)
        for k, i in (('fewest', 0), ('most', 1)):
            named[k].append(tuple(now[o][i] if o in now else None for o in ('images', 'seeds')))
    return np.array(spoke).sum(0), named


def powers(effect, n_cells, named):
    "True power of the studies advised: rows of a table."
    spreads, effects = [.3]*n_cells, [0, logits(effect), *[0]*(n_cells-2)]
    big = list(study(np.random.default_rng(7), 40, spreads, effects, 20_000).values())
    own, pooled = noise(big[1], big[0]), noise(big[1], big[0], big if n_cells > 3 else None)
    def spread_of(o):
        return f'{len(o)}: ' + ' / '.join(f'{q:.2f}' for q in np.quantile(o, (.05, .5, .95))) if len(o) > 9 else len(o)
    for name, label, v in (('old', 'before', own), ('fewest', 'now, fewest', pooled), ('most', 'now, most', pooled)):
        by = [[power(effect/100, v, max(n, images), 3, alpha/(n_cells-1)) for n, _ in named[name] if n],
              [power(effect/100, v, images, max(s, 3), alpha/(n_cells-1)) for _, s in named[name] if s]]
        yield row(n_cells, effect, label, *map(spread_of, by))


def advice(n):
    "Pilots of 3 seeds: how often sizes are named, and the power that studies of these sizes have."
    rows, of_sizes = [], []
    for n_cells in (2, 6):
        for effect in (0, 1, 2):
            (old, new), named = advised(n, (6, n_cells, effect), n_cells, 3, effect)
            rows.append(row(n_cells, effect, rate(old, n), rate(new, n)))
            if effect: of_sizes += powers(effect, n_cells, named)
    return ['## Advice', '',
            f'Pilots of 3 seeds and {images:,} images, spread .3 points. Per cent of {n} pilots in which one cell without '
            'a verdict is told sizes that would show its difference:', '',
            *table(('cells', 'true difference, points', 'before', 'now'), rows),
            'True power of the studies so advised, as number of pilots: 5, 50 and 95 % quantile (where ten or more); .80 '
            'is what the advice names. A size below the pilot\'s own is taken as the pilot\'s.', '',
            *table(('cells', 'true difference, points', 'advice', 'images', 'seeds'), of_sizes),
            'What a pilot saw is too large where it was seen at all, so the fewest is a bound and no plan: plan for the most.', '']


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--studies', type=int, default=300, help='for each rate')
    p.add_argument('--seeds', type=int, nargs='+', default=[2, 3, 5, 10])
    p.add_argument('--cells', type=int, nargs='+', default=[2, 4, 6])
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.md'))
    o = p.parse_args()
    start, n, about = time.perf_counter(), o.studies, __doc__.split('\n\n')[2].replace('\n', ' ').strip()
    parts = []
    for part in (lambda: false_verdicts(n, o.seeds, o.cells), lambda: true_verdicts(n, o.seeds, o.cells),
                 lambda: one_run_twice(n), lambda: calibration(n), lambda: advice(2*n)):
        parts += part()
        print('\n'.join(parts[-12:]), f'{time.perf_counter()-start:.0f} s', flush=True)
    command = 'python benchmarks/verdicts.py' + (f' --studies {n}' if n != p.get_default('studies') else '')
    took = f'{(time.perf_counter()-start)/60:.0f} minutes'
    head = ['# Verdicts', '', f'    {command}', '', f'{o.date}, {machine()}, {took}.', '', about, '']
    write_text(o.out, '\n'.join([*head, *parts]))


if __name__ == '__main__': main()
