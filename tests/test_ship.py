"A model that is shipped gives the same answers: in every format, over every path, or it is not left there."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from mstoolkit.classifier import Classifier, ModelHeader, average_models
from mstoolkit.cli import main
from mstoolkit.data.image import pixels_of
from mstoolkit.evaluate.attribution import scale_attribution
from mstoolkit.models.fusion import multiscale_model
from mstoolkit.predict import predict_probs
from mstoolkit.ship.export import ShippedNetwork, TorchExported, bounds, export
from mstoolkit.ship.runner import OnnxModel, OpenVinoModel
from mstoolkit.train import train
from mstoolkit.recipe import Recipe
from PIL import Image
from tests.conftest import TINY


def classifier(backbone='test_resnet', head='gated', size=64, temperature=1.3, seed=0, **kw):
    torch.manual_seed(seed)
    net = multiscale_model(backbone, head, 3, pretrained=False, img_size=size, **kw).eval()
    for p in net[1].parameters(): p.data *= 3 # answers that differ from picture to picture
    return Classifier(net, ModelHeader(config=net.config, classes=['2', '10', 'red apple'], size=size, mean=(.4, .5, .6), std=(.2, .25, .3),
                                       temperature=temperature))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Seven files of other shapes and kinds, one of them turned by its EXIF and one of them large enough to be decoded at a half."
    d, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i, (h, w) in enumerate([(40, 48), (64, 64), (200, 90), (33, 150), (300, 400)]):
        cv2.imwrite(str(d/f'{i}.{"jpg" if i % 2 else "png"}'), cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (w, h)))
    exif = Image.Exif(); exif[0x112] = 6
    Image.fromarray(rng.integers(0, 256, (150, 170, 3), np.uint8)).save(d/'turned.jpg', exif=exif)
    Image.fromarray(rng.integers(0, 256, (70, 60, 4), np.uint8)).save(d/'clear.png')
    return d


@pytest.fixture(scope='module')
def run(image_folder_, tmp_path_factory):
    out = tmp_path_factory.mktemp('ship')/'run'
    train(Recipe(**{**TINY, 'epochs': 2}), image_folder_, out)
    return out


@pytest.fixture(scope='module')
def shipped(run, tmp_path_factory):
    out = tmp_path_factory.mktemp('shipped')/'model.onnx'
    export(run, out, maps=True)
    return out


# --- Classifier.predict

def test_predict_says_what_the_library_says(pictures):
    clf, files = classifier(), sorted(pictures.iterdir())
    want, good, bad = predict_probs(clf, files, precision='exact', num_workers=0, device='cpu')
    assert not bad and good == files
    said = clf.predict(files)
    for o, p in zip(said, want):
        assert [o.probs[c] for c in clf.header.classes] == pytest.approx(p.tolist(), abs=1e-6)
        assert o.label == max(o.probs, key=o.probs.get) and list(o.probs.values()) == sorted(o.probs.values(), reverse=True)
    assert [clf.predict(f) for f in files] == [clf.predict(str(f)) for f in files]
    assert clf.predict(files[0].read_bytes()) == clf.predict(files[0])
    im = np.asarray(Image.open(pictures/'1.jpg'))
    assert clf.predict(im) == clf.predict(Image.fromarray(im)) and clf.predict([im])[0] == clf.predict(im)
    assert clf.predict([]) == []
    with pytest.raises(ValueError, match='not a int'): clf.predict(3)
    with pytest.raises(ValueError, match='nothing to see'): clf.predict(np.zeros((0, 4, 3), np.uint8))


