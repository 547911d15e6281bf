"Arithmetic is chosen by what was measured, once, and a chosen one is the named one; what predicts faster predicts the same."
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from mstoolkit.callback import speed
from mstoolkit.callback.speed import Arithmetic
from mstoolkit.classifier import Classifier, ModelHeader
from mstoolkit.cli import main
from mstoolkit.core import cpu_quota, keep_freed_memory, others_at_work, share_processors
from mstoolkit.data.core import image_dls
from mstoolkit.learner import fusion_learner
from mstoolkit.models import arithmetic
from mstoolkit.models.arithmetic import layouts
from mstoolkit.models.fold import fold_batchnorms
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.predict import predict_folder, predict_probs
from tiny import quiet, tiny_learner


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
        monkeypatch.setattr(speed, 'trial', lambda x, n, k, share: (arithmetic.few_images(x), 1))
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
    took = arithmetic.time_ways(arithmetic.training_step(learn.model, x, WAYS), WAYS, 4, give_up=1e9)
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
    with monkeypatch.context() as m:
        m.setattr(speed, 'training_step', lambda *a: pytest.fail('copied the network'))
        learn.add_cb(Arithmetic())
        learn.fit(1)
    assert learn.arithmetic.chosen is None and learn.arithmetic.way == PLAIN
    learn.arithmetic.share = 10.
    learn.fit(1)
    assert learn.arithmetic.chosen in (PLAIN, LAST)


@pytest.mark.parametrize('n,steps', [(0, 0), (399, 0), (400, 8), (1000, 20), (10**6, 20)])
def test_the_stopwatch_costs_its_share_at_the_most(n, steps):
    spent, rounds = [], arithmetic.rounds_within(n, len(WAYS), .02)
    if rounds: arithmetic.time_ways(spent.append, WAYS, rounds)
    assert len(spent) == steps <= .02*n and arithmetic.rounds_within(n, 1, .02) == 0  # nothing to choose


def test_a_hopeless_way_is_tried_once():
    clock, spent = [0.], []
    def step(way): spent.append(way); clock[0] += 10. if way == BF16 else 1.
    with pytest.MonkeyPatch.context() as m:
        m.setattr(arithmetic, 'perf_counter', lambda: clock[0])
        took = arithmetic.time_ways(step, [PLAIN, BF16], 4)
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
    learn.add_cb(cb := Arithmetic('bf16', 'contiguous'))
    learn.fit(1)
    learn.get_preds()
    assert cb.chosen == BF16 and capsys.readouterr().out.count('no instructions for it') == 1


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


# the frozen phase

