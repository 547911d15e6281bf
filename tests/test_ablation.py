"Studies: cells, resumption, failures, tables; the same numbers however they are run."
import _thread
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from mstoolkit import ablation
from mstoolkit.ablation import Study, format_table, grid, load_study, plot_study, run_study, studies, study_jobs, study_table
from mstoolkit.cli import main
from mstoolkit.data.make import make_digits, make_navon
from mstoolkit.data.sources import data_source
from mstoolkit.recipe import Recipe
from mstoolkit.runs import Run, read_failures, read_study
from test_report import fake_run

HEADS = Study('heads', grid(head=['plain', 'gated']))
BASE = Recipe(backbone='test_resnet', pretrained=False, size=32, bs=64, epochs=1, lr=3e-3, opt='adamw', augment='none', num_workers=0,
              schedule='one-cycle', cutmix=0., device='cpu')


@pytest.fixture(scope='module')
def navon(tmp_path_factory): return make_navon(tmp_path_factory.mktemp('d')/'navon', n_train=100, n_valid=200, n_test=10, size=48)


@pytest.fixture
def fake_train(monkeypatch, navon):
    "Training that only leaves a run folder; `calls` tells which."
    calls = []
    def train(r, source, out, **kw):
        calls.append((r.head, r.seed))
        if r.lr == 1.: raise ValueError('this rate\nis absurd')
        assert set(pd.read_csv(data_source(source).csv).split) == {'train', 'valid'}
        fake_run(out, navon, seed=10*r.seed+len(r.head), model=False, name=r.name, head=r.head, right=.6 if r.head == 'plain' else .9)
    monkeypatch.setattr(ablation, 'train', train)
    return calls


def test_named_studies_are_the_reports():
    assert {k: len(s.cells) for k, s in studies.items()} == {'loss-mix': 4, 'fusion': 6, 'mix-prob': 6, 'backbones': 4}
    for s in studies.values():
        jobs = study_jobs(s, Recipe(), 2, Path('x'))
        assert len({j.folder for j in jobs}) == len(jobs) == 2*len(s.cells)
        assert [j.recipe.seed for j in jobs] == [0]*len(s.cells) + [1]*len(s.cells)
    p = studies['mix-prob'].cells['p 0.4']
    assert (p['cutmix'], p['mixup'], p['cutmix_alpha'], p['mixup_alpha']) == (.4, .4, (.8, 1.2), (.4, .6))


def test_a_study_is_run_and_judged(tmp_path, navon, fake_train, capsys):
    df = run_study(HEADS, navon, tmp_path/'s', recipe=BASE, seeds=3)
    assert fake_train == [('plain', 0), ('gated', 0), ('plain', 1), ('gated', 1), ('plain', 2), ('gated', 2)]
    assert all(o in read_study(tmp_path/'s')['base'] for o in ('precision = "fp32"', 'memory_format = "contiguous"'))  # no stopwatch decides
    assert df.verdict.to_dict() == dict(plain='baseline', gated='better')
    assert '6/6 gated, seed 2: accuracy' in capsys.readouterr().out
    assert {o.name for o in (tmp_path/'s').iterdir()} == {'study.json', 'data.toml', 'images.csv', 'images.toml', 'failures.json', 'plain', 'gated', 'figures',
                                                         'table.txt', 'table.md', 'table.tex', 'table.csv'}
    assert len(plot_study(tmp_path/'s').axes) == 2 and len(plot_study(df).axes) == 2
    assert study_table(tmp_path/'s', baseline='gated').verdict['plain'] == 'worse'
    more = run_study(HEADS, navon, tmp_path/'s', recipe=BASE, seeds=4)      # more seeds may be added
    assert fake_train[6:] == [('plain', 3), ('gated', 3)] and more.seeds.tolist() == [4, 4]


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, navon, fake_train, monkeypatch):
    whole = run_study(HEADS, navon, tmp_path/'whole', recipe=BASE, seeds=2)
    train, n = ablation.train, len(fake_train)
    def interrupted(r, source, out, **kw):
        if len(fake_train) == n+2:
            Path(out).mkdir(parents=True); (Path(out)/'recipe.toml').write_text('half')
            raise KeyboardInterrupt
        train(r, source, out, **kw)
    monkeypatch.setattr(ablation, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt): run_study(HEADS, navon, tmp_path/'s', recipe=BASE, seeds=2)
    monkeypatch.setattr(ablation, 'train', train)
    df = run_study(HEADS, navon, tmp_path/'s', recipe=BASE, seeds=2)
    assert fake_train[n:] == [('plain', 0), ('gated', 0), ('plain', 1), ('gated', 1)]    # nothing twice
    pd.testing.assert_frame_equal(df, whole)
    assert not list((tmp_path/'s').rglob('.seed*'))


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path, navon, fake_train, capsys):
    study = Study('rates', dict(plain=dict(head='plain'), absurd=dict(lr=1.), gated=dict(head='gated')))
    df = run_study(study, navon, tmp_path/'s', recipe=BASE, seeds=2)
    assert json.loads((tmp_path/'s'/'failures.json').read_text()) == {f'absurd, seed {i}': 'ValueError: this rate is absurd' for i in (0, 1)}
    assert list(df.index) == ['plain', 'gated'] and 'this rate is absurd' in capsys.readouterr().out
    with pytest.raises(ValueError, match='no run of the study'):
        run_study(Study('b', {k: dict(lr=1., head=k) for k in ('plain', 'gated')}), navon, tmp_path/'b', recipe=BASE, seeds=1)


