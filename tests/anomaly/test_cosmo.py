import dataclasses
import itertools
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import findroot, log, mp, mpf
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from postern.anomaly import (
    ConfidenceGate,
    COSMOClassifier,
    DomainBest,
    MaxProbGate,
    critical_thresholds,
    domain_best,
    gate_training_rows,
    gzsl_combine,
    gzsl_scores,
    unseen_probability,
)
from tests.anomaly.experts import random_predictions

MODES = [("total", None), ("adaptive", None), ("constant", 0.35), ("hard", None)]
TEMPERATURES = (0.003, 0.1, 3.0)


def literal_scores(predictions, p_unseen, mode, g):
    """The equations, one sample and one class at a time."""
    scores = np.zeros(predictions.zero_shot.shape)
    for i, p in enumerate(p_unseen):
        if mode == "hard":
            p = float(p > 0.5)
        domains = (
            (predictions.unseen, predictions.zero_shot[i], p, 1 - p),
            (predictions.seen, predictions.seen_expert[i], 1 - p, p),
        )
        for columns, probability, own, other in domains:
            mass = sum(probability[c] for c in columns)
            for c in columns:
                scores[i, c] = {
                    "adaptive": own * (probability[c] + other / len(columns)),
                    "total": own * probability[c] / mass,
                    "hard": own * probability[c] / mass,
                    "constant": own * ((g or 0) * probability[c] / mass + (1 - (g or 0)) / len(columns)),
                }[mode]
    return scores


def combined(predictions, p_unseen, mode, g):
    return gzsl_combine(
        predictions.seen_expert, predictions.zero_shot, p_unseen, predictions.seen, predictions.unseen, mode, g
    )


@pytest.mark.parametrize(("mode", "g"), MODES)
def test_scores_are_the_equations(mode, g):
    predictions = random_predictions(samples=30)
    p_unseen = np.random.default_rng(1).random(30)
    np.testing.assert_allclose(
        combined(predictions, p_unseen, mode, g), literal_scores(predictions, p_unseen, mode, g), rtol=1e-12
    )


@given(st.integers(0, 1000))
def test_only_adaptive_scores_are_no_distribution(seed):
    predictions = random_predictions(seed, samples=20)
    p_unseen = np.random.default_rng(seed).random(20)
    for mode, g in MODES:
        sums = combined(predictions, p_unseen, mode, g).sum(axis=1)
        if mode == "adaptive":
            mass = predictions.zero_shot[:, predictions.unseen].sum(axis=1)
            np.testing.assert_allclose(sums, p_unseen * mass + 1 - p_unseen + 2 * p_unseen * (1 - p_unseen))
        else:
            np.testing.assert_allclose(sums, 1)


def test_the_zero_shot_experts_mass_on_seen_classes_counts_in_adaptive_smoothing_alone():
    predictions = random_predictions()
    moved = predictions.zero_shot.copy()
    moved[:, predictions.unseen] *= 0.01
    moved[:, predictions.seen[0]] += 1 - moved.sum(axis=1)
    other = dataclasses.replace(predictions, zero_shot=moved)
    p_unseen = np.full(60, 0.5)
    for mode, g in MODES:
        before, after = (combined(each, p_unseen, mode, g)[:, predictions.unseen] for each in (predictions, other))
        if mode == "adaptive":
            assert (after <= before).all()
            assert (after < before).mean() > 0.9
        else:
            np.testing.assert_allclose(after, before, rtol=1e-6)


def test_smoothing_lets_a_doubtful_expert_not_win_by_one_class():
    """The zero-shot expert is sure of a class; the gate holds the sample for a seen one, the seen expert hesitates."""
    seen_expert, zero_shot = np.array([[0.6, 0.4, 0, 0]]), np.array([[0, 0, 1.0, 0]])
    arguments = (seen_expert, zero_shot, np.array([0.39]), [0, 1], [2, 3])
    assert gzsl_combine(*arguments, "total").argmax() == 2
    assert gzsl_combine(*arguments, "adaptive").argmax() == 2
    more_classes = (
        np.pad(seen_expert, ((0, 0), (0, 6))),
        np.pad(zero_shot, ((0, 0), (0, 6))),
        np.array([0.39]),
        [0, 1],
        range(2, 10),
    )
    assert gzsl_combine(*more_classes, "total").argmax() == 2
    assert gzsl_combine(*more_classes, "adaptive").argmax() == 0


def test_an_expert_that_gives_its_domain_nothing_is_uniform():
    scores = gzsl_combine(np.array([[1.0, 0, 0]]), np.array([[1.0, 0, 0]]), np.array([0.6]), [0], [1, 2], "total")
    np.testing.assert_allclose(scores, [[0.4, 0.3, 0.3]])


