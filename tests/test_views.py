"Views: what a model may be shown, that averaging is what it says, and that a gain is told as it is."
import json
import shutil
from dataclasses import asdict, replace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from mstoolkit.classifier import Classifier, ModelHeader, read_header
from mstoolkit.cli import main
from mstoolkit.data.core import image_dls, trained_with
from mstoolkit.evaluate.gain import gain_lines, view_gains
from mstoolkit.evaluate.stats import mcnemar, paired_interval
from mstoolkit.learner import fusion_learner
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.models.views import larger_sizes, view_sets, view_sizes
from mstoolkit.predict import predict_folder, predict_probs
from mstoolkit.recipe import Recipe
from mstoolkit.train import train
from safetensors.torch import save_file
from torch import nn
from tests.conftest import TINY


@pytest.fixture(scope='module')
def clf():
    torch.manual_seed(0)
    model = multiscale_model('test_resnet', 'gated', 3, pretrained=False).eval()
    header = ModelHeader(config=model.config, classes=['2', '10', 'red apple'], size=32, mean=(.5,)*3, std=(.25,)*3, augment='light', mirrored=True)
    return Classifier(model, header)


@pytest.fixture(scope='module')
def run(image_folder_, tmp_path_factory):
    out = tmp_path_factory.mktemp('views')/'run'
    train(Recipe(**{**TINY, 'augment': 'light'}), image_folder_, out)
    return out


def pictures(folder, n=5):
    "Noise, whose two halves differ, of a side that 32 and 48 divide."
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n): cv2.imwrite(str(folder/f'{i}.png'), rng.integers(0, 256, (96, 96, 3), np.uint8))
    return sorted(folder.iterdir())


@pytest.mark.parametrize('tta', view_sets)
def test_the_mean_is_that_of_the_views_one_by_one(clf, tta, tmp_path):
    torch.manual_seed(0)
    # an opinion of every corner of an image: an untrained network has none
    clf = Classifier(nn.Sequential(nn.AdaptiveMaxPool2d(8), nn.Flatten(), nn.Linear(192, 3)), clf.header)
    files = pictures(tmp_path/'p')
    got, good, bad = predict_probs(clf, files, tta=tta, bs=2, num_workers=0, device='cpu')
    each = []
    for k, mirrored in view_sets[tta]:
        h = replace(clf.header, size=view_sizes('sizes', 32)[k])
        folder = tmp_path/f'{k}{mirrored}'
        folder.mkdir()
        for f in files:
            im = cv2.imread(str(f))
            cv2.imwrite(str(folder/f.name), np.ascontiguousarray(im[:, ::-1]) if mirrored else im)
        each.append(predict_probs(Classifier(clf.model, h), sorted(folder.iterdir()), num_workers=0, device='cpu')[0])
    assert good == files and not bad
    # halves are rounded to one side: a shrunk mirror image is the mirror image of the shrunk one up to a grey level
    torch.testing.assert_close(got, torch.stack(each).mean(0), atol=5e-3 if 'flip' in tta else 1e-6, rtol=0)
    assert tta == 'none' or (got - each[0]).abs().max() > 3e-2


def test_without_views_nothing_has_changed(clf, tmp_path):
    files = pictures(tmp_path/'p')
    x = next(clf.batches(files, num_workers=0))[1]
    with torch.inference_mode(): want = clf.model(x).softmax(1)
    assert torch.equal(predict_probs(clf, files, num_workers=0, device='cpu', precision='exact')[0], want)


def test_several_sizes_name_what_cannot_be_read(clf, tmp_path):
    files = pictures(tmp_path/'p')
    files[1].write_text('no picture')
    for workers in 0, 2:
        p, good, bad = predict_probs(clf, files, tta='flip+sizes', bs=1, num_workers=workers, device='cpu')
        assert (len(p), good, list(bad)) == (4, files[:1] + files[2:], [files[1]])
    p, good, bad = predict_probs(clf, files[1:2], tta='flip+sizes', num_workers=0, device='cpu')
    assert p.shape == (0, 3) and not good and list(bad) == [files[1]]


def test_what_the_training_never_showed_is_refused(clf, tmp_path, capsys):
    pictures(tmp_path/'p')
    upright = Classifier(clf.model, replace(clf.header, augment='upright', mirrored=False))
    for tta in 'flip', 'flip+sizes':
        with pytest.raises(ValueError, match=f"tta '{tta.replace('+', '.')}' shows mirror images.*'upright', which has none: choose sizes or none"):
            predict_folder(upright, tmp_path/'p', tta=tta, num_workers=0)
    assert len(predict_folder(upright, tmp_path/'p', tta='sizes', num_workers=0)) == 5
    assert not capsys.readouterr().err
    unknown = Classifier(clf.model, replace(clf.header, augment='', mirrored=None))
    assert len(predict_folder(unknown, tmp_path/'p', tta='flip', num_workers=0)) == 5
    assert 'does not say whether mirror images were trained on' in capsys.readouterr().err


def test_a_network_of_one_size_is_shown_no_other(clf, tmp_path, monkeypatch):
    pictures(tmp_path/'p')
    monkeypatch.setattr(clf.model[0], 'fixed_size', True)
    with pytest.raises(ValueError, match='takes but one: choose flip or none'): predict_folder(clf, tmp_path/'p', tta='sizes', num_workers=0)


