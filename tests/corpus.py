"Bad and odd image files: each made by a few lines, with what reading it should give."
import os
import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
from PIL import Image, PngImagePlugin


def picture(h=60, w=80):
    "A smooth picture without symmetry, so that every turn and every swap of channels shows."
    y, x = np.mgrid[:h, :w]
    return np.stack([x*255/w, y*255/h, 255-(x+y)*255/(w+h)], -1).astype(np.uint8)


RGB = picture()
GRAY = np.repeat(RGB[..., :1], 3, 2)
MASK = np.where(np.arange(80) < 40, 255, 0).astype(np.uint8)[None].repeat(60, 0)  # left half opaque
OVER_WHITE = np.where(MASK[..., None] > 0, RGB, 255).astype(np.uint8)


def save(im, fmt, **kw):
    out = BytesIO()
    (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(out, fmt, **kw)
    return out.getvalue()


def exif(k):
    e = Image.Exif()
    e[0x112] = k
    return e


def turned(k):
    "What a viewer shows of `RGB` when its EXIF orientation is `k`."
    a = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2), 6: np.rot90(RGB, -1),
         7: RGB[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(RGB)}
    return np.ascontiguousarray(a[k])


def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))


def png_bomb(n):
    "An n × n PNG in well under a megabyte: its rows are all zero, and only the first are there."
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', n, n, 8, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n'+head+chunk(b'IDAT', zlib.compress(bytes(200_000)))+chunk(b'IEND', b'')


def jpeg_bomb(n):
    d = bytearray(save(RGB, 'JPEG'))
    i = d.index(b'\xff\xc0')
    d[i+5:i+9] = struct.pack('>HH', n, n)
    return bytes(d)


def gif_bomb(n):
    d = bytearray(save(Image.fromarray(RGB).convert('P'), 'GIF'))
    d[6:10] = struct.pack('<HH', n, n)
    return bytes(d)


def tiff_bomb(n):
    d = bytearray(save(RGB, 'TIFF'))
    at = struct.unpack('<I', d[4:8])[0]
    for i in range(struct.unpack('<H', d[at:at+2])[0]):
        e = at+2+12*i
        if struct.unpack('<H', d[e:e+2])[0] in (256, 257): d[e+2:e+12] = struct.pack('<HIi', 4, 1, n)
    return bytes(d)


def flipped(data, at=.5, n=8):
    "Damage in the middle."
    d = bytearray(data)
    for i in range(n): d[int(len(d)*at)+i] ^= 0x5A
    return bytes(d)


def with_thumbnail():
    thumb = save(picture(12, 16), 'JPEG')
    tiff = (b'II*\0\x08\0\0\0'+struct.pack('<H', 0)+struct.pack('<I', 14)+struct.pack('<H', 2)
            + struct.pack('<HHII', 0x201, 4, 1, 44)+struct.pack('<HHII', 0x202, 4, 1, len(thumb))+struct.pack('<I', 0)+thumb)
    return save(RGB, 'JPEG', quality=95, exif=b'Exif\0\0'+tiff)


def indexed(transparent=False):
    im = Image.fromarray(RGB).quantize(64)
    ref = np.asarray(im.convert('RGB'))
    if not transparent: return save(im, 'PNG'), ref
    alpha = bytes([0]*32+[255]*32)
    idx = np.asarray(im)
    return save(im, 'PNG', transparency=alpha), np.where((idx < 32)[..., None], 255, ref).astype(np.uint8)


def colour_key():
    a = RGB.copy()
    a[:10] = (7, 8, 9)
    ref = a.copy()
    ref[:10] = 255
    return save(Image.fromarray(a), 'PNG', transparency=(7, 8, 9)), ref


def clear_gif():
    im = Image.fromarray(RGB).quantize(64)
    return save(im, 'GIF', transparency=3), np.where((np.asarray(im) == 3)[..., None], 255, np.asarray(im.convert('RGB'))).astype(np.uint8)


def animated(fmt, **kw):
    frames = [Image.fromarray(RGB), Image.fromarray(255-RGB)]
    return save(frames[0], fmt, save_all=True, append_images=frames[1:], duration=40, **kw)


def cv_png(a): return cv2.imencode('.png', a)[1].tobytes()


def commented_png():
    info = PngImagePlugin.PngInfo()
    info.add_text('Comment', 'tRNS eXIf '*40)
    return save(RGB, 'PNG', pnginfo=info)


