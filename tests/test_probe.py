"A head trained on features computed once: the same head, the same body, the same run after a kill."
from dataclasses import replace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from mstoolkit.callback import probe as probe_module
from mstoolkit.callback.mix import BatchMix
from mstoolkit.callback.probe import FreezeNorms, FreezeStages, KeepMaps, ProbeHead, can_probe
from mstoolkit.callback.speed import Arithmetic
from mstoolkit.core import seed_everything
from mstoolkit.data.core import image_dls
from mstoolkit.learner import fusion_learner
from mstoolkit.models.fusion import heads, multiscale_model
from mstoolkit.models.split import StageEntry, can_enter
from mstoolkit.recipe import Recipe
from mstoolkit.train import optimizers, resume_run, train
from test_checkpoint import KillAt, Killed
from tiny import quiet, tiny_learner


@pytest.fixture
def dls(image_folder): return image_dls(image_folder, size=32, bs=8, augment='light', num_workers=0, device='cpu')


def learner(dls, head='gated', **kw):
    seed_everything(0)
    learn = fusion_learner(dls, 'test_resnet', head=head, pretrained=False, train_bn=False, **kw)
    learn.freeze()
    return learn


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before, model): return [k for k, v in model.state_dict().items() if not torch.equal(before[k], v)]


@pytest.mark.parametrize('head', ['plain', 'mlp', 'pyramid', 'gated'])
@pytest.mark.parametrize('size', [64, 88]) # sides that divide each other, and others
def test_a_head_sees_nothing_but_pooled_maps(head, size):
    model = multiscale_model('test_resnet', head, 5, pretrained=False).eval()
    xs = model[0](torch.randn(2, 3, size, size))
    pooled = model[1].pool(xs)
    assert can_probe(model[1]) and all(o.shape[-2:] == (1, 1) for o in pooled)
    torch.testing.assert_close(model[1](pooled), model[1](xs), rtol=1e-4, atol=1e-5)


def test_trains_the_head_alone_and_to_its_end(dls):
    learn = learner(dls)
    body, head, loss = state(learn.model[0]), state(learn.model[1]), learn.validate()[0]
    with quiet(learn): learn.fit(1, cbs=ProbeHead(20))
    row, = learn.run_history.rows
    assert not changed(body, learn.model[0]) and changed(head, learn.model[1])
    assert row['phase'] == 'frozen' and row['valid_loss'] < .7*loss and row['accuracy'] > .9 and 0 < row['train_loss'] < loss


def test_leaves_the_second_phase_alone(dls):
    learn = learner(dls)
    with quiet(learn): learn.fine_tune(2, 1e-3, cbs=ProbeHead(2))
    assert [o['phase'] for o in learn.run_history.rows] == ['frozen', 'unfrozen', 'unfrozen'] and not hasattr(learn, 'probe_head')


def test_a_time_limit_cuts_the_features_short(dls):
    learn = learner(dls)
    probe = ProbeHead(bs=8)
    learn.add_cb(probe)
    f, labels, at = probe.features(stop_at=0.)
    assert len(f) == len(labels) == len(at) == 8
    whole = probe.features()[2]
    assert sorted(whole) == list(range(24)) and sorted(whole.values()) == list(range(24))
    assert sum(len(o) for o in probe._batches(at)) == 8


def test_labels_belong_to_their_features(dls):
    learn = learner(dls)
    learn.add_cb(probe := ProbeHead())
    f, labels, at = probe.features()
    x, y = dls.test_dl([dls.train_ds.items[5]], with_labels=True).one_batch()
    with torch.no_grad(): want = torch.cat([o.flatten(1) for o in learn.model[1].pool(learn.model.eval()[0](x.as_subclass(torch.Tensor)))], 1)
    torch.testing.assert_close(f[at[5]], want[0])
    assert labels[at[5]] == y[0]


def test_refuses_what_it_cannot_train(dls):
    learn = learner(dls, head_kw=dict(act='relu'))
    with quiet(learn), pytest.raises(ValueError, match='ProbeHead needs a multiscale_model with a head'): learn.fit(1, cbs=ProbeHead())
    assert not can_probe(heads['pyramid']([8, 16], 2, act='gelu'))
    with pytest.raises(ValueError, match='passes is 0'): ProbeHead(0)
    with pytest.raises(ValueError, match='lr is 0'): ProbeHead(lr=0)


