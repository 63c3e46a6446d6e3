import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from postern.spiking import (
    IF,
    LIF,
    Dynamics,
    heaviside,
    integrate_and_fire,
    integrate_and_fire_reference,
    surrogate_derivative,
)
from tests.modules import check_module

EVERY_DYNAMICS = [
    Dynamics(keep, gain, threshold, reset, surrogate, 4.0, detach_reset)
    for keep, gain in ((0.5, 0.5), (0.75, 1.0), (1.0, 1.0))
    for threshold in (0.5, 1.0, math.inf)
    for reset in ("hard", "soft")
    for surrogate in ("sigmoid", "atan")
    for detach_reset in (True, False)
]


def currents(*shape, seed=0):
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("neuron", [LIF(), LIF(4.0, reset="soft", surrogate="atan", detach_reset=False), IF(0.7)])
def test_modules(neuron):
    check_module(lambda: neuron, currents(4, 3, 5).float(), tolerance=math.inf)


@pytest.mark.parametrize("dynamics", EVERY_DYNAMICS)
def test_the_scan_is_the_reference(dynamics):
    """Spikes and gradients, against operations that autograd differentiates itself."""
    current, weight = currents(7, 40).requires_grad_(), currents(7, 40, seed=1)
    spikes, expected = integrate_and_fire(current, dynamics), integrate_and_fire_reference(current, dynamics)[0]
    assert torch.equal(spikes, expected)
    found = torch.autograd.grad((weight * spikes).sum(), current)[0]
    torch.testing.assert_close(found, torch.autograd.grad((weight * expected).sum(), current)[0])


def by_hand(current, keep, gain, threshold, reset):
    potential, spikes = 0.0, []
    for i in current:
        potential = keep * potential + gain * i
        spikes.append(float(potential >= threshold))
        if spikes[-1]:
            potential = 0.0 if reset == "hard" else potential - threshold
    return spikes


@given(
    st.lists(st.floats(-4, 4), min_size=1, max_size=12),
    st.floats(1, 20),
    st.floats(0.1, 3),
    st.sampled_from(["hard", "soft"]),
)
def test_a_neuron_by_hand(current, tau, threshold, reset):
    lif = LIF(tau, threshold, reset=reset)
    expected = by_hand(current, 1 - 1 / tau, 1 / tau, threshold, reset)
    assert lif(torch.tensor(current, dtype=torch.float64)).tolist() == expected
    undivided = LIF(tau, threshold, reset=reset, decay_input=False)
    expected = by_hand(current, 1 - 1 / tau, 1.0, threshold, reset)
    assert undivided(torch.tensor(current, dtype=torch.float64)).tolist() == expected


def test_resets_differ_by_what_is_left():
    """A current of 1.5: U = 1.5, then 0 or 0.5 is kept."""
    current = torch.full((4,), 1.5)
    assert IF()(current).tolist() == [1, 1, 1, 1]
    assert IF(2.0)(current).tolist() == [0, 1, 0, 1]
    assert IF(2.0, reset="soft")(current).tolist() == [0, 1, 1, 1]


def test_the_threshold_itself_spikes_and_every_call_starts_at_rest():
    lif = LIF(2.0)
    assert lif(torch.tensor([2.0])).tolist() == [1]
    almost = torch.tensor([1.9])
    assert lif(almost).tolist() == lif(almost).tolist() == [0]


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.75, 0.9])
def test_the_potential_below_the_threshold_is_a_sum_of_exponentials(beta):
    current = currents(30, 4)
    dynamics = Dynamics(beta, 1 - beta, math.inf)
    spikes, potential = integrate_and_fire_reference(current, dynamics)
    delay = torch.arange(30)[:, None] - torch.arange(30)
    weights = torch.where(delay >= 0, (1 - beta) * beta ** delay.clamp_min(0).double(), 0.0)
    torch.testing.assert_close(potential, weights @ current)
    assert not spikes.any()


@pytest.mark.parametrize("surrogate", ["sigmoid", "atan"])
@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_a_surrogate_is_a_derivative_of_something_from_0_to_1(surrogate, alpha):
    primitive = {
        "sigmoid": lambda x: torch.sigmoid(alpha * x),
        "atan": lambda x: torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5,
    }[surrogate]
    x = torch.linspace(-3, 3, 51, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(primitive(x).sum(), x)[0]
    torch.testing.assert_close(surrogate_derivative(x, surrogate, alpha), expected)
    spikes = heaviside(x, surrogate, alpha)
    assert torch.equal(spikes, (x >= 0).double())
    torch.testing.assert_close(torch.autograd.grad(spikes.sum(), x)[0], expected)


def test_far_from_the_threshold_the_gradient_is_zero_and_no_nan():
    current = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    assert torch.autograd.grad(LIF()(current).sum(), current)[0].tolist() == [[0, 0]]


def test_the_gradient_below_the_threshold_is_that_of_a_smooth_neuron():
    """If nothing spikes, the steps could be sigmoids: gradcheck of that network, and the same gradient as ours."""
    dynamics = Dynamics(0.5, 0.5, 1.0)

    def smooth(current):
        potential, spikes = torch.zeros_like(current[0]), []
        for step in current:
            potential = 0.5 * potential + 0.5 * step
            spikes.append(torch.sigmoid(4 * (potential - 1)))
        return torch.stack(spikes)

    current = (0.9 * torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).double()).requires_grad_()
    assert gradcheck(smooth, current)
    expected = torch.autograd.grad(smooth(current).square().sum(), current)[0]
    spikes = integrate_and_fire(current, dynamics)
    assert not spikes.any()
    found = torch.autograd.grad(spikes, current, 2 * smooth(current).detach())[0]
    torch.testing.assert_close(found, expected)


def test_spikes_have_the_currents_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        current = currents(3, 5).to(dtype).requires_grad_()
        spikes = LIF()(current)
        assert spikes.dtype == torch.autograd.grad(spikes.sum(), current)[0].dtype == dtype


def test_bad_input():
    with pytest.raises(ValueError, match=r"tau=0\.5"):
        LIF(0.5)
    with pytest.raises(ValueError, match=r"threshold is positive, got 0.0"):
        IF(0.0)
    with pytest.raises(ValueError, match="reset is one of hard, soft, got 'none'"):
        LIF(reset="none")
    with pytest.raises(ValueError, match="surrogate is one of sigmoid, atan, got 'relu'"):
        LIF(surrogate="relu")
    with pytest.raises(ValueError, match="alpha=0"):
        IF(alpha=0.0)
    with pytest.raises(ValueError, match=r"float32 \[0, 3\]"):
        LIF()(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"int64 \[2\]"):
        LIF()(torch.tensor([1, 2]))
