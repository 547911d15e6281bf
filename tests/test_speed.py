"Arithmetic is chosen by what was measured, once, and a chosen one is the named one; what predicts faster predicts the same."
import sys

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from mstoolkit.callback import speed
from mstoolkit.callback.speed import Arithmetic
from mstoolkit.core import keep_freed_memory
from mstoolkit.models import arithmetic
from mstoolkit.models.arithmetic import layouts
from mstoolkit.models.fusion import multiscale_model


@pytest.fixture
def learn(tmp_path):
    torch.manual_seed(0)
    ds = [(torch.randn(3, 32, 32), i % 5) for i in range(16)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu', num_workers=0)
    return Learner(dls, multiscale_model('test_resnet', 'gated', 5, pretrained=False), CrossEntropyLossFlat(), path=tmp_path)


def conv(learn): return learn.model[1].convs[0].weight


PLAIN, LAST, BF16 = ('fp32', 'contiguous'), ('fp32', 'channels-last'), ('bf16', 'contiguous')
WAYS = [PLAIN, LAST, BF16, ('bf16', 'channels-last')]


def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture
def stopwatch(monkeypatch):
    "A stopwatch that shows what a test wants."
    def show(took):
        calls = []
        monkeypatch.setattr(speed, 'time_ways', lambda step, ways, n, **kw: calls.append(n) or {w: took[w] for w in ways if w in took})
        monkeypatch.setattr('mstoolkit.models.arithmetic.cpu_has_bf16', lambda: True)
        return calls
    return show


@pytest.mark.parametrize('plain,last,bf16,chosen', [(1., .5, 1., LAST), (1., .97, .99, PLAIN), (.5, 1., 1., PLAIN), (1., .8, .5, BF16), (1., .8, .78, LAST)])
def test_auto_keeps_the_fastest(plain, last, bf16, chosen, learn, stopwatch, capsys):
    calls = stopwatch({PLAIN: [plain]*3, LAST: [last]*3, BF16: [bf16]*3})
    learn.fit(1, cbs=(cb := Arithmetic()))
    learn.fit(1, cbs=cb)
    out = capsys.readouterr().out
    assert cb.chosen == chosen and len(calls) == 1 and out.count(f"arithmetic: {' '.join(chosen)}") == 1
    assert conv(learn).is_contiguous(memory_format=layouts[chosen[1]])


def test_the_gain_that_is_asked_for_decides(learn, stopwatch):
    stopwatch({PLAIN: [1.], LAST: [.97], BF16: [2.]})
    learn.fit(1, cbs=(cb := Arithmetic(min_gain=.02)))
    assert cb.chosen == LAST  # 3 % are more than 2


def test_what_is_named_is_not_timed(learn, stopwatch):
    calls = stopwatch({})
    learn.fit(1, cbs=(cb := Arithmetic('bf16', 'contiguous')))
    assert cb.chosen == BF16 and not calls


def test_measuring_changes_no_weight_and_takes_no_draw(learn):
    before, stream = weights(learn), torch.get_rng_state()
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    took = arithmetic.time_ways(arithmetic.training_step(learn.model, x, WAYS), WAYS, 1000, give_up=1e9)
    assert set(took) == set(WAYS) and {len(o) for o in took.values()} == {4}
    assert torch.equal(torch.get_rng_state(), stream)  # dropout in the copies draws from a stream of its own
    assert same(weights(learn), before) and all(p.grad is None for p in learn.model.parameters())


@pytest.mark.parametrize('way', WAYS)
def test_a_chosen_way_is_the_named_one_to_the_last_bit(way, learn, stopwatch):
    "So a run with `auto` repeats once its choice is named."
    stopwatch({w: [.1 if w == way else 1.] for w in WAYS})
    runs, start = [], weights(learn)
    for cb in Arithmetic(), Arithmetic(*way), Arithmetic(*way):
        learn.model.load_state_dict(start)
        torch.manual_seed(1); learn.opt = None; learn.dls.train.rng.seed(1)
        learn.fit(2, 1e-2, cbs=cb)
        runs.append(weights(learn))
    assert cb.chosen == way and same(runs[0], runs[1]) and same(runs[1], runs[2])


def test_plain_arithmetic_changes_nothing(learn):
    runs, start = [], weights(learn)
    for cbs in [], [Arithmetic('fp32', 'contiguous')]:
        learn.model.load_state_dict(start)
        torch.manual_seed(1); learn.opt = None; learn.dls.train.rng.seed(1)
        learn.fit(2, 1e-2, cbs=cbs)
        runs.append(weights(learn))
    assert same(*runs)


def test_bf16_is_for_the_forward_pass(learn):
    "Weights, gradients, the loss and the prediction are float32; nothing stays switched on, even where a batch is broken off."
    seen = []
    class Look(Callback):
        order = 50
        def before_backward(self): seen.append((self.pred.dtype, self.loss.dtype, torch.is_autocast_enabled('cpu')))
        def before_step(self): seen.append({p.grad.dtype for p in self.model.parameters() if p.grad is not None})
    handle = learn.model[0].register_forward_hook(lambda m, x, out: seen.append({o.dtype for o in out}))
    learn.fit(1, cbs=[Look(), Arithmetic('bf16', 'contiguous')])
    assert seen[:3] == [{torch.bfloat16}, (torch.float32, torch.float32, False), {torch.float32}]
    handle.remove()
    learn.add_cb(Arithmetic('bf16', 'contiguous'))
    def broken(m, x, out): raise KeyboardInterrupt
    handle = learn.model[1].register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    handle.remove()
    learn.get_preds()
    assert not torch.is_autocast_enabled('cpu')


def test_a_short_fit_leaves_the_choice_to_a_longer_one(learn, monkeypatch):
    monkeypatch.setattr('mstoolkit.models.arithmetic.cpu_has_bf16', lambda: False)
    learn.add_cb(Arithmetic())
    learn.fit(1)
    assert learn.arithmetic.chosen is None and learn.arithmetic.way == PLAIN
    learn.arithmetic.share = 10.
    learn.fit(1)
    assert learn.arithmetic.chosen in (PLAIN, LAST)


@pytest.mark.parametrize('n,steps', [(0, 0), (399, 0), (400, 8), (1000, 20), (10**6, 20)])
def test_the_stopwatch_costs_its_share_at_the_most(n, steps):
    spent = []
    arithmetic.time_ways(spent.append, WAYS, n)
    assert len(spent) == steps <= .02*n


def test_a_hopeless_way_is_tried_once():
    clock, spent = [0.], []
    def step(way): spent.append(way); clock[0] += 10. if way == BF16 else 1.
    with pytest.MonkeyPatch.context() as m:
        m.setattr(arithmetic, 'perf_counter', lambda: clock[0])
        took = arithmetic.time_ways(step, [PLAIN, BF16], 10**4)
    assert spent.count(BF16) == 1 and list(took) == [PLAIN] and arithmetic.fastest(took) == PLAIN


@pytest.mark.parametrize('isa,has', [('', True), ('DEFAULT', True), ('AVX512_CORE_AMX', True), ('AVX512_CORE', False), ('avx2', False)])
def test_bf16_that_onednn_may_not_use_is_not_tried(isa, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True, raising=False)
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', isa)
    assert arithmetic.cpu_has_bf16() == has and ('bf16' in arithmetic.fast_precisions('cpu')) == has


def test_a_processor_without_bf16(learn, monkeypatch, capsys):
    monkeypatch.setattr(speed, 'cpu_has_bf16', lambda: False)
    monkeypatch.setattr('mstoolkit.models.arithmetic.cpu_has_bf16', lambda: False)
    assert arithmetic.ways('auto', 'auto', 'cpu') == [PLAIN, LAST]
    learn.fit(1, cbs=(cb := Arithmetic('bf16', 'contiguous')))
    assert cb.chosen == BF16 and 'no instructions for it' in capsys.readouterr().out


def test_lr_find_and_predictions_measure_nothing(learn, stopwatch):
    import fastai.callback.schedule  # noqa: F401  gives learners lr_find
    calls = stopwatch({})
    learn.add_cb(Arithmetic())
    learn.lr_find(num_it=6, show_plot=False)
    learn.get_preds()
    assert learn.arithmetic.chosen is None and not calls


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'channels-last'"): Arithmetic('fp32', 'channels_last')
    with pytest.raises(ValueError, match="unknown precision 'bfloat'"): Arithmetic('bfloat')


def test_fp16_needs_a_gpu(learn):
    with pytest.raises(ValueError, match="needs a CUDA GPU and the device is cpu: choose auto, fp32 or bf16"): learn.fit(1, cbs=Arithmetic('fp16'))


@pytest.mark.filterwarnings('ignore:CUDA is not available')
def test_two_that_decide_the_precision(learn):
    import fastai.callback.fp16  # noqa: F401  gives learners to_bf16
    learn.to_bf16()
    with pytest.raises(ValueError, match="leave out to_fp16 or to_bf16"): learn.fit(1, cbs=Arithmetic())


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="glibc's switch")
def test_keep_freed_memory(): assert keep_freed_memory() is True


@pytest.mark.slow
def test_a_compiled_run_trains_and_its_model_file_loads(image_folder, tiny, tmp_path):
    from mstoolkit.classifier import Classifier
    from mstoolkit.recipe import Recipe
    from mstoolkit.train import train
    learn = train(Recipe(**tiny, compile=True), image_folder, tmp_path/'run')
    assert len(learn.run_history.rows) == 1 and Classifier.load(tmp_path/'run').header.classes == ['2', '10', 'red apple']
