"""Kill small trainings at random moments, take them up again and compare with the run that nobody killed, to the bit.

    python benchmarks/kills.py [--only twice|together|folds]

SIGKILL with two loader processes and with none, SIGTERM and SIGINT (every second one while a checkpoint or a model is being
written), 40 trials each, a study and folds killed and taken up, runs with EMA, growing images and a budget that are killed twice, and two
processes that train together; about 35 minutes on two cores, `--n 4` for a look. Writes kills.md.
Asked for: exit code 143 or 130 and one line on standard error, no process left after ten seconds, and after `--resume` the
weights, history (without its times) and predictions of the run in one go. `--seed` repeats the moments.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import cv2  # noqa: E402
import mstoolkit.train  # noqa: E402,F401
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from forked import Child, end, left_after  # noqa: E402
from mstoolkit.cli import main as cli  # noqa: E402
from mstoolkit.core import write_text  # noqa: E402

HERE = Path(__file__).parent
TINY = ('--backbone test_resnet --no-pretrained --size 32 --epochs 4 --bs 8 --augment light --device cpu --memory-format contiguous '
        '--stop-patience 0').split()


def make_data(folder: Path, n: int = 16):
    "Three classes of noisy colours."
    rng = np.random.default_rng(0)
    for c, colour in zip('abc', ((200, 40, 40), (40, 200, 40), (40, 40, 200))):
        for split, k in (('train', n), ('val', n//2)):
            (folder/split/c).mkdir(parents=True)
            for i in range(k):
                im = np.clip(rng.normal(colour, 60, (40, 48, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder/split/c/f'{i}.png'), im)


def product(run: Path) -> tuple:
    "What a run has to leave, without its times."
    h = pd.read_csv(run/'history.csv')
    return (run/'model.safetensors').read_bytes(), h[[c for c in h if c not in ('seconds', 'data_wait')]].to_csv(), \
        (run/'valid_predictions.csv').read_bytes()


def differs(run: Path, want: tuple) -> str: # in words; '' when it does not
    names = 'model.safetensors', 'history.csv', 'valid_predictions.csv'
    try: got = product(run)
    except OSError as e: return f'no {Path(e.filename).name}'
    odd = [n for n, a, b in zip(names, got, want) if a != b]
    if (run/'checkpoint').exists(): odd.append('checkpoint is left')
    return ', '.join(odd)


class Trials:
    def __init__(self, root: Path, data: Path, seed: int):
        self.root, self.data, self.rng, self.n, self.bad = root, data, random.Random(seed), 0, []

    def child(self, args: list, limit=None):
        logs = self.root/'logs'
        logs.mkdir(exist_ok=True)
        return Child(lambda: cli([str(o) for o in args]), self.root, logs)

    def options(self, workers: int) -> list: return [*TINY, '--num-workers', workers]

    def reference(self, workers: int) -> tuple[float, tuple]:
        "Seconds of a run in one go, and what it leaves."
        run = self.root/f'reference-{workers}'
        o = self.child(['train', self.data, '--out', run, *self.options(workers)]).wait(120)
        if o.code: raise SystemExit(o.text)
        return o.seconds, product(run)

    def failed(self, kind: str, moment: str, what: str):
        self.bad.append(f'{kind}, {moment}: {what}')
        print('FAILED', self.bad[-1], flush=True)

    def stop(self, child: Child, run: Path, sig: int, after: float, writing: bool):
        "Send the signal after so many seconds; with `writing`, at the first file that is half written from then on."
        until = child.start+after
        while time.monotonic() < until and not child.poll(): time.sleep(.0005)
        while writing and not child.poll():
            folders = run, run/'checkpoint'
            if any(o.endswith('.tmp') for d in folders if d.is_dir() for o in os.listdir(d)): break
        if not child.poll(): os.kill(child.pid, sig)

    def one(self, kind: str, sig: int, workers: int, seconds: float, want: tuple, writing: bool = False) -> str: # how it ended
        "Kill a run, look at what is left, resume and compare."
        self.n += 1
        run, after = self.root/f'run-{self.n}', self.rng.uniform(.02, seconds*(.75 if writing else 1))
        moment = f"{'a write after ' if writing else ''}{after:.2f} s of {seconds:.2f} ({run.name})"
        child = self.child(['train', self.data, '--out', run, *self.options(workers)])
        self.stop(child, run, sig, after, writing)
        o = child.wait(30)
        if o.late: self.failed(kind, moment, f'not ended 30 s after the start: {o.err[-300:]!r}')
        if left := left_after(child.pid, 10):
            self.failed(kind, moment, f'{len(left)} processes live 10 s later')
            end(left)
        done = o.code == 0
        if not done:
            code = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sig]
            lines = [l for l in o.err.splitlines() if l.strip()]
            if o.code != code: self.failed(kind, moment, f'exit code {o.code}, not {code}: {lines[-3:]}')
            if sig != signal.SIGKILL and len(lines) != 1: self.failed(kind, moment, f'{len(lines)} lines on standard error: {lines[:3]} … {lines[-2:]}')
        how = 'ended before' if done else 'no run yet'
        if not done and (run/'environment.json').is_file():
            how = 'resumed' if (run/'checkpoint'/'state.pt').exists() else 'resumed from the start'
            r = self.child(['train', '--resume', run]).wait(60)
            if r.code == 2 and 'has ended well' in r.err: how = 'ended before'
            elif r.code: self.failed(kind, moment, f'--resume: exit code {r.code}: {r.err.strip()[-400:]!r}; there: {sorted(os.listdir(run))}')
        elif not done:
            r = self.child(['train', self.data, '--out', run, *self.options(workers)]).wait(60)
            if r.code: self.failed(kind, moment, f'its own name is blocked: {r.err.strip()[-400:]!r}')
        if odd := differs(run, want): self.failed(kind, moment, f'{how}, and then other: {odd}')
        shutil.rmtree(run, ignore_errors=True)
        return how

    def some(self, name: str, n: int, sig: int, workers: int, writing=lambda i: False) -> str: # a row of the table
        seconds, want = self.refs[workers]
        before, ways, start = len(self.bad), {}, time.monotonic()
        for i in range(n):
            how = self.one(name, sig, workers, seconds, want, writing(i))
            ways[how] = ways.get(how, 0)+1
        said = ', '.join(f'{v} {k}' for k, v in sorted(ways.items(), key=lambda o: -o[1]))
        print(f'{name}: {n} trials, {said}; {len(self.bad)-before} failures, {time.monotonic()-start:.0f} s', flush=True)
        return f'| {name} | {n} | {said} | {len(self.bad)-before} |'

    def study(self, n: int, jobs: int) -> str:
        "The same for a study of two cells and two seeds."
        toml = self.root/'heads.toml'
        toml.write_text('[cells.plain]\nhead = "plain"\n[cells.gated]\nhead = "gated"\n')
        args = lambda out: ['ablate', self.data, '--study', toml, '--out', out, '--seeds', 2, '--jobs', jobs, '--threads', 1, *self.options(0)]
        runs = [f'{c}/seed-{s}' for c in ('plain', 'gated') for s in (0, 1)]
        ref, name, before, start = self.root/f'study-{jobs}', f'a study, {jobs} at a time, SIGKILL', len(self.bad), time.monotonic()
        o = self.child(args(ref)).wait(200)
        if o.code:
            self.failed(name, 'in one go', o.err[-400:])
            return f'| {name} | 0 | | 1 |'
        for i in range(n):
            out, after = self.root/f'study-{jobs}-{i}', self.rng.uniform(.1, o.seconds)
            moment = f'{after:.2f} s of {o.seconds:.2f}'
            child = self.child(args(out))
            self.stop(child, out, signal.SIGKILL, after, False)
            child.wait(60)
            if left := left_after(child.pid, 10):
                self.failed(name, moment, f'{len(left)} processes live 10 s later')
                end(left)
            r = self.child(args(out)).wait(200)
            if r.code: self.failed(name, moment, f'taken up: exit code {r.code}: {r.err.strip()[-400:]!r}')
            else:
                for c in runs:
                    if odd := differs(out/c, product(ref/c)): self.failed(name, moment, f'{c} is other: {odd}')
                if (out/'table.csv').read_bytes() != (ref/'table.csv').read_bytes(): self.failed(name, moment, 'another table.csv')
            shutil.rmtree(out, ignore_errors=True)
        print(f'{name}: {n} trials, {len(self.bad)-before} failures, {time.monotonic()-start:.0f} s', flush=True)
        return f'| {name} | {n} | {n} taken up | {len(self.bad)-before} |'


def folds(t: Trials, n: int) -> str:
    "The same for three folds, which are taken up with --resume."
    first = lambda out: ['train', t.data, '--recipe', 'gate', '--folds', 3, '--out', out, '--threads', 1, *t.options(0)]
    ref, name, before = t.root/'folds', 'three folds, SIGKILL', len(t.bad)
    o = t.child(first(ref)).wait(200)
    if o.code:
        t.failed(name, 'in one go', o.err[-400:])
        return f'| {name} | 0 | | 1 |'
    whole = [ref.name, *(f'{ref.name}/fold-{k}' for k in range(3))]
    for i in range(n):
        out, after = t.root/f'folds-{i}', t.rng.uniform(.1, o.seconds)
        child = t.child(first(out))
        t.stop(child, out, signal.SIGKILL, after, False)
        code = child.wait(60).code
        again = ['train', '--resume', out] if (out/'environment.json').is_file() else first(out)
        r = t.child([*again, '--threads', 1]).wait(200) if code else None
        if r and r.code: t.failed(name, f'{after:.2f} s of {o.seconds:.2f}', f'exit code {r.code}: {r.err.strip()[-400:]!r}')
        for w in whole:
            a, b = t.root/w, out/w.partition('/')[2]
            odd = [f for f in ('model.safetensors', 'valid_predictions.csv') if (a/f).read_bytes() != (b/f).read_bytes()]
            if odd: t.failed(name, f'{after:.2f} s of {o.seconds:.2f}', f'{b} is other: {odd}')
        shutil.rmtree(out, ignore_errors=True)
    print(f'{name}: {n} trials, {len(t.bad)-before} failures', flush=True)
    return f'| {name} | {n} | {n} taken up | {len(t.bad)-before} |'


AVERAGED = '--ema .2 --start-size 16 --layer-decay .7 --cutmix .5 --schedule one-cycle --plateau-patience -1'.split()


def odd_history(run: Path, minutes: float) -> str: # in words; '' when nothing is odd
    "Epochs in turn, the best score that of the model, the budget kept by the run's own count."
    h, model = pd.read_csv(run/'history.csv'), accuracy_of(run)
    best, seconds = h.accuracy.max(), h.seconds.sum()
    seen = [*(['epochs not in turn'] if [*h.epoch] != [*range(1, len(h)+1)] else []),
            *([f'best accuracy {best:.4f}, of the model {model:.4f}'] if abs(best - model) > 1e-6 else []),
            *([f'{seconds:.1f} s of epochs in {60*minutes:.0f} s'] if seconds > 60*minutes*1.03 else [])]
    return ', '.join(seen)


def accuracy_of(run: Path) -> float:
    "Accuracy on validation of the model on disk, by its predictions."
    valid = pd.read_csv(run/'valid_predictions.csv')
    return float((valid.pred_label == valid.label).mean())


def twice(t: Trials, n: int, minutes: float = 0.) -> str:
    "Two SIGKILLs in one run with EMA, growing images and mixing; with a budget what ends it is the clock, and bits can't be asked for."
    name = 'EMA, growing images' + (f', {60*minutes:.0f} seconds' if minutes else '') + ', two SIGKILLs'
    options = [*t.options(0), *AVERAGED]
    if minutes:
        i = options.index('--epochs')
        options[i:i+2] = ['--minutes', minutes]
    first = lambda out: ['train', t.data, '--recipe', 'gate', '--out', out, *options]
    ref, before, start, ways = t.root/f'twice-{minutes:g}', len(t.bad), time.monotonic(), []
    o = t.child(first(ref)).wait(200)
    if o.code:
        t.failed(name, 'in one go', o.text[-600:])
        return f'| {name} | 0 | | 1 |'
    for i in range(n):
        out, resumed = t.root/f'{ref.name}-{i}', 0
        moments = sorted(t.rng.uniform(.1, o.seconds) for _ in range(2))
        moment = ' and '.join(f'{m:.2f} s' for m in moments) + f' of {o.seconds:.2f}'
        gone, r = 0., None
        for m in (*moments, None): # `None`: to the end
            there = (out/'environment.json').is_file()
            resumed += there
            child = t.child(['train', '--resume', out] if there else first(out))
            if m is not None: t.stop(child, out, signal.SIGKILL, m - gone, False)
            r = child.wait(200)
            if r.code == 0 or m is None: break
            gone = m
        ended = r.code == 0 or (r.code == 2 and 'has ended well' in r.err)
        if not ended: t.failed(name, moment, f'exit code {r.code}: {r.err.strip()[-400:]!r}')
        elif odd := odd_history(out, minutes) if minutes else differs(out, product(ref)): t.failed(name, moment, odd)
        ways.append(resumed)
        shutil.rmtree(out, ignore_errors=True)
    said = ', '.join(f'{ways.count(k)} resumed {("never", "once", "twice")[k]}' for k in sorted(set(ways), reverse=True))
    print(f'{name}: {n} trials, {said}; {len(t.bad)-before} failures, {time.monotonic()-start:.0f} s', flush=True)
    return f'| {name} | {n} | {said} | {len(t.bad)-before} |'


TOGETHER = ('--schedule fine-tune --freeze-epochs 1 --epochs 5 --cutmix .5 --ema .2 --plateau-patience 0 --stop-patience 3 --sync-bn').split()


def ranks(pid: int) -> list[int]:
    "The processes that train together, below the one that started them; none while it has not."
    try: below = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError: return []
    return [int(o) for o in below]


def of_command(out: Path) -> list[int]: # process ids
    "The living processes whose command line names a run folder, in whatever session they are."
    found = []
    for o in Path('/proc').glob('[0-9]*'):
        try:
            if str(out).encode() in (o/'cmdline').read_bytes(): found.append(int(o.name))
        except OSError: pass
    return found


def together(t: Trials, n: int) -> str:
    "Two processes that train together, fine-tuning with mixing, an average, plateau and early stop: all are killed, or one of the two."
    name, before, start, ways = 'two processes, SIGKILL of all and of one', len(t.bad), time.monotonic(), []
    import timm
    import torch
    weights, ref = t.root/'weights.pt', t.root/'together'
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet').state_dict(), weights)
    options = [*(o for o in t.options(0) if o not in ('--no-pretrained', '--epochs', '4')), *TOGETHER, '--weights-file', weights]
    first = lambda out: ['train', t.data, '--recipe', 'gate', '--out', out, '--processes', 2, *options]
    o = t.child(first(ref)).wait(300)
    if o.code:
        t.failed(name, 'in one go', o.text[-600:])
        return f'| {name} | 0 | | 1 |'
    for i in range(n):
        out, after = t.root/f'together-{i}', t.rng.uniform(.3, 1)*o.seconds
        child = t.child(first(out))
        while time.monotonic() < child.start + after and not child.poll(): time.sleep(.005)
        there = ranks(child.pid)
        one = i % 2 == 1 and len(there) > 1
        for pid in there[-1:] if one else [child.pid, *there]:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        moment = f"{'one' if one else 'all'} at {after:.2f} s of {o.seconds:.2f}"
        r = child.wait(60)
        if r.late: t.failed(name, moment, 'the others did not end with it in a minute')
        until = time.monotonic() + 10
        while (left := of_command(out)) and time.monotonic() < until: time.sleep(.05)
        if left:
            t.failed(name, moment, f'{len(left)} processes live 10 s later')
            end(left)
        how = 'ended before' if r.code == 0 else 'resumed' if (out/'environment.json').is_file() else 'no run yet'
        if r.code: r = t.child(['train', '--resume', out, '--processes', 2] if how == 'resumed' else first(out)).wait(300)
        if r.code and 'has ended well' in r.err: how = 'ended before'
        elif r.code: t.failed(name, moment, f'exit code {r.code}: {r.err.strip()[-400:]!r}')
        if odd := differs(out, product(ref)): t.failed(name, moment, f'{how}, and then other: {odd}')
        ways.append(how)
        shutil.rmtree(out, ignore_errors=True)
    said = ', '.join(f'{ways.count(k)} {k}' for k in sorted(set(ways), reverse=True))
    print(f'{name}: {n} trials, {said}; {len(t.bad)-before} failures, {time.monotonic()-start:.0f} s', flush=True)
    return f'| {name} | {n} | {said} | {len(t.bad)-before} |'


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=40, help='trials of each kind')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', choices=['twice', 'together', 'folds'], help='these rows alone, printed')
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    p.add_argument('--machine', default=f'{os.cpu_count()} processors')
    args = p.parse_args()
    import torch
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        make_data(root/'data')
        t = Trials(root, root/'data', args.seed)
        if args.only:
            do = dict(twice=lambda: [twice(t, args.n), twice(t, args.n, minutes=.25)], together=lambda: [together(t, args.n)],
                      folds=lambda: [folds(t, args.n)])
            print(*do[args.only](), *t.bad, sep='\n')
            sys.exit(bool(t.bad))
        t.refs = {w: t.reference(w) for w in (0, 2)}
        print({w: round(s, 2) for w, (s, _) in t.refs.items()}, flush=True)
        half = lambda i: i % 2 == 1
        rows = [t.some('SIGKILL, two loader processes', args.n, signal.SIGKILL, 2), t.some('SIGKILL, none', args.n, signal.SIGKILL, 0),
                t.some('SIGTERM, two loader processes', args.n//2, signal.SIGTERM, 2, half), t.some('SIGTERM, none', args.n//2, signal.SIGTERM, 0, half),
                t.some('SIGINT, two loader processes', args.n//2, signal.SIGINT, 2, half), t.some('SIGINT, none', args.n//2, signal.SIGINT, 0, half),
                t.study(max(1, args.n//10), 1), t.study(max(1, args.n//20), 2), folds(t, max(1, args.n//4)),
                twice(t, max(1, args.n//4)), twice(t, max(1, args.n//4), minutes=.25), together(t, max(1, args.n//4))]
    failures = '\n'.join(f'- {o}' for o in t.bad) or 'No trial failed.'
    write_text(HERE/'kills.md', '\n'.join([
        '# Killed and taken up again', '', f'    python benchmarks/kills.py --n {args.n} --seed {args.seed}', '',
        f'{args.date}, {args.machine}. A run of four epochs takes {t.refs[0][0]:.1f} s without loader processes and {t.refs[2][0]:.1f} s with two; '
        'signals at random moments, every second SIGTERM and SIGINT while a file is being written. After `--resume`, weights, history '
        'without its times and predictions have to be those of the run in one go, to the bit; ten seconds after a kill no process may '
        'be left; SIGTERM and SIGINT give 143 and 130 and one line.', '',
        '| kind | trials | how it went on | failures |', '|---|---|---|---|', *rows, '', failures, '']))
    sys.exit(bool(t.bad))


if __name__ == '__main__': main()
