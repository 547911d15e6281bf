"The presized cache: same pictures, rebuilt when a file changes, safe when two processes build at once."
import multiprocessing
import os
import pickle

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mstoolkit.data.cache import build_cache
from mstoolkit.data.core import image_dls
from mstoolkit.data.image import ImageError, read_image
from mstoolkit.data.sources import image_files


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for c in 'ab':
        (tmp_path/'d'/c).mkdir(parents=True)
        for i in range(8):
            h, w = rng.integers(60, 300, 2).tolist()
            im = cv2.resize(rng.integers(0, 255, (5, 5, 3), np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
            Image.fromarray(im).save(tmp_path/'d'/c/f'{i}.jpg', quality=95)
    return tmp_path/'d'


def test_shapes_and_pixels(photos, tmp_path):
    files = image_files(photos)
    cache = build_cache(files, 64, tmp_path/'c')
    for f in files:
        full = read_image(f)
        h, w = full.shape[:2]
        assert min(cache[f].shape[:2]) == min(64, h, w)
        ratio = cache[f].shape[1]/cache[f].shape[0]/(w/h)
        assert .96 < ratio < 1.04
        ref = cv2.resize(full, cache[f].shape[1::-1], interpolation=cv2.INTER_AREA)
        assert abs(ref.astype(int)-cache[f]).mean() < 3


def test_cached_batches_look_like_uncached_ones(photos, tmp_path):
    kw = dict(size=32, bs=4, augment='none', num_workers=0, device='cpu', valid_pct=.25)
    a, b = image_dls(photos, **kw), image_dls(photos, cache=tmp_path/'c', **kw)
    for (x, y), (u, v) in zip(a.valid, b.valid): assert torch.equal(y, v) and (x-u).abs().mean() < .1
    assert [f for f in os.listdir(tmp_path/'c') if f.endswith('.pixels')]


def test_cache_true_lives_hidden_in_the_data_folder(photos):
    kw = dict(size=32, num_workers=2, device='cpu', valid_pct=.25, cache=True)
    n = len(image_dls(photos, **kw).train_ds)
    assert (photos/'.cache').is_dir() and len(image_dls(photos, **kw).train_ds) == n  # it is not taken for images


def test_same_batches_whatever_the_workers(photos, tmp_path):
    def batches(w): return [x for x, _ in image_dls(photos, size=16, bs=4, num_workers=w, device='cpu', cache=tmp_path/'c').train]
    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(2)))


def test_built_once_and_again_when_a_file_changes(photos, tmp_path):
    files = image_files(photos)
    one, two = build_cache(files, 64, tmp_path/'c'), build_cache(files, 64, tmp_path/'c')
    assert one.file == two.file and build_cache(files, 48, tmp_path/'c').file != one.file
    stat = files[3].stat()
    Image.new('RGB', (20, 30), 'red').save(files[3])
    os.utime(files[3], ns=(stat.st_atime_ns, stat.st_mtime_ns+1))
    three = build_cache(files, 64, tmp_path/'c')
    assert three.file != one.file and three[files[3]].shape == (30, 20, 3)


def test_a_bad_file_stops_the_build_and_leaves_nothing(photos, tmp_path):
    (photos/'a'/'3.jpg').write_bytes(b'\xff\xd8\xff')
    with pytest.raises(ImageError, match='3.jpg cannot be read'): build_cache(image_files(photos), 64, tmp_path/'c')
    assert os.listdir(tmp_path/'c') == ['lock']


def test_a_full_disk_is_noticed_before(photos, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('U', (), {'free': 1000}))
    with pytest.raises(OSError, match='the cache needs about .* GB and the disk'): build_cache(image_files(photos), 64, tmp_path/'c')


def build(args): return str(build_cache(*args).file)


def test_two_processes_build_at_once(photos, tmp_path):
    with multiprocessing.get_context('spawn').Pool(2) as pool:
        a, b = pool.map(build, [(image_files(photos), 64, tmp_path/'c')]*2)
    assert a == b and sorted(os.listdir(tmp_path/'c')) == sorted([os.path.basename(a), 'lock'])


def test_pickles_without_its_map(photos, tmp_path):
    files = image_files(photos)
    cache = build_cache(files, 64, tmp_path/'c')
    first = cache[files[0]]
    data = pickle.dumps(cache)
    assert len(data) < 5000 and np.array_equal(pickle.loads(data)[files[0]], first)
