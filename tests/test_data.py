"DataLoaders: agreement with Pillow, determinism, errors, and everything a fastai user does with them."
import sys
import copy
import multiprocessing
import os
import pickle
import signal
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO

import albumentations as A
import cv2
import fastai.callback.all  # noqa: F401  the Learner methods that a notebook has
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.core import PILImage, TensorImage
from fasttransform import Pipeline, Transform
from PIL import Image
from torch import nn

from mstoolkit.callback.progress import RunHistory
from mstoolkit.data.core import AugmentImage, NormalizeUint8, default_workers, get_stats, image_dls, image_loader, input_size, set_stats, unreadable_images
from mstoolkit.data.image import ImageError
from mstoolkit.callback.speed import KeepWorkers
from mstoolkit.data.workers import Workers, close_idle_workers, step_back

matplotlib.use('Agg')
COLOURS = dict(red=(220, 30, 30), green=(30, 220, 30), blue=(30, 30, 220))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Three classes of flat colours with noise, 40×40: any model learns them."
    root, rng = tmp_path_factory.mktemp('colours'), np.random.default_rng(0)
    for split, n in dict(train=16, val=6).items():
        for c, rgb in COLOURS.items():
            (root/split/c).mkdir(parents=True)
            for i in range(n):
                im = np.clip(rng.normal(rgb, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(im).save(root/split/c/f'{i}.png')
    return root


@pytest.fixture
def dls(folder): return image_dls(folder, size=24, bs=8, augment='light', num_workers=0, device='cpu')


class Net(nn.Sequential):
    "Mean colour, then a linear layer."
    def __init__(self): super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


@pytest.fixture
def learn(dls, tmp_path):
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path, lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    return learn


def quiet(learn): return learn.no_bar()


def test_batches(dls):
    assert list(dls.vocab) == ['blue', 'green', 'red'] and dls.c == 3 and dls.n_inp == 1
    assert (len(dls.train_ds), len(dls.valid_ds), input_size(dls)) == (48, 18, 24)
    item = dls.train_ds[0]
    assert item[0].dtype == torch.uint8 and item[0].shape == (3, 24, 24) and isinstance(item[0], TensorImage)
    x, y = dls.one_batch()
    assert x.dtype == torch.float32 and x.shape == (8, 3, 24, 24) and y.dtype == torch.int64


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_may_be_written_into(folder, workers):
    "No batch that comes later, and no image in a cache, sees what is done to one."
    def epoch(spoil):
        dls, out = image_dls(folder, size=24, bs=8, num_workers=workers, device='cpu', cache=True), []
        assert dls.train.own_batches and dls.valid.own_batches
        for _ in range(2):
            for x, y in dls.train:
                out.append(x.clone())
                if spoil: x.zero_()
        return out
    assert all(torch.equal(a, b) for a, b in zip(epoch(False), epoch(True), strict=True))


def test_pixels_are_pillows(folder):
    dls = image_dls(folder, size=20, augment='none', num_workers=0, device='cpu', mean=(0, 0, 0), std=(1, 1, 1))
    x, y = dls.valid.one_batch()
    for i, s in enumerate(dls.valid_ds.items):
        ref = np.asarray(Image.open(s.path).resize((20, 20), Image.Resampling.BOX))
        assert abs(x[i].permute(1, 2, 0).numpy()*255 - ref).mean() < 1.5
        assert dls.vocab[y[i]] == s.label


def test_normalisation_round_trip(dls):
    set_stats(dls, (.5, .4, .3), (.2, .3, .4))
    assert get_stats(dls) == ((.5, .4, .3), (.2, .3, .4))
    x = TensorImage(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).contiguous())
    norm = dls.after_batch.fs[-1]
    ref = (x.double()/255 - torch.tensor([.5, .4, .3]).view(3, 1, 1))/torch.tensor([.2, .3, .4]).view(3, 1, 1)
    assert (norm(x)-ref).abs().max() < 1e-5 and x.dtype == torch.uint8
    assert (norm.decode(norm(x))*255 - x).abs().max() < 1e-3
    with pytest.raises(ValueError, match='not made by image_dls'): get_stats(type('D', (), {'loaders': []})())


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # torch's advice on machines of two processors
@pytest.mark.parametrize('augment', ['light', 'strong'])
def test_same_seed_same_batches_whatever_the_workers(folder, augment):
    def epochs(workers, seed=5):
        dls = image_dls(folder, size=16, bs=8, augment=augment, num_workers=workers, device='cpu', seed=seed)
        return [[(x, y) for x, y in dls.train] for _ in range(2)]
    runs = [epochs(w) for w in (0, 1, 3)]
    for run in runs[1:]:
        for a, b in zip(runs[0], run): assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b)) and len(a) == len(b)
    flat = lambda e: torch.cat([x.sum((1, 2, 3)) for x, _ in e]).sort()[0]
    assert not torch.equal(flat(runs[0][0]), flat(runs[0][1])) and not torch.equal(flat(runs[0][0]), flat(epochs(0, 6)[0]))


