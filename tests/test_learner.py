"What fastai's users know works on `fusion_learner`, with every head."
import matplotlib.pyplot as plt
import pytest
import torch
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.metrics import accuracy
from fastai.vision.core import PILImage
from mstoolkit.all import BatchMix, EarlyStop, KeepBest, PlateauLR, SmoothedCrossEntropy, fusion_learner, image_dls, plot_curves, predict_folder
from mstoolkit.data.core import get_stats
from mstoolkit.models.fusion import heads


@pytest.fixture
def dls(image_folder): return image_dls(image_folder, size=32, bs=8, augment='light', num_workers=0, device='cpu')


@pytest.fixture
def learn(dls, tmp_path):
    return fusion_learner(dls, 'test_resnet', head='gated', pretrained=False, metrics=accuracy, path=tmp_path)


def frozen(learn): return [all(not p.requires_grad for p in g) for g in learn.opt.param_lists]


def test_the_five_lines_of_the_readme(dls, image_folder, tmp_path):
    learn = fusion_learner(dls, 'test_resnet', head='gated', pretrained=False, loss_func=SmoothedCrossEntropy(.1), cbs=[BatchMix(cutmix=.5)],
                           metrics=accuracy, path=tmp_path)
    learn.fine_tune(2, cbs=[PlateauLR(), EarlyStop(), KeepBest()])
    assert list(learn.run_history.to_frame().phase) == ['frozen', 'unfrozen', 'unfrozen']
    learn.show_results()
    assert len(plot_curves(learn).axes) == 3
    predict_folder(learn, image_folder/'test').to_csv(tmp_path/'prediction.csv', index=False)
    assert (tmp_path/'prediction.csv').read_text().startswith('image_name,pred_label\n10/0,')
    plt.close('all')


@pytest.mark.parametrize('head', heads)
def test_every_head_trains(head, dls, tmp_path):
    learn = fusion_learner(dls, 'test_resnet', head=head, pretrained=False, path=tmp_path)
    learn.fit_one_cycle(6, 1e-2)
    assert learn.validate()[1] > .6  # three plain colours


def test_freeze_and_rates_by_stage(learn):
    learn.create_opt()
    n = len(learn.opt.param_lists)
    assert n == 6 and sum(len(g) for g in learn.opt.param_lists) == len(list(learn.model.parameters()))
    learn.freeze()
    assert learn.opt.frozen_idx == n-1
    learn.freeze_to(-2)
    assert learn.opt.frozen_idx == n-2
    learn.unfreeze()
    assert learn.opt.frozen_idx == 0 and not any(frozen(learn))
    learn.fit(1, slice(1e-5, 1e-3))
    lrs = [h['lr'] for h in learn.opt.hypers]
    assert lrs == sorted(lrs) and lrs[0] == pytest.approx(1e-5) and lrs[-1] == pytest.approx(1e-3)


def test_pretrained_starts_frozen(dls, tmp_path):
    learn = fusion_learner(dls, 'test_resnet', pretrained=False, path=tmp_path)
    torch.save(learn.model[0].net.state_dict(), tmp_path/'w.pth')
    learn = fusion_learner(dls, 'test_resnet', weights_file=tmp_path/'w.pth', path=tmp_path)
    assert learn.opt.frozen_idx == len(learn.opt.param_lists)-1
    assert get_stats(dls) == (learn.model[0].mean, learn.model[0].std)


def test_lr_find_leaves_no_trace(learn):
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    assert learn.lr_find(num_it=10, show_plot=False).valley > 0
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert learn.run_history.rows == []


def test_predict_takes_files_and_pictures(learn, image_folder):
    learn.fit_one_cycle(6, 1e-2)
    file = image_folder/'test'/'2'/'0.png'
    label, i, probs = learn.predict(file)
    assert label == learn.dls.vocab[i] and probs.sum() == pytest.approx(1, abs=1e-5)
    for same in (str(file), PILImage.create(file)): assert torch.allclose(learn.predict(same)[2], probs, atol=1e-5)
    df = predict_folder(learn, image_folder/'test', confidence=True).set_index('image_name')
    assert df.loc['2/0', 'pred_label'] == label and df.loc['2/0', 'confidence'] == pytest.approx(float(probs[i]), abs=1e-4)


def test_get_preds_tta_validate(learn):
    learn.fit(1)
    preds, targets = learn.get_preds()
    assert preds.shape == (12, 3) and targets.shape == (12,)
    assert learn.validate()[1] == pytest.approx(float((preds.argmax(1) == targets).float().mean()))
    tta, targets2 = learn.tta(n=2)
    assert tta.shape == (12, 3) and torch.equal(targets, targets2) and not torch.allclose(tta, preds)
    plain, _ = learn.tta(n=2, beta=1.)  # all weight on the untouched images
    assert torch.allclose(plain, preds, atol=1e-4)


def test_interpretation(learn):
    learn.fit_one_cycle(6, 1e-2)  # until every class is predicted: scikit-learn's report warns otherwise
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == 12
    interp.plot_confusion_matrix()
    interp.plot_top_losses(4)
    interp.print_classification_report()
    plt.close('all')


@pytest.mark.filterwarnings('ignore:load_learner')
def test_export_and_load(learn, image_folder, tmp_path):
    learn.fit(1)
    learn.export('learner.pkl')
    back = load_learner(tmp_path/'learner.pkl')
    file = image_folder/'test'/'10'/'1.png'
    assert torch.allclose(back.predict(file)[2], learn.predict(file)[2], atol=1e-6)
    assert list(back.dls.vocab) == ['2', '10', 'red apple']
    assert (predict_folder(back, image_folder/'test') == predict_folder(learn, image_folder/'test')).all(axis=None)


@pytest.mark.parametrize('method', ['to_fp16', 'to_bf16', 'to_fp32'])
def test_precision_can_be_chosen(method, learn):
    getattr(learn, method)()
    assert hasattr(learn, 'mixed_precision') == (method != 'to_fp32')


@pytest.mark.cuda
@pytest.mark.parametrize('method', ['to_fp16', 'to_bf16'])
def test_mixed_precision_trains(method, image_folder, tmp_path):
    dls = image_dls(image_folder, size=32, bs=8, augment='light', num_workers=0, device='cuda')
    learn = getattr(fusion_learner(dls, 'test_resnet', pretrained=False, path=tmp_path, cbs=BatchMix()), method)()
    learn.fit_one_cycle(6, 1e-2)
    assert learn.validate()[1] > .6


def test_show_batch_and_results(learn):
    learn.dls.show_batch(max_n=4)
    learn.dls.show_batch(max_n=4, unique=True)
    learn.fit(1)
    learn.show_results(max_n=4)
    plt.close('all')


def test_loaders_of_torch_serve():
    "Plain torch loaders inside fastai's `DataLoaders`: the size is that of a batch, the classes have to be counted for us."
    from fastai.data.core import DataLoaders
    from torch.utils.data import DataLoader
    ds = [(torch.randn(3, 32, 32), i % 3) for i in range(12)]
    dls = DataLoaders(DataLoader(ds, 4), DataLoader(ds, 4))
    with pytest.raises(ValueError, match='give n_out='): fusion_learner(dls, 'test_resnet', pretrained=False)
    learn = fusion_learner(dls, 'test_resnet', pretrained=False, n_out=3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.run_history.rows[0]['accuracy'] is not None
