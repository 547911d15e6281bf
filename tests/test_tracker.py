"Trackers against torch's scheduler, under every way of fitting, and across fine_tune's two fits."
import math
import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.learner import Metric, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mstoolkit.callback.tracker import EarlyStop, KeepBest, PlateauLR, improves
from safetensors.torch import load_file
from tiny import quiet, tiny_learner
from torch.optim.lr_scheduler import ReduceLROnPlateau


class Written(Metric):
    "A metric with given values, one an epoch."
    def __init__(self, values, name='accuracy'): self.values, self._name = list(values), name
    @property
    def value(self): return self.values.pop(0)
    @property
    def name(self): return self._name


class Rates(Callback):
    "Every group's rate in each step really taken, a list an epoch."
    order = 30
    def before_train(self): self.epochs = getattr(self, 'epochs', []) + [[]]
    def after_step(self): self.epochs[-1].append([h['lr'] for h in self.opt.hypers])


def fit_with(values, how, cbs, path=None, **kw):
    "Fit through `values` (fine_tune: 2 frozen epochs first) and return the learner and the rates used."
    learn, rates = tiny_learner(path, metrics=Written(values), **kw), Rates()
    n = len(values)
    with quiet(learn):
        if how == 'fine_tune': learn.fine_tune(n-2, 1e-2, freeze_epochs=2, cbs=[rates, *cbs])
        else: getattr(learn, how)(n, 1e-2, cbs=[rates, *cbs])
    return learn, rates.epochs


def torch_scales(values, **kw):
    "The multiplier of torch's scheduler during each epoch."
    opt = torch.optim.SGD([torch.zeros(1)], lr=1.)
    sched, scales = ReduceLROnPlateau(opt, eps=0., **kw), []
    for v in values: scales.append(opt.param_groups[0]['lr']); sched.step(v)
    return scales


hows = ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune']
metric_values = st.lists(st.one_of(st.floats(-1, 1), st.sampled_from([0., .5, .5001, .9, math.nan, math.inf, -math.inf])), min_size=3, max_size=14)


@pytest.mark.parametrize('how', hows)
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(values=metric_values, patience=st.integers(0, 3), factor=st.floats(.05, .95), mode=st.sampled_from(['min', 'max']),
       threshold=st.sampled_from([0., 1e-4, .1]), threshold_mode=st.sampled_from(['rel', 'abs']), cooldown=st.integers(0, 2))
def test_plateau_is_torchs_times_the_schedule(how, values, **kw):
    plain = fit_with(values, how, [])[1]
    ours = fit_with(values, how, [PlateauLR(**kw)])[1]
    for scale, a, b in zip(torch_scales(values, **kw), plain, ours, strict=True):
        torch.testing.assert_close(torch.tensor(a, dtype=torch.float64)*scale, torch.tensor(b, dtype=torch.float64), rtol=1e-12, atol=0)


def test_torchs_rate_under_a_constant_fit():
    "Beside torch's scheduler on a real rate, its `eps` included: Report A's settings."
    values = [.1, .2] + [.2]*20
    rates = fit_with(values, 'fit', [PlateauLR()])[1]
    opt = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    sched = ReduceLROnPlateau(opt, mode='max', factor=.25, patience=5)
    for v, epoch in zip(values, rates):
        assert all(lr == pytest.approx(opt.param_groups[0]['lr']) for step in epoch for lr in step)
        sched.step(v)
    assert opt.param_groups[0]['lr'] == pytest.approx(1e-2*.25**3)


def test_plateau_reduces_on_patience_plus_one(capsys):
    _, rates = fit_with([.5]*5, 'fit', [p := PlateauLR(patience=2)])
    assert [e[0][1] for e in rates] == pytest.approx([1e-2]*4 + [1e-2*.25]) and p.scale == .25
    assert 'epoch 4: no better accuracy than 0.5000 for 3 epochs; learning rate times 0.25' in capsys.readouterr().out


def test_plateau_leaves_no_trace_in_the_optimizer_and_shows_in_the_record():
    learn, _ = fit_with([.5]*4, 'fit', [PlateauLR(patience=0)])
    assert learn.opt.hypers[-1]['lr'] == 1e-2  # a later callback finds the fit's own rate
    assert learn.recorder.lrs[-1] == pytest.approx(1e-2*.25**2)


def test_plateau_min_scale_and_other_optimizers():
    def adam(params, lr): return OptimWrapper(params, torch.optim.Adam, lr=lr)
    _, rates = fit_with([.5]*6, 'fit_one_cycle', [PlateauLR(patience=0, min_scale=.1)], opt_func=adam)
    plain = fit_with([.5]*6, 'fit_one_cycle', [], opt_func=adam)[1]
    assert [b[0][0]/a[0][0] for a, b in zip(plain, rates)] == pytest.approx([1, 1, .25, .1, .1, .1])


