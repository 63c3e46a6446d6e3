"""Entropies against scipy, and the bounds on that of an average."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from postern.experts import entropy_bounds, load_entropy, selection_entropy


def distributions(generator, *shape, sharpness=1.0):
    return (sharpness * torch.randn(*shape, dtype=torch.float64, generator=generator)).softmax(-1)


def test_entropies_are_those_of_scipy():
    r = distributions(torch.Generator().manual_seed(0), 2, 5, 4, sharpness=2.0)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    for counts, given_mask in ((torch.ones(2, 5, dtype=torch.bool), None), (mask, mask)):
        kept = r[counts].numpy()
        assert selection_entropy(r, given_mask).item() == pytest.approx(entropy(kept, axis=-1).mean())
        assert load_entropy(r, given_mask).item() == pytest.approx(entropy(kept.mean(0)))


def test_decided_routers_with_an_even_load():
    r = torch.eye(4)[None]
    assert selection_entropy(r) == 0
    assert load_entropy(r).item() == pytest.approx(math.log(4))
    assert selection_entropy(torch.full((1, 3, 4), 0.25)).item() == pytest.approx(math.log(4))


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    time=st.integers(1, 6),
    experts=st.integers(1, 6),
    sharpness=st.floats(0.0, 60.0),
    graph_sharpness=st.floats(0.0, 60.0),
)
def test_the_entropy_of_an_average_keeps_its_bounds(seed, time, experts, sharpness, graph_sharpness):
    generator = torch.Generator().manual_seed(seed)
    r = distributions(generator, time, experts, sharpness=sharpness)
    graph = distributions(generator, time, time, sharpness=graph_sharpness)
    low, high = entropy_bounds(graph, r)
    found = torch.special.entr(graph @ r).sum(-1)
    assert (found >= low - 1e-9).all()
    assert (found <= high + 1e-9).all()


def test_the_bounds_are_reached():
    decided = torch.eye(3, dtype=torch.float64)
    graph = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    # different experts, each certain: all the entropy is that of the related token
    low, high = entropy_bounds(graph, decided)
    torch.testing.assert_close(low, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(high, torch.full((3,), math.log(3), dtype=torch.float64))
    torch.testing.assert_close(torch.special.entr(graph @ decided).sum(-1), high)
    # equal preferences: an average changes nothing
    alike = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).expand(3, 3)
    torch.testing.assert_close(entropy_bounds(graph, alike)[0], torch.special.entr(graph @ alike).sum(-1))


def test_an_average_can_be_more_decided_than_the_token_itself():
    r = torch.tensor([[0.99, 0.01], [0.5, 0.5]], dtype=torch.float64)
    graph = torch.tensor([[1.0, 0.0], [0.9, 0.1]], dtype=torch.float64)
    mixed = torch.special.entr(graph @ r).sum(-1)
    assert mixed[1] < torch.special.entr(r).sum(-1)[1]
