"A budget on a clock that the tests turn: it ends on time, its schedule follows the time, and a stop changes neither."
import pytest
import torch
from fastai.callback.core import Callback
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mstoolkit.callback import budget as module
from mstoolkit.callback.average import EMA
from mstoolkit.callback.budget import Budget
from mstoolkit.callback.checkpoint import Checkpoint
from mstoolkit.callback.mix import BatchMix
from mstoolkit.callback.progress import RunHistory, TrainProgress
from mstoolkit.callback.tracker import EarlyStop, KeepBest
from tiny import quiet, tiny_learner


class Clock:
    now = 0.
    def __call__(self): return self.now


class Work(Callback):
    "A step takes `step` seconds, or what it says of the time; a batch of validation `valid`."
    order = 1000
    def __init__(self, clock, step=1., valid=.3): self.clock, self.step, self.valid, self.at, self.progress = clock, step, valid, [], []
    def after_pred(self):
        if self.training: self.at.append(self.clock.now); self.progress.append(self.learn.pct_train)
        self.clock.now += (self.step(self.clock.now) if callable(self.step) else self.step) if self.training else self.valid


class Killed(Exception): "What stands for a crash."


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, 'perf_counter', clock)
    return clock


def fit(learn, *cbs, how='fit_one_cycle'):
    with quiet(learn): getattr(learn, how)(Budget.most, 1e-2, cbs=list(cbs), **(dict(freeze_epochs=Budget.most) if how == 'fine_tune' else {}))
    return learn


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(seconds=st.integers(20, 400), step=st.sampled_from([.1, .5, 2.]), valid=st.sampled_from([.01, .3, 1.]), ema=st.booleans(),
       how=st.sampled_from(['fit_one_cycle', 'fine_tune']), after=st.sampled_from([0., 3.]))
def test_ends_on_time(clock, seconds, step, valid, ema, how, after):
    clock.now, start = (now := clock.now), clock.now
    budget, work = Budget(seconds/60, seconds_after=after), Work(clock, step, valid)
    learn = fit(tiny_learner(), budget, work, *([EMA()] if ema else []), how=how)
    used = clock.now - start + after
    # a step is not broken off, and a first validation may cost what no one could know
    assert seconds - 2*step - 3*valid <= used <= seconds + 2*step + 3*valid*(1+ema)*2
    assert work.progress[-1] == pytest.approx(1, abs=.02 + 2*step/seconds) and learn.recorder.lrs[-1] < 5e-3
    assert now == start


def test_slower_and_slower(clock):
    slow = Work(clock, step=lambda t: .2 if t < 60 else .8, valid=.1)
    learn = fit(tiny_learner(), Budget(2), slow)
    assert 110 <= clock.now <= 122
    for at, p in zip(slow.at, slow.progress): assert p == pytest.approx(at/120, abs=.06)
    lrs = learn.recorder.lrs
    assert max(lrs) == pytest.approx(1e-2, rel=1e-3) and slow.at[lrs.index(max(lrs))] == pytest.approx(30, abs=4)  # a quarter of the time
    assert sum(t < 60 for t in slow.at) > 3*sum(t >= 60 for t in slow.at)


def test_time_that_went_before_counts(clock):
    fit(tiny_learner(), Budget(1, spent=20), Work(clock))
    assert 37 <= clock.now <= 42


