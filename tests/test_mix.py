"Mixing against torchvision and timm pixel by pixel, its draws against their distributions, and every loss."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy, error_rate
from fastai.torch_core import TensorCategory, TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from mstoolkit.callback.mix import BatchMix, MixedMetric, TrainAccuracy, cutmix_batch, cutmix_box, kept_share, mixup_batch
from mstoolkit.losses import SmoothedCrossEntropy
from scipy import stats
from tiny import quiet, tiny_learner
from torch import nn


def rand_bbox(size, lam, cx, cy):
    "Report A, figure 2, with the centre given."
    W, H = size[3], size[2]
    cut_rat = np.sqrt(1.0 - lam)
    cut_w, cut_h = int(W*cut_rat), int(H*cut_rat)
    return np.clip(cx-cut_w//2, 0, W), np.clip(cy-cut_h//2, 0, H), np.clip(cx+cut_w//2, 0, W), np.clip(cy+cut_h//2, 0, H)


@settings(deadline=None, max_examples=300)
@given(h=st.integers(1, 400), w=st.integers(1, 400), lam=st.floats(0, 1), data=st.data())
def test_box_is_figure_2(h, w, lam, data):
    cy, cx = data.draw(st.integers(0, h-1)), data.draw(st.integers(0, w-1))
    x1, y1, x2, y2 = rand_bbox((1, 3, h, w), lam, cx, cy)
    assert (box := cutmix_box(h, w, lam, cy, cx)) == (y1, y2, x1, x2)
    assert all(type(o) is int for o in box)
    mask = torch.zeros(h, w)
    mask[y1:y2, x1:x2] = 1
    assert kept_share(box, h, w) == pytest.approx(1-mask.mean().item(), abs=1e-6)


def images(n=8, h=20, w=14, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, h, w, generator=g), torch.randint(5, (n,), generator=g)


@pytest.mark.parametrize('lam, cy, cx', [(.5, 9, 7), (.2, 0, 0), (.9, 19, 13), (.99, 3, 3)])
def test_cutmix_is_torchvisions(lam, cy, cx, monkeypatch):
    from torchvision.transforms.v2 import CutMix
    x, y = images()
    y1, y2, x1, x2 = box = cutmix_box(20, 14, lam, cy, cx)
    ref = CutMix(num_classes=5)
    monkeypatch.setattr(ref, 'make_params', lambda _: {'box': (x1, y1, x2, y2), 'lam_adjusted': kept_share(box, 20, 14)})
    want_x, want_y = ref(x, y)
    mixed, y_a, y_b, lam = cutmix_batch(x, y, None, torch.arange(8).roll(1), box)
    assert torch.equal(mixed, want_x)
    torch.testing.assert_close(lam*F.one_hot(y_a, 5) + (1-lam)*F.one_hot(y_b, 5), want_y)


@pytest.mark.parametrize('lam', [.0, .3, .77, 1.])
def test_mixup_is_torchvisions(lam, monkeypatch):
    from torchvision.transforms.v2 import MixUp
    x, y = images()
    ref = MixUp(num_classes=5)
    monkeypatch.setattr(ref, 'make_params', lambda _: {'lam': lam})
    want_x, want_y = ref(x, y)
    mixed, y_a, y_b, lam = mixup_batch(x, y, lam, torch.arange(8).roll(1))
    torch.testing.assert_close(mixed, want_x)
    torch.testing.assert_close(lam*F.one_hot(y_a, 5) + (1-lam)*F.one_hot(y_b, 5), want_y)


@pytest.mark.parametrize('op', ['cutmix', 'mixup'])
def test_is_timms(op, monkeypatch):
    import timm.data.mixup as timm_mixup
    x, y = images()
    box, lam = cutmix_box(20, 14, .4, 8, 5), .4
    monkeypatch.setattr(timm_mixup, 'cutmix_bbox_and_lam', lambda *a, **k: (box, kept_share(box, 20, 14)))
    ref = timm_mixup.Mixup(mixup_alpha=float(op == 'mixup'), cutmix_alpha=float(op == 'cutmix'), label_smoothing=0., num_classes=5)
    monkeypatch.setattr(ref, '_params_per_batch', lambda: (lam, op == 'cutmix'))
    want_x, want_y = ref(x.clone(), y)
    perm = torch.arange(8).flip(0)
    mixed, y_a, y_b, lam = cutmix_batch(x, y, None, perm, box) if op == 'cutmix' else mixup_batch(x, y, lam, perm)
    torch.testing.assert_close(mixed, want_x)
    torch.testing.assert_close(lam*F.one_hot(y_a, 5) + (1-lam)*F.one_hot(y_b, 5), want_y)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 9), h=st.integers(1, 24), w=st.integers(1, 24), lam=st.floats(0, 1), seed=st.integers(0, 999), last=st.booleans())
