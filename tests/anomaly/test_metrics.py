import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from postern.anomaly import ood_metrics

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(scores, scores)
def test_against_every_threshold(inside, outside):
    inside, outside = np.array(inside), np.array(outside)
    found = ood_metrics(inside, outside)
    thresholds = np.unique(np.concatenate([inside, outside]))
    accepting = [t for t in thresholds if (inside >= t).mean() >= 0.95]
    assert found["tnr95"] == pytest.approx((outside < max(accepting)).mean())
    truth = np.concatenate([np.ones_like(inside), np.zeros_like(outside)])
    everything = np.concatenate([inside, outside])
    best = max(balanced_accuracy_score(truth, everything >= t) for t in [*thresholds, np.inf])
    assert found["dtacc"] == pytest.approx(best)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, everything))
    wins = (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2
    assert found["auroc"] == pytest.approx(wins)
    assert found["auin"] == pytest.approx(average_precision_score(truth, everything))
    assert found["auout"] == pytest.approx(average_precision_score(1 - truth, -everything))


def test_higher_inside_scores_are_better():
    assert ood_metrics([2.0, 3.0], [0.0, 1.0]) == dict.fromkeys(("tnr95", "auroc", "dtacc", "auin", "auout"), 1.0)
    worst = ood_metrics([0.0, 1.0], [2.0, 3.0])
    assert worst["auroc"] == worst["tnr95"] == 0
    assert worst["dtacc"] == 0.5


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [([], [1.0], "inside"), ([1.0], [], "outside"), ([np.nan], [1.0], "finite"), ([[1.0]], [1.0], r"\(1, 1\)")],
)
def test_bad_scores(inside, outside, message):
    with pytest.raises(ValueError, match=message):
        ood_metrics(inside, outside)
