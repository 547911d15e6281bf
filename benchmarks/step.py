"""Training steps by arithmetic, beside the report's literal models and fastai; the stopwatch's price; several trainings at once.

    python benchmarks/step.py                         # all parts; writes benchmarks/step.md
    python benchmarks/step.py --parts report threads  # some of them; prints, writes nothing
    python benchmarks/step.py --photos FOLDER         # whole epochs on photographs of your own: FOLDER/<class>/*.jpg

Speeds are ratios, both sides in one run: every round runs each contestant once, a figure is the median of the rounds' ratios.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import cv2
import torch
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import ImageDataLoaders, RandomResizedCrop, vision_learner
from heads import batch, make_heads, train_step
from input import generated
from machine import machine
from mstoolkit.core import keep_freed_memory, write_text
from mstoolkit.data import workers
from mstoolkit.models.arithmetic import autocast, fastest, few_images, layouts, time_ways, training_step, trial, ways
from mstoolkit.models.fold import fold_resting_norms
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.recipe import Recipe
from mstoolkit.train import fit_recipe, recipe_dls, recipe_learner

NETWORKS = [('resnet50', 8, 224), ('resnest101e', 4, 224), ('resnet18', 32, 128), ('convnext_tiny', 8, 224), ('vit_small_patch16_224', 8, 224),
            ('tf_efficientnet_lite0', 32, 128)]


def ratios(base, other): return statistics.median(a/b for a, b in zip(base, other))


def turns(rounds, **contestants):
    "Seconds of each, every round each once, the first round for warming up."
    took = {k: [] for k in contestants}
    for _ in range(rounds+1):
        for k, f in contestants.items(): s = time.perf_counter(); f(); took[k].append(time.perf_counter()-s)
    return {k: v[1:] for k, v in took.items()}


def name(way): return ' '.join(way)


def arithmetic(o):
    "Forward and backward of each network in each way."
    can, rows = ways('auto', 'auto', 'cpu'), []
    for net, bs, side in NETWORKS:
        torch.manual_seed(0)
        model = multiscale_model(net, 'plain', 100, pretrained=False, img_size=side)
        took = time_ways(training_step(model, torch.randn(bs, 3, side, side), can), can, o.rounds, give_up=1e9)
        rows.append(f'| {net}, {bs}, {side} | ' + ' | '.join(f'{ratios(took[can[0]], took[w]):.2f}' for w in can[1:]) + f' | {name(fastest(took))} |')
    return '\n'.join([f'| network, batch, side | {" | ".join(map(name, can[1:]))} | `Arithmetic` chooses |', '|---'*(len(can)+1) + '|', *rows, '',
                      'Times of fp32 contiguous ÷ those of each way, forward and backward.'])


def in_way(step, way):
    "An optimisation step under autocast."
    def run():
        with autocast(way[0], 'cpu'): step()
    return run


def report(o):
    "Whole optimisation steps of Report A's models, as published in fp32, and as computed here in the way that the stopwatch chooses."
    rows, (x, y) = [], batch(4, 'cpu')
    for head in 'pyramid', 'gated':
        torch.manual_seed(0)
        literal, model = make_heads('cpu')[f'literal {head}'], multiscale_model('resnest101e', head, 100, pretrained=False).train()
        body = multiscale_model('resnest101e', 'plain', 100, pretrained=False)[0].train()
        can = ways('auto', 'auto', 'cpu')
        way = fastest(time_ways(training_step(model, x, can), can, 4))
        model.to(memory_format=layouts[way[1]])
        steps = {'literal': train_step(body, literal.train(), x, y),
                 'ours': in_way(train_step(model[0], model[1], x.contiguous(memory_format=layouts[way[1]]), y), way)}
        took = turns(o.rounds, **steps)
        rows.append(f'| {head} | {statistics.median(took["literal"]):.2f} | {statistics.median(took["ours"]):.2f} | {name(way)} | '
                    f'{ratios(took["literal"], took["ours"]):.2f} |')
    return '\n'.join(['| ResNeSt-101e, batch of 4, 224 px | literal, fp32, s | ours, s | in | literal ÷ ours |', '|---|---|---|---|---|', *rows])


def epochs(o):
    "Whole epochs from files, without validation: fastai's `vision_learner` beside a recipe of ours."
    with tempfile.TemporaryDirectory() as tmp:
        folder = o.photos or generated(Path(tmp), 256)
        return '\n'.join(['| network, batch, side | fastai, s | ours, s | in | fastai ÷ ours |', '|---|---|---|---|---|',
                          *(_epochs(o, folder, *net) for net in (('resnet50', 16, 224), ('tf_efficientnet_lite0', 32, 128))), '',
                          "fastai: `RandomResizedCrop`, as it is; ours: `augment='light'`, which jitters colours besides. A plain head, no mixing, "
                          'each with its own number of loader processes. The way is chosen by the stopwatch before, its price is below.'])


def _epochs(o, folder, net, bs, side):
    def fastai():
        dls = ImageDataLoaders.from_folder(folder, valid_pct=.01, seed=0, item_tfms=RandomResizedCrop(side, min_scale=.8), bs=bs, device='cpu')
        return vision_learner(dls, net, pretrained=False, n_out=dls.c, loss_func=CrossEntropyLossFlat())
    r = Recipe(backbone=net, head='plain', pretrained=False, size=side, bs=bs, epochs=1, cutmix=0., device='cpu')
    def ours(way=('auto', 'auto')):
        r_ = Recipe.from_dict(dict(precision=way[0], memory_format=way[1]), r)
        return recipe_learner(r_, recipe_dls(r_, folder, valid_pct=.01))
    learn = ours()
    learn.arithmetic.share = 1e9
    x, can = few_images(learn.dls.one_batch()[0]), ways('auto', 'auto', 'cpu')
    way = fastest(time_ways(training_step(learn.model, x, can), can, 4))
    took = {'fastai': [], 'ours': []}
    for _ in range(o.epoch_rounds):
        for k in took:
            learn = fastai() if k == 'fastai' else ours(way)
            if k == 'fastai': learn.unfreeze()
            with learn.no_bar(), learn.no_logging():
                s = time.perf_counter()
                learn.fit(1, 1e-4) if k == 'fastai' else fit_recipe(learn, r)
                took[k].append(time.perf_counter()-s)
    return (f'| {net}, {bs}, {side} | {statistics.median(took["fastai"]):.1f} | {statistics.median(took["ours"]):.1f} | {name(way)} | '
            f'{ratios(took["fastai"], took["ours"]):.2f} |')


def choosing(o):
    "What the stopwatch costs in a training of ten minutes, by the rounds that it is given there."
    rows = []
    for net, bs, side in ('resnet50', 32, 224), ('tf_efficientnet_lite0', 32, 128), ('resnest101e', 16, 224):
        torch.manual_seed(0)
        model, x, can = multiscale_model(net, 'gated', 10, pretrained=False), torch.randn(bs, 3, side, side), ways('auto', 'auto', 'cpu')
        plain = statistics.median(time_ways(training_step(model, x, can[:1]), can[:1], 2)[can[0]])
        start, (few, rounds) = time.perf_counter(), trial(x, int(600/plain), len(can), .02)
        way = name(fastest(time_ways(training_step(model, few, can), can, rounds))) if rounds else '-'
        spent = time.perf_counter() - start
        rows.append(f'| {net}, {bs}, {side} | {600/plain:.0f} | {len(few)} | {rounds} | {spent:.1f} | {spent/600:.1%} | {way} |')
    return '\n'.join(['| network, batch, side | plain steps in ten minutes | images tried on | rounds | s | of ten minutes | chosen |',
                      '|---|---|---|---|---|---|---|', *rows])


def optimizer(o):
    "AdamW's step as torch does it when it is not told otherwise, and in one kernel, as recipes have it, beside the rest of a training step."
    rows = []
    for net, bs, side in ('resnet10t', 64, 64), ('tf_efficientnet_lite0', 32, 128), ('resnet50', 8, 224):
        torch.manual_seed(0)
        model, x, can = multiscale_model(net, 'gated', 100, pretrained=False), torch.randn(bs, 3, side, side), ways('auto', 'auto', 'cpu')
        way = fastest(time_ways(training_step(model, x, can), can, 3))
        step = training_step(model.to(memory_format=layouts[way[1]]), x, [way])
        loop, fused = (torch.optim.AdamW(model.parameters(), 1e-5, fused=f) for f in (None, True))
        step(way)
        for p in model.parameters(): p.grad = torch.zeros_like(p)
        took = turns(2*o.rounds, rest=lambda: step(way), loop=loop.step, fused=fused.step)
        rest, a, b = (1e3*statistics.median(took[k]) for k in ('rest', 'loop', 'fused'))
        rows.append(f'| {net}, {bs}, {side} | {name(way)} | {rest:.0f} | {a:.1f} | {b:.1f} | {(rest+a)/(rest+b):.2f} |')
    return '\n'.join(['| network, batch, side | in | forward and backward, ms | AdamW, ms | `fused`, ms | whole step ÷ whole step with `fused` |', '|---|---|---|---|---|---|', *rows])


def resting(o):
    "Forward and backward of all weights under `FreezeNorms`, with the norms' own work and with that of the convolutions before them."
    rows = []
    for net, bs, side in ('tf_efficientnet_lite0', 16, 160), ('tf_efficientnet_lite2', 8, 256), ('resnet50', 8, 224), ('mobilenetv3_large_100', 16, 224):
        for way in ('fp32', 'channels-last'), ('bf16', 'channels-last'):
            model, x = multiscale_model(net, 'gated', 100, pretrained=False).to(memory_format=layouts[way[1]]).train(), torch.randn(bs, 3, side, side)
            for m in model[0].modules():
                if isinstance(m, torch.nn.modules.batchnorm._NormBase): m.eval()
            folded = deepcopy(model)
            n = fold_resting_norms(folded, x)
            a, b = (training_step(m, x, [way]) for m in (model, folded))
            took = turns(o.rounds, plain=lambda: a(way), folded=lambda: b(way))
            rows.append(f'| {net}, {bs}, {side} | {name(way)} | {n} | {statistics.median(took["plain"]):.3f} | {statistics.median(took["folded"]):.3f} | '
                        f'{ratios(took["plain"], took["folded"]):.2f} |')
    return '\n'.join(['| network, batch, side | in | norms folded | their own work, s | folded, s | ÷ |', '|---|---|---|---|---|---|', *rows])


BESIDE = """
import sys, time
from pathlib import Path
from mstoolkit.core import keep_freed_memory
from mstoolkit.data import workers
from mstoolkit.models.arithmetic import layouts
from mstoolkit.recipe import Recipe
from mstoolkit.train import recipe_dls, recipe_learner
keep_freed_memory()
workers.step_back = int(sys.argv[2])
timm, layout = ('stem_type=deep', 'stem_width=16', 'channels=(32,64,128,256)'), layouts['channels-last']
r = Recipe(backbone='resnet10t', timm=timm, head='plain', pretrained=False, size=64, bs=64, augment='upright', num_workers=2, device='cpu')
learn = recipe_learner(r, recipe_dls(r, Path(sys.argv[1]), valid_pct=.01))
model = learn.model.to(memory_format=layout).train()
n = 0
for x, y in learn.dls.train:
    if n == 10: start = time.perf_counter() # the processes have begun
    model(x.contiguous(memory_format=layout)).square().mean().backward()
    n += 1