def test_cutmix_literally(n, h, w, lam, seed, last):
    g = torch.Generator().manual_seed(seed)
    x, y, perm = torch.rand(n, 3, h, w, generator=g), torch.arange(n), torch.randperm(n, generator=g)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    y1, y2, x1, x2 = box = cutmix_box(h, w, lam, seed % h, seed % w)
    before, want = x.clone(), x.clone()
    for i in range(n): want[i, :, y1:y2, x1:x2] = before[perm[i], :, y1:y2, x1:x2]
    mixed, y_a, y_b, _ = cutmix_batch(x, y, None, perm, box)
    assert torch.equal(mixed, want) and torch.equal(x, before) and torch.equal(y_a, y) and torch.equal(y_b, perm)
    assert mixed.stride() == x.stride()
    own, _, y_b, _ = cutmix_batch(x, y, None, perm, box, inplace=True)
    assert own is x and torch.equal(x, want) and torch.equal(y_b, perm)


def test_types():
    x, y = images()
    perm = torch.arange(8).flip(0)
    mixed, *_ = cutmix_batch((x*255).byte(), y, None, perm, (2, 9, 3, 8))
    assert mixed.dtype == torch.uint8
    with pytest.raises(ValueError, match='floating point'): mixup_batch((x*255).byte(), y, .4, perm)
    assert mixup_batch(x.half(), y, .4, perm)[0].dtype == torch.float16


@pytest.mark.parametrize('cutmix, mixup', [(.5, 0.), (.4, .4), (0., .25), (1., 0.), (0., 0.), (.3, .7)])
def test_frequencies(cutmix, mixup):
    m, n = BatchMix(cutmix, mixup, seed=7), 6000
    kinds = [m.draw(4, 32, 32)[0] for _ in range(n)]
    for kind, p in {'cutmix': cutmix, 'mixup': mixup, 'none': 1-cutmix-mixup}.items():
        p = min(max(p, 0.), 1.)
        assert stats.binomtest(kinds.count(kind), n, p).pvalue > 1e-3


