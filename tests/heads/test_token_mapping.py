import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from postern.heads import frequency_kmeans_mapping, frequency_mapping, kmeans, random_mapping, unigram_bias


def blobs(seed: int = 0, count: int = 600, clusters: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(clusters, 5, generator=generator)
    return centres[torch.randint(clusters, (count,), generator=generator)] + torch.randn(count, 5, generator=generator)


# -- k-means ----------------------------------------------------------------------------------------------------------


def test_kmeans_from_a_start_is_scikit_learns():
    points, start = blobs().double(), blobs(1).double()[:20]
    ours = kmeans(points, 20, iterations=50, centroids=start)
    theirs = KMeans(20, init=start.numpy(), n_init=1, max_iter=50, tol=0, algorithm="lloyd").fit(points.numpy())
    assert np.array_equal(ours.assignment.numpy(), theirs.labels_)
    np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, rtol=1e-9)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)


def test_kmeans_of_its_own_start_is_as_good_as_scikit_learns():
    points = blobs(2, count=2000, clusters=40)
    ours = np.median([kmeans(points, 40, seed=seed).inertia for seed in range(7)])
    theirs = np.median([KMeans(40, n_init=1, random_state=seed).fit(points.numpy()).inertia_ for seed in range(7)])
    random = kmeans(points, 40, centroids=points[:40]).inertia
    assert ours < 1.1 * theirs
    assert ours < random


def test_the_few_points_that_stand_apart_have_clusters_of_their_own():
    points = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    points[::600] = 20 * torch.eye(4)[[0, 1, 2, 3, 0]] * torch.tensor([1, 1, 1, 1, -1])[:, None]
    sizes = torch.bincount(kmeans(points, 30).assignment)
    assert (sizes[kmeans(points, 30).assignment[::600]] == 1).all()


def test_kmeans_far_from_the_origin_keeps_its_digits():
    points = blobs()
    near, far = kmeans(points, 12, seed=3), kmeans(points + 3000, 12, seed=3)
    assert far.inertia == pytest.approx(near.inertia, rel=0.02)


def test_kmeans_depends_on_the_seed_alone_and_keeps_the_points_type():
    points = blobs().to(torch.bfloat16)
    first, again, other = kmeans(points, 9), kmeans(points, 9), kmeans(points, 9, seed=1)
    assert torch.equal(first.assignment, again.assignment)
    assert not torch.equal(first.assignment, other.assignment)
    assert first.centroids.dtype == torch.bfloat16


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_no_cluster_is_empty_even_where_points_repeat(values, data):
    points = torch.tensor(values, dtype=torch.float32)[:, None]
    clusters = data.draw(st.integers(1, len(values)))
    found = kmeans(points, clusters, iterations=3)
    assert sorted(set(found.assignment.tolist())) == list(range(clusters))
    for cluster in range(clusters):
        torch.testing.assert_close(found.centroids[cluster], points[found.assignment == cluster].mean(0))
    if clusters >= len(set(values)):
        assert found.inertia == pytest.approx(0, abs=1e-6)


def test_a_lost_cluster_takes_the_worst_fitted_point():
    points = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    found = kmeans(points, 2, iterations=1, centroids=torch.tensor([[0.0], [1000.0]]))
    assert found.assignment.tolist() == [0, 0, 0, 1]


# -- mappings ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.data())
def test_random_mapping_is_balanced(classes, data):
    codes = data.draw(st.integers(1, classes))
    sizes = torch.bincount(random_mapping(classes, codes, torch.Generator().manual_seed(0)), minlength=codes)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == classes


def test_random_mapping_is_random():
    first, second = (random_mapping(100, 10, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert (first == second).float().mean() < 0.4


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), st.data())
def test_frequency_mapping_cuts_the_order_of_frequencies(counts, data):
    counts = torch.tensor(counts)
    codes = data.draw(st.integers(1, len(counts)))
    mapping = frequency_mapping(counts, codes)
    assert set(mapping.tolist()) == set(range(codes))
    order = counts.argsort(descending=True, stable=True)
    assert (mapping[order].diff() >= 0).all()


def test_frequency_mapping_balances_masses():
    counts = torch.tensor([40, 1, 20, 1, 20, 9, 9, 1, 1, 18])
    mapping = frequency_mapping(counts, 5)
    masses = torch.zeros(5, dtype=torch.long).index_add(0, mapping, counts)
    assert masses.tolist() == [40, 20, 20, 18, 22]


def test_frequent_classes_have_their_own_codes_and_the_rest_is_clustered():
    rows = torch.cat([torch.zeros(6, 2), torch.full((6, 2), 5.0)]) + 0.01 * torch.randn(12, 2)
    counts = torch.tensor([1, 9, 1, 1, 1, 1, 1, 1, 7, 1, 1, 1])
    mapping = frequency_kmeans_mapping(rows, counts, 4, num_shared=2)
    assert mapping[1] == 0
    assert mapping[8] == 1
    left, right = mapping[[0, 2, 3, 4, 5]].unique(), mapping[[6, 7, 9, 10, 11]].unique()
    assert len(left) == len(right) == 1
    assert {left.item(), right.item()} == {2, 3}


def test_unigram_bias_is_the_likeliest_distribution_within_codes():
    counts, mapping = torch.tensor([6, 0, 3, 2, 8]), torch.tensor([0, 0, 1, 0, 1])
    bias = unigram_bias(counts, mapping)
    torch.testing.assert_close(bias.exp(), torch.tensor([7 / 11, 1 / 11, 4 / 13, 3 / 11, 9 / 13]))
    exact = unigram_bias(counts + 1, mapping, smoothing=0)
    torch.testing.assert_close(exact, bias)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(torch.zeros(3), 2), r"\(3,\)"),
        (lambda: kmeans(torch.zeros(3, 2, dtype=torch.long), 2), "int64"),
        (lambda: kmeans(torch.full((3, 2), torch.nan), 2), "finite"),
        (lambda: kmeans(torch.zeros(3, 2), 4), "points, 3, got 4"),
        (lambda: kmeans(torch.zeros(3, 2), 2, iterations=0), "got 0"),
        (lambda: kmeans(torch.zeros(3, 2), 2, centroids=torch.zeros(3, 2)), r"\[2, 2\], got \[3, 2\]"),
        (lambda: random_mapping(3, 0), "got 0"),
        (lambda: frequency_mapping(torch.zeros(3), 2), "all zero"),
        (lambda: frequency_mapping(torch.tensor([1, -1]), 2), "negative"),
        (lambda: frequency_mapping(torch.ones(3), 4), "classes, 3, got 4"),
        (lambda: frequency_kmeans_mapping(torch.zeros(3, 2), torch.ones(2), 2), r"\[3\], one a class, got \[2\]"),
        (lambda: frequency_kmeans_mapping(torch.zeros(3, 2), torch.ones(3), 2, num_shared=3), "got 3"),
        (lambda: unigram_bias(torch.tensor([1, 0]), torch.tensor([0, 0]), smoothing=0), "got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
