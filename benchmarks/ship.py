"""Models that were shipped: what they say, weigh and take beside PyTorch; the server under load; one answer over every path.

    python benchmarks/ship.py formats --out formats.json [--only resnet18]
    python benchmarks/ship.py int8 --run RUN --out int8.json
    python benchmarks/ship.py load --onnx FILE --out load.json [--seconds 8]
    python benchmarks/ship.py paths --run RUN --images FOLDER --runtime DIST --out paths.json [--enlarge 26]
    python benchmarks/ship.py page formats.json int8.json load.json paths.json

The networks of `formats` have weights of chance, their heads' scaled up so that answers differ from picture to picture. `load` asks from
another process on the same machine, bounded in time; the plain server that it is compared with is FastAPI answering one picture at a time
with the same ONNX file and the same reader. With `--enlarge N` the photographs of `paths` are N made larger, as a camera writes them. `page` writes ship.md from what the others measured.
"""
import argparse
import asyncio
import base64
import functools
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BACKBONES = [('resnet18', 200), ('resnet18', 224), ('convnext_atto', 200), ('convnext_atto', 224), ('swin_tiny_patch4_window7_224', 224), ('vit_tiny_patch16_224', 208), ('vit_tiny_patch16_224', 224)]


def busy() -> float:
    from mstoolkit.core import others_at_work
    return round(others_at_work(1.), 1)


def pictures(folder: Path, n: int = 12) -> Path:
    "Blurred noise of many shapes."
    import cv2
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        h, w = rng.integers(60, 500, 2)
        cv2.imwrite(str(folder/f'{i}.jpg'), cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (int(w), int(h)), interpolation=cv2.INTER_CUBIC))
    return folder


def formats(args):
    import torch
    from mstoolkit.classifier import Classifier, ModelHeader
    from mstoolkit.models.fusion import multiscale_model
    from mstoolkit.ship.export import export
    rows = []
    with tempfile.TemporaryDirectory() as d:
        images = pictures(Path(d)/'images')
        for backbone, size in BACKBONES:
            if args.only and args.only not in backbone: continue
            for head in ('plain', 'pyramid', 'gated'):
                torch.manual_seed(0)
                net = multiscale_model(backbone, head, 100, pretrained=False, img_size=size).eval()
                for p in net[1].parameters(): p.data *= 3
                header = ModelHeader(config=net.config, classes=[str(i) for i in range(100)], size=size, mean=(.485, .456, .406), std=(.229, .224, .225))
                file = Classifier(net, header).save(Path(d)/'m.safetensors')
                for format in args.formats.split(','):
                    out = Path(d)/f'{backbone}-{size}-{head}-{format}'
                    c = export(file, out, format=format, images=images).compared
                    rows.append(dict(backbone=backbone, size=size, head=head, format=format, largest=c.largest, changed=len(c.changed), mb=c.mb, ms=c.ms, per_second=c.per_second))
                    print(rows[-1], flush=True)
                    Path(args.out).write_text(json.dumps(dict(rows=rows) | args.where)) # one that is stopped has measured something
    return dict(rows=rows)


def int8(args):
    from mstoolkit.ship.export import export
    rows = []
    with tempfile.TemporaryDirectory() as d:
        for format in ('onnx', 'openvino'):
            for how in ({}, dict(half=True), dict(int8=True, max_drop=100)):
                e = export(args.run, Path(d)/f"{format}-{'-'.join(how)}", format=format, **how)
                c = e.compared
                rows.append(dict(format=format, how=next(iter(how), '32 bits'), images=c.images, largest=c.largest, changed=len(c.changed), mb=c.mb, ms=c.ms, per_second=c.per_second, accuracy=c.accuracy, drop=c.drop,
                                 network=e.header.network, size=e.header.sizes[0]))
                print(rows[-1], flush=True)
    return dict(rows=rows)


