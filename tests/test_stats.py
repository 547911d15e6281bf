"The statistics against independent references and known answers."
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mstoolkit.evaluate.stats import (accuracy_interval, detectable, difference, holm, images_needed, mcnemar, noise, power,
                             seeds_needed, size_range, uneven_spread, verdicts)


def simulate(rng, n_images, n_seeds, effects, seed_sd, image_sd=0.):
    "Networks whose answers depend on the image's difficulty, the seed's luck, what suits the method, and chance."
    easy = rng.normal(2.5, 2, n_images)
    def logits(e, sd): return easy + e + rng.normal(0, image_sd, n_images) + rng.normal(0, sd, (n_seeds, 1))
    return [rng.random((n_seeds, n_images)) < 1/(1+np.exp(-logits(e, sd)))
            for e, sd in zip(effects, np.broadcast_to(seed_sd, len(effects)))]


# McNemar and Holm

@given(st.integers(0, 25), st.integers(0, 25), st.integers(0, 20), st.integers(0, 20))
def test_mcnemar_is_the_exact_binomial_tail(won, lost, both, none):
    if won+lost+both+none < 2: return
    new = [1]*won + [0]*lost + [1]*both + [0]*none
    base = [0]*won + [1]*lost + [1]*both + [0]*none
    m, n = mcnemar(new, base), won+lost
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(won, lost)+1))  # by hand, in whole numbers
    assert (m.won, m.lost) == (won, lost)
    assert m.p == pytest.approx(float(min(2*tail, 1)), rel=1e-9)


def test_mcnemar_and_holm_equal_statsmodels():
    ct = pytest.importorskip('statsmodels.stats.contingency_tables')
    multi = pytest.importorskip('statsmodels.stats.multitest')
    rng = np.random.default_rng(0)
    ps = []
    for _ in range(50):
        a, b = rng.random((2, 200)) < rng.uniform(.6, .95, (2, 1))
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        ps.append(mcnemar(a, b).p)
        assert ps[-1] == pytest.approx(ct.mcnemar(table, exact=True).pvalue, abs=1e-12)
    assert holm(ps) == pytest.approx(multi.multipletests(ps, method='holm')[1])


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=9))
def test_several_seeds_toss_weighted_coins(d):
    "Against the enumeration of all tosses."
    new = [[k < o for o in d] for k in range(3)]
    base = [[k < -o for o in d] for k in range(3)]
    sums = [sum(w if s else -w for w, s in zip(map(abs, d), signs)) for signs in itertools.product((0, 1), repeat=len(d))]
    p = np.mean([abs(o) >= abs(sum(d)) for o in sums])
    assert mcnemar(new, base).p == pytest.approx(p)


