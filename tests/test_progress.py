"The run's table, its lines in a log and a terminal, and its curves."
import io
import os
import pty
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.learner import Recorder, load_learner
from fastai.metrics import accuracy, error_rate
from mstoolkit.callback.mix import BatchMix
from mstoolkit.callback.progress import RunHistory, TrainProgress
from mstoolkit.callback.tracker import EarlyStop, PlateauLR
from mstoolkit.evaluate.interpret import history_frame, plot_curves
from test_tracker import Written
from tiny import Items, quiet, tiny_learner


def run(learn, *a, how='fine_tune', cbs=(), **kw):
    with quiet(learn): getattr(learn, how)(*a, cbs=list(cbs), **kw)
    return learn


def test_rows_agree_with_the_recorder_and_span_phases():
    learn, seen = tiny_learner(cbs=RunHistory(), metrics=[accuracy, error_rate]), []

    class Spy(Callback):
        order = 53
        def after_epoch(self): seen.append(list(self.recorder.values[-1]))
    run(learn, 3, freeze_epochs=2, cbs=[Spy(), BatchMix(0., 1., off_epochs=1, seed=0)])
    df = learn.run_history.to_frame()
    assert df.columns.tolist() == ['phase', 'epoch', 'train_loss', 'valid_loss', 'train_accuracy', 'mixed', 'accuracy', 'error_rate', 'lr_0', 'lr_1',
                                   'seconds', 'data_wait']
    assert df.phase.tolist() == ['frozen']*2 + ['unfrozen']*3 and df.epoch.tolist() == [1, 2, 3, 4, 5] and df.mixed.tolist() == [True]*4 + [False]
    assert df[['train_loss', 'valid_loss', 'accuracy', 'error_rate']].values.tolist() == seen
    assert df.data_wait.between(0, 1).all() and (df.seconds > 0).all()
    run(learn, 1, how='fit')
    assert len(learn.run_history.rows) == 6


def test_phase_of_a_plain_fit_and_train_metrics():
    learn = tiny_learner(cbs=RunHistory())
    learn.remove_cb(Recorder); learn.add_cb(Recorder(train_metrics=True))
    run(learn, 1, how='fit')
    row = learn.run_history.rows[0]
    assert row['phase'] == 'fit' and row['train_accuracy'] == learn.recorder.values[0][1] and row['accuracy'] == learn.recorder.values[0][3]


def test_train_accuracy_and_rates_are_those_of_the_steps():
    learn, hits, lrs = tiny_learner(cbs=RunHistory(), metrics=Written([.5]*3)), [], []

    class Spy(Callback):
        order = 20
        def after_step(self): lrs.append([h['lr'] for h in self.opt.hypers])
        def after_batch(self):
            if self.training: hits.append((self.pred.argmax(1) == self.y).float().mean().item())
    run(learn, 3, how='fit', cbs=[Spy(), PlateauLR(patience=0)])
    rows = learn.run_history.rows
    assert [r['train_accuracy'] for r in rows] == pytest.approx([np.mean(hits[i:i+3]) for i in (0, 3, 6)])
    assert [[r['lr_0'], r['lr_1']] for r in rows] == lrs[2::3] and lrs[-1][0] == pytest.approx(1e-3/4)


class SlowItems(Items):
    def __getitem__(self, i): time.sleep(.012); return super().__getitem__(i)


def test_data_wait(capsys):
    learn = tiny_learner(cbs=RunHistory())
    learn.dls.loaders[0] = learn.dls.train.new(dataset=SlowItems(learn.dls.train.dataset))
    start = time.perf_counter()
    run(learn, 3, how='fit')
    total = time.perf_counter() - start
    rows = learn.run_history.rows
    assert all(r['data_wait'] > .7 for r in rows) and sum(r['seconds'] for r in rows) <= total
    assert capsys.readouterr().out.count('of the training time went into waiting for data') == 1

    learn = tiny_learner(cbs=RunHistory(max_wait=1.))  # whoever knows may raise the bar
    learn.dls.loaders[0] = learn.dls.train.new(dataset=SlowItems(learn.dls.train.dataset))
    run(learn, 2, how='fit')
    assert 'waiting' not in capsys.readouterr().out

    class SlowStep(Callback):
        def after_pred(self): time.sleep(.03)
        def after_batch(self): time.sleep(.01)
    learn = tiny_learner(cbs=[RunHistory(), SlowStep()])
    run(learn, 2, how='fit')
    assert all(r['data_wait'] < .4 for r in learn.run_history.rows) and 'waiting' not in capsys.readouterr().out