@pytest.mark.parametrize('alpha', [1., .4, 2.5])
def test_lambda_is_beta(alpha):
    m = BatchMix(0., 1., mixup_alpha=alpha, seed=3)
    lams = [m.draw(2, 8, 8)[1] for _ in range(4000)]
    assert stats.kstest(lams, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_lambda_of_a_range_is_the_mixture():
    lo, hi = .4, .6
    m = BatchMix(0., 1., mixup_alpha=(lo, hi), seed=5)
    lams, alphas = [m.draw(2, 8, 8)[1] for _ in range(4000)], np.linspace(lo, hi, 41)
    def cdf(v): return np.mean([stats.beta(a, a).cdf(v) for a in alphas], axis=0)
    assert stats.kstest(lams, cdf).pvalue > 1e-3


def test_boxes_and_pairs_are_uniform():
    m, n = BatchMix(1., seed=11), 4000
    draws = [m.draw(6, 50, 40) for _ in range(n)]
    firsts = np.bincount([int(d[2][0]) for d in draws], minlength=6)
    assert stats.chisquare(firsts).pvalue > 1e-3
    rng = np.random.default_rng(0)  # λ of figure 2, drawn the report's way
    want = []
    for _ in range(n):
        x1, y1, x2, y2 = rand_bbox((6, 3, 50, 40), rng.beta(1, 1), rng.integers(40), rng.integers(50))
        want.append(1-(x2-x1)*(y2-y1)/2000)
    assert stats.ks_2samp([d[1] for d in draws], want).pvalue > 1e-3


@pytest.mark.parametrize('kw, text', [
    (dict(cutmix=.6, mixup=.5), 'sum to 1.1'), (dict(cutmix=-.1), 'cannot be negative'), (dict(off_epochs=-1), 'off_epochs'),
    (dict(mixup_alpha=-1), 'mixup_alpha'), (dict(cutmix_alpha=(1.2, .8)), 'cutmix_alpha')])
def test_bad_options(kw, text):
    with pytest.raises(ValueError, match=text): BatchMix(**kw)


weight = torch.tensor([1., 3., .2])
losses = {'ce': CrossEntropyLossFlat(),
          'torch ce': nn.CrossEntropyLoss(), 'function': F.cross_entropy, 'weighted': CrossEntropyLossFlat(weight=weight),
          'smoothed': SmoothedCrossEntropy(.1), 'fastai smoothed': LabelSmoothingCrossEntropyFlat(), 'focal': FocalLossFlat(),
          'ours weighted': SmoothedCrossEntropy(.1, 'all', weight=weight)}


@pytest.mark.parametrize('name', losses)
@pytest.mark.parametrize('kind', ['cutmix', 'mixup'])
def test_every_loss(name, kind):
    loss, steps = losses[name], []

    class Spy(Callback):
        order = BatchMix.order+.5
        def before_batch(self): self.x0 = self.x
        def after_loss(self):
            if not self.training: return
            m = self.learn.batch_mix
            want = m.lam*loss(self.pred, self.y) + (1-m.lam)*loss(self.pred, m.y_b)
            torch.testing.assert_close(torch.as_tensor(self.loss_grad), torch.as_tensor(want)); steps.append(m.lam)
            torch.testing.assert_close(self.learn.loss, self.loss_grad)
    learn = tiny_learner(loss_func=loss)
    with quiet(learn): learn.fit(2, cbs=[BatchMix(float(kind == 'cutmix'), float(kind == 'mixup'), seed=1), Spy()])
    assert len(steps) == 6 and learn.loss_func is loss


def test_soft_targets_and_multi_label():
    learn = tiny_learner(loss_func=BCEWithLogitsLossFlat(), metrics=[])
    learn.dls.train.dataset[:] = [(x, F.one_hot(y, 3).float()) for x, y in learn.dls.train.dataset]  # the loaders share it
    with quiet(learn): learn.fit(1, cbs=BatchMix(1., seed=0))
    assert np.isfinite(learn.recorder.values[-1][0])


class Steps(Callback):
    "What the model is given and what is known of it, step by step."
    order = 55
    def __init__(self): self.log = []
    def before_fit(self): self.fits = getattr(self, 'fits', 0)+1
    def after_pred(self):
        m = self.learn.batch_mix
        self.log.append((self.fits, self.epoch, self.training, m.mixed, m.lam))


def test_validation_is_untouched_and_the_input_too():
    seen = []

    class Spy(Callback):
        order = -5
        def before_batch(self): self.copy, self.orig = self.x.clone(), self.x
        def after_batch(self):
            assert torch.equal(self.copy, self.orig); seen.append((self.training, self.x.data_ptr() == self.orig.data_ptr()))
    learn = tiny_learner()
    with quiet(learn):
        learn.fit(1, cbs=[BatchMix(0., 1., seed=0), Spy()])
        assert set(seen) == {(True, False), (False, True)}
        a = learn.validate()
        with learn.added_cbs(BatchMix(1.)): assert learn.validate() == a


def test_in_place_where_the_batch_is_the_loaders_own():
    "The same weights, and no copy of the batch."
    runs = []
    for own in False, True:
        same, cb = [], Steps()
        class Spy(Callback):
            order, run_valid = BatchMix.order-1, False
            def before_batch(self): self.ptr = self.x.data_ptr()
            def after_batch(self): same.append(self.learn.batch_mix.mixed and self.x.data_ptr() == self.ptr)
        learn = tiny_learner()
        learn.dls.train.own_batches = own
        learn.dls.train.rng.seed(1)
        with quiet(learn): learn.fit(3, cbs=[BatchMix(.7, seed=0), Spy(), cb])
        runs.append(learn.model.state_dict())
        assert any(same) == own and any(mixed for *_, mixed, _ in cb.log)
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


def test_in_place_from_images_drawn_twice():
    x, perm = torch.rand(4, 3, 8, 8), torch.tensor([1, 2, 1, 0])
    want = cutmix_batch(x, perm, None, perm, (1, 5, 2, 8))[0]
    assert torch.equal(cutmix_batch(x, perm, None, perm, (1, 5, 2, 8), inplace=True)[0], want) and torch.equal(x, want)


def test_off_epochs_under_fit_and_fine_tune():
    learn, s = tiny_learner(), Steps()
    with quiet(learn): learn.fit(3, cbs=[BatchMix(0., 1., off_epochs=2, seed=0), s])
    assert {(e, m) for _, e, t, m, _ in s.log if t} == {(0, True), (1, False), (2, False)}
    learn, s = tiny_learner(), Steps()
    with quiet(learn): learn.fine_tune(3, freeze_epochs=2, cbs=[BatchMix(0., 1., off_epochs=1, seed=0), s])
    assert {(f, e, m) for f, e, t, m, _ in s.log if t} == {(1, 0, True), (1, 1, True), (2, 0, True), (2, 1, True), (2, 2, False)}


def test_seed_state_and_stream():
    def lams(m, n=50): return [m.draw(4, 16, 16)[1] for _ in range(n)]
    assert lams(BatchMix(seed=1)) == lams(BatchMix(seed=1)) != lams(BatchMix(seed=2))
    torch.manual_seed(5); a = BatchMix(); b = BatchMix(); torch.manual_seed(5)
    assert (la := lams(a)) == lams(BatchMix()) and la != lams(b)
    state = a.state_dict(); want = lams(a)
    again = BatchMix(seed=99); again.load_state_dict(state)
    assert lams(again) == want
    state = torch.get_rng_state(); np_state = np.random.get_state()[1].copy()
    lams(a)  # and no global stream moves
    assert torch.equal(state, torch.get_rng_state()) and (np_state == np.random.get_state()[1]).all()


def test_gradient_accumulation_scales_both_halves():
    learn, seen = tiny_learner(), []

    class Spy(Callback):
        order = GradientAccumulation.order+.5
        def after_loss(self):
            if not self.training: return
            m = self.learn.batch_mix
            full = m.lam*F.cross_entropy(self.pred, self.y) + (1-m.lam)*F.cross_entropy(self.pred, m.y_b)
            torch.testing.assert_close(self.loss_grad, full/2); seen.append(1)
    with quiet(learn): learn.fit(1, cbs=[BatchMix(0., 1., seed=0), GradientAccumulation(32), Spy()])
    assert len(seen) == 3


def test_fastai_tensor_types_and_other_inputs():
    learn = tiny_learner()
    learn.dls.train.dataset[:] = [(TensorImage(x), TensorCategory(y)) for x, y in learn.dls.train.dataset]
    with quiet(learn): learn.fit(1, cbs=BatchMix(1., seed=0))
    learn = tiny_learner()
    learn.dls.train.dataset[:] = [(x.flatten(), y) for x, y in learn.dls.train.dataset]
    with quiet(learn), pytest.raises(ValueError, match=r'\(N, C, H, W\)'): learn.fit(1, cbs=BatchMix(1., seed=0))


def test_train_metrics_are_weighted():
    want = []

    class Spy(Callback):
        order = 51
        def after_batch(self):
            if not self.training: return
            m = self.learn.batch_mix
            acc = accuracy(self.pred, self.y)
            if m.mixed: acc = m.lam*acc + (1-m.lam)*accuracy(self.pred, m.y_b)
            want.append(acc.item())
    learn = tiny_learner(metrics=[accuracy, error_rate], default_cbs=True)
    learn.remove_cb(learn.recorder)
    learn.add_cb(Recorder(train_metrics=True))
    with quiet(learn):
        learn.fit(1, cbs=[BatchMix(.7, seed=2), Spy()])
        names, values = learn.recorder.metric_names[1:], learn.recorder.values[-1]
        rec = dict(zip(names, values))
        assert rec['train_accuracy'] == pytest.approx(np.mean(want)) and rec['train_error_rate'] == pytest.approx(1-np.mean(want))
        assert rec['valid_accuracy'] == pytest.approx(learn.validate()[1])
        assert all(type(o) is MixedMetric for o in learn.metrics)
        learn.fit(1)  # without mixing they are plain averages again
        assert dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))['valid_accuracy'] == pytest.approx(learn.validate()[1])


