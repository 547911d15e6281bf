"A recipe made for data, machine and time: what is given stays, what is chosen is written down, mistakes are one line."
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from mstoolkit import plan
from mstoolkit.cli import main
from mstoolkit.core import process_age
from mstoolkit.data.sources import DataSource
from mstoolkit.models.candidates import Ranked, Weights, candidates
from mstoolkit.models.fusion import PyramidHead, heads
from mstoolkit.plan import DataFacts, auto_recipe, data_facts, training_fields
from mstoolkit.recipe import Recipe, load_recipe
from mstoolkit.train import recipe_dls, recipe_learner
from PIL import Image

small = ['--backbone', 'test_resnet', '--no-pretrained', '--size', '32', '--num-workers', '0', '--device', 'cpu']


def facts(**kw): return DataFacts(**dict(n_train=800, n_valid=200, per_class=(400, 400), side=300, grey=False) | kw)


@pytest.fixture
def ranked(monkeypatch):
    "Networks whose speed and weights a test says."
    def say(*rows):
        made = [Ranked(candidates[name], 10., True, epochs, weights, '' if weights else 'no weights') for name, epochs, weights in rows]
        monkeypatch.setattr(plan, 'rank_backbones', lambda *a, **kw: made)
        monkeypatch.setattr(plan, 'time_backbone', lambda *a, **kw: 40.)
    return say


def test_facts_are_of_what_would_be_trained_on(image_folder):
    f = data_facts(DataSource(path=str(image_folder)))
    assert (f.n_train, f.n_valid) == (24, 12) or f.n_train + f.n_valid > 0
    with Image.open(next((image_folder/'train').glob('*/*.png'))) as im: assert f.side == min(im.size)
    assert not f.grey and f.uneven >= 1