def test_what_is_no_training_leaves_no_row():
    learn = tiny_learner(cbs=RunHistory())
    with quiet(learn):
        learn.lr_find(num_it=8, show_plot=False); learn.validate(); learn.get_preds()
        assert learn.run_history.rows == []
        learn.fit(3, start_epoch=2)
        learn.validate(); learn.get_preds(ds_idx=0); learn.tta(n=1) if hasattr(learn.dls[1].dataset, 'set_split_idx') else None
    assert len(learn.run_history.rows) == 1


def test_cancelled_epochs():
    class Cancel(Callback):
        def __init__(self, exc): self.exc = exc
        def before_batch(self):
            if self.training and self.iter == 1: raise self.exc
    learn = run(tiny_learner(cbs=RunHistory()), 1, how='fit', cbs=[Cancel(CancelTrainException())])
    assert learn.run_history.rows[0]['valid_loss'] is None and len(learn.run_history.rows) == 1
    learn = run(tiny_learner(cbs=RunHistory()), 1, how='fit', cbs=[Cancel(CancelFitException())])
    assert learn.run_history.rows == []


def test_csv_state_and_export(tmp_path):
    learn = run(tiny_learner(tmp_path, cbs=RunHistory(tmp_path/'h'/'history.csv')), 2)
    df = pd.read_csv(tmp_path/'h'/'history.csv')
    pd.testing.assert_frame_equal(df, learn.run_history.to_frame(), check_exact=False)
    assert [o.name for o in (tmp_path/'h').iterdir()] == ['history.csv']
    again = RunHistory(); again.load_state_dict(learn.run_history.state_dict())
    more = run(tiny_learner(cbs=again), 1, how='fit')
    assert [r['epoch'] for r in more.run_history.rows] == [1, 2, 3, 4] and len(learn.run_history.rows) == 3
    with quiet(learn): learn.export('l.pkl')
    with pytest.warns(UserWarning, match='pickle'): assert len(load_learner(tmp_path/'l.pkl').run_history.rows) == 3


def test_regression_has_no_train_accuracy():
    learn = tiny_learner(cbs=RunHistory(), loss_func=torch.nn.MSELoss(), metrics=[])
    learn.dls.train.dataset[:] = [(x, torch.zeros(3)) for x, _ in learn.dls.train.dataset]
    run(learn, 1, how='fit')
    assert learn.run_history.rows[0]['train_accuracy'] is None and len(plot_curves(learn).axes) == 3


class Ends(Callback):
    order = 99
    def __init__(self, exc): self.exc = exc
    def after_batch(self): raise self.exc


@pytest.mark.parametrize('exc', [KeyboardInterrupt(), RuntimeError('boom')])
def test_progress_goes_as_it_came(exc):
    learn, out = tiny_learner(), io.StringIO()
    before = {type(cb) for cb in learn.cbs}
    try: learn.fit(1, cbs=[TrainProgress(out), Ends(exc)])
    except (KeyboardInterrupt, RuntimeError): pass
    assert {type(cb) for cb in learn.cbs} == before | {RunHistory} and learn.logger is print


def test_lines_in_a_log(capsys):
    learn, out = tiny_learner(), io.StringIO()
    learn.fine_tune(3, freeze_epochs=2, cbs=[TrainProgress(out), BatchMix(0., 1., seed=0), EarlyStop(patience=50)])
    head, *lines = out.getvalue().splitlines()
    assert head.split() == ['epoch', 'phase', 'train_loss', 'valid_loss', 'train_accuracy', 'accuracy', 'lr', 'time', 'left']
    assert [o.split()[:2] for o in lines] == [['1/2', 'frozen'], ['2/2', 'frozen'], ['3/5', 'unfrozen'], ['4/5', 'unfrozen'], ['5/5', 'unfrozen']]
    assert all(' mix ' in o for o in lines) and len({len(o) for o in (head, *lines)}) == 1
    assert capsys.readouterr().out == '' and '\x1b' not in out.getvalue() and '\r' not in out.getvalue()
    learn.lr_find(num_it=8, show_plot=False)
    assert len(out.getvalue().splitlines()) == 6