def test_train_accuracy_has_no_opinion_on_regression():
    learn = tiny_learner(loss_func=nn.MSELoss(), metrics=[])
    learn.dls.train.dataset[:] = [(x, torch.zeros(3)) for x, _ in learn.dls.train.dataset]
    acc = TrainAccuracy(); acc.reset()

    class Spy(Callback):
        order = 51
        def after_batch(self): acc.accumulate(self.learn)
    with quiet(learn): learn.fit(1, cbs=Spy())
    assert acc.value is None


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    class Autocast(Callback):
        "What `MixedPrecision` does on a GPU."
        order = 10
        def before_batch(self): self.ctx = torch.autocast('cpu', dtype=dtype); self.ctx.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.ctx.__exit__(None, None, None)
    learn = tiny_learner()
    with quiet(learn): learn.fit(2, cbs=[BatchMix(.5, .5, seed=0), Autocast()])
    assert learn.loss_func(torch.zeros(1, 3), torch.zeros(1).long()) > 0 and np.isfinite(learn.recorder.values[-1][0])


@pytest.mark.cuda
@pytest.mark.parametrize('kind', ['cutmix', 'mixup'])
def test_no_host_synchronisation(kind):
    m, steps = BatchMix(float(kind == 'cutmix'), float(kind == 'mixup'), seed=0), 5

    class Learn:  # the few attributes `BatchMix` asks a learner for
        loss_func, training = nn.CrossEntropyLoss(), True
    m.learn, m.active = Learn(), True
    x, y = torch.rand(32, 3, 64, 64, device='cuda'), torch.randint(5, (32,), device='cuda')
    pred = torch.randn(32, 5, device='cuda', requires_grad=True)
    acc = TrainAccuracy(); acc.reset()
    torch.cuda.synchronize(); torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(steps):
            m.learn.xb, m.learn.yb, m.learn.x, m.learn.y, m.learn.pred, m.learn.batch_mix = (x,), (y,), x, y, pred, m
            m.before_batch()
            m.learn.loss_grad = m.learn.loss_func(pred, y)
            m.after_loss(); m.learn.loss_grad.backward(); acc.accumulate(m.learn)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert 0 <= acc.value <= 1