@pytest.mark.parametrize('tfms', [[], [Transform(lambda x: x)], [NormalizeUint8((.5,)*3, (.5,)*3)]], ids=['bytes', 'other', 'floats'])
def test_batches_stay_what_they_were(folder, tfms):
    "The memory that workers write to is used again; nobody who keeps a batch may notice."
    def batches(workers):
        dl = image_dls(folder, size=16, bs=4, num_workers=workers, device='cpu').train
        dl.after_batch = Pipeline(tfms)
        return list(dl)
    ours, ref = batches(1), batches(0)
    assert len(ours) == 12 and all(torch.equal(a, b) and type(a) is type(b) for o, r in zip(ours, ref) for a, b in zip(o, r))


@pytest.mark.parametrize('workers', [0, 2])
def test_any_size_of_augmented_images(folder, workers):
    kw = dict(size=16, bs=8, num_workers=workers, device='cpu')
    assert image_dls(folder, augment=lambda n: A.Compose([A.Resize(2*n, 3*n)]), **kw).one_batch()[0].shape == (8, 3, 32, 48)
    dls = image_dls(folder, augment=lambda n: A.Compose([A.Resize(2*n, 3*n)]), **kw)  # more than the shared memory was made for
    assert {x.shape for x, _ in dls.train} == {(8, 3, 32, 48)}
    dls = image_dls(folder, augment=lambda n: A.Compose([A.Resize(n, n), A.RandomScale(.5, p=.5)]), **kw)
    with pytest.raises(ValueError, match='needs one size'): list(dls.train)


@pytest.mark.skipif(not hasattr(os, 'nice'), reason='only Unix knows it')
@pytest.mark.parametrize('device, back', [('cpu', step_back), ('cuda', 0), (None, 0)])
def test_loader_processes_let_a_network_on_the_cpu_go_first(device, back):
    w = Workers(lambda i: (os.nice(0),), 1, device=device)
    assert [o for o, in w.run([(0,)])] == [min(19, os.nice(0) + back)]
    w.close()


def test_a_batch_travels_where_memory_is_not_inherited(folder):
    work = Workers(image_dls(folder, size=16, bs=8, num_workers=0, device='cpu').valid._make_batch, 1, slot_size=99_999).loader.dataset
    job = 0, (5, [0, 3])
    (shape, y), sent = work[job], pickle.loads(pickle.dumps(work))[job]
    assert shape == (2, 3, 16, 16) and isinstance(y, np.ndarray)
    x = torch.from_numpy(work.slots[0][:shape.numel()].reshape(shape))
    assert torch.equal(sent[0], x) and type(sent[0]) is TensorImage and y.tolist() == sent[1].tolist()
    close_idle_workers()


def test_workers_outlive_the_epoch(folder):
    dls = image_dls(folder, size=16, bs=8, num_workers=2, device='cpu')
    workers = lambda: [w.pid for w in dls.train._kept.loader._iterator._workers]
    dls.train.keep_workers = True
    first = len(list(dls.train)), workers()
    next(iter(dls.train))  # an epoch that is given up
    assert (len(list(dls.train)), workers()) == first
    assert len(list(copy.deepcopy(dls.train))) == len(list(pickle.loads(pickle.dumps(dls.train)))) == first[0]
    dls.train_ds.tls[0].tfms.fs[0].pipe = A.Compose([A.Resize(24, 24)])
    assert next(iter(dls.train))[0].shape[-1] == 24 and workers() != first[1]  # started anew: they would not know
    old = workers()
    for i, _ in enumerate(dls.train):  # an iteration within one has its own
        if i == 1: assert len(list(dls.train)) == first[0] and workers() == old
    assert i == first[0]-1
    it = dls.train._kept.loader._iterator
    it._workers_done_event.set()
    for q in it._index_queues: q.put(None)  # they come to an end, as after Ctrl-C
    for p in it._workers: p.join()
    assert len(list(dls.train)) == first[0] and not set(workers()) & set(old)
    close_idle_workers()
    assert not multiprocessing.active_children()


