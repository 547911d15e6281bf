"Warm restarts against torch's scheduler, step by step."
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mstoolkit.callback.schedule import WarmRestarts, fit_warm_restarts
from mstoolkit.callback.tracker import PlateauLR
from test_tracker import Rates, Written
from tiny import quiet, tiny_learner


def torch_rates(lrs, n_epoch, n_iter, T_0, T_mult, eta_min):
    "torch's rates for every step, stepped per batch."
    opt = torch.optim.SGD([{'params': [torch.zeros(1)], 'lr': lr} for lr in lrs])
    sched = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0*n_iter, T_mult, eta_min)
    for _ in range(n_epoch*n_iter):
        yield [g['lr'] for g in opt.param_groups]
        opt.step(); sched.step()


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(T_0=st.integers(1, 4), T_mult=st.integers(1, 3), n_epoch=st.integers(1, 14), eta_min=st.sampled_from([0., 1e-5, 1e-3]))
def test_equals_torch_on_every_step(T_0, T_mult, n_epoch, eta_min):
    learn, rates = tiny_learner(metrics=[]), Rates()
    with quiet(learn): fit_warm_restarts(learn, T_0, T_mult, n_epoch, lr=slice(1e-3, 1e-2), eta_min=eta_min, cbs=rates)
    got = [step for epoch in rates.epochs for step in epoch]
    want = list(torch_rates([1e-3, 1e-2], n_epoch, 3, T_0, T_mult, eta_min))
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize('T_0, T_mult', [(1, 1), (1, 2), (2, 3), (5, 2)])
def test_the_formula(T_0, T_mult):
    learn, rates = tiny_learner(metrics=[]), Rates()
    with quiet(learn): fit_warm_restarts(learn, T_0, T_mult, 12, lr=.1, cbs=rates)
    start, length = 0, T_0
    for e, epoch in enumerate(rates.epochs):
        if e == start+length: start, length = start+length, length*T_mult
        for i, step in enumerate(epoch): assert step[-1] == pytest.approx(.05*(1+math.cos(math.pi*(e+i/3-start)/length)), abs=1e-12)


def test_start_epoch_learners_rate_and_one_cycle():
    learn, rates = tiny_learner(metrics=[], lr=3e-3), Rates()
    with quiet(learn): fit_warm_restarts(learn, 4, start_epoch=2, cbs=rates)
    want = list(torch_rates([3e-3]*2, 4, 3, 4, 1, 0.))[6:]
    assert [s for e in rates.epochs for s in e] == [pytest.approx(o) for o in want]
    opt = learn.opt
    with quiet(learn): fit_warm_restarts(learn, 1)
    assert learn.opt is opt
    with quiet(learn): fit_warm_restarts(learn, 1, reset_opt=True)
    assert learn.opt is not opt


def test_plateau_multiplies_it():
    learn, rates = tiny_learner(metrics=Written([.5]*4)), Rates()
    with quiet(learn): fit_warm_restarts(learn, 1, 1, 4, lr=.1, cbs=[rates, PlateauLR(patience=0)])
    assert [e[0][1] for e in rates.epochs] == pytest.approx([.1, .1, .025, .00625])


@pytest.mark.parametrize('kw', [dict(T_0=0), dict(T_0=1.5), dict(T_0=2, T_mult=0), dict(T_0=2, T_mult=1.5)])
def test_bad_cycles(kw):
    with pytest.raises(ValueError, match='whole number'): WarmRestarts(**kw)
