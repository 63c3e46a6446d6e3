import pytest
import torch

from postern.heads import HardNegativeSampler, LabelSets


def problem(queries=20, labels=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(queries, labels, generator=generator) < 0.1
    excluded = (torch.rand(queries, labels, generator=generator) < 0.05) & ~matrix
    q, l = torch.randn(queries, 4, generator=generator), torch.randn(labels, 4, generator=generator)
    return matrix, excluded, q, l


def sets(matrix):
    return LabelSets(matrix.nonzero(as_tuple=True), *matrix.shape)


def test_hard_negatives_come_from_the_best_labels_that_are_no_positives():
    matrix, excluded, q, l = problem()
    sampler = HardNegativeSampler(sets(matrix), per_query=2, shortlist=10, excluded=sets(excluded))
    sampler.refresh(q, l, block=7)
    best = (q @ l.T).topk(10, dim=1).indices
    seen = [set() for _ in range(20)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        drawn = sampler.sample(torch.arange(20), generator)
        assert drawn.shape == (20, 2)
        for row, labels in enumerate(drawn.tolist()):
            assert labels[0] != labels[1] or labels[0] == -1
            seen[row] |= set(labels) - {-1}
    for row in range(20):
        allowed = {j for j in best[row].tolist() if not matrix[row, j] and not excluded[row, j]}
        assert seen[row] == allowed


def test_before_the_first_look_negatives_are_uniform():
    matrix, excluded, _, _ = problem()
    sampler = HardNegativeSampler(sets(matrix), per_query=1, excluded=sets(excluded))
    drawn = sampler.sample(torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0)).flatten()
    is_negative = ~(matrix[0] | excluded[0])
    shares = torch.bincount(drawn[drawn >= 0], minlength=40) / 20_000
    torch.testing.assert_close(shares, is_negative / 40.0, atol=0.006, rtol=0)


def test_too_short_a_list_is_filled_with_none():
    matrix = torch.ones(1, 5, dtype=torch.bool)
    matrix[0, 3] = False
    sampler = HardNegativeSampler(sets(matrix), per_query=3, shortlist=5)
    sampler.refresh(torch.ones(1, 2), torch.ones(5, 2))
    assert sorted(sampler.sample(torch.tensor([0])).flatten().tolist()) == [-1, -1, 3]


@pytest.mark.parametrize("per_query", [0, 3])
@pytest.mark.parametrize("num_positives", [None, 1])
def test_a_pool_names_every_positive_and_excluded_label_in_it(per_query, num_positives):
    matrix, excluded, q, l = problem()
    sampler = HardNegativeSampler(sets(matrix), per_query, 10, sets(excluded))
    sampler.refresh(q, l)
    queries = torch.tensor([3, 3, 17, 8, 0])
    pool = sampler.batch(queries, torch.Generator().manual_seed(1), num_positives)
    assert pool.labels.tolist() == sorted(set(pool.labels.tolist()))
    for pairs, whole in ((pool.targets, matrix), (pool.excluded, excluded)):
        found = torch.zeros(5, len(pool.labels), dtype=torch.bool)
        found[pairs] = True
        assert torch.equal(found, whole[queries][:, pool.labels])
    positives = set(matrix[queries].any(0).nonzero()[:, 0].tolist())
    if num_positives is None:
        assert positives <= set(pool.labels.tolist())
        assert per_query or positives == set(pool.labels.tolist())
    elif not per_query:
        assert len(pool.labels) <= 5


def test_a_batch_without_any_label_is_an_empty_pool():
    nothing = LabelSets((torch.empty(0, dtype=torch.long),) * 2, 4, 9)
    pool = HardNegativeSampler(nothing, 0).batch(torch.tensor([1, 2]))
    assert len(pool.labels) == len(pool.targets[0]) == 0


def test_wrong_arguments_are_refused():
    matrix, _, q, l = problem()
    for arguments in ((-1, 10), (5, 4), (0, 0)):
        with pytest.raises(ValueError, match="per_query must not be negative, nor the shortlist shorter"):
            HardNegativeSampler(sets(matrix), *arguments)
    with pytest.raises(ValueError, match="20 queries and 40 labels, got 20 and 39 embeddings"):
        HardNegativeSampler(sets(matrix)).refresh(q, l[:-1])
