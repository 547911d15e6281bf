"Several models as one: what a file of them predicts, how it is taken apart, folds, soups, ensembles, a submission."
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, COLOURS, write_images
from mstoolkit import ablation
from mstoolkit.classifier import Classifier, ModelHeader, average_models, read_header
from mstoolkit.cli import main
from mstoolkit.core import RunError
from mstoolkit.data.core import image_loader
from mstoolkit.evaluate.attribution import scale_attribution, scale_shares
from mstoolkit.evaluate.interpret import label_errors
from mstoolkit.evaluate.stats import fold_interval
from mstoolkit.models.ensemble import Ensemble
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.predict import predict_folder, predict_probs
from mstoolkit.recipe import Recipe
from mstoolkit.runs import Run, Several
from mstoolkit.several.folds import _share, resume_folds, train_folds


def classifier(seed, backbone='test_resnet', head='gated', size=32, mean=.5, classes=CLASSES):
    torch.manual_seed(seed)
    model = multiscale_model(backbone, head, len(classes), pretrained=False).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 2)
        if isinstance(m, torch.nn.Linear): m.weight.data.mul_(4)
    return Classifier(model, ModelHeader(config=model.config, classes=classes, size=size, mean=(mean,)*3, std=(.25,)*3))


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Files of three networks: two of one size and other normalisations, one of another backbone and size."
    d = tmp_path_factory.mktemp('three')
    own = [classifier(0), classifier(1, head='pyramid', mean=.4), classifier(2, 'test_convnext', 'plain', 48)]
    return [o.save(d/f'{n}.safetensors') for n, o in zip('abc', own)]


def by_hand(files, images, weights, average='probabilities'):
    "What each says alone, averaged."
    total = 0
    for f, w in zip(files, weights):
        p = predict_probs(Classifier.load(f), images, num_workers=0, device='cpu', precision='exact')[0].double()
        total = total + w/sum(weights)*(p if average == 'probabilities' else p.log())
    return total if average == 'probabilities' else total.softmax(1)


@pytest.mark.parametrize('average', ['probabilities', 'logits'])
def test_a_file_of_several_predicts_their_average_in_a_fresh_process(three, average, image_folder, tmp_path):
    images, weights = sorted((image_folder/'test').rglob('*.png')), [1, 2, 3]
    file = average_models(three, weights, average=average).save(tmp_path/'m.safetensors')
    assert read_header(file).format == 2
    code = ('import sys, torch; from pathlib import Path; from mstoolkit.classifier import Classifier; from mstoolkit.predict import predict_probs; '
            'p, good, bad = predict_probs(Classifier.load(sys.argv[1]), [Path(o) for o in sys.argv[3:]], num_workers=0, device="cpu"); '
            'torch.save(p, sys.argv[2])')
    subprocess.run([sys.executable, '-c', code, file, tmp_path/'p.pt', *images], check=True)
    want = by_hand(three, images, weights, average)
    assert (torch.load(tmp_path/'p.pt').double()-want).abs().max() < 1e-6
    assert want.max(1)[0].std() > .01 and want.argmax(1).unique().numel() > 1  # a test of something


def test_many_images_are_predicted_the_fast_way(three, image_folder, monkeypatch):
    "200 or more: folded norms, a layout by stopwatch."
    images = sorted((image_folder/'test').rglob('*.png'))*25
    p, good, _ = predict_probs(average_models(three), images, num_workers=0, device='cpu')
    assert len(good) == 225 and (p.double()-by_hand(three, images, [1, 1, 1])).abs().max() < 1e-4


def test_images_are_decoded_once_for_each_size(three, image_folder, monkeypatch):
    from mstoolkit.data import core
    sizes, read = [], core.read_image
    monkeypatch.setattr(core, 'read_image', lambda f, size: sizes.append(size) or read(f, size))
    image = image_folder/'test'/'2'/'0.png'
    x, xs, good, _ = next(average_models(three).batches([image], num_workers=0))
    assert sizes == [32, 48] and [tuple(o.shape) for o in xs] == [(1, 3, 32, 32), (1, 3, 32, 32), (1, 3, 48, 48)] and x.dtype == torch.uint8
    x, xs, _, _ = next(average_models(three[:1]).batches([image], num_workers=0))
    assert isinstance(xs, torch.Tensor)  # one network is given what it always was


