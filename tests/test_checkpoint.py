"A training that is killed and resumed ends as one that was not, to the last bit."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from mstoolkit.callback.checkpoint import Checkpoint, load_checkpoint, load_training_state, rng_state, set_rng_state, training_state
from mstoolkit.callback.mix import BatchMix
from mstoolkit.callback.progress import RunHistory
from mstoolkit.callback.schedule import fit_warm_restarts
from mstoolkit.callback.tracker import EarlyStop, KeepBest, PlateauLR
from mstoolkit.cli import main
from mstoolkit.core import signals_wait
from mstoolkit.recipe import Recipe, load_recipe
from mstoolkit.runs import run_file
from mstoolkit.train import minutes_used, resume_run, train
from mstoolkit.train import schedules as train_schedules
from safetensors.torch import load_file, save_file
from test_tracker import Rates, Written
from tiny import quiet, tiny_learner
from torch import nn


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch): monkeypatch.setattr('mstoolkit.core._fsync', lambda p: None)  # no test cuts the power, and a busy disk takes seconds


class Killed(Exception): "What stands for a crash."


class KillAt(Callback):
    "Crash in the middle of epoch `epoch`, counted from 0, of fit `fit`, counted from 1."
    run_valid = False
    def __init__(self, fit, epoch): self.at, self.n, self.began = epoch, fit, 0
    def before_fit(self): self.began += 1
    def after_batch(self):
        if (self.began, self.epoch, self.iter) == (self.n, self.at, 1): raise Killed('here')


schedules = {
    'constant': lambda learn, cbs: learn.fit(4, 1e-2, cbs=cbs),
    'one-cycle': lambda learn, cbs: learn.fit_one_cycle(4, 1e-2, cbs=cbs),
    'flat-cos': lambda learn, cbs: learn.fit_flat_cos(4, 1e-2, cbs=cbs),
    'fine-tune': lambda learn, cbs: learn.fine_tune(4, 1e-2, freeze_epochs=2, cbs=cbs),
    'warm-restarts': lambda learn, cbs: fit_warm_restarts(learn, 1, 2, 4, lr=1e-2, cbs=cbs),
}
torch_adam = dict(opt_func=lambda params, **kw: OptimWrapper(params, torch.optim.Adam, **kw))


def same(a, b):
    "Whether two states are equal, tensors bit for bit."
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


class Dropping(Callback):
    "Dropout in the input, so that torch's own stream matters too."
    run_valid = False
    def before_batch(self): self.learn.xb = (nn.functional.dropout(self.x, .2),)


def training(folder, fit, *cbs, resume=False, metrics=None, **kw):
    "One script: what a user would run, and run again with `resume=True`."
    random.seed(1); np.random.seed(1)
    learn = tiny_learner(folder, cbs=[RunHistory(), BatchMix(.4, .4, seed=7), Dropping()], **(dict(metrics=metrics) if metrics else {}), **kw)
    trackers = [PlateauLR(patience=0), EarlyStop(patience=99), KeepBest(file=folder/'best.safetensors')]
    with quiet(learn): fit(learn, [*trackers, Checkpoint(folder/'checkpoint'/'state.pt', resume=resume), *cbs])
    return learn


def table(learn): return learn.run_history.to_frame().drop(columns=['seconds', 'data_wait'])


def assert_same(a, b):
    assert same(a.model.state_dict(), b.model.state_dict()) and same(a.opt.state_dict(), b.opt.state_dict())
    assert table(a).equals(table(b))
    assert same([list(o) for o in a.recorder.values], [list(o) for o in b.recorder.values]) and a.recorder.iters == b.recorder.iters
    assert same(a.recorder.losses, b.recorder.losses) and a.recorder.lrs == b.recorder.lrs
    assert same(a.batch_mix.rng.bit_generator.state, b.batch_mix.rng.bit_generator.state)


@pytest.mark.parametrize('opt', [{}, torch_adam], ids=['fastai', 'torch'])
@pytest.mark.parametrize('name', schedules)
def test_killed_in_any_epoch(name, opt, tmp_path):
    fit, places = schedules[name], [(1, e) for e in range(1, 4)]
    if name == 'fine-tune': places = [(1, 1), *((2, e) for e in range(4))]
    (tmp_path/'whole').mkdir()
    whole = training(tmp_path/'whole', fit, **opt)
    after = rng_state()
    for i, place in enumerate(places):
        (folder := tmp_path/str(i)).mkdir()
        with pytest.raises(Killed): training(folder, fit, KillAt(*place), **opt)
        assert_same(training(folder, fit, resume=True, **opt), whole)
        assert same(rng_state(), after)  # whatever the script draws next


