"""Images per second from files to a training batch: this library beside the report's torchvision pipeline, fastai and bare decoding.

    python benchmarks/input.py                      # on generated JPEGs
    python benchmarks/input.py --photos FOLDER      # also on photographs of your own: FOLDER/<class>/*.jpg

Everything but the workers' part runs in one process on one thread, which keeps freed memory. The contestants take turns; each figure is the
median of its rounds.
"""
import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
import albumentations as A  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from fastai.vision.all import (Brightness, Contrast, Dihedral, Hue, ImageDataLoaders, Normalize, RandomResizedCrop, Rotate,  # noqa: E402
                               Saturation, imagenet_stats)
from torchvision import transforms as T  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

from machine import machine  # noqa: E402
from mstoolkit.data.augment import light_tfms  # noqa: E402
from mstoolkit.core import keep_freed_memory  # noqa: E402
from mstoolkit.core import write_text  # noqa: E402
from mstoolkit.data.core import image_dls  # noqa: E402
from mstoolkit.data.image import read_image  # noqa: E402
from mstoolkit.data.workers import close_idle_workers  # noqa: E402

SIZE, BS = 224, 32


def generated(folder, n, w=500, h=375):
    "`n` JPEGs with the texture and the file size of photographs, in two class folders."
    rng = np.random.default_rng(0)
    for i in range(n):
        d = folder/'ab'[i % 2]
        d.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(d/f'{i:04}.jpg'), np.clip(photo(rng, w, h)+120, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])
    return folder


def light_without_jitter(size):
    "Report A's geometry alone: the jitter is left to the device."
    return A.Compose(light_tfms(size).transforms[:-1])


