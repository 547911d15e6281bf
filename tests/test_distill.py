"Distillation: the teacher sees what its header says, the loss is the literal one, a stopped run has the same teacher."
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from mstoolkit.callback.balance import LogitAdjust
from mstoolkit.callback.budget import Budget
from mstoolkit.callback.distill import Distill, KeepAnswers
from mstoolkit.callback.mix import BatchMix
from mstoolkit.classifier import Classifier, ModelHeader, average_models, change_header, model_digest
from mstoolkit.cli import main
from mstoolkit.data.core import get_stats, image_dls, set_stats
from mstoolkit.learner import fusion_learner
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.recipe import Recipe, load_recipe, recipes
from mstoolkit.train import choose_bs, recipe_learner, resume_run, train
from safetensors.torch import load_file
from tests.conftest import TINY
from torch import nn

CLASSES = ['2', '10', 'red apple']


class Spy(nn.Module):
    "A teacher that keeps what it is shown."
    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(3, 3), []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.fc(x.mean((2, 3)))


class Look(Callback):
    "Keeps each training batch as the network gets it, its outputs, and the loss that is gone back from."
    order, run_valid = GradientAccumulation.order + 1, False
    def __init__(self): self.kept = []
    def after_loss(self): self.kept.append((self.x.detach().clone(), self.pred.detach().clone(), self.learn.loss_grad.detach().clone()))


def spied(size=32, mean=(.2, .3, .4), std=(.5, .25, .3), classes=CLASSES, temperature=1.):
    torch.manual_seed(0)
    model = Spy().eval()
    config = multiscale_model('test_resnet', 'plain', 3, pretrained=False).config
    return Classifier(model, ModelHeader(config=config, classes=classes, size=size, mean=mean, std=std, temperature=temperature))


@pytest.fixture
def dls(image_folder): return image_dls(image_folder, size=32, bs=8, augment='light', num_workers=0, device='cpu')


def fitted(dls, *cbs, n=1):
    "A learner after a fit of `n` epochs, and what its batches were."
    torch.manual_seed(1)
    learn, look = fusion_learner(dls, 'test_resnet', pretrained=False, head='plain'), Look()
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3, cbs=[*cbs, look])
    return learn, look.kept


@pytest.mark.parametrize('mix', [dict(cutmix=1.), dict(cutmix=0., mixup=1.), dict(cutmix=0.)])
def test_the_teacher_sees_the_mixed_images_its_own_way(mix, dls):
    teacher = spied()
    _, kept = fitted(dls, BatchMix(**mix, seed=0), Distill(teacher))
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in get_stats(dls))
    t_mean, t_std = (torch.tensor(o).view(1, 3, 1, 1) for o in (teacher.header.mean, teacher.header.std))
    assert len(teacher.model.seen) == len(kept) == 3
    for seen, (x, *_) in zip(teacher.model.seen, kept):
        torch.testing.assert_close(seen*t_std + t_mean, x.as_subclass(torch.Tensor)*std + mean, atol=1e-5, rtol=0)


def test_at_its_own_size(dls):
    teacher = spied(size=48)
    _, kept = fitted(dls, Distill(teacher))
    assert {o.shape[-2:] for o in teacher.model.seen} == {(48, 48)} and kept[0][0].shape[-2:] == (32, 32)


