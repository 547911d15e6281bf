"torch.compile is tried where it may pay, kept where it does, given up for good where it does not; nothing else knows of it."
import json
import tomllib
from math import inf

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from mstoolkit.ablation import Study, run_study
from mstoolkit.callback import speed
from mstoolkit.callback.budget import Budget
from mstoolkit.callback.speed import Arithmetic
from mstoolkit.classifier import Classifier, ModelHeader
from mstoolkit.cli import main
from mstoolkit.models import arithmetic
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.models.split import stage_splitter
from mstoolkit.recipe import Recipe, load_recipe
from mstoolkit.runs import read_study
from mstoolkit.train import resume_run, train
from test_checkpoint import KillAt, Killed, assert_same_runs
from tiny import Items

FP32 = [('fp32', 'contiguous'), ('fp32', 'channels-last')]


@pytest.fixture
def learn(tmp_path):
    torch.manual_seed(0)
    ds = Items((torch.randn(3, 32, 32), i % 5) for i in range(16))
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu', num_workers=0)
    model = multiscale_model('test_resnet', 'gated', 5, pretrained=False)
    learn = Learner(dls, model, CrossEntropyLossFlat(), path=tmp_path, splitter=stage_splitter)
    with learn.no_bar(), learn.no_logging(): yield learn


@pytest.fixture
def compiler(monkeypatch):
    "A compiler that counts its work, and a stopwatch that shows what a test wants of what it made."
    made, calls = [], []
    def compiled_call(model, **options):
        made.append(options)
        def call(*args):
            calls.append(model.training)
            return model._call_impl(*args)
        return call
    def show(plain=1., compiled=.5):
        real = arithmetic.time_ways
        def shown(step, ways, n, **kw):
            if ways != ['plain', 'compiled']: return real(step, ways, n, **kw)
            for w in ways: step(w)
            return dict(plain=[plain]*n, compiled=[compiled]*n)
        monkeypatch.setattr(arithmetic, 'time_ways', shown)
        monkeypatch.setattr(speed, 'trial', lambda x, n, k, share: (x, 1))
        monkeypatch.setattr(speed, 'compiled_call', compiled_call)
        monkeypatch.setattr(speed, 'cannot_compile', lambda device: '')
        monkeypatch.setattr('mstoolkit.models.arithmetic.cpu_has_bf16', lambda: False)
        return made, calls
    return show


def long(*args, **kw): return Arithmetic(*args, share=50., compile_seconds=0., **kw)
def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# the recipe

@pytest.mark.parametrize('written,value', [('true', 'on'), ('false', 'off'), ('"on"', 'on'), ('"auto"', 'auto')])
def test_recipe_files_as_they_were_written_once(written, value, tmp_path):
    (tmp_path/'r.toml').write_text(f'compile = {written}\n')
    assert load_recipe(tmp_path/'r.toml').compile == value and f'compile = "{value}"' in load_recipe(tmp_path/'r.toml').to_toml()
    assert tomllib.loads(Recipe().to_toml())['compile'] == 'auto'


def test_the_command_line(image_folder, tiny_options, tmp_path, capsys):
    for given, words in (['--compile', 'yes'], "unknown value of recipe field 'compile': 'yes'"), (['--no-compile'], 'No such option'):
        assert main(['train', str(image_folder), *tiny_options, *given, '--out', str(tmp_path/'run')]) == 2
        assert words in ' '.join(capsys.readouterr().err.split())


def test_a_study_compiles_nothing(image_folder, tiny, tmp_path):
    run_study(Study('s', dict(a={}, b=dict(head='plain'))), image_folder, tmp_path/'s', recipe=Recipe(**tiny), seeds=1)
    assert Recipe.from_dict(tomllib.loads(read_study(tmp_path/'s')['base'])).compile == 'off'


# the choice

@pytest.mark.parametrize('plain,compiled,kept', [(1., .8, True), (1., .97, False), (.8, 1., False)])
def test_the_stopwatch_decides(plain, compiled, kept, learn, compiler, capsys):
    made, calls = compiler(plain, compiled)
    learn.fit(1, cbs=(cb := long()))
    tried = len(calls)
    learn.fit(1, cbs=cb)
    lines = capsys.readouterr().out.splitlines()
    assert cb.compiled == kept and made == [dict(dynamic=False)] and len(lines) == 1
    assert lines[0].startswith('arithmetic: fp32 ') and f'a batch of 8: plain {plain:.3g} s, compiled {compiled:.3g} s)' in lines[0]
    assert ('; compiled in' in lines[0]) == kept and ('; not compiled, tried in' in lines[0]) == (not kept)
    assert len(calls) == tried + 2*kept and all(calls)  # training batches, and no others
    assert learn.model._compiled_call_impl is None and cb.state_dict()['compiled'] == kept


@pytest.mark.parametrize('given', [dict(precision='fp32'), dict(compile='off'), dict(share=.02), dict(compile_seconds=1e9)])
def test_where_it_is_not_tried(given, learn, compiler):
    made, calls = compiler()
    cb = Arithmetic(**{**dict(share=50., compile_seconds=0.), **given})
    learn.fit(1, cbs=cb)
    assert not made and not calls and not cb.compiled


