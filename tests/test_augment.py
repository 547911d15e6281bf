"The recipes against torchvision: the same parameters, the same pixels for the same draw, independent draws."
import pickle
import itertools
import random

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import ks_2samp
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

from mstoolkit.data.augment import FlipRotate, RandomErasing, apply_tfms, augment_recipes, augment_tfms, shrink


@pytest.fixture(scope='module')
def photo():
    "A smooth picture with edges, 120×160."
    y, x = np.mgrid[:120, :160].astype(np.float32)
    im = np.stack([127+120*np.sin(x/17+y/31), 127+120*np.cos(y/13), 255*(((x-80)**2+(y-60)**2) < 1600)], -1)
    return cv2.GaussianBlur(im.clip(0, 255).astype(np.uint8), (0, 0), 1)


def tensor(im): return torch.from_numpy(im).permute(2, 0, 1)


def parts(name): return augment_tfms(name, 224).transforms


def test_light_is_figure_1():
    crop, turn, jit = parts('light')
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (.8, 1.), (3/4, 4/3))
    assert (turn.hflip, turn.vflip, turn.degrees, turn.interpolation) == (.5, .5, 15, cv2.INTER_NEAREST)
    assert (jit.brightness, jit.contrast, jit.saturation, jit.hue, jit.p) == ((.8, 1.2), (.8, 1.2), (.8, 1.2), (-.1, .1), 1)


def test_affine_is_report_b():
    crop, h, v, warp, jit, erase = parts('affine')
    assert (crop.scale, crop.ratio) == ((.6, 1.2), (.75, 1.33))
    assert warp.rotate == (-20, 20) and warp.shear == {'x': (-5, 5), 'y': (0, 0)} and warp.scale == {'x': (1, 1), 'y': (1, 1)}
    assert warp.translate_percent == {'x': (-.1, .1), 'y': (-.1, .1)} and warp.p == 1
    assert (erase.p, erase.scale, erase.ratio) == (.3, (.02, .15), (.3, 3.3))


@pytest.mark.parametrize('name', ['light', 'affine'])
def test_crops_are_distributed_as_torchvisions(name):
    crop = parts(name)[0]
    im, x = np.zeros((90, 120, 3), np.uint8), torch.zeros(3, 90, 120)
    (pipe := A.Compose([crop])).set_random_state(np.random.default_rng(0), random.Random(0))
    ours = []
    for _ in range(3000):
        pipe(image=im)
        x0, y0, x1, y1 = crop.params['crop_coords']
        ours.append((y0, x0, y1-y0, x1-x0))
    torch.manual_seed(0)
    theirs = [T.RandomResizedCrop.get_params(x, list(crop.scale), list(crop.ratio)) for _ in range(3000)]
    for a, b in zip(zip(*ours), zip(*theirs)): assert ks_2samp(a, b).pvalue > 1e-3


def test_erasing_is_distributed_as_torchvisions():
    er, x = RandomErasing(p=1), torch.zeros(3, 64, 96)
    er.set_random_state(np.random.default_rng(0), random.Random(0))
    ours = [er.get_params_dependent_on_data(dict(shape=(64, 96, 3)), {}) for _ in range(3000)]
    torch.manual_seed(0)
    theirs = [T.RandomErasing.get_params(x, scale=(.02, .15), ratio=(.3, 3.3), value=None)[:4] for _ in range(3000)]
    for i, k in enumerate('yxhw'): assert ks_2samp([o[k] for o in ours], [t[i] for t in theirs]).pvalue > 1e-3


def test_erased_pixels_are_normal_once_normalised(photo):
    er = RandomErasing(scale=(.9, .9), ratio=(1, 1), p=1)
    big = np.zeros((400, 400, 3), np.uint8)
    out, p = apply_tfms(A.Compose([er]), big, 3), er.params
    box = out[p['y']:p['y']+p['h'], p['x']:p['x']+p['w']].reshape(-1, 3)/255
    z = (box-np.array(er.mean))/np.array(er.std)
    assert np.allclose(np.median(z, 0), 0, atol=.02) and np.allclose((abs(z) < 1).mean(0), .683, atol=.02)
    assert not big.any()  # the input is not written to


