import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from postern.anomaly import ConfidenceGate, Gate, MaxProbGate, soften, sorted_confidences
from tests.anomaly.experts import random_predictions


@given(st.integers(0, 10_000), st.floats(0.2, 20))
def test_softened_probabilities_are_the_softmax_at_the_temperature(seed, temperature):
    logits = np.random.default_rng(seed).normal(size=(4, 6))
    expected = softmax(logits / temperature, axis=1)
    np.testing.assert_allclose(soften(softmax(logits, axis=1), temperature), expected, rtol=1e-8)


def test_a_class_without_probability_weighs_next_to_nothing():
    softened = soften(np.array([[1.0, 0.0]]), 3.0)
    assert softened[0, 1] == pytest.approx(1e-4, rel=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_confidences_are_the_largest_in_order(seed, k):
    values = np.random.default_rng(seed).random((5, 6))
    np.testing.assert_array_equal(sorted_confidences(values, k), np.sort(values, axis=1)[:, ::-1][:, :k])


@pytest.mark.parametrize("use_zero_shot", [True, False])
def test_the_gate_is_a_logistic_regression_on_the_features_of_the_paper(use_zero_shot):
    fitted, other = random_predictions(0, 200), random_predictions(1, 50, seen=7, unseen=4)

    def features(predictions):
        columns = []
        for zero_shot, seen_expert in zip(predictions.zero_shot, predictions.seen_expert, strict=True):
            row = sorted((zero_shot[c] for c in predictions.unseen), reverse=True)[:2] if use_zero_shot else []
            for temperature in (1.0, 3.0):
                powers = np.array([seen_expert[c] for c in predictions.seen]) ** (1 / temperature)
                row += sorted(powers / powers.sum(), reverse=True)[:4]
            columns.append(row)
        return np.array(columns)

    reference = LogisticRegression(C=2.0, max_iter=1000).fit(features(fitted), fitted.is_seen)
    gate = ConfidenceGate(4, 2, (1.0, 3.0), use_zero_shot, C=2.0).fit(fitted)
    expected = reference.predict_proba(features(other))[:, 1]
    np.testing.assert_allclose(gate.score_seen(other), expected, atol=1e-4)
    if use_zero_shot:
        assert roc_auc_score(fitted.is_seen, gate.score_seen(fitted)) > 0.75
    assert isinstance(gate, Gate)


@given(st.integers(0, 1000))
def test_which_class_has_the_confidence_does_not_matter(seed):
    """Any renaming of the classes, other for every sample within the domain, leaves the scores as they are."""
    predictions = random_predictions(seed % 50)
    gate = ConfidenceGate().fit(predictions)
    rng = np.random.default_rng(seed)
    shuffled = {}
    for name in ("seen_expert", "zero_shot"):
        array = getattr(predictions, name).copy()
        for columns in (predictions.seen, predictions.unseen):
            array[:, columns] = rng.permuted(array[:, columns], axis=1)
        shuffled[name] = array
    renamed = dataclasses.replace(predictions, **shuffled)
    np.testing.assert_allclose(gate.score_seen(renamed), gate.score_seen(predictions), rtol=1e-12)


def test_confidences_are_as_many_as_there_are_classes_in_both_phases():
    gate = ConfidenceGate().fit(random_predictions(seen=4, unseen=2))
    assert (gate.top_seen_, gate.top_unseen_) == (4, 2)
    assert gate.score_seen(random_predictions(seen=9, unseen=3)).shape == (60,)
    with pytest.raises(ValueError, match=r"top 4 confidences of seen classes, and here are 3: fit it with top_seen=3"):
        gate.score_seen(random_predictions(seen=3, unseen=3))
    with pytest.raises(ValueError, match=r"top_unseen=1"):
        gate.score_seen(random_predictions(seen=4, unseen=1))


def test_the_largest_probability_needs_no_fit():
    predictions = random_predictions()
    expected = predictions.seen_expert.max(axis=1)
    np.testing.assert_allclose(MaxProbGate().score_seen(predictions), expected, rtol=1e-8)
    powers = predictions.seen_expert[:, predictions.seen] ** (1 / 3)
    np.testing.assert_allclose(
        MaxProbGate(3.0).fit(predictions).score_seen(predictions), powers.max(axis=1) / powers.sum(axis=1), atol=1e-3
    )
    assert isinstance(MaxProbGate(), Gate)


def test_scikit_learn_conventions():
    gate = ConfidenceGate(3, C=0.5)
    assert clone(gate).get_params() == {
        "top_seen": 3,
        "top_unseen": 5,
        "temperatures": (3.0,),
        "use_zero_shot": True,
        "C": 0.5,
    }
    assert clone(MaxProbGate(2.0)).temperature == 2.0
    with pytest.raises(NotFittedError):
        gate.score_seen(random_predictions())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: ConfidenceGate().fit(p.take(p.is_seen)), "got .* of seen classes among"),
        (lambda p: ConfidenceGate().fit(dataclasses.replace(p, labels=None)), "without labels"),
        (lambda p: ConfidenceGate(0).fit(p), "got 0"),
        (lambda p: ConfidenceGate(temperatures=()).fit(p), "at least one temperature"),
        (lambda p: ConfidenceGate(temperatures=(0.0,)).fit(p), r"positive, got 0\.0"),
        (lambda p: MaxProbGate(-1.0).score_seen(p), r"positive, got -1\.0"),
        (lambda p: sorted_confidences(p.zero_shot, 10), "got 10"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act(random_predictions())