def test_several_seeds_win_and_lose_images():
    new = [[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]
    base = [[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    m = mcnemar(new, base)
    assert (m.won, m.lost) == (1, 2)                      # the second image is a tie
    assert mcnemar(new, base[:2]).lost == 2           # 1/3 against 2/2 on the last, and 1/3 against 1/2 on the second


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p):
    adj = holm(p)
    assert (adj >= np.array(p)).all() and (adj <= 1).all()
    assert (np.diff(adj[np.argsort(p, kind='stable')]) >= 0).all()


# Variance components and intervals

def test_components_are_recovered():
    rng = np.random.default_rng(1)
    c = simulate(rng, 4000, 60, [0], .3)[0]
    truth = np.std([simulate(rng, 4000, 1, [0], .3)[0].mean() for _ in range(400)])
    v = noise(c)
    assert v.variance(4000, 1)**.5 == pytest.approx(truth, rel=.2)   # of one network on 4,000 images


@pytest.mark.parametrize('n_seeds,seed_sd', [(1, 0.), (3, .15), (5, .15)])
def test_the_interval_of_an_accuracy_covers_the_truth(n_seeds, seed_sd):
    rng = np.random.default_rng(2)
    truth = simulate(rng, 400_000, 20, [0], seed_sd)[0][:, :].mean()
    got = [accuracy_interval(simulate(rng, 500, n_seeds, [0], seed_sd)[0]) for _ in range(400)]
    covered = np.mean([lo <= truth <= hi for lo, hi in got])
    assert .93 <= covered <= .99


def test_one_seed_gives_wilsons_interval():
    for n, k in ((300, 270), (1000, 20), (50, 50)):
        w = stats.binomtest(k, n).proportion_ci(method='wilson')
        assert accuracy_interval(np.arange(n) < k) == pytest.approx((w.low, w.high), abs=4e-3)
    lo, hi = accuracy_interval(np.arange(300) < 270)
    assert (hi-lo)/2 == pytest.approx(.034, abs=5e-4)


@given(st.integers(2, 60), st.data())
def test_the_interval_holds_the_accuracy_itself(n, data):
    k = data.draw(st.integers(0, n))
    lo, hi = accuracy_interval(np.arange(n) < k)
    assert 0 <= lo <= k/n <= hi <= 1


def test_the_interval_of_a_difference_covers_the_truth():
    rng = np.random.default_rng(3)
    big = simulate(rng, 200_000, 20, [0, .4], .1, .5)
    truth = big[1].mean() - big[0].mean()
    got = [difference(b, a)[1:3] for a, b in (simulate(rng, 600, 3, [0, .4], .1, .5) for _ in range(400))]
    assert np.mean([lo <= truth <= hi for lo, hi in got]) >= .94


# False verdicts and power

@pytest.mark.parametrize('n_images,n_seeds,seed_sd,image_sd',
                         [(300, 3, 0., 0.), (1000, 3, .15, 0.), (500, 2, .1, .7), (1000, 5, .05, .7)])
def test_false_verdicts_in_1000_studies_without_effect(n_images, n_seeds, seed_sd, image_sd):
    rng = np.random.default_rng(4)
    false = 0
    for _ in range(1000):
        a, b = simulate(rng, n_images, n_seeds, [0, 0], seed_sd, image_sd)
        false += max(difference(b, a)[3], mcnemar(b, a).p) <= .05  # the rule of `verdicts` for two cells
    assert false <= 50, false


def test_false_verdicts_of_whole_studies():
    "Any false verdict among three comparisons counts."
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(80):
        df = verdicts(dict(zip('abcd', simulate(rng, 400, 3, [0]*4, .1, .3))))
        false += df.verdict.isin(['better', 'worse']).any()
    assert false <= 8, false   # 5 % of 80 is 4; 8 is its upper 97 % limit


@pytest.mark.parametrize('n_seeds,chance', [(3, .8), (5, .9)])
def test_a_planted_difference_of_three_points_is_found_as_often_as_promised(n_seeds, chance):
    rng = np.random.default_rng(6)
    big = simulate(rng, 60_000, 40, [0, .345], .07, .3)
    v, delta = noise(big[1], big[0]), big[1].mean() - big[0].mean()
    assert delta == pytest.approx(.03, abs=.004)
    n = images_needed(delta, v, n_seeds, chance=chance)
    stated = power(delta, v, n, n_seeds)
    found = 0
    for _ in range(250):
        df = verdicts(dict(zip('ab', simulate(rng, n, n_seeds, [0, .345], .07, .3))))
        found += df.verdict['b'] == 'better'
    ci = stats.binomtest(found, 250).proportion_ci()
    assert ci.low <= stated <= ci.high or found/250 >= stated, (n, stated, found/250)


def test_the_sizes_of_studies_agree_with_power():
    a, b = simulate(np.random.default_rng(7), 3000, 40, [0, .3], .08)
    v = noise(b, a)
    n, s = images_needed(.03, v, 5), seeds_needed(.03, v, 1000)
    assert power(.03, v, n, 5) >= .8 > power(.03, v, n-1, 5)
    assert power(.03, v, 1000, s) >= .8 > power(.03, v, 1000, s-1)
    d = detectable(v, 1000, 5)
    assert power(d, v, 1000, 5) >= .8 > power(d-1e-4, v, 1000, 5)
    assert images_needed(.001, v, 2) is None


# Verdicts

def test_verdict_table_on_a_worked_example():
    rng = np.random.default_rng(8)
    a, same, better, worse = simulate(rng, 1500, 4, [0, 0, 1., -1.], .05)
    df = verdicts(dict(base=a, same=same, up=better, down=worse))
    assert df.verdict.to_dict() == dict(base='baseline', same='within noise', up='better', down='worse')
    assert df.diff_images['up'] == pytest.approx(1500*(better.mean()-a.mean()))
    assert 'would be needed' in df.note['same'] or 'would have been seen' in df.note['same']
    swapped = verdicts(dict(base=a, same=same, up=better, down=worse), baseline='up')
    assert list(swapped.index)[0] == 'up' and swapped['diff']['base'] == pytest.approx(-df['diff']['up'])


def test_few_images_do_not_decide():
    "Five wins and no loss: the interval would call it, McNemar's exact test knows better."
    base = np.tile(np.arange(300) < 270, (3, 1))
    base[np.arange(3), np.arange(3)] = False  # three networks, not one given thrice
    new = base.copy(); new[:, 270:275] = True
    df = verdicts(dict(base=base, new=new))
    assert df.p['new'] <= .05 < df.mcnemar_p['new'] and df.verdict['new'] == 'within noise'
    assert 'more images' in df.note['new']


def test_equal_cells_and_single_seeds():
    c = np.array([np.roll(np.arange(100) < 90, k) for k in range(3)])
    df = verdicts(dict(a=c, b=c))
    assert df.verdict['b'] == 'within noise' and df['diff']['b'] == 0
    assert verdicts(dict(a=c[0], b=c)).verdict['b'] == 'undecided'
    assert verdicts(dict(a=c)).verdict.tolist() == ['baseline']


@pytest.mark.parametrize('bad,what', [(np.ones((2, 2, 2)), 'not seeds × images'), (np.ones((2, 0)), 'not seeds'),
                                      ([[.5, 1]], 'other values')])
def test_bad_arrays_are_named(bad, what):
    with pytest.raises(ValueError, match=what): accuracy_interval(bad)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 2**32-1))
