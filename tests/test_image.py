"Reading image files: a corpus of odd and broken ones, agreement with Pillow, listing."
import os
import pickle
import resource
from io import BytesIO

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from mstoolkit.data.image import ImageError, bad_kinds, decode_image, image_header, pil_rgb, read_image, to_rgb
from mstoolkit.data.sources import image_files

from corpus import RGB, bad_files, good_files, picture, save, write_corpus

good, bad = good_files(), bad_files()


def test_the_corpus_is_large(): assert len(good)+len(bad) >= 80


@pytest.mark.parametrize('name', good, ids=ascii)
def test_odd_files_give_the_right_pixels(tmp_path, name):
    data, ref, tol = good[name]
    (tmp_path/name).write_bytes(data)
    im = read_image(tmp_path/name)
    assert im.dtype == np.uint8 and im.shape == ref.shape
    assert abs(im.astype(int)-ref).mean() <= tol
    assert [f.name for f in image_files(tmp_path)] == [name]


@pytest.mark.parametrize('name', bad, ids=ascii)
@pytest.mark.filterwarnings('ignore::UserWarning:PIL')  # Pillow warns of broken TIFF tags before it gives up
def test_bad_files_are_named_with_their_fault(tmp_path, name):
    data, kinds = bad[name]
    (tmp_path/name).write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError) as e: read_image(tmp_path/name)
    assert e.value.kind in kinds and e.value.kind in bad_kinds
    msg = str(e.value)
    assert msg.startswith(str(tmp_path/name)) and '\n' not in msg and len(msg) < len(str(tmp_path))+200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB: nothing huge was decoded
    again = pickle.loads(pickle.dumps(e.value))  # it must cross from a worker process
    assert (str(again), again.kind) == (msg, e.value.kind)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path/'pipe.jpg')
    (tmp_path/'link.jpg').symlink_to(tmp_path/'nowhere.jpg')
    (tmp_path/'folder.jpg').mkdir()
    for name, why in [('pipe.jpg', 'not a file'), ('folder.jpg', 'not a file'), ('link.jpg', 'No such file'), ('gone.jpg', 'No such file')]:
        with pytest.raises(ImageError, match=f'{name} cannot be read.*{why}'): read_image(tmp_path/name)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(good)), st.integers(1, 10_000), st.binary(max_size=40))
@pytest.mark.filterwarnings('ignore::UserWarning:PIL', 'ignore:image file could not be identified:UserWarning',
                            'ignore::PIL.Image.DecompressionBombWarning')
def test_no_damage_crashes(name, at, noise):
    "Overwrite some bytes anywhere: the answer is an image or an ImageError, never another exception."
    d = bytearray(good[name][0])
    at %= len(d)
    d[at:at+len(noise)] = noise
    try: im = decode_image(bytes(d))
    except ImageError: return
    assert im.dtype == np.uint8 and im.ndim == 3 and im.shape[2] == 3


def test_jpegs_agree_with_pillow_on_random_pictures():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        im = cv2.resize(rng.integers(0, 255, (9, 12, 3), np.uint8), tuple(rng.integers(17, 300, 2).tolist()), interpolation=cv2.INTER_CUBIC)
        d = save(im, 'JPEG', quality=int(rng.integers(30, 98)), subsampling=int(rng.integers(0, 3)))
        ref = np.asarray(Image.open(BytesIO(d)).convert('RGB'))
        assert abs(decode_image(d).astype(int)-ref).max() <= 4


