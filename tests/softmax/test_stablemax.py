import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from postern.softmax import log_stablemax, stablemax

logits_rows = st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=12).map(torch.tensor)


def truth(logits: Tensor, dim: int = -1) -> Tensor:
    """The definition, in float64."""
    z = logits.double()
    s = torch.where(z >= 0, z + 1, 1 / (1 - z))
    return s / s.sum(dim, keepdim=True)


@given(logits_rows)
def test_is_the_definition(logits):
    torch.testing.assert_close(stablemax(logits).double(), truth(logits), rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(log_stablemax(logits).double(), truth(logits).log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stablemax(logits.double()), truth(logits), rtol=1e-13, atol=1e-15)


@given(logits_rows, st.randoms(use_true_random=False))
def test_permutes_with_the_logits_and_keeps_their_order(logits, random):
    order = list(range(len(logits)))
    random.shuffle(order)
    torch.testing.assert_close(stablemax(logits)[order], stablemax(logits[order]))
    assert (stablemax(logits.double())[logits.argsort()].diff() >= 0).all()


def test_dim_and_shape():
    logits = torch.randn(2, 3, 4, 5)
    for dim in (0, 1, -2, 3):
        torch.testing.assert_close(stablemax(logits, dim).double(), truth(logits, dim), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(log_stablemax(logits, dim).exp(), stablemax(logits, dim))


def test_is_not_invariant_to_shifts():
    assert not torch.allclose(stablemax(torch.tensor([0.0, 1.0])), stablemax(torch.tensor([5.0, 6.0])))


def test_gradient_is_that_of_softmax_damped_by_the_logit():
    z = torch.tensor([-30.0, -1.0, 0.0, 0.5, 20.0], dtype=torch.float64, requires_grad=True)
    (-log_stablemax(z)[2]).backward()
    expected = (truth(z.detach()) - torch.eye(5, dtype=torch.float64)[2]) / (1 + z.detach().abs())
    torch.testing.assert_close(z.grad, expected)


def test_zero_logits_have_a_gradient():
    z = torch.zeros(4, requires_grad=True)
    log_stablemax(z)[0].backward()
    torch.testing.assert_close(z.grad, torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("function", [stablemax, log_stablemax])
def test_gradcheck(function):
    z = 3 * torch.randn(2, 5, dtype=torch.float64)
    z.requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(function, dim=0), z)
    assert torch.autograd.gradgradcheck(function, z)


def test_masked_classes_get_nothing():
    z = torch.tensor([1.0, -torch.inf, -2.0], requires_grad=True)
    probabilities = stablemax(z)
    torch.testing.assert_close(probabilities.detach(), torch.tensor([2.0, 0.0, 1 / 3]) / (2 + 1 / 3))
    probabilities[0].backward()
    assert z.grad is not None
    assert z.grad[1] == 0
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_its_rounding(dtype):
    z = (100 * torch.randn(50, 100)).to(dtype)
    found = stablemax(z)
    assert found.dtype == dtype
    torch.testing.assert_close(found, truth(z).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.isfinite(stablemax(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))).all()


def test_dtype_says_what_is_computed_and_returned():
    z = torch.randn(7)
    assert stablemax(z, dtype=torch.float64).dtype == torch.float64
    torch.testing.assert_close(stablemax(z, dtype=torch.float64), truth(z), rtol=1e-14, atol=0)
    torch.testing.assert_close(log_stablemax(z, dtype=torch.float64), truth(z).log(), rtol=1e-13, atol=1e-14)


def test_compiles():
    z = torch.randn(3, 5)
    compiled = torch.compile(log_stablemax, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, dim=0), log_stablemax(z, dim=0))


@pytest.mark.parametrize("function", [stablemax, log_stablemax])
def test_bad_input(function):
    with pytest.raises(ValueError, match="int64"):
        function(torch.arange(3))
    with pytest.raises(ValueError, match=r"\(3,\) have no dimension 1"):
        function(torch.zeros(3), dim=1)
    with pytest.raises(ValueError, match="int32"):
        function(torch.zeros(3), dtype=torch.int32)
