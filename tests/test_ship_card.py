"The folder for the hub: a card that the hub's own parser reads, nothing of this machine in it, and a model that loads by its address."
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from mstoolkit.classifier import Classifier, hub_file, read_header
from mstoolkit.cli import main
from mstoolkit.recipe import Recipe
from mstoolkit.runs import Run, read_env, write_env
from mstoolkit.ship.runner import OnnxModel
from mstoolkit.train import train
from tests.conftest import TINY


@pytest.fixture(scope='module')
def run(image_folder_, tmp_path_factory):
    out = tmp_path_factory.mktemp('card')/'run'
    train(Recipe(**TINY), image_folder_, out)
    return out


@pytest.fixture(scope='module')
def folder(run, tmp_path_factory):
    out = tmp_path_factory.mktemp('hub')/'fruit'
    assert main(['card', str(run), str(out), '--license', 'apache-2.0', '--maps']) == 0
    return out


def test_the_hub_reads_the_card(folder, run):
    card = ModelCard.load(folder/'README.md')
    d = card.data.to_dict()
    assert d['library_name'] == 'mstoolkit' and d['pipeline_tag'] == 'image-classification' and d['license'] == 'apache-2.0' and 'onnx' in d['tags']
    (found,) = card.data.eval_results
    assert found.metric_value == pytest.approx(Run(run).accuracy, abs=1e-4) and found.dataset_split == 'validation' and card.data.model_name == 'fruit'


def test_the_card_says_what_the_run_knows_and_nothing_of_the_machine(folder, run, image_folder_):
    text = (folder/'README.md').read_text(encoding='utf-8')
    for o in ('95 % interval', '| red apple | 4 |', "backbone = \"test_resnet\"", 'Limits', '`red apple`', 'hf://OWNER/fruit', 'compared with PyTorch on 12 images', '24 training images'): assert o in text, o
    assert str(image_folder_) not in text and not re.search(r'/(tmp|home|root|work)/', text)
    assert '\n\n\n\n' not in text


def test_what_is_in_the_folder_opens(folder, run, image_folder_):
    assert sorted(o.name for o in folder.iterdir()) == ['README.md', 'confusion.png', 'model.onnx', 'model.safetensors']
    f = image_folder_/'val'/'2'/'0.png'
    assert OnnxModel(folder/'model.onnx', 1).predict(f).label == Classifier.load(folder).predict(f).label == Classifier.load(run).predict(f).label


def test_secrets_of_a_recipe_stay_here(run, tmp_path):
    "A weights file's path is the machine's own."
    import shutil

    from mstoolkit.ship.card import _recipe
    copy = Path(shutil.copytree(run, tmp_path/'copy'))
    r = Run(copy)
    toml = (copy/'recipe.toml').read_text().replace('weights_file = ""', 'weights_file = "/secret/place/net.pth"')
    (copy/'recipe.toml').write_text(toml)
    assert 'secret' not in _recipe(Run(copy)) and 'net.pth' in _recipe(Run(copy)) and r.path == copy


def test_a_folder_is_never_overwritten(run, folder, capsys):
    assert main(['card', str(run), str(folder)]) == 2 and 'already exists' in capsys.readouterr().err
    assert main(['card', str(run/'gone'), str(folder)]) == 2


def test_calibration_is_told(run, tmp_path):
    import shutil
    copy = Path(shutil.copytree(run, tmp_path/'copy'))
    env = read_env(copy)
    write_env(copy, env | dict(calibration=dict(env.get('calibration', {}), temperature=1.2, images=500, lines=['temperature 1.200, fitted on 500 validation images'])))
    assert main(['card', str(copy), str(tmp_path/'c')]) == 0
    assert 'temperature 1.200, fitted on 500' in (tmp_path/'c'/'README.md').read_text() and OnnxModel(tmp_path/'c'/'model.onnx').header.calibrated


# --- hf://

@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    "A hub that is a folder; what is asked of it is kept."
    asked = []
    def hf_hub_download(repo, name, *, revision=None):
        asked.append((repo, name, revision))
        if repo != 'me/fruit': raise LocalEntryNotFoundError('no connection')
        if revision == 'empty': raise EntryNotFoundError('404')
        snap = tmp_path/'models--me--fruit'/'snapshots'/(revision or 'c0ffee')
        snap.mkdir(parents=True, exist_ok=True)
        (snap/name).write_bytes((folder/name).read_bytes())
        return str(snap/name)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', hf_hub_download)
    return asked


def test_a_model_of_the_hub_loads_by_its_address(hub, folder, capsys):
    clf = Classifier.load('hf://me/fruit@abc123')
    assert clf.header == Classifier.load(folder).header and hub == [('me/fruit', 'model.safetensors', 'abc123')]
    assert not capsys.readouterr().err
    assert read_header('hf://me/fruit').classes == clf.header.classes
    assert 'hf://me/fruit@c0ffee stays the same' in capsys.readouterr().err


def test_addresses_that_lead_nowhere(hub):
    for bad in ('hf://fruit', 'hf://a/b/c', 'hf://a/b@', 'hf://../x'):
        with pytest.raises(ValueError, match='is no address of a model'): hub_file(bad)
    with pytest.raises(ConnectionError, match='the hub does not answer'): Classifier.load('hf://you/none')
    with pytest.raises(FileNotFoundError, match='mstoolkit card writes one'): Classifier.load('hf://me/fruit@empty')


def test_the_command_line_takes_addresses(hub, image_folder_, tmp_path):
    assert main(['predict', 'hf://me/fruit@abc', str(image_folder_/'val'), '--out', str(tmp_path/'p.csv')]) == 0
    assert main(['export', 'hf://me/fruit@abc', '--images', str(image_folder_/'val'), '--out', str(tmp_path/'m.onnx')]) == 0
    assert OnnxModel(tmp_path/'m.onnx').header.classes == ['2', '10', 'red apple']