def test_a_study_with_a_failed_run_says_so_everywhere(tmp_path, navon, fake_train, monkeypatch, capsys):
    HEADS_TOML = '[cells.plain]\nhead = "plain"\n[cells.gated]\nhead = "gated"\n'
    (tmp_path/'s.toml').write_text(HEADS_TOML)
    train, broken = ablation.train, {('gated', 1)}
    def fails(r, *args, **kw):
        if (r.head, r.seed) in broken: raise OSError('the disk is gone')
        train(r, *args, **kw)
    monkeypatch.setattr(ablation, 'train', fails)
    words = ['ablate', str(navon), '--study', str(tmp_path/'s.toml'), '--out', str(tmp_path/'study'), '--seeds', '2', '--backbone', 'test_resnet']
    assert main(words) == 1
    said = capsys.readouterr()
    assert 'failed, and not counted: gated, seed 1: OSError: the disk is gone' in said.out
    assert '1 run failed: gated, seed 1; the same command tries again' in said.err
    assert 'not counted: gated, seed 1' in (tmp_path/'study'/'table.txt').read_text()
    broken.clear()
    assert main(words) == 0 and 'not counted' not in capsys.readouterr().out
    assert 'not counted' not in (tmp_path/'study'/'table.txt').read_text()


def test_a_folder_belongs_to_one_study(tmp_path, navon, fake_train):
    run_study(HEADS, navon, tmp_path/'s', recipe=BASE, seeds=1)
    with pytest.raises(ValueError, match='holds another study'): run_study(studies['fusion'], navon, tmp_path/'s', recipe=BASE)
    (tmp_path/'other').mkdir(); (tmp_path/'other'/'a').write_text('')
    with pytest.raises(ValueError, match='already exists'): run_study(HEADS, navon, tmp_path/'other', recipe=BASE)
    with pytest.raises(ValueError, match='unknown cell'): run_study(HEADS, navon, tmp_path/'s', recipe=BASE, baseline='x')
    with pytest.raises(FileNotFoundError, match='is not a study'): study_table(navon)


def test_a_study_is_refused_other_data(tmp_path, navon, fake_train):
    run_study(HEADS, navon, tmp_path/'s', recipe=BASE, seeds=1)
    shutil.copytree(navon, tmp_path/'other')
    n = len(fake_train)
    for data, more in ((tmp_path/'other', {}), (navon, dict(valid='none')), (navon, dict(folds=3))):
        with pytest.raises(ValueError, match='holds this study on other data'): run_study(HEADS, data, tmp_path/'s', recipe=BASE, seeds=2, **more)
    assert len(fake_train) == n                                             # said before anything was trained
    rows = [(str(f), f.parent.name, split) for split in ('train', 'val') for f in sorted((navon/split).glob('*/*.png'))]
    table = pd.DataFrame(rows, columns=['path', 'label', 'split'])
    df = run_study(HEADS, navon, tmp_path/'t', recipe=BASE, seeds=1, csv=table)  # a table in memory is written down
    pd.testing.assert_frame_equal(run_study(HEADS, navon, tmp_path/'t', recipe=BASE, seeds=1, csv=table), df)


def test_a_baseline_without_a_finished_run_is_an_error(tmp_path, navon, fake_train):
    study = Study('rates', dict(absurd=dict(lr=1.), plain=dict(head='plain'), gated=dict(head='gated')))
    with pytest.raises(ValueError, match="the baseline 'absurd' has no finished run"): run_study(study, navon, tmp_path/'s', recipe=BASE, seeds=2)
    assert list(study_table(tmp_path/'s', baseline='plain').index) == ['plain', 'gated']