@pytest.mark.parametrize('op,params,ref', [
    ('brightness', dict(brightness=1.15), lambda x: TF.adjust_brightness(x, 1.15)),
    ('contrast', dict(contrast=.85), lambda x: TF.adjust_contrast(x, .85)),
    ('saturation', dict(saturation=1.2), lambda x: TF.adjust_saturation(x, 1.2)),
    *(('hue', dict(hue=h), lambda x, h=h: TF.adjust_hue(x, h)) for h in (.08, -.08, .41, -.5))])
def test_jitter_gives_torchvisions_pixels(photo, op, params, ref):
    jit = parts('light')[-1]
    one = jit.apply(photo, **{**dict(brightness=1, contrast=1, saturation=1, hue=0, order=[0, 1, 2, 3]), **params})
    err = abs(one.astype(int) - ref(tensor(photo)).permute(1, 2, 0).numpy())
    assert err.mean() < (1.5 if op == 'hue' else 1), err.mean()  # OpenCV keeps the hue of uint8 images in steps of 2 degrees


@pytest.mark.parametrize('order', list(itertools.permutations(range(4))))
def test_jitter_gives_torchvisions_pixels_in_any_order(photo, order):
    im = photo//2 + 64  # nothing is clipped on the way, which torchvision does after each step and we once for all
    f = dict(brightness=1.1, contrast=.85, saturation=1.2, hue=-.06)
    ours, ref = parts('light')[-1].apply(im, **f, order=order), tensor(im)/255  # as floats: of bytes it cuts the decimals off each time
    for k in (list(f)[i] for i in order): ref = getattr(TF, f'adjust_{k}')(ref, f[k])
    assert abs(ours - ref.permute(1, 2, 0).numpy()*255).mean() < 1


def test_jitter_is_applied_in_random_order(photo):
    jit = parts('light')[-1]
    jit.set_random_state(np.random.default_rng(0), random.Random(0))
    assert len({tuple(jit.get_params()['order']) for _ in range(400)}) == 24


@pytest.mark.parametrize('h,v,angle', [(0, 0, 11), (1, 0, -7), (0, 1, 15), (1, 1, 3)])
def test_flip_rotate_gives_torchvisions_pixels(photo, h, v, angle):
    ours = FlipRotate(15).apply(photo, h, v, angle)
    x = tensor(photo)
    if h: x = TF.hflip(x)
    if v: x = TF.vflip(x)
    ref = TF.rotate(x, angle).permute(1, 2, 0).numpy()
    assert (abs(ours.astype(int)-ref).max(-1) > 24).mean() < .02  # a sub-pixel apart at edges
    assert (ours[0, 0] == 0).all() and (ref[0, 0] == 0).all()


def test_flip_rotate_draws(photo):
    "Both flips with even odds, independent of each other; the angle uniform."
    turn = FlipRotate(15)
    turn.set_random_state(np.random.default_rng(0), random.Random(0))
    draws = [turn.get_params() for _ in range(4000)]
    for h in (0, 1):
        for v in (0, 1): assert abs(sum((d['h'], d['v']) == (h, v) for d in draws) - 1000) < 120
    assert ks_2samp([d['angle'] for d in draws], np.linspace(-15, 15, 4000)).pvalue > 1e-3


@pytest.mark.parametrize('h,w,oh,ow', [(375, 500, 224, 224), (900, 1200, 224, 224), (448, 448, 224, 224), (100, 90, 224, 224), (64, 64, 64, 64),
                                         (7, 999, 5, 50)])
