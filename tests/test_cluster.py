"Prediction on a cluster of one machine: the rows of `predict`, parts that are taken up, workers that are killed."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
from conftest import TINY
from mstoolkit.classifier import Classifier
from mstoolkit.cli import main
from mstoolkit.core import RunError
from mstoolkit.data.make import pack_images
from mstoolkit.data.sources import DataSource
from mstoolkit.data.tables import FileAt
from mstoolkit.predict import predict_folder
from mstoolkit.recipe import Recipe
from mstoolkit.ship import cluster
from mstoolkit.ship.cluster import predict_cluster
from mstoolkit.train import train

ray = pytest.importorskip('ray')
pytestmark = [pytest.mark.filterwarnings('ignore::DeprecationWarning'), pytest.mark.filterwarnings('ignore::FutureWarning'),
              pytest.mark.filterwarnings('ignore::ResourceWarning')]


@pytest.fixture(scope='module', autouse=True)
def two_processors():
    with pytest.MonkeyPatch.context() as m:
        m.delenv('RAY_ADDRESS', raising=False)
        m.setenv('RAY_worker_niceness', '0')
        ray.init(address='local', num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()


@pytest.fixture(scope='module')
def model(image_folder_, tmp_path_factory):
    "A run folder."
    out = tmp_path_factory.mktemp('model')/'run'
    train(Recipe(head='gated', **TINY), image_folder_, out)
    return out


def rows(out, ending='csv'):
    read = pd.read_parquet if ending == 'parquet' else lambda f: pd.read_csv(f, dtype=str) # a class is called 10
    df = pd.concat(map(read, sorted(out.glob(f'part-*.{ending}'))), ignore_index=True)
    return df.astype({c: float for c in df if c.startswith('confidence')})


def same(a, b):
    "Answers of two ways: names and labels to the letter, confidences but for the last digit."
    assert a.image_name.tolist() == b.image_name.tolist() and a.pred_label.tolist() == b.pred_label.tolist()
    for c in b.columns[2:]:
        if c.startswith('confidence'): assert abs(a[c] - b[c]).max() <= 2e-6
        else: assert a[c].tolist() == b[c].tolist()


def test_parts_are_the_rows_of_predict(model, image_folder, tmp_path):
    (image_folder/'test'/'2'/'broken.png').write_bytes(b'no image')
    how = dict(top_k=2, tta='none', on_bad='skip')
    n = predict_cluster(model, image_folder/'test', tmp_path/'out', part_images=4, workers=2, **how)
    assert n == dict(images=10, predicted=9, unreadable=1, parts=3, there_before=0)
    same(rows(tmp_path/'out'), predict_folder(model, image_folder/'test', **how))
    bad = pd.read_csv(tmp_path/'out'/'unreadable.csv')
    assert bad.image_name.tolist() == ['2/broken.png'] and 'cannot be read' in bad.why[0]
    with pytest.raises(ValueError, match='cannot be read, and what was done is kept: .*broken.png'):
        predict_cluster(model, image_folder/'test', tmp_path/'strict', part_images=4, on_bad='error')
    assert len(list((tmp_path/'strict').glob('part-*'))) < 3


def test_lists_and_addresses(model, image_folder, tmp_path):
    files = sorted((image_folder/'test').glob('*/*.png'))[::2]
    (image_folder/'list.txt').write_text('\n'.join(str(f.relative_to(image_folder)) for f in files) + '\n', encoding='utf-8-sig')
    listed = predict_folder(model, image_folder/'list.txt')
    assert sorted(listed.image_name) == sorted(f.relative_to(image_folder).with_suffix('').as_posix() for f in files)
    predict_cluster(model, image_folder/'list.txt', tmp_path/'a', part_images=2)
    same(rows(tmp_path/'a'), listed)
    predict_cluster(model, f"local://{image_folder/'test'}", tmp_path/'b', part_images=5)
    same(rows(tmp_path/'b'), predict_folder(model, image_folder/'test'))
    same(predict_folder(model, f"local://{image_folder/'test'}"), rows(tmp_path/'b'))


@pytest.mark.slow
def test_a_relative_folder(model, image_folder, tmp_path, monkeypatch):
    "Workers are elsewhere."
    monkeypatch.chdir(image_folder)
    predict_cluster(model, 'test', tmp_path/'out', part_images=5)
    same(rows(tmp_path/'out'), predict_folder(model, image_folder/'test'))


@pytest.mark.slow
def test_names_of_any_bytes(model, image_folder, tmp_path):
    os.rename(image_folder/'test'/'2'/'0.png', os.fsencode(image_folder/'test'/'2') + b'/\xff.png')
    for parquet in True, False:
        predict_cluster(model, image_folder/'test', tmp_path/f'{parquet}', parquet=parquet)
        assert r'2/\udcff' in set(rows(tmp_path/f'{parquet}', 'parquet' if parquet else 'csv').image_name)


def test_parquet_in_and_out(model, image_folder, tmp_path):
    pytest.importorskip('datasets')
    pack_images(image_folder, tmp_path/'shards', shard_mb=.02)
    source = DataSource(path=str(tmp_path/'shards'), data_format='hf')
    predict_cluster(model, source, tmp_path/'out', split='test', part_images=4, parquet=True, confidence=True)
    same(rows(tmp_path/'out', 'parquet').sort_values('image_name', ignore_index=True), predict_folder(model, source, split='test', confidence=True))


def test_what_is_left_is_done_by_the_same_call(model, image_folder, tmp_path):
    how = dict(part_images=2, workers=1)
    predict_cluster(model, image_folder/'test', tmp_path/'out', **how)
    whole = rows(tmp_path/'out')
    parts = sorted((tmp_path/'out').glob('part-*'))
    stamps = {f: f.stat().st_mtime_ns for f in parts}
    for f in parts[1::2]: f.unlink()
    assert predict_cluster(model, image_folder/'test', tmp_path/'out', **how)['there_before'] == 3
    assert [f for f in parts if f.stat().st_mtime_ns != stamps[f]] == parts[1::2]
    same(rows(tmp_path/'out'), whole)
    assert predict_cluster(model, image_folder/'test', tmp_path/'out', **how)['there_before'] == 5
    with pytest.raises(ValueError, match='differs in part_images'): predict_cluster(model, image_folder/'test', tmp_path/'out', part_images=3)
    with pytest.raises(ValueError, match='differs in images'): predict_cluster(model, image_folder/'val', tmp_path/'out', **how)
    (tmp_path/'out'/'parts.json').write_text('{')
    with pytest.raises(ValueError, match='parts.json.*is damaged'): predict_cluster(model, image_folder/'test', tmp_path/'out', **how)


def test_a_worker_that_is_killed(model, image_folder, tmp_path, monkeypatch):
    "The first worker that gets to a part kills itself, once; another one does its part."
    once = tmp_path/'once'
    class Mortal(cluster._Worker):
        def answer(self, files):
            if not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().answer(files)
    monkeypatch.setattr(cluster, '_Worker', Mortal)
    predict_cluster(model, image_folder/'test', tmp_path/'out', part_images=2, workers=2)
    assert once.exists()
    same(rows(tmp_path/'out'), predict_folder(model, image_folder/'test'))


@pytest.mark.slow
def test_a_worker_that_fails_says_why(model, image_folder, tmp_path, monkeypatch):
    class Failing(cluster._Worker):
        def answer(self, files): raise KeyError('no such thing')
    monkeypatch.setattr(cluster, '_Worker', Failing)
    with pytest.raises(RunError, match="a worker failed.*KeyError: 'no such thing'"): predict_cluster(model, image_folder/'test', tmp_path/'out')
    monkeypatch.setattr(cluster, 'plugins', lambda: ['no_such_plugin'])
    with pytest.raises(RunError, match="a worker failed.*no_such_plugin"): predict_cluster(model, image_folder/'test', tmp_path/'other')


@pytest.mark.slow
def test_a_part_that_kills_every_worker_is_given_up(model, image_folder, tmp_path, monkeypatch):
    class Deadly(cluster._Worker):
        def answer(self, files): os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(cluster, '_Worker', Deadly)
    with pytest.raises(RunError, match='died again and again'): predict_cluster(model, image_folder/'test', tmp_path/'out', workers=1)


@pytest.mark.slow
def test_a_place_where_nothing_can_be_read(model, image_folder, tmp_path):
    for f in (image_folder/'test').glob('*/*.png'): f.write_bytes(b'no image')
    with pytest.raises(ValueError, match='not one of the 4 images of part'): predict_cluster(model, image_folder/'test', tmp_path/'out', part_images=4)
    assert not list((tmp_path/'out').glob('part-*'))


@pytest.mark.slow
def test_another_model_is_refused(model, image_folder, tmp_path):
    predict_cluster(model, image_folder/'test', tmp_path/'out')
    clf = Classifier.load(model)
    for other in (replace(clf.header, temperature=2.), replace(clf.header, size=48)):
        with pytest.raises(ValueError, match='differs in model'): predict_cluster(Classifier(clf.model, other), image_folder/'test', tmp_path/'out')
    (image_folder/'test'/'2'/'0.png').write_bytes(b'no image')
    next((tmp_path/'out').glob('part-*')).unlink()
    assert predict_cluster(model, image_folder/'test', tmp_path/'out')['unreadable'] == 1
    shutil.copy(image_folder/'test'/'2'/'1.png', image_folder/'test'/'2'/'0.png')
    next((tmp_path/'out').glob('part-*')).unlink()
    assert predict_cluster(model, image_folder/'test', tmp_path/'out')['unreadable'] == 0


def test_the_command(model, image_folder, tmp_path, capsys):
    args = ['predict', str(model), str(image_folder/'test'), '--ray', '--out', str(tmp_path/'out'), '--part-images', '4', '--workers', '2']
    assert main(args) == 0 and '9 predictions in' in capsys.readouterr().out
    assert main(args) == 0 and '3 of them there before' in capsys.readouterr().out


@pytest.mark.parametrize('options, text', [
    (['--ray', '--zip'], 'no --zip'), (['--ray', '--out', '-'], 'no --out -'), (['--ray', '--num-workers', '2'], 'no --num-workers'),
    (['--workers', '2'], '--workers has no effect without --ray'), (['--part-images', '9'], '--part-images has no effect'),
    (['--parquet'], '--parquet has no effect'), (['--ray', '--workers', '99'], '99 workers, and the cluster has 2 processors'),
    (['--ray', '--device', 'cuda'], 'no GPU'), (['--ray', '--split', 'x'], '--data-format hf'), (['--ray', '--precision', 'x'], "unknown precision 'x'"), (['--ray', '--tta', 'x'], "unknown tta 'x'"),
    (['--ray', '--top-k', '9'], 'top_k is 9')])
def test_mistakes_are_one_line(model, image_folder, tmp_path, monkeypatch, capsys, options, text):
    monkeypatch.chdir(tmp_path)
    assert main(['predict', str(model), str(image_folder/'test'), *options]) == 2
    err = capsys.readouterr().err.strip()
    assert text in err and len(err.splitlines()) == 1, err
    assert not (tmp_path/'prediction').exists() # so that the right command can have it


def test_places_that_hold_nothing(model, tmp_path, capsys):
    (tmp_path/'empty.txt').write_text('\n')
    (tmp_path/'twice.txt').write_text('a.png\nb.png\n a.png')
    (tmp_path/'latin.txt').write_bytes('süß.png'.encode('latin1'))
    for place, text in (('empty.txt', 'names no image'), ('twice.txt', "names 'a.png' in lines 1 and 3"), ('latin.txt', 'is not UTF-8'), ('none.txt', 'none.txt'), ('none', 'no folder')):
        assert main(['predict', str(model), str(tmp_path/place), '--out', str(tmp_path/'p.csv')]) == 2
        assert text in (err := capsys.readouterr().err) and len(err.strip().splitlines()) == 1, err
    assert main(['predict', str(model), f'local://{tmp_path}/none', '--out', str(tmp_path/'p.csv')]) == 2
    assert 'there is nothing at' in capsys.readouterr().err
    with pytest.raises(OSError, match='cannot be read'): FileAt(f'local://{tmp_path}/none.png').image_bytes(0)


def test_without_ray(model, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert main(['predict', str(model), str(image_folder/'test'), '--ray', '--out', str(tmp_path/'out')]) == 2
    assert 'pip install mstoolkit[ray]' in capsys.readouterr().err and not (tmp_path/'out').exists()


@pytest.mark.slow
def test_everything_killed_and_taken_up(model, image_folder, tmp_path):
    for i in range(100): shutil.copy(image_folder/'test'/'2'/'0.png', image_folder/'test'/'2'/f'more{i}.png')
    out = tmp_path/'out'
    env = {k: v for k, v in os.environ.items() if k != 'RAY_ADDRESS'} | dict(OMP_NUM_THREADS='1')
    args = [sys.executable, '-m', 'mstoolkit', 'predict', str(model), str(image_folder/'test'), '--ray', '--out', str(out), '--part-images', '2']
    with subprocess.Popen(args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        while p.poll() is None and len(list(out.glob('part-*'))) < 5: time.sleep(.01)
        p.kill()
    there = len(list(out.glob('part-*')))
    assert 5 <= there < 55
    r = subprocess.run(args, env=env, capture_output=True, text=True)
    assert r.returncode == 0 and f'{there} of them there before' in r.stdout, r.stderr
    assert json.loads((out/'parts.json').read_text())['part_images'] == 2
    same(rows(out), predict_folder(model, image_folder/'test'))
