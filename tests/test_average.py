"Averages of weights: by hand, beside the raw weights, through kills."
import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.learner import Metric
from mstoolkit.callback.average import EMA, new_weight
from mstoolkit.callback.budget import Budget
from mstoolkit.callback.checkpoint import Checkpoint
from mstoolkit.callback.progress import RunHistory
from mstoolkit.callback.schedule import GrowingSize, LayerDecay, WholeEpochs
from mstoolkit.callback.tracker import KeepBest
from mstoolkit.data.core import image_dls, input_size, valid_size
from mstoolkit.learner import fusion_learner
from safetensors.torch import load_file
from test_checkpoint import KillAt, Killed, assert_same, schedules, training
from tiny import quiet
from tiny import tiny_learner as unseeded_learner
from torch import nn


def tiny_learner(*args, **kw):
    "Alike each time, in the order of its images too."
    random.seed(1); np.random.seed(1)
    return unseeded_learner(*args, **kw)


class Steps(Callback):
    "The state of the model after each step."
    run_valid = False
    def __init__(self): self.seen = []
    def after_step(self): self.seen.append({k: v.clone() for k, v in self.model.state_dict().items()})


def with_norm(**kw):
    learn = tiny_learner(**kw)
    learn.model.insert(2, nn.BatchNorm1d(8))
    learn.splitter = lambda m: list(m.parameters())
    return learn


@pytest.mark.parametrize('kw', [dict(lag=.1), dict(lag=.5), dict(decay=.9)], ids=str)
def test_is_the_average_of_steps_and_buffers(kw):
    learn, steps = with_norm(), Steps()
    with quiet(learn): learn.fit(3, 1e-2, cbs=[steps, EMA(raw=False, **kw)])
    want = steps.seen[0]
    for t, s in enumerate(steps.seen[1:], 2):
        want = {k: torch.lerp(v, s[k], new_weight(t, **kw)) if v.is_floating_point() else s[k] for k, v in want.items()}
    got = learn.model.state_dict()
    for k in want: torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-6)


def test_training_is_not_touched():
    a, b = Steps(), Steps()
    for steps, cbs in (a, []), (b, [EMA()]):
        learn = tiny_learner()
        with quiet(learn): learn.fit(3, 1e-2, cbs=[steps, *cbs])
    for s, t in zip(a.seen, b.seen): assert all(torch.equal(s[k], t[k]) for k in s)


@pytest.mark.parametrize('lr', [1e-3, .3])
def test_the_better_is_in_the_table_in_the_file_and_in_the_end(tmp_path, lr):
    both = {}
    for raw in True, False:
        learn = tiny_learner(tmp_path, cbs=[RunHistory()])
        with quiet(learn): learn.fit(4, lr, cbs=[EMA(raw=raw), KeepBest(file=tmp_path/f'{raw}.safetensors')])
        both[raw] = learn
        with quiet(learn): loss, accuracy = map(float, learn.validate())
        best = max((float(o['accuracy']), -float(o['valid_loss'])) for o in learn.run_history.rows)
        assert (accuracy, -loss) == pytest.approx(best, abs=1e-5)
        kept = load_file(tmp_path/f'{raw}.safetensors')
        assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in kept.items())
    plain = tiny_learner(tmp_path, cbs=[RunHistory()])
    with quiet(plain): plain.fit(4, lr)
    for better, average, raw in zip(*(o.run_history.rows for o in (both[True], both[False], plain))):
        key = lambda o: (o['accuracy'], -o['valid_loss'])
        assert key(better) == pytest.approx(max(key(average), key(raw)), abs=1e-6)


def test_stays_out_of_what_does_not_train():
    learn = tiny_learner(cbs=[EMA()])
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with quiet(learn): learn.validate(); learn.get_preds(); learn.lr_find(show_plot=False, num_it=3)
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in before.items())
    with quiet(learn): learn.fit(1, 1e-3); learn.validate()


@pytest.mark.parametrize('name', ['one-cycle', 'fine-tune'])
def test_killed_and_resumed_bit_for_bit(name, tmp_path):
    fit, places = schedules[name], [(1, 1), (1, 3)] if name == 'one-cycle' else [(1, 1), (2, 0), (2, 3)]
    (tmp_path/'whole').mkdir()
    whole = training(tmp_path/'whole', fit, EMA(), LayerDecay(.5))
    for i, place in enumerate(places):
        (folder := tmp_path/str(i)).mkdir()
        with pytest.raises(Killed): training(folder, fit, EMA(), LayerDecay(.5), KillAt(*place))
        assert_same(training(folder, fit, EMA(), LayerDecay(.5), resume=True), whole)
        a, b = (load_file(f/'best.safetensors') for f in (folder, tmp_path/'whole'))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_rates_by_group_under_every_schedule():
    for name, fit in schedules.items():
        seen = []
        class Rates(Callback):
            run_valid = False
            def before_step(self): seen.append([h['lr'] for h in self.opt.hypers])
        learn = tiny_learner()
        with quiet(learn): fit(learn, [LayerDecay(.5), Rates()])
        plain = []
        class Plain(Callback):
            run_valid = False
            def before_step(self): plain.append([h['lr'] for h in self.opt.hypers])
        learn = tiny_learner()
        with quiet(learn): fit(learn, [Plain()])
        for a, b in zip(seen, plain): assert a == pytest.approx([b[0]*.5, b[1]]), name