def test_frozen_phases_and_growing_images_are_not_compiled(learn, compiler):
    made, calls = compiler()
    class GrowingSize(Callback): pass
    cb = long()
    learn.freeze()
    learn.fit(1, cbs=cb)
    assert cb.compiled is None and not made
    learn.unfreeze()
    learn.fit(1, cbs=[cb, GrowingSize()])
    assert cb.compiled is None and not made
    learn.fit(1, cbs=cb)
    assert cb.compiled and made


@pytest.mark.parametrize('minutes,n', [(60, 0), (80, 1)])
def test_a_budget_must_be_long(minutes, n, learn, compiler):
    "75 minutes make 90 seconds 2 %."
    made, calls = compiler()
    seen = []
    class Look(Callback):
        order = 50
        def after_batch(self):
            if self.training: seen.append(self.budget.timed); raise KeyboardInterrupt
    cb = Arithmetic()
    cb.batch_seconds, cb.chosen = .5, FP32[0]
    budget = Budget(minutes)
    with pytest.raises(KeyboardInterrupt): learn.fit(Budget.most, cbs=[cb, budget, Look()])
    assert len(made) == n and (seen[0] is None) == bool(n)  # the batch of the trial does not count as the machine's pace


def test_measuring_leaves_no_trace(learn, compiler):
    made, calls = compiler(1., 2.)
    runs, start = [], weights(learn)
    for cb in long(), long(compile='off'):
        learn.model.load_state_dict(start)
        torch.manual_seed(1); learn.opt = None; learn.dls.train.rng.seed(1)
        cb.chosen = FP32[0]
        learn.fit(2, 1e-2, cbs=cb)
        runs.append((weights(learn), torch.get_rng_state()))
    assert len(made) == 1 and same(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_no_compiler(learn, compiler, monkeypatch, capsys):
    made, _ = compiler()
    monkeypatch.setattr(speed, 'cannot_compile', arithmetic.cannot_compile)
    monkeypatch.setenv('CXX', 'no-such-compiler -O2')
    learn.fit(1, cbs=(cb := long(compile='on')))
    out = capsys.readouterr().out
    assert not made and cb.compiled is False and out.count('\n') == 1 and 'not compiled: there is no C++ compiler no-such-compiler' in out
    assert arithmetic.cannot_compile('mps') == 'not on mps'


# with torch's own machinery

@pytest.fixture
def backend(monkeypatch):
    "A backend of torch.compile that counts graphs and their runs."
    made, ran = [], []
    def eager(graph, inputs):
        made.append(graph)
        def run(*args): ran.append(len(made)); return graph(*args)
        return run
    compiled = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: compiled(f, backend=eager, **kw))
    monkeypatch.setattr(speed, 'cannot_compile', lambda device: '')
    monkeypatch.setattr(arithmetic, 'cannot_compile', lambda device: '')
    torch.compiler.reset()
    yield made, ran
    torch.compiler.reset()


@pytest.mark.filterwarnings('ignore')  # the compiler's own
@pytest.mark.parametrize('compile', ['auto', 'on'])
def test_a_compiled_fit(compile, learn, backend, monkeypatch, tmp_path):
    "Training runs what was compiled, validation and everybody else does not; names and weights are those of a plain fit."
    made, ran = backend
    monkeypatch.setattr(arithmetic, 'fastest', lambda took, **kw: list(took)[-1])
    runs, start = [], weights(learn)
    for cb in long(compile='off'), long(compile=compile):
        learn.model.load_state_dict(start)
        torch.manual_seed(1); learn.opt = None; learn.dls.train.rng.seed(1)
        cb.chosen, cb.batch_seconds = FP32[0], .1
        learn.fit(2, 1e-2, cbs=cb)
        runs.append(weights(learn))
    assert cb.compiled and same(*runs)
    graphs, n = len(made), len(ran)
    assert graphs and n >= 5*graphs  # one to compile, four batches
    learn.add_cb(cb)
    learn.get_preds()
    learn.model.eval()(torch.randn(2, 3, 32, 32))
    assert (len(made), len(ran)) == (graphs, n)
    learn.export('learner.pkl')


@pytest.mark.filterwarnings('ignore')
def test_another_size_is_not_compiled_again(backend):
    made, ran = backend
    net = multiscale_model('test_resnet', 'gated', 5, pretrained=False).eval()
    call = arithmetic.compiled_call(net, dynamic=False)
    with torch.inference_mode():
        call(torch.randn(4, 3, 32, 32))
        n, run = len(ran), arithmetic.once_compiled(call)
        for bs, size in (4, 32), (3, 32), (4, 64), (4, 32):
            x = torch.randn(bs, 3, size, size)
            assert torch.equal(run(x), net(x))
    assert len(ran) == 3*n and net._compiled_call_impl is None


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('compile', ['auto', 'on'])
def test_what_no_compiler_takes_goes_on_plain(compile, learn, monkeypatch, capsys):
    def broken(graph, inputs): raise NotImplementedError('no code for this\nand a page of why')
    compiled = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kw: compiled(f, backend=broken, **kw))
    monkeypatch.setattr(speed, 'cannot_compile', lambda device: '')
    cb = long(compile=compile)
    cb.chosen, cb.batch_seconds = FP32[0], .1
    learn.fit(1, cbs=cb)
    out = capsys.readouterr().out
    assert cb.compiled is False and out.count('\n') == 1 and 'not compiled: ' in out and 'no code for this' in out and 'page' not in out


