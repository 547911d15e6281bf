"Odd images, folders, tables, lists, models, run folders and command lines, each with what should become of it; `corpus.py` runs them."
import json
import os
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, PngImagePlugin

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))
from corpus import RGB, bad_files, chunk, exif, good_files, picture, save, turned  # noqa: E402

TINY = '--backbone test_resnet --no-pretrained --size 32 --epochs 1 --bs 8 --num-workers 0 --augment none --device cpu --memory-format contiguous'.split()
READY = Path() # folder of what `prepare` has made; set by who runs the cases


@dataclass
class Case:
    "One thing a user may meet."
    group: str
    name: str
    do: Callable # folder → arguments of the command line, or a function to call in the child
    code: int|tuple = 0 # exit codes that are right
    says: str = '' # what must be said, a regular expression; several, one a line, in any order
    never: str = '' # what must not be said
    see: Callable|None = None # (folder, outcome) → what is wrong with what came out, '' where nothing is
    limit: float = 60 # seconds


def judge(c: Case, d: Path, o) -> tuple[str, str]: # verdict, and why
    "Compare what came out with what should."
    codes = c.code if isinstance(c.code, tuple) else (c.code,)
    last = (o.err.strip().splitlines() or o.out.strip().splitlines() or [''])[-1][-300:]
    if o.late: return 'crash', f'no end after {c.limit:g} s; the last line: {last}'
    if 'Traceback (most recent call last)' in o.text or 'a mistake of ours' in o.text: return 'crash', last
    if o.code < 0: return 'crash', f'ended by signal {-o.code}; {last}'
    if o.code not in codes:
        if o.code == 0: return 'silently wrong', f'exit code 0, not {c.code}'
        return 'refused' if 0 in codes else 'crash' if o.code not in (1, 2) else 'unhelpful', f'exit code {o.code}, not {c.code}: {last}'
    if c.see:
        try: wrong = c.see(d, o)
        except Exception as e: wrong = f'not to be judged, {type(e).__name__}: {e}'
        if wrong: return 'silently wrong' if o.code == 0 else 'unhelpful', wrong
    if c.says and not re.search(c.says, o.text, re.M): return 'silently wrong' if o.code == 0 else 'unhelpful', f'{c.says!r} is not in: {last}'
    if c.never and re.search(c.never, o.text, re.M): return 'silently wrong', f'it says {re.search(c.never, o.text, re.M)[0]!r}'
    if o.code == 2 and len([x for x in o.err.splitlines() if x.startswith('mstoolkit:')]) > 1: return 'unhelpful', 'an error of two lines'
    return 'ok', ''


cases: list[Case] = []

def add(group, name, do, code=0, says='', **kw): cases.append(Case(group, name, do, code, says, **kw))


# -- pieces ------------------------------------------------------------------------------------------------------------

def pic(file: Path, colour=(128, 128, 128), fmt: str = 'PNG', **kw) -> Path:
    "A noisy picture, another for each path."
    rng = np.random.default_rng(zlib.crc32(os.fsencode(file)))
    im = np.clip(rng.normal(colour, 50, (40, 48, 3)), 0, 255).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save(im, fmt, **kw))
    return file

def pics(folder: Path, n: int = 3, colour=(128, 128, 128)):
    for i in range(n): pic(folder/f'{i}.png', colour)
    return folder

def layout(d: Path, *folders: str, n: int = 3) -> Path:
    "Folders of pictures below d/data."
    for i, o in enumerate(folders): pics(d/'data'/o, n, [(200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128)][i % 4])
    return d/'data'

def train(*args) -> list: return ['train', *args, '--out', 'run', *TINY]

def header(run: Path):
    from mstoolkit.classifier import read_header
    return read_header(run)

def came(classes=None, counts=None, n_valid=None, valid=None) -> Callable:
    "What a training has understood: its classes, images of each, validation images, and labels of those by name."
    def see(d: Path, o):
        run = d/'run'
        if not (run/'model.safetensors').is_file(): return 'no model'
        got, env = header(run).classes, json.loads((run/'environment.json').read_text())
        preds = pd.read_csv(run/'valid_predictions.csv', dtype=str, keep_default_na=False)
        if classes is not None and got != list(classes): return f'classes {got}, not {list(classes)}'
        if counts is not None and env['data']['train_per_class'] != list(counts): return f"{env['data']['train_per_class']} training images a class, not {list(counts)}"
        if n_valid is not None and len(preds) != n_valid: return f'{len(preds)} validation images, not {n_valid}'
        for name, label in (valid or {}).items():
            row = preds[preds.image.str.endswith(name)]
            if list(row.label) != [label]: return f'{name} is labelled {list(row.label)}, not {label!r}'
        return ''
    return see

def no_run(d, o): return 'a run folder is left: '+str(sorted(os.listdir(d/'run'))) if (d/'run').exists() else ''

def counted_in(split: str, want: dict) -> Callable: # of `check --json`
    def see(d, o):
        got = json.loads(o.out)['counts'].get(split)
        return '' if got == want else f'check counts {got} in {split}, not {want}'
    return see

def found(kind: str, level: str = '') -> Callable: # of `check --json`
    def see(d, o):
        fs = json.loads(o.out)['findings']
        if any(f['kind'] == kind and level in ('', f['level']) for f in fs): return ''
        return f"no {level} finding {kind!r}, only {[(f['level'], f['kind']) for f in fs]}"
    return see

def clean(d, o):
    fs = [f for f in json.loads(o.out)['findings'] if f['level'] != 'note']
    return f'findings {fs}' if fs else ''


# -- images ------------------------------------------------------------------------------------------------------------

def png(w: int, h: int, depth: int, colour: int, raw: bytes, *before: bytes, after: tuple = ()) -> bytes:
    "A PNG by hand; `raw` is its rows, each with its filter byte."
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n'+head+b''.join(before)+chunk(b'IDAT', zlib.compress(raw))+b''.join(after)+chunk(b'IEND', b'')

def rows(a: np.ndarray) -> bytes: return b''.join(b'\0'+r.tobytes() for r in np.ascontiguousarray(a))

