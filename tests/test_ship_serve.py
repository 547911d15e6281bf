"The server: what it answers, what it refuses, that it keeps nothing, and that it ends well."
import asyncio
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from mstoolkit.cli import main
from mstoolkit.ship.export import export
from mstoolkit.ship.runner import OnnxModel, Runner, ShippedHeader
from mstoolkit.ship.serve import Limits, Service, make_app, open_to_serve
from PIL import Image
from tests.test_ship import classifier

TestClient = pytest.importorskip('starlette.testclient').TestClient


def encoded(ext='.png', h=60, w=80, seed=0):
    return cv2.imencode(ext, np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8))[1].tobytes()


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    d = tmp_path_factory.mktemp('served')
    os.mkdir(d/'pictures')
    for i in range(4): (d/'pictures'/f'{i}.png').write_bytes(encoded(seed=i))
    return export(classifier(size=32).save(d/'m.safetensors'), maps=True, images=d/'pictures').path


@pytest.fixture
def client(model):
    with TestClient(make_app(Service(OnnxModel(model, 1)))) as c: yield c


class Slow(Runner):
    "Takes its time, and remembers the batches."
    header = ShippedHeader(classes=['a', 'b'], sizes=[8], version='1')
    def __init__(self, seconds=.05): self.seconds, self.sizes = seconds, []
    def run(self, x):
        self.sizes.append(len(x))
        time.sleep(self.seconds)
        return dict(probabilities=np.tile(np.float32([.25, .75]), (len(x), 1)))


def test_it_says_what_the_library_says(client, model):
    data = encoded('.jpg', 200, 300)
    r = client.post('/predict?top=2&maps=1', content=data)
    said, want = r.json(), OnnxModel(model, 1).predict(data)
    (p,) = said['predictions']
    assert r.status_code == 200 and p['label'] == want.label and p['confidence'] == pytest.approx(want.confidence, abs=1e-6)
    assert [o['name'] for o in p['classes']] == list(want.probs)[:2] and p['words'] and said['ms'] > 0
    assert said['model']['version'] == OnnxModel(model, 1).header.version
    total = sum(np.sum(m['rows']) for m in p['maps']) + p['bias']
    assert total == pytest.approx(p['logit'], abs=1e-3) and [m['stride'] for m in p['maps']] == OnnxModel(model, 1).header.strides
    assert 'maps' not in client.post('/predict', content=data).json()['predictions'][0]


def test_torch_and_onnx_serve_the_same(model, client):
    data = encoded()
    with TestClient(make_app(Service(open_to_serve(model.with_name('m.safetensors'))))) as torch_client:
        a, b = (c.post('/predict?maps=1', content=data).json() for c in (client, torch_client))
    assert a['model'] == b['model'] and a['predictions'][0]['confidence'] == pytest.approx(b['predictions'][0]['confidence'], abs=1e-5)
    np.testing.assert_allclose(a['predictions'][0]['maps'][0]['rows'], b['predictions'][0]['maps'][0]['rows'], atol=1e-4)


def test_forms_of_several_files(client):
    files = [('files', (f'{i}.png', encoded(seed=i), 'image/png')) for i in range(3)]
    many = client.post('/predict', files=files, data={'note': 'not a file'}).json()['predictions']
    assert [o['confidence'] for o in many] == pytest.approx([client.post('/predict', content=f[1][1]).json()['predictions'][0]['confidence'] for f in files], abs=1e-5)
    r = client.post('/predict', files=[*files, ('files', ('x.png', b'no'))])
    assert r.status_code == 415 and r.json()['error'].startswith('picture 4 of 4: the picture cannot be read: not an image')
    assert client.post('/predict', data={'a': 'b'}, files={}).status_code == 415 # a form without a file is a body that is no image
    assert client.post('/predict', content=b'x', headers={'content-type': 'multipart/form-data'}).status_code == 422


