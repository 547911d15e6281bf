"Confusions, class tables and calibration against plain loops."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from mstoolkit.evaluate.interpret import (calibration_bins, calibration_error, class_table, confusion_pairs, plot_calibration, plot_confusion,
                                 prediction_frame)


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
