"What keeps a training within its memory: activations computed again, errors that say what fits."
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from mstoolkit.cli import main
from mstoolkit.core import RunError, out_of_memory
from mstoolkit.data.core import image_dls
from mstoolkit.learner import fusion_learner
from mstoolkit.models.backbone import TimmStages
from mstoolkit.models.fold import fold_batchnorms
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.recipe import Recipe
from mstoolkit.train import train
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
    assert str(e.value).startswith('no memory is left for batches of 8 images of 32 px on cpu: choose --bs 4, --recompute (a third slower), --size below 32')
    assert e.value.__cause__ is error and not (tmp_path/'run').exists()


@pytest.mark.parametrize('kw,words', [
    (dict(bs=2), 'choose --recompute'), (dict(bs=12), 'choose --bs 8, '), (dict(recompute=True), 'choose --bs 4, --size below 32'),
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
    options = '--backbone resnet50 --no-pretrained --size 384 --bs 24 --num-workers 0 --device cpu --augment none --precision fp32'.split()
    p = subprocess.run([sys.executable, '-c', LIMITED, 'train', str(image_folder), *options, '--out', str(tmp_path/'run')], capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.strip().splitlines()[-1].startswith(
        'mstoolkit: no memory is left for batches of 24 images of 384 px on cpu: choose --bs 16, --recompute (a third slower), --size below 384'), p.stderr
    assert not (tmp_path/'run').exists()