def test_gate_probability_is_a_logistic_function_that_does_not_overflow():
    q = np.array([0.2, 0.5, 0.9])
    np.testing.assert_allclose(unseen_probability(q, 0.5, 0.1), 1 / (1 + np.exp((q - 0.5) / 0.1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extreme = unseen_probability(np.array([-50.0, 50.0]), 0.0, 0.003)
    assert 0 < extreme[1] < 1e-15
    assert 1 - 1e-15 < extreme[0] < 1


@given(
    st.integers(0, 1000),
    st.sampled_from(MODES),
    st.floats(-3, 3),
    st.sampled_from([0.003, 0.03, 0.3, 1.0, 10.0]),
    st.sampled_from([(2, 9), (9, 2), (4, 4), (1, 1)]),
    st.sampled_from([0.02, 1.0]),
)
def test_the_closed_form_decides_as_the_largest_score_does(seed, mode, threshold, temperature, sizes, concentration):
    mode, g = mode
    predictions = random_predictions(seed, 40, *sizes, concentration=concentration)
    q = np.random.default_rng(seed).uniform(-0.5, 1.5, 40)
    seen = domain_best(predictions.seen_expert, predictions.seen)
    unseen = domain_best(predictions.zero_shot, predictions.unseen)
    critical = critical_thresholds(seen, unseen, q, *sizes, temperature, mode, g)
    decided = np.where(critical < threshold, unseen.column, seen.column)
    scores = combined(predictions, unseen_probability(q, threshold, temperature), mode, g)
    # equal up to rounding, which may decide between classes of the same score
    np.testing.assert_allclose(scores[np.arange(40), decided], scores.max(axis=1), rtol=1e-9)
    assert (scores[np.arange(40), decided] > 0).all()


@pytest.mark.parametrize(
    ("a", "b", "num_seen", "num_unseen"),
    [
        (0.3, 0.6, 40, 20), (0.3, 0.6, 3, 50), (1e-9, 0.9, 40, 2), (0.9, 1e-9, 2, 40), (0.475, 1e-6, 40, 2),
        (1e-6, 0.475, 40, 2), (1e-6, 0.3, 40, 2), (0.3, 1e-6, 2, 40), (1.0, 1.0, 7, 7), (1e-13, 1e-13, 150, 50),
        (1e-12, 1 - 1e-12, 150, 50), (0.04, 0.0067, 150, 50),
    ],
)  # fmt: skip
def test_the_root_has_all_its_digits(a, b, num_seen, num_unseen):
    """Against the quadratic's root in 60 digits, also where the textbook formula cancels."""
    with mp.workdps(60):
        A, B = mpf(a), mpf(b)
        over_u, over_s = mpf(1) / num_unseen, mpf(1) / num_seen
        root = findroot(
            lambda p: p * (A + (1 - p) * over_u) - (1 - p) * (B + p * over_s),
            (mpf(0), mpf(1)), solver="anderson", tol=1e-100, maxsteps=500, verify=False,
        )  # fmt: skip
        expected = float(log(root / (1 - root)))
    zero = np.zeros(1, dtype=int)
    seen, unseen = DomainBest(zero, np.array([b]), np.ones(1)), DomainBest(zero, np.array([a]), np.ones(1))
    found = critical_thresholds(seen, unseen, np.array([0.25]), num_seen, num_unseen, 0.5)
    assert found[0] == pytest.approx(0.25 + 0.5 * expected, rel=1e-9)


def test_confidences_of_zero_never_change_sides():
    zero = np.zeros(1, dtype=int)
    none, sure = DomainBest(zero, np.zeros(1), np.zeros(1)), DomainBest(zero, np.full(1, 0.9), np.ones(1))
    assert critical_thresholds(sure, none, np.zeros(1), 2, 2, 1.0) == np.inf
    assert critical_thresholds(none, sure, np.zeros(1), 2, 2, 1.0) == -np.inf


@pytest.mark.parametrize("mode", ["total", "adaptive", "constant", "hard"])
def test_tuning_takes_the_best_point_of_the_grid(mode):
    validation, test = random_predictions(3, 90, 6, 4), random_predictions(4, 90, 8, 5)
    grid, smoothings = tuple(np.linspace(-1, 2, 31)), (0.2, 0.7)
    cosmo = COSMOClassifier(ConfidenceGate(3, 2), mode, grid, TEMPERATURES, smoothings).tune(validation)
    gate = ConfidenceGate(3, 2).fit(validation.take(gate_training_rows(90)))
    q, rated = gate.score_seen(validation), []
    for temperature, g, threshold in itertools.product(
        TEMPERATURES, smoothings if mode == "constant" else (None,), grid
    ):
        scores = combined(validation, unseen_probability(q, threshold, temperature), mode, g)
        found = gzsl_scores(validation.labels, scores, validation.seen, validation.unseen)
        rated.append((round(found["acc_h"], 9), temperature, g, threshold))
    best = max(rated, key=lambda entry: entry[0])
    assert cosmo.tuned_acc_h_ == pytest.approx(best[0])
    assert (cosmo.gate_temperature_, cosmo.smoothing_, cosmo.threshold_) == best[1:]
    scores = cosmo.scores(test)
    np.testing.assert_array_equal(cosmo.predict(test), scores.argmax(axis=1))
    found = gzsl_scores(test.labels, scores, test.seen, test.unseen)
    evaluated = cosmo.evaluate(test)
    assert {name: evaluated[name] for name in found} == pytest.approx(found)
    np.testing.assert_allclose(
        cosmo.p_unseen(test), unseen_probability(gate.score_seen(test), cosmo.threshold_, cosmo.gate_temperature_)
    )


@given(st.integers(0, 100))
def test_all_thresholds_are_at_least_as_good_as_a_grid(seed):
    validation = random_predictions(seed, 60)
    for mode in ("adaptive", "hard"):
        exact = COSMOClassifier(MaxProbGate(), mode, None, (0.1,)).tune(validation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the best point may be at an edge
            grid = COSMOClassifier(MaxProbGate(), mode, np.linspace(-2, 3, 501), (0.1,)).tune(validation)
        assert exact.tuned_acc_h_ >= grid.tuned_acc_h_ - 1e-12
        assert exact.evaluate(validation)["acc_h"] == pytest.approx(exact.tuned_acc_h_)


def test_the_gate_sees_two_thirds_of_validation_and_nothing_of_the_test_classes():
    np.testing.assert_array_equal(gate_training_rows(7), [False, True, True, False, True, True, False])
    validation, test = random_predictions(5, 90), random_predictions(6, 90)
    cosmo = COSMOClassifier().tune(validation)
    before = pickle.dumps(cosmo.gate_)
    cosmo.predict(dataclasses.replace(test, labels=None))
    cosmo.evaluate(test)
    assert pickle.dumps(cosmo.gate_) == before
    changed = dataclasses.replace(
        validation, zero_shot=np.where(gate_training_rows(90)[:, None], validation.zero_shot, 1 / 9)
    )
    np.testing.assert_array_equal(
        COSMOClassifier().tune(changed).gate_.regression_.coef_, cosmo.gate_.regression_.coef_
    )


def test_an_edge_of_the_thresholds_is_told():
    validation = random_predictions(7)
    with pytest.warns(UserWarning, match="is the lowest of the range"):
        COSMOClassifier(thresholds=np.linspace(0.9, 4, 20), temperatures=(0.01,)).tune(validation)
    with pytest.warns(UserWarning, match="is the highest of the range"):
        COSMOClassifier(thresholds=np.linspace(-3, 0.5, 20), temperatures=(0.01,)).tune(validation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        COSMOClassifier().tune(validation)


def test_scikit_learn_conventions():
    gate = ConfidenceGate(3)
    cosmo = COSMOClassifier(gate, "hard")
    assert cosmo.get_params()["gate__top_seen"] == 3
    copied = clone(cosmo).set_params(gate__top_seen=2, mode="total")
    assert (gate.top_seen, copied.gate.top_seen, copied.mode) == (3, 2, "total")
    copied.tune(random_predictions())
    assert copied.gate_ is not copied.gate
    assert not hasattr(copied.gate, "regression_")
    assert not hasattr(clone(copied), "threshold_")
    same = pickle.loads(pickle.dumps(copied))
    np.testing.assert_array_equal(same.predict(random_predictions(1)), copied.predict(random_predictions(1)))
    for act in (cosmo.predict, cosmo.scores, cosmo.evaluate, cosmo.curve, cosmo.p_unseen):
        with pytest.raises(NotFittedError, match="call tune"):
            act(random_predictions())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: combined(p, np.full(60, 0.5), "soft", None), r"'adaptive', 'total', 'constant', 'hard', got 'soft'"),
        (lambda p: combined(p, np.full(60, 0.5), "constant", None), "'constant' with None"),
        (lambda p: combined(p, np.full(60, 0.5), "total", 0.5), r"'total' with 0\.5"),
        (lambda p: combined(p, np.full(60, 0.5), "constant", 0.0), r"\(0, 1\], got 0\.0"),
        (lambda p: combined(p, np.full(60, 1.5), "total", None), r"\[0, 1\], got 1\.5"),
        (lambda p: combined(p, np.full(60, np.nan), "total", None), "got nan"),
        (lambda p: combined(p, np.full(59, 0.5), "total", None), r"\(59,\)"),
        (lambda p: unseen_probability(np.zeros(3), 0.5, 0.0), r"positive, got 0\.0"),
        (lambda p: COSMOClassifier(mode="soft").tune(p), "got 'soft'"),
        (lambda p: COSMOClassifier(temperatures=()).tune(p), "at least one"),
        (lambda p: COSMOClassifier(temperatures=(-1.0,)).tune(p), r"positive, got -1\.0"),
        (lambda p: COSMOClassifier(thresholds=()).tune(p), "at least one"),
        (lambda p: COSMOClassifier().tune(dataclasses.replace(p, labels=None)), "without labels"),
        (lambda p: COSMOClassifier(MaxProbGate()).tune(p.take(p.is_seen)), "no sample is of the classes"),
        (lambda p: COSMOClassifier().tune(p).evaluate(p.take(~p.is_seen)), "no sample is of the classes"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act(random_predictions())