class Darken(Transform):
    k = 1.
    def encodes(self, x: TensorImage): return (x*self.k).to(torch.uint8)


@pytest.mark.parametrize('workers', [0, 2])
def test_what_changes_between_epochs_is_seen(folder, workers):
    dls = image_dls(folder, size=16, bs=48, num_workers=workers, device='cpu')
    dls.train.keep_workers = True
    mean = lambda: dls.train.after_batch.decode(next(iter(list(dls.train))))[0].mean()
    dark = Darken()
    dls.train.after_item.add(dark)
    a, dark.k = mean(), .5
    b = mean()
    assert b < .6*a
    red, items = dls.vocab.o2i['red'], dls.train_ds.tls[1].items
    assert (next(iter(dls.train))[1] == red).sum() == 16
    for i, o in enumerate(items): items[i] = replace(o, label='red')
    assert (next(iter(dls.train))[1] == red).all()
    close_idle_workers()


def test_device_colour_leaves_validation_batches_as_they_were(folder):
    def batches(workers):
        dls = image_dls(folder, size=16, bs=4, num_workers=workers, device='cpu', augment='light', colour_on='device')
        for dl in dls.loaders: dl.after_batch.fs = dl.after_batch.fs[:1]  # no normalisation, which copies
        return [x for dl in dls.loaders for x, _ in list(dl)]
    assert all(map(torch.equal, batches(2), batches(0)))


@pytest.mark.parametrize('workers', [0, 2])
def test_validation_in_the_middle_of_an_epoch_changes_nothing(folder, workers):
    plain, mixed = ([], [])
    for out in (plain, mixed):
        dls = image_dls(folder, size=16, bs=8, num_workers=workers, device='cpu')
        for x, _ in dls.train:
            out.append(x)
            if out is mixed: list(dls.valid)
    assert all(map(torch.equal, plain, mixed))


@pytest.mark.parametrize('end', ['all', 'break', 'fit', 'cancelled', 'bad'])
def test_no_worker_is_left_behind(folder, tmp_path, end):
    dls = image_dls(folder, size=16, bs=8, num_workers=2, device='cpu')
    seen = []
    if end == 'all': list(dls.train)
    if end == 'break':
        for _ in dls.train: break
    if end in ('fit', 'cancelled', 'bad'):
        def after_batch(learn):
            seen.append({p.pid for p in multiprocessing.active_children()})
            if len(seen) == 8 and end == 'cancelled': raise CancelFitException
            if len(seen) == 8 and end == 'bad': raise KeyError('a mistake in a callback')
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), loss_func=CrossEntropyLossFlat(), cbs=[KeepWorkers(), RunHistory()])
        with pytest.raises(KeyError) if end == 'bad' else nullcontext(), learn.no_bar(), learn.no_logging():
            learn.fit(2, cbs=Callback(after_batch=after_batch))
        assert len(set.union(*seen)) == (4 if len(seen) > 7 else 2)  # two for training, two for validation, whatever the epochs
        assert bool(multiprocessing.active_children()) == (end == 'bad')  # fastai tells no callback of an exception
        learn.export(tmp_path/'learner.pkl')
        assert b'.png' not in (tmp_path/'learner.pkl').read_bytes()  # an exported learner leaves its data behind
        if end == 'bad': close_idle_workers()  # as the next fit does
    assert not multiprocessing.active_children()


def test_same_batches_wherever_the_folder_lies(folder, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path/'elsewhere')
    a, b = ([x for x, _ in image_dls(p, size=16, num_workers=0, device='cpu').train] for p in (folder, tmp_path/'elsewhere'))
    assert all(torch.equal(x, u) for x, u in zip(a, b))


def test_two_copies_of_an_image_are_augmented_differently(tmp_path):
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i in range(8): im.save(tmp_path/c/f'{i}.png')
    dls = image_dls(tmp_path, size=16, bs=12, num_workers=2, device='cpu', valid_pct=.2)
    x = dls.one_batch()[0]
    assert len({t.numpy().tobytes() for t in x}) == len(x)


