"""The heads of Report A as published and as computed here: the same weights, side by side in one run.

    python benchmarks/heads.py                  # CPU; writes benchmarks/heads.md and benchmarks/heads.svg
    python benchmarks/heads.py --device cuda    # writes benchmarks/heads-cuda.md and .svg

Times are medians over rounds; each round runs every variant once, so that a slow minute of the machine slows them all. The errors of the
collapsed heads against the literal ones, over a matrix of sizes, stages and batches, are in the page too.
"""
import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent/'tests'))
from literal import twin  # noqa: E402
from machine import machine  # noqa: E402
from mstoolkit.core import track, write_text  # noqa: E402
from mstoolkit.models.fusion import heads, multiscale_model  # noqa: E402

CHANNELS, N_OUT = [512, 1024, 2048], 100  # ResNeSt-101e, and the report's classes
NAMES = {'plain': 'plain', 'pyramid': 'pyramid', 'gated': 'gated', 'literal pyramid': 'pyramid', 'literal gated': 'gated'}


def sync(device):
    if device == 'cuda': torch.cuda.synchronize()


def timed(step, device):
    "Seconds of one `step()`."
    sync(device)
    start = time.perf_counter()
    step()
    sync(device)
    return time.perf_counter() - start


def rounds(steps, n, device, inner=None):
    "Median seconds of each step in dict `steps`, over `n` rounds that run each once (`inner[k]` times in a row where that is short)."
    times = {k: [] for k in steps}
    for k, f in steps.items(): f(); f()  # warm-up: first calls plan and allocate
    for _ in track(range(n), 'rounds'):
        for k, f in steps.items():
            reps = (inner or {}).get(k, 1)
            times[k].append(timed(lambda: [f() for _ in range(reps)], device)/reps)
    return times


def make_heads(device):
    torch.manual_seed(0)
    made = {k: heads[k](CHANNELS, N_OUT) for k in ('plain', 'pyramid', 'gated')}
    made |= {f'literal {k}': twin(k, made[k], CHANNELS, N_OUT) for k in ('pyramid', 'gated')}
    return {k: v.to(device) for k, v in made.items()}


def head_step(head, xs):
    def step():
        for p in [*head.parameters(), *xs]: p.grad = None
        head(xs).square().sum().backward()
    return step


def bench_heads(device, n, bs=8):
    "Forward and backward of the heads alone, on maps of a 224 px image."
    xs = [torch.randn(bs, c, s, s, device=device).requires_grad_() for c, s in zip(CHANNELS, (28, 14, 7))]
    heads = make_heads(device)
    return rounds({k: head_step(h, xs) for k, h in heads.items()}, n, device, {'plain': 20, 'pyramid': 20, 'gated': 20})


def train_step(body, head, x, y):
    "One optimisation step as the report takes it: Adam, 1e-4, weight decay 1e-5."
    params = [*body.parameters(), *head.parameters()]
    opt = torch.optim.Adam(params, lr=1e-4, weight_decay=1e-5)
    def step():
        opt.zero_grad()
        F.cross_entropy(head(body(x)), y).backward()
        opt.step()
    return step


def batch(bs, device): return torch.randn(bs, 3, 224, 224, device=device), torch.randint(N_OUT, (bs,), device=device)


def bench_steps(device, n, bs=4, backbone='resnest101e'):
    "Whole training steps on one shared backbone."
    body, heads = multiscale_model(backbone, 'plain', N_OUT, pretrained=False)[0].to(device).train(), make_heads(device)
    x, y = batch(bs, device)
    return rounds({k: train_step(body, h.train(), x, y) for k, h in heads.items()}, n, device)


def resident(field):
    "This process's memory in MiB: 'VmRSS' now, 'VmHWM' at its highest."
    return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(field)).split()[1])/2**10


def peak(name, device, bs, whole, out):
    "Put into `out` the peak memory, in MiB, of training steps of variant `name`, less what stood there before the first."
    head = make_heads('cpu')[name].to(device)
    if whole:
        body = multiscale_model('resnest101e', 'plain', N_OUT, pretrained=False)[0].to(device).train()
        step = train_step(body, head.train(), *batch(bs, device))
    else: step = head_step(head, [torch.randn(bs, c, s, s, device=device).requires_grad_() for c, s in zip(CHANNELS, (28, 14, 7))])
    if device == 'cuda':
        base = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
        step(); step()
        return out.put((torch.cuda.max_memory_allocated() - base)/2**20)
    Path('/proc/self/clear_refs').write_text('5')  # sets the high-water mark back to what is resident now
    base = resident('VmRSS')
    step(); step()
    out.put(resident('VmHWM') - base)


def memory(device, whole, bs):
    "Peak memory of each variant, each in a process of its own."
    ctx, got = multiprocessing.get_context('spawn'), {}
    for name in NAMES:
        q = ctx.SimpleQueue()
        p = ctx.Process(target=peak, args=(name, device, bs, whole, q))
        p.start(); got[name] = q.get(); p.join()
    return got


def errors():
    "Worst relative error of the library's heads against the literal ones: outputs and all gradients, over the tests' matrix."
    from test_models import SIZES, WIDTHS, worst_error
    cases = [(name, n, size, bs) for name in ('pyramid', 'gated') for n in WIDTHS for size in SIZES.values() for bs in (1, 3)]
    rows = []
    for name in ('pyramid', 'gated'):
        for path in ('forward', 'forward_spatial'):
            mine = [c for c in cases if c[0] == name]
            worst = [max(worst_error(m, WIDTHS[n], size, bs, dt, path) for m, n, size, bs in mine) for dt in (torch.float32, torch.float64)]
            rows.append((name, path, *worst))
    return rows


