"Images in tables: saved data sets, Parquet shards, tars and streams, beside the folder they were made from."
import io
import json
import os
import signal
import socket
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

datasets = pytest.importorskip('datasets')
pytestmark = [pytest.mark.filterwarnings('ignore::DeprecationWarning'), pytest.mark.filterwarnings('ignore::ResourceWarning'),
              pytest.mark.filterwarnings('ignore:This DataLoader will create:UserWarning')] # more than there are processors

from fastai.callback.core import Callback  # noqa: E402
from forked import Child  # noqa: E402

from mstoolkit.callback.distributed import Share, join_processes  # noqa: E402
from mstoolkit.cli import main  # noqa: E402
from mstoolkit.core import RunError, file_digest  # noqa: E402
from mstoolkit.data.check import check_data  # noqa: E402
from mstoolkit.data.core import image_dls, stream_of  # noqa: E402
from mstoolkit.data.image import ImageError, read_image  # noqa: E402
from mstoolkit.data.make import pack_images  # noqa: E402
from mstoolkit.data.sources import DataSource, data_source, source_samples  # noqa: E402
from mstoolkit.data.tables import TableImage, find_tables  # noqa: E402
from mstoolkit.evaluate.gain import labelled_images  # noqa: E402
from mstoolkit.recipe import Recipe  # noqa: E402
from mstoolkit.runs import read_predictions, run_file  # noqa: E402
from mstoolkit.train import train  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Data sets are cached where nobody else's are, and nothing is asked of a network."
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True, raising=False)


@pytest.fixture
def shards(image_folder, tmp_path):
    "The folder of images as Parquet, in several shards."
    pack_images(image_folder, tmp_path/'shards', shard_mb=.02)
    return tmp_path/'shards'


def table(folder, split, n=None):
    "A split of the folder as a data set in memory, with labels as text."
    files = sorted((folder/split).rglob('*.png'))[:n]
    return datasets.Dataset.from_dict(dict(image=[dict(bytes=f.read_bytes(), path=None) for f in files], label=[f.parent.name for f in files]),
                                      features=datasets.Features(image=datasets.Image(), label=datasets.Value('string')))


def named(samples, root): return [(s.path.relative_to(root).as_posix(), s.label, s.path.read_bytes()) for s in samples]


def test_shards_hold_what_the_folder_holds(image_folder, shards):
    files = sorted(o.name for o in shards.iterdir())
    assert len([o for o in files if o.startswith('train-')]) > 2 and {o.split('-')[0] for o in files} == {'train', 'validation', 'test'}
    ours, theirs = source_samples(DataSource(str(shards), data_format='hf')), source_samples(image_folder)
    for a, b in zip(ours, theirs): assert named(a, shards) == named(b, image_folder)
    ds = datasets.load_dataset('parquet', data_files=dict(test=[str(o) for o in shards.glob('test-*')]), split='test')
    assert len(ds) == 9 and ds.features['label'].names == ['2', '10', 'red apple']
    assert ds[0]['image'].size == (48, 40) # others read them too


def test_training_on_shards_is_that_on_the_folder(image_folder, shards, tmp_path, tiny, capsys):
    r = Recipe.from_dict(tiny | dict(epochs=2))
    train(r, image_folder, tmp_path/'a')
    train(r, shards, tmp_path/'b', data_format='hf')
    assert "left aside: split 'test'" in capsys.readouterr().out
    assert file_digest(run_file(tmp_path/'a', 'preds')) == file_digest(run_file(tmp_path/'b', 'preds'))
    env = [json.loads(run_file(tmp_path/o, 'env').read_text())['data'] for o in 'ab']
    assert env[0]['digest'] == env[1]['digest'] and env[0]['contents'] == env[1]['contents']