def test_killed_again_and_again(tmp_path):
    whole, rates = Rates(), [Rates() for _ in range(5)]
    for d in 'ab': (tmp_path/d).mkdir()
    want = training(tmp_path/'a', schedules['fine-tune'], whole)
    for i, place in enumerate([(1, 1), (2, 0), (2, 1), (2, 3)]):
        with pytest.raises(Killed): training(tmp_path/'b', schedules['fine-tune'], rates[i], KillAt(*place), resume=i > 0)
    assert_same(training(tmp_path/'b', schedules['fine-tune'], rates[4], resume=True), want)
    assert rates[4].epochs[-1] == whole.epochs[-1]


def test_an_end_that_had_been_reached_is_kept(tmp_path):
    "Killed after the fit, before the script had done the rest."
    whole = training(tmp_path, schedules['one-cycle'])
    assert_same(training(tmp_path, schedules['one-cycle'], resume=True), whole)


def test_best_weights_of_the_frozen_phase_survive_a_later_best(tmp_path):
    "The second fit starts from the best weights of the first, even when their file holds a later best by then."
    scores = [.5, .9, .1, .95, .2, .3, .4]
    def run(folder, *cbs, resume=False, skip=0):
        def fit(learn, cbs): learn.fine_tune(4, 1e-2, freeze_epochs=3, cbs=cbs)
        return training(folder, fit, *cbs, resume=resume, metrics=Written(scores[skip:]))
    for d in 'ab': (tmp_path/d).mkdir()
    whole = run(tmp_path/'a')

    class Full(Callback):
        "The first epoch of the second fit: the best weights are written, and nothing more."
        order = Checkpoint.order-1
        def after_epoch(self):
            if len(self.run_history.rows) == 4: raise Killed('here')
    with pytest.raises(Killed): run(tmp_path/'b', Full())
    resumed = run(tmp_path/'b', resume=True, skip=3)
    assert same(whole.model.state_dict(), resumed.model.state_dict()) and table(whole).equals(table(resumed))


def test_an_early_stop_in_the_frozen_phase(tmp_path):
    def fit(learn, cbs):
        stop = next(o for o in cbs if isinstance(o, EarlyStop))
        stop.patience = 2
        learn.fine_tune(3, 1e-2, freeze_epochs=9, cbs=cbs)
    def run(folder, *cbs, resume=False, skip=0):
        return training(folder, fit, *cbs, resume=resume, metrics=Written(([.9, .1, .1, .95, .96, .97])[skip:]))
    for d in 'ab': (tmp_path/d).mkdir()
    whole = run(tmp_path/'a')
    assert list(whole.run_history.to_frame().phase) == ['frozen']*3 + ['unfrozen']*3
    with pytest.raises(Killed): run(tmp_path/'b', KillAt(2, 1))
    assert_same(run(tmp_path/'b', resume=True, skip=4), whole)


def test_a_full_disk_says_so_and_the_last_state_stays(tmp_path, monkeypatch):
    fit, save, n = schedules['one-cycle'], torch.save, []
    def full(state, f):
        n.append(f.write(b'half a'))
        if len(n) == 3: raise OSError(28, 'No space left on device')
        f.seek(0); save(state, f)
    for d in 'ab': (tmp_path/d).mkdir()
    whole = training(tmp_path/'a', fit)
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError) as e: training(tmp_path/'b', fit)
    assert e.value.errno == 28 and e.value.filename == str(tmp_path/'b'/'checkpoint'/'state.pt')
    assert os.listdir(tmp_path/'b'/'checkpoint') == ['state.pt'] and load_checkpoint(tmp_path/'b'/'checkpoint'/'state.pt')['epochs'] == 2
    monkeypatch.undo()
    assert_same(training(tmp_path/'b', fit, resume=True), whole)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux')
