import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from postern.heads import LabelSets

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=30)


def sets_of(pairs):
    rows, columns = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return LabelSets((rows, columns), 6, 9)


@given(PAIRS, st.lists(st.integers(0, 5), max_size=8))
def test_it_is_a_list_of_sets(pairs, queries):
    sets, expected = sets_of(pairs), [{label for query, label in pairs if query == i} for i in range(6)]
    assert len(sets) == 6
    assert sets.counts().tolist() == [len(labels) for labels in expected]
    assert sets.frequencies().tolist() == [sum(label in labels for labels in expected) for label in range(9)]
    rows, labels = sets.pairs(torch.tensor(queries, dtype=torch.long))
    wanted = [(row, label) for row, query in enumerate(queries) for label in sorted(expected[query])]
    assert list(zip(rows.tolist(), labels.tolist(), strict=True)) == wanted
    rows, labels = sets.to("cpu").pairs()
    assert set(zip(rows.tolist(), labels.tolist(), strict=True)) == set(pairs)
    grid = torch.arange(6)[:, None].expand(6, 10), torch.arange(-1, 9).expand(6, 10)
    assert sets.contain(*grid).tolist() == [[label in labels for label in range(-1, 9)] for labels in expected]


def test_sparse_matrices_are_read():
    matrix = sparse.random_array((6, 9), density=0.3, rng=0, format="csr")
    rows, columns = LabelSets(matrix, 6, 9).pairs()
    assert torch.equal(torch.stack([rows, columns]), torch.from_numpy(matrix.toarray()).nonzero().T)


def test_a_million_labels_take_memory_for_their_pairs_alone():
    rows = torch.arange(1000).repeat_interleave(5)
    sets = LabelSets((rows, torch.randint(10**6, (5000,))), 1000, 10**6)
    assert sum(tensor.numel() for tensor in vars(sets).values() if isinstance(tensor, torch.Tensor)) <= 6001


@given(PAIRS, st.integers(1, 4), st.integers(0, 1000))
def test_samples_are_subsets_of_the_asked_size(pairs, count, seed):
    sets, queries = sets_of(pairs), torch.arange(6)
    rows, labels = sets.sample(queries, count, torch.Generator().manual_seed(seed))
    assert sets.contain(rows, labels).all()
    assert torch.bincount(rows, minlength=6).tolist() == sets.counts().clamp_max(count).tolist()
    assert len(set(zip(rows.tolist(), labels.tolist(), strict=True))) == len(rows)


def test_samples_follow_relevance():
    sets = LabelSets((torch.zeros(3, dtype=torch.long), torch.arange(3)), 1, 3)
    queries = torch.zeros(20_000, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    relevance = torch.tensor([1.0, 2.0, 5.0])
    shares = torch.bincount(sets.sample(queries, 1, generator, relevance.repeat(20_000))[1]) / 20_000
    torch.testing.assert_close(shares, relevance / 8, atol=0.015, rtol=0)
    # Two without replacement: the pair {0, 1} has 1/8 * 2/7 + 2/8 * 1/6.
    rows, labels = sets.sample(queries, 2, generator, relevance.repeat(20_000))
    missing = 3 - torch.zeros(20_000).index_add(0, rows, labels.float())
    assert (missing == 2).float().mean().item() == pytest.approx(1 / 8 * 2 / 7 + 2 / 8 / 6, abs=0.01)
    shares = torch.bincount(sets.sample(queries, 1, generator)[1]) / 20_000
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.015, rtol=0)


def test_wrong_arguments_are_refused():
    sets = sets_of([(0, 1), (0, 2)])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        sets.sample(torch.tensor([0]), 0)
    for relevance in (torch.ones(3), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match=r"relevance is positive, one a pair \(2\)"):
            sets.sample(torch.tensor([0]), 1, relevance=relevance)
    with pytest.raises(ValueError, match=r"columns of the pairs lie in 0\.\.8, got 9\.\.9"):
        sets_of([(0, 9)])