def test_unreadable_images_are_named_for_all(three, image_folder):
    bad = image_folder/'test'/'2'/'bad.png'
    bad.write_bytes(b'\x89PNG\r\n\x1a\nno')
    x, good, odd = next(iter(image_loader([bad, image_folder/'test'/'2'/'0.png'], [32, 48], num_workers=0)))
    assert [o.shape[-1] for o in x] == [32, 48] and len(good) == 1 and list(odd) == [bad]
    p, good, odd = predict_probs(average_models(three), [bad], num_workers=0, device='cpu')
    assert p.shape == (0, 3) and not good and list(odd) == [bad]


def test_a_file_of_one_network_is_what_it_was(three, tmp_path):
    clf = Classifier.load(three[0])
    d = {k: v for k, v in asdict(clf.header).items() if k in ('config', 'classes', 'size', 'mean', 'std', 'metrics', 'versions', 'format')}
    head = three[0].read_bytes()[:20_000]
    assert json.dumps(json.dumps(d)).encode()[1:-1] in head and d['format'] == 1 and b'members' not in head.partition(b'0.net')[0]
    assert clf.save(tmp_path/'again.safetensors').read_bytes() == three[0].read_bytes()
    assert average_models([three[0]]).save(tmp_path/'one.safetensors').read_bytes() == three[0].read_bytes()


def test_predict_takes_several(three, image_folder, tmp_path, capsys):
    out = tmp_path/'p.csv'
    assert main(['predict', *map(str, three), str(image_folder/'test'), '--out', str(out), '--top-k', '3', '--device', 'cpu']) == 0
    df = predict_folder(average_models(three), image_folder/'test', top_k=3, device='cpu')
    pd.testing.assert_frame_equal(pd.read_csv(out, dtype={c: str for c in df if not c.startswith('conf')}), df, check_dtype=False)
    assert main(['predict', str(three[0]), str(three[0]), str(image_folder/'test'), '--out', str(tmp_path/'q.csv')]) == 2
    assert 'is given twice' in capsys.readouterr().err


def test_averages_of_averages(three, image_folder):
    images = sorted((image_folder/'test').rglob('*.png'))
    both = average_models([average_models(three[:2]), three[2]], [2, 1])
    assert [m['weight'] for m in both.header.members] == [1, 1, 1] and [m['name'] for m in both.header.members] == ['model 1: a', 'model 1: b', 'c']
    assert (predict_probs(both, images, num_workers=0, device='cpu')[0]-by_hand(three, images, [1, 1, 1])).abs().max() < 1e-6


@pytest.mark.parametrize('average', ['probabilities', 'logits'])
def test_the_maps_of_several_sum_to_the_mean_logit(three, average, image_folder):
    clf = average_models(three, [1, 2, 3], average=average)
    _, xs, good, _ = next(clf.batches(sorted((image_folder/'test').rglob('*.png')), num_workers=0))
    with torch.no_grad(): each = [m(o) for m, o in zip(clf.model.members, clf.model.inputs(xs))]
    mean, answer = sum(w/6*o for w, o in zip([1, 2, 3], each)), clf.model(xs)
    a = scale_attribution(clf, xs)
    assert a.target.equal(answer.argmax(1))
    rows = torch.arange(len(good))
    for a, want in ((a, mean[rows, answer.argmax(1)]), (scale_attribution(clf, xs, 'red apple'), mean[:, 2]),
                    (scale_attribution(clf, xs, compare=('2', '10')), mean[:, 0]-mean[:, 1])):
        torch.testing.assert_close(sum(m.sum((1, 2)) for m in a.maps) + a.bias, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.logit, want)
    if average == 'logits': torch.testing.assert_close(mean, answer)
    assert a.strides == sorted(set(a.strides)) and len(a.maps) == len(a.strides)
    assert scale_shares(clf, [(xs, torch.zeros(len(good), dtype=torch.long))]).filter(like='share').sum(axis=1).sub(1).abs().max() < 1e-5