def test_torch_reports_a_full_device(tmp_path):
    "Why the state is written to an open file: given a path, torch raises a RuntimeError about positions."
    with pytest.raises(OSError, match='No space left'), open('/dev/full', 'wb') as f: torch.save({'x': torch.zeros(300_000)}, f)


def test_predictions_validation_and_lr_find_are_no_fits(tmp_path):
    learn = tiny_learner(tmp_path)
    learn.add_cb(Checkpoint(tmp_path/'checkpoint'/'state.pt'))
    with quiet(learn):
        learn.validate(); learn.get_preds(); learn.lr_find(num_it=6, show_plot=False)
        assert learn.checkpoint.n_fits == 0 and not (tmp_path/'checkpoint').exists()
        learn.fit(2); learn.validate(); learn.fit(1)
    assert load_checkpoint(tmp_path/'checkpoint'/'state.pt')['fit'] == 2


def test_another_fit_is_refused(tmp_path):
    with pytest.raises(Killed): training(tmp_path, schedules['one-cycle'], KillAt(1, 2))
    with pytest.raises(ValueError, match='of a fit of 4 epochs and this one has 6'):
        training(tmp_path, lambda learn, cbs: learn.fit_one_cycle(6, cbs=cbs), resume=True)
    learn = tiny_learner(tmp_path)
    with quiet(learn), pytest.raises(ValueError, match="state for the callbacks .*'batch_mix'.* no such callback"):
        learn.fit(4, cbs=Checkpoint(tmp_path/'checkpoint'/'state.pt', resume=True))


def test_a_state_that_no_file_can_hold_is_refused_before_training(tmp_path):
    class Mine(Callback):
        def state_dict(self): return {'path': tmp_path}
        def load_state_dict(self, state): "Never called."
    class NotReached(Callback):
        def before_train(self): pytest.fail('trained')
    with pytest.raises(TypeError, match="callback 'mine' holds a PosixPath"): training(tmp_path, schedules['constant'], Mine(), NotReached())


def test_two_callbacks_of_one_name_keep_apart(tmp_path):
    stops = [EarlyStop(patience=5), EarlyStop('valid_loss', patience=7)]
    learn = tiny_learner(tmp_path)
    with quiet(learn): learn.fit(2, cbs=[*stops, Checkpoint(tmp_path/'checkpoint'/'state.pt')])
    again = [EarlyStop(patience=5), EarlyStop('valid_loss', patience=7)]
    learn = tiny_learner(tmp_path)
    with quiet(learn): learn.fit(2, cbs=[*again, Checkpoint(tmp_path/'checkpoint'/'state.pt', resume=True)])
    assert [o.state_dict() for o in again] == [o.state_dict() for o in stops] and again[0].best != again[1].best


def test_nothing_in_the_file_is_unpickled(tmp_path):
    training(tmp_path, schedules['constant'])
    state = torch.load(tmp_path/'checkpoint'/'state.pt', weights_only=True)
    assert state['fit'] == 1 and state['ended']
    (bad := tmp_path/'bad').mkdir()
    torch.save({'format': 1, 'path': tmp_path}, bad/'state.pt')
    with pytest.raises(ValueError, match='damaged or is no checkpoint'): load_checkpoint(bad/'state.pt')
    torch.save({'format': 2}, bad/'state.pt')
    with pytest.raises(ValueError, match='of this version'): load_checkpoint(bad/'state.pt')


def test_generators(tmp_path):
    def draw(): return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()
    random.gauss(0, 1); np.random.randn()  # both keep a second normal for the next call
    torch.save(rng_state(), tmp_path/'rng.pt')
    first = draw()
    set_rng_state(torch.load(tmp_path/'rng.pt', weights_only=True))
    assert draw() == first


def test_a_state_needs_no_callback(tmp_path):
    "The two functions alone, between two fits."
    a, b = tiny_learner(tmp_path), tiny_learner(tmp_path, seed=1)
    with quiet(a), quiet(b):
        a.fit(2); b.fit(1)
        torch.save(training_state(a), tmp_path/'s.pt')
        load_training_state(b, torch.load(tmp_path/'s.pt', weights_only=True))
        b.fit(1)
        after = b.model.state_dict()
        load_training_state(a, torch.load(tmp_path/'s.pt', weights_only=True))
        a.fit(1)
    assert same(a.model.state_dict(), after)



