import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from postern.heads import LabelSets, label_propensities, xmc_metrics


def problem(seed, queries=12, labels=15):
    rng = np.random.default_rng(seed)
    matrix = rng.random((queries, labels)) < 0.2
    matrix[0, 0] = True
    scores = rng.permuted(np.tile(np.arange(labels), (queries, 1)), axis=1).astype(float)
    return matrix, scores, rng.uniform(0.05, 1, labels)


def sets(matrix):
    return LabelSets(torch.from_numpy(matrix).nonzero(as_tuple=True), *matrix.shape)


@given(st.integers(0, 10**6))
def test_metrics_are_their_definitions(seed):
    matrix, scores, p = problem(seed)
    top = np.argsort(-scores, axis=1)
    found = xmc_metrics(torch.from_numpy(top[:, :8].copy()), sets(matrix), (1, 3, 8), torch.from_numpy(p))
    kept = [row for row in range(len(matrix)) if matrix[row].any()]
    for k in (1, 3, 8):
        precision, recall, reached, best = [], [], 0.0, 0.0
        for row in kept:
            hits = [label for label in top[row, :k] if matrix[row, label]]
            precision.append(len(hits) / k)
            recall.append(len(hits) / matrix[row].sum())
            reached += sum(1 / p[label] for label in hits)
            best += sum(sorted((1 / p[matrix[row]]).tolist(), reverse=True)[:k])
        assert found[f"P@{k}"] == pytest.approx(np.mean(precision))
        assert found[f"R@{k}"] == pytest.approx(np.mean(recall))
        assert found[f"PSP@{k}"] == pytest.approx(reached / best)
        assert found[f"nDCG@{k}"] == pytest.approx(ndcg_score(matrix[kept], scores[kept], k=k))


def test_a_perfect_prediction_and_a_wrong_one():
    matrix, _, p = problem(3)
    for scores, ideal in ((matrix / p, 1.0), (-(matrix / p), 0.0)):
        top = torch.from_numpy(np.argsort(-scores, axis=1, kind="stable")[:, :1].copy())
        found = xmc_metrics(top, sets(matrix), (1,), torch.from_numpy(p))
        assert [found["P@1"], found["nDCG@1"], found["PSP@1"]] == pytest.approx([ideal] * 3)


def test_missing_predictions_are_failures():
    positives = LabelSets((torch.tensor([0, 0]), torch.tensor([1, 2])), 1, 4)
    found = xmc_metrics(torch.tensor([[1, -1, -1]]), positives, (1, 3), torch.full((4,), 0.5))
    assert found["P@1"] == 1
    assert found["P@3"] == pytest.approx(1 / 3)
    assert found["R@3"] == found["PSP@3"] == pytest.approx(0.5)


def test_propensities_are_those_of_jain_et_al():
    frequencies = torch.tensor([0, 1, 10, 1000])
    a, b, n = 0.55, 1.5, 5000
    c = (np.log(n) - 1) * (b + 1) ** a
    expected = 1 / (1 + c * np.exp(-a * np.log(frequencies.numpy() + b)))
    np.testing.assert_allclose(label_propensities(frequencies, n).numpy(), expected)
    assert (label_propensities(frequencies, n, 0.6, 2.6).diff() > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": torch.zeros(3, 2, dtype=torch.long)}, r"each of 2 queries, got torch.int64 \[3, 2\]"),
        ({"predicted": torch.zeros(2, 2)}, r"got torch.float32 \[2, 2\]"),
        ({"ks": (1, 3)}, r"ks lie in 1\.\.2, the number of predictions, got \[1, 3\]"),
        ({"ks": (0,)}, r"got \[0\]"),
        ({"ks": ()}, r"got \[\]"),
        ({"propensities": torch.ones(3)}, r"each of 4 labels, got \[3\]"),
        ({"propensities": torch.zeros(4)}, r"propensities lie in \(0, 1\]"),
        ({"positives": LabelSets((torch.empty(0, dtype=torch.long),) * 2, 2, 4)}, "a query that has a positive"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {
        "predicted": torch.zeros(2, 2, dtype=torch.long),
        "positives": LabelSets((torch.tensor([0]), torch.tensor([1])), 2, 4),
        "ks": (1,),
    }
    with pytest.raises(ValueError, match=message):
        xmc_metrics(**arguments | change)


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="at least 3 queries and a, b >= 0, got 2"):
        label_propensities(torch.ones(3).long(), 2)
    with pytest.raises(ValueError, match="a row of counts"):
        label_propensities(torch.tensor([-1]), 10)