def good_files():
    "name -> (bytes, the pixels it should give, mean absolute error allowed)"
    j = save(RGB, 'JPEG', quality=95)
    ramp16 = np.linspace(0, 65535, 4800).reshape(60, 80).astype(np.uint16)
    ramp = np.repeat(np.rint(ramp16/257).astype(np.uint8)[..., None], 3, 2)
    rgba, la = np.dstack([RGB, MASK]), np.dstack([RGB[..., 0], MASK])
    gray_over = np.where(MASK[..., None] > 0, GRAY, 255).astype(np.uint8)
    bits = Image.fromarray(RGB[..., 0]).convert('1')
    bits_rgb = np.asarray(bits.convert('RGB'))
    p, p_ref = indexed()
    pt, pt_ref = indexed(True)
    key, key_ref = colour_key()
    gif, gif_ref = clear_gif()
    cmyk = Image.fromarray(RGB).convert('CMYK')
    files = {
        'plain.jpg': (j, RGB, 2), 'gray.jpg': (save(RGB[..., 0], 'JPEG', quality=95), GRAY, 2),
        'progressive.jpg': (save(RGB, 'JPEG', quality=95, progressive=True), RGB, 2),
        'subsampled.jpg': (save(RGB, 'JPEG', quality=90, subsampling=2), RGB, 3), 'cmyk.jpg': (save(cmyk, 'JPEG', quality=95), RGB, 3),
        'thumbnail.jpg': (with_thumbnail(), RGB, 2), 'trailing-bytes.jpg': (j+b'\0'*99+b'bye', RGB, 2),
        'really-a-png.jpg': (save(RGB, 'PNG'), RGB, 0),
        'really-a-jpeg.png': (j, RGB, 2), 'UPPER.JPG': (j, RGB, 2), 'no-ending': (j, RGB, 2), 'Ünïcödé 画像.png': (save(RGB, 'PNG'), RGB, 0),
        'new\nline.png': (save(RGB, 'PNG'), RGB, 0), "quote'\"&%20.png": (save(RGB, 'PNG'), RGB, 0), 'x'*240+'.png': (save(RGB, 'PNG'), RGB, 0),
        'plain.png': (save(RGB, 'PNG'), RGB, 0), 'gray.png': (save(RGB[..., 0], 'PNG'), GRAY, 0), 'gray-alpha.png': (save(la, 'PNG'), gray_over, 0),
        'rgba.png': (save(rgba, 'PNG'), OVER_WHITE, 0), 'palette.png': (p, p_ref, 0), 'palette-clear.png': (pt, pt_ref, 0),
        'colour-key.png': (key, key_ref, 0), 'gray16.png': (save(ramp16, 'PNG'), ramp, 0),
        'rgb16.png': (cv_png(RGB[..., ::-1].astype(np.uint16)*257), RGB, 0),
        'rgba16.png': (cv_png(rgba[..., [2, 1, 0, 3]].astype(np.uint16)*257), OVER_WHITE, 0),
        'one-bit.png': (save(bits, 'PNG'), bits_rgb, 0), 'turned.png': (save(RGB, 'PNG', exif=exif(6)), turned(6), 0),
        'comment.png': (commented_png(), RGB, 0),
        'animated.png': (animated('PNG'), RGB, 0), 'animated.gif': (animated('GIF'), RGB, 8), 'clear.gif': (gif, gif_ref, 0),
        'plain.bmp': (save(RGB, 'BMP'), RGB, 0), 'gray.bmp': (save(RGB[..., 0], 'BMP'), GRAY, 0), 'one-bit.bmp': (save(bits, 'BMP'), bits_rgb, 0),
        'plain.tif': (save(RGB, 'TIFF'), RGB, 0), 'lzw.tiff': (save(RGB, 'TIFF', compression='tiff_lzw'), RGB, 0),
        'cmyk.tif': (save(cmyk, 'TIFF'), RGB, 1),
        'gray16.tif': (save(ramp16, 'TIFF'), ramp, 0), 'float.tif': (save((RGB[..., 0]/255).astype(np.float32), 'TIFF'), GRAY, 0),
        'one-bit.tif': (save(bits, 'TIFF'), bits_rgb, 0), 'pages.tif': (save(Image.fromarray(RGB), 'TIFF', save_all=True,
                                                                        append_images=[Image.fromarray(255-RGB)]), RGB, 0),
        'turned.tif': (save(RGB, 'TIFF', exif=exif(6)), turned(6), 0), 'plain.webp': (save(RGB, 'WEBP', quality=95), RGB, 4),
        'clear.webp': (save(rgba, 'WEBP', lossless=True, exact=True), OVER_WHITE, 0), 'animated.webp': (animated('WEBP', lossless=True), RGB, 0),
        'turned.webp': (save(RGB, 'WEBP', lossless=True, exif=exif(6)), turned(6), 0), 'plain.avif': (save(RGB, 'AVIF', quality=95), RGB, 5),
        'plain.jp2': (save(RGB, 'JPEG2000'), RGB, 2), 'plain.ppm': (save(RGB, 'PPM'), RGB, 0), 'gray.pgm': (save(RGB[..., 0], 'PPM'), GRAY, 0),
        'dot.png': (save(RGB[:1, :1], 'PNG'), RGB[:1, :1], 0), 'strip.png': (save(np.full((1, 5000, 3), 9, np.uint8),
        'PNG'), np.full((1, 5000, 3), 9), 0)}
    for k in range(2, 9): files[f'turned-{k}.jpg'] = (save(RGB, 'JPEG', quality=95, exif=exif(k)), turned(k), 2)
    return files