@pytest.mark.parametrize('k', [2, 4, 8])
def test_reduced_decoding(k):
    im = picture(480, 640)
    small = decode_image(save(im, 'JPEG', quality=95), 480//k)
    assert small.shape == (480//k, 640//k, 3)
    assert abs(small.astype(int) - cv2.resize(im, (640//k, 480//k), interpolation=cv2.INTER_AREA)).mean() < 3
    assert decode_image(save(im, 'JPEG', quality=95), 480//k+1).shape[0] == 480//max(1, k//2)  # one pixel more, and it is read larger


def test_header_of_every_good_file_is_its_size():
    for name, (data, ref, _) in good.items():
        h = image_header(data)
        assert sorted((h.width, h.height)) == sorted(ref.shape[:2]), name


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr', 'HSV', 'I', 'F', 'La', 'RGBa'])
def test_pil_modes(mode):
    im = Image.fromarray(RGB)
    im = im.convert('LA').convert(mode) if mode == 'La' else im.convert('RGBA').convert(mode) if mode == 'RGBa' else im.convert(mode)
    out = pil_rgb(im)
    ref = Image.fromarray(RGB).convert('L') if mode in 'IF' else im.convert({'La': 'LA', 'RGBa': 'RGBA'}.get(mode, mode))
    assert abs(out.astype(int)-np.asarray(ref.convert('RGB'))).mean() < 1.5


def png_with_chunk(kind, body, after=True):
    "A picture whose PNG says in another chunk how it is turned."
    import zlib
    data = save(RGB, 'PNG')
    chunk = len(body).to_bytes(4, 'big') + kind + body + zlib.crc32(kind+body).to_bytes(4, 'big')
    at = data.rindex(b'IEND')-4 if after else data.index(b'IDAT')-4
    return data[:at] + chunk + data[at:]


EXIF = Image.Exif()
EXIF[0x112] = 6  # to be turned by 90°


@pytest.mark.parametrize('after', [True, False])
@pytest.mark.parametrize('how', ['eXIf', 'raw profile'])
def test_png_orientation_wherever_it_stands(how, after):
    exif = EXIF.tobytes()
    if how == 'eXIf': data = png_with_chunk(b'eXIf', exif[6:], after)
    else: # ImageMagick's: a text of hexadecimal digits
        lines = f'\nexif\n{len(exif):8}\n{exif.hex()}\n'
        data = png_with_chunk(b'tEXt', b'Raw profile type exif\0' + lines.encode('latin1'), after)
    with Image.open(BytesIO(data)) as im: ref = np.asarray(ImageOps.exif_transpose(im).convert('RGB'))
    assert ref.shape == RGB.transpose(1, 0, 2).shape
    assert np.array_equal(decode_image(data), ref)


DARK = (np.arange(4800).reshape(60, 80) % 200).astype(np.uint16)  # of 65,536 levels


def test_the_scale_is_the_types_not_the_images():
    for fmt in ('PNG', 'TIFF'): assert decode_image(save(DARK, fmt)).max() <= 1
    faint = (RGB[..., 0]/2550).astype(np.float32)
    assert decode_image(save(faint, 'TIFF')).max() <= 26
    for a in (RGB[..., 0].astype(np.float32)*4, RGB[..., 0].astype(np.float32)/128-1, RGB[..., 0].astype(np.int32), RGB[..., 0].astype(np.int32)*1000):
        with pytest.raises(ImageError, match='nothing says which is white: save it with 8 or 16 bits'): decode_image(save(a, 'TIFF'))


def test_arrays():
    assert np.array_equal(to_rgb(np.array([[True, False]])), [[[255]*3, [0]*3]])
    assert np.array_equal(to_rgb(np.array([[0, .5, 1.0005]])), [[[0]*3, [128]*3, [255]*3]])
    for odd in ([[0, 2.]], [[np.nan]], [[-1, 0]], [[1j]]):
        with pytest.raises(ValueError, match='give uint8, uint16, bool, or floats from 0 to 1'): to_rgb(np.array(odd))
    assert np.array_equal(to_rgb(np.array([[[10, 20, 30, 255]]], np.int64)), [[[10, 20, 30]]])
    with pytest.raises(ValueError, match=r'not \(3, 4, 4, 5\)'): to_rgb(np.zeros((3, 4, 4, 5)))


def test_listing(tmp_path):
    for f in ['b/img10.png', 'b/img2.png', 'a.JPG', '.hidden.png', '.git/x.png', 'labels.csv', 'b/.DS_Store', 'README']:
        (tmp_path/f).parent.mkdir(exist_ok=True)
        (tmp_path/f).write_bytes(b'x')
    (tmp_path/'b'/'up').symlink_to(tmp_path, target_is_directory=True)  # a loop
    assert [f.relative_to(tmp_path).as_posix() for f in image_files(tmp_path)] == ['a.JPG', 'b/img2.png', 'b/img10.png']
    with pytest.raises(FileNotFoundError, match='there is no folder'): image_files(tmp_path/'nope')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='there are no images in'): image_files(tmp_path/'empty')


def test_listing_a_linked_folder(tmp_path):
    (tmp_path/'real').mkdir()
    (tmp_path/'real'/'a.png').write_bytes(b'x')
    (tmp_path/'data').mkdir()
    (tmp_path/'data'/'link').symlink_to(tmp_path/'real', target_is_directory=True)
    assert [f.name for f in image_files(tmp_path/'data')] == ['a.png']
    (tmp_path/'data'/'z').mkdir()
    (tmp_path/'data'/'z'/'b.png').write_bytes(b'x')
    (tmp_path/'data'/'alias').symlink_to('z', target_is_directory=True)
    assert [f.relative_to(tmp_path/'data').as_posix() for f in image_files(tmp_path/'data')] == ['link/a.png', 'z/b.png']  # the real name of two


def test_the_whole_corpus_lists(tmp_path):
    write_corpus(tmp_path)
    assert len(image_files(tmp_path)) == len(good)+len(bad)