def test_splits(folder):
    dls = image_dls(folder, size=16, valid=None, valid_pct=.25, device='cpu', num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (36, 12)
    assert len(image_dls(folder, size=16, valid=None, device='cpu', num_workers=0).valid_ds) == 9
    held = [{s.path for s in image_dls(folder, folds=4, fold=k, size=16, device='cpu').valid_ds.items} for k in range(4)]
    assert len(set.union(*held)) == sum(map(len, held)) == 48


def test_table_and_list(folder):
    files = sorted((folder/'train').rglob('*.png'))
    df = pd.DataFrame({'path': [f.relative_to(folder) for f in files], 'label': [f.parent.name for f in files]})
    assert len(image_dls(folder, csv=df, size=16, device='cpu').train_ds) == 39
    order = ['red', 'green', 'blue']
    (folder/'train.txt').write_text(''.join(f'{f.relative_to(folder)}, {order.index(f.parent.name)}\n' for f in files))
    (folder/'val.txt').write_text(''.join(f'{f.relative_to(folder)}, {order.index(f.parent.name)}\n' for f in sorted((folder/'val').rglob('*.png'))))
    (folder/'classes.txt').write_text('\n'.join(order))
    dls = image_dls(folder, train='train.txt', classes=folder/'classes.txt', size=16, device='cpu')
    assert list(dls.vocab) == order and len(dls.valid_ds) == 18
    assert {s.label == s.path.parent.name for s in dls.train_ds.items+dls.valid_ds.items} == {True}


@pytest.mark.parametrize('kind', ['missing', 'empty', 'one class', 'no images'])
def test_user_mistakes(tmp_path, kind):
    make = {'missing': (), 'empty': (), 'one class': ('train/a/1.png',), 'no images': ('train/a/readme.txt',)}[kind]
    for f in make:
        (tmp_path/f).parent.mkdir(parents=True)
        Image.new('RGB', (9, 9)).save(tmp_path/f) if f.endswith('png') else (tmp_path/f).touch()
    path = tmp_path/'nope' if kind == 'missing' else tmp_path
    exc, msg = {'missing': (FileNotFoundError, 'there is no folder'), 'empty': (ValueError, 'there are no images'),
                'one class': (ValueError, "only one class, 'a'"), 'no images': (ValueError, 'there are no images')}[kind]
    with pytest.raises(exc, match=msg): image_dls(path, size=16)


def test_more_mistakes(folder):
    with pytest.raises(ValueError, match="unknown augmentation 'lite'"): image_dls(folder, augment='lite')
    for kw in (dict(bs=0), dict(num_workers=-1)):
        with pytest.raises(ValueError, match='give 1 or more, and 0 or more'): image_dls(folder, **kw)
    with pytest.raises(ValueError, match="unknown value of data source field 'on_bad': 'ignore'"): image_dls(folder, on_bad='ignore')


def test_nothing_to_predict_is_said_so(folder):
    dls = image_dls(folder, size=16, device='cpu', num_workers=0)
    with pytest.raises(ValueError, match='no images to predict'): dls.test_dl([])
    assert len(dls.test_dl(dls.valid_ds.items[:3]).dataset) == 3


@pytest.fixture
def spoiled(folder, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path/'spoiled')
    f = tmp_path/'spoiled'/'train'/'red'/'3.png'
    f.write_bytes(f.read_bytes()[:300])
    return tmp_path/'spoiled'


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_image_is_named(spoiled, workers):
    dls = image_dls(spoiled, size=16, bs=8, num_workers=workers, device='cpu')  # 48 images: no rest that would be dropped unread
    with pytest.raises(ImageError) as e: list(dls.train)
    assert str(e.value).startswith(str(spoiled/'train'/'red'/'3.png')) and '\n' not in str(e.value)
    assert "`mstoolkit check` lists all such files, on_bad='skip'" in str(e.value)
    assert e.value.kind in ('truncated', 'damaged')


def test_a_bad_image_is_skipped(spoiled, capsys):
    dls = image_dls(spoiled, size=16, num_workers=0, device='cpu', on_bad='skip')
    assert [f.name for f in dls.left_out] == ['3.png'] and len(dls.train_ds) == 47
    assert 'left out: ' in capsys.readouterr().out
    assert len(list(dls.train))


def test_a_file_that_vanishes_is_named(spoiled):
    dls = image_dls(spoiled, size=16, num_workers=0, device='cpu')
    (spoiled/'val'/'red'/'0.png').unlink()
    with pytest.raises(ImageError, match='0.png cannot be read: No such file') as e: list(dls.valid)
    assert e.value.kind == 'missing'


def die(im, **kwargs):
    if multiprocessing.parent_process(): os.kill(os.getpid(), signal.SIGKILL)
    return im


def deadly(size):
    "A recipe that kills its process, if that is a worker."
    return A.Compose([A.Lambda(image=die), A.Resize(size, size)])


def test_a_worker_that_dies_is_reported(folder):
    dls = image_dls(folder, size=16, num_workers=1, device='cpu', augment=deadly)
    with pytest.raises(RuntimeError, match='a loader process died, most often for want of memory'): list(dls.train)


def test_unreadable_images(spoiled):
    files = sorted((spoiled/'train').rglob('*.png'))
    bad = unreadable_images(files)
    assert list(bad) == [spoiled/'train'/'red'/'3.png']


def test_links_uppercase_and_hidden(folder, tmp_path):
    for c in ('red', 'blue'):
        (tmp_path/'train'/c).mkdir(parents=True)
        for i in range(4): (tmp_path/'train'/c/f'{i}.PNG').symlink_to(folder/'train'/c/f'{i}.png')
        (tmp_path/'train'/c/'._0.png').write_bytes(b'junk')
    dls = image_dls(tmp_path, size=16, bs=2, device='cpu')
    assert len(dls.train_ds)+len(dls.valid_ds) == 8 and len(list(dls.train))


def test_decode_side_leaves_enough_for_the_smallest_crop():
    assert AugmentImage('none', 224, 1).decode_side == 224
    assert AugmentImage('light', 224, 0).decode_side == 251  # 224/sqrt(.8)
    assert AugmentImage('shift', 32, 0).decode_side == 32


def test_workers(monkeypatch):
    monkeypatch.setattr('os.sched_getaffinity', lambda _: range(64), raising=False)
    monkeypatch.setattr('os.access', lambda *_: True)
    assert (default_workers(100), default_workers(10**6)) == (0, 16)
    if sys.platform == 'linux':
        monkeypatch.setattr('os.access', lambda *_: False)
        assert default_workers(10**6) == 0, 'no process starts without shared memory'
    monkeypatch.setattr('os.sched_getaffinity', lambda _: range(1), raising=False)
    assert default_workers(10**6) == 0


# what fastai does with them

def test_show_batch_and_results(learn):
    import matplotlib.pyplot as plt
    plt.close('all')
    learn.dls.show_batch(max_n=4)
    learn.dls.train.show_batch(max_n=4, unique=True)
    with quiet(learn): learn.show_results(max_n=4)
    assert {ax.get_title() for f in plt.get_fignums() for ax in plt.figure(f).axes if ax.get_title()} <= set(
        [a for a in COLOURS] + [f'{a}\n{b}' for a in COLOURS for b in COLOURS])
    plt.close('all')


def test_it_learns_and_validates(learn):
    with quiet(learn): assert learn.validate()[1] == 1


def test_predict(learn, folder):
    f = folder/'val'/'green'/'0.png'
    im = Image.open(f)
    rgb = np.asarray(im)
    with quiet(learn):
        for item in (f, str(f), im, PILImage.create(f), rgb, np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])):
            name, idx, probs = learn.predict(item)
            assert name == 'green' and idx == 1 and probs.shape == (3,), type(item)