def test_a_dry_run_writes_nothing(tmp_path, navon, capsys):
    assert run_study(HEADS, navon, tmp_path/'s', recipe=BASE, seeds=2, dry_run=True) is None
    out = capsys.readouterr().out
    assert 'plain, seed 1' in out and '4 of 4 runs to do' in out and not (tmp_path/'s').exists()
    run_study(HEADS, navon, tmp_path/'s', recipe=replace(BASE, epochs=0, minutes=3), seeds=2, dry_run=True)
    assert 'in all about 12 min' in capsys.readouterr().out


@pytest.mark.parametrize('text,what', [('a = 1', "unknown key of a study file"), ('name = "x"', 'needs either'), ('= 1', 'is not TOML'),
                                       ('[cells.a]\nhead = "plain"', 'needs? 2 or more'), ('[cells.a]\nseed = 1\n[cells.b]\n', 'same seeds'),
                                       ('[cells."a/b"]\n[cells.b]\n', "cannot name a cell")])
def test_bad_study_files_are_named(tmp_path, text, what):
    (tmp_path/'s.toml').write_text(text)
    with pytest.raises(ValueError, match=what): load_study(tmp_path/'s.toml')


def test_tables(tmp_path, navon, fake_train):
    df = run_study(Study('x', {'a|b': dict(head='plain'), 'c_d': dict(head='gated')}), navon, tmp_path/'s', recipe=BASE, seeds=2)
    md = format_table(df, 'markdown').splitlines()
    assert len(md) == 4 and all(len(o.replace(r'\|', '').split('|')) == 10 for o in md) and r'a\|b' in md[2]
    tex = format_table(df, 'latex')
    assert r'c\_d' in tex and r'95 \% interval' in tex and tex.count(r'\\') == 3 and tex.endswith('\\end{tabular}\n')
    (tmp_path/'t.csv').write_text(format_table(df, 'csv'))
    assert pd.read_csv(tmp_path/'t.csv', index_col=0).accuracy.tolist() == pytest.approx(df.accuracy.tolist())
    with pytest.raises(ValueError, match='unknown kind of table'): format_table(df, 'html')
    assert ablation._tex(r'a_b & 5 % ~ {x} \y ^2 $') == r'a\_b \& 5 \% \textasciitilde{} \{x\} \textbackslash{}y \textasciicircum{}2 \$'


# Processes side by side: a stand-in for training that sleeps

SLEEPER = '''import json, os, sys, time
from pathlib import Path
from mstoolkit.core import write_text
parent, folder = sys.argv[1:3]
write_text(Path(folder).with_suffix('.started'), json.dumps(dict(pid=os.getpid(), gpu=os.environ.get('CUDA_VISIBLE_DEVICES'))))
if 'absurd' in folder: sys.exit('this rate is absurd')
time.sleep(float(os.environ['SLEEP']))
'''


def sleepers(tmp_path, monkeypatch, n=4, seconds=.2, **recipe):
    "Jobs whose processes only sleep."
    monkeypatch.setattr(ablation, '_program', SLEEPER)
    monkeypatch.setenv('SLEEP', str(seconds))
    cells = ['absurd' if i == 1 else 'c' for i in range(n)]
    for c in cells: (tmp_path/c).mkdir(exist_ok=True)
    return [ablation.Job(c, replace(BASE, seed=i, **recipe), tmp_path/c/f'seed-{i}') for i, c in enumerate(cells)]


def started(jobs): return [json.loads(f.read_text()) for j in jobs if (f := j.folder.with_suffix('.started')).exists()]


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


def test_processes_take_the_gpus_in_turn_and_say_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,7')
    jobs = sleepers(tmp_path, monkeypatch, device='auto')
    ended = dict(ablation._side_by_side(jobs, 2, (tmp_path/'t.toml', 1)))
    assert [ended[j] for j in jobs] == [None, 'this rate is absurd', None, None]
    gpus = [o['gpu'] for o in started(jobs)]
    assert set(gpus[:2]) == {'4', '7'} and set(gpus) == {'4', '7'}
    jobs = sleepers(tmp_path, monkeypatch, n=1, device='cuda:1')    # a GPU of the user's own choice
    assert dict(ablation._side_by_side(jobs, 2, (tmp_path/'t.toml', 1)))
    assert started(jobs)[0]['gpu'] == '4,7'
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert ablation._gpus(3) == ([str(i % n) for i in range(3)] if (n := torch.cuda.device_count()) else ['']*3)