def test_a_teacher_of_several_sizes_is_shown_each(dls):
    a, b = spied(size=32), spied(size=48, mean=(.5, .5, .5), std=(.5, .5, .5))
    with torch.no_grad(): b.model.fc.weight.mul_(.5)
    teacher = average_models([a, b])
    _, kept = fitted(dls, Distill(teacher, 1.))
    net, (x, pred, loss) = teacher.model.members, kept[0]
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in get_stats(dls))
    for m, clf in zip(net, (a, b)):
        seen = m.seen[0]*torch.tensor(clf.header.std).view(1, 3, 1, 1) + torch.tensor(clf.header.mean).view(1, 3, 1, 1)
        own = x.as_subclass(torch.Tensor)*std + mean
        own = F.interpolate(own, seen.shape[-2:], mode='bilinear', antialias=True) if seen.shape != own.shape else own
        torch.testing.assert_close(seen, own, atol=1e-4, rtol=0)
    p = sum(F.softmax(m.fc(m.seen[0].mean((2, 3))).detach(), 1) for m in net)/2
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), (p*(p.log() - F.log_softmax(pred.as_subclass(torch.Tensor), 1))).sum(1).mean(),
                               atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize('order', [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize('around', [[], [lambda: BatchMix(1.)], [LogitAdjust], [lambda: BatchMix(1.), LogitAdjust]])
def test_the_loss_is_the_literal_one(order, around, dls):
    "Of the network's own outputs, whatever else changes outputs or labels."
    teacher, t = spied(classes=[CLASSES[i] for i in order], temperature=1.5), 3.
    _, kept = fitted(dls, *(o() for o in around), Distill(teacher, t))
    for seen, (_, pred, loss) in zip(teacher.model.seen, kept):
        z = teacher.model.fc(seen.mean((2, 3))).detach()[:, [order.index(i) for i in range(3)]]/1.5
        p = F.softmax(z/t, 1)
        want = t*t*(p*(p.log() - F.log_softmax(pred.as_subclass(torch.Tensor)/t, 1))).sum(1).mean()
        torch.testing.assert_close(loss.as_subclass(torch.Tensor), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('mix,asked', [(None, [0]), (dict(cutmix=1., off_share=.5), [0, 2])])
def test_passes_that_are_kept_are_learnt_from_again(mix, asked, dls):
    "The same pixels and the same answers, of mixed images as long as they are mixed, and of whole ones after that."
    teacher = spied()
    _, kept = fitted(dls, *([BatchMix(**mix, seed=0)] if mix else []), Distill(teacher, 3.), KeepAnswers(1), n=4)
    assert len(teacher.model.seen) == 3*len(asked) and len(kept) == 12
    for n in range(4):
        first, source = kept[3*n:3*n+3], max(o for o in asked if o <= n)
        shown = kept[3*source:3*source+3]
        for x, pred, loss in first:
            apart = [float((x - o).abs().max()) for o, *_ in shown]
            i = min(range(3), key=apart.__getitem__)
            assert apart[i] < 2e-3 and sorted(apart)[1] > .1
            z = teacher.model.fc(teacher.model.seen[3*asked.index(source) + i].mean((2, 3))).detach()
            p = F.softmax(z/3, 1)
            want = 9*(p*(p.log() - F.log_softmax(pred.as_subclass(torch.Tensor)/3, 1))).sum(1).mean()
            torch.testing.assert_close(loss.as_subclass(torch.Tensor), want, atol=1e-4, rtol=1e-3)


def test_answers_are_kept_where_that_is_possible(dls, monkeypatch):
    teacher = spied()
    monkeypatch.setattr('mstoolkit.callback.distill.free_memory', lambda: 1000)
    fitted(dls, Distill(teacher), KeepAnswers(1), n=3)
    assert len(teacher.model.seen) == 9
    with pytest.raises(ValueError, match='add Distill'): fitted(dls, KeepAnswers(1))
    with pytest.raises(ValueError, match='keep is 0'): KeepAnswers(0)
    for kw in dict(teacher='x'), dict(minutes=1., epochs=0), dict(teacher='x', minutes=1., epochs=0, start_size=64):
        with pytest.raises(ValueError, match="'keep_answers' keeps what a teacher says"): Recipe(keep_answers=1, **kw)


def test_batches_that_memory_decides_on(teacher, image_folder):
    r = Recipe(backbone='test_resnet', pretrained=False, size=32, minutes=1., epochs=0, bs='auto', schedule='one-cycle', num_workers=0, device='cpu',
               teacher=str(teacher), keep_answers=1)
    assert choose_bs(r, image_folder).bs >= 2


def test_a_short_budget_compiles_no_teacher(dls, monkeypatch):
    asked = []
    monkeypatch.setattr(Classifier, 'network', lambda self, x, n, **kw: asked.append(kw['within']) or partial(lambda way, x: self.model(x), None))
    fitted(dls, Distill(spied()))
    torch.manual_seed(1)
    learn = fusion_learner(dls, 'test_resnet', pretrained=False, head='plain')
    with learn.no_bar(), learn.no_logging(): learn.fit(Budget.most, 1e-3, cbs=[Distill(spied()), Budget(.05)])
    assert asked[0] == math.inf and 0 < asked[1] < 1.5


def test_a_budget_keeps_answers(teacher, image_folder, tmp_path, monkeypatch):
    asked, answers, batches = [], Distill.answers, []
    monkeypatch.setattr(Distill, 'answers', lambda self, x: asked.append(1) or answers(self, x))
    class Count(Callback):
        run_valid = False
        def after_batch(self): batches.append(1)
    r = Recipe(backbone='test_resnet', pretrained=False, size=32, minutes=.2, epochs=0, bs=8, schedule='one-cycle', opt='adamw', lr=5e-3, cutmix=.5,
               mix_off_share=.2, num_workers=0, augment='light', device='cpu', precision='fp32', memory_format='contiguous', plateau_patience=-1,
               stop_patience=0, teacher=str(teacher), keep_answers=2)
    train(r, image_folder, tmp_path/'run', cbs=[Count()])
    assert len(batches) > 40 and len(asked) <= 3*2*2 + 3  # two passes of each kind, and one that was cut short


def test_accumulation_divides_it(dls):
    teacher, own = spied(), []
    class Before(Callback):
        order, run_valid = Distill.order + .1, False
        def after_loss(self): own.append(self.learn.loss_grad.item())
    _, kept = fitted(dls, Distill(teacher), GradientAccumulation(24), Before())
    for a, (*_, b) in zip(own, kept): assert b.item() == pytest.approx(a*8/24, rel=1e-5)


def test_the_teacher_stays_as_it_is(dls):
    teacher = spied()
    was = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    learn, _ = fitted(dls, Distill(teacher))
    assert all(torch.equal(v, was[k]) for k, v in teacher.model.state_dict().items())
    assert all(p.grad is None for p in teacher.model.parameters()) and not teacher.model.training
    n = len(teacher.model.seen)
    learn.validate()
    assert len(teacher.model.seen) == n  # labels judge


def test_any_fastai_learner(tmp_path):
    g = torch.Generator().manual_seed(0)
    items = [(torch.rand(3, 32, 32, generator=g), i % 3) for i in range(24)]
    dls = DataLoaders.from_dsets(items, items, bs=8, device='cpu', num_workers=0)
    dls.vocab = CLASSES
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match=r'give Distill stats=\(mean, std\)'): learn.fit(1, cbs=Distill(spied()))
        learn.fit(1, cbs=Distill(spied(), stats=((0.,)*3, (1.,)*3)))
        set_stats(dls, (.5,)*3, (.5,)*3)
        assert any(isinstance(t, Normalize) for t in dls.train.after_batch.fs)
        teacher = spied()
        learn.fit(1, cbs=Distill(teacher))
    t_mean, t_std = (torch.tensor(o).view(1, 3, 1, 1) for o in (teacher.header.mean, teacher.header.std))
    first = teacher.model.seen[0]*t_std + t_mean
    assert first.min() > -.01 and first.max() < 1.01  # pixels again


def test_other_classes_are_refused(dls):
    with pytest.raises(ValueError, match=r"the teacher knows 3 classes \(2, 10, pear\) and the data has 3 classes \(2, 10, red apple\)"):
        fitted(dls, Distill(spied(classes=['2', '10', 'pear'])))


@pytest.mark.parametrize('t', [0, -1.])
def test_temperatures_that_are_none(t):
    with pytest.raises(ValueError, match='give a number above 0'): Distill(spied(), t)


# recipes

@pytest.fixture
def teacher(image_folder, tmp_path):
    torch.manual_seed(5)
    model = multiscale_model('test_resnet', 'gated', 3, pretrained=False).eval()
    header = ModelHeader(config=model.config, classes=CLASSES, size=32, mean=(.5,)*3, std=(.25,)*3, augment='light', mirrored=True)
    return Classifier(model, header).save(tmp_path/'teacher.safetensors')


class Stop(Callback):
    "Break off after so many epochs."
    order = 99
    def __init__(self, after): self.after = after
    def before_epoch(self):
        if self.epoch == self.after: raise KeyboardInterrupt


@pytest.mark.parametrize('kw', [dict(), dict(ema=.2, mixup=.4)])
def test_a_stopped_run_goes_on_to_the_same_weights(kw, teacher, image_folder, tmp_path):
    r = Recipe(**{**TINY, 'epochs': 3, 'lr': 1e-2, 'augment': 'light', 'precision': 'fp32', 'memory_format': 'contiguous', **kw},
               teacher=str(teacher), head='plain')
    whole = train(r, image_folder, tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): train(r, image_folder, tmp_path/'b', cbs=[Stop(1)])
    kept = load_recipe(tmp_path/'b'/'recipe.toml')
    assert (kept.teacher, kept.teacher_digest) == (str(teacher), model_digest(teacher))
    resumed = resume_run(tmp_path/'b')
    for k, v in whole.model.state_dict().items(): assert torch.equal(v, resumed.model.state_dict()[k]), k
    a, b = (load_file(tmp_path/o/'model.safetensors') for o in 'ab')
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    labels = train(replace(r, teacher=''), image_folder, tmp_path/'c')
    assert any(not torch.equal(v, labels.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_another_teacher_under_the_same_name_is_refused(teacher, image_folder, tmp_path):
    r = Recipe(**{**TINY, 'epochs': 2}, teacher=str(teacher))
    with pytest.raises(KeyboardInterrupt): train(r, image_folder, tmp_path/'run', cbs=[Stop(1)])
    change_header(teacher, temperature=2.)
    with pytest.raises(ValueError, match='is another file than it was'): resume_run(tmp_path/'run')
    teacher.unlink()
    with pytest.raises(FileNotFoundError, match='there is no model file'): resume_run(tmp_path/'run')


def test_the_measured_arithmetic_is_part_of_the_state():
    d = Distill(spied())
    d.load_state_dict({'way': ['bf16', 'channels-last']})
    assert d.way == ('bf16', 'channels-last') and d.state_dict() == {'way': d.way}
    model = multiscale_model('test_resnet', 'plain', 3, pretrained=False)
    run = Classifier(model, spied().header).network(torch.rand(2, 3, 32, 32), 10_000, precision='auto', way=('fp32', 'channels-last'))
    assert run.args[0] == ('fp32', 'channels-last')
    nets = [Classifier(multiscale_model('test_resnet', 'plain', 3, pretrained=False), spied().header) for _ in range(2)]
    several, ways = average_models(nets), (('fp32', 'channels-last'), ('fp32', 'contiguous'))
    assert several.network(torch.rand(2, 3, 32, 32), 10_000, precision='auto', way=ways).args[0] == ways
    d = Distill(several, precision='fp32', memory_format='contiguous')
    d.load_state_dict({'way': None})
    assert d.way == ('fp32', 'contiguous')
    d.load_state_dict({'way': [list(o) for o in ways]})
    assert d.way == ways
    assert Distill(spied(), precision='fp32', memory_format='contiguous').way == ('fp32', 'contiguous')
    for kw in dict(precision='exact'), dict(memory_format='nhwc'):
        with pytest.raises(ValueError, match='unknown'): Distill(spied(), **kw)


def test_on_the_command_line(teacher, image_folder, tmp_path, tiny_options, capsys):
    out = tmp_path/'student'
    assert main(['distill', str(teacher), str(image_folder), *tiny_options, '--soften', '1', '--out', str(out)]) == 0
    r = load_recipe(out/'recipe.toml')
    assert (r.teacher, r.soften) == (str(teacher), 1.)
    assert main(['predict', str(out), str(image_folder/'test'), '--out', str(tmp_path/'p.csv')]) == 0
    capsys.readouterr()
    for args, says in ((['distill', str(tmp_path/'none'), str(image_folder)], 'there is no teacher'),
                       (['distill', str(teacher), str(image_folder), *tiny_options, '--smoothing', '.2'], "'smoothing' has no effect here"),
                       (['distill', str(teacher), str(image_folder), *tiny_options, '--balance', 'logit-adjust'], 'choose sampler'),
                       (['train', str(image_folder), *tiny_options, '--soften', '3'], "'soften' has no effect here")):
        assert main([*args, '--out', str(tmp_path/'never')]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count('\n') == 1, err
    assert not (tmp_path/'never').exists()


# recipes that encode what won

@pytest.mark.parametrize('name', ['winner-resnest200', 'winner-seresnextaa101d'])
def test_winners_at_small_scale(name, image_folder, tmp_path):
    import timm
    r = recipes[name]
    assert (r.size, r.lr, r.cutmix) == (320, 1e-5, .5) and r.name == name
    assert timm.is_model(r.backbone.partition('.')[0]) and r.backbone in timm.list_models(pretrained=True)
    small = {k: v for k, v in TINY.items() if k != 'augment'}
    learn = train(replace(r, **small), image_folder, tmp_path/'run')
    assert len(learn.run_history.rows) == 1 and Classifier.load(tmp_path/'run').header.augment == r.augment
    learn = recipe_learner(replace(r, **small), learn.dls)
    assert any(isinstance(cb, BatchMix) for cb in learn.cbs)