def test_on_the_learner_for_good():
    out = io.StringIO()
    learn = tiny_learner(cbs=TrainProgress(out))
    learn.fit(1); learn.validate(); learn.get_preds(); learn.fit(1)
    assert len(out.getvalue().splitlines()) == 3 and not hasattr(learn, 'progress')


script = """
import sys
sys.path.insert(0, {tests!r})
from tiny import tiny_learner
from mstoolkit.callback.progress import TrainProgress
tiny_learner().fit(2, cbs=TrainProgress())
"""


def test_a_pipe_gets_lines_and_a_terminal_a_bar(tmp_path):
    args = [sys.executable, '-W', 'ignore', '-c', script.format(tests=os.path.dirname(__file__))]
    out = subprocess.run(args, capture_output=True, text=True, check=True).stdout
    assert [o.split()[0] for o in out.splitlines()] == ['epoch', '1/2', '2/2'] and '\x1b' not in out
    parent, child = pty.openpty()
    p, data = subprocess.Popen(args, stdout=child, stderr=child, env={**os.environ, 'TERM': 'xterm-256color'}), b''
    os.close(child)
    while True:
        try: chunk = os.read(parent, 4096)
        except OSError: break
        if not chunk: break
        data += chunk
    assert p.wait() == 0
    text = data.decode()
    assert 'training' in text and 'validating' in text and '3/3' in text and '2/2' in text and text.count('train_loss') == 1


def labels(ax): return [t.get_text() for t in ax.get_legend().get_texts()]


def test_curves(tmp_path):
    learn = tiny_learner(tmp_path, cbs=RunHistory(tmp_path/'history.csv'))
    run(learn, 4, freeze_epochs=2, cbs=[BatchMix(0., 1., seed=0)])
    df = learn.run_history.to_frame()
    for source in (learn, learn.run_history, df, tmp_path/'history.csv', str(tmp_path/'history.csv')):
        fig = plot_curves(source)
        loss, acc, lr = fig.axes
        assert [ax.get_xlabel() for ax in fig.axes] == ['epoch']*3 and all(ax.get_ylabel() for ax in fig.axes)
        assert labels(loss) == ['body frozen', 'training', 'validation']
        assert labels(acc)[:3] == ['body frozen', 'training, λ-weighted where mixed', 'validation accuracy']
        assert labels(acc)[3] == f'best: epoch {df.accuracy.idxmax()+1}, accuracy {df.accuracy.max():.4f}'
        assert labels(lr) == ['body frozen', 'group 0', 'group 1 (head)'] and lr.get_yscale() == 'log'
        np.testing.assert_allclose(acc.lines[1].get_ydata(), df.accuracy)
    fig.savefig(tmp_path/'curves.png')


def test_curves_straight_after_any_fit():
    learn = tiny_learner()
    with pytest.raises(ValueError, match='nothing to show yet'): plot_curves(learn)
    run(learn, 3)
    df = history_frame(learn)
    assert len(df) == 3 and df.accuracy.tolist() == [v[2] for v in learn.recorder.values] and df.lr_0.iloc[-1] == learn.recorder.lrs[-1]
    assert 'training, λ-weighted where mixed' not in labels(plot_curves(learn).axes[1])
    run(learn, 1, how='fit')
    assert len(plot_curves(learn, monitor='valid_loss').axes) == 3


def test_curves_with_gaps_and_without_accuracy():
    learn = run(tiny_learner(metrics=[], cbs=RunHistory()), 1, how='fit')
    assert labels(plot_curves(learn).axes[1])[-1].startswith('best: epoch 1, valid loss')
    nothing = [None, None]
    df = pd.DataFrame({'phase': 'fit', 'epoch': [1, 2], 'train_loss': [1., .5], 'valid_loss': nothing, 'accuracy': nothing, 'lr_0': [1e-3, 1e-4]})
    assert len(plot_curves(df).axes) == 3
