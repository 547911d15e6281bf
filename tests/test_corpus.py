"A sample of the corpus of `benchmarks/cases.py`: image files and arrays, and data that `check` looks at; the whole takes many minutes."
import cases
import pytest
from forked import Outcome
from mstoolkit.cli import main

SAMPLE = [c for c in cases.cases if c.group in ('images', 'arrays') and ('read' in c.name or 'refused' in c.name)
          or c.group in ('folders', 'tables', 'lists', 'class lists') and 'check' in c.name]


def test_the_sample_is_large(): assert len(SAMPLE) > 150 and len(cases.cases) > 300


@pytest.mark.filterwarnings('ignore') # of Pillow, about odd files: a warning is not an error to who runs it
@pytest.mark.parametrize('c', SAMPLE, ids=lambda c: f'{c.group}: {c.name}')
def test_case(c, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = c.do(tmp_path)
    code = made() if callable(made) else main([str(o) for o in made])
    verdict, why = cases.judge(c, tmp_path, Outcome(code, *capfd.readouterr(), 0, False))
    assert verdict == 'ok', f'{verdict}: {why}'