def test_first_stages_stay(dls):
    learn = learner(dls, cbs=FreezeStages(2))
    before, groups = state(learn.model), learn.splitter(learn.model)
    with quiet(learn): learn.fine_tune(1, 1e-2)
    frozen = {id(p) for g in groups[:2] for p in g}
    for name, p in learn.model.named_parameters():
        assert (id(p) in frozen) == torch.equal(before[name], p), name
    assert [o['phase'] for o in learn.run_history.rows] == ['frozen', 'unfrozen']
    with quiet(learn), pytest.raises(ValueError, match='9 stages cannot be frozen, there are'): learn.fit(1, cbs=FreezeStages(9))


def test_norms_keep_their_statistics(dls):
    learn = learner(dls)
    learn.unfreeze()
    before = state(learn.model)
    with quiet(learn): learn.fit(1, 1e-2, cbs=FreezeNorms())
    moved = changed(before, learn.model)
    assert not [k for k in moved if 'running' in k or 'num_batches' in k] and [k for k in moved if 'bn1.weight' in k]
    with quiet(learn): learn.fit(1, 1e-2)
    assert [k for k in changed(before, learn.model) if 'running' in k]


class NotesFolds(Callback):
    "Notes in each batch how many modules have their work done elsewhere."
    order = 50
    def __init__(self): self.seen = []
    def before_batch(self): self.seen.append(n_folded(self.model))


def n_folded(model): return sum('forward' in vars(m) for m in model.modules())


@pytest.mark.parametrize('layout', ['contiguous', 'channels-last'])
def test_norms_that_rest_are_computed_with_their_convolutions(image_folder, monkeypatch, layout):
    "To the same weights, up to rounding; weights and biases of the norms learn, and the network is as before afterwards."
    found = []
    for fold in True, False:
        if not fold: monkeypatch.setattr(probe_module, 'fold_resting_norms', lambda *_: 0)
        dls = image_dls(image_folder, size=32, bs=8, augment='none', num_workers=0, device='cpu')
        learn = learner(dls, cbs=[FreezeStages(1), FreezeNorms(), Arithmetic('fp32', layout)], opt_func=SGD) # Adam makes much of small differences
        for m in learn.model.modules(): # dropout would draw the same, and only rounding is to differ
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        learn.unfreeze()
        before = state(learn.model)
        seed_everything(1)
        with quiet(learn): learn.fit(1, 1e-2, cbs=(note := NotesFolds()))
        assert bool(note.seen[0]) == bool(note.seen[-1]) == fold and not n_folded(learn.model)
        found.append((state(learn.model), changed(before, learn.model)))
    (a, moved), (b, moved_too) = found
    assert moved == moved_too and [o for o in moved if 'layer4' in o and 'bn2.bias' in o]
    apart = {k: ((a[k] - b[k]).norm()/(a[k] - before[k]).norm()).item() for k in moved}
    assert max(apart.values()) < 1e-3, apart


def test_a_fit_that_breaks_leaves_the_network_as_it_was(dls):
    learn = learner(dls, cbs=Arithmetic('fp32', 'contiguous'))
    with quiet(learn), pytest.raises(Killed): learn.fit(1, 1e-3, cbs=[note := NotesFolds(), FreezeNorms(), KillAt(1, 0)])
    assert note.seen[0]
    assert not n_folded(learn.model)


def test_a_killed_run_goes_on_as_if_nothing_had_been(image_folder, tmp_path, tiny):
    weights = tmp_path/'w.pth'
    torch.save(multiscale_model('test_resnet', 'plain', 3, pretrained=False)[0].net.state_dict(), weights)
    r = Recipe.from_dict(tiny | dict(schedule='fine-tune', weights_file=str(weights), epochs=3, probe=True, keep_bn=True, frozen_stages=1,
                                     ema=.1, precision='fp32', memory_format='contiguous'))
    whole = train(r, image_folder, tmp_path/'a')
    for epoch in 0, 1:
        with pytest.raises(Killed): train(r, image_folder, tmp_path/f'b{epoch}', cbs=[KillAt(2, epoch)])
        again = resume_run(tmp_path/f'b{epoch}')
        assert not changed(state(whole.model), again.model) and len(again.run_history.rows) == 4