# Run folders


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Weights to fine-tune from, without a model hub."
    file = tmp_path_factory.mktemp('weights')/'test_resnet.safetensors'
    torch.manual_seed(3)
    save_file(timm.create_model('test_resnet', pretrained=False).state_dict(), file)
    return str(file)


@pytest.fixture
def recipe(tiny, weights, monkeypatch):
    monkeypatch.setattr('mstoolkit.train._draw', lambda *a: None)  # pictures take longer than these trainings
    def make(**kw):
        given = dict(weights_file=weights, freeze_epochs=2) if kw.get('schedule') == 'fine-tune' else {}
        return Recipe(**{**tiny, 'epochs': 3, 'lr': 1e-2, 'augment': 'light', 'restart_epochs': 1, 'plateau_patience': 0, 'mixup': .4,
                         'memory_format': 'contiguous', 'precision': 'fp32', **given, **kw})
    return make


def assert_same_runs(a, b):
    "Weights in memory and in the file, the table, what the best model says."
    assert same(a.model.state_dict(), b.model.state_dict()) and same(a.opt.state_dict(), b.opt.state_dict())
    files = [load_file(o.path/'model.safetensors') for o in (a, b)]
    assert same(*files)
    tables = [pd.read_csv(o.path/'history.csv').drop(columns=['seconds', 'data_wait']) for o in (a, b)]
    assert tables[0].equals(tables[1]) and tables[0].epoch.is_unique
    assert (a.path/'valid_predictions.csv').read_bytes() == (b.path/'valid_predictions.csv').read_bytes()
    envs = [json.loads((o.path/'environment.json').read_text()) for o in (a, b)]
    assert all(envs[0][k] == envs[1][k] for k in ('best_accuracy', 'best_epoch', 'epochs', 'stopped'))
    assert sorted(p.name for p in a.path.iterdir()) == sorted(p.name for p in b.path.iterdir())  # no checkpoint is left


@pytest.mark.parametrize('schedule', train_schedules)
def test_every_schedule_with_and_without_workers(schedule, recipe, image_folder, tmp_path, capsys):
    r, place = recipe(schedule=schedule), (2, 1) if schedule == 'fine-tune' else (1, 2)
    whole = train(r, image_folder, tmp_path/'whole')
    for n in 0, 2:
        with pytest.raises(Killed): train(replace(r, num_workers=n), image_folder, tmp_path/f'{n}', cbs=[KillAt(*place)])
        out = capsys.readouterr().out
        assert out.splitlines()[-1].endswith(f"mstoolkit train --resume {tmp_path/f'{n}'}")
        assert_same_runs(resume_run(tmp_path/f'{n}'), whole)  # the workers' number changes nothing either


def test_early_stop_channels_last_and_sgd(recipe, image_folder, tmp_path):
    r = recipe(epochs=9, lr=1e-5, stop_patience=1, memory_format='channels-last', opt='sgd', cutmix=0., mixup=0.)
    whole = train(r, image_folder, tmp_path/'a')
    assert len(whole.run_history.rows) < 9
    with pytest.raises(Killed): train(r, image_folder, tmp_path/'b', cbs=[KillAt(1, 1)])
    assert_same_runs(resume_run(tmp_path/'b'), whole)


@pytest.mark.parametrize('schedule', ['constant', 'fine-tune'])
def test_batches_whose_gradients_make_one_step(schedule, recipe, image_folder, tmp_path):
    r = recipe(schedule=schedule, accumulate=2) # of three batches in an epoch
    whole = train(r, image_folder, tmp_path/'a')
    with pytest.raises(Killed): train(r, image_folder, tmp_path/'b', cbs=[KillAt(*((2, 1) if schedule == 'fine-tune' else (1, 2)))])
    assert_same_runs(resume_run(tmp_path/'b'), whole)