def test_predict_gray(learn):
    with quiet(learn):
        a = [learn.predict(o)[2] for o in (np.full((9, 9), 200, np.uint8), Image.new('L', (9, 9), 200), Image.new('RGB', (9, 9), (200,)*3))]
    assert torch.equal(a[0], a[1]) and torch.equal(a[1], a[2])


def test_test_dl_keeps_order(learn, folder):
    files = sorted((folder/'val').rglob('*.png'))
    for items in (files, [str(f) for f in files]):
        with quiet(learn): preds, _ = learn.get_preds(dl=learn.dls.test_dl(items))
        assert [learn.dls.vocab[i] for i in preds.argmax(1)] == [f.parent.name for f in files]


def test_get_preds_equals_the_model(learn):
    with quiet(learn): preds, targs = learn.get_preds()
    x, y = learn.dls.valid.one_batch()
    with torch.no_grad(): ref = learn.model.eval()(x).softmax(1)
    assert torch.equal(targs[:len(y)], y)
    assert torch.allclose(preds[:len(y)].softmax(1) if preds.min() < 0 else preds[:len(y)], ref, atol=1e-5)


def test_tta_augments(learn):
    with quiet(learn):
        a, y = learn.tta(n=2)
        b, _ = learn.get_preds()
        alone, _ = learn.tta(n=1, beta=1)
    assert a.shape == b.shape and (a.argmax(1) == y).float().mean() == 1
    assert not torch.allclose(a, b) and torch.allclose(alone, b)