@pytest.mark.parametrize('opt', ['adam', 'adamw', 'sgd'])
def test_norms_that_learn_before_their_group_does(image_folder, tmp_path, tiny, opt):
    "fastai's `train_bn`: in the first phase an optimizer has a state for some parameters of a group, and none for the others."
    weights = tmp_path/'w.pth'
    torch.save(multiscale_model('test_resnet', 'plain', 3, pretrained=False)[0].net.state_dict(), weights)
    learn = train(Recipe.from_dict(tiny | dict(schedule='fine-tune', weights_file=str(weights), train_bn=True, opt=opt)), image_folder, tmp_path/'r')
    assert [o['phase'] for o in learn.run_history.rows] == ['frozen', 'unfrozen']


def test_an_optimizer_s_state_follows_the_layout_of_the_weights(dls):
    "Its kernel reads them side by side, in the order of memory."
    learn = learner(dls, cbs=Arithmetic('fp32', 'contiguous'), opt_func=optimizers['adamw'])
    learn.unfreeze()
    with quiet(learn):
        learn.fit(1, 1e-3)
        learn.arithmetic.asked = learn.arithmetic.chosen = 'fp32', 'channels-last'
        learn.fit(1, 1e-3)
    kept = [v for p, state in learn.opt.opt.state.items() for v in (p, *state.values()) if v.dim() == 4]
    assert kept and all(v.is_contiguous(memory_format=torch.channels_last) for v in kept) and not all(v.is_contiguous() for v in kept)


def test_under_a_budget_the_probe_is_validated_and_kept(image_folder, tmp_path, tiny):
    weights = tmp_path/'w.pth'
    torch.save(multiscale_model('test_resnet', 'plain', 3, pretrained=False)[0].net.state_dict(), weights)
    fields = dict(schedule='fine-tune', weights_file=str(weights), probe=True, freeze_share=.5, minutes=.04)
    learn = train(Recipe.from_dict({k: v for k, v in tiny.items() if k != 'epochs'} | fields), image_folder, tmp_path/'r')
    first = learn.run_history.rows[0]
    assert first['phase'] == 'frozen' and first['accuracy'] is not None


def counted(dl, monkeypatch):
    "How often a loader was begun."
    times, cls = [], type(dl)
    plain = cls.__iter__
    monkeypatch.setattr(cls, '__iter__', lambda self: (times.append(1) if self is dl else None, plain(self))[1])
    return times


@pytest.mark.parametrize('head', ['gated', 'plain', 'pyramid'])
def test_maps_train_what_images_would(image_folder, head):
    "Without augmentation the same batches give the same weights, whether the first stages' maps come from the network or were made before."
    found = []
    for cbs in ([], [KeepMaps(0)]):
        dls = image_dls(image_folder, size=64, bs=8, augment='none', num_workers=0, device='cpu')
        learn = learner(dls, head, cbs=[FreezeStages(3), FreezeNorms(), *cbs])
        learn.unfreeze()
        before = state(learn.model)
        seed_everything(1)
        for m in learn.model.modules(): # dropout would draw the same, and only rounding is to differ
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        with quiet(learn): learn.fit(2, 1e-3)
        found.append((state(learn.model), changed(before, learn.model), learn.run_history.rows[-1]))
    (a, moved, row), (b, moved_too, row_too) = found
    assert moved == moved_too and any('layer4' in o for o in moved) and not any('layer2' in o for o in moved)
    for k in moved: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)
    assert row['valid_loss'] == pytest.approx(row_too['valid_loss'], abs=1e-3)


def test_maps_of_the_first_passes_are_learnt_from_again(dls, monkeypatch):
    learn = learner(dls, cbs=[FreezeStages(3), FreezeNorms(), keep := KeepMaps(2)])
    learn.unfreeze()
    begun, seen = counted(dls.train, monkeypatch), []
    plain = KeepMaps.batches
    def batches(self, dl):
        for x, y in plain(self, dl):
            seen.append((x.shape, y.tolist()))
            yield x, y
    monkeypatch.setattr(KeepMaps, 'batches', batches)
    with quiet(learn): learn.fit(5, 1e-3)
    assert len(begun) == 2
    assert len({s[1:] for s, _ in seen}) == 1 and seen[0][0][1] > 3 # maps, not images
    each = len(seen)//5
    labels = [sorted(sum((y for _, y in seen[i*each:(i+1)*each]), [])) for i in range(5)]
    assert labels[2] in labels[:2] and seen[2*each][1] != seen[0][1] # in another order
    assert learn.model.entry is None and not keep.views and len(learn.run_history.rows) == 5
    assert learn.get_preds()[0].shape == (len(dls.valid_ds), 3)