@pytest.mark.parametrize('way', [('fp32', 'channels-last'), ('bf16', 'contiguous'), ('bf16', 'channels-last')])
def test_the_measured_arithmetic_is_kept(way, recipe, image_folder, tmp_path, monkeypatch):
    r = recipe(memory_format='auto', precision='auto')
    monkeypatch.setattr('mstoolkit.models.arithmetic.cpu_has_bf16', lambda: True)
    monkeypatch.setattr('mstoolkit.callback.speed.trial', lambda x, n, k, share: (x, 1))
    monkeypatch.setattr('mstoolkit.callback.speed.time_ways', lambda step, ways, n, **kw: {w: [.5 if w == way else 1.] for w in ways})
    whole = train(r, image_folder, tmp_path/'a')
    with pytest.raises(Killed): train(r, image_folder, tmp_path/'b', cbs=[KillAt(1, 1)])
    monkeypatch.setattr('mstoolkit.callback.speed.time_ways', lambda *a, **kw: pytest.fail('measured again'))
    assert_same_runs(resume_run(tmp_path/'b'), whole)
    named = train(recipe(precision=way[0], memory_format=way[1]), image_folder, tmp_path/'c')  # what was chosen can be named
    assert_same_runs(named, whole)
    envs = [json.loads((tmp_path/o/'environment.json').read_text()) for o in 'abc']
    assert all((e['precision'], e['memory_format']) == way for e in envs) and ' '.join(way) in envs[1]['seconds_a_step']


script = """
import os, signal, sys
from fastai.callback.core import Callback
from mstoolkit.recipe import load_recipe
from mstoolkit.train import train

class Kill(Callback):
    def after_batch(self):
        if self.epoch == 1 and self.iter == 1: os.kill(os.getpid(), signal.SIGKILL)

train(load_recipe(sys.argv[1]), sys.argv[2], sys.argv[3], cbs=[Kill()])
"""


def test_killed_for_real(recipe, image_folder, tmp_path, capsys):
    "SIGKILL in the middle of an epoch, with loader processes at work; then the command line."
    r = recipe(num_workers=2)
    r.save(tmp_path/'r.toml')
    env = os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(tmp_path/'r.toml'), str(image_folder), str(tmp_path/'b')], env=env)
    assert done.returncode == -signal.SIGKILL
    (tmp_path/'b'/'checkpoint'/'.state.pt.1-abc.tmp').write_bytes(b'half')  # a kill while it was written
    assert main(['train', '--resume', str(tmp_path/'b')]) == 0
    assert 'going on after epoch 1' in capsys.readouterr().out
    whole = train(r, image_folder, tmp_path/'a')
    assert same(load_file(tmp_path/'b'/'model.safetensors'), load_file(whole.path/'model.safetensors'))
    assert not (tmp_path/'b'/'checkpoint').exists()


def test_a_full_disk(recipe, image_folder, tmp_path, monkeypatch, capsys):
    r, save, n = recipe(), torch.save, []
    r.save(tmp_path/'r.toml')
    def full(state, f):
        n.append(1)
        if len(n) > 1: raise OSError(28, 'No space left on device')
        save(state, f)
    monkeypatch.setattr(torch, 'save', full)
    assert main(['train', str(image_folder), '--recipe', str(tmp_path/'r.toml'), '--out', str(tmp_path/'b')]) == 2
    out, err = capsys.readouterr()
    assert 'cannot write: No space left on device' in err and 'state.pt' in err and len(err.splitlines()) == 1
    assert f"--resume {tmp_path/'b'}" in out.splitlines()[-1]
    monkeypatch.setattr(torch, 'save', save)
    assert_same_runs(resume_run(tmp_path/'b'), train(r, image_folder, tmp_path/'a'))


def test_a_file_that_vanishes(recipe, image_folder, tmp_path):
    file = image_folder/'train'/'10'/'3.png'
    pixels, r = file.read_bytes(), recipe()
    class Vanish(Callback):
        def after_epoch(self): file.unlink(missing_ok=True)
    with pytest.raises(ValueError, match='10/3.png cannot be read'): train(r, image_folder, tmp_path/'b', cbs=[Vanish()])
    with pytest.raises(ValueError, match='has changed since the run began: 24 training .* then, 23 training .* now'): resume_run(tmp_path/'b')
    file.write_bytes(pixels)
    assert_same_runs(resume_run(tmp_path/'b'), train(r, image_folder, tmp_path/'a'))


