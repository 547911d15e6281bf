"Several processes against one: weights, metrics, callbacks, stops and resume. Processes are started by torchrun, over gloo."
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import tiny_dls, tiny_learner, quiet

from mstoolkit.callback.balance import balance_learner
from mstoolkit.callback.distributed import Distributed, Share, own_part, part_sizes, synced_batch_norm
from mstoolkit.callback.mix import BatchMix
from mstoolkit.core import pick_device, seed_everything
from mstoolkit.data.core import default_workers, image_dls
from mstoolkit.learner import fusion_learner
from mstoolkit.runs import read_env, run_file

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
from fastai.optimizer import SGD
from torch import nn
from mstoolkit.callback.distributed import Distributed, together
from mstoolkit.core import from_all, n_processes, process_rank
from tiny import Items, quiet, tiny_dls, two_groups
out, rank = Path(sys.argv[1]), process_rank()

def keep(name, **what):
    plain = {k: v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for k, v in what.items()} # not fastai's types
    if rank == 0: torch.save(plain, out/f'{name}-{n_processes()}.pt')

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


def torchrun(n, *words, timeout=1200, **kw):
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
keep('preds', p=probs, y=y)

# accumulation
learn = learner(data(48, 8))
with quiet(learn): learn.fit(3, 1e-2, cbs=GradientAccumulation(16))
keep('accumulated', w=weights(learn))

# batch norm over all processes, and without
# (a bias before a batch norm has no gradient but noise, which Adam would make steps of)
learn = learner(data(80, 16), nn.BatchNorm2d(6), sync_bn=True)
learn.opt_func = SGD
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


@pytest.mark.parametrize('n, bs, processes', [(11, 5, 3), (12, 4, 4), (7, 7, 2), (1, 3, 3), (100, 32, 3)])
def test_parts_are_the_whole_once(n, bs, processes):
    order = list(range(n))
    batches = [order[i:i+bs] for i in range(0, n, bs)]
    parts = [own_part(order, bs, r, processes) for r in range(processes)]
    found = []
    for b in batches:
        sizes = part_sizes(len(b), processes)
        assert sum(sizes) == len(b) and max(sizes) - min(sizes) <= 1
        for r, k in enumerate(sizes):
            mine, parts[r] = parts[r][:max(k, 1)], parts[r][max(k, 1):]
            found += mine[:k]
    assert found == order and not any(parts)


@pytest.fixture
def as_process(monkeypatch):
    "Have this process take itself for one of several."
    def be(rank, n):
        for k, v in dict(RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, LOCAL_RANK=rank).items(): monkeypatch.setenv(k, str(v))
    return be


@pytest.mark.parametrize('workers', [0, 2])
def test_shares_of_image_loaders(image_folder, workers):
    "The same images in the same order as one process has them, augmented as there, whatever the number of workers."
    def epochs(rank=None, n=1, balanced=False):
        dls = image_dls(image_folder, size=32, bs=7, num_workers=workers, device='cpu', seed=3)
        if balanced: balance_learner(fusion_learner(dls, 'test_resnet', pretrained=False), 'sampler')
        dl = dls.train if rank is None else Share(dls.train, rank, n)
        found = [[b[0].float() for b in dl] for _ in range(2)]
        assert 'get_idxs' not in dls.train.__dict__ and (dls.train.n, dls.train.bs, len(dls.train)) == (24, 7, 3)
        return found
    for balanced in False, True:
        whole, parts = epochs(balanced=balanced), [epochs(r, 2, balanced) for r in range(2)]
        for e in range(2):
            assert len(whole[e]) == len(parts[0][e]) == 3
            for i, x in enumerate(whole[e]): assert torch.equal(x, torch.cat([p[e][i] for p in parts]))


def test_a_share_given_up_leaves_the_loader_as_it_was():
    dls = tiny_dls()
    share = Share(dls.train, 1, 2)
    next(iter(share))
    assert (dls.train.n, dls.train.bs, len(dls.train), len(share)) == (48, 16, 3, 3)
    assert sum(len(y) for _, y in dls.train) == 48


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match='17 processes and batches of 16'): Share(tiny_dls().train.new(drop_last=True), 0, 17)
    with pytest.raises(ValueError, match="fastai's loaders"): Share(torch.utils.data.DataLoader([1, 2]), 0, 2)