def test_classes_in_another_order_are_matched_by_name(three, image_folder, capsys):
    images, order = sorted((image_folder/'test').rglob('*.png')), [2, 0, 1]
    other = classifier(7, classes=[CLASSES[i] for i in order])
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    both = average_models([three[0], other])
    assert 'model 2 has the classes in another order: they are matched by name' in capsys.readouterr().err
    p = predict_probs(other, images, num_workers=0, device='cpu')[0]
    want = (predict_probs(Classifier.load(three[0]), images, num_workers=0, device='cpu')[0] + p[:, [order.index(i) for i in range(3)]])/2
    assert (predict_probs(both, images, num_workers=0, device='cpu')[0]-want).abs().max() < 1e-6
    assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())  # the given one stays


@pytest.mark.parametrize('change,what', [
    (dict(members=[{}]), 'is not name, weight'), (dict(average='median'), "unknown average 'median'"), (dict(members=['x']), 'is not name, weight'),
    (lambda h: h['members'][0].update(weight=0), 'its weight is 0'), (lambda h: h['members'][0].update(size=0), 'its size is 0'),
    (lambda h: h['members'][1].update(config={}), 'its backbone is None'), (lambda h: h['members'].pop(), 'do not fit'),
    (lambda h: h['members'][0]['config'].update(n_out=4), 'names 3 classes, and its network has 4')])
def test_headers_of_several_are_refused(three, change, what, tmp_path):
    from safetensors.torch import load_file, save_file
    file = average_models(three[:2]).save(tmp_path/'m.safetensors')
    h = asdict(read_header(file))
    h.update(change) if isinstance(change, dict) else change(h)
    save_file(load_file(file), tmp_path/'n.safetensors', {'mstoolkit': json.dumps(h)})
    with pytest.raises(ValueError, match=what): Classifier.load(tmp_path/'n.safetensors')


def test_what_cannot_be_averaged_is_named(three, tmp_path):
    a = Classifier.load(three[0])
    for models, what in (([], 'no model to average'), ([a, classifier(1, classes=['2', '10', 'bee'])], "other classes than the first, 'bee', 'red apple'"),
                         ([a, Classifier.load(three[0])], 'the very same weights'), ([three[0], tmp_path/'..'/three[0].parent.name/'a.safetensors'], 'twice')):
        with pytest.raises((ValueError, FileNotFoundError), match=what): average_models(models)
    with pytest.raises(ValueError, match='2 weights'): average_models(three, [1, 2])
    with pytest.raises(ValueError, match='weight above 0|its weight is'): average_models(three, [1, 2, 0])
    with pytest.raises(ValueError, match='in 3 sizes or normalisations'): average_models(three).model(torch.zeros(1, 3, 32, 32))
    assert isinstance(average_models(three).model, Ensemble)


TRAIN = dict(backbone='test_resnet', pretrained=False, size=32, epochs=2, bs=8, lr=5e-3, opt='adamw', schedule='one-cycle', cutmix=0., num_workers=0,
             augment='light', device='cpu', precision='fp32', memory_format='contiguous', plateau_patience=-1, stop_patience=0)
BASE = Recipe(**TRAIN)
WORDS = ['--recipe', 'gate', *(o for k, v in TRAIN.items() for o in ([f'--no-{k}'] if v is False else [f"--{k.replace('_', '-')}", str(v)]))]

KILLED = '''
import os, signal, sys
from mstoolkit.callback.checkpoint import Checkpoint
from mstoolkit.cli import main
from mstoolkit.several import folds
left, die, save = [int(sys.argv[1])], lambda: os.kill(os.getpid(), signal.SIGKILL), Checkpoint._save
def counted(self, *args, **kw):
    save(self, *args, **kw)
    left[0] -= 1
    if not left[0]: die()
Checkpoint._save = counted
if left[0] < 0: folds.write_report = lambda *_: die()
main(sys.argv[2:])
'''