# resume, and what is written down

@pytest.mark.parametrize('kept', [True, False])
def test_a_resumed_run_keeps_the_choice(kept, compiler, image_folder, tiny, tmp_path, monkeypatch, capsys):
    made, calls = compiler(1., .5 if kept else 2.)
    monkeypatch.setattr('mstoolkit.train._draw', lambda *a: None)
    monkeypatch.setattr('mstoolkit.train.Arithmetic', long)
    r = Recipe(**{**tiny, 'epochs': 3}, plateau_patience=-1, cutmix=0., memory_format='contiguous')
    whole = train(r, image_folder, tmp_path/'a')
    with pytest.raises(Killed): train(r, image_folder, tmp_path/'b', cbs=[KillAt(1, 1)])
    del made[:], calls[:]
    capsys.readouterr()
    again = resume_run(tmp_path/'b')
    assert_same_runs(again, whole)
    assert len(made) == kept and bool(calls) == kept
    assert capsys.readouterr().out.count('; compiled in') == kept
    envs = [json.loads((tmp_path/o/'environment.json').read_text()) for o in 'ab']
    assert all(e['compiled'] == kept and e['compile']['plain'] == 1. for e in envs)


def test_a_run_of_an_earlier_version_goes_on(image_folder, tiny, tmp_path, monkeypatch):
    "Its recipe says false, and so does its environment."
    monkeypatch.setattr('mstoolkit.train._draw', lambda *a: None)
    with pytest.raises(Killed): train(Recipe(**{**tiny, 'epochs': 2}, compile='off'), image_folder, tmp_path/'b', cbs=[KillAt(1, 1)])
    for name in 'recipe.toml', 'environment.json':
        f = tmp_path/'b'/name
        f.write_text(f.read_text().replace('compile = "off"', 'compile = false').replace('"compile": "off"', '"compile": "False"'))
    assert len(resume_run(tmp_path/'b').run_history.rows) == 2


# predictions

@pytest.fixture
def clf():
    model = multiscale_model('test_resnet', 'gated', 3, pretrained=False).eval()
    return Classifier(model, ModelHeader(config=model.config, classes=['a', 'b', 'c'], size=32, mean=(.5,)*3, std=(.25,)*3))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('precision,each,kept', [('auto', 1., True), ('auto', 1., False), ('auto', 1e-3, None), ('fp32', 1., None)])
def test_predictions(precision, each, kept, clf, backend, monkeypatch, capsys):
    "1,000 images at a second each are worth it; fp32 promises what it promised."
    made, ran = backend
    x = torch.randn(16, 3, 32, 32)
    monkeypatch.setattr('mstoolkit.models.arithmetic.cpu_has_bf16', lambda: False)
    monkeypatch.setattr('mstoolkit.models.fold.rounds_within', lambda n, k, share: 1)
    monkeypatch.setattr('mstoolkit.models.fold.time_ways', lambda step, ways, n: {w: [16*each] for w in ways})
    monkeypatch.setattr(arithmetic, 'fastest', lambda took, **kw: list(took)[-1 if kept else 0])
    run = clf.network(x, 1000, precision=precision)
    n, err = len(ran), capsys.readouterr().err
    got = run(x)
    assert bool(made) == (kept is not None) and (len(ran) > n) == bool(kept)
    assert torch.allclose(got, clf.model(x), atol=1e-5) and clf.model._compiled_call_impl is None
    assert err.count('\n') == (precision == 'auto') and ('; compiled in' in err) == bool(kept) and ('; not compiled, tried in' in err) == (kept is False)


def test_predictions_without_a_compiler(clf, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    run, said = arithmetic.compiled_to_predict(clf.model, torch.randn(8, 3, 32, 32), FP32[0], inf)
    assert run is clf.model and said == 'not compiled: there is no C++ compiler no-such-compiler'


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_inductor_itself(clf, image_folder, tiny, tmp_path):
    learn = train(Recipe(**tiny, compile='on'), image_folder, tmp_path/'run')
    assert len(learn.run_history.rows) == 1 and Classifier.load(tmp_path/'run').header.classes == ['2', '10', 'red apple']
    assert learn.arithmetic.compiled and learn.arithmetic.tried['compiling'] > 0
    x = torch.randn(16, 3, 32, 32)
    run, said = arithmetic.compiled_to_predict(clf.model, x, FP32[0], inf)
    torch.testing.assert_close(arithmetic.run_in(FP32[0], run, x), clf.model(x), rtol=1e-4, atol=1e-5)
    assert 'compiled' in said and 'error' not in said