PLAIN = '''
import sys, uvicorn
from fastapi import FastAPI, Request
from mstoolkit.ship.runner import OnnxModel
model, app = OnnxModel(sys.argv[1], int(sys.argv[2])), FastAPI()
@app.post('/predict')
async def predict(request: Request):
    p = model.predict(await request.body())
    return dict(label=p.label, confidence=p.confidence)
uvicorn.run(app, port=int(sys.argv[3]), log_level='error', access_log=False)
'''


async def clients(url: str, n: int, bodies: list, seconds: float) -> dict:
    "`n` clients that ask again as soon as they are answered."
    import httpx
    took, refused = [], 0
    end = time.perf_counter() + seconds
    async def one(c, k):
        nonlocal refused
        i = k
        while time.perf_counter() < end:
            t = time.perf_counter()
            r = await c.post(url, content=bodies[i % len(bodies)])
            if r.status_code == 200: took.append(time.perf_counter()-t)
            else:
                refused += 1
                await asyncio.sleep(float(r.headers.get('retry-after', 1)))
            i += 1
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=n)) as c:
        start = time.perf_counter()
        await asyncio.gather(*(one(c, k) for k in range(n)))
        whole = time.perf_counter()-start
    q = np.quantile(took, [.5, .95, .99]) if took else [float('nan')]*3
    p50, p95, p99 = (round(1e3*float(o), 1) for o in q)
    return dict(clients=n, per_second=round(len(took)/whole, 1), refused=refused, p50=p50, p95=p95, p99=p99)


def load(args):
    "Ours and the plain one, by turns."
    import urllib.request
    images = [f.read_bytes() for f in sorted(Path(args.images).rglob('*.jpg'))[:64]]
    rows, port = [], 8731
    for n in (1, 8, 64, 256):
        for name in ('plain', 'mstoolkit'):
            port += 1
            ours = [sys.executable, '-m', 'mstoolkit', 'serve', args.onnx, '--port', str(port), '--threads', str(args.threads)]
            p = subprocess.Popen(ours if name == 'mstoolkit' else [sys.executable, '-c', PLAIN, args.onnx, str(args.threads), str(port)], stdout=subprocess.DEVNULL)
            try:
                for _ in range(600):
                    try: urllib.request.urlopen(urllib.request.Request(f'http://127.0.0.1:{port}/predict', images[0])); break
                    except OSError: time.sleep(.1)
                rows.append(dict(server=name, **asyncio.run(clients(f'http://127.0.0.1:{port}/predict', n, images, args.seconds))))
                print(rows[-1], flush=True)
            finally:
                p.send_signal(signal.SIGTERM)
                p.wait(30)
    return dict(rows=rows, threads=args.threads)


def paths(args):
    "A hundred photographs through Python, the server, ONNX, OpenVINO and the browser."
    import shutil
    import urllib.request

    from mstoolkit.classifier import Classifier
    from mstoolkit.ship.export import export
    from mstoolkit.ship.runner import OnnxModel, OpenVinoModel
    files = sorted(Path(args.images).rglob('*.jpg'))
    n = args.enlarge or 100
    files = [files[i*len(files)//n] for i in range(n)]
    said = {}
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        if args.enlarge: files = enlarged(files, d/'large')
        clf, names = Classifier.load(args.run), None
        names = clf.header.classes
        of = lambda o: [o.probs[c] for c in names]
        said['Python, Classifier.predict'] = [of(o) for o in clf.predict(files)]
        onnx = export(args.run, d/'m.onnx', maps=True).path
        said['ONNX, onnxruntime'] = OnnxModel(onnx).probs(files, [1, 2, 7]).tolist()
        said['OpenVINO'] = OpenVinoModel(export(args.run, d/'ov', format='openvino').path/'model.xml').probs(files, [1, 2, 7]).tolist()
        p = subprocess.Popen([sys.executable, '-m', 'mstoolkit', 'serve', str(onnx), '--port', '0'], stdout=subprocess.PIPE, text=True)
        try:
            url = re.search(r'http://\S+', p.stdout.readline())[0]
            rows = []
            for f in files:
                r = json.load(urllib.request.urlopen(urllib.request.Request(f'{url}/predict?top={len(names)}', f.read_bytes())))
                by = {o['name']: o['probability'] for o in r['predictions'][0]['classes']}
                rows.append([by[c] for c in names])
            said['mstoolkit serve'] = rows
        finally:
            p.terminate()
            p.wait(30)
        chromium = next((p for o in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(o))), None)
        if args.runtime and chromium: said['browser (Chromium, WebAssembly)'] = in_browser(export(args.run, d/'web', format='web', runtime=args.runtime).path, files, chromium)
        full = [f for f in files if min(size_of(f)) >= 2*clf.header.size]
    first = np.array(said['Python, Classifier.predict'])
    rows = [dict(path=k, largest=float(np.abs(np.array(v)-first).max()), median=float(np.median(np.abs(np.array(v)-first).max(1))), changed=int((np.array(v).argmax(1) != first.argmax(1)).sum()),
                 ties=[dict(file=files[i].name, was=float(np.sort(first[i])[-1]), second=float(np.sort(first[i])[-2])) for i in np.flatnonzero(np.array(v).argmax(1) != first.argmax(1))]) for k, v in said.items()]
    for r in rows: print(r)
    return dict(rows=rows, photographs=len(files), reduced=len(full), size=clf.header.size)


def enlarged(files: list, folder: Path) -> list:
    "Photographs of 2 to 12 megapixels made of smaller ones, with grain; most with chroma at half resolution, every fourth turned by its EXIF."
    import cv2
    from PIL import Image
    folder.mkdir()
    rng, sides = np.random.default_rng(0), [(3000, 2000), (4032, 3024), (3005, 2003), (1600, 1200), (2000, 3000)]
    for i, f in enumerate(files):
        im = cv2.resize(np.asarray(Image.open(f).convert('RGB')), sides[i % 5], interpolation=cv2.INTER_LANCZOS4)
        grain = cv2.GaussianBlur(rng.normal(0, 25, im.shape).astype(np.float32), (0, 0), .8)
        exif = Image.Exif()
        if i % 4 == 3: exif[0x112] = (6, 8, 3)[i//4 % 3]
        Image.fromarray(np.clip(im + grain, 0, 255).astype(np.uint8)).save(folder/f'{i:03d}.jpg', quality=92, subsampling=0 if i % 4 == 2 else 2, exif=exif)
    return sorted(folder.iterdir())


def size_of(file):
    from mstoolkit.data.image import image_header
    h = image_header(file.read_bytes())
    return h.width, h.height


def in_browser(folder: Path, files: list, chromium: str) -> list:
    from playwright.sync_api import sync_playwright
    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {'.mjs': 'text/javascript', '.wasm': 'application/wasm'}
        def log_message(self, *args): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = b.new_page()
        page.set_default_timeout(120_000)
        page.goto(f'http://127.0.0.1:{s.server_port}')
        page.wait_for_function('!!window.mstoolkit')
        out = [page.evaluate("async d => mstoolkit.probabilities(new Blob([Uint8Array.from(atob(d), c => c.charCodeAt(0))]))", base64.b64encode(f.read_bytes()).decode()) for f in files]
        b.close()
    s.shutdown()
    return out


def page(args):
    "ship.md, from what was measured."
    got = {Path(f).stem: json.loads(Path(f).read_text()) for f in args.files}
    commands, _, about = __doc__.strip().partition('\n\n')[2].rpartition('\n\n')
    out = ['# Shipped models\n', commands + '\n', about.replace('\n', ' ') + '\n']
    where = lambda o: f"{o['date']}, {o['machine']}; other programs kept {o['busy']} threads at work when it began.\n"
    if o := got.get('formats'):
        out += ['## Every format beside PyTorch\n', where(o), 'Twelve pictures, file to answer, in batches of 1, 2 and 7. Times are the file\'s ÷ PyTorch\'s, less is better: of one image, and of an image in batches of 32.\n',
                '| backbone | size | head | format | largest difference | answers changed | MB | 1 image | batches of 32 |', '|---|---:|---|---|---:|---:|---:|---:|---:|']
        out += [f"| {r['backbone']} | {r['size']} | {r['head']} | {r['format']} | {r['largest']:.0e} | {r['changed']} | {r['mb']:.1f} | {r['ms'][0]/r['ms'][1]:.2f} | {r['per_second'][1]/r['per_second'][0]:.2f} |" for r in o['rows']]
    if o := got.get('int8'):
        r = o['rows'][0]
        out += ['\n## Fewer bits on photographs\n', where(o), f"{r['network']}, {r['size']} px, {r['images']} validation images; times as above. The drop has its paired 95 % interval.\n",
                '| format | numbers | accuracy | change, points | largest difference | answers changed | MB | 1 image | batches of 32 |', '|---|---|---:|---|---:|---:|---:|---:|---:|']
        acc = lambda r: '{:.1%}'.format(r['accuracy'][1]) if r['accuracy'] else ''
        drop = lambda r: '{:+.1f} ({:+.1f} to {:+.1f})'.format(*r['drop']) if r['drop'] else ''
        out += [f"| {r['format']} | {r['how']} | {acc(r)} | {drop(r)} | {r['largest']:.0e} | {r['changed']} | {r['mb']:.1f} | {r['ms'][0]/r['ms'][1]:.2f} | {r['per_second'][1]/r['per_second'][0]:.2f} |" for r in o['rows']]
    if o := got.get('load'):
        out += ['\n## The server under load\n', where(o), f"Clients that ask again as soon as they are answered, on the same machine; {o['threads']} thread(s) of onnxruntime in both.\n",
                '| clients | server | requests/s | p50 ms | p95 ms | p99 ms | refused with 503 |', '|---:|---|---:|---:|---:|---:|---:|']
        out += [f"| {r['clients']} | {r['server']} | {r['per_second']:.0f} | {r['p50']:.0f} | {r['p95']:.0f} | {r['p99']:.0f} | {r['refused']} |" for r in o['rows']]
    if o := got.get('paths'):
        out += ['\n## One answer over every path\n', where(o), f"{o['photographs']} photographs, beside `Classifier.predict`; {o['reduced']} of them are large enough ({2*o['size']} px) to be decoded at a half or less in Python, where the browser's script averages what it has decoded whole.\n",
                '| path | largest difference of a probability | median of the pictures | answers changed |', '|---|---:|---:|---:|']
        out += [f"| {r['path']} | {r['largest']:.0e} | {r['median']:.0e} | {r['changed']} |" for r in o['rows']]
    if any(o['busy'] >= 1 for o in got.values()):
        out[3:3] = ['**Taken beside other programs** (how many threads they kept at work stands at each table), at the lowest priority: differences, sizes and answers are what they are, times say little.\n']
    (HERE/'ship.md').write_text('\n'.join(out)+'\n', encoding='utf-8')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    s = p.add_subparsers(dest='what', required=True)
    for name in ('formats', 'int8', 'load', 'paths'):
        o = s.add_parser(name)
        o.add_argument('--out', required=True)
        o.add_argument('--threads', type=int, default=1)
    s.choices['formats'].add_argument('--only', default='')
    s.choices['formats'].add_argument('--formats', default='onnx,openvino,torch-export')
    for name in ('int8', 'paths'): s.choices[name].add_argument('--run', required=True)
    s.choices['load'].add_argument('--onnx', required=True)
    s.choices['load'].add_argument('--seconds', type=float, default=8)
    for name in ('load', 'paths'): s.choices[name].add_argument('--images', required=True)
    s.choices['paths'].add_argument('--runtime', default='')
    s.choices['paths'].add_argument('--enlarge', type=int, default=0)
    s.add_parser('page').add_argument('files', nargs='+')
    args = p.parse_args()
    if args.what == 'page': return page(args)
    os.environ.setdefault('OMP_NUM_THREADS', str(args.threads))
    from machine import machine
    args.where = dict(date=time.strftime('%Y-%m-%d'), machine=machine(), busy=busy())
    Path(args.out).write_text(json.dumps(globals()[args.what](args) | args.where))


if __name__ == '__main__': main()