def test_a_run_knows_its_images_again(image_folder, shards, tmp_path, tiny):
    train(Recipe.from_dict(tiny), shards, tmp_path/'run', data_format='hf')
    _, files, labels = labelled_images(tmp_path/'run')
    assert len(files) == 12 and all(f.read_bytes()[:4] == b'\x89PNG' for f in files)
    assert [f.parent.name for f in files] == labels
    assert main(['report', str(tmp_path/'run')]) == 0
    page = (tmp_path/'run'/'report.html').read_text()
    assert 'data:image/jpeg' in page and '--data-format hf' in page
    assert main(['views', str(tmp_path/'run'), '--num-workers', '0']) == 0


def test_predictions_of_a_split_are_those_of_its_folder(image_folder, shards, tmp_path, tiny):
    train(Recipe.from_dict(tiny), image_folder, tmp_path/'run')
    out = [str(tmp_path/f'{o}.csv') for o in 'ab']
    assert main(['predict', str(tmp_path/'run'), str(image_folder/'test'), '-o', out[0], '--confidence']) == 0
    assert main(['predict', str(tmp_path/'run'), str(shards), '--data-format', 'hf', '-o', out[1], '--confidence']) == 0
    a, b = map(pd.read_csv, out)
    assert list('test/'+a.image_name) == list(b.image_name) and a.drop(columns='image_name').equals(b.drop(columns='image_name'))
    assert main(['predict', str(tmp_path/'run'), str(shards), '--data-format', 'hf', '-o', str(tmp_path/'c.csv'), '--split', 'train']) == 0
    assert len(pd.read_csv(tmp_path/'c.csv')) == 24


def test_check_reads_tables(image_folder, shards, tmp_path, capsys):
    found = check_data(DataSource(str(shards), data_format='hf'))
    assert found.ok and found.counts['train'] == {'2': 8, '10': 8, 'red apple': 8}
    bad = table(image_folder, 'train').to_list()
    bad[0]['image'] = dict(bytes=bad[0]['image']['bytes'][:200], path=None)
    bad[1]['image'] = dict(bytes=b'', path=None)
    datasets.Dataset.from_list(bad, features=table(image_folder, 'train').features).save_to_disk(tmp_path/'bad')
    assert main(['check', str(tmp_path/'bad'), '--data-format', 'hf']) == 1
    said = capsys.readouterr().out
    assert 'train/00' in said and 'cut off' in said and 'empty' in said


@pytest.mark.parametrize('form', ['saved', 'dict', 'one', 'tar', 'file'])
def test_forms_of_tables(form, image_folder, tmp_path):
    tr, va, where = table(image_folder, 'train'), table(image_folder, 'val'), tmp_path/'t'
    if form == 'saved': datasets.DatasetDict(train=tr, validation=va).save_to_disk(where)
    if form == 'one': tr.save_to_disk(where)
    if form == 'dict': where = datasets.DatasetDict(train=tr, validation=va)
    if form == 'file':
        where = tmp_path/'all.parquet'
        tr.to_parquet(where)
    if form == 'tar':
        where.mkdir()
        for split, ds in dict(train=tr, val=va).items(): write_tar(where/f'{split}-000.tar', [o['image']['bytes'] for o in raw(ds)], ds['label'])
    dls = image_dls(where, size=32, bs=8, num_workers=0, device='cpu', data_format='hf')
    assert list(dls.vocab) == ['2', '10', 'red apple'] and len(dls.train_ds) + len(dls.valid_ds) == (36 if form not in ('one', 'file') else 24)
    x, y = dls.train.one_batch()
    assert x.shape == (8, 3, 32, 32)
    names = [str(s.path) for ds in (dls.train_ds, dls.valid_ds) for s in ds.items]
    assert len(set(names)) == len(names)
    again = image_dls(where, size=32, bs=8, num_workers=0, device='cpu', data_format='hf')
    assert names == [str(s.path) for ds in (again.train_ds, again.valid_ds) for s in ds.items]


def raw(ds): return ds.cast_column('image', datasets.Image(decode=False))