def test_interpretation(learn):
    import matplotlib.pyplot as plt
    with quiet(learn):
        interp = ClassificationInterpretation.from_learner(learn)
        assert np.array_equal(interp.confusion_matrix(), np.eye(3)*6)
        interp.plot_top_losses(4)
        interp.plot_confusion_matrix()
        interp.print_classification_report()
    plt.close('all')


@pytest.mark.filterwarnings('ignore:load_learner:UserWarning')
def test_export_and_load(learn, folder):
    f = folder/'val'/'red'/'1.png'
    learn.export('m.pkl')
    again = load_learner(learn.path/'m.pkl')
    with quiet(learn), quiet(again):
        a, b = learn.predict(f), again.predict(f)
    assert a[0] == b[0] == 'red' and torch.allclose(a[2], b[2])
    assert list(again.dls.vocab) == ['blue', 'green', 'red'] and input_size(again.dls) == 24


@pytest.mark.cuda
def test_kept_workers_feed_the_gpu(folder):
    "Through pinned memory, epoch after epoch, the batches that a process without workers makes on the CPU."
    cpu, gpu = (image_dls(folder, size=16, bs=8, colour_on='workers', device=d, num_workers=n).train for d, n in (('cpu', 0), ('cuda', 2)))
    gpu.keep_workers = True
    for _ in range(2):
        for (x, y), (u, v) in zip(list(cpu), list(gpu), strict=True):
            assert u.is_cuda and v.is_cuda and y.tolist() == v.tolist()
            torch.testing.assert_close(u.cpu(), x, atol=1e-5, rtol=0)
    close_idle_workers()


@pytest.mark.cuda
@pytest.mark.parametrize('how', ['to_fp16', 'to_bf16'])
def test_mixed_precision(folder, tmp_path, how):
    learn = getattr(Learner(image_dls(folder, size=16, device='cuda'), Net(), loss_func=CrossEntropyLossFlat(), path=tmp_path), how)()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.01)


def test_lr_find(learn):
    import matplotlib.pyplot as plt
    with quiet(learn): assert learn.lr_find(num_it=12, show_plot=False).valley > 0
    plt.close('all')


def test_image_loader(folder, spoiled):
    files = sorted((spoiled/'train').rglob('*.png'))
    for workers in (0, 2):
        good, bad, n = [], {}, 0
        for x, ok, errors in image_loader(files, 20, bs=7, num_workers=workers):
            assert x.dtype == torch.uint8 and x.shape == (len(ok), 3, 20, 20)
            good += ok; bad |= errors; n += len(ok)
        assert good == [f for f in files if f != spoiled/'train'/'red'/'3.png'] and list(bad) == [spoiled/'train'/'red'/'3.png']
    x = next(iter(image_loader(files[:3], 20)))[0]
    valid = image_dls(folder, size=20, device='cpu', num_workers=0).test_dl(files[:3]).one_batch()[0]
    assert torch.equal(NormalizeUint8((.485, .456, .406), (.229, .224, .225))(TensorImage(x)), valid)  # prediction sees what validation saw


def test_only_bad_images_in_a_loader(tmp_path):
    (tmp_path/'x.jpg').write_bytes(b'no')
    x, ok, bad = next(iter(image_loader([tmp_path/'x.jpg'], 8)))
    assert ok == [] and len(bad) == 1


def test_large_jpegs_are_decoded_reduced(tmp_path):
    im = cv2.resize(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8), (800, 600), interpolation=cv2.INTER_CUBIC)
    out = BytesIO()
    Image.fromarray(im).save(out, 'JPEG', quality=95)
    (tmp_path/'a.jpg').write_bytes(out.getvalue())
    a = AugmentImage('none', 64, 1).encodes(tmp_path/'a.jpg')
    ref = cv2.resize(im, (64, 64), interpolation=cv2.INTER_AREA)
    assert abs(a.permute(1, 2, 0).numpy().astype(int)-ref).mean() < 2
