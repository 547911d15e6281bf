"A small folder of images that a small network learns in seconds."
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

os.environ.setdefault('MPLBACKEND', 'agg')  # no test opens a window
sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))  # of which tests take `forked` and cases


CLASSES = ['2', '10', 'red apple']
COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


def write_images(folder: Path, n: int, colour, rng):
    "`n` noisy images of one colour."
    folder.mkdir(parents=True)
    for i in range(n):
        im = np.clip(rng.normal(colour, 25, (40, 48, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder/f'{i}.png'), im)


@pytest.fixture(scope='session')
def image_folder_(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp('images')/'data', np.random.default_rng(0)
    for c, colour in zip(CLASSES, COLOURS):
        write_images(root/'train'/c, 8, colour, rng)
        write_images(root/'val'/c, 4, colour, rng)
        write_images(root/'test'/c, 3, colour, rng)
    return root


@pytest.fixture
def image_folder(image_folder_, tmp_path):
    "train/, val/ and test/ with three classes; a copy that a test may spoil."
    return Path(shutil.copytree(image_folder_, tmp_path/'data'))


TINY = dict(backbone='test_resnet', pretrained=False, size=32, epochs=1, bs=8, num_workers=0, augment='none', device='cpu')


@pytest.fixture
def tiny():
    "Recipe fields of a run that takes a second."
    return dict(TINY)


@pytest.fixture
def tiny_options():
    "The same as command-line options."
    return ['--recipe', 'gate', *(o for k, v in TINY.items() for o in ([f'--no-{k}'] if v is False else [f"--{k.replace('_', '-')}", str(v)]))]


@pytest.fixture(scope='module') # a loop that Playwright leaves open lets no other run
def browser():
    "Chromium without a window, with a camera that shows a test pattern."
    api = pytest.importorskip('playwright.sync_api')
    chromium = next((p for o in ('chromium', 'chromium-browser', 'google-chrome', 'chrome') if (p := shutil.which(o))), None)
    if not chromium: pytest.skip('no chromium here')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'])
        yield b
        b.close()