def bad_uploads():
    "Thirty kinds of bodies that are no good picture."
    png, jpg = encoded('.png'), encoded('.jpg')
    ihdr = lambda w, h: b'\x89PNG\r\n\x1a\n' + (lambda b: struct.pack('>I', 13)+b+struct.pack('>I', zlib.crc32(b)))(b'IHDR'+struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
    gif = io.BytesIO(); Image.new('P', (8, 8)).save(gif, 'GIF')
    webp = encoded('.webp')
    tif = encoded('.tiff')
    rng = np.random.default_rng(0)
    out = {'empty': b'', 'html': b'<html>hello</html>', 'text': b'just text', 'json': b'{"a": 1}', 'zeros': bytes(1000), 'noise': rng.bytes(1000), 'pdf': b'%PDF-1.7\n' + bytes(50),
           'zip': b'PK\x03\x04' + bytes(50), 'exe': b'MZ' + bytes(100), 'svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'eps': b'%!PS-Adobe-3.0 EPSF-3.0\n', 'mp4': b'\0\0\0\x18ftypmp42' + bytes(40),
           'heic': b'\0\0\0\x18ftypheic' + bytes(40), 'png magic': png[:8], 'png head': png[:30], 'png cut': png[:-40], 'png half': png[:len(png)//2], 'png huge': ihdr(60_000, 60_000) + png[33:],
           'png flat': ihdr(0, 10), 'png giant side': ihdr(200_000, 1), 'png bad crc': png[:60] + bytes([png[60] ^ 255]) + png[61:], 'jpg magic': jpg[:3], 'jpg cut': jpg[:-50], 'jpg half': jpg[:len(jpg)//2],
           'jpg holes': jpg[:100] + bytes(100) + jpg[200:300], 'gif magic': b'GIF89a', 'gif cut': gif.getvalue()[:20], 'webp cut': webp[:len(webp)//2], 'tif cut': tif[:100], 'bmp magic': b'BM' + bytes(20)}
    assert len(out) == 30
    return out


@pytest.mark.parametrize('kind', bad_uploads())
def test_bad_pictures_are_refused_in_words(client, kind):
    r = client.post('/predict', content=bad_uploads()[kind])
    assert r.status_code in (415, 422) and r.json()['error'].startswith('the picture cannot be read: '), (r.status_code, r.text)
    assert client.post('/predict', content=encoded()).status_code == 200, 'and the next is answered'


def test_a_thousand_bad_pictures_leave_no_trace(client, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    import resource
    bad = list(bad_uploads().values())
    for b in bad*2: client.post('/predict', content=b)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(1000): assert client.post('/predict', content=bad[i % 30]).status_code in (415, 422)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000, 'kilobytes'
    assert client.post('/predict', content=encoded()).status_code == 200
    assert not list(tmp_path.iterdir())
    assert all(o.startswith('libpng error: ') for o in capfd.readouterr().err.splitlines()), 'which the server process hushes, see below'


def test_nothing_of_a_large_form_is_written(client, monkeypatch):
    "The usual parser would put parts of more than a megabyte into temporary files."
    import tempfile
    def no(*args, **kw): raise AssertionError('a temporary file')
    for o in ('SpooledTemporaryFile', 'TemporaryFile', 'NamedTemporaryFile', 'mkstemp'): monkeypatch.setattr(tempfile, o, no)
    big = encoded('.png', 1000, 1000)
    assert len(big) > 2**21 and client.post('/predict', files={'f': ('a.png', big)}).status_code == 200


def test_limits(model):
    limits = Limits(max_mb=.02, max_megapixels=.005, max_images=2)
    with TestClient(make_app(Service(OnnxModel(model, 1), limits))) as c:
        assert c.post('/predict', content=encoded(h=40, w=40)).status_code == 200
        r = c.post('/predict', content=bytes(30_000))
        assert r.status_code == 413 and 'up to 0.02 MB in a request (--max-mb)' in r.json()['error']
        r = c.post('/predict', content=iter([bytes(15_000)]*3)) # without a length
        assert r.status_code == 413
        r = c.post('/predict', content=cv2.imencode('.png', np.zeros((80, 80, 3), np.uint8))[1].tobytes())
        assert r.status_code == 422 and '80 × 80 pixels, and this server reads up to 5,000 (--max-megapixels)' in r.json()['error']
        r = c.post('/predict', files=[('f', (str(i), b'a')) for i in range(3)])
        assert r.status_code == 413 and 'up to 2 pictures in a request (--max-images)' in r.json()['error']
        assert c.post('/predict?top=0', content=b'').status_code == 422


def asked(app, n, data):
    "Answers to `n` requests at once."
    import httpx
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://test') as c:
            return await asyncio.gather(*(c.post('/predict', content=data) for _ in range(n)))
    return asyncio.run(go())


def test_what_comes_together_is_batched():
    slow = Slow()
    service = Service(slow, Limits(batch=8, wait_ms=500))
    out = asked(make_app(service), 20, encoded())
    assert {r.status_code for r in out} == {200} and max(slow.sizes) > 1 and sum(slow.sizes) == 20 and len(slow.sizes) < 20
    assert service.waiting == service.held == service.batcher.coming == 0


def test_too_many_get_503():
    service = Service(Slow(.1), Limits(batch=1, max_waiting=3))
    out = asked(make_app(service), 12, encoded())
    codes = [r.status_code for r in out]
    assert codes.count(200) == 3 and codes.count(503) == 9
    late = next(r for r in out if r.status_code == 503)
    assert late.headers['retry-after'] == '1' and '3 pictures already waiting, of up to 3 (--max-waiting)' in late.json()['error'] and service.waiting == service.held == 0


def test_each_limit_is_named(model):
    one = Service(Slow(.1), Limits(batch=1, max_waiting=1))
    late = next(r for r in asked(make_app(one), 3, encoded()) if r.status_code == 503)
    assert '1 picture already waiting, of up to 1 (--max-waiting)' in late.json()['error']
    data = encoded(h=100, w=100)
    few = Service(Slow(.1), Limits(batch=1, max_mb=.05, max_waiting_mb=.05))
    assert 25_000 < len(data) < 50_000
    late = next(r for r in asked(make_app(few), 3, data) if r.status_code == 503)
    assert '(--max-waiting-mb)' in late.json()['error'] and few.held == 0
    with TestClient(make_app(Service(OnnxModel(model, 1), Limits(max_waiting=2)))) as c: # it would never find room
        r = c.post('/predict', files=[('f', (str(i), encoded())) for i in range(3)])
        assert r.status_code == 413 and 'up to 2 pictures in a request (--max-waiting)' in r.json()['error']
        png = encoded()
        huge = png[:16] + struct.pack('>II', 60_000, 60_000) + png[24:]
        assert c.post('/predict', content=huge).json()['error'] == 'the picture cannot be read: 60,000 × 60,000 pixels, and this server reads up to 50,000,000 (--max-megapixels)'
        bmp = b'BM' + struct.pack('<IHHI', 54, 0, 0, 54) + struct.pack('<IiiHHIIiiII', 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
        r = c.post('/predict', content=bmp)
        assert r.status_code == 422 and 'more pixels than the 178,956,970 that are read' in r.json()['error']


@pytest.mark.parametrize('kw, why', [(dict(max_mb=300), 'raise --max-waiting-mb'), (dict(max_waiting_mb=1), '--max-mb is 20'), (dict(max_megapixels=180), 'no picture of more than 179')])
def test_limits_that_could_not_be_kept(kw, why):
    with pytest.raises(ValueError, match=why): Limits(**kw)


def test_errors_have_one_shape(client):
    for r in (client.get('/nothing'), client.get('/predict'), client.post('/'), client.delete('/healthz'), client.put('/metrics'), client.post('/openapi.json'),
              client.post('/predict?top=0', content=encoded()), client.post('/predict?top=x', content=encoded()), client.post('/predict?maps=perhaps', content=encoded()),
              client.post('/predict', content=b'no')):
        assert r.status_code in (404, 405, 415, 422) and set(r.json()) == {'error'} and isinstance(r.json()['error'], str), r.text
    assert client.post('/').headers['allow'] == 'GET, HEAD' and client.get('/predict').headers['allow'] == 'POST'
    assert client.post('/predict?top=0').json()['error'].startswith("top is '0': input should be greater than or equal to 1")
    assert 'mstoolkit_requests_total{status="422"}' in client.get('/metrics').text


def test_a_mistake_of_ours_has_that_shape_too():
    service = Service(Slow(0))
    def no(_): raise KeyError('secret of ours')
    service.check_token = no
    with TestClient(make_app(service), raise_server_exceptions=False) as c: r = c.get('/metrics')
    assert r.status_code == 500 and r.json() == {'error': 'a mistake of ours: KeyError'}


def test_head_is_answered_as_get_is(client):
    for path in ('/', '/healthz', '/docs', '/metrics', '/openapi.json'):
        got, head = client.get(path), client.head(path)
        assert head.status_code == 200 and not head.content, path
        if path != '/metrics': assert head.headers['content-length'] == got.headers['content-length'], path
        assert head.headers['content-type'] == got.headers['content-type']


def test_the_description_says_what_a_token_protects(model):
    with TestClient(make_app(Service(OnnxModel(model, 1), token='key'))) as c:
        api = c.get('/openapi.json').json()
        for path, method in (('/predict', 'post'), ('/metrics', 'get')):
            o = api['paths'][path][method]
            assert o['security'] and o['responses']['401']['content']['application/json']['schema'] == {'$ref': '#/components/schemas/Error'}
            assert c.request(method, path).status_code == c.request(method, f'{path}?top=0').status_code == 401
        assert 'security' not in api['paths']['/healthz']['get'] and c.head('/metrics').status_code == 401
        assert c.get('/docs').text.count('<th scope="row">401</th>') == 2
    with TestClient(make_app(Service(OnnxModel(model, 1)))) as c:
        api = c.get('/openapi.json').json()
        assert 'securitySchemes' not in api['components'] and set(api['components']['schemas']) == {'Error'}
        answers = [r for methods in api['paths'].values() for o in methods.values() for k, r in o['responses'].items() if k >= '400']
        assert answers and all('Error' in json.dumps(r['content']) for r in answers)


def test_an_answer_that_takes_too_long_is_503():
    service = Service(Slow(1.), Limits(seconds=.1))
    (r,) = asked(make_app(service), 1, encoded())
    assert r.status_code == 503 and 'within 0.1 seconds' in r.json()['error'] and service.waiting == 0


def test_a_network_that_fails_is_500_and_the_next_is_answered():
    class Failing(Slow):
        def run(self, x):
            if not self.sizes: self.sizes.append(0); raise RuntimeError('secret of ours')
            return super().run(x)
    app = make_app(Service(Failing(0)))
    async def both():
        import httpx
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://test') as c:
            return [await c.post('/predict', content=encoded()) for _ in range(2)]
    a, b = asyncio.run(both())
    assert (a.status_code, b.status_code) == (500, 200) and 'secret' not in a.text


def test_token(model):
    with TestClient(make_app(Service(OnnxModel(model, 1), token='geheim ü'))) as c:
        for headers in ({}, {'Authorization': 'Bearer no'}, {'Authorization': 'geheim'}):
            for r in (c.post('/predict', content=encoded(), headers=headers), c.get('/metrics', headers=headers)):
                assert r.status_code == 401 and r.headers['www-authenticate'] == 'Bearer'
        assert c.get('/healthz').status_code == 200 and 'Access token' in c.get('/').text
    with TestClient(make_app(Service(OnnxModel(model, 1), token='key'))) as c:
        assert c.post('/predict', content=encoded(), headers={'Authorization': 'Bearer key'}).status_code == 200


def test_metrics_health_and_description(client):
    client.post('/predict', content=encoded()); client.post('/predict', content=b'')
    text = client.get('/metrics').text
    assert 'mstoolkit_requests_total{status="200"} 1.0' in text and 'mstoolkit_requests_total{status="422"} 1.0' in text and 'mstoolkit_waiting_images 0.0' in text
    assert client.get('/healthz').json()['status'] == 'ok'
    api = client.get('/openapi.json').json()
    assert set(api['paths']) == {'/predict', '/healthz', '/metrics'} and '503' in api['paths']['/predict']['post']['responses']
    docs = client.get('/docs')
    assert 'POST /predict' in docs.text and not re.search(r'(src|href)="(https?:)?//', docs.text) and 'curl' in docs.text
    page = client.get('/')
    assert not re.search(r'(src|href)="(https?:)?//', page.text) and "default-src 'none'" in page.headers['content-security-policy']


def test_a_run_folder_is_served_by_the_file_that_was_made_from_it(tmp_path, model, capsys):
    import shutil
    run = tmp_path/'run'
    run.mkdir()
    shutil.copy(model.with_name('m.safetensors'), run/'model.safetensors')
    assert type(open_to_serve(run)).__name__ == 'TorchModel'
    shutil.copy(model, run/'model.onnx')
    assert type(open_to_serve(run)).__name__ == 'OnnxModel'
    classifier(size=32, seed=5).save(run/'model.safetensors')
    assert type(open_to_serve(run)).__name__ == 'TorchModel' and 'was made from another model' in capsys.readouterr().err
    assert open_to_serve(classifier(head='mlp', size=32).save(tmp_path/'mlp.safetensors')).header.strides == []


def test_threads_are_torchs_too(model):
    import torch
    before = torch.get_num_threads()
    try:
        open_to_serve(model.with_name('m.safetensors'), 3)
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(before)


def test_mistakes_of_the_command(tmp_path, capsys):
    assert main(['serve', str(tmp_path/'gone.onnx')]) == 2 and 'there is no exported model' in capsys.readouterr().err
    assert main(['serve', 'gone', '--batch', '0']) == 2 and '--batch is 0: give more than 0' in capsys.readouterr().err


# --- the process

def started(model, *args):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    p = subprocess.Popen([sys.executable, '-m', 'mstoolkit', 'serve', str(model), '--port', '0', '--threads', '1', *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    line = p.stdout.readline()
    return p, re.search(r'http://\S+', line)[0]


def test_sigterm_answers_what_was_taken(model):
    p, url = started(model)
    data, codes, lost = encoded(), [], []
    assert json.load(urllib.request.urlopen(f'{url}/healthz'))['status'] == 'ok'
    maps = Path(f'/proc/{p.pid}/maps')
    if maps.exists(): assert 'libtorch' not in maps.read_text(), 'served without torch'
    for bad in bad_uploads().values():
        with pytest.raises(urllib.error.HTTPError): urllib.request.urlopen(urllib.request.Request(f'{url}/predict', bad))
    stop = threading.Event()
    def ask():
        while not stop.is_set():
            try: codes.append(urllib.request.urlopen(urllib.request.Request(f'{url}/predict', data), timeout=30).status)
            except urllib.error.HTTPError as e: codes.append(e.code)
            except urllib.error.URLError as e: # no connection was taken: the server has gone
                if not isinstance(e.reason, ConnectionRefusedError): lost.append(repr(e))
                return
            except Exception as e: lost.append(repr(e)); return
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads: t.start()
    time.sleep(2)
    p.send_signal(signal.SIGTERM)
    assert p.wait(30) == 0
    stop.set()
    for t in threads: t.join()
    out, err = p.communicate()
    assert codes and set(codes) == {200} and not err
    # connections that were in the kernel's queue and never taken may be reset; a request that was read never is
    assert all('reset' in o.lower() for o in lost), lost


def test_it_listens_where_it_is_told(model):
    p, url = started(model, '--token', 'x')
    try:
        assert url.startswith('http://127.0.0.1:')
        with pytest.raises(urllib.error.HTTPError, match='401'): urllib.request.urlopen(urllib.request.Request(f'{url}/predict', encoded()))
    finally:
        p.terminate()
        assert p.wait(30) == 0
        p.communicate()


def test_what_cannot_be_served_is_told_in_a_line(model, tmp_path, capsys):
    for name in 'm.pt2', 'm.web', 'page':
        (tmp_path/name/'runtime').mkdir(parents=True)
        (tmp_path/name/'index.html').touch()
        assert main(['serve', str(tmp_path/name)]) == 2
        assert 'is no model that a server opens: give a run folder' in capsys.readouterr().err
    with socket.create_server(('127.0.0.1', 0)) as taken:
        assert main(['serve', str(model), '--port', str(taken.getsockname()[1])]) == 2
    err = capsys.readouterr().err
    assert 'nothing can listen at 127.0.0.1' in err and len(err.splitlines()) == 1
