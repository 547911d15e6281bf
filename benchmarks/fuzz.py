"""Spoil image files, model headers, recipes, tables, lists and run folders at random and read them.

    python benchmarks/fuzz.py                     ten minutes; writes fuzz.md
    python benchmarks/fuzz.py --minutes 1         a look
    python benchmarks/fuzz.py --seed 0 --case 17  one case once more, with its traceback

Asked for: an `ImageError`, `ValueError` or `OSError` with a message of one line, or a result; no crash, none that takes over five
seconds of a processor (or twenty by the clock), none that takes more than 3 GiB (an image of just under 178,956,970 pixels is read, and Pillow holds it twice).
"""
import argparse
import json
import mmap
import os
import random
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent/'tests'))
import torch  # noqa: E402
from corpus import good_files, picture, save  # noqa: E402
from forked import Child, end, members  # noqa: E402
from mstoolkit.ablation import load_study  # noqa: E402
from mstoolkit.classifier import FORMAT, Classifier  # noqa: E402
from mstoolkit.core import write_text  # noqa: E402
from mstoolkit.data.check import check_data  # noqa: E402
from mstoolkit.data.image import read_image  # noqa: E402
from mstoolkit.data.sources import DataSource, class_names, source_samples  # noqa: E402
from mstoolkit.models.fusion import multiscale_model  # noqa: E402
from mstoolkit.recipe import Recipe, load_recipe  # noqa: E402
from mstoolkit.runs import read_env, read_history, read_predictions, read_study  # noqa: E402
from safetensors.torch import save as save_tensors  # noqa: E402

SLOW, BOUND = 5., 3*2**30 # seconds, bytes
NUMBERS = 0, 1, 2, 7, 8, 0x7f, 0x80, 0xff, 0x100, 0x7fff, 0x8000, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff
VALUES = [None, True, False, 0, -1, 1, 3, 8, 2**31, 10**9, 10**30, .5, -0., float('nan'), float('inf'), -float('inf'), '', ' ', 'a', '10', 'NaN', '../..',
          'resnet18', 'vit_giant_patch14_224', 'test_resnet', 'hf-hub:x/y', [], [[]], ['a'], ['a', 'a'], ['a', ['b']], {}, {'a': {}}, [1, 2, 3], 'ä\0', 'x'*5000]