def test_intervals_stay_inside_and_hold_the_mean(s, n, seed):
    c = np.random.default_rng(seed).random((s, n)) < .8
    lo, hi = accuracy_interval(c)
    assert 0 <= lo <= c.mean() <= hi <= 1


# The seeds' variance pooled over a study

def pooled_by_hand(c, b, cells):
    "(low, high, p) from sums written out, for cells of any number of seeds."
    n = len(c[0])
    def squares(x):
        seed, image, mean = x.mean(1), x.mean(0), x.mean()
        between = sum((o-mean)**2 for o in seed)/(len(x)-1)
        rest = sum((x[s, i]-seed[s]-image[i]+mean)**2 for s in range(len(x)) for i in range(n))/((len(x)-1)*(n-1))
        return len(x)-1, between, rest
    table = [squares(x) for x in cells if len(x) > 1]
    df = sum(f for f, _, _ in table)
    shared = max(sum(f*(m - r/n) for f, m, r in table)/df, 0)
    d = c.mean(0) - b.mean(0)
    rest = sum(squares(x)[2]/len(x) for x in (c, b))
    image, w = max(sum((o-d.mean())**2 for o in d)/(n-1) - rest, 0)/n + rest/n, 1/len(c) + 1/len(b)
    var = image + w*shared
    if not var: return None
    freedom = var**2/(image**2/(n-1) + w**2*sum(f*(shared + r/n)**2 for f, _, r in table)/df**2)
    half = stats.t(freedom).ppf(.975)*var**.5
    return max(d.mean()-half, -1), min(d.mean()+half, 1), 2*stats.t(freedom).sf(abs(d.mean())/var**.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(3, 30), st.integers(0, 2**32-1))
def test_the_pooled_test_agrees_with_sums_written_out(others, n, seed):
    rng = np.random.default_rng(seed)
    cells = [(rng.random((s, n)) < rng.uniform(.3, .95)).astype(float) for s in (2, 3, *others)]
    want, got = pooled_by_hand(cells[0], cells[1], cells), difference(cells[0], cells[1], cells=cells)
    if want: assert got[1:] == pytest.approx(want, abs=1e-9)
    assert got[0] == pytest.approx(cells[0].mean() - cells[1].mean())


def test_pooling_two_cells_of_one_spread_is_the_classical_t_test():
    "With every image answered alike but for the seeds' luck, what is left is Student's test of the seeds' accuracies."
    rng = np.random.default_rng(0)
    a, b = ((rng.random((6, 20_000)) < rng.normal(.8, .03, (6, 1))).astype(float) for _ in range(2))
    t = stats.ttest_ind(a.mean(1), b.mean(1))
    assert difference(a, b, cells=[a, b])[3] == pytest.approx(t.pvalue, rel=.02)


