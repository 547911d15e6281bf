"Temperatures: right where the truth is known, never flattering, and carried from the training to the prediction."
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mstoolkit.classifier import Classifier, change_header, read_header
from mstoolkit.cli import main
from mstoolkit.data.make import make_digits
from mstoolkit.evaluate.calibration import calibrate, fit_temperature, least_images, sureness, tempered
from mstoolkit.predict import predict_folder, predict_probs
from mstoolkit.recipe import Recipe
from mstoolkit.report import write_report
from mstoolkit.runs import Run, read_env
from mstoolkit.train import train
from tests.conftest import TINY


def drawn(n, c=10, scale=2., seed=0):
    "Logits, and labels that come up as often as these say."
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, c, generator=g)*scale
    return z, torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]


@pytest.mark.parametrize('true', [.3, .8, 1., 1.5, 4.])
def test_the_temperature_is_found(true):
    z, y = drawn(20_000)
    assert fit_temperature(z*true, y) == pytest.approx(true, rel=.05)


def test_it_minimises_the_log_loss():
    z, y = drawn(600)
    t = fit_temperature(z, y)
    loss = lambda t: float(torch.nn.functional.cross_entropy(z.double()/t, y)) + np.log(t)**2/2/len(y)
    assert all(loss(t) <= loss(t*k) for k in (.97, .999, 1.001, 1.03))


@pytest.mark.parametrize('right', [True, False])
def test_images_that_are_all_right_or_all_wrong_give_a_number(right):
    z = torch.eye(4)[torch.arange(400) % 4]*6
    t = fit_temperature(z, (torch.arange(400) + (not right)) % 4)
    assert (.05 < t < 1) if right else (1 < t <= 20)


def test_answers_never_change():
    "Also where two logits differ in the last bit."
    z = torch.randn(3000, 7, generator=torch.Generator().manual_seed(1))*5
    top = z.argmax(1)
    near = z.clone()
    near[range(3000), (top+1) % 7] = torch.nextafter(z.max(1).values, torch.tensor(-100.))
    for t in .05, .7, 1., 1.3, 8.:
        assert torch.equal(tempered(z, t).argmax(1), top)
        p = tempered(near, t)
        assert (p[range(3000), top] >= p.max(1).values).all()
    assert torch.equal(tempered(z), z.softmax(1))


def test_what_is_reported_does_not_flatter():
    "On noise a temperature fitted on the very images always looks better than none; the cross-fitted one does not."
    better = {'same images': 0, 'other folds': 0}
    for seed in range(40):
        z, y = drawn(least_images, seed=seed)
        before = sureness(tempered(z), y).log_loss
        better['same images'] += sureness(tempered(z, fit_temperature(z, y)), y).log_loss < before
        better['other folds'] += calibrate(z, y).temperature != 1
    assert better['same images'] >= 38 and better['other folds'] <= 20, better


def test_each_image_is_judged_by_a_temperature_it_had_no_part_in():
    z, y = drawn(300)
    z = 3*z
    c, i = calibrate(z, y), 7
    other = y.clone()
    other[i] = (y[i]+1) % 10
    assert torch.equal(calibrate(z, other).probs[i], c.probs[i])  # its label has no say
    assert c.after.log_loss < c.before.log_loss and c.after.ece < c.before.ece


def test_a_perfect_model_stays_below_its_bounds():
    over = np.mean([[s.log_loss > s.perfect_loss_high, s.ece > s.perfect_ece_high]
                    for s in (sureness(tempered(z), y) for z, y in (drawn(400, seed=k) for k in range(120)))], 0)
    assert (over < .12).all(), over


def test_too_few_images():
    z, y = drawn(least_images-1)
    c = calibrate(4*z, y)
    assert c.temperature == 1 and c.before == c.after and torch.equal(c.probs, (4*z).softmax(1))
    assert 'too few' in c.lines()[0]
    json.dumps(c.plain())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp('sure')
    data = make_digits(root/'digits')
    # heavy smoothing leaves the network less sure than right
    train(Recipe(**{**TINY, 'epochs': 3, 'lr': 1e-2, 'smoothing': .5, 'cutmix': 0., 'bs': 64, 'opt': 'adamw', 'schedule': 'one-cycle'}), data, root/'run')
    return root/'run'


def test_the_training_stores_what_predictions_use(run, capsys):
    h, env = read_header(run), read_env(run)
    c = env['calibration']
    assert h.temperature == c['temperature'] != 1
    assert c['after']['log_loss'] < c['before']['log_loss']
    rows, clf = Run(run).preds, Classifier.load(run)
    files = [Path(Run(run).source.path)/o for o in rows.image]
    p, plain = (predict_probs(o, files, num_workers=0, device='cpu')[0] for o in (clf, Classifier(clf.model, replace(h, temperature=1.))))
    assert torch.equal(p.argmax(1), plain.argmax(1))
    torch.testing.assert_close(p, tempered(plain.log(), h.temperature), atol=1e-5, rtol=1e-3)
    assert [clf.header.classes[i] for i in p.argmax(1)] == list(rows.pred_label)
    # those in the table are cross-fitted: nearly the same
    assert np.abs(p.max(1).values.numpy() - rows.confidence).max() < .1


def test_the_page_and_the_predictions_tell(run, tmp_path):
    page = write_report(run, tmp_path/'page.html').read_text()
    assert 'each fold of them at the temperature of the others' in page
    df = predict_folder(run, f'{Run(run).source.path}/val/7', confidence=True, num_workers=0, device='cpu')
    change_header(copied := shutil.copytree(run, tmp_path/'run'), temperature=1.)
    plain = predict_folder(copied, f'{Run(run).source.path}/val/7', confidence=True, num_workers=0, device='cpu')
    assert (df.pred_label == plain.pred_label).all() and (df.confidence != plain.confidence).any()


@pytest.mark.parametrize('value,says', [(0, 'its temperature is 0'), (-1., 'its temperature is -1'), (float('nan'), 'its temperature is nan'), ('2', "its temperature is '2'"), (1000, '.01 to 100')])
def test_temperatures_that_are_none(run, value, says):
    h = asdict(read_header(run))
    with pytest.raises(ValueError, match=says): type(read_header(run))(**{**h, 'temperature': value})


def test_few_images_leave_the_file_as_it_is(image_folder, tmp_path, capsys):
    train(Recipe(**TINY), image_folder, tmp_path/'run')
    assert read_header(tmp_path/'run').temperature == 1
    assert 'temperature' not in capsys.readouterr().out
    assert main(['report', str(tmp_path/'run')]) == 0
    assert 'too few to fit a temperature' in (tmp_path/'run'/'report.html').read_text()
