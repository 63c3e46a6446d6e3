"""The scan against a loop, with its gradients of first and second order."""

import pytest
import torch

from postern.dynamics import diagonal_scan

METHODS = ("sequential", "associative")


def looped(decay, inputs, state=None):
    decay, inputs = torch.broadcast_tensors(decay, inputs)
    state = torch.zeros_like(inputs[..., 0, :]) if state is None else state
    states = []
    for t in range(inputs.shape[-2]):
        state = decay[..., t, :] * state + inputs[..., t, :]
        states.append(state)
    return torch.stack(states, -2)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 8, 31, 64, 65])
@pytest.mark.parametrize("has_state", [False, True])
def test_equals_the_loop(method, time, has_state):
    decay, inputs = 1.2 * drawn(2, 3, time, 5), drawn(3, time, 5)
    state = drawn(2, 3, 5) if has_state else None
    torch.testing.assert_close(diagonal_scan(decay, inputs, state, method=method), looped(decay, inputs, state))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("time", [1, 2, 6])
def test_gradients(method, time):
    inputs = [x.requires_grad_() for x in (drawn(2, time, 1), drawn(2, time, 3), drawn(2, 3))]
    assert torch.autograd.gradcheck(lambda *x: diagonal_scan(*x, method=method), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: diagonal_scan(*x, method=method), inputs)


@pytest.mark.parametrize("method", METHODS)
def test_decays_of_zero_forget_and_none_sum(method):
    inputs = drawn(1, 9, 2)
    forgotten = diagonal_scan(torch.zeros(1, 9, 2), inputs, method=method)
    torch.testing.assert_close(forgotten, inputs)
    torch.testing.assert_close(diagonal_scan(torch.ones(1, 9, 2), inputs, method=method), inputs.cumsum(1))


def test_dtypes_are_promoted():
    assert diagonal_scan(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.float64)).dtype == torch.float64


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="'sequential', 'associative' or None, got 'tree'"):
        diagonal_scan(torch.ones(3, 2), torch.ones(3, 2), method="tree")
    with pytest.raises(ValueError, match=r"of one shape.*got \[3, 2\] and \[4, 2\]"):
        diagonal_scan(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"at least one token, got \[0, 2\]"):
        diagonal_scan(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(ValueError, match=r"state has the shape \[2\], got \[3\]"):
        diagonal_scan(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3))
