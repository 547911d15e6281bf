"Several processes against one: weights, metrics, callbacks, stops and resume. Processes are started by torchrun, over gloo."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMMON = '''
import json, os, sys
from pathlib import Path
import torch
from fastai.callback.all import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, F1Score
from torch import nn
from mstoolkit.callback.distributed import Distributed, together
from mstoolkit.core import from_all, n_processes, process_rank
from tiny import Items, quiet, tiny_dls, two_groups
out, rank = Path(sys.argv[1]), process_rank()

def keep(name, **what):
    if rank == 0: torch.save(what, out/f'{name}-{n_processes()}.pt')

def data(n, bs, *, drop_last=True, n_valid=None):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 3, 6, 6, generator=g), torch.randint(3, (n,), generator=g)
    ds = Items(zip(x, y))
    va = Items(list(ds)[:n_valid or n])
    dls = DataLoaders.from_dsets(ds, va, bs=bs, device='cpu', num_workers=0, drop_last=drop_last)
    import random
    for i, dl in enumerate(dls.loaders): dl.rng = random.Random(i)
    return dls

def learner(dls, *mid, metrics=accuracy, **kw):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *mid, nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=metrics, cbs=Distributed(**kw), train_bn=True)

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
'''


def environment():
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')}
    path = os.pathsep.join([str(ROOT), str(ROOT/'tests'), env.get('PYTHONPATH', '')])
    return env | dict(PYTHONPATH=path, OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1', GLOO_SOCKET_IFNAME='lo')


def torchrun(n, *words, timeout=300, **kw):
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}'] if n > 1 else [sys.executable]
    return subprocess.run([*start, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=timeout, **kw)


def run(tmp_path, code, *counts):
    "Run a script in so many processes, for each count in turn; what it kept, by name and count."
    script = tmp_path/'script.py'
    script.write_text(COMMON + code)
    for n in counts:
        r = torchrun(n, script, tmp_path)
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-6000:]
    return {f.stem: torch.load(f) for f in tmp_path.glob('*.pt')}


def close(a, b, tol=1e-5):
    assert a.keys() == b.keys()
    for k in a: assert (a[k].double() - b[k].double()).abs().max() < tol, k


WEIGHTS = '''
learn = learner(data(80, 16))
with quiet(learn): learn.fit(4, 1e-2)
assert learn.train_iter == 20
keep('plain', w=weights(learn), loss=list(learn.recorder.values[-1]), losses=torch.stack(learn.recorder.losses))
same = from_all({k: v.sum().item() for k, v in learn.model.state_dict().items()})
assert all(o == same[0] for o in same), same

# batches that cannot be divided, a last one smaller than the processes are many, other metrics
learn = learner(data(46, 9, drop_last=False), metrics=[accuracy, F1Score(average='macro')])
with quiet(learn): learn.fit(3, 1e-2)
keep('uneven', w=weights(learn), loss=list(learn.recorder.values[-1]))
probs, y = learn.get_preds()
keep('preds', p=probs.as_subclass(torch.Tensor), y=y.as_subclass(torch.Tensor))

# accumulation
learn = learner(data(48, 8))
with quiet(learn): learn.fit(3, 1e-2, cbs=GradientAccumulation(16))
keep('accumulated', w=weights(learn))
learn.recorder
assert learn.cbs.filter(lambda cb: hasattr(cb, 'n_acc')) == []

# batch norm over all processes, and without
learn = learner(data(80, 16), nn.BatchNorm2d(6), sync_bn=True)
with quiet(learn): learn.fit(4, 1e-2)
keep('synced', w=weights(learn), loss=list(learn.recorder.values[-1]))
learn = learner(data(80, 16), nn.BatchNorm2d(6))
with quiet(learn): learn.fit(1, 1e-2)
stats = from_all(learn.model[1].running_var.tolist())
assert all(o == stats[0] for o in stats), 'buffers are averaged before validation'
'''


@pytest.mark.slow
def test_processes_train_as_one(tmp_path):
    kept = run(tmp_path, WEIGHTS, 1, 2, 3)
    for n in 2, 3:
        for name in 'plain', 'uneven', 'accumulated', 'synced':
            a, b = kept[f'{name}-1'], kept[f'{name}-{n}']
            close(a['w'], b['w'])
            if 'loss' in a: assert torch.allclose(torch.tensor(a['loss']), torch.tensor(b['loss']), atol=1e-5), (name, n, a, b)
        assert torch.allclose(kept['plain-1']['losses'], kept[f'plain-{n}']['losses'], atol=1e-5)
        a, b = kept['preds-1'], kept[f'preds-{n}']
        assert a['y'].equal(b['y']) and torch.allclose(a['p'], b['p'], atol=1e-5)
        assert kept['uneven-1']['loss'][2] == kept[f'uneven-{n}']['loss'][2], 'accuracy is exact'