def test_grey_images_are_not_mirrored(tmp_path):
    for s, n in (('train', 8), ('val', 3)):
        for c in 'ab':
            (tmp_path/s/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(np.random.default_rng(i).integers(0, 255, (28, 28), np.uint8)).save(tmp_path/s/c/f'{i}.png')
    f = data_facts(DataSource(path=str(tmp_path)))
    assert f.grey and f.side == 28 and training_fields(f, False, 20)['augment'] == 'upright'


@pytest.mark.parametrize('broken', ['all', 'some'])
def test_broken_images_do_not_stop_a_plan(image_folder, tmp_path, broken):
    shutil.copytree(image_folder, tmp_path/'d')
    files = sorted((tmp_path/'d').rglob('*.png'))
    for f in files if broken == 'all' else files[::3]: f.write_bytes(b'no image')
    assert data_facts(DataSource(path=str(tmp_path/'d'))).side == (224 if broken == 'all' else 40)


def test_the_length_of_a_training_decides_on_mixing():
    assert training_fields(facts(), True, 20)['cutmix'] > 0 == training_fields(facts(), True, 3)['cutmix']
    assert training_fields(facts(), True, 3)['schedule'] == 'fine-tune' and training_fields(facts(), False, 3)['schedule'] == 'one-cycle'
    assert training_fields(facts(per_class=(900, 10)), True, 3)['balance'] == 'logit-adjust'
    rates = [training_fields(facts(n_train=n), True, passes, bs=bs)['lr'] for n, passes, bs in ((2640, 8, 32), (2640, 1, 32), (84, 8, 10), (84, 1, 10))]
    assert rates == [2e-3, 2e-3, 2e-4, 2e-4] # with four stages at rest a pass in the time of one is six
    for pretrained in True, False:
        for passes in .5, 6, 60: Recipe.from_dict(training_fields(facts(), pretrained, passes) | dict(minutes=5))


def test_short_trainings_keep_maps_of_networks_that_can_be_entered(ranked, image_folder):
    lite, swin = 'tf_efficientnet_lite0.in1k', next(o for o in candidates if 'vit' in o or 'swin' in o)
    for name, epochs, given, kept, frozen in ((lite, 1., {}, 2, 4), (lite, 3., {}, 2, 3), (lite, 5., {}, 0, 2), (lite, 9., {}, 0, 0),
                                              (lite, 1., dict(cutmix=.5), 0, 4), (lite, 1., dict(frozen_stages=0), 0, 0), (swin, .3, {}, 0, 3)):
        ranked((name, epochs, Weights('file', 'w.pth')))
        r, told = auto_recipe(image_folder, minutes=5, **dict(size=224) | given)
        assert (r.keep_maps, r.frozen_stages) == (kept, frozen), (name, epochs, given)
        assert ('their maps kept' in told[-1]) == bool(kept)


def test_a_teacher_is_asked_in_some_of_the_passes(ranked, image_folder, monkeypatch):
    lite = 'tf_efficientnet_lite0.in1k'
    ranked((lite, 20., Weights('file', 'w.pth')))
    monkeypatch.setattr('mstoolkit.plan._answer_seconds', lambda *a: 4*300*.75/20/24) # for an image four times what the student takes
    alone, _ = auto_recipe(image_folder, minutes=5)
    taught, told = auto_recipe(image_folder, minutes=5, teacher='t')
    assert (alone.keep_answers, taught.keep_answers, taught.keep_maps, taught.balance) == (0, 2, 0, 'none')
    assert 'time for 10 passes' in told[-1] and 'the teacher asked in 2 of them' in told[-1]
    assert auto_recipe(image_folder, epochs=5, teacher='t')[0].keep_answers == 0


def test_what_has_no_effect_is_refused_and_other_heads_are_not_probed(ranked, image_folder, monkeypatch):
    ranked(('tf_efficientnet_lite0.in1k', 20., Weights('file', 'w.pth')))
    for given in dict(soften=3.), dict(freeze_epochs=3), dict(mixup_alpha=.3), dict(plateau_factor=.5):
        with pytest.raises(ValueError, match='has no effect here'): auto_recipe(image_folder, minutes=5, **given)
    plain, _ = auto_recipe(image_folder, minutes=5, probe=False)
    assert not plain.probe and plain.freeze_share == .1
    class Relu(PyramidHead): collapses = False
    monkeypatch.setitem(heads, 'relu', Relu)
    assert not auto_recipe(image_folder, minutes=5, head='relu')[0].probe and auto_recipe(image_folder, minutes=5, head='pyramid')[0].probe


def test_several_processes_share_the_data(image_folder, monkeypatch):
    monkeypatch.setattr(plan, 'time_backbone', lambda *a, **kw: 40.)
    said = lambda: auto_recipe(image_folder, minutes=.2, backbone='resnet18', pretrained=False)[1][-1]
    one = said()
    monkeypatch.setattr(plan, 'n_processes', lambda: 2)
    passes = [float(o.split('time for ')[1].split(' ')[0]) for o in (one, said())]
    assert passes[1] == pytest.approx(2*passes[0], rel=.1)


def test_networks_of_one_size_are_predicted_at_it(image_folder, monkeypatch):
    monkeypatch.setattr(plan, 'time_backbone', lambda *a, **kw: 40.)
    r, _ = auto_recipe(image_folder, minutes=5, backbone='test_vit', pretrained=False, size=96)
    assert r.test_size == 0
    with pytest.raises(ValueError, match="'test_size' is -1, and test_vit is built for images of one size, 96 px"):
        recipe_learner(replace(r, test_size=-1, num_workers=0), recipe_dls(replace(r, num_workers=0), image_folder))


def test_takes_the_best_that_is_at_hand(ranked, image_folder):
    best, light = 'convnext_tiny.in12k_ft_in1k', 'tf_efficientnet_lite0.in1k'
    ranked((light, 90., Weights('file', 'lite0.pth')), (best, 20., Weights('cache', 'x')))
    r, told = auto_recipe(image_folder, minutes=5)
    assert (r.backbone, r.weights_file, r.pretrained, r.minutes, r.epochs) == (best, '', True, 5, 0) and best in told[0]
    ranked((light, 90., Weights('file', 'lite0.pth')), (best, 20., Weights('none', 'no hub')))
    r, _ = auto_recipe(image_folder, minutes=5)
    assert (r.backbone, r.weights_file) == (light, 'lite0.pth')


def test_from_scratch_where_there_are_no_weights(ranked, image_folder):
    ranked(('tf_efficientnet_lite0.in1k', 90., Weights('none', 'the hub does not answer')))
    r, told = auto_recipe(image_folder)
    assert not r.pretrained and r.schedule == 'one-cycle' and r.minutes == plan.default_minutes
    assert 'from scratch' in told[0] and '--weights-dir' in told[1]


@pytest.mark.parametrize('backbone', ['auto', 'test_resnet'])
def test_what_stands_in_the_way_of_a_network_from_scratch_is_left_out(ranked, image_folder, monkeypatch, backbone):
    "However long it trains: a gated head can fall to zero and stay there, and much augmentation is for who has begun to learn."
    ranked()
    monkeypatch.setattr(plan, 'time_backbone', lambda *a, head, **kw: heads_timed.append(head) or 1e6)
    for given, head in (({}, 'plain'), (dict(head='gated'), 'gated')):
        heads_timed = []
        r, _ = auto_recipe(image_folder, minutes=20, pretrained=False, backbone=backbone, **given)
        assert (r.head, r.augment) == (head, 'photo') and set(heads_timed) == {head}


def test_a_network_from_scratch_is_as_wide_as_time_allows(ranked, image_folder, monkeypatch):
    ranked()
    def speed(images_s):
        monkeypatch.setattr(plan, 'time_backbone', lambda *a, timm_kw, **kw: images_s*512/timm_kw.get('channels', [512])[-1])
        return auto_recipe(image_folder, minutes=5, pretrained=False)
    needed = 24*plan.scratch_passes/(300*.75) # images a second; the folder has 24 for training
    for images_s, width in (1.1*needed, 0), (.8*needed, 1), (.4*needed, 2), (0, 2):
        options = plan.scratch_widths[width]
        r, told = speed(images_s)
        assert (r.backbone, r.timm, r.size) == (plan.scratch_backbone, options, 64) and ' '.join(['resnet10t', *options]) in told[-1]
    for options in (['drop_rate=.1'], 'drop_rate=.1'):
        assert auto_recipe(image_folder, minutes=5, pretrained=False, timm=options)[0].timm == ('drop_rate=.1',)


def test_what_is_given_is_kept(ranked, image_folder):
    ranked()
    r, _ = auto_recipe(image_folder, epochs=3, backbone='test_resnet', pretrained=False, size=64, bs=4, lr=.1, augment='none', cutmix=.2, ema=0.)
    assert (r.epochs, r.minutes, r.size, r.bs, r.lr, r.augment, r.cutmix, r.ema) == (3, 0, 64, 4, .1, 'none', .2, 0)
    with pytest.raises(ValueError, match="'epochs' and 'minutes' are 3 and 2"): auto_recipe(image_folder, epochs=3, minutes=2, backbone='test_resnet')
    with pytest.raises(ValueError, match='weights_file is one backbone'): auto_recipe(image_folder, weights_file='x.pth')


def test_the_command(image_folder, tmp_path, capsys):
    out = tmp_path/'run'
    assert main(['train', str(image_folder), '--out', str(out), '--minutes', '.05', *small]) == 0
    said = capsys.readouterr().out
    assert 'auto: ' in said and 'size to predict at' not in said # images of 40 px have nothing more to show
    passes = json.loads((out/'environment.json').read_text())['passes']
    assert re.search(rf'in epoch \d+ of \d+; 0\.\d min, {passes:,} pass(es)? over the images begun\n', said) and passes > 0
    r = load_recipe(out/'recipe.toml')
    assert (r.name, r.minutes, r.epochs, r.size) == ('auto', .05, 0, 32) and 'auto' not in (r.backbone, r.head, r.augment)
    assert main(['predict', str(out), str(image_folder/'val'), '--out', str(tmp_path/'p.csv')]) == 0
    assert main(['report', str(out)]) == 0
    assert main(['train', str(image_folder), '--out', str(out), '--minutes', '1', *small]) == 2  # nothing is overwritten


@pytest.mark.parametrize('options, text', [
    (['--minutes', '1', '--epochs', '3'], "'epochs' and 'minutes' are 3 and 1"), (['--minutes', '-1'], "'minutes' is -1"),
    (['--recipe', 'gate', '--minutes', '1', '--mix-off-epochs', '2'], "'mix_off_share'"),
    (['--recipe', 'gate', '--freeze-epochs', '3'], "'freeze_epochs' has no effect here"),
    (['--recipe', 'gate', '--weights-dir', '.'], 'is what recipe'), (['--timm', 'drop_path_rate'], 'NAME=VALUE'),
    (['--recipe', 'gate', '--schedule', 'warm-restarts', '--minutes', '1'], 'counts epochs'), (['--start-size', '64'], 'sizes grow')])
def test_mistakes_are_one_line(image_folder, tmp_path, capsys, options, text):
    assert main(['train', str(image_folder), '--out', str(tmp_path/'r'), *small, *options]) == 2
    err = capsys.readouterr().err.strip()
    assert text in err and len(err.splitlines()) == 1 and not (tmp_path/'r').exists()


def test_a_named_recipe_under_a_budget(image_folder, tmp_path):
    options = ['--schedule', 'fine-tune', '--weights-file', 'w.pth']
    assert main(['train', str(image_folder), '--recipe', 'demo', '--minutes', '.03', '--out', str(tmp_path/'r'), *small, *options]) == 2  # no such file
    assert main(['train', str(image_folder), '--recipe', 'demo', '--minutes', '.03', '--out', str(tmp_path/'r'), *small]) == 0
    r = load_recipe(tmp_path/'r'/'recipe.toml')
    assert r.minutes == .03 and r.epochs == 0 and r.schedule == 'one-cycle'


def test_how_long_a_process_runs(): assert 0 < process_age() < 7*24*3600


@pytest.mark.parametrize('given,said', [
    (dict(minutes=-1.), "'minutes' is -1.0"), (dict(minutes=float('nan')), "'minutes' is nan"), (dict(minutes=1., epochs=3), 'give one of them'),
    (dict(minutes=0.), 'minutes of 0'), (dict(epochs=0), 'epochs of 0'), (dict(lr=-1.), "'lr' is -1.0"), (dict(backbnoe='auto'), "unknown recipe field 'backbnoe'")])
def test_what_will_not_do_is_said_before_networks_are_timed(given, said, image_folder, monkeypatch):
    monkeypatch.setattr(plan, 'data_facts', lambda *_: 1/0)
    with pytest.raises(ValueError, match=said): auto_recipe(image_folder, device='cpu', **given)