def killed(at, *args):
    "Killed after so many checkpoints, or, at -1, before the page is written."
    r = subprocess.run([sys.executable, '-c', KILLED, str(at), *map(str, args)], capture_output=True, text=True)
    assert r.returncode == -9, r.stdout + r.stderr


def product(out, folds=3):
    "What folds leave, without times."
    files = 'valid_predictions.csv', 'model.safetensors', *(f'fold-{k}/{o}' for k in range(folds) for o in ('model.safetensors', 'valid_predictions.csv'))
    return {o: (out/o).read_bytes() for o in files} | {'left': sorted(o.name for o in out.iterdir())}


@pytest.fixture(scope='module')
def three_folds(image_folder_, tmp_path_factory):
    "Folds in one go."
    out = tmp_path_factory.mktemp('folds')/'f'
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_folds(BASE, image_folder_, out, folds=3)
    torch.set_num_threads(threads)
    return out


def test_folds_judge_every_image_once_and_average(three_folds, image_folder_):
    s = Several(three_folds)
    images = sorted(str(o.relative_to(image_folder_)) for o in (image_folder_/'train').rglob('*.png'))
    assert sorted(s.preds.image) == images and len(images) == 24 and dict(s.preds.fold.value_counts()) == {0: 8, 1: 8, 2: 8}
    runs = [Run(three_folds/f'fold-{k}') for k in range(3)]
    for k, r in enumerate(runs):
        own = s.preds[s.preds.fold == k].drop(columns='fold').sort_values('image', ignore_index=True)
        pd.testing.assert_frame_equal(own, r.preds.sort_values('image', ignore_index=True))
        assert r.source.fold == k and r.source.folds == 3 and r.recipe.seed == 42 and m_name(s, k) == (f'fold {k}', r.accuracy)
    assert s.env['out_of_fold_accuracy'] == s.accuracy and 'corrected 95 % interval' in s.env['told'][1]
    test = sorted((image_folder_/'test').rglob('*.png'))
    p = predict_probs(Classifier.load(three_folds), test, num_workers=0, device='cpu')[0]
    assert (p-by_hand([r.file('model') for r in runs], test, [1, 1, 1])).abs().max() < 1e-6
    assert read_header(three_folds).metrics == {'out_of_fold_accuracy': s.accuracy}


def m_name(s, k): return s.members[k]['name'], s.members[k]['accuracy']


def test_folds_that_were_killed_go_on_as_if_not(three_folds, image_folder_, tmp_path, capsys):
    out = tmp_path/'f'
    killed(1, 'train', image_folder_, '--folds', 3, '--out', out, '--threads', 1, *WORDS)
    assert (out/'.fold-0').is_dir() and not (out/'fold-0').exists()
    with pytest.raises(FileNotFoundError, match=r'fold 0, 1, 2 is missing, to go on: mstoolkit train --resume'): Classifier.load(out)
    killed(3, 'train', '--resume', out, '--threads', 1)  # the end of the first fold, and the first epoch of the second
    assert (out/'fold-0').is_dir() and (out/'.fold-1').is_dir()
    killed(-1, 'train', '--resume', out, '--threads', 1)
    assert (out/'model.safetensors').is_file() and not (out/'report.html').exists()
    assert main(['train', '--resume', str(out), '--threads', '1']) == 0
    want, got = product(three_folds), product(out)
    assert [k for k in want if got[k] != want[k]] == []
    assert Run(out/'fold-1').env['resumed']
    capsys.readouterr()
    assert main(['train', '--resume', str(out)]) == 2 and 'has ended well, all 3 folds' in capsys.readouterr().err
    page = (out/'report.html').read_text(encoding='utf-8')
    assert page.index('Labels to look at') < page.index('The models') < page.index('Confusions') and 'Nadeau' in page
    assert main(['report', str(out), '--out', str(tmp_path/'again.html')]) == 0
    assert main(['report', str(out), str(out/'fold-0')]) == 2 and 'give it alone' in capsys.readouterr().err