def grey_bits(depth: int) -> tuple[bytes, np.ndarray]:
    "A ramp of 8 pixels a byte or fewer."
    top = 2**depth-1
    v = np.arange(64).reshape(8, 8) % (top+1)
    per = 8//depth
    packed = np.zeros((8, 8//per), np.uint8)
    for i in range(8): packed[:, i//per] |= (v[:, i] << (8-depth*(i % per+1))).astype(np.uint8)
    ref = np.rint(v*255/top).astype(np.uint8)
    return png(8, 8, depth, 0, rows(packed)), np.repeat(ref[..., None], 3, 2)

def segment(marker: int, data: bytes) -> bytes: return bytes([0xff, marker])+struct.pack('>H', len(data)+2)+data

def jpeg_with(*segments: bytes, data: bytes|None = None) -> bytes:
    d = data or save(RGB, 'JPEG', quality=95)
    return d[:2]+b''.join(segments)+d[2:]

def exif_segment(k: int, order: str = '<', kind: int = 3, extra: bytes = b'') -> bytes:
    mark = b'II' if order == '<' else b'MM'
    value = struct.pack(order+'HH', k, 0) if kind == 3 else struct.pack(order+'I', k)
    tiff = mark+struct.pack(order+'HI', 42, 8)+struct.pack(order+'H', 1)+struct.pack(order+'HHI', 0x112, kind, 1)+value+struct.pack(order+'I', 0)
    return segment(0xe1, b'Exif\0\0'+tiff+extra)

def raw_profile(k: int, key: str = 'Raw profile type exif', zipped: bool = True) -> bytes:
    body = exif_segment(k)[4:]
    text = f"\nexif\n{len(body):8d}\n"+body.hex()+"\n"
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text, zip=zipped)
    return save(RGB, 'PNG', pnginfo=info)

def tiff(a: np.ndarray, bits: int, photometric: int = 1, tags: tuple = (), data: bytes|None = None, order: str = '<', sample: int|None = None) -> bytes:
    "A TIFF of one strip by hand."
    h, w, c = (*a.shape, 1)[:3]
    body = data if data is not None else np.ascontiguousarray(a).tobytes()
    e = {256: (4, w), 257: (4, h), 258: (3, bits), 259: (3, 1), 262: (3, photometric), 273: (4, 8), 277: (3, c), 278: (4, h), 279: (4, len(body))}
    if sample: e[339] = (3, sample)
    e |= dict(tags)
    ifd = struct.pack(order+'H', len(e))
    for k in sorted(e):
        kind, v = e[k]
        ifd += struct.pack(order+'HHI', k, kind, 1)+(struct.pack(order+'HH', v, 0) if kind == 3 else struct.pack(order+'I', v))
    mark = b'II' if order == '<' else b'MM'
    return mark+struct.pack(order+'HI', 42, 8+len(body)+len(body) % 2)+body+b'\0'*(len(body) % 2)+ifd+struct.pack(order+'I', 0)

def heic(im=None, **kw) -> bytes:
    import pillow_heif
    out = BytesIO()
    pillow_heif.from_pillow(im or Image.fromarray(RGB)).save(out, quality=95, **kw)
    return out.getvalue()

def mpo() -> bytes:
    out = BytesIO()
    Image.fromarray(RGB).save(out, 'MPO', save_all=True, append_images=[Image.fromarray(255-RGB)], quality=95)
    return out.getvalue()

def more_good() -> dict: # name → (bytes, pixels, error)
    j = save(RGB, 'JPEG', quality=95)
    icc = lambda n: segment(0xe2, b'ICC_PROFILE\0'+bytes([n, 3])+bytes(60000))
    eight = np.repeat(RGB[..., :1], 3, 2)
    dark = np.linspace(0, 600, 4800).reshape(60, 80).astype(np.uint16)
    dark_ref = np.repeat(np.rint(dark/257).astype(np.uint8)[..., None], 3, 2)
    be = dark.astype('>u2')
    bmp = save(RGB, 'BMP')
    top_down = bmp[:22]+struct.pack('<i', -60)+bmp[26:54]+b''.join(bmp[54+240*(59-i):54+240*(60-i)] for i in range(60))
    key16 = np.zeros((8, 8), '>u2'); key16[2:] = 30000
    key_ref = np.full((8, 8, 3), 117, np.uint8); key_ref[:2] = 255
    files = {
        'icc-3.jpg': (jpeg_with(icc(1), icc(2), icc(3)), RGB, 2), 'comment-64k.jpg': (jpeg_with(segment(0xfe, b'x'*65000), segment(0xfe, b'y'*65000)), RGB, 2),
        'fill-bytes.jpg': (j[:2]+b'\xff\xff\xff'+j[2:], RGB, 2), 'mpo.jpg': (mpo(), RGB, 2),
        'exif-big-endian.jpg': (jpeg_with(exif_segment(6, '>')), turned(6), 2), 'exif-after-comment.jpg': (jpeg_with(segment(0xfe, b'hi'), exif_segment(8)), turned(8), 2),
        'exif-after-xmp.jpg': (jpeg_with(segment(0xe1, b'http://ns.adobe.com/xap/1.0/\0<x/>'), exif_segment(6)), turned(6), 2),
        'exif-after-100k.jpg': (jpeg_with(icc(1), icc(2), exif_segment(3)), turned(3), 2),
        'exif-0.jpg': (jpeg_with(exif_segment(0)), RGB, 2), 'exif-9.jpg': (jpeg_with(exif_segment(9)), RGB, 2),
        'exif-cut.jpg': (jpeg_with(segment(0xe1, b'Exif\0\0II*\0\x08\0')), RGB, 2), 'exif-empty.jpg': (jpeg_with(segment(0xe1, b'Exif\0\0')), RGB, 2),
        'rgb-jpeg.jpg': (save(RGB, 'JPEG', quality=95, keep_rgb=True), RGB, 2), 'restart.jpg': (save(RGB, 'JPEG', quality=95, restart_marker_blocks=1), RGB, 2),
        'eoi-twice.jpg': (j+b'\xff\xd9', RGB, 2), 'dot.jpg': (save(RGB[:1, :1], 'JPEG', quality=95), RGB[:1, :1], 4),
        'exif-behind.png': (save(RGB, 'PNG')[:-12]+chunk(b'eXIf', exif_segment(6)[10:])+save(RGB, 'PNG')[-12:], turned(6), 0),
        'raw-profile.png': (raw_profile(6), turned(6), 0), 'raw-profile-plain.png': (raw_profile(8, zipped=False), turned(8), 0),
        'grey-2-bit.png': (*grey_bits(2), 0), 'grey-4-bit.png': (*grey_bits(4), 0), 'grey-1-bit.png': (*grey_bits(1), 0),
        'key-16-bit.png': (png(8, 8, 16, 0, rows(key16), chunk(b'tRNS', b'\0\0')), key_ref, 1),
        'dark-16-bit.png': (save(dark, 'PNG'), dark_ref, 1), 'black-16-bit.png': (save(dark*0, 'PNG'), dark_ref*0, 0),
        'grey-alpha-16.png': (png(2, 1, 16, 4, b'\0'+struct.pack('>HHHH', 0, 65535, 0, 0)), np.array([[[0]*3, [255]*3]], np.uint8), 1),
        'text-before.png': (png(80, 60, 8, 2, rows(RGB), chunk(b'tEXt', b'a\0'+b'b'*70000)), RGB, 0),
        'gamma.png': (png(80, 60, 8, 2, rows(RGB), chunk(b'gAMA', struct.pack('>I', 45455))), RGB, 0),
        'dark-16.tif': (save(dark, 'TIFF'), dark_ref, 1), 'dark-16-mm.tif': (tiff(be, 16, order='>', data=be.tobytes()), dark_ref, 1),
        'white-is-zero.tif': (tiff(255-RGB[..., 0], 8, 0), eight, 0), 'rgba.tif': (save(np.dstack([RGB, np.full((60, 80), 255, np.uint8)]), 'TIFF'), RGB, 0),
        'jpeg-in.tif': (save(RGB, 'TIFF', compression='jpeg', quality=95), RGB, 3), 'deflate.tif': (save(RGB, 'TIFF', compression='tiff_deflate'), RGB, 0),
        'packbits.tif': (save(RGB, 'TIFF', compression='packbits'), RGB, 0), 'palette.tif': (save(Image.fromarray(eight[..., 0]).convert('P'), 'TIFF'), eight, 0),
        'top-down.bmp': (top_down, RGB, 0), 'palette.bmp': (save(Image.fromarray(eight[..., 0]).convert('P'), 'BMP'), eight, 0),
        'maxval-100.pgm': (b'P5 8 1 100\n'+bytes([0, 10, 25, 50, 75, 90, 99, 100]), np.repeat(np.array([[0, 26, 64, 128, 191, 230, 252, 255]], np.uint8)[..., None], 3, 2), 1),
        'maxval-1023.pgm': (b'P5 4 1 1023\n'+struct.pack('>4H', 0, 256, 512, 1023), np.repeat(np.array([[0, 64, 128, 255]], np.uint8)[..., None], 3, 2), 1),
        'sixteen.ppm': (b'P6 80 60 65535\n'+(RGB.astype('>u2')*257).tobytes(), RGB, 1), 'comment.ppm': (b'P6\n# hello\n80 60\n255\n'+RGB.tobytes(), RGB, 0),
        'lossless.webp': (save(RGB, 'WEBP', lossless=True), RGB, 0), 'profile.webp': (save(RGB, 'WEBP', lossless=True, icc_profile=bytes(500)), RGB, 0),
        'plain.heic': (heic(), RGB, 5), 'heic-called.jpg': (heic(), RGB, 5), 'turned.heic': (heic(exif=exif(6).tobytes()), turned(6), 6),
        'turned.avif': (save(RGB, 'AVIF', quality=95, exif=exif(6)), turned(6), 6), 'clear.avif': (save(np.dstack([RGB, np.full((60, 80), 255, np.uint8)]), 'AVIF', quality=95), RGB, 6),
        'grey.jp2': (save(RGB[..., 0], 'JPEG2000'), eight, 1), 'gif-in.png': (save(Image.fromarray(eight[..., 0]).convert('P'), 'GIF'), eight, 0),
        'jfif-ending.jfif': (j, RGB, 2), 'two-dots.tar.jpg': (j, RGB, 2), ' space .jpg': (j, RGB, 2), '-dash.jpg': (j, RGB, 2), '%s{0}.jpg': (j, RGB, 2)}
    return files

def more_bad() -> dict: # name → (bytes, kinds)
    half, a = ('truncated', 'damaged'), RGB[..., 0].astype(np.float32)
    twelve = np.arange(64*64) % 4096
    packed = np.zeros((64*64*3//2,), np.uint8)
    packed[0::3], packed[1::3], packed[2::3] = twelve[0::2] >> 4, ((twelve[0::2] & 15) << 4) | (twelve[1::2] >> 8), twelve[1::2] & 255
    j, p = save(picture(300, 400), 'JPEG'), save(picture(300, 400), 'PNG')
    return {
        'float-1000.tif': (save(a*4, 'TIFF'), half), 'float-minus.tif': (save(a/128-1, 'TIFF'), half), 'float-nan.tif': (save(a*np.nan, 'TIFF'), half),
        'float-inf.tif': (save(np.where(a > 9, np.inf, 0).astype(np.float32), 'TIFF'), half), 'int32.tif': (save(RGB[..., 0].astype(np.int32)*999, 'TIFF'), half),
        'signed-16.tif': (tiff(np.full((8, 8), -5, '<i2'), 16, sample=2), half), 'twelve-bit.tif': (tiff(twelve.reshape(64, 64), 12, data=packed.tobytes()), half),
        'float-64.tif': (tiff(np.full((8, 8), 300.), 64, sample=3), half), 'film.mp4.jpg': (b'\0\0\0\x18ftypmp42\0\0\0\0mp42isom'+bytes(99), ['alien']),
        'gz.jpg': (b'\x1f\x8b\x08'+bytes(99), ['alien']), 'json.png': (b'{"error": "not found"}', ['alien']), 'lfs.jpg': (b'version https://git-lfs.github.com/spec/v1\n', ['alien']),
        'pickle.jpg': (b'\x80\x04\x95', ['alien']), 'soi-eoi.jpg': (b'\xff\xd8\xff\xd9', half), 'header-only.jpg': (j[:300], half),
        'lying-chunk.png': (p[:33]+struct.pack('>I', 0x7fffffff)+p[37:], half), 'no-data.png': (png(8, 8, 8, 2, b'')[:33]+chunk(b'IEND', b''), half),
        'crc.png': (p[:40]+bytes([p[40] ^ 1])+p[41:], half), 'huge-1d.png': (png(2**31-1, 1, 8, 0, b''), ('huge', 'damaged')),
        'bomb.webp': (b'RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0\x2f\xff\xff\xff\x0f'+bytes(12), ('huge', *half)), 'bomb.ppm': (b'P6 100000 100000 255\n', ('huge', *half)),
        'zero.gif': (b'GIF89a\0\0\0\0\0\0\0', half), 'icns.png': (b'icns'+bytes(99), ['alien']), 'cut.heic': (heic()[:200], half), 'empty-riff.webp': (b'RIFF\0\0\0\0WEBP', half)}

def reads(name: str, data: bytes, want, error: float, size=None):
    def do(d: Path):
        (d/name).write_bytes(data)
        def run():
            from mstoolkit.data.image import read_image
            got = read_image(d/name, size)
            if got.shape != np.shape(want): print(f'{got.shape}, not {np.shape(want)}')
            elif (e := abs(got.astype(int)-want).mean()) > error: print(f'other pixels: mean error {e:.2f} of 255')
            else: print('right')
            return 0
        return run
    return do

def refuses(name: str, data: bytes, kinds):
    def do(d: Path):
        (d/name).write_bytes(data)
        def run():
            from mstoolkit.data.image import ImageError, read_image
            try: got = read_image(d/name)
            except ImageError as e:
                print(f'{e.kind if e.kind in kinds else "other kind: "+e.kind}: {e}')
                return 2
            print('read as', got.shape, 'of mean', got.mean().round(1))
            return 0
        return run
    return do

def shown(name: str) -> str: return json.dumps(name, ensure_ascii=False)[1:-1] if len(name) < 60 else f'{name[:8]}… ({len(name)} characters)'

def image_cases():
    right = lambda d, o: '' if o.out.strip().endswith('right') else o.out.strip()
    for name, (data, want, error) in {**good_files(), **more_good()}.items():
        add('images', f'`{shown(name)}` is read', reads(name, data, want, error), see=right)
    for name, (data, kinds) in {**bad_files(), **more_bad()}.items():
        add('images', f'`{shown(name)}` is refused', refuses(name, data, kinds), 2, f"^({'|'.join(kinds)}): .*"+re.escape(name.split(chr(10))[0]))

    def arrays(make, ok=False):
        def run():
            from mstoolkit.data.image import to_rgb
            try: im = to_rgb(make())
            except ValueError as e:
                print(e)
                return 2
            print('right' if ok and abs(im.astype(int)-RGB).max() <= 1 else f'{im.min()} to {im.max()}')
            return 0
        return lambda d: run
    for name, make in {'floats from 0 to 255': lambda: RGB.astype(np.float32), 'floats from -1 to 1': lambda: RGB/127.5-1,
                       'NaN': lambda: RGB*np.nan, 'int64 to 65535': lambda: RGB.astype(int)*257, 'int16 below 0': lambda: RGB.astype(np.int16)-300,
                       'channels first': lambda: RGB.transpose(2, 0, 1), 'five channels': lambda: np.dstack([RGB, RGB[..., :2]]), 'complex': lambda: RGB.astype(complex)}.items():
        add('arrays', f'{name}: refused', arrays(make), 2, '.')
    for name, make in {'bytes': lambda: RGB, 'uint16': lambda: RGB.astype(np.uint16)*257, 'floats from 0 to 1': lambda: RGB/255, 'int64 to 255': lambda: RGB.astype(int)}.items():
        add('arrays', f'{name}: read', arrays(make, True), see=right)

    def spoil(how):
        def do(d):
            data = layout(d, 'train/a', 'train/b', 'val/a', 'val/b')
            how(data)
            return data
        return do
    j = save(picture(300, 400), 'JPEG', quality=95)
    closed = lambda f: f.write_bytes(j[:len(j)//2]+b'\xff\xd9')
    zeroed = lambda f: f.write_bytes(j[:len(j)//3]+bytes(len(j)//3)+j[2*len(j)//3:])
    for name, how in {'a JPEG cut and closed': closed, 'a JPEG zeroed inside': zeroed}.items():
        add('images', f'check names {name}', lambda d, how=how: ['check', spoil(lambda o: how(o/'train'/'a'/'x.jpg'))(d)], (0, 1), r'(?i)(warning|error).*\n(.*\n)*.*x\.jpg')
        add('images', f'train names {name}', lambda d, how=how: train(spoil(lambda o: how(o/'train'/'a'/'x.jpg'))(d)), (0, 2), r'x\.jpg')
        add('images', f'predict names {name}', lambda d, how=how: ['predict', READY/'run', spoil(lambda o: how(o/'train'/'a'/'x.jpg'))(d)], (0, 2), r'x\.jpg')
    for ending in ('.HEIC', '.jpg_large', '.jpg.bak', '.jpg~', '.JPG.1', '.dng', '.txt'):
        def put(o, e=ending): (o/'train'/'a'/f'x{e}').write_bytes(heic() if e == '.HEIC' else b'words' if e == '.txt' else j)
        kind = '' if ending == '.HEIC' else re.escape(ending.rpartition('.')[2])
        add('images', f'`x{ending}` beside images: check says so', lambda d, p=put: ['check', spoil(p)(d)], 0, kind or 'HEIF')
        add('images', f'`x{ending}` beside images: train says so', lambda d, p=put: train(spoil(p)(d)), 0, kind, see=came(counts=[4 if ending == '.HEIC' else 3, 3]))
    def pipe(o): os.mkfifo(o/'train'/'a'/'pipe.jpg')
    def folder_of_name(o): (o/'train'/'a'/'folder.jpg').mkdir()
    def dead(o): (o/'train'/'a'/'dead.jpg').symlink_to('nowhere.jpg')
    for name, how in {'pipe.jpg': pipe, 'dead.jpg': dead}.items():
        add('images', f'check of a class with {name}', lambda d, h=how: ['check', spoil(h)(d)], 1, re.escape(name), limit=20)
        add('images', f'train of a class with {name}', lambda d, h=how: train(spoil(h)(d)), 2, re.escape(name), limit=20, see=no_run)
        add('images', f'train --on-bad skip of a class with {name}', lambda d, h=how: train(spoil(h)(d), '--on-bad', 'skip'), 0, re.escape(name), limit=20, see=came(counts=[3, 3]))
    add('images', 'a folder called folder.jpg', lambda d: train(spoil(folder_of_name)(d)), 0, see=came(counts=[3, 3]))
    def cut(o): (o/'train'/'a'/'cut.jpg').write_bytes(j[:len(j)//2])
    add('images', 'train finds a cut JPEG', lambda d: train(spoil(cut)(d)), 2, r'cut\.jpg', see=lambda d, o: '')
    def cut_valid(o): (o/'val'/'a'/'cut.png').write_bytes(save(picture(300, 400), 'PNG')[:3000])
    add('images', 'train finds a cut PNG of validation', lambda d: train(spoil(cut_valid)(d)), 2, r'cut\.png', see=lambda d, o: '')
    add('images', 'train --on-bad skip leaves a cut JPEG out', lambda d: train(spoil(cut)(d), '--on-bad', 'skip'), 0, r'cut\.jpg', see=came(counts=[3, 3]))
    def icc_file(o): (o/'train'/'a'/'icc.jpg').write_bytes(more_good()['icc-3.jpg'][0])
    for extra in ([], ['--on-bad', 'skip'], ['--cache']):
        add('images', f"train of a JPEG with 180 kB before its header {' '.join(extra)}", lambda d, e=extra: train(spoil(icc_file)(d), *e), 0, see=came(counts=[4, 3]))
    add('images', 'check --fast of a JPEG with 180 kB before its header', lambda d: ['check', spoil(icc_file)(d), '--fast', '--json'], 0, see=clean)


# -- folders -----------------------------------------------------------------------------------------------------------

def folder_cases():
    g = 'folders'
    names = {'train': ['Training', 'TRAIN', 'Train'], 'valid': ['Val', 'valid', 'Validation', 'dev', 'VAL'], 'test': ['Test', 'TESTING', 'eval', 'Evaluation']}
    for t in names['train']:
        for v in names['valid']:
            add(g, f'{t}/ and {v}/', lambda d, t=t, v=v: train(layout(d, f'{t}/a', f'{t}/b', f'{v}/a', f'{v}/b')), 0, see=came('ab', [3, 3], 6))
    for t in names['train'][:2]:
        for s in names['test']:
            add(g, f'{t}/ and {s}/: train', lambda d, t=t, s=s: train(layout(d, f'{t}/a', f'{t}/b', f'{s}/a', f'{s}/b')), 0, see=came('ab', [2, 2], 2))
            add(g, f'{t}/ and {s}/: check', lambda d, t=t, s=s: ['check', layout(d, f'{t}/a', f'{t}/b', f'{s}/a', f'{s}/b'), '--json'], 0,
                see=lambda d, o: counted_in('train', {'a': 3, 'b': 3})(d, o) or counted_in('test', {'a': 3, 'b': 3})(d, o))
    odd = {
        'trainset/ and testset/': ('trainset/a', 'trainset/b', 'testset/a', 'testset/b'), 'train_images/ and val_images/': ('train_images/a', 'train_images/b', 'val_images/a', 'val_images/b'),
        'images/ alone over the classes': ('images/a', 'images/b'), 'fold1/ … fold3/': ('fold1/a', 'fold1/b', 'fold2/a', 'fold2/b', 'fold3/a', 'fold3/b'),
        'a/train, a/val, b/train, b/val': ('a/train', 'a/val', 'b/train', 'b/val'), 'entraînement/ and test/ of classes': ('entrainement/a', 'entrainement/b', 'essai/a', 'essai/b'),
        'train1/ and train2/': ('train1/a', 'train1/b', 'train2/a', 'train2/b'), 'training_set/ and test_set/': ('training_set/a', 'training_set/b', 'test_set/a', 'test_set/b')}
    for name, folders in odd.items():
        add(g, f'{name}: train', lambda d, f=folders: train(layout(d, *f)), 2, '(?i)(split|train|class)', see=no_run)
        add(g, f'{name}: check', lambda d, f=folders: ['check', layout(d, *f)], 1, '(?i)error')
    add(g, 'classes with folders of their own that differ', lambda d: train(layout(d, 'cat/black', 'cat/white', 'dog/big', 'dog/small')), (0, 2), 'black|2 classes') # an error that shows them, or these classes
    for t in ('train', 'val', 'Test', 'dev', 'eval'):
        add(g, f'a class called {t} in train/', lambda d, t=t: train(layout(d, f'train/{t}', 'train/b', f'val/{t}', 'val/b')), (0, 2), re.escape(t))
    add(g, 'test/ and val/ without train/, classes beside them', lambda d: train(layout(d, 'a', 'b', 'test/a', 'test/b')), 0, see=came('ab', [2, 2], 2))
    add(g, 'val/ alone: train', lambda d: train(layout(d, 'val/a', 'val/b')), 2, 'train', see=no_run)
    add(g, 'val/ alone: check', lambda d: ['check', layout(d, 'val/a', 'val/b')], 1, 'train', never='leak')
    add(g, 'test/ alone: train', lambda d: train(layout(d, 'test/a', 'test/b')), 2, '.', see=no_run)
    add(g, 'test/ alone: check', lambda d: ['check', layout(d, 'test/a', 'test/b')], 1, '(?i)error', never='leak')
    add(g, 'two folders of one split, train/ and Training/', lambda d: train(layout(d, 'train/a', 'train/b', 'Training/a', 'Training/b')), (0, 2), '(?i)training')
    add(g, 'val/ and valid/', lambda d: train(layout(d, 'train/a', 'train/b', 'val/a', 'val/b', 'valid/a', 'valid/b')), (0, 2), 'valid')
    add(g, 'dev/ and valid/ beside Train/', lambda d: train(layout(d, 'Train/a', 'Train/b', 'dev/a', 'dev/b', 'valid/a', 'valid/b')), 2, "'dev' and 'valid'")
    def empty(d, *f, at): data = layout(d, *f); (data/at).mkdir(parents=True); return data
    add(g, 'an empty class: train', lambda d: train(empty(d, 'a', 'b', at='c')), 2, "'c'", see=no_run)
    add(g, 'an empty class: check', lambda d: ['check', empty(d, 'a', 'b', at='c')], 1, "'c'")
    add(g, 'an empty class of val/', lambda d: train(empty(d, 'train/a', 'train/b', 'val/a', at='val/b')), 0, "'b'")
    add(g, 'a class of val/ that train/ lacks', lambda d: train(layout(d, 'train/a', 'train/b', 'val/a', 'val/c')), 2, "'c'", see=no_run)
    add(g, 'a class that val/ lacks', lambda d: train(layout(d, 'train/a', 'train/b', 'train/c', 'val/a', 'val/b')), 0, "'c'")
    add(g, 'an empty val/', lambda d: train(empty(d, 'train/a', 'train/b', at='val')), 2, 'val')
    add(g, 'an empty val/: check', lambda d: ['check', empty(d, 'train/a', 'train/b', at='val')], 1, 'val')
    add(g, 'one class', lambda d: train(layout(d, 'a')), 2, "'a'")
    add(g, 'one class: check', lambda d: ['check', layout(d, 'a')], 1, 'one|1 class|two')
    add(g, 'images without class folders', lambda d: train(layout(d, '')), 2, 'class')
    add(g, 'images without class folders: check', lambda d: ['check', layout(d, '')], 1, 'class')
    add(g, 'a folder with nothing in it', lambda d: train(empty(d, at='')), 2, 'data')
    add(g, 'train/ with images and no classes', lambda d: train(layout(d, 'train', 'val')), 2, 'class')
    def loose(d): data = layout(d, 'a', 'b'); pic(data/'loose.png'); return data
    add(g, 'loose images: check', lambda d: ['check', loose(d)], 0, 'loose.png|in no class')
    add(g, 'loose images: train says so', lambda d: train(loose(d)), 0, 'no class|loose', see=came(counts=[2, 2]))
    add(g, 'loose images in train/: train says so', lambda d: train((pic(layout(d, 'train/a', 'train/b', 'val/a', 'val/b')/'train'/'x.png')).parent.parent), 0, 'no class|loose')
    add(g, 'one image a class: train', lambda d: train(layout(d, 'a', 'b', n=1)), 2, 'validation')
    add(g, 'one image a class: check', lambda d: ['check', layout(d, 'a', 'b', n=1)], 1, 'validation')
    def one_of(d): data = layout(d, 'a', 'b'); pics(data/'c', 1); return data
    add(g, 'one image of one class: train says so', lambda d: train(one_of(d)), 0, "'c'")
    for x, y, what in (('Hat', 'hat', 'case'), ('hat', 'hat ', 'a space'), ('é', 'e\u0301', 'composition'), ('ﬁsh', 'fish', 'a ligature'), ('straße', 'STRASSE', 'sharp s'), ('a b', 'a  b', 'two spaces'),
                       ('cat', 'c\u0430t', 'a Cyrillic letter'), ('cat', 'cat\u200b', 'a space of no width'), ('a-b', 'a_b', 'a hyphen'), ('cat', 'cats', 'a plural')):
        warn = what not in ('a hyphen', 'a plural')
        add(g, f'classes that differ by {what}: check', lambda d, x=x, y=y: ['check', layout(d, x, y), '--json'], 0, see=found('twin classes') if warn else clean)
        if warn: add(g, f'classes that differ by {what}: train', lambda d, x=x, y=y: train(layout(d, x, y)), 0, 'differ by')
    def link_class(d): data = layout(d, 'a', 'b'); (data/'c').symlink_to(data/'a'); return data
    add(g, 'a class that is a link to another: check', lambda d: ['check', link_class(d)], 1, 'label conflict|different labels')
    add(g, 'a class that is a link to another: train says so', lambda d: train(link_class(d)), 0, 'different labels')
    def link_data(d): data = layout(d, 'a', 'b'); (d/'link').symlink_to(data); return d/'link'
    add(g, 'the data folder is a link', lambda d: train(link_data(d)), 0, see=came('ab', [2, 2]))
    def circle(d): data = layout(d, 'a', 'b'); (data/'a'/'up').symlink_to(data); return data
    add(g, 'a link back to the parent', lambda d: train(circle(d)), (0, 2), limit=20)
    def split_link(d): data = layout(d, 'train/a', 'train/b'); (data/'val').symlink_to(data/'train'); return data
    add(g, 'val/ is a link to train/: check', lambda d: ['check', split_link(d)], 1, 'leak|more than one split')
    add(g, 'val/ is a link to train/: train says so', lambda d: train(split_link(d)), (0, 2), 'more than one split')
    odd_bytes = os.fsdecode(b'caf\xe9')
    def file_name(d): data = layout(d, 'a', 'b'); pic(data/'a'/(odd_bytes+'.png')); return data
    def class_name(d): return layout(d, odd_bytes, 'b')
    for c, extra in (('train', []), ('train', ['--cache']), ('train', ['--on-bad', 'skip'])):
        add(g, f"a file name that is not UTF-8: train {' '.join(extra)}", lambda d, e=extra: train(file_name(d), *e), (0, 2), see=lambda d, o: '' if o.code == 0 or 'caf' in o.err else 'the file is not named')
    add(g, 'a class name that is not UTF-8: train', lambda d: train(class_name(d)), (0, 2), see=lambda d, o: '' if o.code == 0 or 'caf' in o.err else 'the class is not named')
    add(g, 'a class name that is not UTF-8: check', lambda d: ['check', class_name(d)], (0, 1), 'caf')
    add(g, 'a class name that is not UTF-8: check --html', lambda d: ['check', class_name(d), '--html', 'p.html'], (0, 1))
    add(g, 'a file name that is not UTF-8: check --json', lambda d: ['check', file_name(d), '--json'], 0, see=lambda d, o: json.loads(o.out) and '')
    add(g, 'a data folder that is not UTF-8', lambda d: train(layout(d, 'a', 'b').rename(d/odd_bytes)), (0, 2), see=lambda d, o: '' if o.code == 0 or 'caf' in o.err else 'the folder is not named')
    for c in ('CON', 'a/b'.replace('/', '∕'), '.hidden', 'a\nb', '"quoted"', "it's", 'a,b', 'a;b', 'a\tb', '100%', 'NA', 'nan', 'None', 'True', '1e5', '007', '=1+1', '-x', '@a', '&lt;', '<b>', '🙂', 'x'*200, ' a'):
        want = None if c == '.hidden' else sorted([c, 'zz'])
        add(g, f'a class called `{shown(c)}`', lambda d, c=c: train(layout(d, c, 'zz', 'zzz')), 0,
            see=lambda d, o, c=c: ('hidden class was used' if len(header(d/'run').classes) == 3 else '') if c == '.hidden' else '' if c in header(d/'run').classes else f"classes {header(d/'run').classes}")
        if want: add(g, f'a class called `{shown(c)}`: the report', lambda d, c=c: both(train(layout(d, c, 'zz', 'zzz')), ['report', 'run']), 0,
                     see=lambda d, o: '<b>' in (d/'run'/'report.html').read_text(errors='replace').split('<body')[1].replace('<b>', '', 0) and '<td><b></td>' in (d/'run'/'report.html').read_text(errors='replace') and 'HTML of a class name in the page' or '')
    def twins(d): data = layout(d, 'a', 'b'); pic(data/'a'/'0.jpg', fmt='JPEG'); return data
    add(g, 'two images of one stem: predict', lambda d: ['predict', READY/'run', twins(d)], 2, "'a/0'.*rename")
    def leak(d): data = layout(d, 'train/a', 'train/b', 'val/a', 'val/b'); shutil.copy(data/'train'/'a'/'0.png', data/'val'/'a'/'x.png'); return data
    add(g, 'a leak: check', lambda d: ['check', leak(d)], 1, 'x.png')
    add(g, 'a leak: check --fast', lambda d: ['check', leak(d), '--fast'], 1, 'x.png')
    add(g, 'a leak: train says so', lambda d: train(leak(d)), 0, 'warning: the same file in more than one split')
    def conflict(d): data = layout(d, 'a', 'b'); shutil.copy(data/'a'/'0.png', data/'b'/'x.png'); return data
    add(g, 'an image under two labels: check', lambda d: ['check', conflict(d)], 1, 'different labels')
    add(g, 'an image under two labels: train says so', lambda d: train(conflict(d)), 0, 'different labels')
    def same_size(d):
        data = layout(d, 'a', 'b')
        for c in 'ab': (data/c/'x.bmp').write_bytes(save(np.full((200, 200, 3), 9 if c == 'a' else 8, np.uint8), 'BMP'))
        return data
    add(g, 'images alike in size only', lambda d: ['check', same_size(d), '--fast', '--json'], 0, see=clean)
    def uneven(d): data = layout(d, 'a', 'b'); pics(data/'c', 40); return data
    add(g, 'very uneven classes: train says so', lambda d: train(uneven(d)), 0, 'logit-adjust')
    add(g, 'DATA is a file', lambda d: train(pic(d/'x.png')), 2, 'is a file')
    add(g, 'DATA is not there', lambda d: train(d/'nowhere'), 2, 'nowhere')
    add(g, '--valid none holds out training images', lambda d: train(layout(d, 'train/a', 'train/b', 'val/a', 'val/b'), '--valid', 'none'), 0, see=came('ab', [2, 2], 2))
    add(g, '--train and --valid of other names', lambda d: train(layout(d, 'x/a', 'x/b', 'y/a', 'y/b'), '--train', 'x', '--valid', 'y'), 0, see=came('ab', [3, 3], 6))
    add(g, '--valid test', lambda d: train(layout(d, 'train/a', 'train/b', 'test/a', 'test/b'), '--valid', 'test'), 0, see=came('ab', [3, 3], 6))
    add(g, '--train val --valid val', lambda d: train(layout(d, 'train/a', 'train/b', 'val/a', 'val/b'), '--train', 'val', '--valid', 'val'), (0, 2), 'more than one split|twice|same')
    add(g, '__MACOSX, Thumbs.db and .DS_Store', lambda d: train(junk(d)), 0, see=came('ab', [2, 2]))
    add(g, '@eaDir and lost+found beside the classes', lambda d: train(empty(d, 'a', 'b', at='lost+found')), 2, 'lost\\+found')

def junk(d: Path) -> Path:
    data = layout(d, 'a', 'b')
    for f in ('.DS_Store', 'Thumbs.db', 'a/.DS_Store', 'a/Thumbs.db', 'a/._0.png', 'b/.ipynb_checkpoints/0-checkpoint.png', '.cache/x.png'):
        (data/f).parent.mkdir(exist_ok=True)
        (data/f).write_bytes(b'\0\0')
    return data

def both(*lists) -> Callable: # one command after the other; the last one's exit code
    def run():
        from mstoolkit.cli import main
        for i, o in enumerate(lists):
            code = main([str(a) for a in o])
            if code and i < len(lists)-1: print(f'command {i+1} of {len(lists)} ended with {code}')
        return code
    return run


# -- tables and lists --------------------------------------------------------------------------------------------------

ROWS = [(f'{c}/{i}.png', c) for c in 'ab' for i in range(4)]

def table(d: Path, text: str|bytes, name: str = 't.csv') -> Path:
    data = layout(d, 'a', 'b', n=4)
    (d/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return data

def csv(rows=ROWS, head='path,label', sep=',', end='\n', split=None) -> str:
    cells = [(*r, split[i]) if split else r for i, r in enumerate(rows)]
    return end.join([head.replace(',', sep), *(sep.join(r) for r in cells)])+end

def table_cases():
    g, half = 'tables', ['train', 'train', 'train', 'val']*2
    good = came('ab', [3, 3], 2)
    t = lambda text, *args, name='t.csv': lambda d: train(table(d, text, name), '--csv', d/name, *args)
    for name, text in {
            'commas': csv(split=half, head='path,label,split'), 'semicolons': csv(split=half, head='path,label,split', sep=';'), 'tabs in a .csv': csv(split=half, head='path,label,split', sep='\t'),
            'CRLF': csv(split=half, head='path,label,split', end='\r\n'), 'a byte order mark': '\ufeff'+csv(split=half, head='path,label,split'), 'spaces behind commas': csv(split=half, head='path,label,split', sep=', '),
            'quoted cells': csv([(f'"{p}"', f'"{c}"') for p, c in ROWS], split=half, head='"path","label","split"'), 'more columns': csv([(p, c, 'x') for p, c in ROWS], split=half, head='path,label,note,split'),
            'columns in another order': csv([(c, p) for p, c in ROWS], split=half, head='label,path,split'), 'an empty line at the end': csv(split=half, head='path,label,split')+'\n\n',
            'splits in words of their own': csv(split=['Training', 'TRAIN', 'train', 'Validation']*2, head='path,label,split'), 'val, valid and dev': csv(split=['train']*3+['dev']+['train']*3+['valid'], head='path,label,split'),
            'CR alone': csv(split=half, head='path,label,split', end='\r')}.items():
        add(g, f'{name}: understood', t(text), 0, see=good)
    add(g, 'TSV: understood', t(csv(split=half, head='path,label,split', sep='\t'), name='t.tsv'), 0, see=good)
    add(g, 'capital ending .TSV: understood', t(csv(split=half, head='path,label,split', sep='\t'), name='T.TSV'), 0, see=good)
    add(g, 'test rows are left out', t(csv(split=['train', 'train', 'val', 'test']*2, head='path,label,split')), 0, see=came('ab', [2, 2], 2))
    add(g, 'absolute paths', lambda d: train(table(d, csv([(str(d/'data'/p), c) for p, c in ROWS], split=half, head='path,label,split')), '--csv', d/'t.csv'), 0, see=good)
    add(g, 'paths of backslashes', t(csv([(p.replace('/', '\\'), c) for p, c in ROWS])), (0, 2), r'\\')
    add(g, 'a path with a comma, quoted', lambda d: train(comma(d), '--csv', d/'t.csv'), 0, see=came('ab', None, None))
    def comma(d):
        rows_ = [*ROWS, ('a/x, y.png', 'a')]
        data = table(d, csv([(f'"{p}"', c) for p, c in rows_]))
        pic(data/'a'/'x, y.png')
        return data
    bad = {
        'Path,Label': (csv(head='Path,Label'), "'path'"), 'file,class': (csv(head='file,class'), "'path'.*'label'"), 'image_name,label': (csv(head='image_name,label'), "'path'"), ' path , label ': (csv(head=' path , label '), 'path|label'),
        'no header': ('\n'.join(','.join(r) for r in ROWS), "'path'"), 'two label columns': (csv([(p, c, 'b') for p, c in ROWS], head='path,label,label'), "'label'"), 'two path columns': (csv([(p, p, c) for p, c in ROWS], head='path,path,label'), "'path'"),
        'label and Label': (csv([(p, c, 'b') for p, c in ROWS], head='path,label,Label'), 'Label'), 'an empty label': (csv([*ROWS, ('a/0.png', '')]), 'row 9'), 'an empty path': (csv([*ROWS, ('', 'a')]), 'row 9'),
        'a label of spaces': (csv([*ROWS[:-1], ('b/3.png', '  ')]), 'label'), 'an empty split': (csv(split=['train']*7+[''], head='path,label,split'), 'row 8'), 'an unknown split': (csv(split=['train']*7+['holdout'], head='path,label,split'), 'holdout'),
        'splits 0 and 1': (csv(split=['0']*7+['1'], head='path,label,split'), "'0'"), 'no rows': ('path,label\n', 'row'), 'nothing': ('', 't.csv'), 'zeros': (b'\0'*100, 't.csv|path'), 'Latin-1': (csv([*ROWS, ('a/é.png', 'a')]).encode('latin1'), 'UTF-8'), 'UTF-16': (csv().encode('utf-16'), 'UTF-8'),
        'a file twice': (csv([*ROWS, ROWS[0]]), 'a/0.png'), 'a file of two labels': (csv([*ROWS, ('a/0.png', 'b')]), 'a/0.png'), 'a file in both splits': (csv([*ROWS, ('a/0.png', 'a')], split=[*half, 'val'], head='path,label,split'), 'a/0.png'),
        'a file twice, written otherwise': (csv([*ROWS, ('./a/../a/0.png', 'b')]), 'a/0.png'), 'a file that is not there': (csv([*ROWS, ('a/9.png', 'a')]), 'a/9.png'), 'a folder for a file': (csv([*ROWS, ('a', 'a')]), "data/a'"), 'one class': (csv(ROWS[:4]), "'a'"), 'only val': (csv(split=['val']*8, head='path,label,split'), 'train'),
        'a class in val alone': (csv(split=['train']*4+['val']*4, head='path,label,split'), "'b'|one class"), 'a row of five cells': (csv()+'a/0.png,a,b,c,d\n', 't.csv'), 'an open quote': (csv()+'"a/0.png,a\n', 't.csv'), 'labels a and A': (csv([*ROWS[:4], *((p, 'A') for p, _ in ROWS[4:])]), ''),
        'labels a and a with a space': (csv([*ROWS[:4], *((p, 'a ') for p, _ in ROWS[4:])]), ''), 'NaN labels': (csv([*ROWS[:4], *((p, 'nan') for p, _ in ROWS[4:])]), ''), 'labels 1 and 1.0': (csv([*((p, '1') for p, _ in ROWS[:4]), *((p, '1.0') for p, _ in ROWS[4:])]), '')}
    soft = {'label and Label': (0, 2), 'a file twice': (0, 2), 'labels a and A': 0, 'labels a and a with a space': (0, 2), 'NaN labels': 0, 'labels 1 and 1.0': 0}
    said = {'labels a and A': 'differ by', 'labels a and a with a space': "differ by|'a'"}
    for name, (text, says) in bad.items():
        add(g, f'{name}: {"told" if name in soft else "refused"}', t(text), soft.get(name, 2), said.get(name, says), see=None if name in soft else no_run)
    for name in ('Path,Label', 'two label columns', 'an empty label', 'Latin-1', 'a file of two labels', 'a file that is not there', 'an unknown split', 'one class', 'no rows', 'nothing', 'a file in both splits'):
        add(g, f'{name}: check', lambda d, n=name: ['check', table(d, bad[n][0]), '--csv', d/'t.csv'], (1, 2), bad[name][1] if name != 'one class' else 'class')
    add(g, 'the table is not there', lambda d: train(table(d, ''), '--csv', 'no.csv'), 2, 'no.csv')
    add(g, 'a table of another ending (.xlsx)', t(b'PK\x03\x04'+bytes(99), name='t.xlsx'), 2, 'xlsx')
    add(g, 'parquet that is none', t(b'PAR1', name='t.parquet'), 2, 't.parquet')
    add(g, 'a group column that is not there', t(csv(), '--group', 'patient'), 2, "'patient'")
    add(g, 'an empty group', t(csv([(p, c, '') for p, c in ROWS], head='path,label,patient'), '--group', 'patient'), 2, 'patient')
    add(g, 'one group', t(csv([(p, c, 'x') for p, c in ROWS], head='path,label,patient'), '--group', 'patient'), 2, '(?i)group')
    add(g, 'a group in both splits', t(csv([(p, c, 'x') for p, c in ROWS], split=half, head='path,label,patient,split'), '--group', 'patient'), 2, "'x'")
    add(g, 'fewer groups than a fifth needs: told what to change', t(csv([(p, c, p[2]) for p, c in ROWS], head='path,label,patient'), '--group', 'patient'), (0, 2), 'valid|2 classes')
    def whole_groups(d, o):
        images = {i[-7:] for i in pd.read_csv(d/'run'/'valid_predictions.csv').image}
        return '' if images in ({f'a/{k}.png', f'b/{k}.png'} for k in range(4)) else f'held out: {images}'
    add(g, 'groups stay together', t(csv([(p, c, p[2]) for p, c in ROWS], head='path,label,patient'), '--group', 'patient', '--folds', '4'), 0, see=whole_groups)
    add(g, '--csv with val/ asked for', t(csv(), '--valid', 'val2'), 2, 'val2')
    add(g, 'more folds than images', t(csv(), '--folds', '9'), 2, '9 folds')
    add(g, 'a fold that is not there', t(csv(), '--folds', '3', '--fold', '3'), 2, 'fold 3')
    add(g, 'labels of a formula', t(csv([*ROWS[:4], *((p, '=1+1') for p, _ in ROWS[4:])])), 0, see=came(['=1+1', 'a']))

    def frame(make, see='', code=0, says=''):
        def do(d):
            data = layout(d, 'a', 'b', n=4)
            def run():
                from mstoolkit.cli import _answer
                from mstoolkit.data.core import image_dls
                try: dls = image_dls(data, csv=make(), size=32, bs=4, num_workers=0, device='cpu')
                except Exception as e:
                    import traceback
                    if not isinstance(e, (ValueError, OSError)): traceback.print_exc()
                    return _answer(e, None)
                print(list(dls.vocab), len(dls.train_ds), len(dls.valid_ds))
                return 0
            return run
        return do
    df = lambda **kw: pd.DataFrame({'path': [p for p, _ in ROWS], 'label': [c for _, c in ROWS], **kw})
    frames = {
        'plain': (lambda: df(), 0, r"\['a', 'b'\] 6 2"), 'with an index of its own': (lambda: df().set_index(pd.Index(range(10, 18))), 0, r"\['a', 'b'\] 6 2"), 'shuffled': (lambda: df().sample(frac=1, random_state=0), 0, r"\['a', 'b'\] 6 2"),
        'categories': (lambda: df().astype({'label': 'category'}), 0, r"\['a', 'b'\]"), 'numbers as labels': (lambda: df(label=[0]*4+[1]*4), 0, r"\['0', '1'\]"), 'floats as labels': (lambda: df(label=[0.]*4+[1.]*4), (0, 2), r"\['0', '1'\]|0\.0"),
        'bools as labels': (lambda: df(label=[True]*4+[False]*4), 0, r"\['False', 'True'\]"), 'None as label': (lambda: df(label=['a']*7+[None]), 2, 'row 8'), 'NaN as label': (lambda: df(label=['a']*7+[np.nan]), 2, 'row 8'), "'' as label": (lambda: df(label=['a']*7+['']), 2, 'label'),
        'Path objects': (lambda: df(path=[Path(p) for p, _ in ROWS]), 0, r"\['a', 'b'\]"), 'a split column of categories': (lambda: df(split=pd.Categorical(['train', 'val']*4)), 0, r"4 4"), 'a split of NaN': (lambda: df(split=['train']*7+[np.nan]), 2, 'row 8'), "a split of ''": (lambda: df(split=['train']*7+['']), 2, "split"),
        'no rows': (lambda: df().iloc[:0], 2, 'row'), 'two label columns': (lambda: pd.concat([df(), df()[['label']]], axis=1), 2, "label"), 'columns of two levels': (lambda: pd.concat({'x': df()}, axis=1), 2, 'path'), 'numbers as columns': (lambda: df().set_axis([0, 1], axis=1), 2, 'path'),
        'lists as labels': (lambda: df(label=[['a']]*4+[['b']]*4), 2, 'label'), 'labels with spaces around': (lambda: df(label=['a ']*4+[' b']*4), (0, 2), 'a'), 'bytes as labels': (lambda: df(label=[b'a']*4+[b'b']*4), (0, 2), 'a')}
    for name, (make, code, says) in frames.items(): add('frames', f'a DataFrame, {name}', frame(make), code, says)

def list_cases():
    g, half = 'lists', [*ROWS[:3], *ROWS[4:7]]
    def lists(d, tr, va=None, name='train.txt'):
        data = layout(d, 'a', 'b', n=4)
        enc = lambda o: o if isinstance(o, bytes) else o.encode()
        (data/name).write_bytes(enc(tr))
        if va is not None: (data/'val.txt').write_bytes(enc(va))
        return data
    lines = lambda rows_, sep=' ', end='\n': ''.join(f'{p}{sep}{c}{end}' for p, c in rows_)
    va = [ROWS[3], ROWS[7]]
    good = came('ab', [3, 3], 2)
    t = lambda tr, v=None, *args: lambda d: train(lists(d, tr, v), '--train', 'train.txt', *args)
    for name, kw in {'a space': dict(sep=' '), 'two spaces': dict(sep='  '), 'a tab': dict(sep='\t'), 'a comma': dict(sep=','), 'a comma and a space': dict(sep=', '), 'CRLF': dict(end='\r\n'), 'blanks at the end': dict(end='  \n'), 'an empty line between': dict(end='\n\n')}.items():
        add(g, f'{name}: understood', t(lines(half, **kw), lines(va, **kw)), 0, see=good)
    add(g, 'a semicolon: understood or refused', t(lines(half, ';'), lines(va, ';')), (0, 2), 'line 1|2 classes')
    add(g, 'a byte order mark: understood', t('\ufeff'+lines(half), lines(va)), 0, see=good)
    add(g, 'comments: understood', t('# path label\n'+lines(half), lines(va)), 0, see=good)
    add(g, 'a third column: understood', t(lines([(p, c+',x') for p, c in half], ','), lines(va)), 0, see=good)
    add(g, 'quoted paths: understood', t(lines([(f'"{p}"', c) for p, c in half], ','), lines(va)), 0, see=good)
    add(g, 'no end of line at the end: understood', t(lines(half).rstrip(), lines(va).rstrip()), 0, see=good)
    for odd in ('x, y.png', 'x y.png', 'x; y.png', "it's.png", 'x\ty.png', 'x,y z.png', '#x.png', 'é.png', 'e\u0301.png'):
        for sep in (' ', ',', '\t'):
            def do(d, odd=odd, sep=sep):
                data = lists(d, lines(half, sep)+f'a/{odd}{sep}b\n', lines(va, sep))
                pic(data/'a'/odd)
                return train(data, '--train', 'train.txt')
            amb = odd == 'x\ty.png' and sep == '\t'
            add(g, f'`a/{shown(odd)}` before {dict(zip(" ,"+chr(9), ("a space", "a comma", "a tab")))[sep]}: labelled b', do, (0, 2) if amb else 0, see=None if amb else came('ab', [3, 4], 2))
    def named(d, where):
        data = lists(d, lines(half), lines(va))
        (d/'named').mkdir(); shutil.move(data/'train.txt', d/where); shutil.move(data/'val.txt', d/'v.txt')
        return train(data, '--train', d/where, '--valid', d/'v.txt')
    add(g, 'lists elsewhere', lambda d: named(d, 'tr.txt'), 0, see=good)
    def labelled(d, label):
        data = lists(d, ''.join(f'{p} {label}\n' for p, _ in ROWS[:4])+lines(ROWS[4:]))
        return train(data, '--train', 'train.txt', '--valid', 'none')
    add(g, 'a label of two words behind a comma', t(lines([(p, 'red '+c) for p, c in half], ', '), lines([(p, 'red '+c) for p, c in va], ', ')), 0, see=came(['red a', 'red b'], [3, 3], 2))
    bad = {'a line without a label': (lines(half)+'a/3.png\n', None, 'line 7'), 'a file that is not there': (lines(half)+'a/9.png a\n', lines(va), 'a/9.png'), 'nothing': ('', lines(va), 'train.txt'), 'only comments': ('# x\n', lines(va), 'train.txt'), 'zeros': (b'\0\0\0', lines(va), '.'),
           'Latin-1': ((lines(half)+'a/\xe9.png a\n').encode('latin1'), lines(va), 'UTF-8'), 'two labels': (lines([*half, ('a/0.png', 'b')]), lines(va), 'a/0.png'), 'an image in both': (lines([*half, va[0]]), lines(va), 'a/3.png'), 'a label of val alone': (lines(half), lines([*va[:1], (va[1][0], 'c')]), "'c'"), 'one label': (lines(ROWS[:3]), None, "'a'"),
           'label before path': (lines([(c, p) for p, c in half]), lines([(c, p) for p, c in va]), "'?a'?")}
    for name, (tr, v, says) in bad.items(): add(g, f'{name}: refused', t(tr, v), 2, says, see=no_run)
    add(g, 'no val.txt: training images are held out', t(lines(half), None), 0, see=came('ab', [2, 2], 2))
    add(g, '--train not there', lambda d: train(lists(d, lines(half)), '--train', 'tr.txt'), 2, 'tr.txt')
    for v in ('valid.txt', 'Val.txt', 'dev.txt', 'validation.txt'):
        def do(d, v=v): data = lists(d, lines(half), lines(va)); (data/'val.txt').rename(data/v); return train(data, '--train', 'train.txt')
        add(g, f'the other list is called {v}', do, 0, see=good)
    add(g, 'two lists of validation', lambda d: (lambda o: ((o/'valid.txt').write_text(lines(va[:1])), train(o, '--train', 'train.txt'))[1])(lists(d, lines(half), lines(va))), (0, 2), 'valid.txt|val.txt')
    add(g, 'check of lists', lambda d: ['check', lists(d, lines(half), lines(va)), '--train', 'train.txt', '--json'], 0, see=counted_in('train', {'a': 3, 'b': 3}))
    add(g, 'check of a list with a file that is not there', lambda d: ['check', lists(d, lines(half)+'a/9.png a\n', lines(va)), '--train', 'train.txt'], 1, 'a/9.png')

def class_list_cases():
    g = 'class lists'
    num = lambda first: csv([(p, str('ab'.index(c)+first)) for p, c in ROWS], split=['train', 'train', 'train', 'val']*2, head='path,label,split')
    def do(labels, classes, name='c.txt', command='train'):
        def make(d):
            data = table(d, labels)
            (d/name).write_bytes(classes if isinstance(classes, bytes) else classes.encode())
            return train(data, '--csv', d/'t.csv', '--classes', d/name) if command == 'train' else ['check', data, '--csv', d/'t.csv', '--classes', d/name]
        return make
    names = csv(split=['train', 'train', 'train', 'val']*2, head='path,label,split')
    is_ = lambda *c: came(c, [3, 3], 2, {'a/3.png': c[0], 'b/3.png': c[1]})
    add(g, 'numbers from 0', do(num(0), 'ant\nbee\n'), 0, see=is_('ant', 'bee'))
    add(g, 'numbers from 1, two names', do(num(1), 'ant\nbee\n'), 2, '(?i)label|number')
    add(g, 'numbers from 1, three names', do(num(1), 'ant\nbee\ncow\n'), 2, 'from 1')
    add(g, 'numbers from 1, three names: check', do(num(1), 'ant\nbee\ncow\n', command='check'), 1, 'from 1')
    add(g, 'numbers from 1 that the list says', do(num(1), 'name,number\nant,1\nbee,2\n', 'c.csv'), 0, see=is_('ant', 'bee'))
    add(g, 'numbers from 10 that the list says', do(num(10), 'name,number\nbee,11\nant,10\n', 'c.csv'), 0, see=is_('ant', 'bee'))
    add(g, 'the number before the name', do(num(1), 'number,name\n1,ant\n2,bee\n', 'c.csv'), (0, 2), see=lambda d, o: is_('ant', 'bee')(d, o) if o.code == 0 else '')
    add(g, 'lines of number and name in a text', do(num(1), '1 ant\n2 bee\n'), 2, '.')
    add(g, 'lines of number and name from 0 in a text', do(num(0), '0 ant\n1 bee\n'), (0, 2), see=lambda d, o: '' if o.code else is_('0 ant', '1 bee')(d, o) and is_('ant', 'bee')(d, o))
    add(g, 'a CSV without a header', do(num(0), 'ant,0\nbee,1\n', 'c.csv'), 2, '.')
    add(g, 'semicolons', do(num(0), 'name;number\nant;0\nbee;1\n', 'c.csv'), (0, 2), see=lambda d, o: '' if o.code else is_('ant', 'bee')(d, o))
    add(g, 'a TSV', do(num(0), 'name\tnumber\nant\t0\nbee\t1\n', 'c.tsv'), (0, 2), see=lambda d, o: '' if o.code else is_('ant', 'bee')(d, o))
    add(g, 'a number twice', do(num(0), 'name,number\nant,0\nbee,0\n', 'c.csv'), 2, 'number 0')
    add(g, 'a gap in the numbers', do(num(0), 'name,number\nant,0\nbee,5\n', 'c.csv'), 2, 'label 1')
    add(g, 'labels 01 and 02', do(csv([(p, f"0{'ab'.index(c)+1}") for p, c in ROWS]), 'ant\nbee\ncow\n'), 2, 'from 1')
    add(g, 'labels of names, another order', do(names, 'b\na\n'), 0, see=came('ba', [3, 3], 2))
    add(g, 'a name too many: train says so', do(names, 'a\nb\nc\n'), 0, "'c'", see=came('abc', [3, 3, 0], 2))
    add(g, 'a name too many: check says so', do(names, 'a\nb\nc\n', command='check'), 0, "'c'")
    add(g, 'a name too few', do(names, 'a\n'), 2, "'b'")
    add(g, 'a name twice', do(names, 'a\nb\na\n'), 2, "'a'")
    add(g, 'names in another case', do(names, 'A\nB\n'), 2, "'a'")
    add(g, 'blanks and CRLF', do(names, 'a  \r\nb\r\n\r\n'), 0, see=came('ab', [3, 3], 2))
    add(g, 'a byte order mark', do(names, '\ufeffa\nb\n'), 0, see=came('ab', [3, 3], 2))
    add(g, 'nothing in it', do(names, ''), 2, 'c.txt')
    add(g, 'blank lines alone', do(names, '\n\n'), 2, 'c.txt')
    add(g, 'nothing in a CSV', do(names, '', 'c.csv'), 2, 'c.csv')
    add(g, 'Latin-1', do(names, 'a\nb\n\xe9\n'.encode('latin1')), 2, 'UTF-8')
    add(g, 'not there', lambda d: train(layout(d, 'a', 'b'), '--classes', 'no.txt'), 2, 'no.txt')
    add(g, 'names as words instead of a file', lambda d: train(layout(d, 'a', 'b'), '--classes', 'a,b'), 2, 'a,b')
    add(g, 'folders 1 and 2, three names', lambda d: (layout(d, '1', '2'), (d/'c.txt').write_text('ant\nbee\ncow\n'), train(d/'data', '--classes', d/'c.txt'))[-1], 2, 'from 1')
    add(g, 'folders 0 and 1, three names', lambda d: (layout(d, '0', '1'), (d/'c.txt').write_text('ant\nbee\ncow\n'), train(d/'data', '--classes', d/'c.txt'))[-1], 0, "'cow'", see=came(['ant', 'bee', 'cow']))


# -- models ------------------------------------------------------------------------------------------------------------

def prepare(folder: Path):
    "What many cases start from: data, a finished run, a stopped one, a study."
    from fastai.callback.core import Callback
    from mstoolkit.cli import main
    from mstoolkit.recipe import Recipe
    from mstoolkit.train import train as fit
    data = layout(folder, 'train/a', 'train/b', 'train/c', 'val/a', 'val/b', 'val/c')
    pics(folder/'images', 3)
    if main(['train', str(data), '--out', str(folder/'run'), *TINY]): raise SystemExit('no run to begin with')
    class Stop(Callback):
        order = 1000
        def before_epoch(self):
            if self.epoch == 2: raise KeyboardInterrupt
    r = Recipe(backbone='test_resnet', pretrained=False, size=32, epochs=4, bs=8, num_workers=0, augment='none', device='cpu', memory_format='contiguous')
    try: fit(r, data, folder/'stopped', cbs=[Stop()])
    except KeyboardInterrupt: pass
    (folder/'heads.toml').write_text('[cells.plain]\nhead = "plain"\n[cells.gated]\nhead = "gated"\n')
    if main(['ablate', str(data), '--study', str(folder/'heads.toml'), '--out', str(folder/'study'), '--seeds', '2', '--threads', '1', *TINY]): raise SystemExit('no study')

def model_cases():
    g = 'models'
    def spoil(change=None, tensors=None, metadata=None):
        "A model file whose header or tensors are changed, and `predict` on it."
        def do(d):
            from safetensors import safe_open
            from safetensors.torch import save_file
            with safe_open(READY/'run'/'model.safetensors', 'pt') as f:
                state, head = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()['mstoolkit'])
            if change: head = change(head) or head
            if tensors: state = tensors(state) or state
            save_file(state, d/'m.safetensors', metadata=metadata(head) if metadata else {'mstoolkit': json.dumps(head)})
            return ['predict', d/'m.safetensors', READY/'images', '--out', d/'p.csv', '--device', 'cpu']
        return do
    no_csv = lambda d, o: 'a CSV is written' if (d/'p.csv').exists() else ''
    def put(*keys_value):
        *keys, v = keys_value
        def f(h):
            o = h
            for k in keys[:-1]: o = o[k]
            o[keys[-1]] = v
        return f
    def drop(*keys):
        def f(h):
            o = h
            for k in keys[:-1]: o = o[k]
            del o[keys[-1]]
        return f
    headers = {
        **{f'size {v}': (put('size', v), 'size') for v in (0, -1, 7, 40000, 10**9, 32.5, '32', None, True, [32])}, **{f'std {v}': (put('std', v), 'std') for v in ([0, 0, 0], [.1, .1], [float('nan')]*3, [-1, 1, 1], 'abc', None, [[1], [1], [1]], [1e-320]*3, [1e300]*3, [True, True, True])},
        **{f'mean {v}': (put('mean', v), 'mean') for v in ([float('nan')]*3, [float('inf'), 0, 0], [1e300]*3, ['0', '0', '0'], [])}, 'backbone None': (put('config', 'backbone', None), 'backbone'), 'a backbone that is none': (put('config', 'backbone', 'resnet9999'), 'resnet9999'), 'a backbone from the hub': (put('config', 'backbone', 'hf-hub:timm/resnet18'), 'hf-hub'),
        'a backbone from a folder': (put('config', 'backbone', 'local-dir:/tmp'), 'local-dir'), 'another backbone': (put('config', 'backbone', 'resnet18'), 'resnet18'), 'a giant backbone': (put('config', 'backbone', 'vit_giant_patch14_224'), 'vit_giant|fit'), 'a giant convolutional backbone': (put('config', 'backbone', 'convnext_xxlarge'), 'convnext_xxlarge|fit'), 'head None': (put('config', 'head', None), 'head'), 'another head': (put('config', 'head', 'plain'), 'fit'), 'a head that is none': (put('config', 'head', 'x'), "'x'"),
        'no head': (drop('config', 'head'), 'head'), 'an option more': (put('config', 'evil', 1), 'evil'), 'weights_file': (put('config', 'weights_file', '/etc/passwd'), 'weights_file'), 'pretrained': (put('config', 'pretrained', True), 'pretrained'), 'n_stages 99': (put('config', 'n_stages', 99), '99|stages'), 'n_stages -1': (put('config', 'n_stages', -1), 'stages'), 'in_chans 1': (put('config', 'in_chans', 1), 'mean|fit'), 'in_chans 10**9': (put('config', 'in_chans', 10**9), 'mean'),
        'n_out 10**9': (put('config', 'n_out', 10**9), '3 classes'), 'n_out 2': (put('config', 'n_out', 2), '3 classes'), "n_out '3'": (put('config', 'n_out', '3'), 'classes|outputs'), 'n_out 3.0': (put('config', 'n_out', 3.0), 'n_out|outputs|made'), 'img_size a text': (put('config', 'img_size', 'x'), 'img_size|made'), 'no classes': (drop('classes'), 'classes'), 'classes None': (put('classes', None), 'classes'), 'classes nested': (put('classes', [['a'], 'b', 'c']), 'class'), 'classes of numbers': (put('classes', [0, 1, 2]), 'class'),
        'a class twice': (put('classes', ['a', 'a', 'b']), "'a' twice"), 'classes of a text': (put('classes', 'abc'), 'classes'), 'a class without a name': (put('classes', ['', 'a', 'b']), "''|class"), 'a class too many': (put('classes', list('abcd')), '4 classes'), 'no config': (drop('config'), 'config'), 'config a list': (put('config', [1]), 'config'), 'a field more': (put('evil', 1), 'evil'), 'format 99': (put('format', 99), 'update'),
        'format a text': (put('format', '1'), 'format|damaged'), 'format 0': (put('format', 0), 'format'), 'format None': (put('format', None), 'damaged|format'), 'metrics a list': (put('metrics', []), 'metrics'), 'a header that is a list': (lambda h: [1, 2], 'damaged'), 'a header that is a number': (lambda h: 5, 'damaged')}
    for name, (change, says) in headers.items(): add(g, f'{name}: refused', spoil(change), 2, f'm.safetensors.*({says})|({says}).*m.safetensors', see=no_csv, limit=30)
    def some(v, n=1):
        def f(s):
            k = next(k for k, o in s.items() if o.is_floating_point() and o.ndim > 1)
            s[k].view(-1)[:n] = v
        return f
    def bigger(s): k = next(iter(s)); s[k] = s[k].repeat(2, *[1]*(s[k].ndim-1))
    def less(s): del s[list(s)[-1]]
    def half(s): return {k: o.half() if o.is_floating_point() else o for k, o in s.items()}
    for name, f, code in (('a NaN among the weights', some(float('nan')), 2), ('an infinite weight', some(float('inf')), 2), ('a weight of 1e38', some(1e38, 500), (0, 2)), ('a tensor of another shape', bigger, 2), ('a tensor that is not there', less, 2), ('half precision', half, (0, 2))):
        add(g, f'{name}: {"refused" if code == 2 else "read or refused"}', spoil(tensors=f), code, 'm.safetensors|number' if code == 2 else '', see=no_csv if code == 2 else
            lambda d, o: 'labels without a number behind them' if o.code == 0 and pd.read_csv(d/'p.csv').pred_label.isna().any() else '')
    def negative(s):
        k = next(k for k in s if k.endswith('running_var'))
        s[k] = -s[k]-1
    add(g, 'a variance below 0: refused', spoil(tensors=negative), 2, 'number|finite|damaged', see=no_csv)
    add(g, 'no header of ours: refused', spoil(metadata=lambda h: {'format': 'pt'}), 2, 'header', see=no_csv)
    add(g, 'a header that is no JSON: refused', spoil(metadata=lambda h: {'mstoolkit': '{'}), 2, 'damaged', see=no_csv)
    add(g, 'a header of 100,000 brackets: refused', spoil(metadata=lambda h: {'mstoolkit': '['*100_000}), 2, 'damaged', see=no_csv)
    add(g, 'a sound file: read', spoil(), 0, see=lambda d, o: '' if len(pd.read_csv(d/'p.csv')) == 3 else 'other rows')
    raw = {'nothing': b'', 'eight zeros': bytes(8), 'a length of 2**63': struct.pack('<Q', 2**63)+b'{}', 'a length beyond the file': struct.pack('<Q', 10**6)+b'{}', 'a page': b'<!doctype html>', 'an LFS pointer': b'version https://git-lfs.github.com/spec/v1\n', 'a zip': b'PK\x03\x04'}
    for name, data in raw.items():
        for end in ('.safetensors', '.pt', '.pth', '.bin'):
            if end == '.safetensors' or name in ('nothing', 'a zip'):
                add(g, f'{name} as m{end}: refused', lambda d, data=data, end=end: ((d/f'm{end}').write_bytes(data), ['predict', d/f'm{end}', READY/'images', '--out', d/'p.csv'])[1], 2, f'm{end}', see=no_csv)
    def cut(d):
        data = (READY/'run'/'model.safetensors').read_bytes()
        (d/'m.safetensors').write_bytes(data[:len(data)//2])
        return ['predict', d/'m.safetensors', READY/'images', '--out', d/'p.csv']
    add(g, 'cut in half: refused', cut, 2, 'm.safetensors', see=no_csv)
    def evil(d):
        import pickle
        class Evil:
            def __reduce__(self): return os.system, (f'touch {d}/pwned',)
        (d/'m.pt').write_bytes(pickle.dumps(Evil()))
        return ['predict', d/'m.pt', READY/'images', '--out', d/'p.csv']
    add(g, 'a pickle that runs a program: refused', evil, 2, 'm.pt', see=lambda d, o: 'it ran' if (d/'pwned').exists() else no_csv(d, o))
    add(g, 'a folder that is no run', lambda d: ['predict', d, READY/'images', '--out', d/'p.csv'], 2, 'model', see=no_csv)
    add(g, 'a run that is stopped: its best model so far', lambda d: ['predict', READY/'stopped', READY/'images', '--out', d/'p.csv'], 0)


# -- run folders -------------------------------------------------------------------------------------------------------

def run_cases():
    g = 'run folders'
    def edited(what: str, file: str, change, *args, data=False):
        "A copy of a prepared folder with one file changed; `{}` among the arguments stands for it."
        def do(d):
            shutil.copytree(READY/what, d/what)
            f = d/what/file if file else None
            if f is not None:
                if change is None: f.unlink()
                elif callable(change):
                    text = change(f.read_text())
                    f.write_bytes(text if isinstance(text, bytes) else text.encode())
                else: f.write_bytes(change if isinstance(change, bytes) else change.encode())
            return [str(o).replace('{}', str(d/what)).replace('{d}', str(d)) for o in args]
        return do
    def js(**kw):
        def f(text):
            o = json.loads(text)
            for k, v in kw.items():
                at = o
                *path, last = k.split('__')
                for p in path: at = at[p]
                if v is ...: at.pop(last, None)
                else: at[last] = v
            return json.dumps(o)
        return f
    rep, res = ['report', '{}', '--out', '{d}/r.html'], ['train', '--resume', '{}']
    env = {'{}': '{}', '[]': '[]', 'null': 'null', '5': '5', 'nothing': '', 'a cut file': lambda t: t[:len(t)//2], 'Latin-1': '{"a": "é"}'.encode('latin1'), 'zeros': bytes(50), 'data None': js(data=None), 'data a text': js(data='x'), 'no data': js(data=...), 'versions a list': js(versions=[1]), 'seconds a text': js(seconds='x'), 'seconds None': js(seconds=None),
           'seconds NaN': js(seconds=float('nan')), 'train_per_class a text': js(data__train_per_class='x'), 'train_per_class nothing': js(data__train_per_class=[]), 'train None': js(data__train=None), 'classes a list': js(data__classes=[1]), 'warnings a number': js(data__warnings=5), 'platform a list': js(platform=[1]), 'started a number': js(started=5), 'processors a dict': js(processors={}), 'command a text': js(command='rm')}
    for name, change in env.items():
        ok = (0, 2)
        says = lambda d, o: '' if o.code == 0 or 'environment.json' in o.err else f'the file is not named: {o.err.strip()[-200:]}'
        add(g, f'environment.json, {name}: report', edited('run', 'environment.json', change, *rep), ok, see=says)
        if name not in ('seconds a text', 'seconds None', 'seconds NaN', 'classes a list', 'started a number', 'command a text', 'warnings a number', 'platform a list'):
            add(g, f'environment.json, {name}: --resume', edited('stopped', 'environment.json', change, *res), ok, see=says)
    for name, change in {'versions of numbers': js(versions={'torch': 5}), 'resumed a text': js(resumed='x'), 'a digest of another kind': js(data__digest=5), 'contents gone': js(data__contents=...), 'contents other': js(data__contents='x'), 'processors other': js(processors=99), 'epochs 0': js(epochs=0), 'epochs a text': js(epochs='many')}.items():
        add(g, f'environment.json, {name}: --resume', edited('stopped', 'environment.json', change, *res), (0, 2))
    hist = {'nothing': '', 'a header alone': lambda t: t.split('\n')[0]+'\n', 'other columns': 'a,b\n1,2\n', 'text for a number': lambda t: t.replace('\n0,', '\nzero,', 1), 'a row too long': lambda t: t+'1,2,3,4,5,6,7,8,9,10,11,12,13\n', 'semicolons': lambda t: t.replace(',', ';'), 'CRLF': lambda t: t.replace('\n', '\r\n'), 'zeros': bytes(50), 'Latin-1': 'epoch,é\n'.encode('latin1'), 'a loss of NaN': lambda t: re.sub(r'\d+\.\d+', 'nan', t, count=1), 'a loss of inf': lambda t: re.sub(r'\d+\.\d+', 'inf', t, count=1), 'no accuracy': lambda t: t.replace('accuracy', 'accurate')}
    for name, change in hist.items(): add(g, f'history.csv, {name}: report', edited('run', 'history.csv', change, *rep), (0, 2), see=lambda d, o: '' if o.code == 0 or 'history.csv' in o.err else f'the file is not named: {o.err.strip()[-200:]}')
    preds = {'nothing': '', 'a header alone': lambda t: t.split('\n')[0]+'\n', 'other columns': 'a,b\n1,2\n', 'a confidence of text': lambda t: re.sub(r'0\.\d+', 'x', t, count=1), 'a confidence of 7': lambda t: re.sub(r'0\.\d+', '7', t, count=1), 'a confidence of nan': lambda t: re.sub(r'0\.\d+', 'nan', t, count=1), 'an empty label': lambda t: re.sub(r',a,', ',,', t, count=1), 'a row twice': lambda t: t+t.strip().split('\n')[-1]+'\n', 'a row too long': lambda t: t+'1,2,3,4,5,6,7,8\n', 'a cut row': lambda t: t.strip().rpartition(',')[0]+'\n', 'zeros': bytes(50), 'semicolons': lambda t: t.replace(',', ';'), 'a class more': lambda t: t.replace(',a,', ',new,', 1)}
    for name, change in preds.items():
        add(g, f'valid_predictions.csv, {name}: report', edited('run', 'valid_predictions.csv', change, *rep), (0, 2), see=lambda d, o: '' if o.code == 0 or 'valid_predictions.csv' in o.err else f'the file is not named: {o.err.strip()[-200:]}')
    for name in ('nothing', 'other columns', 'a row twice', 'a confidence of text', 'a confidence of 7'):
        if name in ('nothing', 'other columns', 'a confidence of text'): add(g, f'valid_predictions.csv, {name}: refused', edited('run', 'valid_predictions.csv', preds[name], *rep), 2, 'valid_predictions.csv')
    toml = {'nothing': ('', (0, 2)), 'a cut file': (lambda t: t[:len(t)//2]+'\n"', 2), 'another type': (lambda t: t.replace('epochs = 4', 'epochs = "four"').replace('epochs = 1 ', 'epochs = "one" '), 2), 'a field more': (lambda t: t+'\nevil = 1\n', 2), 'Latin-1': ('name = "é"'.encode('latin1'), 2), 'zeros': (bytes(9), 2), 'lr = nan': (lambda t: re.sub(r'(?m)^lr = \S+', 'lr = nan', t), 2), 'lr = inf': (lambda t: re.sub(r'(?m)^lr = \S+', 'lr = inf', t), 2), 'size = 10**12': (lambda t: re.sub(r'(?m)^size = \S+', 'size = 1000000000000', t), 2), 'bs = 10**12': (lambda t: re.sub(r'(?m)^bs = \S+', 'bs = 1000000000000', t), (0, 2))}
    for name, (change, code) in toml.items():
        add(g, f'recipe.toml, {name}: --resume', edited('stopped', 'recipe.toml', change, *res), code, 'recipe.toml' if code == 2 and 'size' not in name else '')
        add(g, f'recipe.toml, {name}: train --recipe', edited('run', 'recipe.toml', change, 'train', READY_, '--recipe', '{}/recipe.toml', '--out', '{d}/run2', *[o for o in TINY if o not in ('--size', '32', '--bs', '8')], *(['--size', '32'] if 'size' not in name else []), '--bs', '8'), code if code == 2 else (0, 2), 'recipe.toml' if code == 2 and 'size' not in name else '')
    for bad in ('../../x', '/srv/x', 'a/b', '..', '.', '', ' ', 'a\\\\b', 'C:x', 'a\\nb', 'a\\u0000b', 'x'*300, '~', '-x'):
        def do(d, bad=bad):
            (d/'r.toml').write_text(f'name = "{bad}"\n')
            return ['train', READY/'data', '--recipe', d/'r.toml', *TINY]
        ok = bad in ('~', '-x')
        add(g, f'a recipe called `{bad[:20]}`', do, 0 if ok else 2, '' if ok else 'name', see=lambda d, o: '' if all(p.is_relative_to(d) for p in d.rglob('*')) and not (d.parent/'x').exists() and not (d.parent.parent/'x').exists() else 'written outside')
    for cell in ('../x', 'a/b', '.x', '', 'con\\n'):
        def do(d, cell=cell):
            (d/'s.toml').write_text(f'[cells.plain]\nhead = "plain"\n[cells."{cell}"]\nhead = "gated"\n')
            return ['ablate', READY/'data', '--study', d/'s.toml', '--out', d/'st', '--seeds', '1', *TINY]
        add(g, f'a cell called `{cell}`', do, 2, 'cell', see=lambda d, o: 'a folder is left' if (d/'st').exists() else '')
    ab = ['ablate', READY_, '--study', READY_S, '--out', '{}', '--seeds', '2', '--threads', '1', *TINY]
    for name, change in {'nothing': '', '{}': '{}', '[]': '[]', 'cells a list': js(cells=[1]), 'cells None': js(cells=None), 'base a number': js(base=5), 'no base': js(base=...), 'a base that is no TOML': js(base='['), 'a cell more': js(cells__new={}), 'a cell gone': js(cells__plain=...), 'a cut file': lambda t: t[:40]}.items():
        add(g, f'study.json, {name}: ablate again', edited('study', 'study.json', change, *ab), 2, 'study', limit=90)
        add(g, f'study.json, {name}: report', edited('study', 'study.json', change, *rep), (0, 2), limit=90)
    for name, file in (('failures.json', 'failures.json'), ('images.csv', 'images.csv'), ('images.toml', 'images.toml'), ('data.toml', 'data.toml')):
        for how, change in (('nothing', ''), ('zeros', bytes(20)), ('gone', None)):
            add(g, f'{name} of a study, {how}: ablate again', edited('study', file, change, *ab), (0, 2), see=lambda d, o, f=file: '' if o.code == 0 or f in o.err or 'study' in o.err else f'not named: {o.err.strip()[-200:]}', limit=90)
    add(g, 'failures.json is a list: report', edited('study', 'failures.json', '[1]', *ab), (0, 2), limit=90)
    add(g, 'a study as it is: ablate again does nothing', edited('study', '', None, *ab), 0, never=r'1/\d', limit=90)
    add(g, 'a study on other data', lambda d: (shutil.copytree(READY/'study', d/'study'), layout(d, 'a', 'b'), ['ablate', d/'data', '--study', READY/'heads.toml', '--out', d/'study', '--seeds', '3', '--threads', '1', *TINY])[-1], 2, 'other data', limit=90)
    def repainted(d):
        shutil.copytree(READY/'study', d/'study')
        shutil.copytree(READY/'data', d/'data')
        for f in (d/'study').rglob('*'):
            if f.suffix in ('.toml', '.csv'): f.write_text(f.read_text().replace(str(READY/'data'), str(d/'data')).replace(str(READY/'study'), str(d/'study')))
        pic(d/'data'/'train'/'a'/'0.png', (1, 2, 3))
        return ['ablate', d/'data', '--study', READY/'heads.toml', '--out', d/'study', '--seeds', '3', '--threads', '1', *TINY]
    add(g, 'a study on other pixels under the same names', repainted, 2, 'chang', limit=90)
    for name, change in (('nothing', b''), ('zeros', bytes(99)), ('a page', b'<html>')):
        add(g, f'state.pt, {name}: --resume', lambda d, c=change: (shutil.copytree(READY/'stopped', d/'stopped'), (d/'stopped'/'checkpoint'/'state.pt').write_bytes(c), ['train', '--resume', d/'stopped'])[-1], 2, 'state.pt')
    def moved(change):
        def do(d):
            shutil.copytree(READY/'stopped', d/'stopped')
            shutil.copytree(READY/'data', d/'data')
            change(d/'data')
            return ['train', '--resume', d/'stopped', d/'data']
        return do
    add(g, '--resume with the data elsewhere', moved(lambda o: None), 0, see=lambda d, o: '' if (d/'stopped'/'valid_predictions.csv').exists() else 'not finished')
    add(g, '--resume with other pixels', moved(lambda o: pic(o/'train'/'a'/'0.png', (1, 2, 3))), 2, 'changed')
    def one_byte(o):
        "Another pixel in a large file of the same length and time."
        f = o/'train'/'a'/'0.png'
        data, t = bytearray(f.read_bytes()), f.stat().st_mtime_ns
        data[len(data)//2] ^= 1
        f.write_bytes(data)
        os.utime(f, ns=(t, t))
    for name, change in {'an image more': lambda o: pic(o/'train'/'a'/'new.png'), 'an image less': lambda o: (o/'train'/'a'/'0.png').unlink(), 'an image under another label': lambda o: (o/'train'/'a'/'0.png').rename(o/'train'/'b'/'x.png'), 'two images swapped': lambda o: ((o/'train'/'a'/'0.png').rename(o/'t'), (o/'train'/'b'/'0.png').rename(o/'train'/'a'/'0.png'), (o/'t').rename(o/'train'/'b'/'0.png')), 'a class renamed': lambda o: ((o/'train'/'a').rename(o/'train'/'z'), (o/'val'/'a').rename(o/'val'/'z')), 'other validation pixels': lambda o: pic(o/'val'/'a'/'0.png', (9, 9, 9)), 'one byte of a file, its time as it was': one_byte, 'a damaged image': lambda o: (o/'train'/'a'/'0.png').write_bytes(b'\x89PNG')}.items():
        add(g, f'--resume with {name}', moved(change), 2, 'chang|0.png')
    add(g, '--resume with touched files', moved(lambda o: [os.utime(f, (1, 1)) for f in o.rglob('*.png')]), 0)
    add(g, '--resume of a finished run', edited('run', '', None, *res), 2, 'ended well')
    add(g, '--resume of no run', lambda d: ['train', '--resume', d], 2, 'not a run folder')
    for file in ('recipe.toml', 'environment.json', 'data.toml', 'history.csv', 'model.safetensors'):
        add(g, f'--resume without {file}', edited('stopped', file, None, *res), (0, 2), see=lambda d, o, f=file: '' if o.code == 0 or f in o.err or 'earlier version' in o.err else f'not named: {o.err.strip()[-200:]}')
        add(g, f'report without {file}', edited('run', file, None, *rep), (0, 2), see=lambda d, o, f=file: '' if o.code == 0 or f in o.err else f'not named: {o.err.strip()[-200:]}')
    add(g, 'data.toml with another path: --resume', edited('stopped', 'data.toml', lambda t: re.sub(r'(?m)^path = .*', 'path = "/nowhere"', t), *res), 2, '/nowhere')
    add(g, 'data.toml, on_bad of another word', edited('stopped', 'data.toml', lambda t: t.replace('"error"', '"ignore"'), *res), 2, 'ignore')
    add(g, 'two reports of one run', edited('run', '', None, 'report', '{}', '{}', '--out', '{d}/r.html'), 2, 'same run')
    add(g, 'a report on a file that is there', edited('run', '', None, 'report', '{}', '--out', '{}/history.csv'), 2, 'exist')
    add(g, 'a report of a stopped run', lambda d: ['report', READY/'stopped', '--out', d/'r.html'], 2, 'not a finished run')
    add(g, 'a report whose images are gone', edited('run', 'data.toml', lambda t: re.sub(r'(?m)^path = .*', 'path = "/nowhere"', t), *rep), 0)
    add(g, 'a read-only run folder: report', lambda d: (shutil.copytree(READY/'run', d/'run'), (d/'run').chmod(0o500), ['report', d/'run'])[-1], (0, 2))

READY_, READY_S = '\0data', '\0heads' # stand for what lies in READY, which is not known yet


# -- command lines -----------------------------------------------------------------------------------------------------

def command_cases():
    g = 'command lines'
    data = lambda d: layout(d, 'train/a', 'train/b', 'val/a', 'val/b')
    for name, args, code, says in (
            ('nothing', [], (0, 2), 'Usage'), ('an unknown command', ['trian', 'x'], 2, 'trian'), ('an unknown option', ['train', 'x', '--epoch', '3'], 2, '--epochs'), ('an option without its value', ['train', 'x', '--epochs'], 2, '--epochs'), ('a word too many', ['train', 'x', 'y'], 2, 'y'), ('train without data', ['train'], 2, 'folder'),
            ('epochs 0', ['train', 'D', '--epochs', '0'], 2, 'epochs'), ('epochs of text', ['train', 'D', '--epochs', 'many'], 2, 'many'), ('epochs 1.5', ['train', 'D', '--epochs', '1.5'], 2, '1.5'), ('bs 0', ['train', 'D', '--bs', '0'], 2, 'bs'), ('lr 0', ['train', 'D', '--lr', '0'], 2, 'lr'), ('lr nan', ['train', 'D', '--lr', 'nan'], 2, 'nan'), ('lr inf', ['train', 'D', '--lr', 'inf'], 2, 'inf'), ('lr -1', ['train', 'D', '--lr', '-1'], 2, 'lr'), ('size 0', ['train', 'D', '--size', '0'], 2, 'size'),
            ('size 10**9', ['train', 'D', *TINY, '--size', '1000000000'], 2, 'size'), ('size 20000', ['train', 'D', *TINY, '--size', '20000'], 2, 'size'), ('seed -1', ['train', 'D', '--seed', '-1'], 2, 'seed'), ('seed 2**32', ['train', 'D', '--seed', str(2**32)], 2, 'seed'), ('device gpu', ['train', 'D', *TINY, '--device', 'gpu'], 2, "'gpu'"), ('device cuda', ['train', 'D', *TINY, '--device', 'cuda'], 2, 'cuda'), ('num-workers -5', ['train', 'D', *TINY, '--num-workers', '-5'], 2, 'num.workers'),
            ('threads 0', ['train', 'D', *TINY, '--threads', '0'], 2, '--threads'), ('a recipe that is none', ['train', 'D', '--recipe', 'gat'], 2, "'gate'"), ('a recipe that is a folder', ['train', 'D', '--recipe', '.'], 2, "'\\.'"), ('an empty recipe', ['train', 'D', '--recipe', ''], 2, 'recipe'), ('a head that is none', ['train', 'D', *TINY, '--head', 'x'], 2, 'gated'), ('valid-pct 2', ['train', 'D', *TINY, '--valid-pct', '2'], 2, 'valid_pct'), ('valid-pct with val/', ['train', 'D', *TINY, '--valid-pct', '.5'], 2, 'valid_pct'),
            ('--resume with options', ['train', '--resume', 'x', '--epochs', '3'], 2, '--epochs'), ('--resume of nothing', ['train', '--resume', 'x'], 2, "'x'"), ('weights that are not there', ['train', 'D', *TINY, '--weights-file', 'w.pt'], 2, 'w.pt'), ('a plugin that is not there', ['train', 'D', *TINY, '--plugin', 'my_plugin'], 2, 'my_plugin'), ('a plugin file that is not there', ['train', 'D', *TINY, '--plugin', 'my.py'], 2, 'my.py'), ('--cutmix-alpha 1,2,3', ['train', 'D', '--cutmix-alpha', '1,2,3'], 2, '1,2,3'), ('--cutmix-alpha 2,1', ['train', 'D', '--cutmix-alpha', '2,1'], 2, 'lower'),
            ('--out over a file', ['train', 'D', *TINY, '--out', 'D/train/a/0.png'], 2, '0.png'), ('--out below a file', ['train', 'D', *TINY, '--out', 'D/train/a/0.png/x'], 2, '0.png'), ('--out of a run', ['train', 'D', *TINY, '--out', 'R/run'], 2, 'already exists'), ('--out nothing', ['train', 'D', *TINY, '--out', ''], 2, '.'), ('--out with a name of 300 letters', ['train', 'D', *TINY, '--out', 'x'*300], 2, '(?i)name|long'), ('--out in a place that may not be written', ['train', 'D', *TINY, '--out', '/proc/x'], 2, '/proc/x'), ('--out with a NUL', ['train', 'D', *TINY, '--out', 'a\0b'], 2, '.'),
            ('predict without a model', ['predict', 'x', 'D'], 2, "'x'"), ('predict without images', ['predict', 'R/run', 'R/heads.toml'], 2, 'heads.toml'), ('predict top-k 9', ['predict', 'R/run', 'R/images', '--top-k', '9', '--out', 'p.csv'], 2, 'top_k is 9'), ('predict top-k 0', ['predict', 'R/run', 'R/images', '--top-k', '0', '--out', 'p.csv'], 2, 'top_k is 0'), ('predict bs 0', ['predict', 'R/run', 'R/images', '--bs', '0', '--out', 'p.csv'], 2, 'bs is 0'), ('predict on-bad ignore', ['predict', 'R/run', 'R/images', '--on-bad', 'ignore', '--out', 'p.csv'], 2, 'ignore'),
            ('predict --out over the data', ['predict', 'R/run', 'R/images', '--out', 'R/heads.toml'], 2, '--force'), ('predict --out a folder with --force', ['predict', 'R/run', 'R/images', '--out', 'R/run', '--force'], 2, 'already exists', ), ('predict --out in a folder that is not there', ['predict', 'R/run', 'R/images', '--out', 'a/b/p.csv'], 0, 'a/b/p.csv'), ('predict --zip --out -', ['predict', 'R/run', 'R/images', '--out', '-', '--zip'], 2, '--zip'), ('predict --num-workers 2', ['predict', 'R/run', 'R/images', '--out', 'p.csv', '--num-workers', '2'], 0, '3 predictions'),
            ('check --html over a file', ['check', 'D', '--html', 'R/heads.toml'], 2, 'already exists'), ('check of a file', ['check', 'R/heads.toml'], 2, 'heads.toml'), ('convert of nothing', ['convert', 'x.pt', 'y.safetensors'], 2, 'x.pt'), ('convert of another file', ['convert', 'R/heads.toml', 'y.safetensors'], 2, 'heads.toml'), ('ablate seeds 0', ['ablate', 'D', *TINY, '--seeds', '0', '--out', 's'], 2, 'seeds'), ('ablate jobs 0', ['ablate', 'D', *TINY, '--jobs', '0', '--out', 's'], 2, 'jobs'), ('ablate threads 0', ['ablate', 'D', *TINY, '--threads', '0', '--out', 's', '--seeds', '1'], 2, 'threads'), ('ablate threads -1', ['ablate', 'D', *TINY, '--threads', '-1', '--out', 's', '--seeds', '1'], 2, 'threads'),
            ('ablate with a study that is none', ['ablate', 'D', *TINY, '--study', 'fusoin'], 2, "'fusion'"), ('ablate with another baseline', ['ablate', 'D', *TINY, '--study', 'R/heads.toml', '--baseline', 'x', '--out', 's'], 2, "'x'"), ('ablate into a run', ['ablate', 'D', *TINY, '--study', 'R/heads.toml', '--out', 'R/run'], 2, 'already exists'), ('report of nothing', ['report', 'x'], 2, "'x'"), ('report with another baseline', ['report', 'R/study', '--baseline', 'x', '--out', 'r.html'], 2, "'x'"), ('params of nothing', ['params', '--backbone', 'x'], 2, "'x'"), ('params classes 0', ['params', '--backbone', 'test_resnet', '--classes', '0'], 2, '--classes'),
            ('data of nothing', ['data', 'x', 'y'], 2, "'x'"), ('data over a folder', ['data', 'digits', 'D'], 2, 'already exists'), ('--version', ['--version'], 0, 'mstoolkit .*torch'), ('-h', ['-h'], 0, 'train'), ('train -h', ['train', '-h'], 0, '--plugin')):
        def do(d, args=args): o = data(d); return [str(a).replace('D', str(o), 1) if str(a) == 'D' or str(a).startswith('D/') else str(a).replace('R/', f'{READY}/', 1) if str(a).startswith('R/') else a for a in args]
        add(g, name, do, code, says)

    # standard output and error
    def closed(args, *fds):
        def do(d):
            def run():
                from mstoolkit.cli import main
                for n in fds:
                    os.close(n)
                    setattr(sys, {1: 'stdout', 2: 'stderr'}[n], None)
                return main([str(a) for a in args(d)])
            return run
        return do
    def renew(fd): setattr(sys, {1: 'stdout', 2: 'stderr'}[fd], open(fd, 'w', closefd=False))
    def piped(args, fd=1):
        "As `command | head -0`: nobody reads."
        def do(d):
            def run():
                from mstoolkit.cli import main
                r, w = os.pipe()
                os.close(r); os.dup2(w, fd); os.close(w)
                renew(fd)
                return main([str(a) for a in args(d)])
            return run
        return do
    def full(args, fd=1):
        def do(d):
            def run():
                from mstoolkit.cli import main
                os.dup2(os.open('/dev/full', os.O_WRONLY), fd)
                renew(fd)
                return main([str(a) for a in args(d)])
            return run
        return do
    t, p, c = lambda d: train(data(d)), lambda d: ['predict', READY/'run', READY/'images', '--out', d/'p.csv'], lambda d: ['check', data(d)]
    dash, rep = lambda d: ['predict', READY/'run', READY/'images', '--out', '-'], lambda d: ['report', READY/'run', '--out', d/'r.html']
    have = lambda *files: lambda d, o: '' if all((d/f).exists() for f in files) else f'no {files}'
    for name, args, see in (('train', t, have('run/valid_predictions.csv')), ('predict', p, have('p.csv')), ('check', c, None), ('report', rep, have('r.html')), ('params', lambda d: ['params', '--backbone', 'test_resnet'], None)):
        add(g, f'{name} with standard output closed', closed(args, 1), 0, see=see)
        add(g, f'{name} with standard error closed', closed(args, 2), 0, see=see)
        add(g, f'{name} with both closed', closed(args, 1, 2), 0, see=see)
        add(g, f'{name} | head', piped(args), 0, see=see)
    for name, args in (('train', t), ('predict', p)):
        add(g, f'{name} with standard error nobody reads', piped(args, 2), 0)
    add(g, 'train with standard output on a full disk', full(t), (0, 2), see=have('run/valid_predictions.csv'))
    add(g, 'predict --out - on a full disk', full(dash), 2, '(?i)space')
    add(g, 'predict --out - | head', piped(dash), 0)
    add(g, 'predict --out - with standard output closed', closed(dash, 1), (0, 2))
    add(g, 'predict --out - is the CSV alone', dash, 0, see=lambda d, o: '' if o.out.startswith('image_name,pred_label\n') and len(o.out.splitlines()) == 4 else repr(o.out))
    add(g, 'an error with standard error closed', closed(lambda d: ['train', d/'nowhere'], 2), 2)
    add(g, 'a mistake with both closed', closed(lambda d: ['trian'], 1, 2), 2)
    add(g, '--confidence --top-k 2 writes a column once', lambda d: [*p(d), '--confidence', '--top-k', '2'], 0, see=lambda d, o: '' if list(pd.read_csv(d/'p.csv')) == ['image_name', 'pred_label', 'label_1', 'confidence_1', 'label_2', 'confidence_2'] else str(list(pd.read_csv(d/'p.csv'))))
    add(g, '--force replaces', lambda d: ((d/'p.csv').write_text('old'), [*p(d), '--force'])[1], 0, see=lambda d, o: 'not replaced' if (d/'p.csv').read_text() == 'old' else '')
    def formula(d): pics(d/'im', 1); pic(d/'im'/'=1+1.png'); pic(d/'im'/'-x.png'); return ['predict', READY/'run', d/'im', '--out', d/'p.csv']
    add(g, 'image names that are formulas: predict says so', formula, 0, 'formula')
    add(g, 'image names that are formulas: check says so', lambda d: (data(d), pic(d/'data'/'train'/'a'/'@x.png'), ['check', d/'data'])[-1], 0, 'formula|spreadsheet')
    add(g, 'predict of a folder without images', lambda d: ((d/'e').mkdir(), ['predict', READY/'run', d/'e', '--out', d/'p.csv'])[1], 2, 'no images')
    def plugin(text, *args):
        def do(d):
            (d/'my_heads.py').write_text(text)
            return train(data(d), '--plugin', d/'my_heads.py', *args)
        return do
    add(g, 'a plugin that fails', plugin('1/0'), 2, 'my_heads.*ZeroDivision')
    add(g, 'a plugin of wrong syntax', plugin('def'), 2, 'my_heads.*SyntaxError')
    add(g, 'a plugin that leaves', plugin('raise SystemExit(3)'), 2, 'my_heads')
    add(g, 'a plugin that registers nothing, head asked for', plugin('x = 1', '--head', 'mine'), 2, "'mine'")
    add(g, 'a plugin of a name that is taken', lambda d: ((d/'json.py').write_text(''), train(data(d), '--plugin', d/'json.py'))[1], 2, 'json')
    add(g, 'two --resume', lambda d: ['train', '--resume', READY/'stopped', '--resume', d/'x'], 2, "x'")
    def locked(d):
        import fcntl
        shutil.copytree(READY/'stopped', d/'stopped')
        f = (d/'stopped'/'checkpoint'/'lock').open('w')
        fcntl.lockf(f, fcntl.LOCK_EX)
        locked.kept.append(f)
        return ['train', '--resume', d/'stopped']
    locked.kept = []
    add(g, '--resume of a run that another process trains', locked, 2, 'another process')


# -- signals -----------------------------------------------------------------------------------------------------------

def signal_cases():
    g = 'signals'
    import signal as s
    import time
    def sent(sig, when, args=lambda d: train(layout(d, 'train/a', 'train/b', 'val/a', 'val/b'), '--epochs', '200'), twice=False):
        def do(d):
            def run():
                import threading
                from mstoolkit.cli import main
                def shoot():
                    while s.getsignal(s.SIGTERM) == s.SIG_DFL or not when(d): time.sleep(.002) # its handler tells that `main` has begun
                    os.kill(os.getpid(), sig)
                    if twice: os.kill(os.getpid(), sig)
                threading.Thread(target=shoot, daemon=True).start()
                return main([str(a) for a in args(d)])
            return run
        return do
    at = lambda f: lambda d: (d/f).exists()
    half = lambda d: any((d/'run').glob('**/.*.tmp'))
    moments = {'at once': lambda d: True, 'when the run folder is made': at('run'), 'when its recipe is there': at('run/recipe.toml'), 'in the first epoch': at('run/environment.json'), 'after the first epoch': at('run/checkpoint/state.pt'), 'while a file is written': half}
    one_line = lambda d, o: '' if len([x for x in o.err.splitlines() if x.strip()]) == 1 else f'standard error: {o.err[-300:]!r}'
    for name, when in moments.items():
        add(g, f'SIGTERM {name}', sent(s.SIGTERM, when), 143, 'stopped by a signal', see=one_line)
        add(g, f'SIGINT {name}', sent(s.SIGINT, when), 130, 'interrupted', see=one_line)
        add(g, f'SIGINT {name}, twice', sent(s.SIGINT, when, twice=True), 130, 'interrupted', see=one_line)
    pred = lambda d: (layout(d, *'abcdefgh', n=150), ['predict', READY/'run', d/'data', '--out', d/'p.csv', '--bs', '1'])[1]
    chk = lambda d: (layout(d, *'abcdefgh', n=150), ['check', d/'data'])[1]
    abl = lambda d: ['ablate', READY/'data', '--study', READY/'heads.toml', '--out', d/'study', '--seeds', '2', '--threads', '1', *TINY, '--epochs', '50']
    for name, args, when in (('predict', pred, lambda d: time.sleep(.5) or True), ('check', chk, lambda d: time.sleep(.05) or True), ('ablate', abl, lambda d: any((d/'study').glob('*/.seed-0/checkpoint/state.pt')))):
        add(g, f'SIGTERM in {name}', sent(s.SIGTERM, when, args), 143, 'stopped by a signal')
        add(g, f'SIGINT in {name}', sent(s.SIGINT, when, args), 130, 'interrupted')
    add(g, 'SIGINT in ablate says how to go on', sent(s.SIGINT, lambda d: any((d/'study').glob('*/.seed-0/checkpoint/state.pt')), abl), 130, 'same', never='--resume')
    def worker(sig):
        def do(d):
            layout(d, 'train/a', 'train/b', 'val/a', 'val/b')
            def run():
                import threading
                from mstoolkit.cli import main
                def shoot():
                    while not (d/'run'/'checkpoint'/'state.pt').exists(): time.sleep(.01)
                    me = os.getpid()
                    for _ in range(200):
                        for o in Path('/proc').iterdir():
                            try:
                                if o.name.isdigit() and int((o/'stat').read_text().rpartition(')')[2].split()[1]) == me:
                                    os.kill(int(o.name), sig)
                                    return
                            except OSError: pass
                        time.sleep(.01)
                threading.Thread(target=shoot, daemon=True).start()
                options = [*TINY, '--epochs', '200']
                options[options.index('--num-workers')+1] = '2'
                return main([str(a) for a in ['train', d/'data', '--out', 'run', *options]])
            return run
        return do
    for sig in (s.SIGKILL, s.SIGTERM, s.SIGSEGV):
        add(g, f'a loader process gets {sig.name}', worker(sig), (0, 2), 'loader process|best accuracy', see=lambda d, o, sig=sig: '' if o.code == 0 or sig == s.SIGSEGV else one_line(d, o)) # 0: it was idle and is replaced; torch has a line of its own of SIGSEGV


for make in (image_cases, folder_cases, table_cases, list_cases, class_list_cases, model_cases, run_cases, command_cases, signal_cases): make()
