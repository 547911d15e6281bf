"""What reading does with every odd and every bad image file of the tests' corpus: right pixels, or which refusal, and how much memory it took.

    python benchmarks/corpus.py

Memory is the peak of this process above what it held before the file (Linux).
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent/'tests'))
from corpus import bad_files, good_files  # noqa: E402
from mstoolkit.core import write_text  # noqa: E402
from mstoolkit.data.image import ImageError, read_image  # noqa: E402


def peak(f):
    "The result of `f()` and the MiB it took at its peak."
    status = lambda key: int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key)).split()[1])/1024
    Path('/proc/self/clear_refs').write_text('5')  # forget the old peak
    before = status('VmRSS')
    result = f()
    return result, max(0, status('VmHWM')-before)


def outcome(path, want, tolerance):
    "In words what reading `path` gives."
    try: got = read_image(path)
    except ImageError as e: return f'refused, {e.kind}: {str(e).partition(": ")[2]}'
    if want is None: return f'READ AS {got.shape[1]} × {got.shape[0]}'
    error = abs(got.astype(int)-want).mean() if got.shape == np.shape(want) else np.inf
    return ('right' if error <= tolerance else 'WRONG') + (f', mean error {error:.2g} of 255' if error else ', to the bit')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--date', default=time.strftime('%Y-%m-%d'))
    args = p.parse_args()
    good, bad = good_files(), bad_files()
    files = {n: (d, (ref, tol)) for n, (d, ref, tol) in good.items()} | {n: (d, (None, 0)) for n, (d, _) in bad.items()}
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for n, (data, want) in files.items():
            (Path(tmp)/n).write_bytes(data)
            text, mib = peak(lambda: outcome(Path(tmp)/n, *want))
            shown = json.dumps(n, ensure_ascii=False)[1:-1] if len(n) < 60 else f'{n[:8]}… ({len(n)} characters)'
            rows.append(f'| `{shown}` | {len(data):,} | {text} | {mib:.1f} |')
    text = '\n'.join(['# Odd and bad files', '', '    python benchmarks/corpus.py', '',
                      f'{args.date}, {machine()}. {len(good)} odd files that are images and {len(bad)} that are none, or no longer, all made by `tests/corpus.py`.',
                      '', '| file | bytes | outcome | peak MiB more |', '|---|---|---|---|', *rows, ''])
    print(text)
    write_text(HERE/'corpus.md', text)


if __name__ == '__main__': main()
