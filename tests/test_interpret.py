"Confusions, class tables and calibration against plain loops."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from fastai.learner import Learner
from mstoolkit.evaluate.interpret import (calibration_bins, calibration_error, calibration_null, calibration_warning,
                                 class_table, confusion_pairs, plot_calibration, plot_confusion, prediction_frame, valid_predictions)
from mstoolkit.recipe import Recipe
from mstoolkit.models.views import larger_sizes
from mstoolkit.train import train


def made_up(n, classes, seed, right=.7):
    rng = np.random.default_rng(seed)
    names = np.array([str(i) for i in range(classes)])
    y = rng.integers(0, classes, n)
    guess = np.where(rng.random(n) < right, y, rng.integers(0, classes, n))
    conf = rng.random(n)
    return pd.DataFrame(dict(image=[f'{i}.png' for i in range(n)], label=names[y], pred_label=names[guess], confidence=conf,
                             label_confidence=np.where(guess == y, conf, (1-conf)/2)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(2, 12), st.integers(0, 999))
def test_the_class_table_agrees_with_scikit_learn(n, classes, seed):
    df = made_up(n, classes, seed)
    t = class_table(df)
    p, r, f, count = precision_recall_fscore_support(df.label, df.pred_label, labels=list(t.index), zero_division=np.nan)
    assert t.n.to_numpy() == pytest.approx(count) and t.recall.to_numpy() == pytest.approx(r)
    assert np.allclose(t.precision, p, equal_nan=True) and np.allclose(t.f1, np.nan_to_num(f), atol=1e-12)
    assert (t.recall.diff().dropna() >= 0).all() and ((t.low <= t.recall) & (t.recall <= t.high)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(2, 8), st.integers(0, 999))
def test_confusion_pairs_are_the_off_diagonal(n, classes, seed):
    df = made_up(n, classes, seed)
    names = [str(i) for i in range(classes)]
    m = confusion_matrix(df.label, df.pred_label, labels=names)
    pairs = confusion_pairs(df)
    got = {(a, b): k for a, b, k in zip(pairs.label, pairs.pred_label, pairs.n)}
    assert got == {(names[i], names[j]): m[i, j] for i in range(classes) for j in range(classes) if i != j and m[i, j]}
    assert (pairs.n.diff().dropna() <= 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 999))
def test_calibration_error_agrees_with_a_loop(n, bins, seed):
    df = made_up(n, 3, seed)
    want = 0
    for i in range(bins):
        m = [(i/bins < c <= (i+1)/bins) or (i == 0 and c == 0) for c in df.confidence]
        own = df[m]
        if len(own): want += len(own)/n*abs((own.label == own.pred_label).mean() - own.confidence.mean())
    assert calibration_error(df, bins) == pytest.approx(want, abs=1e-9)
    assert calibration_bins(df, bins).n.sum() == n


def promised(rng, n, a, b):
    "Predictions of a model that is right as often as it says."
    c = rng.beta(a, b, n)
    guess = np.where(rng.random(n) < c, 'x', 'y')
    return pd.DataFrame(dict(label='x', pred_label=guess, confidence=c, label_confidence=c))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 999))
def test_the_perfect_model_agrees_with_a_loop_over_drawn_labels(n, bins, seed):
    rng, df = np.random.default_rng(seed), made_up(n, 3, seed)
    got = calibration_null(df, bins, n_sim=4000)
    drawn = []
    for _ in range(300):
        hit = rng.random(n) < df.confidence
        drawn.append(calibration_error(df.assign(label='x', pred_label=np.where(hit, 'x', 'y')), bins))
    drawn, ece = np.array(drawn), calibration_error(df, bins)
    assert got.mean == pytest.approx(drawn.mean(), abs=5*drawn.std()/300**.5 + 1e-6)
    below = [(drawn < got.high - 1e-6).mean(), (drawn <= got.high + 1e-6).mean()]  # few images have few values
    assert below[0] <= .95+.065 and below[1] >= .95-.065
    share = [(drawn >= ece + o).mean() for o in (1e-6, -1e-6)]
    assert share[0] - .13 <= got.p <= share[1] + .13
    assert calibration_null(df, bins) == calibration_null(df, bins)


def test_the_perfect_model_is_drawn_in_parts_where_there_are_many_images():
    df = promised(np.random.default_rng(0), 30_000, 3, 2)
    got, small = calibration_null(df, n_sim=400), calibration_null(df.head(300), n_sim=400)
    assert got.mean < small.mean/5 and got.high > got.mean and 1/401 <= got.p <= 1


@pytest.mark.parametrize('a,b', [(3, 2), (18, 2)])  # accuracy .6 and .9
def test_a_calibrated_model_is_seldom_warned_about(a, b):
    rng = np.random.default_rng(1)
    said = [calibration_warning(promised(rng, 300, a, b)) for _ in range(100)]
    assert sum(map(bool, said)) <= 10, [o for o in said if o]


def test_a_warning_says_which_way_the_confidence_errs():
    df = promised(np.random.default_rng(2), 1000, 6, 4)
    assert 'too high:' in calibration_warning(df.assign(confidence=df.confidence**.3))
    assert 'too low:' in calibration_warning(df.assign(confidence=df.confidence**2))
    both = df.assign(confidence=np.where(np.arange(1000) % 2, .99, df.confidence.clip(upper=.3)))
    assert 'too high for some and too low for others' in calibration_warning(both)
    assert 'a perfect model has' in calibration_warning(both)
    assert calibration_warning(df.assign(confidence=df.confidence**.3), least=.9) == ''


def test_one_image_has_an_interval_from_0_to_1():
    df = made_up(1, 2, 0)
    for table in (class_table(df), calibration_bins(df)): assert table[['low', 'high']].to_numpy().tolist() == [[0, 1]]
    assert 'a perfect model' in plot_calibration(df).axes[0].get_title()


@pytest.mark.parametrize('classes', [2, 15, 16, 100])
def test_figures_at_any_number_of_classes(classes):
    df = made_up(400, classes, 1)
    fig = plot_confusion(df)
    assert len(fig.axes) == 3 and len(fig.axes[1].patches) == min(20, len(confusion_pairs(df)))
    assert len(fig.axes[0].get_yticks()) <= 34
    assert len(plot_calibration(df).axes) == 2
    assert plot_confusion(df.assign(pred_label=df.label)).axes[1].get_title() == 'no mistakes'


def test_predictions_come_back_from_a_file_as_they_were(tmp_path):
    df = made_up(30, 12, 0)
    df.loc[0, 'label'] = 'NA'
    df.to_csv(tmp_path/'valid_predictions.csv', index=False)
    for source in (tmp_path, tmp_path/'valid_predictions.csv'): pd.testing.assert_frame_equal(prediction_frame(source), df)
    with pytest.raises(FileNotFoundError, match='no predictions'): prediction_frame(tmp_path/'none')


def test_the_size_that_is_chosen_is_predicted_once(image_folder, tiny, tmp_path, monkeypatch):
    passes, get_preds = [], Learner.get_preds
    monkeypatch.setattr(Learner, 'get_preds', lambda self, **kw: passes.append(1) or get_preds(self, **kw))
    monkeypatch.setattr('mstoolkit.train._draw', lambda *a: None)
    learn = train(Recipe(**tiny, test_size=-1, precision='fp32', memory_format='contiguous'), image_folder, tmp_path/'run')
    assert len(passes) == 1 + len(larger_sizes(32)) > 1
    pd.testing.assert_frame_equal(prediction_frame(tmp_path/'run'), valid_predictions(learn), check_dtype=False)