def test_images_grow_and_validation_does_not(image_folder):
    sizes = []
    class Sizes(Callback):
        def before_batch(self): sizes.append((self.training, self.x.shape[-1]))
    dls = image_dls(image_folder, size=96, bs=4, num_workers=0, device='cpu')
    learn = fusion_learner(dls, 'test_resnet', pretrained=False, cbs=Sizes())
    learn.unfreeze()
    with quiet(learn): learn.fit(5, 1e-3, cbs=GrowingSize(32))
    train = [s for t, s in sizes if t]
    assert {s for t, s in sizes if not t} == {96} and train == sorted(train) and set(train) == {32, 64, 96} and train[-1] == 96
    assert input_size(dls) == valid_size(dls) == 96
    with pytest.raises(ValueError, match='cannot grow from 128 to 96'): learn.fit(1, 1e-3, cbs=GrowingSize(128))


def test_under_a_budget_images_grow_within_an_epoch(image_folder):
    sizes = []
    class Sizes(Callback):
        run_valid = False
        def before_batch(self): sizes.append(self.x.shape[-1])
    dls = image_dls(image_folder, size=96, bs=4, num_workers=0, device='cpu')
    learn = fusion_learner(dls, 'test_resnet', pretrained=False, cbs=Sizes())
    learn.unfreeze()
    with quiet(learn): learn.fit(Budget.most, 1e-3, cbs=[Budget(.1, slices=1, seconds_after=0.), GrowingSize(32)])
    assert sizes == sorted(sizes) and set(sizes) == {32, 64, 96} and sum(s == 96 for s in sizes) > 2 and input_size(dls) == 96


def test_sizes_come_back_whatever_ends_the_fit_and_other_data_are_refused(image_folder):
    class Broken(Callback):
        def after_batch(self): raise KeyboardInterrupt
    dls = image_dls(image_folder, size=96, bs=4, num_workers=0, device='cpu')
    learn = fusion_learner(dls, 'test_resnet', pretrained=False)
    learn.unfreeze()
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(5, 1e-3, cbs=[GrowingSize(32), Broken()])
    assert input_size(dls) == 96
    items = [(torch.rand(3, 64, 64), i % 3) for i in range(8)]
    learn.dls = DataLoaders.from_dsets(items, items, bs=4, device='cpu', num_workers=0)
    with quiet(learn), pytest.raises(ValueError, match='only the loaders of image_dls'): learn.fit(1, 1e-3, cbs=GrowingSize(32))


def test_metrics_that_are_no_numbers_do_not_hurt():
    class Each(Metric):
        name = 'each'
        def reset(self): pass
        def accumulate(self, learn): pass
        @property
        def value(self): return np.arange(3)
    learn = tiny_learner(cbs=[RunHistory()])
    learn.metrics = [Each()]
    with quiet(learn): learn.fit(2, 1e-2, cbs=EMA(monitor='valid_loss'))
    assert len(learn.recorder.values) == 2


def test_layer_decay_leaves_validation_and_kept_schedulers_alone():
    learn = tiny_learner(cbs=[LayerDecay(.5)])
    with quiet(learn): learn.validate()
    kept = ParamScheduler({'lr': lambda pct: .1})
    learn.add_cb(kept)
    scheds, seen = kept.scheds, []
    class Rates(Callback):
        run_valid = False
        def before_step(self): seen.append([h['lr'] for h in self.opt.hypers])
    with quiet(learn):
        for _ in range(2): learn.fit(1, 1e-2, cbs=Rates())
    assert kept.scheds is scheds and all(o == pytest.approx([.05, .1]) for o in seen)


def test_an_epoch_ends_with_a_step(tmp_path):
    steps = []
    class Steps(Callback):
        run_valid = False
        def after_step(self): steps.append((self.epoch, self.iter))
    learn = tiny_learner()
    n, bs = len(learn.dls.train), learn.dls.train.bs
    with quiet(learn): learn.fit(2, 1e-2, cbs=[WholeEpochs((n//2+1)*bs), Steps()])
    assert steps == [(e, i) for e in (0, 1) for i in (n//2, n-1)]


@pytest.mark.parametrize('make, text', [(lambda: EMA(0), 'lag is 0'), (lambda: EMA(decay=1), 'decay is 1'), (lambda: LayerDecay(1.5), 'decay is 1.5'),
                                        (lambda: GrowingSize(4), 'start is 4'), (lambda: EMA(mode='upp'), 'mode')])
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text): make()


def test_an_unknown_monitor_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match='acuracy'): tiny_learner().fit(1, cbs=[EMA(monitor='acuracy'), Checkpoint(tmp_path/'c.pt')])
