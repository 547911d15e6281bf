"What keeps a training within its memory: activations computed again, errors that say what fits, batches as large as there is memory for."
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from mstoolkit.ablation import run_study
from mstoolkit.classifier import Classifier, ModelHeader
from mstoolkit.cli import main
from mstoolkit.core import RunError, free_memory, out_of_memory
from mstoolkit.data.core import image_dls
from mstoolkit.learner import fusion_learner
from mstoolkit.models.backbone import TimmStages
from mstoolkit.models.fold import fold_batchnorms
from mstoolkit.models import memory
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.predict import predict_probs
from mstoolkit.recipe import Recipe, load_recipe
from mstoolkit.train import choose_bs, recipe_dls, resume_run, train
from PIL import Image
from tiny import quiet


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# activations computed again

def trained(name, recompute, **kw):
    "The state of a network after three steps, and the maps that it keeps in one."
    torch.manual_seed(0)
    model = multiscale_model(name, 'gated', 5, pretrained=False, drop=0., **kw).train()
    if recompute: model[0].recompute().recompute()
    opt, kept = torch.optim.SGD(model.parameters(), .05, momentum=.9), []
    for _ in range(3):
        x = torch.randn(4, 3, 64, 64)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t): loss = model(x).square().mean()
        loss.backward(); opt.step(); opt.zero_grad()
    return model.state_dict(), sum(kept)


@pytest.mark.parametrize('name,kw', [
    ('resnet18', {}), ('resnest14d', {}), ('test_efficientnet', {}), ('test_byobnet', {}), ('test_convnext', {}), ('regnety_002', {}),
    ('test_vit', dict(img_size=64)), ('swin_tiny_patch4_window7_224', dict(img_size=64)), ('densenet121', {}), ('xception41', {})])
def test_computing_again_trains_to_the_same_bits(name, kw):
    "Weights and running statistics: a norm that ran twice would have counted each batch twice."
    (plain, all_), (again, some) = trained(name, False, **kw), trained(name, True, **kw)
    assert same(plain, again) and some < .9*all_


def test_drop_path_is_drawn_once():
    "What is dropped the first time is dropped the second time."
    def grads(recompute):
        torch.manual_seed(0)
        body = TimmStages('test_convnext', pretrained=False).train()
        for m in body.modules():
            if hasattr(m, 'drop_path'): m.drop_path = torch.nn.Dropout(.5)
        if recompute: body.recompute()
        sum(o.square().mean() for o in body(torch.randn(4, 3, 64, 64))).backward()
        return {k: p.grad for k, p in body.named_parameters() if p.grad is not None}
    assert same(grads(False), grads(True))


def test_norms_count_again_after_the_backward_pass():
    model = multiscale_model('resnet18', 'gated', 5, pretrained=False).train()
    model[0].recompute()
    for n in (1, 2):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        assert {int(v) for k, v in model.state_dict().items() if k.startswith('0.') and k.endswith('num_batches_tracked')} == {n}
    assert not any(hasattr(m, 'counted') for m in model.modules())
    copied = deepcopy(model).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fold_batchnorms(copied, x)(x), copied(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['hrnet_w18_small', 'pit_ti_224', 'twins_svt_small', 'crossvit_9_240'])
def test_a_backbone_that_cannot_says_so(name):
    "Those that timm refuses, and one where its switch changes nothing."
    with pytest.raises(ValueError, match=f"cannot compute the activations of '{name}' again: leave out recompute"):
        TimmStages(name, pretrained=False).recompute()


@pytest.mark.parametrize('frozen', [False, True])
def test_a_learner_that_computes_again(frozen, image_folder, tmp_path):
    def run(**kw):
        torch.manual_seed(0)
        dls = image_dls(image_folder, size=32, bs=8, augment='none', num_workers=0, device='cpu')
        learn = fusion_learner(dls, 'test_resnet', pretrained=False, path=tmp_path, **kw)
        if frozen: learn.freeze()
        with quiet(learn): learn.fit(2, 1e-2)
        return learn.model.state_dict()
    assert same(run(), run(recompute=True))


def test_recompute_as_a_recipe_field(image_folder, tiny_options, tiny, tmp_path, capsys):
    assert Recipe(recompute=True).options() == ['--recompute'] and 'recompute = true' in Recipe(recompute=True).to_toml()
    plain = dict(precision='fp32', memory_format='contiguous')
    learn = train(Recipe(**tiny, **plain, recompute=True), image_folder, tmp_path/'a')
    assert learn.model[0].recomputes and same(learn.model.state_dict(), train(Recipe(**tiny, **plain), image_folder, tmp_path/'b').model.state_dict())
    assert main(['train', str(image_folder), *tiny_options, '--backbone', 'hrnet_w18_small', '--recompute', '--out', str(tmp_path/'c')]) == 2
    assert "leave out recompute" in capsys.readouterr().err and not (tmp_path/'c').exists()