@pytest.mark.parametrize('factor', [0, 1, 4, -.5])
def test_plateau_factor(factor):
    with pytest.raises(ValueError, match='between 0 and 1'): PlateauLR(factor=factor)


trackers = [PlateauLR, EarlyStop, KeepBest]


@pytest.mark.parametrize('tracker', trackers)
def test_unknown_monitor_is_named_before_training(tracker, tmp_path):
    learn, ran = tiny_learner(tmp_path), []

    class Spy(Callback):
        def before_train(self): ran.append(1)
    with quiet(learn), pytest.raises(ValueError, match=r"unknown monitor 'acc'.*Known: accuracy, train_loss, valid_loss"):
        learn.fit(1, cbs=[tracker('acc'), Spy()])
    assert not ran
    with pytest.raises(ValueError, match="unknown mode 'best'"): tracker(mode='best')


@pytest.mark.parametrize('monitor, mode', [
    ('valid_loss', 'min'), ('train_loss', 'min'), ('error_rate', 'min'), ('accuracy', 'max'), ('f1_score', 'max')])
def test_direction(monitor, mode):
    assert {t(monitor).mode for t in trackers} == {mode} and PlateauLR(monitor, mode='max').mode == 'max'


def test_every_column_can_be_watched(tmp_path):
    for monitor in ('train_loss', 'valid_loss', 'accuracy'):
        learn = tiny_learner(tmp_path)
        with quiet(learn): learn.fit(2, cbs=[t(monitor) for t in trackers])
    learn = tiny_learner(tmp_path)
    learn.remove_cb(learn.recorder); learn.add_cb(Recorder(train_metrics=True))
    with quiet(learn): learn.fit(2, cbs=[k := KeepBest(), *(t('train_accuracy') for t in trackers[:2])])
    assert k.best == pytest.approx(max(v[3] for v in learn.recorder.values))


@pytest.mark.parametrize('tracker', trackers)
def test_no_validation_set_and_no_recorder(tracker, tmp_path):
    learn = tiny_learner(tmp_path)
    learn.dls.loaders[1] = learn.dls.train.new(dataset=[])
    with quiet(learn), pytest.raises(ValueError, match='is the validation set empty'): learn.fit(1, cbs=tracker())
    learn = tiny_learner(tmp_path)
    with quiet(learn), pytest.raises(ValueError, match='Recorder'):
        learn.remove_cb(Recorder); learn.fit(1, cbs=tracker())


def stopped_after(values, **kw):
    stop = EarlyStop(**kw)
    fit_with(values, 'fit', [stop])
    return stop.stopped_epoch


def test_early_stop_counts():
    assert stopped_after([.5, .6] + [.6]*9, patience=3, tie=None) == 5
    assert stopped_after([.5, .4, .6, .5, .5], patience=2) == 5
    assert stopped_after([.1, .2, .3], patience=1) is None
    assert stopped_after([math.nan]*4, patience=3) == 3
    assert stopped_after([math.nan, .5, math.nan, .4], patience=2) == 4
    with pytest.raises(ValueError, match='at least 1'): EarlyStop(patience=0)


class WrittenLosses(Callback):
    "Make the validation loss what the test wants: after the recorder, before the trackers."
    order = 51
    def __init__(self, values): self.values = list(values)
    def after_epoch(self): self.learn.recorder.values[-1][1] = self.values.pop(0)


@pytest.mark.parametrize('accs, losses, tie, stop', [
    ([.9, .9, .9, .9], [1., .9, .8, .7], 1e-4, None),      # equal accuracy, falling loss: improving
    ([.9, .9, .9, .9], [1., .9, .8, .7], None, 3),         # unless ties do not count
    ([.9, .89995, .9, .9], [1., .9, .95, .8], 1e-4, None),  # within 1e-4 of the best
    ([.9, .8995, .8995, .9], [1., .9, .8, .7], 1e-4, 3),   # not within 1e-4
    ([.9, .9, .9, .9], [1., 1., 1.1, 1.], 1e-4, 3),        # equal or higher loss
    ([.9, .89995, .8999, .89985], [1., .9, .8, .7], 1e-4, None)])  # the best does not drift down: .8999 still ties with .9, .89985 no more
def test_report_as_tie_rule(accs, losses, tie, stop):
    fit_with(accs, 'fit', [WrittenLosses(losses), early := EarlyStop(patience=2, tie=tie)])
    assert early.stopped_epoch == stop and early.best == .9