def write_tar(file, images, labels, start=0):
    with tarfile.open(file, 'w') as t:
        for i, (data, label) in enumerate(zip(images, labels), start):
            for end, b in (('png', data), ('cls', str(label).encode())):
                m = tarfile.TarInfo(f'{i:05d}.{end}')
                m.size = len(b)
                t.addfile(m, io.BytesIO(b))


def test_selected_rows_keep_their_labels(image_folder):
    ds = table(image_folder, 'train').shuffle(seed=3).select(range(5, 20))
    tr, va = source_samples(data_source(ds, valid='none'))
    assert not va and sorted(s.label for s in tr) == sorted(ds['label'])
    for s in tr: assert np.array_equal(read_image(s.path), cv2.imdecode(np.frombuffer(s.path.read_bytes(), np.uint8), 1)[..., ::-1])
    by_name = {s.path.name: s.label for s in tr}
    assert [by_name[f'{i:02d}'] for i in range(15)] == list(ds['label'])


def test_groups_and_columns(image_folder, tmp_path, capsys):
    ds = table(image_folder, 'train').rename_columns(dict(image='photo', label='kind'))
    ds = ds.add_column('patient', [i//4 for i in range(24)]).add_column('score', [i/7 for i in range(24)])
    ds.save_to_disk(tmp_path/'t')
    for given, said in ((dict(), 'no column of labels'), (dict(label_column='score'), 'holds float64'), (dict(label_column='kinds'), "did you mean 'kind'"),
                        (dict(label_column='kind', image_column='score'), 'and no images'), (dict(label_column='kind', train='trainn'), "no split 'trainn'"),
                        (dict(label_column='kind', valid='dev'), 'Known: train')):
        with pytest.raises(ValueError, match=said): source_samples(DataSource(str(tmp_path/'t'), data_format='hf', **given))
    s = DataSource(str(tmp_path/'t'), data_format='hf', label_column='kind', group='patient')
    dls = image_dls(s, size=32, bs=4, num_workers=0, device='cpu')
    groups = [{s.group for s in ds.items} for ds in (dls.train_ds, dls.valid_ds)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 6
    assert main(['train', str(tmp_path/'t'), '--data-format', 'hf', '--label-column', 'score']) == 2
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('where, said', [
    ('nothing-here', 'no folder, file or data set'), ('memory://no-such-bucket', 'there is nothing at'), ('nosuch://bucket/x', 'nosuch'),
    ('broken', 'cut off'), ('empty', 'there is no table')])
def test_places_that_are_not_there(where, said, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'empty').mkdir()
    (tmp_path/'broken').mkdir()
    for o in shards.glob('*.parquet'): (tmp_path/'broken'/o.name).write_bytes(o.read_bytes()[:-100 if '-00001-' in o.name else None])
    for more in ([], ['--stream', '--epoch-images', '8']):
        assert main(['train', where, '--data-format', 'hf', '--recipe', 'demo', *more]) == 2
        err = capsys.readouterr().err
        assert said in err and err.strip().count('\n') == 0, err


def test_what_contradicts_itself(shards, tmp_path, image_folder, capsys):
    for given, said in ((dict(stream=True), "data_format='hf'"), (dict(data_format='hf', csv='x.csv'), 'give one of them'),
                        (dict(data_format='hf', epoch_images=5), 'stream=True'), (dict(data_format='hf', stream=True, folds=3), 'as it comes'),
                        (dict(data_format='hf', stream=True, valid='none'), 'holds no images out'), (dict(data_format='HF'), 'Known')):
        with pytest.raises(ValueError, match=said): DataSource(str(shards), **given)
    assert main(['train', str(shards), '--recipe', 'demo']) == 2
    assert '--data-format hf' in capsys.readouterr().err
    ds = table(image_folder, 'train')
    with pytest.raises(ValueError, match='save_to_disk'): train(Recipe.from_dict(dict(backbone='test_resnet', pretrained=False, size=32, epochs=1, num_workers=0)), ds, tmp_path/'r')
    assert not (tmp_path/'r').exists()


def test_a_source_of_tables_is_plain_data(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(shards.parent)
    s = DataSource('shards', data_format='hf', stream=True, buffer=7, epoch_images=12, label_column='label')
    s.resolved().save(tmp_path/'d.toml')
    back = data_source(tmp_path/'d.toml')
    assert back == replace(s, path=str(shards))
    assert DataSource('ylecun/mnist', data_format='hf').resolved().path == 'ylecun/mnist'
    assert DataSource('s3:/bucket/x', data_format='hf').resolved().path == 's3:/bucket/x'


def test_shards_behind_an_address(shards, image_folder):
    import fsspec
    fs = fsspec.filesystem('memory')
    for o in shards.glob('*.parquet'): fs.pipe(f'/bucket/{o.name}', o.read_bytes())
    assert {k: len(v) for k, v in find_tables('memory:/bucket', dict(train='t', validation='v', test='x').get).splits.items()} == {
        k: len(list(shards.glob(f'{k}-*'))) for k in ('train', 'validation', 'test')}


def test_pack_leaves_nothing_half_written(image_folder, tmp_path, capsys, monkeypatch):
    assert main(['pack', str(image_folder), str(tmp_path/'s'), '--shard-mb', '0.05']) == 0
    assert '24 images in train, 12 images in validation, 9 images in test' in capsys.readouterr().out
    before = {o.name: o.read_bytes() for o in (tmp_path/'s').iterdir()}
    assert main(['pack', str(image_folder), str(tmp_path/'s')]) == 2
    assert {o.name: o.read_bytes() for o in (tmp_path/'s').iterdir()} == before
    assert main(['pack', str(image_folder), str(tmp_path/'t'), '--shard-mb', '0']) == 2
    import mstoolkit.data.tables as tables
    write = tables._write_shard
    def spoilt(file, *args):
        said = write(file, *args)
        data = bytearray(file.read_bytes())
        data[len(data)//3] ^= 1 # a bit of an image
        file.write_bytes(data)
        return said
    monkeypatch.setattr(tables, '_write_shard', spoilt)
    with pytest.raises(OSError, match='does not hold what was written'): pack_images(image_folder, tmp_path/'t')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['data', 's']


def test_an_image_in_a_table_is_a_path(shards):
    s = source_samples(DataSource(str(shards), data_format='hf'))[0][0]
    import pickle
    p = pickle.loads(pickle.dumps(s.path))
    assert p == s.path and p.read_bytes() == s.path.read_bytes() and p.resolve().read_bytes() == p.read_bytes()
    assert isinstance(p, Path) and p.is_file() and not p.parent.is_dir() and p.with_suffix('').name == p.stem
    with pytest.raises(ImageError, match='train/x.png cannot be read as an image: the file is empty'): read_image(TableImage('train/x.png', Empty()))


class Empty:
    stamp = ''
    def image_bytes(self, row): return b''


# ---- streams

N = 60


def number(x): return round(float(x)*255)


@pytest.fixture(scope='module')
def numbered(tmp_path_factory):
    "A folder of shards whose images are grey, each of another brightness: what was seen can be told from a batch."
    root = tmp_path_factory.mktemp('numbered')/'images'
    for i in range(N):
        for split in ('train', 'val') if i < 8 else ('train',):
            f = root/split/'ab'[i % 2]/f'{i}.png'
            f.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(f), np.full((32, 32, 3), 2*i + 1, np.uint8))
    pack_images(root, root.parent/'shards', shard_mb=.0012)
    pack_images(root, root.parent/'one', shard_mb=100)
    return root.parent


class Seen(Callback):
    "Writes down which images each training batch has; ends the process where it is told to."
    def __init__(self, file, kill_at=0, gently=False): self.file, self.kill_at, self.gently, self.n = file, kill_at, gently, 0
    def before_batch(self):
        if not self.training: return
        x = self.xb[0].as_subclass(torch.Tensor)
        tfm = next(t for t in self.dl.after_batch.fs if hasattr(t, 'mean'))
        shown = x[:, 0, 0, 0]*tfm.std[0] + tfm.mean[0]
        with open(self.file, 'a') as f: f.write(f"{self.epoch} {' '.join(str((number(o) - 1)//2) for o in shown)}\n")
        self.n += 1
        if self.n == self.kill_at and self.gently: raise KeyboardInterrupt
        if self.n == self.kill_at: os.kill(os.getpid(), signal.SIGKILL)


def fit(run, data, workers, kill_at=0, gently=False):
    "Four epochs of 24 images, or what is left of them."
    from mstoolkit.core import process_rank
    from mstoolkit.train import resume_run
    seen = Seen(f'{run}.seen{process_rank()}', kill_at, gently)
    r = Recipe.from_dict(dict(name='s', head='plain', backbone='test_resnet', pretrained=False, size=32, epochs=4, bs=4, num_workers=workers,
                              augment='none', cutmix=0., device='cpu', schedule='constant', precision='fp32', plateau_patience=-1, stop_patience=0,
                              memory_format='contiguous', compile='off'))
    if run_file(run, 'state').exists(): resume_run(run, cbs=[seen])
    else: train(r, data, run, cbs=[seen], data_format='hf', stream=True, epoch_images=24, buffer=6)


def one_of(processes, rank, port, *args, **kw):
    "What a process that `torchrun` starts finds around it, and its training; forked, it need not import torch anew."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    fit(*args, **kw)


def go(tmp_path, run, data, workers, *, processes=1, kill_at=0, gently=False):
    "Train, in processes of their own, which may be killed, or here."
    if gently:
        try: fit(run, data, workers, kill_at, gently)
        except KeyboardInterrupt: assert kill_at
        return
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(processes):
        (logs := tmp_path/f'logs{rank}').mkdir(exist_ok=True)
        children.append(Child(partial(one_of, processes, rank, port, run, data, workers, kill_at), tmp_path, logs))
    ended = [o.wait(600) for o in children]
    for o in ended: assert not o.late and (o.code == 0) == (not kill_at), o.text[-3000:]
    assert (-signal.SIGKILL in [o.code for o in ended]) == bool(kill_at) # another rank may see first that this one is gone


def seen_of(run, rank=0): # what was seen in each epoch, as the last run of that epoch has it
    out = {}
    for line in Path(f'{run}.seen{rank}').read_text().splitlines():
        e, *ims = map(int, line.split())
        out.setdefault(e, []).append(ims)
    return {e: [i for b in batches[-6:] for i in b] for e, batches in out.items()} # six batches an epoch


@pytest.mark.parametrize('data, workers, processes, gently', [('shards', 0, 1, True), ('one', 1, 1, True), ('shards', 3, 1, False), ('shards', 1, 2, False),
                                                              ('one', 0, 2, False)])
def test_ended_twice_a_stream_shows_what_it_would_have_shown(data, workers, processes, gently, numbered, tmp_path):
    at, how = numbered/data, dict(processes=processes, gently=gently)
    go(tmp_path, tmp_path/'whole', at, workers, **how)
    for kill_at in (8, 9): go(tmp_path, tmp_path/'cut', at, workers, kill_at=kill_at, **how)
    go(tmp_path, tmp_path/'cut', at, workers, **how)
    for rank in range(processes):
        whole, cut = seen_of(tmp_path/'whole', rank), seen_of(tmp_path/'cut', rank)
        assert len(whole) == 4 and cut == whole
    assert file_digest(run_file(tmp_path/'whole', 'preds')) == file_digest(run_file(tmp_path/'cut', 'preds'))
    first = [i for rank in range(processes) for e in (0, 1) for i in seen_of(tmp_path/'whole', rank)[e]]
    if processes == 1 or data == 'one': assert len(set(first)) == 48 # of 60: none twice in a pass


def stream_dls(at, workers=0, **kw):
    kw = dict(epoch_images=24, buffer=6) | kw
    return image_dls(at, size=32, bs=4, num_workers=workers, augment='none', device='cpu', data_format='hf', stream=True, **kw)


def shown(dls): return [[(number(o) - 1)//2 for o in dls.train.after_batch.decode((x,))[0][:, 0, 0, 0]] for x, _ in dls.train]


def test_a_stream_is_the_same_with_any_number_of_processes_to_decode(numbered):
    runs = []
    for workers in (0, 1, 3):
        dls = stream_dls(numbered/'shards', workers)
        runs.append([shown(dls) for _ in range(3)])
    assert runs[0] == runs[1] == runs[2]
    flat = [[i for b in e for i in b] for e in runs[0]]
    assert all(len(e) == 24 for e in flat) and len({i for e in flat[:2] for i in e}) == 48
    assert flat[0] != sorted(flat[0])


def test_labels_go_with_their_images(numbered):
    dls = stream_dls(numbered/'one', 1)
    assert len(dls.train_ds) == 24 and list(dls.vocab) == ['a', 'b'] and stream_of(dls) is not None and len(dls.valid_ds) == 8
    for x, y in dls.train:
        ims = [(number(o) - 1)//2 for o in dls.train.after_batch.decode((x,))[0][:, 0, 0, 0]]
        assert [i % 2 for i in ims] == y.tolist()


def test_an_epoch_is_all_there_is_where_nothing_else_is_said(numbered):
    dls = stream_dls(numbered/'shards', epoch_images=0)
    assert len(dls.train_ds) == N and sorted(i for b in shown(dls) for i in b) == list(range(N))
    assert sorted(i for b in shown(dls) for i in b) == list(range(N)) # and again


def test_a_look_at_a_batch_moves_nothing(numbered):
    a, b = stream_dls(numbered/'shards'), stream_dls(numbered/'shards')
    a.train.one_batch()
    b.train.randomize()
    place = stream_of(a).place
    assert place == (0, 0, 0)
    shown(a)
    assert stream_of(a).place != place


def test_streams_of_tars_and_saved_tables(image_folder, tmp_path):
    tr, va = table(image_folder, 'train'), table(image_folder, 'val')
    (tmp_path/'t').mkdir()
    for i in range(2):
        part = tr.shuffle(seed=0).select(range(12*i, 12*i + 12))
        write_tar(tmp_path/'t'/f'train-{i}.tar', [o['image']['bytes'] for o in raw(part)], part['label'], 12*i)
    write_tar(tmp_path/'t'/'val-0.tar', [o['image']['bytes'] for o in raw(va)], va['label'])
    datasets.DatasetDict(train=tr, validation=va).save_to_disk(tmp_path/'s', num_shards=dict(train=3, validation=1))
    (tmp_path/'names.txt').write_text('2\n10\nred apple\n')
    for where in 't', 's':
        kw = dict(size=32, bs=4, num_workers=0, augment='none', device='cpu', data_format='hf', stream=True, classes=str(tmp_path/'names.txt'))
        with pytest.raises(ValueError, match='epoch_images'): image_dls(tmp_path/where, **kw)
        dls = image_dls(tmp_path/where, epoch_images=24, **kw)
        assert list(dls.vocab) == ['2', '10', 'red apple']
        labels = [y for _, ys in dls.train for y in ys.tolist()]
        assert sorted(labels) == [0]*8 + [1]*8 + [2]*8
        place = stream_of(dls).place
        s = stream_of(image_dls(tmp_path/where, epoch_images=24, **kw))
        s.take_up(place, 1)
        assert [o[0].read_bytes() for o in s.epoch(1, 5)] == [o[0].read_bytes() for o in stream_of(dls).epoch(1, 5)]
    for i in range(2): # numbers stand for the names of the list
        part = va.select(range(6*i, 6*i + 6))
        write_tar(tmp_path/'t'/f'train-{i}.tar', [o['image']['bytes'] for o in raw(part)], [dls.vocab.o2i[o] for o in part['label']], 6*i)
    (tmp_path/'names.txt').write_text('two\nten\napple\n')
    write_tar(tmp_path/'t'/'val-0.tar', [o['image']['bytes'] for o in raw(va)], [dls.vocab.o2i[o] for o in va['label']])
    dls = image_dls(tmp_path/'t', epoch_images=12, **kw)
    assert list(dls.vocab) == ['two', 'ten', 'apple'] and sorted(y for _, ys in dls.train for y in ys.tolist()) == [0]*4 + [1]*4 + [2]*4
    assert [o.label for o in dls.valid_ds.items] == ['two']*4 + ['ten']*4 + ['apple']*4
    cut = tmp_path/'t'/'train-0.tar'
    cut.write_bytes(cut.read_bytes()[:-9000])
    with pytest.raises(ValueError, match="train-0.tar' cannot be read, as if it were cut off"):
        s = stream_of(image_dls(tmp_path/'t', epoch_images=24, **kw))
        list(s.epoch(0, 24))


def test_what_needs_a_list_refuses_a_stream(numbered, tmp_path, capsys):
    args = ['train', str(numbered/'shards'), '--data-format', 'hf', '--stream', '--epoch-images', '16', '--recipe', 'demo', '--epochs', '1',
            '--bs', '8', '--size', '32', '--device', 'cpu', '-o', str(tmp_path/'r')]
    assert main([*args, '--balance', 'logit-adjust']) == 2
    assert 'as it comes' in capsys.readouterr().err
    assert main([*args, '--on-bad', 'skip']) == 2
    assert main(args) == 0
    assert len(read_predictions(tmp_path/'r')) == 8
    assert main(['report', str(tmp_path/'r')]) == 0


def test_a_port_in_use_is_said_in_one_line(monkeypatch):
    with socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else socket.create_server(('', 0)) as s:
        for k, v in dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(s.getsockname()[1])).items(): monkeypatch.setenv(k, v)
        with pytest.raises(RunError, match='the 2 processes cannot meet at localhost:.*another port') as e: join_processes()
    assert '\n' not in str(e.value)


def test_more_processes_than_images_of_a_folder(image_folder):
    with pytest.raises(ValueError, match='40 processes and 24 training images: each needs one or more, so use 24 processes or fewer'):
        Share(image_dls(image_folder, size=32, bs=64, num_workers=0, device='cpu').train, 0, 40)


def test_more_processes_than_images(numbered):
    from mstoolkit.data.tables import Stream
    s = Stream(find_tables(numbered/'one', dict(train='train').get), 'train', Path(), n=100, rank=70, processes=80)
    with pytest.raises(ValueError, match='fewer images than processes'): next(s.epoch(0, 1))


def test_memory_stays_flat(numbered):
    "Ten passes hold no more images at a time than the first."
    from mstoolkit.data.tables import HeldBytes
    import gc
    def held(): return sum(type(o) is TableImage for o in gc.get_objects())
    gc.collect()
    before, most = held(), []
    dls = stream_dls(numbered/'shards', epoch_images=0)
    for _ in range(10):
        peak = 0
        for _ in dls.train: peak = max(peak, held() - before)
        most.append(peak)
    assert max(most) <= 64 + 8 + 6 + 2*4 + 4 and max(most[5:]) <= max(most[:5]) + 4 # the head, validation, the buffer, batches under way
    assert HeldBytes(b'x').image_bytes(0) == b'x'
