"What an import costs: seconds, memory, and the large libraries it brings. Writes imports.md."
import datetime
import subprocess
import sys
from pathlib import Path
from statistics import median

CODE = """
import sys, time
t, c = time.perf_counter(), time.process_time()
{}
wall, cpu = time.perf_counter()-t, time.process_time()-c
import resource
large = 'torch torchvision timm fastai cv2 albumentations scipy sklearn pandas matplotlib sympy rich typer'.split()
print(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, *(o for o in large if o in sys.modules))
"""
ROWS = ['pass', 'import mstoolkit', 'import mstoolkit.cli', 'import mstoolkit.data.check', 'import mstoolkit.runs', 'import torch', 'import torchvision', 'import timm',
        'import fastai.learner', 'import fastai.vision.all', 'import mstoolkit.models.fusion', 'import mstoolkit.classifier', 'import mstoolkit.predict', 'import mstoolkit.all']


def measure(code: str) -> list[str]: return subprocess.run([sys.executable, '-c', CODE.format(code)], capture_output=True, text=True, check=True).stdout.split()


def main(rounds: int = 3):
    runs = {o: [] for o in ROWS}
    for _ in range(rounds):
        for o in ROWS: runs[o].append(measure(o))
    import torch # not before: a child's peak of memory would begin at its parent's
    from machine import machine
    torch.set_num_threads(1)
    lines = []
    for o, r in runs.items():
        wall, cpu, mib = (median(float(x[i]) for x in r) for i in range(3))
        lines.append(f"| `{o}` | {cpu:.2f} | {wall:.2f} | {mib:,.0f} | {' '.join(r[0][3:])} |")
    page = f"""# What an import costs

    python benchmarks/imports.py

{datetime.date.today()}, {machine()}, Python {sys.version.split()[0]}, torch {torch.__version__.split('+')[0]}. Medians of {rounds} fresh processes each, the rows taking turns. Others used the machine, so processor
time says more than the clock.

| code | s, processor | s, clock | MiB | what it brings |
|---|---|---|---|---|
""" + '\n'.join(lines) + """

`mstoolkit check`, `data`, `--help` and completion stop at the first rows. A network costs torch, torchvision and timm, whoever asks for it: torchvision alone
imports torch's compiler (`torch._dynamo`, sympy), which is about half of its time. fastai and what it brings (scikit-learn, scipy, matplotlib) are what training
and prediction pay above that, and albumentations. The library's own modules take a tenth of a second together.
"""
    Path(__file__).with_suffix('.md').write_text(page, encoding='utf-8')


if __name__ == '__main__': main()