def test_shrink_is_close_to_an_antialiased_resize(h, w, oh, ow):
    im = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (h, w, 3), np.uint8), (0, 0), max(1, w/ow), sigmaY=max(1, h/oh))
    ref = np.asarray(T.Resize((oh, ow))(T.ToPILImage()(im)))
    out = shrink(im, (oh, ow))
    assert out.shape == (oh, ow, 3) and abs(out.astype(int)-ref).mean() < 3


def test_affine_gives_torchvisions_pixels(photo):
    warp = A.Affine(rotate=(9, 9), translate_px={'x': (6, 6), 'y': (-4, -4)}, interpolation=cv2.INTER_NEAREST, p=1)
    ours = A.Compose([warp])(image=photo)['image']
    refs = [TF.affine(tensor(photo), angle, [6, -4], 1, [0, 0], InterpolationMode.NEAREST).permute(1, 2, 0).numpy() for angle in (9, -9)]
    assert min((abs(ours.astype(int)-r).max(-1) > 24).mean() for r in refs) < .03  # the sign of the angle is drawn with even odds


def test_resize_is_close_to_the_reports(photo):
    "Report A resizes with PIL's antialiased bilinear filter; the area average stays within a grey level or two of it."
    big = cv2.resize(photo, (500, 375), interpolation=cv2.INTER_CUBIC)
    ref = np.asarray(T.Resize((224, 224))(T.ToPILImage()(big)))
    err = abs(augment_tfms('none', 224)(image=big)['image'].astype(int)-ref)
    assert err.mean() < 1.5, err.mean()


def test_flips_are_independent(photo):
    "Under `set_random_seed` per item they would be one and the same."
    pipe = A.Compose([A.HorizontalFlip(), A.VerticalFlip()])
    seen = set()
    for i in range(64):
        out = apply_tfms(pipe, photo, (42, 0, i))
        seen |= {(h, v) for h in (0, 1) for v in (0, 1) if np.array_equal(out, photo[::-1 if v else 1, ::-1 if h else 1])}
    assert len(seen) == 4


@pytest.mark.parametrize('name', augment_recipes)
def test_seeded_by_key_pickles_and_leaves_its_input_alone(photo, name):
    pipe, before = augment_tfms(name, 48), photo.copy()
    outs = [apply_tfms(p, photo, (1, 2, 3)) for p in (pipe, pickle.loads(pickle.dumps(pipe)), augment_tfms(name, 48))]
    assert all(np.array_equal(o, outs[0]) for o in outs) and np.array_equal(photo, before)
    others = [apply_tfms(pipe, photo, (1, 2, i)) for i in range(4, 12)]
    assert (name == 'none') == all(np.array_equal(o, outs[0]) for o in others)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(augment_recipes)), *[st.integers(1, 90)]*4, st.integers(0, 2**32-1))
def test_any_shape_in_the_asked_shape_out(name, h, w, oh, ow, seed):
    out = apply_tfms(augment_tfms(name, (oh, ow)), np.full((h, w, 3), 99, np.uint8), seed)
    assert out.shape == (oh, ow, 3) and out.dtype == np.uint8


def test_upright_never_mirrors():
    "An L stays an L: its foot stays right of its stem."
    im = np.zeros((64, 64, 3), np.uint8)
    im[10:54, 18:26] = im[46:54, 18:46] = 255
    for i in range(50):
        g = apply_tfms(augment_tfms('upright', 64), im, i).mean(-1) > 100
        assert g[34:, 36:].sum() > 3*g[:24, 36:].sum()


def test_an_own_recipe_and_mistakes():
    assert augment_tfms(lambda s: A.Compose([A.Resize(s, s)]), 9)(image=np.zeros((3, 3, 3), np.uint8))['image'].shape == (9, 9, 3)
    with pytest.raises(ValueError, match="unknown augmentation 'heavy'.*Known: affine"): augment_tfms('heavy', 9)
    with pytest.raises(ValueError, match='image size 0'): augment_tfms('light', 0)
