"Smoothed cross entropy against its literal form and torch's, and as a citizen of fastai."
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.torch_core import TensorCategory, TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from mstoolkit.callback.mix import BatchMix
from mstoolkit.callback.smoothing import LabelSmoothing
from mstoolkit.losses import SmoothedCrossEntropy
from tiny import quiet, tiny_learner
from torch import nn


def literal(x, y, eps, weight=None):
    "Report A, figure 9, kept per item, with class weights as torch's definition has them."
    c = x.shape[-1]
    dist = torch.full_like(x, eps/(c-1)).scatter_(1, y[:, None], 1-eps)
    if weight is not None: dist = dist*weight
    return -(dist*torch.log_softmax(x, -1)).sum(-1)


def batch(n, c, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=g, dtype=dtype)*3, torch.randint(c, (n,), generator=g)


@settings(deadline=None, max_examples=60)
@given(c=st.integers(2, 120), n=st.integers(1, 9), frac=st.floats(0, 1), seed=st.integers(0, 2**30))
def test_equals_the_literal_form(c, n, frac, seed):
    eps = frac*(1-1/c)*.999
    x, y = batch(n, c, seed)
    x.requires_grad_()
    ours, ref = SmoothedCrossEntropy(eps)(x, y), literal(x, y, eps).mean()
    torch.testing.assert_close(ours, ref, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, x)[0] for o in (ours, ref)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('eps', [0., .1, .5])
def test_weights_and_reductions(eps, reduction):
    x, y = batch(16, 5)
    w = torch.tensor([.5, 1., 2., 3., .1], dtype=x.dtype)
    ref = literal(x, y, eps, w)
    ref = {'mean': ref.sum()/w[y].sum(), 'sum': ref.sum(), 'none': ref}[reduction]
    torch.testing.assert_close(SmoothedCrossEntropy(eps, weight=w, reduction=reduction)(x, y), ref, rtol=1e-12, atol=1e-12)


def test_over_all_is_torch_and_fastai():
    x, y = batch(16, 7, dtype=torch.float32)
    ours = SmoothedCrossEntropy(.2, 'all')(x, y)
    torch.testing.assert_close(ours, F.cross_entropy(x, y, label_smoothing=.2))
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropyFlat(eps=.2)(x, y).as_subclass(torch.Tensor))


@pytest.mark.parametrize('over', ['others', 'all'])
def test_mixed_targets_are_a_mixture_of_losses(over):
    x, y_a = batch(16, 7)
    y_b, lam, loss = y_a.flip(0), .3, SmoothedCrossEntropy(.1, over)
    soft = lam*F.one_hot(y_a, 7).to(x) + (1-lam)*F.one_hot(y_b, 7).to(x)
    torch.testing.assert_close(loss(x, soft), lam*loss(x, y_a) + (1-lam)*loss(x, y_b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('target_type', [torch.int8, torch.int32, torch.int64, TensorCategory])
def test_tensor_types(target_type):
    x, y = batch(8, 4, dtype=torch.float32)
    want = SmoothedCrossEntropy(.1)(x, y)
    y = TensorCategory(y) if target_type is TensorCategory else y.to(target_type)
    assert type(got := SmoothedCrossEntropy(.1)(TensorImage(x), y)) is torch.Tensor
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_under_autocast(dtype):
    x, y = batch(8, 4, dtype=torch.float32)
    with torch.autocast('cpu', dtype=dtype): got = SmoothedCrossEntropy(.1)(x.to(dtype), y)
    torch.testing.assert_close(got.float(), SmoothedCrossEntropy(.1)(x, y), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('kw, text', [
    (dict(eps=-.1), '0 <= eps < 1'), (dict(eps=1.), '0 <= eps < 1'), (dict(over='each'), "unknown form of smoothing 'each'"),
    (dict(reduction='avg'), "unknown reduction 'avg'")])
def test_bad_options(kw, text):
    with pytest.raises(ValueError, match=text): SmoothedCrossEntropy(**kw)


@pytest.mark.parametrize('eps', [0., .1])
def test_one_class_is_an_error(eps):
    with pytest.raises(ValueError, match='at least 2 classes'): SmoothedCrossEntropy(eps)(torch.randn(3, 1), torch.zeros(3))


def test_on_a_learner(tmp_path):
    weight = torch.tensor([1., 2., 3.])
    learn = tiny_learner(tmp_path, loss_func=SmoothedCrossEntropy(.1, weight=weight))
    with quiet(learn):
        learn.fit(1)
        probs, targs, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
        torch.testing.assert_close(probs.sum(1), torch.ones(48)); assert torch.equal(decoded, probs.argmax(1))
        torch.testing.assert_close(losses, literal(probs.log(), targs, .1, weight), rtol=1e-4, atol=1e-5)
        assert learn.loss_func.reduction == 'mean'
        learn.export('model.pkl')
    with pytest.warns(UserWarning, match='pickle'): again = load_learner(tmp_path/'model.pkl')
    assert again.loss_func.eps == .1 and torch.equal(again.loss_func.weight, weight)


class Ends(Callback):
    order = 99
    def __init__(self, exc): self.exc = exc
    def after_batch(self): raise self.exc


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('boom'), CancelFitException()])
@pytest.mark.parametrize('on_valid', [True, False])
def test_callback_leaves_however_the_fit_ends(exc, on_valid):
    learn = tiny_learner()
    plain, n_cbs = learn.loss_func, len(learn.cbs)
    with quiet(learn):
        n_cbs = len(learn.cbs)
        try: learn.fit(1, cbs=[LabelSmoothing(on_valid=on_valid), Ends(exc)])
        except (KeyboardInterrupt, RuntimeError): pass
        assert learn.loss_func is plain and len(learn.cbs) == n_cbs
        learn.fine_tune(1, cbs=LabelSmoothing(on_valid=on_valid))
        assert learn.loss_func is plain


def test_callback_keeps_weights_and_composes_with_mixing():
    weight, seen = torch.tensor([1., 5., .2]), []

    class Spy(Callback):
        order = BatchMix.order+.5
        def after_loss(self):
            if not self.training: return
            m, smooth = self.learn.batch_mix, SmoothedCrossEntropy(.2, weight=weight)
            want = smooth(self.pred, self.y)
            if m.mixed: want = m.lam*want + (1-m.lam)*smooth(self.pred, m.y_b)
            torch.testing.assert_close(self.loss_grad, want); seen.append(m.mixed)
    learn = tiny_learner(loss_func=CrossEntropyLossFlat(weight=weight))
    with quiet(learn): learn.fit(6, cbs=[LabelSmoothing(.2), BatchMix(.6, seed=0), Spy()])
    assert len(set(seen)) == 2


@pytest.mark.parametrize('loss', [FocalLossFlat(), nn.MSELoss()])
def test_callback_refuses_other_losses(loss):
    learn = tiny_learner(loss_func=loss)
    with quiet(learn), pytest.raises(ValueError, match='stands in for a cross entropy'): learn.fit(1, cbs=LabelSmoothing())
    assert learn.loss_func is loss