@settings(deadline=None, max_examples=200)
@given(accs=st.lists(st.sampled_from([.5, .50005, .5002, .6, math.nan]), min_size=1, max_size=12), data=st.data())
def test_improves_is_the_rule_written_out(accs, data):
    best = best_loss = None
    for a in accs:
        loss = data.draw(st.sampled_from([.1, .2, .3, math.nan]))
        got = improves(a, best, mode='max', loss=loss, best_loss=math.inf if best is None else best_loss, tie=1e-4)
        want = a == a and (best is None or a > best or (best-a <= 1e-4 and loss < best_loss))
        assert got == want
        if got: best, best_loss = max(a, best or a), loss


def test_early_stop_reason_and_the_other_callbacks_last_epoch(tmp_path, capsys):
    stop, keep, plateau = EarlyStop(patience=2, tie=None), KeepBest(), PlateauLR(patience=1)
    learn, _ = fit_with([.5, .7, .6, .6, .1], 'fit', [stop, keep, plateau], tmp_path)
    assert stop.reason == 'stopped after epoch 4: no improvement for 2 epochs; accuracy was best in epoch 2 (0.7000)'
    assert keep.n_epochs == plateau.n_epochs == 4 and plateau.scale == .25  # they saw the stopping epoch too
    assert stop.reason in capsys.readouterr().out and len(learn.recorder.values) == 4


def test_early_stop_in_the_frozen_phase_ends_that_phase_only():
    learn, rates = fit_with([.9, .5, .95, .5, .6], 'fine_tune', [stop := EarlyStop(patience=1, tie=None)])
    assert stop.n_epochs == 4 and stop.stopped_epoch == 4 and stop.best == .95  # epoch 2 ended the frozen phase, 4 the unfrozen


def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


class Remember(Callback):
    order = 99
    def after_validate(self): self.kept = getattr(self, 'kept', []) + [weights(self.learn)]


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('how', hows)
@pytest.mark.parametrize('best', range(5))
def test_keep_best_in_any_phase(how, best, tmp_path):
    values = [.5]*5
    values[best] = .9
    learn, _ = fit_with(values, how, [keep := KeepBest(tie=None), rem := Remember()], tmp_path)
    assert (keep.best, keep.best_epoch, keep.n_epochs) == (.9, best+1, 5)
    assert same(weights(learn), rem.kept[best]) and same(load_file(keep.file), rem.kept[best])
    assert [o.name for o in (tmp_path/'models').iterdir()] == ['best.safetensors']


def test_keep_best_breaks_ties_by_loss(tmp_path):
    fit_with([.9, .9, .9], 'fit', [WrittenLosses([1., .8, .9]), keep := KeepBest()], tmp_path)
    assert keep.best_epoch == 2
    fit_with([.9, .8999, .9], 'fit', [WrittenLosses([1., .8, 1.]), keep := KeepBest()], tmp_path)
    assert keep.best_epoch == 1  # close is not equal: the kept weights never get worse


def test_keep_best_when_stopped_cancelled_or_interrupted(tmp_path):
    learn, _ = fit_with([.5, .9, .6, .6], 'fit', [EarlyStop(patience=2), KeepBest(), rem := Remember()], tmp_path)
    assert same(weights(learn), rem.kept[1])

    class Ends(Callback):
        order = 98
        def __init__(self, exc): self.exc = exc
        def before_batch(self):
            if self.training and self.epoch == 2: raise self.exc
    learn, _ = fit_with([.9, .5, .6], 'fit', [KeepBest(), Ends(CancelFitException()), rem := Remember()], tmp_path)
    assert same(weights(learn), rem.kept[0])
    learn, keep, rem = tiny_learner(tmp_path, metrics=Written([.9, .5, .5])), KeepBest(), Remember()
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=[keep, Ends(KeyboardInterrupt()), rem])
    keep.restore(learn)
    assert same(weights(learn), rem.kept[0])