def test_processes_draw_differently(as_process, image_folder):
    drawn = []
    for rank in range(3):
        as_process(rank, 3)
        mix = BatchMix(seed=1)
        dls = image_dls(image_folder, size=16, bs=8, num_workers=0, device='cpu', colour_on='device', augment='photo')
        share = Share(dls.train, rank, 3)
        next(iter(share))
        colour = next(t for t in dls.train.after_batch.fs if type(t).__name__ == 'DeviceColour')
        drawn.append((mix.rng.random(), colour.rng.initial_seed()))
    assert len({a for a, _ in drawn}) == len({b for _, b in drawn}) == 3
    mix, other = BatchMix(seed=1), BatchMix(seed=1)
    other.load_state_dict(mix.state_dict())
    other.draw_from(1)
    assert mix.rng.random() != other.rng.random(), 'after a resume with more processes'


def test_processes_share_the_machine(as_process, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)))
    assert default_workers(5000) == 8
    as_process(1, 4)
    assert default_workers(5000) == 2
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert str(pick_device('auto')) == str(pick_device('cuda')) == 'cuda:1' and str(pick_device('cuda:2')) == 'cuda:2'
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ValueError, match='4 processes on a machine with 2 GPUs'): pick_device('cuda')


def test_one_process_is_left_alone():
    ends = []
    for cbs in [], [Distributed(sync_bn=True)]:
        seed_everything(0)
        learn = tiny_learner(cbs=cbs)
        with quiet(learn): learn.fine_tune(2)
        ends.append([p.clone() for p in learn.model.parameters()])
    assert all(map(torch.equal, *ends))
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(synced_batch_norm(x, None, None, training=True), torch.nn.functional.batch_norm(x, None, None, training=True))


RUN = ['--recipe', 'gate', '--backbone', 'test_resnet', '--size', 32, '--bs', 8, '--num-workers', 0, '--device', 'cpu',
       '--precision', 'fp32', '--memory-format', 'contiguous', '--lr', 1e-3]


def command(*words, **kw):
    return subprocess.Popen([sys.executable, '-m', 'mstoolkit', *map(str, words)], env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def outcome(p, timeout=900):
    out, err = p.communicate(timeout=timeout)
    return p.returncode, out, [line for line in err.splitlines() if line.startswith('mstoolkit:')]


@pytest.mark.slow
@pytest.mark.parametrize('length', ['epochs', 'minutes'])
def test_fine_tune_in_two_processes(image_folder, tmp_path, length):
    "Mixing, plateau, average, probe, growing images, accumulation, sampler, sizes tried at the end, epochs or a budget."
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path/'w.pth')
    more = ['--epochs', 30, '--stop-patience', 2, '--sync-bn'] if length == 'epochs' else ['--minutes', .5, '--stop-patience', 0, '--probe']
    code, out, err = outcome(command(
        'train', image_folder, *RUN, '--weights-file', tmp_path/'w.pth', '--schedule', 'fine-tune', '--cutmix', .3, '--mixup', .3,
        '--plateau-patience', 1, '--ema', .1, '--start-size', 16, '--accumulate', 2, '--clip', 1, '--balance', 'sampler',
        '--test-size', -1, *more, '--processes', 2, '--out', tmp_path/'run'))
    assert code == 0, (out, err)
    history, env = pd.read_csv(run_file(tmp_path/'run', 'history')), read_env(tmp_path/'run')
    assert env['processes'] == 2 and env['epochs'] == len(history) and not run_file(tmp_path/'run', 'state').exists()
    assert out.count('best accuracy') == 1 and '2 processes: each takes 4 of the 8 images' in out
    if length == 'epochs': assert 'stopped after epoch' in env['stopped'] and len(history) < 31
    else: assert env['seconds'] < 90 and len(history) >= 2