def spoilt(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    "A file with one to six injuries, most of them in its beginning."
    d = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not d: break
        at = rng.randrange(min(len(d), rng.choice((16, 64, 256, len(d), len(d)))))
        n = rng.choice((1, 2, 4, 8, 32, 200))
        match rng.randrange(10):
            case 0: d[at] ^= 1 << rng.randrange(8)
            case 1: d[at] = rng.randrange(256)
            case 2: d[at:at+n] = bytes(len(d[at:at+n]))
            case 3: d[at:at+n] = rng.randbytes(n)
            case 4 | 5:
                form = rng.choice(('>H', '<H', '>I', '<I'))
                v = struct.pack(form, rng.choice(NUMBERS) & (0xffff if 'H' in form else 0xffffffff))
                d[at:at+len(v)] = v
            case 6: del d[rng.randrange(len(d)):]
            case 7: del d[at:at+n]
            case 8: d[at:at] = d[at:at+n]*rng.choice((1, 2, 50))
            case 9:
                o = rng.choice(others)
                k = rng.randrange(len(o)+1)
                d[at:at+n] = o[k:k+n]
    return bytes(d)


def spoilt_text(text: str, rng: random.Random) -> bytes:
    "Lines and words changed; now and then bytes."
    lines = text.split('\n')
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = rng.randrange(len(lines))
        words = re.split(r'(\s+|[,;=\t"])', lines[i])
        k = rng.randrange(len(words))
        match rng.randrange(10):
            case 0: del lines[i]
            case 1: lines.insert(i, rng.choice(lines))
            case 2 | 3: words[k] = rng.choice([str(o) for o in VALUES]+['nan', '"', "'", '[', '=', ',', '\t', ';', '#', '\r', '\ufeff', '1e999', '"""', '[[a]]', 'é'])
            case 4: words.insert(k, rng.choice(['"', ',', ';', '\t', '=', '\x00', '\n', '{', '[']))
            case 5: del words[k]
            case 6: rng.shuffle(words)
            case 7: words = words*rng.choice((2, 100))
            case 8: words[k] = words[k][::-1]
            case 9: words[k] = words[k].upper()
        if len(lines) > i and words: lines[i] = ''.join(words)
        if not lines: lines = ['']
    data = rng.choice(('\n', '\n', '\n', '\r\n', '\r')).join(lines).encode('utf-8', 'surrogatepass')
    return spoilt(data, rng, [data]) if rng.random() < .2 else data


def spoilt_json(o, rng: random.Random):
    "A value somewhere in plain data changed, dropped or doubled."
    if isinstance(o, dict) and o and rng.random() < .85:
        k, o = rng.choice(list(o)), dict(o)
        match rng.randrange(6):
            case 0: del o[k]
            case 1: o[rng.choice(('x', k.upper(), ''))] = o[k]
            case _: o[k] = spoilt_json(o[k], rng)
        return o
    if isinstance(o, list) and o and rng.random() < .6:
        i, o = rng.randrange(len(o)), list(o)
        match rng.randrange(4):
            case 0: del o[i]
            case 1: o.insert(i, o[i])
            case _: o[i] = spoilt_json(o[i], rng)
        return o
    return rng.choice(VALUES)


class Cases:
    "What is read: a kind by turns, spoilt as the number of the case says."
    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        big = picture(300, 400)
        files = {n: d for n, (d, *_) in good_files().items() if n.isascii() and n.isprintable() and len(n) < 100}
        files |= {f'big.{f.lower()}': save(big, f) for f in ('JPEG', 'PNG', 'WEBP', 'TIFF', 'GIF')}
        files |= {'big.lzw.tif': save(big, 'TIFF', compression='tiff_lzw'), 'big.zip.tif': save(big, 'TIFF', compression='tiff_deflate'),
                  'jpeg.tif': save(big, 'TIFF', compression='jpeg'), 'big-progressive.jpeg': save(big, 'JPEG', progressive=True)}
        self.files, self.others = files, list(files.values())
        torch.manual_seed(0)
        net = multiscale_model('test_resnet', head='gated', n_out=3, pretrained=False)
        self.tensors = save_tensors({k: v.contiguous().clone() for k, v in net.state_dict().items()})
        self.header = dict(config=net.config, classes=['a', 'b', 'c'], size=32, mean=[.5]*3, std=[.2]*3, metrics={}, versions={}, format=FORMAT)
        self.data = folder/'data'
        for c in 'abc':
            (self.data/c).mkdir(parents=True)
            for i in range(3): (self.data/c/f'{i}.png').write_bytes(files['plain.png'])
        rows = [(f'{c}/{i}.png', c, ('train', 'train', 'val')[i]) for c in 'abc' for i in range(3)]
        self.texts = dict(
            table='path,label,split\n'+''.join(f'{a},{b},{s}\n' for a, b, s in rows),
            numbers='path;label\n'+''.join(f'{a};{"abc".index(b)}\n' for a, b, _ in rows), list=''.join(f'{a} {b}\n' for a, b, _ in rows),
            commas=''.join(f'{a}, {b}\n' for a, b, _ in rows), classes='name,number\na,0\nb,1\nc,2\n', recipe=Recipe().to_toml(),
            source=DataSource('data').to_toml(), study='name = "s"\n[cells.a]\nhead = "plain"\n[cells.b]\nhead = "gated"\nlr = 1e-3\n',
            grid='[grid]\nhead = ["plain", "gated"]\nlr = [1e-3, 1e-2]\n',
            history='epoch,phase,train_loss,valid_loss,accuracy,seconds\n0,fit,1.1,1.0,.3,2.5\n1,fit,1.0,.9,.4,2.5\n',
            preds='image,label,pred_label,confidence,label_confidence\na/0.png,a,a,.9,.9\nb/0.png,b,a,.8,.1\n')
        self.env = dict(versions=dict(torch='2'), platform='x', command=['a'], started='2026', processors=2, device='cpu', gpu=None, epochs=3, seconds=1.5,
                        data=dict(classes=3, train=9, valid=3, digest='a', contents='b', train_per_class=[3, 3, 3], warnings=[]))
        self.kinds = ['image']*12 + ['check', 'model', 'model', 'model bytes', 'table', 'table', 'list', 'classes', 'recipe', 'source', 'study', 'run', 'run']

    def kind(self, n: int) -> str: return self.kinds[n % len(self.kinds)]

    def __call__(self, n: int):
        "Spoil and read."
        getattr(self, self.kind(n).replace(' ', '_'))(random.Random(f'{self.seed} {n}'))

    def put(self, name: str, data: bytes) -> Path:
        file = self.folder/name
        file.write_bytes(data)
        return file

    def image(self, rng):
        name = rng.choice(list(self.files))
        read_image(self.put('spoilt'+Path(name).suffix, spoilt(self.files[name], rng, self.others)), rng.choice((None, 8, 64)))

    def check(self, rng):
        for c in 'ab':
            (self.folder/'some'/c).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                name = rng.choice(list(self.files))
                self.put(f'some/{c}/{i}.png', spoilt(self.files[name], rng, self.others))
        found = check_data(self.folder/'some', fast=rng.random() < .3)
        str(found), found.json(), found._repr_html_()

    def model(self, rng, raw: bool = False):
        n = struct.unpack('<Q', self.tensors[:8])[0]
        head, body = json.loads(self.tensors[8:8+n]), self.tensors[8+n:]
        meta = self.header if raw else spoilt_json(self.header, rng)
        head['__metadata__'] = {'mstoolkit': json.dumps(meta)}
        if not raw and rng.random() < .3: head = spoilt_json(head, rng)
        h = json.dumps(head).encode()
        h += b' '*(-len(h) % 8)
        data = struct.pack('<Q', len(h))+h+body
        if raw: data = spoilt(data[:8+len(h)], rng, [h])+body if rng.random() < .6 else spoilt(data, rng, [h])
        clf = Classifier.load(self.put('m.safetensors', data))
        with torch.inference_mode(): clf.model(torch.zeros(1, 3, 32, 32))

    def model_bytes(self, rng): self.model(rng, raw=True)

    def table(self, rng):
        name = rng.choice(('table', 'numbers'))
        self.put('t.csv', spoilt_text(self.texts[name], rng))
        self.put('c.csv', self.texts['classes'].encode())
        tr, va = source_samples(DataSource(str(self.data), csv=str(self.folder/'t.csv')), strict=rng.random() < .5)
        class_names(tr, va, self.folder/'c.csv')

    def list(self, rng):
        self.put('t.txt', spoilt_text(self.texts[rng.choice(('list', 'commas'))], rng))
        tr, va = source_samples(DataSource(str(self.data), train=str(self.folder/'t.txt'), valid='none'), strict=rng.random() < .5)
        class_names(tr, va)

    def classes(self, rng):
        name = rng.choice(('c.csv', 'c.txt'))
        self.put(name, spoilt_text(self.texts['classes'] if name == 'c.csv' else 'a\nb\nc\n', rng))
        class_names(*source_samples(DataSource(str(self.data))), self.folder/name)

    def recipe(self, rng): load_recipe(self.put('r.toml', spoilt_text(self.texts['recipe'], rng)))
    def source(self, rng): DataSource.load(self.put('d.toml', spoilt_text(self.texts['source'], rng)))
    def study(self, rng): load_study(self.put('s.toml', spoilt_text(self.texts[rng.choice(('study', 'grid'))], rng)))

    def run(self, rng):
        "What an editor or a spreadsheet may do to the files of a run folder."
        run = self.folder/'run'
        run.mkdir(exist_ok=True)
        self.put('run/history.csv', spoilt_text(self.texts['history'], rng))
        self.put('run/valid_predictions.csv', spoilt_text(self.texts['preds'], rng))
        self.put('run/environment.json', json.dumps(spoilt_json(self.env, rng)).encode())
        self.put('run/study.json', json.dumps(spoilt_json(dict(name='s', cells=dict(a={}, b=dict(head='plain')), base=self.texts['recipe']), rng)).encode())
        rng.choice((read_history, read_predictions, read_env, read_study))(run)



def status(key: str) -> int: # bytes
    return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key)).split()[1])*1024