@pytest.mark.slow
def test_folds_side_by_side_give_the_same_numbers(three_folds, image_folder_, tmp_path):
    train_folds(BASE, image_folder_, tmp_path/'f', folds=3, jobs=3, threads=1)
    want, got = product(three_folds), product(tmp_path/'f')
    assert [k for k in want if k != 'left' and got[k] != want[k]] == []


def test_a_fold_that_fails_is_named_and_tried_again(image_folder, tmp_path, monkeypatch, capsys):
    train = ablation.train
    def fails(r, source, out, **kw):
        if 'fold-1' in str(out): raise OSError('the disk is gone')
        return train(r, source, out, **kw)
    monkeypatch.setattr(ablation, 'train', fails)
    with pytest.raises(RunError, match=r'1 of 2 folds failed, fold 1: OSError: the disk is gone; to try again what failed: mstoolkit train --resume'):
        train_folds(replace(BASE, epochs=1), image_folder, tmp_path/'f', folds=2)
    assert (tmp_path/'f'/'fold-0').is_dir()
    with pytest.raises(ValueError, match='have changed since the folds began'):
        moved = tmp_path/'moved'
        (image_folder/'train'/'2'/'0.png').unlink()
        image_folder.rename(moved)
        resume_folds(tmp_path/'f', moved)


def test_minutes_are_shared(image_folder, tmp_path, capsys):
    assert [round(_share(10, 5, j), 2) for j in (1, 2, 5)] == [1.95, 3.25, 9.75]
    given = dict(TRAIN, minutes=.3) | dict(epochs=0)
    start = time.perf_counter()
    train_folds('auto', image_folder, tmp_path/'f', folds=2, given={k: v for k, v in given.items() if k not in ('epochs', 'schedule')})
    assert 'minutes each' in capsys.readouterr().out and time.perf_counter()-start < 90
    a, b = (Run(tmp_path/'f'/f'fold-{k}').recipe for k in (0, 1))
    assert a == b and .05 < a.minutes < .15


def test_swapped_labels_come_first(tmp_path):
    rng = np.random.default_rng(0)
    for c, colour in zip(CLASSES, COLOURS): write_images(tmp_path/'data'/c, 20, colour, rng)
    for i, (was, now) in enumerate([('2', '10'), ('10', 'red apple'), ('red apple', '2')]):
        (tmp_path/'data'/was/'0.png').rename(tmp_path/'data'/now/f'wrong{i}.png')
    s = train_folds(replace(BASE, epochs=8, bs=16, lr=1e-2), tmp_path/'data', tmp_path/'f', folds=3)
    first = label_errors(s.preds)
    assert sum('wrong' in o for o in first.image[:3]) >= 2, first
    page = (tmp_path/'f'/'report.html').read_text(encoding='utf-8')
    assert page.index(first.image[0]) < page.index('The models')


@pytest.mark.parametrize('words,what', [
    (['--folds', '1'], 'folds is 1: give 2 or more'), (['--folds', '99'], '99 folds of 24 images'), (['--jobs', '2'], 'give --folds'),
    (['--folds', '3', '--fold', '0', '--ray'], 'give --folds'), (['--folds', '3', '--epochs', '0', '--minutes', '0.01'], 'folds are to share it')])
def test_bad_folds_are_one_line(words, what, image_folder, tmp_path, capsys):
    assert main(['train', str(image_folder), '--out', str(tmp_path/'f'), *WORDS, *words]) == 2
    err = capsys.readouterr().err
    assert what in err and len(err.splitlines()) == 1 and not (tmp_path/'f').exists()


def test_fold_interval_is_nadeau_and_bengios():
    mean, low, high = fold_interval([.8, .82, .84, .86, .88])
    sd, t = .0316227766, 2.7764451
    assert abs(mean-.84) < 1e-9 and abs(high-mean - t*sd*(1/5+1/4)**.5) < 1e-6 and abs(mean-low - (high-mean)) < 1e-12
    with pytest.raises(ValueError, match='2 or more'): fold_interval([.8])