@pytest.mark.slow
def test_kill_and_resume(image_folder, tmp_path):
    "Killed, told to end, one or all: the run goes on, on two processes to the same bits, on one and three at all."
    words = [*RUN, '--no-pretrained', '--cutmix', .3, '--mixup', .3, '--ema', .1, '--stop-patience', 0, '--epochs', 6, '--processes', 2]
    whole = tmp_path/'whole'
    assert outcome(command('train', image_folder, *words, '--out', whole))[0] == 0

    def stop(name, how):
        run = tmp_path/name
        p = command('train', image_folder, *words, '--out', run)
        history, until = run_file(run, 'history'), time.monotonic() + 600
        while not history.is_file() or len(history.read_text().splitlines()) < 3:
            assert p.poll() is None and time.monotonic() < until
            time.sleep(.05)
        workers = [int(o) for o in subprocess.run(['pgrep', '-P', str(p.pid)], capture_output=True, text=True).stdout.split()]
        how(p, workers)
        code, out, err = outcome(p)
        until = time.monotonic() + 60 # workers end with the process that started them
        while any(Path(f'/proc/{o}').exists() for o in workers): assert time.monotonic() < until; time.sleep(.1)
        assert run_file(run, 'state').is_file(), (code, out, err)
        return run, code, err

    def go_on(run, n):
        code, out, err = outcome(command('train', '--resume', run, '--processes', n))
        assert code == 0 and 'going on after epoch' in out, (out, err)
        assert ('may differ in rounding' in out) == (n != 2)
        assert len(pd.read_csv(run_file(run, 'history'))) == 6
        return load_file(run_file(run, 'model'))

    run, code, err = stop('launcher', lambda p, workers: p.kill())
    assert code == -signal.SIGKILL
    for n in 1, 3: go_on(Path(shutil.copytree(run, tmp_path/f'on-{n}')), n)
    mine, first = go_on(run, 2), load_file(run_file(whole, 'model'))
    assert all(torch.equal(mine[k], first[k]) for k in first)
    run, code, err = stop('one', lambda p, workers: os.kill(workers[-1], signal.SIGKILL))
    assert code == 128 + signal.SIGKILL and len(err) == 1 and 'was ended by SIGKILL' in err[0]
    mine = go_on(run, 2)
    assert all(torch.equal(mine[k], first[k]) for k in first)
    run, code, err = stop('told', lambda p, workers: os.kill(workers[0], signal.SIGTERM))
    assert (code, err) == (143, ['mstoolkit: stopped by a signal'])
    run, code, err = stop('interrupted', lambda p, workers: p.send_signal(signal.SIGINT))
    assert (code, err) == (130, ['mstoolkit: interrupted'])


@pytest.mark.slow
def test_one_line_for_all_processes(image_folder, tmp_path):
    train = lambda *words: outcome(command('train', image_folder, *RUN, '--no-pretrained', '--epochs', 1, *words, '--out', tmp_path/'run'))
    for words, said in {('--processes', 3, '--bs', 2): '3 processes and batches of 2 images',
                        ('--processes', 2, '--backbone', 'no_such'): 'unknown backbone',
                        ('--processes', 2, '--folds', 3): 'give --fold for one of them'}.items():
        code, out, err = train(*words)
        assert code == 2 and len(err) == 1 and said in err[0] and not (tmp_path/'run').exists(), (out, err)
    (image_folder/'train'/'2'/'0.png').write_bytes((image_folder/'train'/'2'/'0.png').read_bytes()[:200]) # one of them comes to it
    code, out, err = train('--processes', 2)
    assert code == 2 and len(err) == 1 and '0.png' in err[0], (out, err)


@pytest.mark.slow
def test_torchrun_starts_it_too(image_folder, tmp_path):
    words = ['train', image_folder, *RUN, '--no-pretrained', '--epochs', 1]
    r = torchrun(2, '-m', 'mstoolkit', *words, '--out', tmp_path/'torchrun')
    assert r.returncode == 0 and r.stdout.count('best accuracy') == 1, r.stderr
    assert read_env(tmp_path/'torchrun')['processes'] == 2