def attempt(cases: Cases, n: int) -> tuple[str, str]: # verdict, words
    try: cases(n)
    except (ValueError, OSError) as e: # FileNotFoundError and ImageError are of these
        if not str(e).strip(): return 'no message', type(e).__name__
        if '\n' in str(e): return 'many lines', repr(str(e))[:300]
        return 'refused', type(e).__name__
    except BaseException as e:
        at = traceback.extract_tb(e.__traceback__)
        ours = [o for o in at if '/mstoolkit/' in o.filename]
        where = f'{Path((ours or at)[-1].filename).name}:{(ours or at)[-1].lineno}'
        return 'crash', f'{type(e).__name__} at {where}: {" ".join(str(e).split())[:200]}'
    return 'read', ''


def work(cases: Cases, board: mmap.mmap, log: Path, start: int, step: int, until: float) -> int:
    "Case after case; the board tells the parent which, and since when."
    with log.open('a') as f:
        n = start
        while time.monotonic() < until:
            Path('/proc/self/clear_refs').write_text('5')
            before, t = status('VmRSS'), time.process_time()  # the machine may have other work
            board[:16] = struct.pack('<qd', n, time.monotonic())
            verdict, words = attempt(cases, n)
            took, peak = time.process_time()-t, max(0, status('VmHWM')-before)
            if verdict in ('read', 'refused') and took > SLOW: verdict, words = 'slow', f'{took:.1f} s'
            if verdict in ('read', 'refused') and peak > BOUND: verdict, words = 'memory', f'{peak/2**20:.0f} MiB'
            f.write(json.dumps([n, verdict, words, round(took, 3), peak >> 20])+'\n')
            f.flush()
            n += step
    return 0