print((n - 10)*64/(time.perf_counter() - start))
"""


def beside(o):
    "Training a small network on small images, as the command line sets threads, by how far loader processes step back for it."
    took = {n: [] for n in (0, workers.step_back, 19)}
    with tempfile.TemporaryDirectory() as tmp:
        generated(Path(tmp), 8192, 28, 28)
        for _ in range(o.rounds):
            for n in took:
                done = subprocess.run([sys.executable, '-W', 'ignore', '-c', BESIDE, tmp, str(n)], env=os.environ | dict(GOMP_SPINCOUNT='1000'),
                                      capture_output=True, text=True, check=True)
                took[n].append(float(done.stdout))
    return '\n'.join(['| loader processes step back by | images/s | ÷ those of 0 |', '|---|---|---|',
                      *(f'| {n} | {statistics.median(v):.0f} | {ratios(v, took[0]):.2f} |' for n, v in took.items())])


TRAINING = """
import time, torch
from mstoolkit.core import keep_freed_memory
from mstoolkit.models.arithmetic import training_step
from mstoolkit.models.fusion import multiscale_model
keep_freed_memory()
torch.manual_seed(0)
way = 'fp32', 'channels-last'
step = training_step(multiscale_model('resnet18', 'plain', 10, pretrained=False), torch.randn(16, 3, 128, 128), [way])
for _ in range(3): step(way)
input()
start, n = time.perf_counter(), 0
while time.perf_counter() - start < {seconds}: step(way); n += 1
print(n/(time.perf_counter() - start))
"""

WAITING = {'as torch has it': {}, 'OMP_WAIT_POLICY=PASSIVE': dict(OMP_WAIT_POLICY='PASSIVE'),
           **{f'GOMP_SPINCOUNT={n}': dict(GOMP_SPINCOUNT=str(n)) for n in (100, 1000, 3000, 10000, 30000)}}


def together(env, n, seconds):
    "Steps a second of each of `n` trainings that run at once."
    clean = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_NUM_THREADS')}
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', TRAINING.format(seconds=seconds)], env=clean | env, text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(n)]
    time.sleep(2 + 4*n)  # until all have warmed up
    for p in ps: p.stdin.write('\n'); p.stdin.flush()
    return statistics.mean(float(p.communicate()[0]) for p in ps)


def threads(o):
    "Trainings alone and two at once, by how torch's threads wait."
    rates = {k: ([], []) for k in WAITING}
    for _ in range(o.thread_rounds):
        for k, env in WAITING.items():
            for i in (0, 1): rates[k][i].append(together(env, i+1, o.seconds))
    alone = rates['as torch has it'][0]
    return '\n'.join(['| threads wait | alone ÷ alone as torch has it | each of two at once ÷ half of one alone |', '|---|---|---|',
                      *(f'| `{k}` | {ratios(a, alone):.2f} | {2*ratios(b, alone):.2f} |' for k, (a, b) in rates.items()), '',
                      'resnet18, batch of 16, 128 px, fp32, channels last; each with a thread a processor. The command line sets `GOMP_SPINCOUNT=1000`.'])


PARTS = dict(arithmetic=('Forward and backward, by arithmetic', arithmetic), report=("Report A's training step", report),
             epochs=('Whole epochs from files', epochs), choosing=('What choosing costs', choosing),
             optimizer=("The optimizer's part", optimizer), resting=('Norms that keep their statistics', resting),
             beside=('Loader processes beside the network', beside), threads=('Two trainings at once', threads))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    p.add_argument('--photos', type=Path, help='folder of class folders of JPEGs, for the epochs')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--epoch-rounds', type=int, default=2)
    p.add_argument('--thread-rounds', type=int, default=2)
    p.add_argument('--seconds', type=float, default=6., help='of each measurement of trainings at once')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    o = p.parse_args()
    keep_freed_memory()  # as `train` does, for all alike
    cv2.setNumThreads(0)
    command = 'python benchmarks/step.py' + ' --photos FOLDER'*bool(o.photos)
    found = {}
    for title, f in (PARTS[k] for k in o.parts):
        found[title] = f(o)
        print(f'## {title}\n\n{found[title]}\n', flush=True)
    text = '\n\n'.join([f'# Training steps\n\n    {command}', f"{o.date}, {machine()}, torch {torch.__version__.partition('+')[0]}; both sides of every ratio "
                        'in one run, taking turns.', *(f'## {k}\n\n{v}' for k, v in found.items())]) + '\n'
    if len(o.parts) == len(PARTS): write_text(Path(__file__).with_suffix('.md'), text)


if __name__ == '__main__': main()
