"A user's program, for the type checker alone: what it infers from the public signatures is what they say. Nothing runs it."
from pathlib import Path
from typing import Any

from mstoolkit.ablation import Study, load_study
from mstoolkit.callback.mix import BatchMix
from mstoolkit.callback.tracker import EarlyStop, KeepBest, PlateauLR
from mstoolkit.classifier import Classifier, ModelHeader, average_models, read_header
from mstoolkit.data.check import Findings, check_data
from mstoolkit.data.core import image_dls
from mstoolkit.data.sources import DataSource, data_source
from mstoolkit.learner import fusion_learner
from mstoolkit.losses import SmoothedCrossEntropy
from mstoolkit.models.fusion import MultiScaleModel, multiscale_model
from mstoolkit.predict import predict_folder
from mstoolkit.recipe import Recipe, load_recipe
from mstoolkit.runs import Run, Several
from mstoolkit.several.combine import combine
from mstoolkit.several.folds import train_folds
from mstoolkit.several.submit import Expected, submit
from mstoolkit.ship.export import Exported, export
from mstoolkit.ship.runner import Prediction, open_exported
from mstoolkit.train import train
from typing_extensions import assert_type


def readme() -> None:
    dls = image_dls('data', size=224, bs=32, augment='light')
    learn = fusion_learner(dls, 'resnest101e', head='gated', loss_func=SmoothedCrossEntropy(.1), cbs=[BatchMix(cutmix=.5)])
    learn.fine_tune(20, cbs=[PlateauLR(), EarlyStop(), KeepBest()])
    predict_folder(learn, 'data/test').to_csv('prediction.csv', index=False)


def models() -> None:
    assert_type(multiscale_model('resnet18', 'gated', 10), MultiScaleModel)
    clf = Classifier.load(Path('runs')/'gate')
    assert_type(clf, Classifier)
    assert_type(clf.header, ModelHeader)
    assert_type(read_header('model.safetensors').size, int)
    assert_type(clf.save('model.safetensors'), Path)
    assert_type(average_models(['runs/a', clf], [2, 1]), Classifier)
    assert_type(clf.predict('a.png'), Prediction)
    assert_type(clf.predict([Path('a.png'), Path('b.png')]), list[Prediction])
    assert_type(export('runs/a', format='onnx', maps=True), Exported)
    assert_type(open_exported('model.onnx').predict(b'...'), Prediction)


def runs(table: Any) -> None:
    recipe = load_recipe('gate')
    assert_type(recipe, Recipe)
    assert_type(Recipe.from_dict({'epochs': 3}, recipe), Recipe)
    assert_type(Recipe.load('mine.toml').bs, int)
    source = DataSource('data', csv=table, folds=5)
    assert_type(data_source(source), DataSource)
    assert_type(DataSource.load('data.toml'), DataSource)
    train(recipe, source, 'runs/mine')
    assert_type(Run(Path('runs')/'mine'), Run)
    assert_type(load_study('fusion'), Study)
    assert_type(check_data('data'), Findings)
    assert_type(train_folds('auto', source, folds=5), Several)
    assert_type(combine(['runs/a', 'runs/b'], 'data'), Several)
    assert_type(submit('runs/a', 'data/test'), Expected)


def mistakes() -> None: # each is one, or mypy calls its `ignore` unused
    fusion_learner(image_dls('data'), heads='gated') # type: ignore[call-arg]
    image_dls('data', 224) # type: ignore[call-arg]
    load_recipe('gate').epoch # type: ignore[attr-defined]
    predict_folder('runs/gate', 'data/test', top_k='3') # type: ignore[arg-type]
    DataSource('data', folds='5') # type: ignore[arg-type]
