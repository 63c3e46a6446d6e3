import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postern.experts import (
    GaussianMixtureOfExperts,
    MixtureParameters,
    SoftmaxGate,
    align_gate_translation,
    cell_exponent,
    dense_to_sparse_loss,
    voronoi_cells,
    voronoi_loss,
)
from tests.experts.test_gaussian_moe import drawn, samples


def naive_loss(fitted, truth, top_k, r):
    """The definition, with a loop over all subsets of experts; ``r`` is None for D1, else r(m)."""
    atoms = [
        [np.concatenate([p.gate_coef[i], p.coef[i], p.intercept[i : i + 1], p.variance[i : i + 1]]) for i in range(n)]
        for p, n in ((fitted, fitted.num_experts), (truth, truth.num_experts))
    ]
    cells = [min(range(len(atoms[1])), key=lambda j, a=a: np.linalg.norm(a - atoms[1][j])) for a in atoms[0]]
    terms = []
    for j in range(truth.num_experts):
        members = [i for i, cell in enumerate(cells) if cell == j]
        total, mass = 0.0, 0.0
        for i in members:
            m = np.exp(float(fitted.gate_intercept[i]))
            mass += m
            parts = [
                np.linalg.norm(fitted.gate_coef[i] - truth.gate_coef[j]),
                np.linalg.norm(fitted.coef[i] - truth.coef[j]),
                abs(float(fitted.intercept[i] - truth.intercept[j])),
                abs(float(fitted.variance[i] - truth.variance[j])),
            ]
            if r is None or len(members) == 1:
                powers = (1, 1, 1, 1)
            else:
                degree = r[len(members)]
                powers = (degree, degree / 2, degree, degree / 2)
            total += m * sum(part**power for part, power in zip(parts, powers, strict=True))
        terms.append(total + abs(mass - np.exp(float(truth.gate_intercept[j]))))
    return max(sum(subset) for subset in itertools.combinations(terms, top_k)), cells


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 3))
def test_losses_are_those_of_the_definition(seed, fitted_experts, top_k):
    fitted, truth = drawn(fitted_experts, 2, seed=seed), drawn(3, 2, seed=seed + 1)
    exact, cells = naive_loss(fitted, truth, top_k, None)
    assert voronoi_cells(fitted, truth).tolist() == cells
    assert voronoi_loss(fitted, truth, top_k).item() == pytest.approx(exact)
    over, _ = naive_loss(fitted, truth, top_k, {2: 4, 3: 6, 4: 7, 5: 7})
    assert voronoi_loss(fitted, truth, top_k, "over").item() == pytest.approx(over)


def test_several_mixtures_are_each_of_them():
    fitted, truth = drawn(4, 2, (3,)), drawn(3, 2, seed=1)
    for of in (
        lambda mixture: voronoi_loss(mixture, truth, 2, "over"),
        lambda mixture: voronoi_cells(mixture, truth),
        lambda mixture: align_gate_translation(mixture, truth).gate_coef,
        lambda mixture: dense_to_sparse_loss(mixture, truth, 2),
    ):
        torch.testing.assert_close(of(fitted), torch.stack([of(fitted[i]) for i in range(3)]))


def test_the_truth_has_no_loss_and_neither_has_one_that_is_split():
    truth = drawn(3, 2)
    assert voronoi_loss(truth, truth, 3).item() == 0
    assert dense_to_sparse_loss(truth, truth).item() == 0
    split = MixtureParameters(
        *(torch.cat([value, value[:1]]) for value in list(truth)[:-1]), temperature=truth.temperature
    )
    split.gate_intercept[[0, 3]] -= np.log(2)
    assert voronoi_cells(split, truth).tolist() == [0, 1, 2, 0]
    assert voronoi_loss(split, truth, 3).item() == pytest.approx(0, abs=1e-12)


def test_the_dense_to_sparse_loss_counts_the_temperature():
    truth = drawn(3, 2)
    other = MixtureParameters(*list(truth)[:-1], temperature=truth.temperature + 0.25)
    mass, true_mass = (torch.exp(truth.gate_intercept / tau) for tau in (other.temperature, truth.temperature))
    for r in (1.0, 3.0):
        expected = (mass - true_mass).abs().sum() + 0.25**r * mass.sum()
        torch.testing.assert_close(dense_to_sparse_loss(other, truth, r), expected)


@given(st.integers(0, 10_000), st.permutations(range(3)))
def test_alignment_undoes_a_translation_and_keeps_the_model(seed, order):
    truth, shift = drawn(3, 2, seed=seed), drawn(3, 2, seed=seed + 1)
    moved = MixtureParameters(
        truth.gate_coef + shift.coef[0], truth.gate_intercept + shift.intercept[0], *list(truth)[2:]
    )
    moved = MixtureParameters(*(value[list(order)] for value in list(moved)[:-1]), temperature=truth.temperature)
    aligned = align_gate_translation(moved, truth)
    assert voronoi_loss(aligned, truth, 3).item() == pytest.approx(0, abs=1e-9)
    x, y = samples()
    both = [GaussianMixtureOfExperts.from_parameters(each, SoftmaxGate(2))(x, y) for each in (moved, aligned)]
    torch.testing.assert_close(*both)


def test_alignment_of_copies_is_by_their_mean_and_their_common_mass():
    truth = MixtureParameters([[1.0], [0.0]], [0.5, 0.0], [[1.0], [-1.0]], [2.0, -2.0], [0.3, 0.5])
    fitted = MixtureParameters(
        [[1.0], [0.2], [-0.2]],
        [0.5, float(np.log(0.5)), float(np.log(0.5))],
        [[1.0], [-0.9], [-1.1]],
        [2.0, -2.0, -2.0],
        [0.3, 0.5, 0.5],
    )
    shifted = MixtureParameters(fitted.gate_coef + 7, fitted.gate_intercept - 3, *list(fitted)[2:])
    aligned = align_gate_translation(shifted, truth)
    torch.testing.assert_close(aligned.gate_coef, fitted.gate_coef)
    torch.testing.assert_close(aligned.gate_intercept, fitted.gate_intercept)


def test_bad_arguments_are_told():
    assert [cell_exponent(size) for size in (1, 2, 3, 4)] == [1, 4, 6, 7]
    with pytest.raises(ValueError, match="got 0"):
        cell_exponent(0)
    truth = drawn(3, 2)
    with pytest.raises(ValueError, match="the truth is one mixture"):
        voronoi_cells(truth, drawn(3, 2, (2,)))
    with pytest.raises(ValueError, match="got 1 fitted and 2 true"):
        voronoi_cells(drawn(3, 1), truth)
    with pytest.raises(ValueError, match="top_k=4"):
        voronoi_loss(truth, truth, 4)
    with pytest.raises(ValueError, match="kind must be"):
        voronoi_loss(truth, truth, 2, "under")
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        dense_to_sparse_loss(truth, truth, 0.5)