PEAK = """
import re, sys, torch
from mstoolkit.models.fusion import multiscale_model
model = multiscale_model('resnet50', 'gated', 5, pretrained=False).train()
if sys.argv[1] == 'again': model[0].recompute()
for p in model.parameters(): p.grad = torch.zeros_like(p)
# ru_maxrss would begin with the parent's
peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = peak()
model(torch.randn(8, 3, 160, 160)).sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='asks /proc')
def test_computing_again_takes_less_memory():
    peak = lambda how: int(subprocess.run([sys.executable, '-c', PEAK, how], capture_output=True, text=True, check=True).stdout)
    assert peak('again') < .8*peak('all')


# no memory

ERRORS = [MemoryError('Unable to allocate 2 GiB'), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'),
          RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]


class Full(Callback):
    "No memory at some point of a step."
    def __init__(self, error, epoch=0, event='after_pred'): self.error, self.at = error, epoch; setattr(self, event, self.fail)
    def fail(self):
        if self.training and self.epoch == self.at: raise self.error


@pytest.mark.parametrize('error', ERRORS, ids=lambda e: type(e).__name__)
def test_a_step_without_memory_says_what_fits(error, image_folder, tiny, tmp_path):
    assert out_of_memory(error)
    with pytest.raises(RunError) as e: train(Recipe(**tiny, precision='fp32'), image_folder, tmp_path/'run', cbs=[Full(error)])
    assert str(e.value).startswith('no memory is left for batches of 8 images of 32 px on cpu: choose --bs 4 or auto, --recompute (a third slower), --size below 32')
    assert e.value.__cause__ is error and not (tmp_path/'run').exists()


@pytest.mark.parametrize('kw,words', [
    (dict(bs=2), 'choose --recompute'), (dict(bs=12), 'choose --bs 8 or auto, '), (dict(recompute=True), 'choose --bs 4 or auto, --size below 32'),
    (dict(precision='bf16'), 'below 32$'), (dict(precision='fp32'), 'below 32, --precision bf16$')])
def test_what_is_offered_is_what_is_left(kw, words, image_folder, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr('mstoolkit.train.fast_precisions', lambda device: ['fp32', 'bf16'])
    with pytest.raises(RunError, match=words): train(Recipe(**tiny | kw), image_folder, tmp_path/'run', cbs=[Full(MemoryError('none'))])


def test_another_error_stays_what_it_is(image_folder, tiny, tmp_path):
    with pytest.raises(RuntimeError, match='shapes do not fit'):
        train(Recipe(**tiny), image_folder, tmp_path/'run', cbs=[Full(RuntimeError('shapes do not fit'))])


def test_what_was_trained_before_is_kept(image_folder, tiny, tmp_path, capsys):
    with pytest.raises(RunError): train(Recipe(**tiny | dict(epochs=3)), image_folder, tmp_path/'run', cbs=[Full(MemoryError('none'), epoch=1)])
    assert 'to go on after the last finished epoch' in capsys.readouterr().out and (tmp_path/'run'/'model.safetensors').is_file()


LIMITED = """
import resource, sys
from mstoolkit.cli import main
import torch, mstoolkit.train
torch.set_num_threads(1)
own = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (own + 900*2**20,)*2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits the address space')
def test_a_machine_that_is_too_small(image_folder, tmp_path):
    "A real one: the process may take 900 MB more."
    options = '--recipe gate --backbone resnet50 --no-pretrained --size 384 --bs 24 --num-workers 0 --device cpu --augment none --precision fp32'.split()
    p = subprocess.run([sys.executable, '-c', LIMITED, 'train', str(image_folder), *options, '--out', str(tmp_path/'run')], capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.strip().splitlines()[-1].startswith(
        'mstoolkit: no memory is left for batches of 24 images of 384 px on cpu: choose --bs 16 or auto, --recompute (a third slower), --size below 384'), p.stderr
    assert not (tmp_path/'run').exists()


# a batch as large as there is memory for

GB = 2**30
MEMINFO = 'MemTotal:       24684640 kB\nMemFree:        18709504 kB\nMemAvailable:   8388608 kB\n'


@pytest.mark.parametrize('files,free', [
    ({}, 8), ({'memory.max': 'max', 'memory.current': '5'}, 8),
    ({'memory.max': str(6*GB), 'memory.current': str(5*GB), 'memory.stat': f'anon {2*GB}\ninactive_file {2*GB}\nactive_file {GB}\n'}, 4),
    ({'memory/memory.limit_in_bytes': str(4*GB), 'memory/memory.usage_in_bytes': str(3*GB), 'memory/memory.stat': f'cache 9\nactive_file {GB}\ninactive_file 0\n'}, 2),
    ({'memory/memory.limit_in_bytes': '9223372036854771712', 'memory/memory.usage_in_bytes': '5', 'memory/memory.stat': ''}, 8),
    ({'memory.max': str(GB), 'memory.current': str(2*GB), 'memory.stat': ''}, 0)])
def test_what_a_container_leaves(files, free, tmp_path):
    (tmp_path/'memory').mkdir()
    (tmp_path/'info').write_text(MEMINFO)
    for k, v in files.items(): (tmp_path/k).write_text(v)
    assert free_memory(tmp_path, tmp_path/'info') == free*GB and free_memory(tmp_path, tmp_path/'none') is None


@pytest.fixture
def machine(monkeypatch):
    "A process of 1 GB, some of it unused, whose steps take `each` bytes an image, on a machine with so much free."
    def make(free, each, slack=0):
        now, ran = dict(peak=GB), []
        def step(n):
            ran.append(n)
            now['peak'] = max(now['peak'], GB - slack + n*each)
            if now['peak'] > GB + free: pytest.fail('the system would have ended the process')
        monkeypatch.setattr(memory, '_process', lambda what: now['peak'] if what == 'VmHWM' else GB)
        monkeypatch.setattr(memory, 'free_memory', lambda: free)
        return step, ran
    return make


@pytest.mark.parametrize('free,each,slack,most,n,longest', [
    (10*GB, GB//10, 0, 64, 64, 8),       # 6.4 of 8 GB
    (10*GB, GB//5, 0, 64, 32, 8),        # 12.8 would be too many
    (GB, GB//5, 0, 64, 4, 4), (GB, GB//3, 0, 64, 2, 2), (10*GB, GB//10, 0, 16, 16, 8), (10*GB, GB//10, 0, 8, 8, 8),
    (10*GB, GB//5, GB, 64, 32, 16),      # the first steps take what earlier work has left
    (10*GB, 1000, GB, 64, 64, 64)])      # a tiny network: every one is tried
def test_the_largest_batch_of_a_cpu(free, each, slack, most, n, longest, machine):
    step, ran = machine(free, each, slack)
    assert memory._on_cpu(step, most, 0, .2) == n and max(ran) == longest


def test_what_a_run_takes_beside_its_step_counts(machine):
    step, _ = machine(10*GB, GB//10)
    assert memory._on_cpu(step, 64, 3*GB, .2) == 32


def test_no_memory_for_two():
    def step(n): raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert memory._on_cpu(step, 64, 0, .2) == 0
    with pytest.raises(RuntimeError, match='shapes'): memory._on_cpu(lambda n: (_ for _ in ()).throw(RuntimeError('shapes')), 64, 0, .2)


@pytest.mark.parametrize('total,each,most,n', [(80, 1, 64, 64), (80, 2, 64, 32), (10, 1, 64, 8), (9, 1, 64, 8), (8, 1, 64, 4), (1, 1, 64, 0), (80, 1, 16, 16)])
def test_the_largest_batch_of_a_gpu(total, each, most, n, monkeypatch):
    "With a share to spare; emptied between the steps."
    used, calls = [0], []
    def step(n):
        used[0] = n*each
        if used[0] > total: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')
    for k, f in dict(empty_cache=lambda: calls.append(1), reset_peak_memory_stats=lambda d: None, mem_get_info=lambda d: (total, total),
                     memory_reserved=lambda d: 0, max_memory_allocated=lambda d: used[0]).items(): monkeypatch.setattr(torch.cuda, k, f)
    assert memory._on_gpu(step, most, 0, .1, torch.device('cuda')) == n and calls


def test_trying_changes_no_weight_and_takes_no_draw():
    model = multiscale_model('test_resnet', 'gated', 5, pretrained=False)
    before, stream = deepcopy(model.state_dict()), torch.get_rng_state()
    assert memory.largest_batch(model, 32, most=8) == 8
    assert same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), stream) and all(p.grad is None for p in model.parameters())


def test_a_device_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, 'free_memory', lambda: None)
    with pytest.raises(ValueError, match="bs 'auto' cannot see how much memory.*give a whole number"):
        memory.largest_batch(multiscale_model('test_resnet', 'gated', 5, pretrained=False), 32)


def test_bs_auto_in_a_recipe(tmp_path):
    r = Recipe(bs='auto')
    assert load_recipe(r.save(tmp_path/'r.toml')) == r and r.options() == ['--bs', 'auto'] and Recipe(bs=8).options() == ['--bs', '8']
    for bad in 'atuo', '32', 1.5, True, None:
        with pytest.raises(ValueError, match="'bs' is .*: give a whole number, or 'auto'"): Recipe(bs=bad)
    with pytest.raises(ValueError, match="'lr' is 'auto': give a number$"): Recipe(lr='auto')


@pytest.mark.parametrize('bs,words', [('atuo', "'atuo': give a whole number, or 'auto'"), ('1.5', 'give a whole number'), ('1', 'is 1: give 2 or more'), ('-4', 'is -4: give 2')])
def test_bad_sizes_on_the_command_line(bs, words, image_folder, tiny_options, capsys):
    assert main(['train', str(image_folder), *tiny_options, '--bs', bs]) == 2
    assert words in capsys.readouterr().err


def test_a_run_with_bs_auto(image_folder, tiny, tiny_options, tmp_path, capsys, monkeypatch):
    "It is the run with the number, which its recipe has; resuming it needs no second choice."
    assert main(['train', str(image_folder), *tiny_options, '--bs', 'auto', '--out', str(tmp_path/'a')]) == 0
    assert 'bs auto: batches of 8\n' in capsys.readouterr().out
    assert load_recipe(tmp_path/'a'/'recipe.toml').bs == 8
    plain = dict(precision='fp32', memory_format='contiguous')
    state = lambda out, **kw: train(Recipe(**tiny | plain | kw), image_folder, tmp_path/out).model.state_dict()
    monkeypatch.setattr('mstoolkit.train.largest_batch', lambda *a, **kw: 4)
    want, got = state('b', bs=4), state('c', bs='auto')
    assert same(want, got) and 'bs auto: batches of 4; there is no memory for 8' in capsys.readouterr().out
    with pytest.raises(RunError): train(Recipe(**tiny | plain | dict(bs='auto', epochs=2)), image_folder, tmp_path/'d', cbs=[Full(MemoryError('none'), epoch=1)])
    monkeypatch.setattr('mstoolkit.train.largest_batch', lambda *a, **kw: pytest.fail('chose again'))
    assert len(resume_run(tmp_path/'d').run_history.rows) == 2


def test_no_memory_for_any_batch(image_folder, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr('mstoolkit.train.largest_batch', lambda *a, **kw: 0)
    with pytest.raises(RunError, match='batches of 2 images of 32 px on cpu: choose a smaller --size, --recompute or another'):
        train(Recipe(**tiny | dict(bs='auto')), image_folder, tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_where_a_number_is_needed(image_folder, tiny, tmp_path):
    auto = Recipe(**tiny | dict(bs='auto'))
    assert choose_bs(Recipe(**tiny), 'nowhere').bs == 8  # named: nothing is looked at
    with pytest.raises(ValueError, match='choose_bs'): recipe_dls(auto, image_folder)
    with pytest.raises(ValueError, match='batches of one size'): run_study('fusion', image_folder, tmp_path/'study', recipe=auto)


def test_a_run_with_bs_auto_that_was_killed_at_its_beginning(image_folder, tiny, tmp_path):
    r = Recipe(**tiny | dict(bs='auto'))
    (tmp_path/'run').mkdir()
    Recipe(**tiny).save(tmp_path/'run'/'recipe.toml')
    train(r, image_folder, tmp_path/'run')


@pytest.mark.cuda
def test_the_largest_batch_of_this_gpu():
    model = multiscale_model('resnet50', 'gated', 5, pretrained=False).cuda()
    n = memory.largest_batch(model, 224, most=64)
    torch.cuda.reset_peak_memory_stats()
    model.train()(torch.randn(n, 3, 224, 224, device='cuda')).sum().backward()
    assert n >= 2 and torch.cuda.max_memory_allocated() < .9*torch.cuda.get_device_properties(0).total_memory


# many sizes

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="asks Linux how large the process is")
def test_predicting_images_of_many_sizes_takes_no_more_memory_each_time(tmp_path):
    "Pictures of a hundred sizes become images of one: neither the reader nor the network keeps something for each."
    g, model = np.random.default_rng(0), multiscale_model('test_resnet', 'gated', 2, pretrained=False).eval()
    for i in range(100): Image.fromarray(g.integers(0, 255, (40 + 13*i, 60 + 7*i, 3), np.uint8)).save(tmp_path/f'{i}.jpg')
    clf = Classifier(model, ModelHeader(config=model.config, classes=['a', 'b'], size=64, mean=(.5,)*3, std=(.5,)*3))
    files, sizes = sorted(tmp_path.glob('*.jpg')), []
    for _ in range(4):
        predict_probs(clf, files, bs=7, num_workers=0, precision='fp32')
        sizes.append(memory._process('VmRSS'))
    assert sizes[-1] - sizes[0] < 40e6  # the largest picture alone is 3 MB
