import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import recall_score

from postern.anomaly import SeenUnseenCurve, ausuc, gzsl_scores, seen_unseen_curve


def test_accuracies_are_averages_over_classes_and_placeholders_never_win():
    labels = np.array([1, 1, 1, 2, 4, 4])
    scores = np.eye(5)[[1, 1, 2, 2, 1, 4]]
    scores[:, 0] = 9  # a column in neither list
    found = gzsl_scores(labels, scores, seen=[2, 1], unseen=[4])
    assert found == {
        "acc_tr": pytest.approx((2 / 3 + 1) / 2),
        "acc_ts": pytest.approx(0.5),
        "acc_h": pytest.approx(2 * (5 / 6) * 0.5 / (5 / 6 + 0.5)),
    }


@given(st.integers(0, 10_000))
def test_accuracies_are_scikit_learns_macro_recall(seed):
    rng = np.random.default_rng(seed)
    seen, unseen = [0, 3, 5], [1, 6]
    labels = np.concatenate([seen, unseen, rng.choice([0, 0, 0, 3, 5, 1, 6, 6], 30)])
    scores = rng.normal(size=(35, 8))
    predicted = np.array([0, 1, 3, 5, 6])[scores[:, [0, 1, 3, 5, 6]].argmax(axis=1)]
    found = gzsl_scores(labels, scores, seen, unseen)
    for name, classes in (("acc_tr", seen), ("acc_ts", unseen)):
        assert found[name] == pytest.approx(recall_score(labels, predicted, labels=classes, average="macro"))


def test_harmonic_mean_of_nothing_is_nothing():
    labels, scores = np.array([0, 1]), np.array([[0.0, 1.0], [1.0, 0.0]])
    assert gzsl_scores(labels, scores, [0], [1]) == {"acc_tr": 0.0, "acc_ts": 0.0, "acc_h": 0.0}


@given(st.integers(0, 10_000), st.booleans())
def test_the_curve_is_the_accuracy_at_every_threshold(seed, has_ties):
    rng = np.random.default_rng(seed)
    seen, unseen = np.array([4, 0, 2]), np.array([1, 3])
    labels = np.concatenate([seen, unseen, rng.integers(5, size=25)])
    best_seen, best_unseen = rng.choice(seen, 30), rng.choice(unseen, 30)
    critical = rng.integers(-3, 4, 30) / 2 if has_ties else rng.normal(size=30)
    critical[:2] = -np.inf, np.inf
    grid = np.concatenate([[-9.0], rng.permutation(critical[2:12]), rng.normal(size=5), [9.0]])
    curve = seen_unseen_curve(critical, best_seen, best_unseen, labels, seen, unseen, grid)
    np.testing.assert_array_equal(curve.thresholds, np.sort(grid))
    for place, threshold in enumerate(curve.thresholds):
        predicted = np.where(critical < threshold, best_unseen, best_seen)
        expected = gzsl_scores(labels, np.eye(5)[predicted], seen, unseen)
        assert curve.acc_tr[place] == pytest.approx(expected["acc_tr"], abs=1e-12)
        assert curve.acc_ts[place] == pytest.approx(expected["acc_ts"], abs=1e-12)
        assert curve.acc_h[place] == pytest.approx(expected["acc_h"], abs=1e-12)


@given(st.integers(0, 10_000))
def test_all_thresholds_leave_nothing_out(seed):
    """No grid, however fine, has a pair of accuracies that the curve over all intervals lacks."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1, 2, 3], rng.integers(4, size=20)])
    best_seen, best_unseen = rng.integers(2, size=24), 2 + rng.integers(2, size=24)
    critical = np.round(rng.normal(size=24), 1)
    arguments = (critical, best_seen, best_unseen, labels, [0, 1], [2, 3])
    everything, fine = seen_unseen_curve(*arguments), seen_unseen_curve(*arguments, np.linspace(-5, 5, 2001))
    pairs = {(round(x, 9), round(y, 9)) for x, y in zip(everything.acc_tr, everything.acc_ts, strict=True)}
    assert pairs == {(round(x, 9), round(y, 9)) for x, y in zip(fine.acc_tr, fine.acc_ts, strict=True)}
    assert len(everything.thresholds) == len(np.unique(critical)) + 1
    assert everything.ausuc() == pytest.approx(fine.ausuc())
    assert (np.diff(everything.acc_tr) <= 1e-12).all()
    assert (np.diff(everything.acc_ts) >= -1e-12).all()


def test_a_sample_that_never_changes_needs_no_threshold():
    curve = seen_unseen_curve(
        np.array([np.inf, -np.inf]), np.array([0, 0]), np.array([1, 1]), np.array([0, 1]), [0], [1]
    )
    assert (curve.acc_tr.tolist(), curve.acc_ts.tolist()) == ([1.0], [1.0])


def test_area_in_closed_form():
    assert ausuc([0, 1], [1, 0]) == pytest.approx(0.5)
    assert ausuc([1, 0, 0.5], [0, 0.8, 0.8]) == pytest.approx(0.5 * 0.8 + 0.25 * 0.8)
    assert ausuc([0.6, 0.0, 0.6], [0.0, 0.7, 0.7]) == pytest.approx(0.42)
    with pytest.warns(UserWarning, match="lowest acc_tr is 0.200.*no seen class"):
        assert ausuc([0.2, 0.8], [0.5, 0.0]) == pytest.approx(0.2 * 0.5 + 0.6 * 0.25)
    with pytest.warns(UserWarning, match="lowest acc_ts is 0.500.*no unseen class"):
        assert ausuc([0.0], [0.5]) == 0


def test_the_first_of_equals_is_best():
    curve = SeenUnseenCurve(np.arange(4.0), np.array([0.9, 0.5, 0.5, 0.1]), np.array([0.1, 0.5, 0.5, 0.9]))
    assert curve.best == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: gzsl_scores([0, 1], np.zeros((3, 2)), [0], [1]), r"\(2,\), got \(3, 2\)"),
        (lambda: gzsl_scores([0, 1], np.full((2, 2), np.nan), [0], [1]), "NaN"),
        (lambda: gzsl_scores([0, 0], np.zeros((2, 2)), [0], [1]), r"no sample is of the classes \[1\]"),
        (lambda: ausuc([], []), r"\(0,\)"),
        (lambda: ausuc([0.5], [0.5, 0.1]), r"\(1,\) and \(2,\)"),
        (lambda: seen_unseen_curve([np.nan], [0], [1], [0], [0], [1]), "1 NaN"),
        (lambda: seen_unseen_curve([0.0, 1], [0, 0], [1, 1], [0, 1], [0], [1], []), "at least one"),
        (lambda: seen_unseen_curve([0.0, 1], [0, 0], [1, 1], [0, 1], [0], [1], [np.nan]), "thresholds is a list"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
