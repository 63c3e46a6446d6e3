import dataclasses

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from postern.anomaly import CalibratedStacking, gzsl_scores
from tests.anomaly.experts import random_predictions


def test_the_chosen_constant_is_the_best_of_the_grid():
    validation, test = random_predictions(0, 90), random_predictions(1, 90)
    grid = np.linspace(-1, 1, 81)
    stacking = CalibratedStacking(grid).tune(validation)
    rated = []
    for gamma in grid:
        scores = validation.zero_shot - gamma * np.isin(np.arange(9), validation.seen)
        rated.append(round(gzsl_scores(validation.labels, scores, validation.seen, validation.unseen)["acc_h"], 9))
    assert stacking.threshold_ == grid[int(np.argmax(rated))]
    assert stacking.tuned_acc_h_ == pytest.approx(max(rated))
    np.testing.assert_array_equal(stacking.predict(test), stacking.scores(test).argmax(axis=1))
    found = gzsl_scores(test.labels, stacking.scores(test), test.seen, test.unseen)
    evaluated = stacking.evaluate(test)
    assert {name: evaluated[name] for name in found} == pytest.approx(found)
    assert CalibratedStacking().tune(validation).tuned_acc_h_ >= max(rated) - 1e-9


def test_it_asks_the_zero_shot_expert_alone():
    predictions = random_predictions(2)
    stacking = CalibratedStacking().tune(predictions)
    uniform = np.full_like(predictions.seen_expert, 1 / 9)
    other = dataclasses.replace(predictions, seen_expert=uniform)
    np.testing.assert_array_equal(stacking.predict(other), stacking.predict(predictions))
    assert CalibratedStacking().tune(other).threshold_ == stacking.threshold_


def test_the_constant_trades_seen_for_unseen_classes():
    predictions = random_predictions(3)
    curve = CalibratedStacking().tune(predictions).curve(predictions, [-1.1, 0.0, 1.1])
    assert curve.acc_ts[0] == curve.acc_tr[2] == 0
    everyone = gzsl_scores(predictions.labels, predictions.zero_shot, predictions.seen, predictions.unseen)
    assert (curve.acc_tr[1], curve.acc_ts[1]) == pytest.approx((everyone["acc_tr"], everyone["acc_ts"]))


def test_scikit_learn_conventions():
    stacking = clone(CalibratedStacking((0.0, 0.1, 0.2)))
    assert stacking.get_params() == {"thresholds": (0.0, 0.1, 0.2)}
    with pytest.raises(NotFittedError, match="call tune"):
        stacking.scores(random_predictions())
