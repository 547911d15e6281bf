"""The figures of the landing page, and what a network says of them.

    python docs/pictures.py

Draws hierarchical letters of 96 pixels, trains the `demo` recipe with a gated head on them (ten minutes on two CPU
cores), writes some of the test images to docs/content/assets/ and the HTML that shows them to the terminal.
"""
import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
from mstoolkit.datasets import make_navon
from mstoolkit.predict import predict_folder
from mstoolkit.recipe import recipes
from mstoolkit.train import train
from PIL import Image

SIZE = 96 # side of the figures, pixels
PAIRS = 'A-of-S K-of-T E-of-H S-of-X Z-of-A H-of-E T-of-O X-of-L'.split() # large letters of small ones
ASSETS = Path(__file__).parent/'content'/'assets'


def predictions(work: Path) -> pd.DataFrame: # columns image_name, label (the truth), pred_label, confidence
    "Draw the figures, train on them and predict the test images; what is in `work` already is used again."
    data, run, csv = work/'data', work/'run', work/'prediction.csv'
    if not data.exists(): make_navon(data, size=SIZE)
    recipe = replace(recipes['demo'], head='gated', size=SIZE, memory_format='channels-last')
    if not run.exists(): train(recipe, data, run)
    if not csv.exists(): predict_folder(run, data/'test', confidence=True).to_csv(csv, index=False)
    answers = pd.read_csv(data/'test_labels.csv', dtype=str)
    return pd.read_csv(csv, dtype={'image_name': str}).merge(answers, on='image_name')


def figure(row: pd.Series, source: Path) -> str:
    "Write one test image as WebP; the HTML that shows it."
    large, small = row.label.split('-of-')
    name = f'{large}{small}.webp'.lower()
    im = Image.open(source).convert('RGB').resize((192, 192), Image.LANCZOS)
    im.save(ASSETS/'figures'/name, quality=80, method=6)
    told = f'{row.pred_label.replace("-of-", " of ")} <b>{row.confidence:.0%}</b>'
    alt = f'A large letter {large} made of small letters {small}'
    img = f'<img src="assets/figures/{name}" width="192" height="192" alt="{alt}">'
    return f'<figure>{img}<figcaption>{told}</figcaption></figure>'


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--work', type=Path, help='folder for data and run; a temporary one')
    a.add_argument('--which', type=int, nargs='*', default=[], help='which test image of each pair; the first')
    a = a.parse_args()
    work = a.work or Path(tempfile.mkdtemp())
    df = predictions(work)
    print(f'{(df.label == df.pred_label).mean():.4f} of {len(df):,} test images right')
    (ASSETS/'figures').mkdir(exist_ok=True)
    for i, pair in enumerate(PAIRS):
        row = df[df.label == pair].iloc[a.which[i] if i < len(a.which) else 0]
        print(figure(row, next((work/'data'/'test').glob(f'{row.image_name}.*'))))


if __name__ == '__main__': main()
