"Colour on the device: torchvision's pixels image by image, draws that are spread and repeatable, training batches only."
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.stats import kstest
from torchvision.transforms import functional as TF

from fastai.vision.core import TensorImage
from mstoolkit.data.augment import RandomErasing, augment_tfms, split_colour
from mstoolkit.data.core import image_dls
from mstoolkit.data.colour import DeviceColour, erase_batch, jitter_batch, shift_hue

STEPS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def col(v): return torch.tensor(v).view(-1, 1, 1, 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(4)),
       st.lists(st.floats(.3, 1.7), min_size=6, max_size=6),
       st.lists(st.floats(-.5, .5), min_size=2, max_size=2))
def test_jitter_is_torchvisions(seed, order, f, hue):
    x = torch.rand(2, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, :, 0, 0] = x[:, :1, 0, 0]  # a grey pixel has no hue
    params = [f[:2], f[2:4], f[4:], hue]
    ours = jitter_batch(x*255, *map(col, params), order=tuple(order))/255
    for n in range(2):
        ref = x[n]
        for i in order: ref = STEPS[i](ref, params[i][n])
        assert (ours[n]-ref).abs().max() < 1e-3  # a quarter of a grey level: its tensors weigh red .2989, we .299, and the factors enlarge that


def test_hue_goes_round():
    x = torch.rand(3, 3, 8, 8)*255
    torch.testing.assert_close(shift_hue(x, col([1., -1., 0.])), x, atol=2e-3, rtol=0)


def test_erase():
    x = torch.zeros(3, 3, 30, 30)
    erase_batch(x, [(2, 3, 10, 20), None, (0, 0, 30, 30)], torch.randn(3, 30, 30, generator=torch.Generator().manual_seed(0)))
    assert (x[0] > 0).any(0).sum() <= 200 and (x[0, :, 2:12, 3:23] > 0).float().mean() > .9
    assert not x[1].any() and (x[2] > 0).float().mean() > .9


def colour(augment='affine'): return DeviceColour(*split_colour(augment_tfms(augment, 32))[1:])


def test_draws():
    t, x = colour(), TensorImage(torch.full((400, 3, 32, 32), 128, dtype=torch.uint8))
    t.erase = None
    t.jitter = {**t.jitter, 'contrast': (1, 1), 'saturation': (1, 1), 'hue': (0, 0)}
    t.reseed(1)
    f = (t(x, split_idx=0)[:, 0, 0, 0]/128).numpy()
    assert kstest((f-.8)/.4, 'uniform').pvalue > 1e-3  # each image has its own factor
    t.reseed(1)
    assert np.array_equal((t(x, split_idx=0)[:, 0, 0, 0]/128).numpy(), f) and not np.array_equal((t(x, split_idx=0)[:, 0, 0, 0]/128).numpy(), f)


def test_how_many_are_erased():
    t, x = DeviceColour(None, RandomErasing(p=.3)), TensorImage(torch.zeros(2000, 3, 24, 24, dtype=torch.uint8))
    t.reseed(0)
    share = (t(x, split_idx=0) > 0).flatten(1).any(1).float().mean()
    assert .26 < share < .34


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('d'), np.random.default_rng(0)
    for c in 'ab':
        (root/c).mkdir()
        for i in range(24): Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(root/c/f'{i}.png')
    return root


def batches(folder, workers, where='device', **kw):
    dls = image_dls(folder, size=24, bs=8, num_workers=workers, device='cpu', colour_on=where, augment='affine', **kw)
    return [[x for x, _ in dls.train] for _ in range(2)]


def test_same_batches_whatever_the_workers(folder):
    a, b = batches(folder, 0), batches(folder, 2)
    assert all(torch.equal(x, y) for e, f in zip(a, b) for x, y in zip(e, f))
    assert not any(torch.equal(x, y) for x, y in zip(*a))


def test_device_and_workers_give_the_same_statistics(folder):
    mean = {w: torch.cat([x for s in range(6) for e in batches(folder, 0, w, seed=s) for x in e]) for w in ('device', 'workers')}
    assert abs(mean['device'].mean()-mean['workers'].mean()) < .05 and abs(mean['device'].std()-mean['workers'].std()) < .05


def test_validation_is_untouched_and_everything_pickles(folder):
    a, b = (image_dls(folder, size=24, device='cpu', num_workers=0, augment='affine', colour_on=w) for w in ('device', 'workers'))
    for (x, _), (y, _) in zip(a.valid, b.valid): assert torch.equal(x, y)
    a.show_batch(max_n=2)
    t = pickle.loads(pickle.dumps(colour()))
    t.reseed(2)
    assert t(TensorImage(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), split_idx=0).shape == (2, 3, 8, 8)


def test_auto_leaves_it_to_the_workers_on_a_cpu(folder):
    dls = image_dls(folder, size=24, device='cpu')
    assert not any(isinstance(t, DeviceColour) for t in dls.train.after_batch.fs)
    with pytest.raises(ValueError, match="unknown colour_on 'gpu'"): image_dls(folder, colour_on='gpu')


@pytest.mark.cuda
def test_on_cuda(folder):
    x = next(iter(image_dls(folder, size=24, device='cuda', augment='affine').train))[0]
    assert x.is_cuda and x.isfinite().all()