@pytest.mark.parametrize('augment,mirrored', [('none', False), ('light', True), ('affine', True), ('strong', True), ('upright', False), ('shift', True)])
def test_the_file_knows_what_it_was_trained_with(augment, mirrored, image_folder, tmp_path):
    dls = image_dls(image_folder, size=32, bs=8, augment=augment, num_workers=0, device='cpu')
    assert trained_with(dls) == (augment, mirrored)
    learn = fusion_learner(dls, 'test_resnet', pretrained=False)
    h = read_header(Classifier.from_learner(learn).save(tmp_path/'m.safetensors'))
    assert (h.augment, h.mirrored) == (augment, mirrored)


def test_files_that_do_not_say_are_read(clf, tmp_path):
    d = asdict(clf.header)
    for k in 'augment', 'mirrored': del d[k]
    save_file(clf.model.state_dict(), tmp_path/'m.safetensors', {'mstoolkit': json.dumps(d)})
    h = Classifier.load(tmp_path/'m.safetensors').header
    assert (h.augment, h.mirrored) == ('', None)


@pytest.mark.parametrize('size', [8, 16, 17, 32, 224, 320, 4096])
def test_the_larger_size_is_larger(size):
    own, larger = view_sizes('sizes', size)
    assert own == size < larger <= 2*size + 8
    assert larger_sizes(size) == sorted(set(larger_sizes(size)))


def test_gains_are_those_of_predictions(run, image_folder_):
    df = view_gains(run, num_workers=0, device='cpu')
    assert list(df.index) == list(view_sets) and list(df.times) == [1, 2, 2, 4]
    rows = pd.read_csv(run/'valid_predictions.csv', dtype=str)
    files, labels = [image_folder_/o for o in rows.image], list(rows.label)
    clf = Classifier.load(run)
    hit = {}
    for tta in view_sets:
        p = predict_probs(clf, files, tta=tta, num_workers=0, device='cpu')[0]
        hit[tta] = np.array([clf.header.classes[i] == o for i, o in zip(p.argmax(1), labels)])
        assert df.accuracy[tta] == hit[tta].mean()
    for tta in list(view_sets)[1:]:
        assert df['diff'][tta] == pytest.approx(hit[tta].mean() - hit['none'].mean())
        assert (df.won[tta], df.lost[tta]) == ((hit[tta] & ~hit['none']).sum(), (~hit[tta] & hit['none']).sum())
    assert list(df.verdict[1:]) == ['within noise']*3  # twelve images
    assert all('bring nothing that these images can show' in o for o in gain_lines(df)[1:])


@pytest.mark.parametrize('sets,shown', [(['flip'], ['none', 'flip']), (['sizes', 'flip'], ['none', 'sizes', 'flip']), ([], ['none'])])
def test_the_sets_that_were_asked_for(run, sets, shown):
    assert list(view_gains(run, sets, num_workers=0, device='cpu').index) == shown


def test_a_gain_is_called_one():
    "Of 400 images 20 are won and 2 lost."
    plain, better = np.zeros(400, bool), np.zeros(400, bool)
    plain[:302], better[2:322] = True, True
    d, low, high = paired_interval(better, plain)
    assert d == 18/400 and .01 < low < d < high < .08 and mcnemar(better, plain).p < .01
    assert paired_interval(plain, better) == (-d, -high, -low)


def test_seeds_are_not_for_paired_intervals():
    with pytest.raises(ValueError, match='2 seeds'): paired_interval(np.ones((2, 9)), np.ones((1, 9)))


def test_on_the_command_line(run, image_folder_, tmp_path, capsys):
    csv = tmp_path/'p.csv'
    assert main(['predict', str(run), str(image_folder_/'test'), '--tta', 'flip', '--out', str(csv), '--device', 'cpu']) == 0
    err = capsys.readouterr().err
    assert 'flip: accuracy' in err and 'points (' in err and len(pd.read_csv(csv)) == 9
    assert main(['predict', str(run/'model.safetensors'), str(image_folder_/'test'), '--tta', 'flip', '--out', str(csv), '--force', '--device', 'cpu']) == 0
    assert 'what --tta flip brings is not known: a model file alone' in capsys.readouterr().err
    assert main(['views', str(run), '--device', 'cpu']) == 0
    assert [o.partition(':')[0] for o in capsys.readouterr().out.splitlines()] == list(view_sets)
    assert main(['predict', str(run), str(image_folder_/'test'), '--tta', 'crops', '--out', str(tmp_path/'q.csv')]) == 2
    assert "unknown tta 'crops'. Known: flip, flip+sizes, none, sizes" in capsys.readouterr().err


def test_images_that_are_gone_are_named(run, tmp_path, capsys):
    moved = shutil.copytree(run, tmp_path/'run')
    text = (moved/'data.toml').read_text()
    path = next(o for o in text.splitlines() if o.startswith('path'))
    (moved/'data.toml').write_text(text.replace(path, f"path = '{tmp_path/'nowhere'}'"))
    with pytest.raises(FileNotFoundError, match='12 of 12 validation images .* are no longer at'): view_gains(moved)
    assert main(['views', str(moved)]) == 2
    assert 'are no longer at' in capsys.readouterr().err