def test_from_four_cells_on_the_table_pools_and_says_so():
    rng = np.random.default_rng(0)
    cells = dict(zip('abcdef', simulate(rng, 1000, 3, [0, .5, 0, 0, 0, 0], .05)))
    df = verdicts(cells)
    assert set(df.test[1:]) == {'pooled'} and 'pooled over 6 cells (12 degrees of freedom)' in df.attrs['how']
    own, pooled = (np.array([difference(cells[k], cells['a'], cells=o)[3] for k in 'bcdef'])
                   for o in (None, list(cells.values())))
    assert df.own_p[1:].tolist() == pytest.approx(own) and df.p[1:].tolist() == pytest.approx(holm(pooled))
    low, high = difference(cells['b'], cells['a'], cells=list(cells.values()))[1:3]
    assert (df.diff_low['b'], df.diff_high['b']) == pytest.approx((low, high))
    three = verdicts({k: cells[k] for k in 'abc'})
    assert set(three.test[1:]) == {'own'} and '4 cells' in three.attrs['how']
    assert three.p.tolist()[1:] == pytest.approx(holm(own[:2]))
    lonely = verdicts({k: v[:1] if k in 'def' else v for k, v in cells.items()})  # three cells of several seeds
    assert lonely.test.tolist() == ['', 'own', 'own', '', '', ''] and set(lonely.covers[3:]) == {'images'}


def test_a_cell_whose_own_seeds_lie_far_apart_is_vetoed():
    rng = np.random.default_rng(0)
    for _ in range(200):
        df = verdicts(dict(zip('abcdef', simulate(rng, 1000, 3, [0, .6, 0, 0, 0, 0], [.05, .3, .05, .05, .05, .05]))))
        r = df.loc['b']
        if r.test == 'pooled' and max(r.p, r.mcnemar_p) <= .05 < 2*r.own_p: break
    assert r.verdict == 'within noise' and 'its own seeds do not bear it out' in r.note


@pytest.mark.parametrize('sd', [.02, .15])
def test_false_verdicts_of_six_cells_in_300_studies(sd):
    rng, false = np.random.default_rng(9), 0
    for _ in range(300):
        df = verdicts(dict(zip('abcdef', simulate(rng, 300, 3, [0]*6, sd, .3))), advice=False)
        false += df.verdict.isin(['better', 'worse']).any()
    assert false <= 15, false  # 5 %


def test_pooling_finds_more():
    rng, found = np.random.default_rng(10), np.zeros(2, int)
    for _ in range(60):
        cells = dict(zip('abcdef', simulate(rng, 1000, 3, [0, .4, 0, 0, 0, 0], .05)))
        df = verdicts(cells, advice=False)
        found += df.verdict['b'] == 'better', max(holm(df.own_p[1:])[0], df.mcnemar_p['b']) <= .05
    assert found[0] > 1.3*found[1], found


def test_unequal_spreads_are_not_pooled():
    rng, warned = np.random.default_rng(11), dict(equal=0, wide=0)
    for _ in range(40):
        for name, last in (('equal', .05), ('wide', 1.)):
            df = verdicts(dict(zip('abcde', simulate(rng, 1000, 6, [0]*5, [.05]*4 + [last]))), advice=False)
            warned[name] += bool(df.attrs['warnings'])
            assert set(df.test[1:]) == ({'own'} if df.attrs['warnings'] else {'pooled'})
    assert warned['equal'] <= 4 and warned['wide'] >= 36, warned
    assert 'unequally' in df.attrs['warnings'][0]


def test_equal_spreads_seldom_look_unequal():
    rng = np.random.default_rng(12)
    p = [uneven_spread(simulate(rng, 400, 4, [0]*5, .3))[1] for _ in range(200)]
    assert np.mean(np.array(p) <= .05) <= .1 and .35 < np.mean(p) < .65
    assert uneven_spread([np.ones((1, 9))]) == uneven_spread([np.ones((3, 1))]*2) == (1, 1)


@pytest.mark.parametrize('n_images,n_seeds,seed_sd', [(800, 3, .05), (500, 2, .1), (1500, 5, .1)])
def test_the_power_of_a_pooled_study_is_what_is_found(n_images, n_seeds, seed_sd):
    rng = np.random.default_rng(13)
    big = simulate(rng, 40_000, 30, [0, .5, 0, 0, 0], seed_sd)
    v, delta, found = noise(big[1], big[0], big), big[1].mean() - big[0].mean(), 0
    for _ in range(200):
        cells = simulate(rng, n_images, n_seeds, [0, .5, 0, 0, 0], seed_sd)
        d, _, _, p = difference(cells[1], cells[0], cells=cells)
        found += p <= .05/4 and difference(cells[1], cells[0])[3] <= .025 and d > 0
    ci = stats.binomtest(found, 200).proportion_ci(.999)
    stated = power(delta, v, n_images, n_seeds, .05/4)
    assert ci.low-.02 <= stated <= ci.high+.02, (found, stated)