def photo(rng, w, h):
    "Noise at several scales: the texture of a photograph, and a JPEG as large as one."
    layers = [(96, 50), (24, 22), (6, 9), (2, 4)]
    return sum(cv2.resize(rng.normal(0, s, (h//k+1, w//k+1, 3)).astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC) for k, s in layers)


def torchvision_loader(folder):
    "Report A, figure 1."
    tfm = T.Compose([T.RandomResizedCrop(SIZE, scale=(.8, 1.)), T.RandomHorizontalFlip(), T.RandomVerticalFlip(), T.RandomRotation(15),
                     T.ColorJitter(brightness=.2, contrast=.2, saturation=.2, hue=.1), T.ToTensor(), T.Normalize(*imagenet_stats)])
    return torch.utils.data.DataLoader(ImageFolder(folder, tfm), BS, shuffle=True, drop_last=True)


def fastai_loader(folder):
    "The same operations with fastai's transforms."
    tfms = [Dihedral(pad_mode='zeros'), Rotate(15, p=1., pad_mode='zeros'), Brightness(.1, p=1.), Contrast(.2, p=1.), Saturation(.2, p=1.),
            Hue(.1, p=1.), Normalize.from_stats(*imagenet_stats, cuda=False)]
    return ImageDataLoaders.from_folder(folder, valid_pct=.01, item_tfms=RandomResizedCrop(SIZE, min_scale=.8), batch_tfms=tfms, bs=BS,
                                        num_workers=0, device='cpu').train


def ours(folder, augment='light', num_workers=0, **kw):
    return image_dls(folder, valid_pct=.01, size=SIZE, bs=BS, augment=augment, device='cpu', num_workers=num_workers, **kw).train


def without_float(dl):
    "What the workers do: uint8 batches, not yet normalised."
    dl = dl.new()
    dl.after_batch.fs.clear()
    return dl


def rate(batches, limit):
    "Images per second over one pass of at most `limit` images."
    n, t = 0, time.perf_counter()
    for b in batches:
        n += len(b[0]) if isinstance(b, (list, tuple)) else 1
        if n >= limit: break
    return n/(time.perf_counter()-t)


def contest(contestants, rounds, limit):
    "Median rates; every round runs all contestants, one after the other."
    rates = {name: [] for name in contestants}
    for _ in range(rounds+1):
        for name, make in contestants.items(): rates[name].append(rate(make(), limit))
    return {name: statistics.median(r[1:]) for name, r in rates.items()}  # the first round only warms up


def table(rates, base):
    "Rates in rows, beside the one called `base`."
    rows = [f'| {name} | {r:,.0f} | {r/rates[base]:.2f} |' for name, r in rates.items()]
    return '\n'.join([f'| | images/s | ÷ {base} |', '|---|---|---|', *rows])


def decode_only(files):
    for f in files: yield read_image(f)


def single(folder, rounds, limit):
    "Every way from files to a batch, in this process."
    files = sorted(folder.rglob('*.jpg'))
    tv, fa, full, geo = torchvision_loader(folder), fastai_loader(folder), ours(folder), ours(folder, light_without_jitter)
    u8, u8_geo = without_float(full), without_float(geo)
    rates = contest({'decoding alone': lambda: decode_only(files), 'torchvision as in the report': lambda: tv, 'fastai, the same operations': lambda: fa,
                     'ours, float batch': lambda: full, "ours, uint8 (the workers' part)": lambda: u8,
                     'ours, uint8, jitter left to the device': lambda: u8_geo}, rounds, limit)
    f = rates['ours, float batch']
    more = {n: f/rates[n] for n in ('torchvision as in the report', 'fastai, the same operations')}
    return table(rates, 'decoding alone') + '\n\n' + '; '.join(f'ours, float batch ÷ {n}: {r:.2f}' for n, r in more.items()) + '.'


def with_workers(tmp, rounds, limit):
    "One worker process beside two, kept as in a fit, and two that are started anew for each epoch."
    folder = generated(tmp/'many', limit+32)
    kept = {n: ours(folder, num_workers=n) for n in (1, 2)}
    for dl in kept.values(): dl.keep_workers = True
    rates = contest({'1 worker': lambda: kept[1], '2 workers': lambda: kept[2], '2 workers, started anew': lambda: ours(folder, num_workers=2)}, rounds, limit)
    close_idle_workers()
    return table(rates, '1 worker')


def with_cache(tmp, rounds, limit):
    "The presized cache beside decoding, on images of 1,000 px."
    folder = generated(tmp/'large', limit+32, 1000, 750)
    plain, t = ours(folder), time.perf_counter()
    cached = ours(folder, cache=tmp/'cache')
    built = f'The cache of {limit+32} images took {time.perf_counter()-t:.1f} s to build.'
    return table(contest({'decoded': lambda: plain, 'from the cache': lambda: cached}, rounds, limit), 'decoded') + f'\n\n{built}'


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--photos', type=Path, help='folder of class folders of JPEGs, measured too')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--limit', type=int, default=256, help='images a round and contestant')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    args = p.parse_args()
    threads = machine()
    torch.set_num_threads(1); cv2.setNumThreads(1)
    keep_freed_memory()  # for all contestants alike, as our workers do
    tmp = Path(tempfile.mkdtemp())
    try:
        folder = generated(tmp/'images', args.limit+64)
        parts = {'Generated JPEGs of 500 × 375': single(folder, args.rounds, args.limit)}
        if args.photos:
            h, w, _ = read_image(next(args.photos.rglob('*.jpg'))).shape
            parts[f'Photographs, the first of {w} × {h}'] = (single(args.photos, args.rounds, args.limit) + '\n\n'
                                                             'What is done at the training size takes the same time whatever the size of the file.')
        parts['Worker processes, generated JPEGs, float batch'] = with_workers(tmp, args.rounds, 8*args.limit)
        parts['The presized cache, generated JPEGs of 1,000 × 750, float batch'] = with_cache(tmp, args.rounds, args.limit)
    finally: shutil.rmtree(tmp)
    command = 'python benchmarks/input.py' + ' --photos FOLDER'*bool(args.photos)
    text = '\n\n'.join([f'# From files to batches\n\n    {command}', f"{args.date}, {threads}, of which one is used but for the workers, "
                        f"torch {torch.__version__.partition('+')[0]}. Report A's augmentation at {SIZE} px, batches of {BS}; medians of {args.rounds} rounds, "
                        'in each of which every contestant had its turn.', *(f'## {k}\n\n{v}' for k, v in parts.items())]) + '\n'
    print(text)
    write_text(Path(__file__).with_suffix('.md'), text)


if __name__ == '__main__': main()
