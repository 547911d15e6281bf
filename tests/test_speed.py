"The memory format is chosen by what was measured, once, and changes nothing but speed."
import sys

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from mstoolkit.callback import speed
from mstoolkit.callback.speed import MemoryFormat
from mstoolkit.core import keep_freed_memory
from mstoolkit.models.fusion import multiscale_model


@pytest.fixture
def learn(tmp_path):
    torch.manual_seed(0)
    ds = [(torch.randn(3, 32, 32), i % 5) for i in range(16)]
    dls = DataLoaders.from_dsets(ds, ds, bs=8, device='cpu', num_workers=0)
    return Learner(dls, multiscale_model('test_resnet', 'gated', 5, pretrained=False), CrossEntropyLossFlat(), path=tmp_path)


def conv(learn): return learn.model[1].convs[0].weight


@pytest.mark.parametrize('contiguous,last,chosen', [(1., .5, 'channels-last'), (1., .97, 'contiguous'), (.5, 1., 'contiguous')])
def test_auto_keeps_the_faster(contiguous, last, chosen, learn, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(speed, 'time_formats', lambda *a, **kw: calls.append(a) or {'contiguous': contiguous, 'channels-last': last})
    cb = MemoryFormat()
    learn.fit(1, cbs=cb)
    learn.fit(1, cbs=cb)
    assert cb.chosen == chosen and len(calls) == 1 and f'memory format {chosen}' in capsys.readouterr().out
    assert conv(learn).is_contiguous(memory_format=speed.formats[chosen])


def test_the_gain_that_is_asked_for_decides(learn, monkeypatch):
    monkeypatch.setattr(speed, 'time_formats', lambda *a, **kw: {'contiguous': 1., 'channels-last': .97})
    learn.fit(1, cbs=(cb := MemoryFormat(min_gain=.02)))
    assert cb.chosen == 'channels-last'  # 3 % are more than 2


def test_measuring_changes_no_weight_and_takes_no_draw(learn):
    before, stream = {k: v.clone() for k, v in learn.model.state_dict().items()}, torch.get_rng_state()
    speed.time_formats(learn.model, torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), repeats=1)
    assert torch.equal(torch.get_rng_state(), stream)  # dropout in the copies draws from a stream of its own
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_lr_find_and_predictions_measure_nothing(learn, monkeypatch):
    import fastai.callback.schedule  # noqa: F401  gives learners lr_find
    monkeypatch.setattr(speed, 'time_formats', lambda *a, **kw: pytest.fail('measured'))
    learn.add_cb(MemoryFormat())
    learn.lr_find(num_it=6, show_plot=False)
    learn.get_preds()
    assert learn.memory_format.chosen is None


def test_unknown_format():
    with pytest.raises(ValueError, match="did you mean 'channels-last'"): MemoryFormat('channels_last')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="glibc's switch")
def test_keep_freed_memory(): assert keep_freed_memory() is True


@pytest.mark.slow
def test_a_compiled_run_trains_and_its_model_file_loads(image_folder, tiny, tmp_path):
    from mstoolkit.classifier import Classifier
    from mstoolkit.recipe import Recipe
    from mstoolkit.train import train
    learn = train(Recipe(**tiny, compile=True), image_folder, tmp_path/'run')
    assert len(learn.run_history.rows) == 1 and Classifier.load(tmp_path/'run').header.classes == ['2', '10', 'red apple']