def test_runs_of_several_processes_ask_for_what_one_machine_has(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,2,3,4')
    assert ablation._gpus(3, 2) == ['0,1', '2,3', '0,1'] and ablation._gpus(2, 8) == ['0,1,2,3,4']*2
    assert ablation._room([(8, 2), (32, 4), (64, 0)], 16, 1) == (4, 1) and ablation._room([(8, 2), (32, 4)], 16, 2) == (8, 2)
    assert ablation._room([(2, 0), (16, 0)], 8, 2) == (8, 0) and ablation._room([(2, 0), (4, 0)], 8, 1) == (4, 0)
    assert ablation._room([(2, 1), (64, 8)], 64, 8) == (64, 8)
    with pytest.raises(ValueError, match='has more than 4'): ablation._room([(8, 2), (32, 4)], 16, 5)


@pytest.mark.slow
@pytest.mark.parametrize('how', [dict(), dict(ray=True)])
def test_each_run_in_several_processes(tmp_path, how):
    if 'ray' in how: pytest.importorskip('ray')
    data, kw = make_digits(tmp_path/'digits'), dict(seeds=1, threads=2)
    a = run_study(HEADS, data, tmp_path/'a', recipe=BASE, **kw)
    b = run_study(HEADS, data, tmp_path/'b', recipe=BASE, processes=2, **how, **kw)
    assert (a.accuracy - b.accuracy).abs().max() < .1 and list(a.index) == list(b.index)
    envs = [Run(tmp_path/'b'/c/'seed-0').env for c in HEADS.cells]
    assert [e['processes'] for e in envs] == [2]*len(envs) and all(e['threads'] == 1 for e in envs)
    absurd = run_study(Study('lr', {'good': {}, 'bad': dict(lr=1e30)}), data, tmp_path/'c', recipe=BASE, processes=2, **how, **kw)
    assert list(absurd.index) == ['good'] and 'nan' in read_failures(tmp_path/'c')['bad, seed 0'].lower()


def test_an_interruption_ends_the_processes(tmp_path, monkeypatch):
    jobs = sleepers(tmp_path, monkeypatch, seconds=60)
    runs = ablation._side_by_side(jobs, 2, (tmp_path/'t.toml', 1))
    next(runs)                                       # the absurd one has ended
    while len(started([jobs[0]])) < 1: time.sleep(.05)
    runs.close()
    assert not any(alive(o['pid']) for o in started(jobs)) and len(started(jobs)) <= 2


@pytest.mark.skipif(os.name != 'posix', reason="elsewhere a process is not given another parent")
def test_a_run_ends_with_the_process_that_started_it(tmp_path):
    code = ('import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())]); '
            'print(p.pid, flush=True); time.sleep(60)')
    child = ('import sys, time; from mstoolkit import ablation; ablation.run_job = lambda *_: time.sleep(60); '
             'sys.argv[2:] = [*"abc", 1]; exec(ablation._program)')
    p = subprocess.Popen([sys.executable, '-c', code, child], stdout=subprocess.PIPE, text=True)
    with p.stdout:
        assert alive(int(p.stdout.readline()))
        p.kill(); p.wait()
        t0 = time.time()
        p.stdout.read()                              # ends when the child, which has the pipe too, has ended
    assert time.time() - t0 < 45


@pytest.mark.slow
def test_an_interrupted_run_goes_on_after_its_last_epoch(tmp_path, monkeypatch):
    data, base, train = make_digits(tmp_path/'digits'), replace(BASE, epochs=4), ablation.train
    def interrupted(r, source, out, **kw):
        def watch():
            while not (out/'checkpoint'/'state.pt').exists(): time.sleep(.01)
            _thread.interrupt_main()
        threading.Thread(target=watch, daemon=True).start()
        train(r, source, out, **kw)
    monkeypatch.setattr(ablation, 'train', interrupted)
    with pytest.raises(KeyboardInterrupt): run_study(HEADS, data, tmp_path/'a', recipe=base, seeds=1, threads=1)
    assert (tmp_path/'a'/'plain'/'.seed-0'/'checkpoint'/'state.pt').exists() and not (tmp_path/'a'/'plain'/'seed-0').exists()
    monkeypatch.setattr(ablation, 'train', train)
    a, b = (run_study(HEADS, data, tmp_path/o, recipe=base, seeds=1, threads=1) for o in 'ab')
    pd.testing.assert_frame_equal(a, b)
    assert Run(tmp_path/'a'/'plain'/'seed-0').env['resumed']
    weights = [load_file(tmp_path/o/'plain'/'seed-0'/'model.safetensors') for o in 'ab']
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize('how', [dict(jobs=2), dict(ray=True)])
def test_side_by_side_gives_the_same_numbers(tmp_path, how):
    if 'ray' in how: pytest.importorskip('ray')
    data = make_digits(tmp_path/'digits')
    a = run_study(HEADS, data, tmp_path/'a', recipe=BASE, seeds=2, threads=1)
    b = run_study(HEADS, data, tmp_path/'b', recipe=BASE, seeds=2, threads=1, **how)
    pd.testing.assert_frame_equal(a, b)