def test_data_that_moved_and_options_that_were_given(recipe, image_folder, tmp_path, monkeypatch):
    rows = [(f'{s}/{c}/{i}.png', c, s) for s, n in (('train', 8), ('val', 4)) for c in ('2', '10') for i in range(n)]
    table = pd.DataFrame(rows, columns=['path', 'label', 'split'])
    table.to_csv(tmp_path/'some.csv', index=False)
    monkeypatch.chdir(tmp_path)
    r = recipe()
    whole = train(r, 'data', 'a', csv='some.csv')
    with pytest.raises(Killed): train(r, 'data', 'b', csv='some.csv', cbs=[KillAt(1, 1)])
    with pytest.raises(Killed): train(r, 'data', 'c', csv=table, cbs=[KillAt(1, 1)])
    (tmp_path/'elsewhere').mkdir()
    image_folder.rename(tmp_path/'moved')
    monkeypatch.chdir(tmp_path/'elsewhere')
    with pytest.raises(FileNotFoundError, match='data'): resume_run('../b')
    resumed = resume_run('../b', '../moved')
    whole.path = tmp_path/'a'
    assert_same_runs(resumed, whole)
    kept = (tmp_path/'c'/'data.csv').read_text()                            # a table in memory was written down
    (tmp_path/'c'/'data.csv').write_text('\n'.join(kept.splitlines()[:-1]))
    with pytest.raises(ValueError, match='has changed'): resume_run('../c', '../moved')
    (tmp_path/'c'/'data.csv').write_text(kept)
    assert len(resume_run('../c', '../moved').run_history.rows) == 3


def test_what_cannot_be_resumed(recipe, image_folder, tmp_path, capsys):
    r = recipe()
    def resume(run, *options):
        assert main(['train', '--resume', str(run), *options]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        return err
    train(r, image_folder, tmp_path/'done')
    assert 'has ended well, after 3 epochs: there is nothing to resume' in resume(tmp_path/'done')
    assert 'for a longer training start another one' in resume(tmp_path/'done')
    assert 'there is no folder' in (err := resume(tmp_path/'none')) and 'give the command that began it again' in err
    assert 'is not a run folder' in resume(image_folder)
    with pytest.raises(KeyboardInterrupt): train(r, image_folder, tmp_path/'b', cbs=[Interrupt()])
    assert f"--resume {tmp_path/'b'}" in capsys.readouterr().out.splitlines()[-1]
    assert 'leave out --lr' in resume(tmp_path/'b', '--lr', '1e-3')
    assert 'leave out --out' in resume(tmp_path/'b', '--out', 'c')
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, '-c', hold, str(tmp_path/'b'/'checkpoint'/'lock')], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b'held\n'
        assert 'another process is at work in' in resume(tmp_path/'b')
        other.stdin.close()
    (image_folder/'val'/'2'/'0.png').rename(image_folder/'val'/'2'/'new.png')
    assert '12 validation images of 3 classes as before, but of other names or labels' in resume(tmp_path/'b')
    (image_folder/'val'/'2'/'new.png').rename(image_folder/'val'/'2'/'0.png')
    same = (image_folder/'val'/'2'/'1.png').read_bytes()
    (image_folder/'val'/'2'/'1.png').write_bytes(same[:-20]+bytes([same[-20] ^ 1])+same[-19:])
    assert 'the same names, other content' in resume(tmp_path/'b')
    (image_folder/'val'/'2'/'1.png').write_bytes(same)
    assert main(['train']) == 2 and 'folder of images, or --resume' in capsys.readouterr().err