def test_images_are_gone_through_in_turn(clock):
    "Slices end in the midst of a pass, and the next goes on there."
    class Seen(Callback):
        run_valid, sums = False, ()
        def before_batch(self): self.sums = (*self.sums, round(float(self.x.sum()), 4))
    learn, seen = tiny_learner(), Seen()
    learn.dls.train.shuffle = False
    fit(learn, budget := Budget(1), Work(clock, valid=.05), seen)
    assert len(learn.recorder.values) > 3 and budget.passes == -(-len(seen.sums)//3)
    assert all(s == seen.sums[i%3] for i, s in enumerate(seen.sums))


def test_validations_take_a_small_share(clock):
    work = Work(clock, step=.5, valid=1.)
    learn = fit(tiny_learner(), Budget(10), work)
    n = len(learn.recorder.values)
    assert 2 <= n <= 25 and 3*n/600 <= .08
    clock.now = 0
    assert len(fit(tiny_learner(), Budget(10, slices=3), Work(clock, step=.5, valid=.01)).recorder.values) <= 4


def test_fine_tune_shares_its_time(clock):
    learn, work, history = tiny_learner(cbs=[RunHistory()]), Work(clock), Budget(2, frozen=.25)
    fit(learn, history, work, how='fine_tune')
    phases = [o['phase'] for o in learn.run_history.rows]
    assert phases[0] == 'frozen' and set(phases[1:]) == {'unfrozen'}
    assert learn.run_history.rows[0]['train_loss'] is not None
    assert any(b < a for a, b in zip(work.progress, work.progress[1:]))  # progress begins anew with the second fit
    first = next(t for t, (a, b) in zip(work.at[1:], zip(work.progress, work.progress[1:])) if b < a)
    assert first == pytest.approx(30, abs=4)


@pytest.mark.parametrize('valid', [.01, .5])
def test_a_fast_frozen_phase_is_no_measure_of_the_machine(clock, valid):
    learn = tiny_learner(cbs=[RunHistory()])
    work = Work(clock, valid=valid, step=lambda t: .1 if learn.opt.frozen_idx > 0 else .6)
    fit(learn, Budget(3, passes_after=2), work, EMA(), how='fine_tune')
    row, lrs = learn.run_history.rows[-1], learn.recorder.lrs
    assert clock.now >= 180 - 2*6*valid - 6 and clock.now <= 181
    # rates fall as slowly as the time goes by: at half of the second phase they are far from nothing
    assert lrs[len(lrs)//2] > .2*max(lrs) and row['phase'] == 'unfrozen'


def test_mixing_is_off_in_the_last_share(clock):
    mixed, work = [], Work(clock)
    class Note(Callback):
        run_valid = False
        def after_loss(self): mixed.append((self.learn.pct_train, self.learn.batch_mix.mixed))
    fit(tiny_learner(cbs=[BatchMix(1., off_share=.25, seed=0)]), Budget(2), work, Note())
    on = [m for p, m in mixed if p < .75]
    assert not any(m for p, m in mixed if p >= .75) and sum(on) > .8*len(on)


class KillAt(Callback):
    order, run_valid = 2000, False
    def __init__(self, n): self.n = n
    def after_step(self):
        self.n -= 1
        if self.n == 0: raise Killed('here')


def run(folder, clock, *cbs, minutes=2., resume=False):
    learn = tiny_learner(folder, cbs=[RunHistory()])
    fit(learn, budget := Budget(minutes), keep := KeepBest(file=folder/'best.safetensors'), EarlyStop(patience=999), EMA(),
        Checkpoint(folder/'state.pt', resume=resume), Work(clock, valid=.1), *cbs, how='fine_tune')
    return learn, keep, budget


@pytest.mark.parametrize('at', [3, 13, 30, 60, 100])
def test_resumed_it_has_what_is_left(clock, tmp_path, at):
    with pytest.raises(Killed): run(tmp_path, clock, KillAt(at))
    if not (tmp_path/'state.pt').exists(): return  # nothing had ended
    clock.now += 1000  # the time in between does not count
    learn, keep, budget = run(tmp_path, clock, resume=True)
    assert 112 <= budget.used <= 122
    rows = learn.run_history.rows
    assert [o['epoch'] for o in rows] == list(range(1, len(rows)+1)) and keep.best == max(o['accuracy'] for o in rows if o['accuracy'] is not None)


def test_resumed_in_the_second_phase_its_schedule_goes_on_where_it_was(clock, tmp_path):
    class Progress(Callback):
        order, run_valid = 1000, False
        def __init__(self): self.seen = []
        def after_pred(self): self.seen.append(self.learn.pct_train)
    before, after = Progress(), Progress()
    with pytest.raises(Killed): run(tmp_path, clock, before, KillAt(60))
    run(tmp_path, clock, after, resume=True)
    # after the end of an epoch that the kill undid, not before it
    assert .1 < before.seen[-1] < .6 and 0 < after.seen[0] <= before.seen[-1] + .03
    assert after.seen == sorted(after.seen) and after.seen[-1] > .95


def test_a_validation_that_has_used_up_the_time_is_the_last(clock):
    budget, work = Budget(1, seconds_after=0.), Work(clock, step=.5, valid=12.)
    learn = fit(tiny_learner(cbs=[RunHistory()]), budget, work)
    assert len(learn.run_history.rows) == 1, learn.run_history.rows


def test_a_frozen_fit_may_have_it_all(clock):
    for frozen, low, high in ((.1, 0, 12), (0., 55, 62)):
        learn, start = tiny_learner(), clock.now
        learn.freeze()
        fit(learn, Budget(1, frozen=frozen, seconds_after=0.), Work(clock, valid=.01))
        assert low < clock.now - start < high


def test_a_larger_budget_plans_the_rest_anew(clock, tmp_path):
    with pytest.raises(Killed): run(tmp_path, clock, KillAt(100))
    learn, _, budget = run(tmp_path, clock, minutes=4., resume=True)
    assert 230 <= budget.used <= 244 and sum(o['phase'] == 'frozen' for o in learn.run_history.rows) == 1


def test_an_ended_run_has_no_time_left(clock, tmp_path):
    whole, *_ = run(tmp_path, clock)
    learn, _, budget = run(tmp_path, clock, resume=True)
    assert len(learn.run_history.rows) == len(whole.run_history.rows) and budget.used <= 123


def test_a_callback_of_its_own_and_its_progress(clock, capsys):
    "Lines say what is left, and no number of epochs that nobody will see."
    learn = tiny_learner(cbs=[RunHistory()])
    learn.fit(Budget.most, 1e-2, cbs=[Budget(1), TrainProgress(), Work(clock)])
    out = capsys.readouterr().out
    assert str(Budget.most) not in out and 'left' in out
    assert torch.isfinite(learn.model[-1].weight).all()


@pytest.mark.parametrize('kw, text', [(dict(minutes=0), 'above 0, not 0'), (dict(minutes=1, frozen=1.), 'frozen is 1'),
                                      (dict(minutes=1, slices=0), 'slices is 0')])
def test_bad_input(kw, text):
    with pytest.raises(ValueError, match=text): Budget(**kw)
