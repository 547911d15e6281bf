"""Images per second from files to probabilities: ours beside fastai's `get_preds` and timm's loader and loop.

    python benchmarks/predict.py                      # writes benchmarks/predict.md
    python benchmarks/predict.py --n 64 --networks resnet18   # a quick look: prints, writes nothing
    python benchmarks/predict.py --photos FOLDER      # on photographs of your own: FOLDER/<class>/*.jpg

Random weights, the same network for all. Every round runs each contestant once on all images, from the list of files to a table of
probabilities; making ready (folding, stopwatch, starting processes) counts. Ratios are medians of the rounds' ratios.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from fastai.vision.all import CrossEntropyLossFlat, ImageDataLoaders, Resize, vision_learner
from input import generated
from machine import machine
from mstoolkit.classifier import Classifier, ModelHeader
from mstoolkit.core import keep_freed_memory, write_text
from mstoolkit.data.sources import image_files
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.predict import predict_probs

BS = 64


def fastai(folder, net, side, workers):
    "`get_preds` of a learner."
    dls = ImageDataLoaders.from_folder(folder, valid_pct=.1, seed=0, item_tfms=Resize(side), bs=BS, device='cpu', num_workers=workers)
    learn = vision_learner(dls, net, pretrained=False, n_out=dls.c, loss_func=CrossEntropyLossFlat())
    def run(files):
        with learn.no_bar(), learn.no_logging(): return learn.get_preds(dl=learn.dls.test_dl(files, num_workers=workers))[0]
    return run


def timm_way(folder, net, side, workers):
    "As timm's inference.py: its dataset, its loader, fp32, channels first."
    model, cfg = timm.create_model(net, pretrained=False, num_classes=2).eval(), dict(input_size=(3, side, side), interpolation='bilinear')
    def run(files):
        data = timm.data.create_dataset('', str(folder))
        loader = timm.data.create_loader(data, batch_size=BS, use_prefetcher=False, num_workers=workers, device=torch.device('cpu'), **cfg)
        with torch.inference_mode(): return torch.cat([model(x).softmax(-1) for x, _ in loader])
    return run


def ours(folder, net, side, workers, precision):
    "`predict_probs` of the same backbone under a plain head."
    model = multiscale_model(net, 'plain', 2, pretrained=False, img_size=side).eval()
    clf = Classifier(model, ModelHeader(config=model.config, classes=['a', 'b'], size=side, mean=model[0].mean, std=model[0].std))
    return lambda files: predict_probs(clf, files, bs=BS, num_workers=workers, device='cpu', precision=precision)[0]


def contest(o, folder, files, net, side):
    "A table of images per second and ratios."
    w = torch.get_num_threads()
    made = {f'fastai `get_preds`, {w} processes': fastai(folder, net, side, w), 'fastai `get_preds`, no processes': fastai(folder, net, side, 0),
            f'timm, {w} processes': timm_way(folder, net, side, w)}
    for precision in 'exact', 'fp32', 'auto':
        for n in (0, w) if precision == 'auto' else [w]:
            made[f"ours, precision '{precision}', {n or 'no'} processes"] = ours(folder, net, side, n, precision)
    took = {k: [] for k in made}
    for _ in range(o.rounds):
        for k, f in made.items():
            start = time.perf_counter()
            assert len(f(files)) == len(files)
            took[k].append(time.perf_counter()-start)
    best = {k: statistics.median(v) for k, v in took.items()}
    ratio = lambda a, b: statistics.median(x/y for x, y in zip(took[a], took[b]))
    theirs = [min((k for k in made if k.startswith(n)), key=best.get) for n in ('fastai', 'timm')]
    return '\n'.join(['| | images/s | fastai ÷ it | timm ÷ it |', '|---|---|---|---|',
                      *(f'| {k} | {len(files)/s:.0f} | {ratio(theirs[0], k):.2f} | {ratio(theirs[1], k):.2f} |' for k, s in best.items())])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--photos', type=Path, help='folder of class folders of JPEGs')
    p.add_argument('--n', type=int, default=2000, help='images')
    p.add_argument('--networks', nargs='+', default=['resnet50 224', 'tf_efficientnet_lite0 128'], help="network, or 'network side'")
    p.add_argument('--rounds', type=int, default=2)
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    o = p.parse_args()
    keep_freed_memory()  # for all alike
    with tempfile.TemporaryDirectory() as tmp:
        folder = o.photos or generated(Path(tmp)/'images', o.n)
        files = sorted(image_files(folder))[:o.n]
        parts = {}
        for text in o.networks:
            net, _, side = text.partition(' ')
            parts[f'{net}, {side or 224} px'] = contest(o, folder, files, net, int(side or 224))
    command = 'python benchmarks/predict.py' + ' --photos FOLDER'*bool(o.photos)
    page = '\n\n'.join([f'# From files to probabilities\n\n    {command}', f"{o.date}, {machine()}, torch {torch.__version__.partition('+')[0]}. "
                        f"{len(files):,} {'photographs' if o.photos else 'generated JPEGs of 500 × 375'}, batches of {BS}, {o.rounds} rounds; the divisor is "
                        "the faster of fastai's two, and timm's.", *(f'## {k}\n\n{v}' for k, v in parts.items())]) + '\n'
    print(page)
    if o.n == 2000: write_text(Path(__file__).with_suffix('.md'), page)


if __name__ == '__main__': main()
