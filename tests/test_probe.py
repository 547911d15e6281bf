"A head trained on features computed once: the same head, the same body, the same run after a kill."
import pytest
import torch
from mstoolkit.callback.probe import FreezeNorms, FreezeStages, ProbeHead, can_probe
from mstoolkit.core import seed_everything
from mstoolkit.data.core import image_dls
from mstoolkit.learner import fusion_learner
from mstoolkit.models.fusion import heads, multiscale_model
from mstoolkit.recipe import Recipe
from mstoolkit.train import resume_run, train
from test_checkpoint import KillAt, Killed
from tiny import quiet


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


def test_under_a_budget_the_probe_is_validated_and_kept(image_folder, tmp_path, tiny):
    weights = tmp_path/'w.pth'
    torch.save(multiscale_model('test_resnet', 'plain', 3, pretrained=False)[0].net.state_dict(), weights)
    fields = dict(schedule='fine-tune', weights_file=str(weights), probe=True, freeze_share=.5, minutes=.04)
    learn = train(Recipe.from_dict({k: v for k, v in tiny.items() if k != 'epochs'} | fields), image_folder, tmp_path/'r')
    first = learn.run_history.rows[0]
    assert first['phase'] == 'frozen' and first['accuracy'] is not None