def test_a_model_file_needs_neither_fastai_nor_albumentations(tmp_path):
    file = classifier().save(tmp_path/'m.safetensors')
    code = (f"from mstoolkit.classifier import Classifier\nimport numpy as np, sys\nprint(Classifier.load({str(file)!r}).predict(np.zeros((9, 9, 3), np.uint8)).label)\n"
            "print([m for m in ('fastai', 'albumentations', 'pandas', 'matplotlib') if m in sys.modules])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] in ('2', '10', 'red apple') and out[1] == '[]'


def test_an_exported_file_needs_no_torch(shipped, pictures):
    code = (f"from mstoolkit.ship.runner import open_exported\nimport sys\nprint(open_exported({str(shipped)!r}).predict({str(pictures/'1.jpg')!r}).label)\n"
            "import mstoolkit.ship.serve\nprint([m for m in ('torch', 'fastai', 'timm', 'pandas') if m in sys.modules])\n"
            "import os\nprint(os.environ.get('ORT_DISABLE_TELEMETRY'))")
    env = {k: v for k, v in os.environ.items() if k != 'ORT_DISABLE_TELEMETRY'}
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    assert out[0] in ('2', '10', 'red apple') and out[1] == '[]' and out[2] == '1', 'onnxruntime tells nobody of the models it opens'


# --- ONNX

@pytest.mark.parametrize('backbone, size', [('test_resnet', 64), ('test_convnext', 72), ('test_vit', 64)])
@pytest.mark.parametrize('head', ['plain', 'pyramid', 'gated'])
def test_onnx_gives_the_same_answers(backbone, size, head, pictures, tmp_path):
    clf, files = classifier(backbone, head, size), sorted(pictures.iterdir())
    done = export(clf.save(tmp_path/'m.safetensors'), maps=True, images=pictures)
    assert done.path == tmp_path/'m.onnx' and done.compared.images == len(files) and done.compared.largest < 1e-5 and not done.compared.changed
    model = OnnxModel(done.path, 1)
    onnx.checker.check_model(str(done.path), full_check=True)
    proto = onnx.load(done.path)
    assert 'Resize' not in {n.op_type for n in proto.graph.node}, 'heads are collapsed'
    pixels = np.stack([pixels_of(f, [size])[0] for f in files])
    out = model.run(pixels)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2)/255 - torch.tensor(clf.header.mean)[:, None, None])/torch.tensor(clf.header.std)[:, None, None]
    want = scale_attribution(clf, x)
    for i, m in enumerate(want.maps): np.testing.assert_allclose(out[f'map_{i+1}'], m, atol=1e-4)
    np.testing.assert_allclose(sum(v.sum((1, 2)) for k, v in out.items() if k.startswith('map_')) + out['bias'], out['logit'], atol=1e-3)
    assert model.header.strides == want.strides


def test_the_batch_is_free_and_the_file_says_what_it_is(shipped, run):
    proto = onnx.load(shipped)
    (pixels,) = proto.graph.input
    assert [d.dim_param or d.dim_value for d in pixels.type.tensor_type.shape.dim] == ['batch', 32, 32, 3] and pixels.name == 'pixels'
    meta = {o.key: o.value for o in proto.metadata_props}
    assert json.loads(meta['classes']) == ['2', '10', 'red apple'] and meta['size'] == '32' and 'bilinear' in meta['resize']
    from mstoolkit.classifier import model_digest
    assert meta['version'] == model_digest(run)
    model = OnnxModel(shipped, 1)
    assert model.header.versions['torch'] and model.header.network == 'gated head on test_resnet'
    for n in (1, 2, 7): assert model.run(np.zeros((n, 32, 32, 3), np.uint8))['probabilities'].shape == (n, 3)


def test_several_networks_are_one_graph(pictures, tmp_path):
    a, b = classifier(size=64), replace(classifier('test_convnext', 'pyramid', 48, seed=1))
    both = average_models([a, b], [2, 1])
    done = export(both.save(tmp_path/'both.safetensors'), maps=True, images=pictures)
    model = OnnxModel(done.path, 1)
    assert model.inputs == ['pixels_64', 'pixels_48'] and done.compared.largest < 1e-5
    f = pictures/'0.png'
    assert model.predict(f).probs == pytest.approx(both.predict(f).probs, abs=1e-5)
    out = model.run(*[o[None] for o in pixels_of(f, [64, 48])])
    assert sum(v.sum() for k, v in out.items() if k.startswith('map_')) + out['bias'][0] == pytest.approx(out['logit'][0], abs=1e-3)