# What a table must not do

@pytest.mark.parametrize('wrong,counts', [(0, 3), (9, 3), (10, 1), (290, 1), (291, 3), (300, 3)])
def test_one_network_given_thrice_counts_once_unless_it_may_be_chance(wrong, counts):
    c, other = np.tile(np.arange(300) >= wrong, (3, 1)), np.array([np.roll(np.arange(300) < 200, k) for k in range(3)])
    df = verdicts(dict(a=other, b=c))
    assert df.seeds.to_dict() == dict(a=3, b=counts)
    assert ('very same answers' in df.note['b']) == (counts == 1) == (df.verdict['b'] == 'undecided')


def test_one_run_given_twice_makes_no_verdict():
    rng, false = np.random.default_rng(14), 0
    for _ in range(50):
        cells = dict(zip('ab', simulate(rng, 1000, 1, [0, 0], .2)))
        df = verdicts({k: np.vstack([c, c]) for k, c in cells.items()})
        false += df.verdict.isin(['better', 'worse']).any()
    assert not false and 'count as 1' in df.note['a']


def test_one_validation_image():
    for c, b in (([[1]], [[0]]), ([[1], [1]], [[0], [0]]), ([[1], [0]], [[0], [1]])):
        assert accuracy_interval(c) == (0, 1)
        df = verdicts(dict(b=b, c=c))
        assert df.verdict['c'] == ('undecided' if len(c) == 1 else 'within noise')
    assert (df.diff_low['c'], df.diff_high['c'], df.p['c']) == (-1, 1, 1) and 'one image' in df.note['c']
    assert verdicts(dict(zip('abcde', [c]*5))).verdict['e'] == 'within noise'
    with pytest.raises(ValueError, match='2 or more'): noise(c)
    with pytest.raises(ValueError, match='2 of each'): power(.1, noise([[1, 0]]), 1, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3), st.integers(1, 12), st.integers(2, 6), st.integers(0, 2**32-1))
def test_intervals_of_differences_stay_within_100_points(s, n, k, seed):
    rng = np.random.default_rng(seed)
    df = verdicts({str(i): rng.random((s, n)) < rng.random((s, 1)) for i in range(k)}, advice=False)
    low, mid, high = df[['diff_low', 'diff', 'diff_high']].dropna().to_numpy().T
    assert ((-1 <= low) & (low <= mid) & (mid <= high) & (high <= 1)).all() and not df.p.gt(1).any()
    assert not (df.verdict.isin(['better', 'worse']) & (df.diff_low*df.diff_high <= 0)).any()


def test_a_study_without_cells_is_refused():
    with pytest.raises(ValueError, match='no cell to judge'): verdicts({})


# What is said of sizes

def test_sizes_come_from_the_ends_of_the_interval():
    v = noise(*simulate(np.random.default_rng(15), 5000, 20, [0, .2], .05))
    got = size_range(.01, .03, v, 1000, 5)
    assert got == size_range(-.03, -.01, v, 1000, 5)
    assert got['seeds'] == (seeds_needed(.03, v, 1000), seeds_needed(.01, v, 1000)) and np.diff(got['seeds']) > 0
    assert got['images'] == (images_needed(.03, v, 5), images_needed(.01, v, 5))
    assert size_range(-.01, .03, v, 1000, 5) == size_range(0, .03, v, 1000, 5) == {}
    assert 'images' not in size_range(.0001, .03, v, 1000, 5)  # a million images would not show a hundredth of a point


def test_where_nothing_is_there_sizes_are_seldom_spoken_of():
    rng, spoken = np.random.default_rng(16), 0
    for _ in range(80):
        df = verdicts(dict(zip('abcd', simulate(rng, 400, 3, [0]*4, .05))))
        spoken += df.note.str.contains('as a pilot').any()
        for note, verdict in zip(df.note, df.verdict): assert verdict != 'within noise' or note
    assert spoken <= 8, spoken


def test_a_pilot_is_called_one_and_gives_a_range():
    rng = np.random.default_rng(17)
    for _ in range(200):
        r = verdicts(dict(zip('abcdef', simulate(rng, 1000, 3, [0, .3, 0, 0, 0, 0], .05)))).loc['b']
        if 'as a pilot' in r.note: break
    assert r.diff_low > 0 and f'{100*r.diff_low:.1f} to {100*r.diff_high:.1f} points' in r.note
    assert 'more seeds a cell' in r.note
