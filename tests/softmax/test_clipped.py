"""Clipped and off-by-one softmax against closed forms, float64, torch and gradcheck."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from postern.softmax import clipped_softmax, softmax_off_by_one
from tests.modules import check_module

LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=12).map(lambda row: torch.tensor(row, dtype=torch.float64))


@settings(deadline=None)
@given(LOGITS)
def test_is_softmax_when_nothing_is_stretched(logits):
    torch.testing.assert_close(clipped_softmax(logits, gamma=0.0), torch.softmax(logits, -1), rtol=0, atol=1e-15)


@settings(deadline=None)
@given(LOGITS, st.floats(-0.5, 0), st.floats(1, 1.5))
def test_zeros_and_ones_are_exact_where_the_paper_says(logits, gamma, zeta):
    found = clipped_softmax(logits, gamma=gamma, zeta=zeta)
    probabilities = torch.softmax(logits, -1)
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    margin = 1e-9
    assert (found[probabilities < low - margin] == 0).all()
    assert (found[probabilities > high + margin] == 1).all()
    between = (probabilities > low + margin) & (probabilities < high - margin)
    torch.testing.assert_close(found[between], (zeta - gamma) * probabilities[between] + gamma)


@settings(deadline=None)
@given(LOGITS, st.floats(-100, 100))
def test_is_invariant_to_shifts(logits, shift):
    torch.testing.assert_close(clipped_softmax(logits + shift), clipped_softmax(logits), rtol=0, atol=1e-9)


def test_alpha_carries_over_to_other_lengths():
    logits = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(clipped_softmax(logits, alpha=3.0), clipped_softmax(logits, gamma=-3.0 / 20))
    torch.testing.assert_close(
        clipped_softmax(logits, alpha=3.0, length=128), clipped_softmax(logits, gamma=-3.0 / 128)
    )


def test_the_default_is_the_papers_main_setting():
    logits = torch.randn(2, 9)
    torch.testing.assert_close(clipped_softmax(logits), clipped_softmax(logits, gamma=-0.03))


def test_a_uniform_row_dies_where_alpha_exceeds_one():
    row = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    dead = clipped_softmax(row, alpha=4.0)
    dead.sum().backward()
    assert (dead == 0).all()
    assert (row.grad == 0).all()
    # (1 - alpha + alpha / T) / T
    torch.testing.assert_close(clipped_softmax(row, alpha=0.5), torch.full((32,), (0.5 + 0.5 / 32) / 32).double())


def test_clipped_entries_receive_no_gradient():
    logits = torch.tensor([5.0, 0.0, -5.0], dtype=torch.float64, requires_grad=True)
    found = clipped_softmax(logits, gamma=-0.03)
    assert found[2] == 0
    assert found[0] < 1
    (gradient,) = torch.autograd.grad(found[2], logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("options", [{"gamma": -0.05}, {"gamma": -0.1, "zeta": 1.2}, {"alpha": 1.0}])
def test_gradients(options):
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: clipped_softmax(x, **options), logits)
    assert torch.autograd.gradcheck(lambda x: clipped_softmax(x, 0, **options), logits)


@settings(deadline=None)
@given(LOGITS)
def test_off_by_one_is_softmax_with_an_empty_entry(logits):
    extended = torch.cat([logits, torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(softmax_off_by_one(logits), torch.softmax(extended, -1)[:-1])


def test_off_by_one_survives_extremes_and_has_the_right_gradient():
    rows = torch.tensor([[1e4, 0.0], [-1e4, -1e4], [-torch.inf, -torch.inf], [-torch.inf, 3.0]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1 / (1 + torch.exp(torch.tensor(-3.0)))]])
    torch.testing.assert_close(softmax_off_by_one(rows), expected)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softmax_off_by_one, logits)
    assert torch.autograd.gradcheck(lambda x: softmax_off_by_one(x, 0), logits)


@pytest.mark.parametrize("function", [clipped_softmax, softmax_off_by_one])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(function, dtype):
    logits = torch.randn(8, 40).to(dtype)
    found = function(logits)
    assert found.dtype == dtype
    torch.testing.assert_close(found, function(logits.double()).to(dtype))


@pytest.mark.parametrize("function", [clipped_softmax, softmax_off_by_one])
def test_masked_entries_are_zero(function):
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert function(logits)[0, 1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.1}, "gamma must be at most 0, got 0.1"),
        ({"zeta": 0.9}, "zeta must be at least 1, got 0.9"),
        ({"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        ({"alpha": 1.0, "gamma": -0.1}, "exclude each other"),
        ({"alpha": 1.0, "length": 0}, "length must be at least 1, got 0"),
        ({"gamma": float("nan")}, "gamma must be at most 0, got nan"),
    ],
)
def test_rejects_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_softmax(torch.zeros(3), **options)


@pytest.mark.parametrize("function", [clipped_softmax, softmax_off_by_one])
def test_rejects_integers(function):
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        function(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("function", [clipped_softmax, softmax_off_by_one])
def test_works_inside_modules(function):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return function(self.linear(x))

    check_module(Rows, torch.randn(3, 6))