def test_a_file_that_answers_otherwise_is_not_left(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bounds, 'onnx', -1.)
    assert main(['export', str(run), '--out', str(tmp_path/'m.onnx')]) == 2
    assert 'nothing is written, for onnx gives other answers here' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_graph_is_really_compared(run, tmp_path, monkeypatch):
    "A graph with another temperature is found out."
    import mstoolkit.ship.export as e
    class Wrong(ShippedNetwork):
        def __init__(self, *args): super().__init__(*args); self.temperature *= 3
    monkeypatch.setattr(e, 'ShippedNetwork', Wrong)
    with pytest.raises(ValueError, match='nothing is written'): export(run, tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())


def test_the_command(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path/'run')
    assert main(['export', str(copy)]) == 0
    out = capsys.readouterr().out
    assert 'model.onnx: gated head on test_resnet, 3 classes, 32 px' in out and 'on 12 images' in out and 'images/s in batches of 32' in out
    assert main(['export', str(copy)]) == 2 and 'nothing is ever overwritten' in capsys.readouterr().err


@pytest.mark.parametrize('args, why', [
    (['--format', 'onxx'], "unknown format 'onxx'; did you mean 'onnx'"), (['--half', '--int8'], 'choose one'), (['--int8', '--maps'], 'leave out'),
    (['--format', 'web'], 'npm install onnxruntime-web'), (['--format', 'torch-export', '--int8'], 'no such arithmetic'), (['--runtime', 'x'], 'leave it out'),
    (['--images', 'nope'], "there is no folder 'nope'"), (['--int8', '--max-drop', 'nan'], '--max-drop is nan'),
    (['--int8', '--max-drop', '101'], '--max-drop is 101'), (['--max-drop', '1'], 'give --int8, too'), (['--max-drop', '.5'], 'give --int8, too'),
    (['--format', 'onnx', '--format', 'openvino'], '--format is given 2 times (onnx, openvino)'), (['--int8', '--images', '.'], 'leave out --images'),
    (['--out', 'm.pt2'], 'a file whose name ends in .onnx'), (['--out', 'm.safetensors'], 'a file whose name ends in .onnx'),
    (['--format', 'torch-export', '--out', 'm.onnx'], 'a file whose name ends in .pt2'),
    (['--format', 'openvino', '--out', 'm.xml'], 'a name that ends in .openvino, or in nothing')])
def test_mistakes(args, why, run, capsys):
    assert main(['export', str(run), *args]) == 2
    err = capsys.readouterr().err
    assert why in err and len(err.splitlines()) == 1


def test_images_that_cannot_be_read_are_counted_and_named(pictures, tmp_path, capsys):
    some = Path(shutil.copytree(pictures, tmp_path/'some'))
    for i in range(5): (some/f'bad{i}.png').write_bytes(b'no picture')
    file = classifier().save(tmp_path/'m.safetensors')
    assert main(['export', str(file), '--images', str(some)]) == 0
    out = capsys.readouterr().out
    assert 'on 7 images' in out and 'left out: 5 of 12 images cannot be read: ' in out and 'bad0.png' in out and 'and 2 more' in out and 'bad4.png' not in out
    for f in pictures.iterdir(): (some/f.name).unlink()
    assert main(['export', str(file), '--images', str(some), '--out', str(tmp_path/'n.onnx')]) == 2
    err = capsys.readouterr().err
    assert 'there is nothing to compare on: 5 of 5 images cannot be read' in err and 'bad0.png' in err and len(err.splitlines()) == 1 and not (tmp_path/'n.onnx').exists()


def test_a_name_without_an_ending_is_given_it(pictures, tmp_path):
    file = classifier().save(tmp_path/'m.safetensors')
    assert export(file, tmp_path/'n', images=pictures).path == tmp_path/'n.onnx' and OnnxModel(tmp_path/'n.onnx').header.classes
    with pytest.raises(ValueError, match='a folder, and onnx is a file'): export(file, pictures, images=pictures)
    with pytest.raises(ValueError, match='already exists'): export(file, tmp_path/'n', images=pictures)


