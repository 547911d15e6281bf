"The data sets the library draws or unpacks: layout, determinism, balance, and refusal to overwrite."
import csv
import gzip
import hashlib
from collections import Counter

import cv2
import numpy as np
import pytest

from mstoolkit.data.make import data_makers, make_data, make_digits, make_fashion_mnist, make_navon, navon_letters


def digest(folder): return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in folder.rglob('*') if p.is_file()}


def idx(a): return gzip.compress(bytes([0, 0, 8, a.ndim]) + np.array(a.shape, '>i4').tobytes() + a.tobytes())


@pytest.fixture
def fashion_source(tmp_path):
    rng, src = np.random.default_rng(0), tmp_path/'src'
    src.mkdir()
    for stem, n in dict(train=40, t10k=20).items():
        (src/f'{stem}-images-idx3-ubyte.gz').write_bytes(idx(rng.integers(0, 255, (n, 28, 28)).astype(np.uint8)))
        (src/f'{stem}-labels-idx1-ubyte.gz').write_bytes(idx((np.arange(n) % 10).astype(np.uint8)))
    return src


def test_navon_same_seed_same_pixels(tmp_path):
    kw = dict(n_train=30, n_valid=10, n_test=10)
    a, b, c = [digest(make_navon(tmp_path/str(i), seed=s, **kw)) for i, s in enumerate([1, 1, 2])]
    assert a == b != c
    assert len(set(a.values())) == len(a)  # no image twice, in no split


def test_navon_is_balanced_and_its_test_folder_keeps_its_secret(tmp_path):
    p = make_navon(tmp_path/'n', n_train=200, n_valid=100, n_test=100)
    assert {len(list(d.iterdir())) for d in (p/'train').iterdir()} == {2}
    assert {d.name for d in (p/'val').iterdir()} == {f'{a}-of-{b}' for a in navon_letters for b in navon_letters}
    assert all(f.is_file() and f.suffix == '.png' for f in (p/'test').iterdir())
    rows = list(csv.DictReader((p/'test_labels.csv').read_text().splitlines()))
    assert sorted(r['image_name'] for r in rows) == sorted(f.stem for f in (p/'test').iterdir())
    assert set(Counter(r['label'] for r in rows).values()) == {1}
    order = [r['label'] for r in rows]
    assert order != sorted(order)  # a file's number does not tell its class


def test_navon_local_and_global_show_the_same_pictures_under_other_names(tmp_path):
    kw, pics = dict(n_train=100, n_valid=10, n_test=10), {}
    for label in ('both', 'local', 'global'):
        p = make_navon(tmp_path/label, label=label, **kw)
        pics[label] = {hashlib.sha1(f.read_bytes()).hexdigest(): f.parent.name for f in (p/'train').rglob('*.png')}
    for h, name in pics['both'].items():
        large, small = name.split('-of-')
        assert (pics['global'][h], pics['local'][h]) == (large, small)


def test_navon_size(tmp_path):
    p = make_navon(tmp_path/'n', n_train=10, n_valid=10, n_test=1, size=80)
    assert cv2.imread(str(p/'test'/'00000.png')).shape == (80, 80, 3)
    with pytest.raises(ValueError, match='size 20 is too small'): make_navon(tmp_path/'m', size=20)
    assert not (tmp_path/'m').exists()


def test_digits_are_the_scans_and_the_split_is_stratified(tmp_path):
    from sklearn.datasets import load_digits
    d, p = load_digits(), make_digits(tmp_path/'d')
    files = sorted((p/'train').rglob('*.png'))
    n = {s: Counter(f.parent.name for f in (p/s).rglob('*.png')) for s in ('train', 'val')}
    assert all(abs(n['val'][c]/(n['val'][c]+n['train'][c]) - .2) < .01 for c in n['train'])
    ims = {im.tobytes() for im in np.rint(d.images*255/16).astype(np.uint8)}
    assert all(cv2.imread(str(f), cv2.IMREAD_UNCHANGED).tobytes() in ims for f in files[::50])
    assert digest(p) == digest(make_digits(tmp_path/'e'))


def test_digits_without_sklearn(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match=r'pip install mstoolkit\[data\]'): make_digits(tmp_path/'d')


def test_fashion_keeps_every_pixel_and_label(tmp_path, fashion_source):
    p = make_fashion_mnist(tmp_path/'f', source=fashion_source)
    ims = np.frombuffer(gzip.decompress((fashion_source/'train-images-idx3-ubyte.gz').read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    assert np.array_equal(cv2.imread(str(p/'train'/'Ankle boot'/'00009.png'), cv2.IMREAD_UNCHANGED), ims[9])
    assert Counter(f.parent.parent.name for f in p.rglob('*.png')) == dict(train=40, test=20)


def test_a_broken_source_leaves_nothing_behind(tmp_path, fashion_source):
    (fashion_source/'t10k-images-idx3-ubyte.gz').write_bytes(gzip.compress(b'not an idx file'))
    with pytest.raises(ValueError, match='t10k-images.*is not an IDX file'): make_fashion_mnist(tmp_path/'f', source=fashion_source)
    assert [o.name for o in tmp_path.iterdir()] == ['src']


@pytest.mark.parametrize('name', data_makers)
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path/'mine.txt').write_text('keep')
    with pytest.raises(ValueError, match='already exists and nothing is ever overwritten'): make_data(name, tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ['mine.txt']