def frozen(tmp_path, image_folder, **kw):
    "A learner after a frozen epoch, with the body's state before it and what each batch kept for its backward pass."
    torch.manual_seed(0)
    dls = image_dls(image_folder, size=32, bs=8, augment='none', num_workers=0, device='cpu')
    learn = fusion_learner(dls, 'test_resnet', pretrained=False, path=tmp_path, **kw)
    learn.freeze()
    before, grads = {k: v.clone() for k, v in learn.model[0].state_dict().items()}, []
    learn.model[0].register_forward_hook(lambda m, x, out: grads.append((m.training, any(o.requires_grad for o in out))) if learn.training else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn, before, grads


def test_a_frozen_body_runs_as_in_evaluation(image_folder, tmp_path):
    learn, before, grads = frozen(tmp_path, image_folder, train_bn=False)
    assert same(learn.model[0].state_dict(), before) and set(grads) == {(False, False)}
    assert all(p.grad is None for p in learn.model[0].parameters())
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not same(learn.model[0].state_dict(), before) and grads[-1] == (True, True)


def test_norms_that_learn_are_fastais(image_folder, tmp_path):
    "With `train_bn=True`, `FrozenBody` changes nothing."
    a, before, grads = frozen(tmp_path, image_folder)
    assert set(grads) == {(True, True)} and not same(a.model[0].state_dict(), before)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(speed.FrozenBody, 'before_train', lambda self: None)
        b, *_ = frozen(tmp_path, image_folder)
    assert same(weights(a), weights(b))


def test_any_model_may_be_frozen(tmp_path):
    learn = tiny_learner(tmp_path, cbs=speed.FrozenBody())
    with quiet(learn): learn.fine_tune(1)


# prediction

@pytest.fixture(scope='module')
def clf():
    "A network whose batch norms have something to fold."
    torch.manual_seed(0)
    model = multiscale_model('test_resnet', 'gated', 3, pretrained=False).train()
    for _ in range(3): model(torch.randn(8, 3, 32, 32)*2 + 1)
    return Classifier(model.eval(), ModelHeader(config=model.config, classes=['2', '10', 'red apple'], size=32, mean=(.5,)*3, std=(.25,)*3))


def norms(model): return sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize('name,left', [
    ('test_resnet', 0), ('test_efficientnet', 0), ('test_byobnet', 0), ('resnest14d', 0), ('resnet10t', 0), ('ghostnet_050', 0), ('hrnet_w18_small', 0),
    ('densenet121', 62), ('test_convnext', 0), ('test_vit', 0), ('mobileone_s0', 35), ('res2net50_14w_8s', 0)])
def test_folded_networks_compute_the_same(name, left):
    torch.manual_seed(0)
    model, x = multiscale_model(name, 'gated', 5, pretrained=False, img_size=96 if 'vit' in name else None), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for _ in range(2): model.train()(x*2 + 1)
    before, model = weights(SimpleNamespace(model=model)), model.eval()
    folded = fold_batchnorms(model, x)
    with torch.inference_mode(): want, got = model(x), folded(x)
    assert (got-want).abs().max() <= 1e-4*want.abs().max() and norms(folded) == left  # what fold_batchnorms tolerates
    assert same(weights(SimpleNamespace(model=model)), before)


class Odd(torch.nn.Module):
    "A norm that must stay: its convolution is read twice, run twice, or rectified in place before it."
    def __init__(self, how): super().__init__(); self.how, self.conv, self.bn = how, torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
    def forward(self, x):
        y = self.conv(x)
        if self.how == 'rectified': y.relu_()
        z = self.bn(y)
        return z + dict(read=y, run=self.conv(z), rectified=z)[self.how]


@pytest.mark.parametrize('how', ['read', 'run', 'rectified'])
def test_what_cannot_be_folded_is_left(how):
    torch.manual_seed(0)
    model, x = Odd(how), torch.randn(8, 3, 8, 8)
    model(x)
    folded = fold_batchnorms(model.eval(), x)
    with torch.inference_mode(): torch.testing.assert_close(folded(x), model(x))
    assert norms(folded) == 1


@pytest.mark.parametrize('precision', ['fp32', 'exact', 'auto', 'bf16'])
def test_predictions_of_a_network_made_ready(precision, clf, image_folder, stopwatch):
    "Labels are the same, probabilities to a millionth; the classifier stays as it was."
    files, before = sorted((image_folder/'train').rglob('*.png'))*10, weights(clf)
    chosen = ('bf16', 'channels-last') if precision in ('auto', 'bf16') else LAST
    calls = []
    def show(step, ways, n, **kw): calls.append(ways); return {w: [.1 if w == chosen else 1.] for w in ways}
    want = predict_probs(clf, files[:24], num_workers=0, device='cpu', precision='exact')[0].repeat(10, 1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr('mstoolkit.models.fold.rounds_within', lambda n, k, share: 1)
        m.setattr('mstoolkit.models.fold.time_ways', show)
        m.setattr('mstoolkit.models.arithmetic.cpu_has_bf16', lambda: True)
        got, good, bad = predict_probs(clf, files, bs=100, num_workers=0, device='cpu', precision=precision)
    assert good == files and not bad and same(weights(clf), before) and conv(clf).is_contiguous() and norms(clf.model) > 0
    assert calls == {'fp32': [[PLAIN, LAST]], 'exact': [], 'auto': [WAYS], 'bf16': [WAYS[2:]]}[precision]
    low = precision in ('auto', 'bf16')
    assert (got-want).abs().max() < (3e-2 if low else 1e-5)
    if not low: assert torch.equal(got.argmax(1), want.argmax(1))


def test_few_images_are_predicted_as_they_always_were(clf, image_folder):
    files = sorted((image_folder/'train').rglob('*.png'))
    a, b, c = (predict_probs(clf, files, num_workers=0, device='cpu', bs=8, **kw)[0] for kw in ({}, {}, dict(precision='exact')))
    assert torch.equal(a, b)
    torch.testing.assert_close(a, c)


@pytest.mark.parametrize('precision,what', [('fp16', 'needs a CUDA GPU'), ('int8', "unknown precision 'int8'")])
def test_precisions_there_are_not(precision, what, clf, image_folder):
    with pytest.raises(ValueError, match=what): predict_folder(clf, image_folder/'test', num_workers=0, device='cpu', precision=precision)


def test_precision_on_the_command_line(clf, image_folder, tmp_path, capsys):
    clf.save(tmp_path/'m.safetensors')
    for p in 'exact', 'bf16':
        assert main(['predict', str(tmp_path/'m.safetensors'), str(image_folder/'test'), '--out', str(tmp_path/f'{p}.csv'), '--device', 'cpu', '--precision', p]) == 0
    assert main(['predict', str(tmp_path/'m.safetensors'), str(image_folder/'test'), '--out', str(tmp_path/'c.csv'), '--precision', 'bf61']) == 2
    assert "did you mean 'bf16'" in capsys.readouterr().err


# processors

def test_what_the_user_has_set_is_kept():
    share_processors(env := {})
    assert int(env['GOMP_SPINCOUNT']) < 300_000 and 'OMP_WAIT_POLICY' not in env
    for own in ({'OMP_WAIT_POLICY': 'ACTIVE'}, {'GOMP_SPINCOUNT': '7'}, {'KMP_BLOCKTIME': '0'}):
        share_processors(env := dict(own))
        assert env == own


@pytest.mark.parametrize('text,n', [('max 100000', None), ('150000 100000', 2), ('50000 100000', 1), ('6400000 100000', None), ('', None), ('x y', None)])
def test_a_containers_share(text, n, tmp_path, monkeypatch):
    monkeypatch.setattr('os.cpu_count', lambda: 64)
    (tmp_path/'cpu.max').write_text(text)
    assert cpu_quota(tmp_path) == n and cpu_quota(tmp_path/'none') is None
    monkeypatch.setattr('mstoolkit.core.cpu_quota', lambda: n)
    share_processors(env := {})
    assert env.get('OMP_NUM_THREADS') == (n and str(n))
    share_processors(env := {'OMP_NUM_THREADS': '5'})
    assert env['OMP_NUM_THREADS'] == '5'


def test_the_command_line_shares_before_torch_is_imported():
    code = "import sys, os; from mstoolkit.cli import main; early = 'torch' in sys.modules; main(['--version']); print(early, os.environ['GOMP_SPINCOUNT'])"
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')}
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout.split()
    assert out[-2:] == ['False', '1000']


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='asks /proc')
def test_others_at_work():
    spin = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(2)]
    try: assert others_at_work(.5) >= 1
    finally:
        for p in spin: p.kill(); p.wait()


@pytest.mark.parametrize('busy,told', [(0., False), (.9, False), (3.2, True)])
def test_other_load_is_told(busy, told, learn, stopwatch, monkeypatch, capsys):
    stopwatch({PLAIN: [1.], LAST: [.5]})
    monkeypatch.setattr(speed, 'others_at_work', lambda: busy)
    learn.fit(1, cbs=Arithmetic())
    assert ('other programs keep 3 threads at work' in capsys.readouterr().out) == told


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="glibc's switch")
def test_keep_freed_memory(): assert keep_freed_memory() is True
