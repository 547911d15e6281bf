"Balancing: counts and weights, draws, the adjusted loss against its formula."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from PIL import Image
from torch import nn

import fastai.callback.all  # noqa: F401
from mstoolkit.callback.balance import LogitAdjust, balance_learner, class_counts, class_weights
from mstoolkit.callback.mix import BatchMix
from mstoolkit.data.core import image_dls
from mstoolkit.callback.smoothing import LabelSmoothing
from mstoolkit.losses import SmoothedCrossEntropy


@pytest.fixture
def dls(tmp_path):
    rng = np.random.default_rng(0)
    for c, n in dict(a=64, b=16, c=8).items():
        (tmp_path/c).mkdir()
        for i in range(n): Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path/c/f'{i}.png')
    return image_dls(tmp_path, size=8, bs=16, valid_pct=.25, augment='none', num_workers=0, device='cpu')


def learner(dls, loss=None, cbs=None): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), loss or CrossEntropyLossFlat(), cbs=cbs)


def test_counts_and_weights(dls):
    n = class_counts(dls)
    assert n.tolist() == [48, 12, 6]
    w = class_weights(n)
    assert torch.allclose(w*n, (w*n)[0].expand(3)) and torch.isclose((w*n).sum()/n.sum(), torch.tensor(1.))


def test_sampler(dls):
    learn = balance_learner(learner(dls), 'sampler')
    y = torch.cat([y for _ in range(30) for _, y in learn.dls.train])
    share = torch.bincount(y.as_subclass(torch.Tensor))/len(y)
    assert ((share-1/3).abs() < .05).all()
    valid = [int(y) for _, b in learn.dls.valid for y in b]
    assert len(valid) == len(learn.dls.valid_ds) and valid == sorted(valid)  # validation is not touched


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat, SmoothedCrossEntropy])
def test_weights(dls, loss):
    learn = balance_learner(learner(dls, loss()), 'weights')
    p, y = torch.randn(20, 3), torch.randint(0, 3, (20,))
    w = class_weights(class_counts(dls))
    ref = SmoothedCrossEntropy(weight=w)(p, y) if loss is SmoothedCrossEntropy else F.cross_entropy(p, y, w)
    assert torch.allclose(learn.loss_func(p, y), ref)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)


def test_weights_need_a_loss_that_has_them(dls):
    with pytest.raises(ValueError, match='needs a loss with weights'): balance_learner(learner(dls, MSELossFlat()), 'weights')
    with pytest.raises(ValueError, match="unknown balance 'weight'; did you mean 'weights'"): balance_learner(learner(dls), 'weight')


class Spy(fastai.callback.core.Callback):
    order = 10_000
    def before_fit(self): self.seen = []
    def after_batch(self):
        p, y = self.pred.as_subclass(torch.Tensor).detach(), self.yb[0].as_subclass(torch.Tensor)
        self.seen.append((self.training, p, y, float(self.loss.detach())))


def test_logit_adjust_is_menons_loss(dls):
    spy, n = Spy(), class_counts(dls)
    learn = balance_learner(learner(dls, cbs=spy), 'logit-adjust')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    for training, p, y, loss in spy.seen:  # metrics see the model's own outputs, the loss the adjusted ones, and only in training
        ref = F.cross_entropy(p + (n/n.sum()).log() if training else p, y)
        assert abs(float(ref)-loss) < 1e-5
    assert {t for t, *_ in spy.seen} == {True, False}
    learn = learner(dls, cbs=[spy, half := LogitAdjust(tau=.5)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    torch.testing.assert_close(half.shift, .5*(n/n.sum()).log())


def test_logit_adjust_composes(dls):
    learn = learner(dls, cbs=[LogitAdjust(), BatchMix(cutmix=.5, mixup=.5), LabelSmoothing(.1)])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert np.isfinite(learn.recorder.values[-1][0])


def test_logit_adjust_raises_the_rare_classes(dls):
    "On noise, the plain loss learns to answer 'a'; the adjusted one does not prefer any class."
    def rare_share(cbs):
        torch.manual_seed(0)
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        learn = Learner(dls, net, CrossEntropyLossFlat(), cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(15, .05)
        return float(learn.get_preds()[0][:, 1:].sum(1).mean())
    with_, without = rare_share([LogitAdjust()]), rare_share([])
    assert without < .4 < .5 < with_