def table(times, mem, unit):
    scale = dict(ms=1e3, s=1)[unit]
    med, num = {k: statistics.median(v) for k, v in times.items()}, lambda s: f'{s*scale:,.0f}' if s*scale >= 100 else f'{s*scale:.3g}'
    lines = [f'| head | median, {unit} | fastest–slowest | peak memory, MiB |', '|---|---|---|---|']
    for k, v in times.items():
        lines.append(f'| {k} | {num(med[k])} | {num(min(v))}–{num(max(v))} | {mem[k]:,.0f} |')
    return '\n'.join(lines)


def paired(times, a, b): return statistics.median(x/y for x, y in zip(times[a], times[b]))


def draw(head_times, step_times, path):
    "Two panels of bars: heads alone, and whole training steps."
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcParams['svg.hashsalt'] = 'heads'
    import matplotlib.pyplot as plt
    ours, theirs = '#0072B2', '#E69F00'  # Okabe and Ito's colour-blind-safe blue and orange
    fig, axs = plt.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
    order = ['plain', 'pyramid', 'literal pyramid', 'gated', 'literal gated']
    label = dict(zip(order, ['plain', 'pyramid, ours', 'pyramid, published', 'gated, ours', 'gated, published']))
    titles = 'head alone, forward and backward', 'training step of ResNeSt-101e'
    for ax, times, what in zip(axs, (head_times, step_times), titles):
        med = [statistics.median(times[k]) for k in order]
        bars = ax.barh([label[k] for k in order], med, color=[theirs if 'literal' in k else ours for k in order])
        err = [[m - min(times[k]) for m, k in zip(med, order)], [max(times[k]) - m for m, k in zip(med, order)]]
        ax.errorbar(med, range(len(order)), xerr=err, fmt='none', ecolor='#444444', elinewidth=1, capsize=2)
        ax.bar_label(bars, [f'{m*1e3:.3g} ms' if m < .1 else f'{m:.2f} s' for m in med], padding=12, fontsize=9)
        ax.set(xlabel='seconds', xlim=(0, max(map(max, times.values()))*1.3))
        ax.set_title(what, loc='left', fontsize=10)
        ax.invert_yaxis(); ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(path, metadata={'Date': None} if path.suffix == '.svg' else None, dpi=110)


def page(args, head_times, head_mem, step_times, step_mem, errs):
    e = '\n'.join(f'| {n} | `{p}` | {a:.1e} | {b:.1e} |' for n, p, a, b in errs)
    checks = [(f'published {k} ÷ ours, head alone', paired(head_times, f'literal {k}', k)) for k in ('pyramid', 'gated')]
    checks += [(f'published {k} ÷ ours, training step', paired(step_times, f'literal {k}', k)) for k in ('pyramid', 'gated')]
    checks += [(f'{k} ÷ plain, training step', paired(step_times, k, 'plain')) for k in ('pyramid', 'gated')]
    ratios = '\n'.join(f'| {k} | {v:.0f} |' if v > 10 else f'| {k} | {v:.2f} |' for k, v in checks)
    return f"""# Fusion heads: published and collapsed

    python benchmarks/heads.py{' --device cuda' if args.device == 'cuda' else ''}

{args.date}, {machine(args.device)}, torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}, float32. Published heads are in `tests/literal.py`; both have the same weights.
Medians of {args.rounds} rounds, in each of which every variant ran once. Memory is the peak above what stood before the first step, each variant in a process of its own.

![Bars: time of each head alone and of whole training steps](heads{'-cuda' if args.device == 'cuda' else ''}.svg)

Bars are medians, whiskers the fastest and the slowest round; head alone at batch 8, training step at batch 4.

| ratio, median over rounds of the ratio within a round | |
|---|---|
{ratios}

## Head alone: forward and backward, batch 8, maps of a 224 px image at ResNeSt-101e's widths

{table(head_times, head_mem, 'ms')}

## Whole training step: ResNeSt-101e, batch 4, 224 px, Adam

{table(step_times, step_mem, 's')}

## Equality

Largest relative error (largest difference over largest value, per tensor) of outputs and of the gradients of every parameter and map, against the published head
in the same precision: 2, 3 and 4 stages, square, non-square, odd and prime sizes, batches of 1 and 3.

| head | path | float32 | float64 |
|---|---|---|---|
{e}
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    p.add_argument('--rounds', type=int, default=15, help='repeats; medians are over these')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    args = p.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available(): p.error('CUDA asked for, but torch sees no CUDA device')
    head_times, step_times = bench_heads(args.device, args.rounds), bench_steps(args.device, args.rounds)
    head_mem, step_mem = memory(args.device, False, 8), memory(args.device, True, 4)
    stem = HERE/('heads-cuda' if args.device == 'cuda' else 'heads')
    draw(head_times, step_times, stem.with_suffix('.svg'))
    text = page(args, head_times, head_mem, step_times, step_mem, errors())
    write_text(stem.with_suffix('.md'), text)
    print(text)


if __name__ == '__main__': main()