class Lane:
    "One process after the other: the next goes on behind the case that ended the last."
    def __init__(self, k: int, lanes: int, root: Path, seed: int, until: float):
        self.k, self.lanes, self.until, self.folder = k, lanes, until, root/f'lane-{k}'
        self.folder.mkdir()
        self.log, self.board = self.folder/'log', mmap.mmap(-1, 16)
        (self.folder/'work').mkdir()
        self.cases, self.next = Cases(self.folder/'work', seed), k
        self.begin()

    def begin(self):
        self.board[:16] = struct.pack('<qd', -1, time.monotonic())
        self.child = Child(lambda: work(self.cases, self.board, self.log, self.next, self.lanes, self.until), self.folder, self.folder, memory=8*2**30)

    def look(self) -> bool: # whether it is over
        "Start again where a case has ended its process, or takes too long."
        n, since = struct.unpack('<qd', self.board[:16])
        late = n >= 0 and time.monotonic()-since > 4*SLOW
        if late: os.kill(self.child.pid, signal.SIGKILL)
        if not late and not self.child.poll(): return False
        o = self.child.wait()
        end(members(self.child.pid))
        if not late and o.code == 0: return True
        words = f'no answer after {4*SLOW:.0f} s' if late else f'the process ended with {o.code}: {o.err.strip()[-200:]}'
        with self.log.open('a') as f: f.write(json.dumps([n, 'hang' if late else 'crash', words, round(time.monotonic()-since, 1), 0])+'\n')
        self.next = max(n, self.k)+self.lanes
        if time.monotonic() > self.until: return True
        self.begin()
        return False


def report(rows: list, kinds: Cases, args) -> str:
    by, bad = Counter(), {}
    for n, verdict, words, *_ in rows:
        by[kinds.kind(n), verdict] += 1
        if verdict not in ('read', 'refused'): bad.setdefault((kinds.kind(n), verdict, re.sub(r'\d{3,}', '#', words)[:90]), []).append((n, words))
    table = [f'| {k} | {sum(v for (a, _), v in by.items() if a == k):,} | {by[k, "read"]:,} | {by[k, "refused"]:,} | '
             f'{sum(v for (a, b), v in by.items() if a == k and b not in ("read", "refused")):,} | '
             f'{max(o[3] for o in rows if kinds.kind(o[0]) == k):.1f} | {max(o[4] for o in rows if kinds.kind(o[0]) == k):,} |'
             for k in dict.fromkeys(kinds.kinds) if any(a == k for a, _ in by)]
    found = [f'- {k}, {v}: {o[0][1]} ({len(o)} times, the first: `--seed {args.seed} --case {o[0][0]}`)'
             for (k, v, _), o in sorted(bad.items(), key=lambda o: -len(o[1]))]
    return '\n'.join([
        '# Spoilt at random', '', f'    python benchmarks/fuzz.py --minutes {args.minutes:g} --seed {args.seed}', '',
        f'{args.date}, {args.machine}. {len(rows):,} cases. Allowed: to be read, or refused in one line (`ImageError`, `ValueError`, `OSError`); '
        f'{SLOW:.0f} seconds of a processor and {BOUND >> 20:,} MiB a case.', '',
        '| kind | cases | read | refused | failed | longest, s | most memory, MiB |', '|---|---|---|---|---|---|---|', *table, '',
        *(found or ['No case failed.']), ''])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--minutes', type=float, default=10)
    p.add_argument('--seed', type=int, default=int(time.time()) % 100_000)
    p.add_argument('--case', type=int, help='this one alone')
    p.add_argument('--lanes', type=int, default=os.cpu_count())
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    p.add_argument('--machine', default=f'{os.cpu_count()} processors')
    args = p.parse_args()
    torch.set_num_threads(1)
    print(f'seed {args.seed}', flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        if args.case is not None:
            (Path(tmp)/'work').mkdir()
            return Cases(Path(tmp)/'work', args.seed)(args.case)
        until = time.monotonic()+60*args.minutes
        lanes = [Lane(k, args.lanes, Path(tmp), args.seed, until) for k in range(args.lanes)]
        open_ = list(lanes)
        while open_:
            time.sleep(.05)
            open_ = [o for o in open_ if not o.look()]
        rows = sorted(json.loads(o) for lane in lanes for o in lane.log.read_text().splitlines())
        text = report(rows, lanes[0].cases, args)
    print(text)
    write_text(HERE/'fuzz.md', text)
    sys.exit('No case failed.' not in text)


if __name__ == '__main__': main()