def test_keep_best_file(tmp_path, monkeypatch):
    file = tmp_path/'sub'/'w.safetensors'
    learn, _ = fit_with([.9, .5], 'fit', [keep := KeepBest(file=file)], tmp_path)
    old = file.read_bytes()

    def dies(model, name, metadata):
        with open(name, 'wb') as f: f.write(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr('mstoolkit.callback.tracker.save_weights', dies)
    with quiet(learn), pytest.raises(KeyboardInterrupt):
        learn.metrics = Written([.95]); learn.fit(1, cbs=keep)
    assert file.read_bytes() == old and [o.name for o in file.parent.iterdir()] == ['w.safetensors']
    monkeypatch.undo()
    fit_with([.9, .5], 'fit', [KeepBest(file=file)], tmp_path)
    with pytest.raises(ValueError, match='overwritten by another training'): keep.restore(learn)
    with pytest.raises(ValueError, match='no best weights'): KeepBest().restore(learn)
    (tmp_path/'taken').write_text('')
    with pytest.raises(FileExistsError): fit_with([.5], 'fit', [KeepBest(file=tmp_path/'taken'/'w.safetensors')])


def test_keep_best_without_any_number(tmp_path):
    learn, _ = fit_with([math.nan]*2, 'fit', [keep := KeepBest(), rem := Remember()], tmp_path)
    assert keep.best is None and same(weights(learn), rem.kept[-1]) and not keep.file.exists()


def test_shared_and_channels_last_weights(tmp_path):
    learn, keep = tiny_learner(tmp_path, metrics=Written([.9, .5])), KeepBest()
    conv = torch.nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    tied = torch.nn.Linear(8, 8)
    learn.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 8), tied, tied, torch.nn.Linear(8, 3))
    learn.model.conv = torch.nn.Sequential(conv)
    learn.model.forward = lambda x: torch.nn.Sequential(*list(learn.model)[:5])(x)
    learn.opt = None
    with quiet(learn): learn.fit(2, cbs=[keep, rem := Remember()])
    assert same(weights(learn), rem.kept[0]) and learn.model[2] is learn.model[3]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('tracker', trackers)
def test_lr_find_validate_and_predictions_leave_trackers_alone(tracker, tmp_path):
    t = tracker()
    learn = tiny_learner(tmp_path, cbs=t)
    with quiet(learn):
        learn.lr_find(num_it=8, show_plot=False)
        assert t.n_epochs == 0
        learn.fit(2)
        assert t.n_epochs == 2
        before = weights(learn)
        learn.validate(); learn.get_preds(); learn.get_preds(ds_idx=0); learn.lr_find(num_it=8, show_plot=False)
        assert t.n_epochs == 2 and same(before, weights(learn))
        learn.fit(1)
    assert t.n_epochs == 3 and not list((tmp_path/'models').glob('*.tmp'))


def test_skipped_epochs_are_not_counted():
    stop, learn = EarlyStop(patience=1, tie=None), tiny_learner(metrics=Written([.5, .5]))
    with quiet(learn): learn.fit(5, start_epoch=3, cbs=[stop])
    assert stop.n_epochs == 2 and stop.stopped_epoch == 2


@pytest.mark.parametrize('tracker', trackers)
@pytest.mark.parametrize('cut', [1, 3, 5])
def test_state(tracker, cut, tmp_path):
    "Stopped after `cut` epochs and taken up by a new instance, a tracker ends as one that never stopped."
    values = [.5, .6, .6, .55, .7, .7, .7, .7]
    kw = {KeepBest: dict(file=tmp_path/'w.safetensors', tie=None), EarlyStop: dict(patience=3, tie=None), PlateauLR: dict(patience=2)}[tracker]
    whole, first, second = (tracker(**kw) for _ in range(3))
    fit_with(values, 'fit', [whole], tmp_path)
    fit_with(values[:cut], 'fit', [first], tmp_path)
    state = torch.load(_saved(first.state_dict(), tmp_path), weights_only=True)
    second.load_state_dict(state)
    fit_with(values[cut:], 'fit', [second], tmp_path)
    a, b = (dict(o.state_dict()) for o in (whole, second))
    for k in ('mark', 'best_loss'): a.pop(k, 0), b.pop(k, 0)  # of this instance; of these weights
    assert a == b


def _saved(state, tmp_path):
    torch.save(state, tmp_path/'state.pt')
    return tmp_path/'state.pt'


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype, tmp_path):
    with warnings.catch_warnings():
        learn = tiny_learner(tmp_path, metrics=Written([.9, .5]), loss_func=CrossEntropyLossFlat())
    learn.model.to(dtype)

    class Half(Callback):
        order = 20
        def before_batch(self): self.learn.xb = tuple(x.to(dtype) for x in self.xb)
        def after_pred(self): self.learn.pred = self.pred.float()
    with quiet(learn): learn.fit(2, 1e-3, cbs=[KeepBest(), PlateauLR(patience=0), Half(), rem := Remember()])
    assert same(weights(learn), rem.kept[0]) and next(learn.model.parameters()).dtype == dtype


def test_progress_callback_is_no_hindrance(tmp_path, capsys):
    learn = tiny_learner(tmp_path)
    assert learn._grab_cbs(ProgressCallback)
    learn.fine_tune(1, cbs=[t() for t in trackers])
    assert 'epoch' in capsys.readouterr().out
