"The report: one file, well-formed, escaped, honest when something is missing."
import html
import json
import re
import shlex
import shutil
import tomllib
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer

import mstoolkit
from mstoolkit.classifier import Classifier, ModelHeader
from mstoolkit.data.make import make_navon
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.data.sources import DataSource
from mstoolkit.recipe import Recipe
from mstoolkit.report import run_warnings, write_report
from mstoolkit.runs import Run, correct_cells, group_runs


class Checker(HTMLParser):
    "Collects what is loaded, what lacks a text alternative, and tags left open."
    void = {'meta', 'img', 'br', 'link', 'input', 'hr'}
    def __init__(self):
        super().__init__()
        self.open, self.src, self.no_alt, self.ids, self.links, self.heads = [], [], 0, [], [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag not in self.void: self.open.append(tag)
        self.src += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data') and v and not v.startswith('#')]
        self.links += [v[1:] for k, v in attrs if k == 'href' and v.startswith('#')]
        self.no_alt += tag == 'img' and not a.get('alt')
        if 'id' in a: self.ids.append(a['id'])
        if re.fullmatch('h[1-6]', tag): self.heads.append(int(tag[1]))

    def handle_endtag(self, tag): assert self.open.pop() == tag, tag


def fake_run(folder, data, seed=0, classes=None, right=.8, model=True, source=None, **recipe):
    "A run folder as `train` leaves it, without the training."
    folder, rng = Path(folder), np.random.default_rng(seed)
    r = Recipe(**dict(name='gate', backbone='test_resnet', head='gated', pretrained=False, size=48, seed=seed) | recipe)
    r.save(folder/'recipe.toml')
    DataSource(data, **source or {}).save(folder/'data.toml')
    files = sorted((data/'val').glob('*/*.png'))
    label = np.array([f.parent.name for f in files])
    classes = classes or sorted(set(label))
    hit, conf = rng.random(len(files)) < right, rng.uniform(.3, 1, len(files))
    pred = np.where(hit, label, rng.permutation(label))
    pd.DataFrame(dict(image=[f.relative_to(data).as_posix() for f in files], label=label, pred_label=pred, confidence=conf,
                      label_confidence=np.where(pred == label, conf, (1-conf)/2))).to_csv(folder/'valid_predictions.csv', index=False)
    e = np.arange(1, 4)
    pd.DataFrame(dict(phase='fit', epoch=e, train_loss=1/e, valid_loss=1.1/e, train_accuracy=.5+.1*e, mixed=True, accuracy=.5+.1*e, lr_0=1e-3,
                      seconds=2., data_wait=.3)).to_csv(folder/'history.csv', index=False)
    env = dict(platform="Linux", device="cpu", gpu=None, processors=2, best_epoch=3, epochs=3, seconds=6.5, started="2026", versions=dict(torch="2"),
               data=dict(path=str(data), classes=len(classes), train=100, valid=len(files)))
    (folder/'environment.json').write_text(json.dumps(env))
    if model:
        net = multiscale_model('test_resnet', r.head, len(classes), pretrained=False)
        Classifier(net, ModelHeader(config=net.config, classes=classes, size=48, mean=(.5,)*3, std=(.25,)*3)).save(folder/'model.safetensors')
    return folder


@pytest.fixture(scope='module')
def navon(tmp_path_factory): return make_navon(tmp_path_factory.mktemp('d')/'navon', n_train=100, n_valid=200, n_test=10, size=48)


def checked(path):
    "The page, after the checks that every page must pass."
    text, c = path.read_text(encoding='utf-8'), Checker()
    c.feed(text)
    assert not c.open and not c.no_alt
    assert all(o.startswith('data:image/') for o in c.src), [o[:80] for o in c.src if not o.startswith('data:')]
    assert len(set(c.ids)) == len(c.ids) and set(c.links) <= set(c.ids)
    assert c.heads[0] == 1 and c.heads.count(1) == 1 and all(b-a <= 1 for a, b in zip(c.heads, c.heads[1:]))
    assert '://' not in re.sub(r'data:image/[a-z]+;base64,[A-Za-z0-9+/=]+', '', text)
    assert '<html lang="en">' in text and 'name="viewport"' in text
    return text


def test_a_run_of_100_classes_is_one_small_page(tmp_path, navon):
    text = checked(write_report(fake_run(tmp_path/'gate', navon), share_seconds=.5))
    assert (tmp_path/'gate'/'report.html').stat().st_size < 5e6
    for part in ('Validation accuracy', '95 % interval', 'Curves', 'Confusions', 'Class by class', 'Calibration', 'Worst mistakes',
                 'What each scale gives', 'How to repeat it', 'Data, time and hardware', 'were mixed', 'stride 32'): assert part in text, part
    assert len(re.findall('<th scope="row" class="text">', text)) == 100   # the class table has every class


@pytest.mark.parametrize('head', ['pyramid', 'mlp'])
def test_every_head_has_a_report(tmp_path, navon, head):
    text = checked(write_report(fake_run(tmp_path/head, navon, head=head), share_seconds=.2))
    assert ('stride 32' in text) == (head != 'mlp') and ('What each scale gives' in text) == (head == 'pyramid')


def test_several_runs_are_grouped_and_judged(tmp_path, navon):
    runs = [fake_run(tmp_path/f'{h}-{s}', navon, seed=10*s+len(h), name=h, head=h, right=right, model=False)
            for h, right in dict(plain=.6, gated=.9).items() for s in range(3)]
    groups = group_runs([Run(o) for o in runs])
    assert {k: len(v) for k, v in groups.items()} == dict(plain=3, gated=3)
    assert correct_cells(groups)['gated'].shape == (3, 200)
    text = checked(write_report(runs, tmp_path/'study.html', share_seconds=.2))
    assert 'Comparison' in text and 'better' in text and 'best of 3 seeds' in text
    text = checked(write_report(runs[::-1], tmp_path/'b.html', baseline='gated', share_seconds=.2))
    assert 'worse' in text
    with pytest.raises(ValueError, match='already exists'): write_report(runs, tmp_path/'study.html')
    with pytest.raises(ValueError, match="unknown baseline 'gate'; did you mean 'gated'"): write_report(runs, tmp_path/'c.html', baseline='gate')


def test_cells_of_one_name_are_told_apart_by_what_varies(tmp_path, navon):
    runs = [Run(fake_run(tmp_path/str(i), navon, loss=l, model=False)) for i, l in enumerate(('smoothed', 'cross-entropy'))]
    assert list(group_runs(runs)) == ['loss smoothed', 'loss cross-entropy']


def test_other_validation_images_give_no_verdict(tmp_path, navon):
    a, b = fake_run(tmp_path/'a', navon, model=False), fake_run(tmp_path/'b', navon, model=False, head='plain', name='b')
    f = b/'valid_predictions.csv'
    f.write_text('\n'.join(f.read_text().splitlines()[:150]))
    with pytest.raises(ValueError, match='other images'): correct_cells(group_runs([Run(a), Run(b)]))
    assert 'There are no verdicts' in checked(write_report([a, b], tmp_path/'r.html'))


def test_names_cannot_inject_markup(tmp_path, navon):
    run = fake_run(tmp_path/'x', navon, name='<script>alert(1)', model=False)
    f = run/'valid_predictions.csv'
    f.write_text(f.read_text().replace('A-of-A', '<b>&"quoted"'.replace('"', "'")))
    text = checked(write_report(run))
    assert '<script>alert' not in text and '&lt;script&gt;' in text and '<b>&' not in text


def test_images_that_are_gone_are_said_to_be(tmp_path, navon):
    data = tmp_path/'moved'
    shutil.copytree(navon, data)
    run = fake_run(tmp_path/'r', data)
    shutil.rmtree(data)
    text = checked(write_report(run))
    assert 'cannot be shown' in text and 'What each scale gives' not in text


def test_warnings_name_what_is_wrong(tmp_path, navon):
    text = ' '.join(run_warnings(Run(fake_run(tmp_path/'r', navon, model=False))))
    assert 'last epoch was the best' in text and 'waiting for data' in text and 'points only' in text


def test_a_study_is_its_finished_runs(tmp_path, navon):
    study = tmp_path/'study'
    for h, right in dict(plain=.6, gated=.9).items():
        for s in range(2): fake_run(study/h/f'seed-{s}', navon, seed=10*s+len(h), name=h, head=h, right=right, model=False)
    (study/'gated'/'.seed-2').mkdir()                     # one that is still training
    (study/'study.json').write_text(json.dumps(dict(cells=dict(plain={}, gated={}))))
    page = write_report(study)
    assert page == study/'report.html' and 'Every cell against plain' in checked(page)
    shutil.rmtree(study/'plain'); shutil.rmtree(study/'gated')
    with pytest.raises(FileNotFoundError, match='no run of the study'): write_report(study)


def test_the_data_speak_up(tmp_path, navon):
    run = fake_run(tmp_path/'my run', navon, model=False, source=dict(csv='my table.csv', fold=0, cache=True))
    env = json.loads((run/'environment.json').read_text())
    env['data'] |= dict(train_per_class=[3, 40], warnings=['2 images are in training and validation'])
    (run/'environment.json').write_text(json.dumps(env))
    (run/'left_out.txt').write_text('a.jpg: is empty')
    text = html.unescape(checked(write_report(run)))
    for part in ('3 to 40 training and', '2 images are in training', '1 images could not be read and were left out: a.jpg',
                 "--csv 'my table.csv' --cache", f"--recipe '{run}/recipe.toml'"): assert part in text, part
    assert '--fold' not in text


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a finished run folder: it has no recipe.toml'): write_report(tmp_path)
    with pytest.raises(ValueError, match='no run to report on'): write_report([])


def test_the_template_is_in_the_package():
    root = Path(mstoolkit.__file__).parent
    assert (root/'templates'/'report.html').is_file()
    project = tomllib.loads((root.parent/'pyproject.toml').read_text())
    assert 'templates/*.html' in project['tool']['setuptools']['package-data']['mstoolkit']


def commands(page):
    "The commands that a page prints, as lists of words."
    texts = [html.unescape(re.sub(r'<[^>]+>', '', o)) for o in re.findall(r'<(?:pre|code)[^>]*>(.*?)</(?:pre|code)>', page, re.S)]
    return [shlex.split(line)[1:] for text in texts for line in text.splitlines() if line.startswith('mstoolkit ')]


def parsed(words):
    "What the command line makes of a command, without running it."
    from mstoolkit.cli import app
    group = typer.main.get_command(app)
    return group.commands[words[0]].make_context(words[0], words[1:]).params


SOURCES = [dict(), dict(valid=None), dict(valid_pct=.25, valid='none'), dict(csv='a table.csv', group='patient'), dict(train='tr.txt', valid='va.txt'),
           dict(folds=5, fold=3), dict(classes='names.txt', on_bad='skip'), dict(cache=True), dict(cache_in='/fast disk/cache'), dict(classes=['cat', 'dog'])]


@pytest.mark.parametrize('source', SOURCES, ids=str)
def test_every_printed_command_is_understood_and_says_it_all(tmp_path, navon, source):
    "Back through the command line, the printed options make the very same source."
    run = fake_run(tmp_path/"run's folder", navon, model=False)
    want = DataSource(navon, **source).kept_in(run)
    want.save(run/'data.toml')
    words, = commands(checked(write_report(run)))
    params = parsed(words)
    given = {f.name: params[f.name] for f in fields(DataSource) if params.get(f.name) is not None}
    assert DataSource(params['data'], **{k: v for k, v in given.items() if k != 'path'}) == want
    assert Path(params['recipe']) == run/'recipe.toml' and not Path(params['out']).exists()


def test_a_command_with_a_flag_that_is_none_is_not_understood():
    with pytest.raises(Exception, match='No such option'): parsed(['train', 'data', '--colour-on-device'])


@pytest.mark.parametrize('right', [True, False])
def test_one_validation_image_has_a_page(tmp_path, navon, right):
    run = fake_run(tmp_path/'r', navon, model=False)
    df = pd.read_csv(run/'valid_predictions.csv', dtype=str).head(1)
    df.assign(pred_label=df.label if right else 'X-of-X').to_csv(run/'valid_predictions.csv', index=False)
    text = checked(write_report(run))
    assert 'interval 0.0% to 100.0%' in text and '1 validation image cannot tell' in text
    two = fake_run(tmp_path/'two', navon, model=False, head='plain', name='plain')
    shutil.copy(run/'valid_predictions.csv', two/'valid_predictions.csv')
    assert 'Comparison' in checked(write_report([run, two], tmp_path/'c.html'))


def test_a_label_that_is_no_class_of_the_model_is_named(tmp_path, navon):
    run = fake_run(tmp_path/'r', navon)
    f = run/'valid_predictions.csv'
    f.write_text(f.read_text().replace('A-of-A', '7'))
    with pytest.raises(ValueError, match="has the label '7', which is no class of the model"): write_report(run)
