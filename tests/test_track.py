"What tools that keep runs were told, read back and compared with the run's own table."
import json
import sqlite3
import struct

import pandas as pd
import pytest
from tiny import quiet, tiny_learner

from mstoolkit.callback.progress import RunHistory
from mstoolkit.callback.track import Track, check_trackers
from mstoolkit.recipe import Recipe
from mstoolkit.runs import run_file
from mstoolkit.train import resume_run, train

COLUMNS = 'train_loss', 'valid_loss', 'accuracy', 'lr_0', 'seconds', 'data_wait'



def run(image_folder, tmp_path, tiny, *to):
    r = Recipe(**tiny | dict(epochs=2), track=to)
    train(r, image_folder, tmp_path/'run')
    return tmp_path/'run', pd.read_csv(run_file(tmp_path/'run', 'history'))


def compare(history, found, columns=COLUMNS):
    "`found`: column → [(epoch, value)]."
    for c in columns:
        assert [step for step, _ in found[c]] == history.epoch.tolist(), c
        assert [v for _, v in found[c]] == pytest.approx(history[c].tolist(), rel=1e-5), c
    assert all(v > 0 for _, v in found['images_per_second'])


def test_tensorboard(image_folder, tmp_path, tiny):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder, history = run(image_folder, tmp_path, tiny, 'tensorboard')
    events = EventAccumulator(str(folder/'tensorboard')).Reload()
    compare(history, {k: [(e.step, e.value) for e in events.Scalars(k)] for k in events.Tags()['scalars']})
    text = events.Tensors('parameters/text_summary')[0].tensor_proto.string_val[0].decode()
    assert 'backbone = test_resnet' in text and 'data_train = 24' in text
    assert events.Tags()['images'] == ['curves']


def wandb_records(data):
    "The records of an offline run: LevelDB's log, blocks of 32 KB with records of checksum, length and kind, behind a header of 7 bytes."
    at, parts = 7, b''
    while at + 7 <= len(data):
        length, kind = struct.unpack_from('<HB', data, at+4)
        if 32768 - at % 32768 < 7 or not kind:
            at += 32768 - at % 32768
            continue
        parts += data[at+7:at+7+length]
        at += 7 + length
        if kind in (1, 4): # whole, or the last of several
            yield parts
            parts = b''


def test_wandb_offline(image_folder, tmp_path, tiny, monkeypatch):
    pytest.importorskip('wandb')
    for k in 'WANDB_API_KEY', 'WANDB_MODE': monkeypatch.delenv(k, raising=False)
    folder, history = run(image_folder, tmp_path, tiny, 'wandb')
    from wandb.proto.wandb_internal_pb2 import Record
    (file,) = folder.glob('wandb/offline-run-*/run-*.wandb')
    found, config, artifacts = {}, {}, []
    for data in wandb_records(file.read_bytes()):
        r = Record()
        r.ParseFromString(data)
        row = {(i.key or '/'.join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
        for k, v in row.items(): found.setdefault(k, []).append((row['_step'], v))
        config |= {i.key: json.loads(i.value_json) for u in (r.run.config, r.config) for i in u.update}
        if r.HasField('artifact'): artifacts.append(r.artifact)
    compare(history, found)
    assert config['backbone'] == 'test_resnet' and config['data_train'] == 24
    (kept,) = artifacts
    assert kept.type == 'model' and {'model.safetensors', 'history.csv', 'curves.png'} <= {e.path for e in kept.manifest.contents}


@pytest.mark.filterwarnings('default') # its own
def test_mlflow_database(image_folder, tmp_path, tiny, monkeypatch):
    pytest.importorskip('mlflow', reason='no release of MLflow goes with the pinned protobuf and pandas')
    from mlflow.tracking import MlflowClient
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    folder, history = run(image_folder, tmp_path, tiny, 'mlflow')
    client = MlflowClient(f"sqlite:///{folder/'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name('mstoolkit').experiment_id])
    each = {k: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, k)] for k in found.data.metrics}
    compare(history, each)
    assert found.data.params['backbone'] == 'test_resnet'
    assert 'model.safetensors' in {f.path for f in client.list_artifacts(found.info.run_id)} and any((folder/'mlruns').rglob('model.safetensors'))


def test_trackio(image_folder, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path/'trackio')) # which it reads when it is imported
    pytest.importorskip('trackio', reason='no release of Trackio goes with the pinned packages')
    _, history = run(image_folder, tmp_path, tiny, 'trackio')
    with sqlite3.connect(tmp_path/'trackio'/'mstoolkit.db') as db:
        rows = [(step, json.loads(values)) for step, values in db.execute('select step, metrics from metrics order by step')]
        assert 'test_resnet' in str(db.execute('select config from configs').fetchall())
    compare(history, {k: [(step, v[k]) for step, v in rows] for k in rows[0][1]})
    assert any(f.read_bytes() == (tmp_path/'run'/'model.safetensors').read_bytes() for f in (tmp_path/'trackio').rglob('*') if f.is_file())


def test_a_resumed_run_counts_on(image_folder, tmp_path, tiny):
    pytest.importorskip('tensorboard')
    from fastai.callback.core import Callback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class StopAfter(Callback):
        order = 200
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt

    r, out = Recipe(**tiny | dict(epochs=4), track=('tensorboard',)), tmp_path/'run'
    with pytest.raises(KeyboardInterrupt): train(r, image_folder, out, cbs=[StopAfter()])
    resume_run(out)
    history = pd.read_csv(run_file(out, 'history'))
    events = EventAccumulator(str(out/'tensorboard')).Reload()
    compare(history, {k: [(e.step, e.value) for e in events.Scalars(k)] for k in events.Tags()['scalars']}, COLUMNS[:4])


def test_only_the_first_process_tells(tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    track = Track('tensorboard', tmp_path)
    learn = tiny_learner(cbs=[RunHistory(), track])
    learn.to_detach = lambda b, cpu=True, gather=True: b  # nobody is there to gather from
    monkeypatch.setattr('fastai.torch_core.num_distrib', lambda: 0)
    with quiet(learn): learn.fit(1)
    track.finish()
    assert not list(tmp_path.iterdir())


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'wandb'"): Recipe(track=('wandbb',))
    with pytest.raises(ValueError, match='Known: mlflow, tensorboard, trackio, wandb'): check_trackers(['x'])
    monkeypatch.setattr('mstoolkit.callback.track.find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"mlflow is not installed: pip install 'mstoolkit\[mlflow\]'"): check_trackers(['mlflow'])
    monkeypatch.undo()
    pytest.importorskip('tensorboard')
    learn = tiny_learner(cbs=[Track('tensorboard', tmp_path)])
    with quiet(learn), pytest.raises(ValueError, match='RunHistory'): learn.fit(1)
