"Model files that could not be used, or would be used wrongly, are refused by what they say and hold."
import json
from dataclasses import asdict

import pytest
import torch
from mstoolkit.classifier import Classifier, ModelHeader, read_header
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.predict import predict_folder
from safetensors.torch import save_file

NAN = float('nan')


@pytest.fixture(scope='module')
def clf():
    torch.manual_seed(0)
    model = multiscale_model('test_resnet', 'gated', 3, pretrained=False).eval()
    return Classifier(model, ModelHeader(config=model.config, classes=['2', '10', 'red apple'], size=32, mean=(.5,)*3, std=(.25,)*3))


@pytest.mark.parametrize('change,what', [
    (dict(size=10**9), 'its size is 1000000000'), (dict(size=40000), 'its size is 40000'), (dict(size=0), 'its size is 0'), (dict(size='32'), "its size is '32'"),
    (dict(mean=[NAN, 0, 0]), 'its mean is'), (dict(std=[0, 1, 1]), 'its std is'), (dict(std=[-1, 1, 1]), 'its std is'), (dict(mean=[1]), 'its mean is'),
    (dict(std=[float('inf'), 1, 1]), 'its std is'), (dict(classes=['a', 'a', 'b']), "names class 'a' twice"), (dict(classes=[['a'], 'b', 'c']), 'not all text'),
    (dict(classes=['a']), 'names 1 classes, and its network has 3 outputs')])
def test_headers_are_refused(clf, change, what, tmp_path):
    header = {**asdict(clf.header), **change}
    save_file(clf.model.state_dict(), tmp_path/'m.safetensors', {'mstoolkit': json.dumps(header)})
    with pytest.raises(ValueError, match=what) as e: Classifier.load(tmp_path/'m.safetensors')
    assert 'm.safetensors' in str(e.value)


@pytest.mark.parametrize('config,what', [
    (dict(backbone=None), 'its backbone is None'), (dict(backbone='resnet9000'), "unknown backbone 'resnet9000'"), (dict(head='gatd'), "did you mean 'gated'"),
    (dict(backbone='resnest101e'), 'do not fit the network that the header names'), (dict(head='pyramid'), 'do not fit'), (dict(n_stages=2), 'do not fit'),
    (dict(n_stages=99), 'n_stages=99 is out of range'), (dict(colour=1), "option of head 'gated'")])
def test_networks_are_refused_before_they_are_built(clf, config, what, tmp_path, monkeypatch):
    "A giant one would take all memory before the first tensor is compared."
    header = {**asdict(clf.header), 'config': {**clf.header.config, **config}}
    save_file(clf.model.state_dict(), tmp_path/'m.safetensors', {'mstoolkit': json.dumps(header)})
    monkeypatch.setattr(torch.nn.Module, 'load_state_dict', lambda *a, **k: pytest.fail('built'))
    with pytest.raises(ValueError, match=what): Classifier.load(tmp_path/'m.safetensors')


@pytest.mark.parametrize('value', [NAN, float('inf'), -float('inf')])
def test_weights_that_are_no_numbers_are_refused(clf, value, tmp_path):
    state = {k: v.clone() for k, v in clf.model.state_dict().items()}
    key = next(k for k, v in state.items() if v.ndim == 4)
    state[key][0, 0, 0, 0] = value
    save_file(state, tmp_path/'m.safetensors', {'mstoolkit': json.dumps(asdict(clf.header))})
    with pytest.raises(ValueError, match='no finite numbers'): Classifier.load(tmp_path/'m.safetensors')
    assert read_header(tmp_path/'m.safetensors').size == 32  # what it says of itself can still be read


def test_probabilities_that_are_no_numbers_name_the_first_image(clf, image_folder, monkeypatch):
    own = type(clf.model).forward
    def forward(self, x):
        out = own(self, x)
        out[-1] = NAN
        return out
    monkeypatch.setattr(type(clf.model), 'forward', forward)
    with pytest.raises(ValueError, match=r'1\.png: the probabilities are not numbers'): predict_folder(clf, image_folder/'test', bs=5, num_workers=0)
