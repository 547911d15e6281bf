"Several models as one: what a file of them predicts, how it is taken apart, folds, soups, ensembles, a submission."
import json
import subprocess
import sys
from dataclasses import asdict

import pandas as pd
import pytest
import torch
from mstoolkit.classifier import Classifier, ModelHeader, average_models, read_header
from mstoolkit.cli import main
from mstoolkit.data.core import image_loader
from mstoolkit.evaluate.attribution import scale_attribution, scale_shares
from mstoolkit.models.ensemble import Ensemble
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.predict import predict_folder, predict_probs

CLASSES = ['2', '10', 'red apple']


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