def test_without_memory_each_pass_makes_its_own(dls, monkeypatch):
    monkeypatch.setattr(probe_module, 'free_memory', lambda: 1000)
    learn = learner(dls, cbs=[FreezeStages(3), FreezeNorms(), KeepMaps(2)])
    learn.unfreeze()
    begun = counted(dls.train, monkeypatch)
    with quiet(learn): learn.fit(4, 1e-3)
    assert len(begun) == 4


def test_maps_and_what_needs_images(dls):
    learn = learner(dls)
    learn.unfreeze()
    with quiet(learn), pytest.raises(ValueError, match='all of them learn: add FreezeStages'): learn.fit(1, cbs=KeepMaps())
    with quiet(learn), pytest.raises(ValueError, match='no images for BatchMix'): learn.fit(1, cbs=[FreezeStages(2), KeepMaps(), BatchMix()])
    other = tiny_learner()
    with quiet(other), pytest.raises(ValueError, match='KeepMaps needs a multiscale_model, not Sequential'): other.fit(1, cbs=KeepMaps())
    with pytest.raises(ValueError, match='keep is -1'): KeepMaps(-1)
    vit = multiscale_model('test_vit', 'gated', 3, pretrained=False, img_size=64)
    assert not can_enter(vit, 1)
    with pytest.raises(ValueError, match='cannot be entered after 1 of its stages'): StageEntry(vit, 1, torch.zeros(2, 3, 64, 64))
    curved = multiscale_model('test_resnet', 'gated', 3, pretrained=False, act='relu')
    assert not can_enter(curved, 2)
    short = dict(minutes=1., epochs=0, cutmix=0., frozen_stages=3, keep_maps=2)
    assert Recipe.from_dict(short).keep_maps == 2
    for change, says in ((dict(minutes=0., epochs=2), "give 'frozen_stages' and 'minutes'"), (dict(frozen_stages=0), "give 'frozen_stages'"),
                         (dict(cutmix=.5), 'leaves no images to mix'), (dict(recompute=True), 'leaves no images to mix')):
        with pytest.raises(ValueError, match=says): Recipe.from_dict(short | change)


def test_a_training_on_maps_under_a_budget_ends_and_resumes(image_folder, tmp_path, tiny):
    weights = tmp_path/'w.pth'
    torch.save(multiscale_model('test_resnet', 'plain', 3, pretrained=False)[0].net.state_dict(), weights)
    fields = dict(schedule='fine-tune', weights_file=str(weights), probe=True, freeze_share=.3, minutes=.2, keep_maps=2, frozen_stages=3,
                  keep_bn=True, ema=.1, cutmix=0.)
    r = Recipe.from_dict({k: v for k, v in tiny.items() if k != 'epochs'} | fields)
    learn = train(r, image_folder, tmp_path/'r')
    assert {o['phase'] for o in learn.run_history.rows} == {'frozen', 'unfrozen'} and learn.model.entry is None
    longer = replace(r, minutes=.3) # so that there is a second epoch, however busy the machine is
    with pytest.raises(Killed): train(longer, image_folder, tmp_path/'k', cbs=[KillAt(2, 0)])
    again = resume_run(tmp_path/'k')
    assert again.run_history.rows[-1]['phase'] == 'unfrozen'


def test_a_budget_bounds_the_head_and_leaves_time_for_the_validation(image_folder, monkeypatch):
    dls = image_dls(image_folder, size=32, bs=8, augment='none', num_workers=0, device='cpu')
    learn = fusion_learner(dls, 'test_resnet', pretrained=False)
    probe = ProbeHead(passes=1000)
    learn.add_cb(probe)
    f, y = torch.randn(64, sum(learn.model[0].channels)), torch.randint(0, 3, (64,))
    channels = [o.shape[1] for o in learn.model[1].pool([f.new_zeros(1, c, 1, 1) for c in learn.model[0].channels])]
    f = f[:, :sum(channels)]
    now = probe_module.perf_counter
    few = probe._affordable(learn.model[1].train(), f, y, channels, now() + .05)
    assert 1 <= few < 1000 and probe._affordable(learn.model[1], f, y, channels, None) == 1000
    assert probe._affordable(learn.model[1], f, y, channels, now() - 1) == 1
    assert all(p.grad is None for p in learn.model[1].parameters())