def test_a_budget_that_is_used_up_is_refused_and_nothing_is_lost(recipe, image_folder, tmp_path, capsys):
    r, run = recipe(epochs=0, minutes=.5), tmp_path/'run'
    with pytest.raises(KeyboardInterrupt): train(r, image_folder, run, cbs=[Interrupt()])
    left = {o: o.read_bytes() for o in run.rglob('*') if o.is_file()}
    used = minutes_used(run)
    assert 0 < used < .5 and main(['train', '--resume', str(run), '--minutes', str(used/2)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and f"has used {used:.2g} minutes" in err and 'or none to go on with the 0.5' in err
    assert left == {o: o.read_bytes() for o in run.rglob('*') if o.is_file()}
    resume_run(run, minutes=used + .05)
    assert not (run/'checkpoint').exists() and load_recipe(run/'recipe.toml').minutes == used + .05


class Interrupt(Callback):
    "Ctrl-C in the second epoch, or another, counted from 0."
    def __init__(self, at=1): self.at = at
    def after_batch(self):
        if self.epoch == self.at: raise KeyboardInterrupt


def test_a_run_stopped_in_its_first_epoch_says_that_nothing_is_kept(recipe, image_folder, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt): train(recipe(), image_folder, tmp_path/'run', cbs=[Interrupt(0)])
    assert capsys.readouterr().out.splitlines()[-1] == 'stopped before an epoch had ended: nothing is kept'
    assert not list((tmp_path/'run').glob('*'))


def test_a_run_killed_in_its_first_epoch_begins_anew_in_place(recipe, image_folder, tmp_path, capsys):
    r = recipe()
    whole = train(r, image_folder, tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): train(r, image_folder, tmp_path/'run', cbs=[Interrupt()])
    shutil.rmtree(tmp_path/'run'/'checkpoint')  # as if it had been the first
    again = resume_run(tmp_path/'run')
    assert 'no epoch had ended: from the start' in capsys.readouterr().out
    assert_same_runs(again, whole)


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_write(sig, tmp_path):
    before, done = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)), []
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            with signals_wait():
                for _ in range(3): signal.raise_signal(sig)
                done.append('written')
        assert done == ['written'] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with signals_wait(), pytest.raises(OSError): raise OSError  # an error goes its way
    finally: signal.signal(signal.SIGTERM, before)


def test_a_run_that_ended_no_epoch_leaves_nothing(recipe, image_folder, tmp_path, capsys):
    with pytest.raises(Killed): train(recipe(), image_folder, tmp_path/'runs'/'b', cbs=[KillAt(1, 0)])
    assert not (tmp_path/'runs').exists() and '--resume' not in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.parametrize('mode', ['fp16', 'bf16', 'fp32'])
def test_on_a_gpu(mode, tmp_path):
    from fastai.callback.fp16 import MixedPrecision
    def run(folder, *cbs, resume=False):
        learn = tiny_learner(folder, cbs=[] if mode == 'fp32' else [MixedPrecision(amp_mode=mode)], **torch_adam)
        learn.dls.to('cuda')
        with quiet(learn): learn.fit_one_cycle(4, 1e-2, cbs=[Checkpoint(folder/'checkpoint'/'state.pt', resume=resume), Dropping(), *cbs])
        return learn
    for d in 'ab': (tmp_path/d).mkdir()
    whole = run(tmp_path/'a')
    with pytest.raises(Killed): run(tmp_path/'b', KillAt(1, 2))
    if mode == 'fp16': assert load_checkpoint(tmp_path/'b'/'checkpoint'/'state.pt')['learner']['scaler']['_growth_tracker'] > 0
    assert same(whole.model.state_dict(), run(tmp_path/'b', resume=True).model.state_dict())


@pytest.mark.parametrize('files', [('recipe',), ('recipe', 'source'), ('recipe', 'source', 'env'), ()])
def test_a_run_killed_at_its_beginning_does_not_block_its_name(files, recipe, image_folder, tmp_path, capsys):
    r, run = recipe(), tmp_path/'run'
    whole = train(r, image_folder, tmp_path/'whole')
    (run/'checkpoint').mkdir(parents=True), (run/'checkpoint'/'lock').touch(), (run/'.environment.json.123.tmp').touch()
    for o in files: shutil.copy(run_file(whole.path, o), run_file(run, o))
    assert_same_runs(train(r, image_folder, run), whole)
    with pytest.raises(ValueError, match='already exists'): train(r, image_folder, run)
    shutil.rmtree(run), (run/'checkpoint').mkdir(parents=True)
    for o in files: shutil.copy(run_file(whole.path, o), run_file(run, o))
    r.save(tmp_path/'r.toml')
    assert main(['train', str(image_folder), '--recipe', str(tmp_path/'r.toml'), '--out', str(run)]) == 0
    (tmp_path/'mine').mkdir(), shutil.copy(run/'recipe.toml', tmp_path/'mine'), (tmp_path/'mine'/'notes.txt').touch()
    with pytest.raises(ValueError, match='already exists'): train(r, image_folder, tmp_path/'mine')
    (tmp_path/'mine'/'notes.txt').unlink()
    with pytest.raises(ValueError, match='already exists'): train(replace(r, lr=.5), image_folder, tmp_path/'mine')