def test_validation_images_that_moved(image_folder, tiny, tmp_path, capsys):
    run = tmp_path/'run'
    train(Recipe(**tiny), image_folder, run)
    image_folder.rename(tmp_path/'moved')
    assert main(['export', str(run)]) == 2 and 'or give a folder of other images to compare on (--images)' in capsys.readouterr().err
    assert main(['export', str(run), '--int8']) == 2 and '--images' not in capsys.readouterr().err
    assert main(['card', str(run), str(tmp_path/'card')]) == 2 and '(--images)' in capsys.readouterr().err
    assert main(['card', str(run), str(tmp_path/'card'), '--images', str(tmp_path/'moved'/'test')]) == 0
    assert 'compared with PyTorch on 9 images' in (tmp_path/'card'/'README.md').read_text()


def test_what_is_no_model_or_no_picture_is_told_in_a_line():
    for bad in (None, '', 3):
        with pytest.raises(ValueError, match='a model is a model file, a run folder or hf://OWNER/NAME, and not '): Classifier.load(bad)
    with pytest.raises(ValueError, match="an image's path is empty"): classifier().predict('')


def test_a_head_without_maps_says_so(tmp_path, pictures):
    file = classifier(head='mlp').save(tmp_path/'m.safetensors')
    with pytest.raises(ValueError, match='no exact attribution'): export(file, maps=True, images=pictures)
    assert export(file, images=pictures).header.strides == []


def test_foreign_files(tmp_path, pictures):
    (tmp_path/'bad.onnx').write_bytes(b'no')
    with pytest.raises(ValueError, match='cannot be opened by onnxruntime'): OnnxModel(tmp_path/'bad.onnx')
    with pytest.raises(FileNotFoundError): OnnxModel(tmp_path/'gone.onnx')
    export(classifier().save(tmp_path/'m.safetensors'), images=pictures)
    proto = onnx.load(tmp_path/'m.onnx')
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path/'bare.onnx')
    with pytest.raises(ValueError, match='does not say what its classes are'): OnnxModel(tmp_path/'bare.onnx')


# --- other formats

def test_torch_export(run, tmp_path, pictures):
    done = export(run, tmp_path/'m.pt2', format='torch-export', maps=True)
    model = TorchExported(done.path)
    assert done.compared.largest < 1e-5 and model.predict(pictures/'1.jpg').probs == pytest.approx(Classifier.load(run).predict(pictures/'1.jpg').probs, abs=1e-5)
    assert model.run(np.zeros((5, 32, 32, 3), np.uint8))['map_1'].shape[0] == 5


@pytest.mark.parametrize('half', [False, True])
def test_openvino(run, tmp_path, pictures, half):
    pytest.importorskip('openvino')
    done = export(run, tmp_path/'ov', format='openvino', maps=True, half=half)
    model = OpenVinoModel(done.path/'model.xml', 1)
    assert model.predict(pictures/'1.jpg').probs == pytest.approx(Classifier.load(run).predict(pictures/'1.jpg').probs, abs=5e-3 if half else 1e-4)
    assert model.header.strides == OnnxModel(export(run, tmp_path/'m.onnx', maps=True).path).header.strides


def test_half(run, tmp_path):
    whole, half = export(run, tmp_path/'a.onnx'), export(run, tmp_path/'b.onnx', half=True)
    assert half.compared.mb < .75*whole.compared.mb and 0 < half.compared.largest < .02


@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_int8(run, tmp_path, format, capsys):
    if format == 'openvino': pytest.importorskip('nncf')
    done = export(run, tmp_path/'q', format=format, int8=True, max_drop=100)
    assert done.compared.drop is not None and 'paired' in done.lines()[2]
    with pytest.raises(ValueError, match='8 bits cost more than --max-drop'):
        export(run, tmp_path/'r', format=format, int8=True, max_drop=-100)
    assert not (tmp_path/'r').exists()
