"A learner that trains in milliseconds, for the tests of losses and callbacks."
import contextlib

import torch
from fastai.callback.all import ParamScheduler  # noqa: F401  (importing it gives Learner its fit_one_cycle, fine_tune, lr_find)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn


class Items(list):
    "A dataset that `Learner.export` can empty."
    def new_empty(self): return Items()


def tiny_dls(n=48, n_classes=3, size=6, bs=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, size, size, generator=g), torch.randint(n_classes, (n,), generator=g)
    ds = Items(zip(x, y))
    return DataLoaders.from_dsets(ds, ds, bs=bs, device='cpu', num_workers=0, drop_last=False)


def two_groups(model): return [list(model[1].parameters()), list(model[-1].parameters())]


def tiny_learner(tmp_path=None, *, loss_func=None, cbs=None, n_classes=3, metrics=accuracy, seed=0, **kw):
    "A body and a head, in two parameter groups."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, n_classes))
    return Learner(tiny_dls(n_classes=n_classes), model, loss_func=loss_func or CrossEntropyLossFlat(), splitter=two_groups, metrics=metrics,
                   cbs=cbs, path=tmp_path or '.', **kw)


@contextlib.contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn
