"The server's page and the web folder in a real browser: answers, maps, keyboard, names for screen readers, and nothing from elsewhere."
import base64
import functools
import hashlib
import http.server
import io
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from mstoolkit.data.image import decode_image, pixels_of, shrink
from mstoolkit.ship.export import export
from mstoolkit.ship.runner import OnnxModel
from mstoolkit.ship.web import runtime_files
from PIL import Image
from tests.test_ship import classifier
from tests.test_ship_serve import started

# the folder dist of the npm package onnxruntime-web. Where it is not, all that the page does itself is tested all the same, on a stand-in
RUNTIME = Path(os.environ.get('ORT_WEB', 'node_modules/onnxruntime-web/dist'))
needs_runtime = pytest.mark.skipif(not all((RUNTIME/o).is_file() for o in runtime_files), reason='needs npm install onnxruntime-web (ORT_WEB=its dist)')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A model with maps, and pictures of many shapes."
    d, rng = tmp_path_factory.mktemp('web'), np.random.default_rng(0)
    (d/'pictures').mkdir()
    for i, (h, w) in enumerate([(50, 60), (64, 64), (200, 90), (33, 150), (120, 127), (97, 61), (640, 480), (500, 40), (31, 31), (700, 1100)]):
        im = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(d/'pictures'/f'{i}.png'), np.clip(im + rng.integers(-20, 20, im.shape), 0, 255).astype(np.uint8))
    exif = Image.Exif(); exif[0x112] = 6
    Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)).save(d/'turned.jpg', exif=exif, quality=95)
    export(classifier(size=64).save(d/'m.safetensors'), maps=True, images=d/'pictures')
    return d


@pytest.fixture(scope='module')
def server(made):
    p, url = started(made/'m.onnx')
    yield url
    p.terminate()
    p.communicate(timeout=30)


@contextmanager
def hosted(made, name, runtime):
    "The web folder behind a plain static host."
    out = export(made/'m.safetensors', made/name, format='web', maps=True, images=made/'pictures', runtime=runtime).path
    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {'.mjs': 'text/javascript', '.wasm': 'application/wasm'}
        def log_message(self, *args): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(out)))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown()
    s.server_close()


@pytest.fixture(scope='module')
def folder(made):
    with hosted(made, 'web', RUNTIME) as url: yield url


STAND_IN = """const known = KNOWN, other = OTHER;
export const env = {wasm: {}};
export class Tensor { constructor(type, data, dims) { Object.assign(this, {type, data, dims}); } }
const digest = async a => [...new Uint8Array(await crypto.subtle.digest('SHA-256', a))].map(o => o.toString(16).padStart(2, '0')).join('');
export const InferenceSession = {create: async address => {
  const file = await fetch(address);
  if (!file.ok) throw new Error(`no ${address}`);
  return {inputNames: ['pixels'], run: async ({pixels}) => known[await digest(pixels.data)] ?? other};
}};"""


@pytest.fixture(scope='module')
def stub(made):
    "The same without onnxruntime-web: a stand-in that knows what onnxruntime says of the pixels that Python sees, and of no others."
    model, known = OnnxModel(made/'m.onnx', 1), {}
    plain = lambda out: {k: dict(data=v.ravel().tolist(), dims=v.shape) for k, v in out.items()}
    for f in (made/'pictures').iterdir():
        (pixels,) = pixels_of(f, [64])
        known[hashlib.sha256(pixels.tobytes()).hexdigest()] = plain(model.run(pixels[None]))
    other = plain({k: np.full_like(v, .3) for k, v in model.run(pixels[None]).items()})
    d = made/'stand-in'
    d.mkdir()
    for o in runtime_files: (d/o).touch()
    (d/runtime_files[0]).write_text(STAND_IN.replace('KNOWN', json.dumps(known)).replace('OTHER', json.dumps(other)))
    with hosted(made, 'stub', d) as url: yield url


@pytest.fixture
def open_page(browser):
    "Opens a page, and says afterwards whether it complained or asked for something elsewhere."
    pages = []
    def go(url, **kw):
        page, said = browser.new_page(**kw), []
        page.set_default_timeout(120_000) # on a machine that others use
        page.on('console', lambda m: said.append(m.text) if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: said.append(str(e)))
        page.on('request', lambda r: None if r.url.startswith((url, 'blob:', 'data:')) else said.append(f'asked for {r.url}'))
        page.goto(url)
        pages.append((page, said))
        return page
    yield go
    for page, said in pages:
        page.close()
        assert not said, said


def shown(page, timeout=60_000):
    page.wait_for_selector('#answer:not([hidden])', timeout=timeout)
    return page.locator('#said').inner_text()


_folders = 'stub', pytest.param('folder', marks=needs_runtime)


@pytest.fixture(params=['server', *_folders])
def url(request): return request.getfixturevalue(request.param)


@pytest.fixture(params=_folders)
def web(request): return request.param, request.getfixturevalue(request.param)


IN_PAGE = "new Blob([Uint8Array.from(atob(data), c => c.charCodeAt(0))])"


def seen(page, data, size=64):
    "What a network of this size sees of a file in the browser."
    got = page.evaluate(f"async ([data, size]) => [...await mstoolkit.pixels({IN_PAGE}, size)]", [base64.b64encode(data).decode(), size])
    return np.array(got, np.uint8).reshape(size, size, 3)


def test_a_file_is_answered_with_its_maps(url, open_page, made):
    page, want = open_page(url), OnnxModel(made/'m.onnx', 1).predict(made/'pictures'/'0.png')
    page.set_input_files('#file', str(made/'pictures'/'0.png'))
    said = shown(page)
    assert want.label in said and (f'{100*want.confidence:.0f} %' in said or f'{100*want.confidence:.1f} %' in said)
    assert page.locator('#classes tr').count() == 3 and 'Calibrated on validation images: of 100 answers' in page.locator('#trust').inner_text()
    scales = page.get_by_role('radio')
    assert scales.count() == 4
    plain = page.evaluate("document.querySelector('#view').toDataURL()")
    page.get_by_role('radio', name='Scale 2 of 3').check()
    assert page.evaluate("document.querySelector('#view').toDataURL()") != plain and 'Stride' in page.locator('#told').inner_text()
    assert page.get_by_role('img', name='under the map of scale 2 of 3').count() == 1


def test_paste_drop_and_mistakes(url, open_page, made):
    page = open_page(url)
    data = base64.b64encode((made/'pictures'/'1.png').read_bytes()).decode()
    fire = """([kind, data, name, type]) => { const t = new DataTransfer();
      t.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type}));
      const e = kind == 'paste' ? new ClipboardEvent('paste', {clipboardData: t, bubbles: true}) : new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true});
      document.querySelector('#drop').dispatchEvent(e); }"""
    for kind in ('paste', 'drop'):
        page.evaluate(fire, [kind, data, 'a.png', 'image/png'])
        shown(page)
        page.evaluate("document.querySelector('#answer').hidden = true")
    if page.evaluate('!!window.mstoolkit'): # the server's 415 is a console error of the browser's own
        page.evaluate(fire, ['drop', base64.b64encode(b'no picture').decode(), 'a.txt', 'text/plain'])
        page.wait_for_selector('#error:not([hidden])')
        assert 'cannot read' in page.get_by_role('alert').inner_text()


def test_a_photograph_is_taken(url, open_page):
    page = open_page(url, permissions=['camera'])
    page.get_by_role('button', name='Take a photograph').click()
    page.get_by_role('button', name='Take the picture').click()
    assert '%' in shown(page) and page.locator('#camera').is_hidden()
    assert page.evaluate("document.querySelector('video').srcObject.getTracks().every(t => t.readyState == 'ended')"), 'the camera is off'


def test_keyboard_and_names(url, open_page, made):
    page = open_page(url)
    page.keyboard.press('Tab')
    assert page.evaluate("document.activeElement.id") == 'file' and page.get_by_label('Choose a picture').count() == 1
    page.keyboard.press('Tab')
    assert page.evaluate("document.activeElement.id") == 'photo'
    page.set_input_files('#file', str(made/'pictures'/'2.png'))
    shown(page)
    assert page.evaluate("document.activeElement.id") == 'answer-title', 'the keyboard goes on from the answer'
    page.keyboard.press('Tab'); page.keyboard.press('ArrowRight')
    assert page.evaluate("document.activeElement.value") == '1' and 'Stride' in page.locator('#told').inner_text()


@pytest.mark.parametrize('width, scheme', [(390, 'light'), (1280, 'light'), (1280, 'dark')])
def test_nothing_overflows_and_axe_finds_nothing(url, open_page, made, width, scheme):
    axe = pytest.importorskip('axe_playwright_python')
    page = open_page(url, viewport=dict(width=width, height=900), color_scheme=scheme, bypass_csp=True)
    page.set_input_files('#file', str(made/'pictures'/'0.png'))
    shown(page)
    page.get_by_role('radio', name='Scale 1 of 3').check()
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.add_script_tag(content=(Path(axe.__file__).parent/'axe.min.js').read_text(encoding='utf-8'))
    found = page.evaluate('() => axe.run(document)')['violations']
    assert not found, [(v['id'], [n['html'] for n in v['nodes']]) for v in found]


def test_the_browser_resizes_to_the_same_pixels(stub, open_page):
    "OpenCV's arithmetic, to the last bit, for sizes up and down and for whole factors."
    page, rng = open_page(stub), np.random.default_rng(1)
    page.wait_for_function('!!window.mstoolkit')
    for h, w, size in [(50, 60, 64), (64, 64, 64), (128, 128, 64), (130, 200, 64), (300, 400, 64), (500, 40, 64), (33, 500, 32), (97, 61, 48), (512, 512, 64), (20, 20, 64)]:
        im = rng.integers(0, 256, (h, w, 3), np.uint8)
        got = page.evaluate("([h, w, data, size]) => [...mstoolkit.resized({h, w, data: Uint8Array.from(atob(data), c => c.charCodeAt(0))}, size).data]",
                            [h, w, base64.b64encode(im.tobytes()).decode(), size])
        np.testing.assert_array_equal(np.array(got, np.uint8).reshape(size, size, 3), shrink(im, (size, size)), err_msg=f'{h} × {w} to {size}')


def jpeg(h, w, subsampling=0, turn=1, seed=0):
    "Something like a photograph: shapes of many sizes, with grain."
    rng = np.random.default_rng(seed)
    im = sum(cv2.resize(rng.uniform(0, 255, (n, n, 3)).astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC) for n in (4, 16, 64))/3
    im = np.clip(im + rng.normal(0, 12, im.shape), 0, 255).astype(np.uint8)
    exif = Image.Exif(); exif[0x112] = turn
    Image.fromarray(im).save(out := io.BytesIO(), 'JPEG', quality=92, subsampling=subsampling, exif=exif)
    return out.getvalue()


@pytest.mark.parametrize('subsampling', [0, 2], ids=['4:4:4', '4:2:0'])
def test_large_jpegs_are_seen_as_python_sees_them(subsampling, stub, open_page):
    "Python decodes them at 1/2, 1/4 or 1/8, and a browser cannot: it takes the same averages, and undoes the smoothing of chroma before."
    page = open_page(stub)
    page.wait_for_function('!!window.mstoolkit')
    for h, w in [(150, 200), (260, 300), (259, 301), (515, 690), (300, 1100)]: # at 1/2, 1/4, 1/4 with blocks that are not whole, 1/8, 1/4
        data = jpeg(h, w, subsampling)
        off = np.abs(seen(page, data).astype(int) - pixels_of(data, [64])[0])
        assert off.max() <= 10 and off.mean() < .35, (h, w, off.max(), off.mean())


def test_turned_jpegs_are_averaged_from_where_the_file_begins(stub, open_page):
    page = open_page(stub)
    page.wait_for_function('!!window.mstoolkit')
    for turn in range(1, 9):
        data = jpeg(517, 603, turn % 2*2, turn)
        got = seen(page, data).astype(int)
        off = np.abs(got - pixels_of(data, [64])[0])
        assert off.max() <= 10 and off.mean() < .35, (turn, off.max(), off.mean())
        assert np.abs(got - shrink(decode_image(data), (64, 64))).mean() > 3, 'which the whole picture, averaged otherwise, is not'


def test_the_browser_gives_the_same_answers(web, open_page, made):
    (kind, url), model = web, OnnxModel(made/'m.onnx', 1)
    page = open_page(url)
    page.wait_for_function('!!window.mstoolkit')
    for f in [*sorted((made/'pictures').iterdir()), *([made/'turned.jpg'] if kind == 'folder' else [])]:
        got = page.evaluate(f"async data => mstoolkit.probabilities({IN_PAGE})", base64.b64encode(f.read_bytes()).decode())
        assert got == pytest.approx(model.probs([f])[0].tolist(), abs=1e-4 if f.suffix == '.png' else 5e-3), f.name


@needs_runtime
def test_a_large_photograph_gives_the_same_answer(folder, open_page, made):
    page, model = open_page(folder), OnnxModel(made/'m.onnx', 1)
    page.wait_for_function('!!window.mstoolkit')
    for i, subsampling in enumerate([0, 2]):
        data = jpeg(1000, 1500, subsampling, seed=i)
        got = page.evaluate(f"async data => mstoolkit.probabilities({IN_PAGE})", base64.b64encode(data).decode())
        assert got == pytest.approx(model.probs([data])[0].tolist(), abs=.02)


def test_the_folder_works_offline_and_holds_no_more_than_it_needs(web, made, browser):
    kind, url = web
    held = (made/('web' if kind == 'folder' else kind)).rglob('*')
    assert sorted(p.name for p in held if p.is_file()) == sorted(['index.html', 'model.onnx', *runtime_files])
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.wait_for_function('!!window.mstoolkit')
    page.set_input_files('#file', str(made/'pictures'/'0.png'))
    shown(page)
    context.set_offline(True) # all that is needed is there
    page.evaluate("document.querySelector('#answer').hidden = true")
    page.set_input_files('#file', str(made/'pictures'/'1.png'))
    assert shown(page)
    context.close()