def bad_files():
    "name -> (bytes, the kinds of `ImageError` it may give)"
    big = picture(300, 400)
    cut = {fmt: (d := save(big, fmt))[:len(d)//2] for fmt in ('JPEG', 'PNG', 'GIF', 'WEBP', 'AVIF', 'BMP')}
    half, t = ('truncated', 'damaged'), with_thumbnail()
    return {
        'zero.jpg': (b'', ['empty']), 'zero.png': (b'', ['empty']), 'text.jpg': (b'this is no image\n', ['alien']),
        'page.png': (b'<!DOCTYPE html><html>', ['alien']),
        'drawing.jpg': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', ['alien']), 'paper.jpg': (b'%PDF-1.7 '+bytes(99), ['alien']),
        'archive.png': (b'PK\x03\x04'+bytes(99), ['alien']), 'postscript.png': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', ['alien']),
        'nulls.jpg': (bytes(5000), ['alien']),
        'half.jpg': (cut['JPEG'], half), 'half.png': (cut['PNG'], half), 'half.gif': (cut['GIF'], half), 'half.webp': (cut['WEBP'], half),
        'half.avif': (cut['AVIF'], half), 'half.bmp': (cut['BMP'], half),
        'half.tif': ((d := save(big, 'TIFF', compression='tiff_lzw'))[:len(d)//2], half),
        'half-thumbnail.jpg': (t[:-len(t)//4], half), 'no-end.jpg': (save(big, 'JPEG')[:-2], half), 'three-bytes.jpg': (b'\xff\xd8\xff', half),
        'magic-only.png': (b'\x89PNG\r\n\x1a\n', half), 'noise.jpg': (b'\xff\xd8\xff\xe0'+np.random.default_rng(0).bytes(3000), half),
        'noise.png': (b'\x89PNG\r\n\x1a\n'+np.random.default_rng(1).bytes(3000), half),
        'noise.webp': (b'RIFF\0\1\0\0WEBPVP8 '+np.random.default_rng(2).bytes(3000), half),
        'noise.bmp': (b'BM'+np.random.default_rng(3).bytes(3000), ('damaged', 'truncated', 'huge')),
        'noise.tif': (b'II*\0'+np.random.default_rng(4).bytes(3000), half),
        'noise.gif': (b'GIF89a'+np.random.default_rng(5).bytes(3000), ('damaged', 'truncated', 'huge')),
        'noise.avif': (b'\0\0\0\x1cftypavif'+np.random.default_rng(6).bytes(3000), half),
        'flipped.png': (flipped(save(big, 'PNG')), half),
        'no-size.png': (b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', bytes(8)+b'\x08\2\0\0\0')+chunk(b'IEND', b''), half),
        'bomb.png': (png_bomb(100_000), ['huge']), 'bomb.jpg': (jpeg_bomb(65_000), ['huge']), 'bomb.gif': (gif_bomb(60_000), ['huge']),
        'bomb.tif': (tiff_bomb(100_000), ['huge']),
        'bomb.bmp': (save(RGB, 'BMP')[:18]+struct.pack('<ii', 100_000, 100_000)+save(RGB, 'BMP')[26:], ['huge'])}


def write_corpus(folder):
    "Write every file of the corpus to `folder`."
    for name, (data, *_) in {**good_files(), **bad_files()}.items():
        with open(os.path.join(folder, name), 'wb') as f: f.write(data)
