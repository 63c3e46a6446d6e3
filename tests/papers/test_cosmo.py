"""The worlds that COSMO is tried in, and the full-scale recipe on a miniature of its data."""

import dataclasses

import numpy as np
import pytest
from scipy.io import savemat

import postern.papers.cosmo as paper
from postern.anomaly import ConfidenceGate, COSMOClassifier, MaxProbGate
from postern.claims import Run
from postern.errors import Unavailable


def test_synthetic_classes_follow_their_recipe():
    attributes = paper._sparse_attributes(2000, 24, np.random.default_rng(0))
    present = attributes > 0
    assert present.mean() == pytest.approx(0.4, abs=0.01)
    assert attributes[present].min() >= 0.5
    assert attributes[present].mean() == pytest.approx(0.75, abs=0.01)
    assert paper._sparse_attributes(300, 2, np.random.default_rng(0)).any(axis=1).all()


@pytest.mark.parametrize("world", [paper.Synthetic(), paper.Digits()])
def test_experts_are_tuned_on_other_classes_than_they_are_tested_on(world):
    validation, test = world.experts(Run(seed=1, scale="smoke"), 0)
    assert not set(validation.unseen) & set(test.unseen)
    assert set(test.seen) == set(validation.seen) | set(validation.unseen)
    expected = (30, 10, 40, 20) if isinstance(world, paper.Synthetic) else (5, 2, 7, 3)
    assert tuple(map(len, (validation.seen, validation.unseen, test.seen, test.unseen))) == expected
    assert (validation.zero_shot[:, test.unseen] == 0).all()
    for predictions in (validation, test):
        is_seen = predictions.is_seen
        right = predictions.seen_expert.argmax(axis=1) == predictions.labels
        assert right[is_seen].mean() > 0.7
    again, _ = world.experts(Run(seed=1, scale="smoke"), 0)
    other, _ = world.experts(Run(seed=1, scale="smoke"), 1)
    np.testing.assert_array_equal(again.labels, validation.labels)
    assert set(other.unseen) != set(validation.unseen)


def test_segments_are_those_of_a_display():
    lit = dict(enumerate(map(set, paper.SEGMENTS)))
    assert [len(lit[digit]) for digit in range(10)] == [6, 2, 5, 5, 4, 5, 6, 3, 7, 6]
    assert lit[8] - lit[0] == {"g"}
    assert lit[8] - lit[6] == {"b"}
    assert lit[8] - lit[9] == {"e"}
    assert lit[7] - lit[1] == {"a"}
    assert lit[3] & lit[2] == set("abdg")


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """Files as those of the proposed splits: 12 classes, 4 of them unseen, everything counted from one."""
    rng = np.random.default_rng(0)
    attributes = rng.random((12, 5))
    labels = rng.permutation(np.repeat(np.arange(12), 30))
    features = attributes[labels] @ rng.normal(size=(5, 16)) + 0.1 * rng.normal(size=(360, 16))
    order = rng.permutation(360)
    seen_rows = order[labels[order] < 8]
    trainval, test_seen = seen_rows[:180], seen_rows[180:]
    folder = tmp_path / "xlsa17" / "data" / "CUB"
    folder.mkdir(parents=True)
    savemat(folder / "res101.mat", {"features": features.T, "labels": labels[:, None] + 1})
    savemat(
        folder / "att_splits.mat",
        {
            "att": attributes.T,
            "trainval_loc": trainval[:, None] + 1,
            "test_seen_loc": test_seen[:, None] + 1,
            "test_unseen_loc": np.flatnonzero(labels >= 8)[:, None] + 1,
            "train_loc": np.flatnonzero(labels < 5)[:, None] + 1,
            "val_loc": np.flatnonzero((labels >= 5) & (labels < 8))[:, None] + 1,
        },
    )
    monkeypatch.setenv("POSTERN_DATA", str(tmp_path))
    return folder, labels, trainval, test_seen


def test_the_proposed_split_is_read(photographs):
    folder, labels, trainval, test_seen = photographs
    features, read, attributes, (validation, test) = paper._read_proposed_split(folder, 0.2, np.random.default_rng(0))
    np.testing.assert_array_equal(read, labels)
    assert (features.shape, attributes.shape) == ((360, 16), (12, 5))
    assert (validation.seen.tolist(), validation.unseen.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert (test.seen.tolist(), test.unseen.tolist()) == (list(range(8)), [8, 9, 10, 11])
    assert set(test.train) == set(trainval)
    assert set(test.evaluation) == set(test_seen) | set(np.flatnonzero(labels >= 8))
    assert set(validation.train) | set(validation.evaluation) == set(trainval)
    assert not set(validation.train) & set(validation.evaluation)
    tuned_and_seen = np.isin(labels[validation.evaluation], validation.seen).sum()
    assert tuned_and_seen == round(0.2 * np.isin(labels[trainval], validation.seen).sum())


@pytest.mark.parametrize("name", paper.PAPER.claims)
def test_the_full_recipe_runs_in_small(photographs, name):
    world = dataclasses.replace(paper.Photographs("CUB"), penalties=(0.1, 10.0), scales=(1.0, 10.0))
    claim = paper.PAPER.claims[name]
    full = claim.scales["full"]
    assert full.draws == 1
    worlds = {each: world for each in ("many", "few", "world") if getattr(full, each, None) is not None}
    run = Run(seed=0, scale="full")
    metrics = claim.experiment(dataclasses.replace(full, **worlds), run)
    assert claim.holds_when.metrics() <= metrics.keys()
    assert all(0 <= value <= 1 for value in metrics.values())
    assert run.tables
    assert run.figures


def test_without_the_photographs_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTERN_DATA", str(tmp_path))
    with pytest.raises(Unavailable, match=r"SUN needs res101\.mat.*xlsa17\.zip"):
        paper.Photographs("SUN").experts(Run(seed=0, scale="full"), 0)


def test_a_comparison_has_a_row_for_every_way():
    validation, test = paper.Digits().experts(Run(seed=2, scale="smoke"), 0)
    rows = paper.compare(validation, test, ConfidenceGate(3, 2))
    assert [(row["method"], row["gate"]) for row in rows] == [
        ("calibrated stacking", "none"),
        *((mode, gate) for gate in ("confidence", "max_prob") for mode in ("adaptive", "total", "constant", "hard")),
    ]
    expected = {"method": "hard", "gate": "max_prob"}
    assert rows[-1] == expected | COSMOClassifier(MaxProbGate(), "hard").tune(validation).evaluate(test)
    assert len({row["ausuc"] for row in rows}) >= 5
