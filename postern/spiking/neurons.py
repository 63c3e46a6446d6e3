"""Leaky integrate-and-fire neurons over all time steps at once.

With the potential ``V`` after the last step, the input current ``I`` and the threshold ``theta``:

    U[n] = beta V[n-1] + (1 - beta) I[n]      beta = 1 - 1 / tau
    S[n] = 1 if U[n] >= theta else 0
    V[n] = U[n] (1 - S[n])      hard reset
    V[n] = U[n] - theta S[n]    soft reset

Without a leak (integrate-and-fire) ``U[n] = V[n-1] + I[n]``. ``V`` is 0 before the first step of every call: nothing is
kept from one batch to the next. Backwards a surrogate stands in for the derivative of the step.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608. Its text has the soft reset, its
code, like the default here, the hard one, with the reset detached from the graph.

Why not the neurons of snntorch, with which tests compare these (`SnnTorchNeuron` puts them into any network): they
spike above the threshold and not at it, have no detached soft reset within the same step, give float32 for any input,
and their sigmoid surrogate is NaN far below the threshold, which ends a training. One call for a step also costs time,
see ``benchmarks.spiking``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from postern.spiking.surrogate import Surrogate, check_surrogate, heaviside, surrogate_derivative

Reset = Literal["hard", "soft"]


class Dynamics(NamedTuple):
    """``U[n] = keep * V[n-1] + gain * I[n]``, and what happens at the threshold.

    Attributes:
        keep: share of the potential that is left after a step.
        gain: of the current.
        threshold: potential from which a neuron spikes; infinite for one that never does.
        reset: to 0 ("hard"), or by the threshold ("soft").
        surrogate: for the derivative of the step.
        alpha: its slope.
        detach_reset: whether the spike that resets the potential counts as a constant in the gradient.
    """

    keep: float
    gain: float
    threshold: float = 1.0
    reset: Reset = "hard"
    surrogate: Surrogate = "sigmoid"
    alpha: float = 4.0
    detach_reset: bool = True


def integrate_and_fire_reference(
    current: Float[Tensor, "time ..."], dynamics: Dynamics
) -> tuple[Float[Tensor, "time ..."], Float[Tensor, "time ..."]]:
    """Step by step, in operations that autograd knows; slow, and the measure of `integrate_and_fire`.

    Args:
        current: input of every step.
        dynamics: of the neurons.

    Returns:
        The spikes, and the potentials ``U`` before the reset. Both have gradients.

    Raises:
        ValueError: no time steps, or a current that is not floating-point.
    """
    _check_current(current)
    after = torch.zeros_like(current[0])
    spikes, potentials = [], []
    for step in current:
        potential = dynamics.keep * after + dynamics.gain * step
        spike = heaviside(potential - dynamics.threshold, dynamics.surrogate, dynamics.alpha)
        resetting = spike.detach() if dynamics.detach_reset else spike
        if dynamics.reset == "hard":
            after = potential * (1 - resetting)
        elif dynamics.threshold < torch.inf:
            after = potential - dynamics.threshold * resetting
        else:
            after = potential
        spikes.append(spike)
        potentials.append(potential)
    return torch.stack(spikes), torch.stack(potentials)


class _Scan(torch.autograd.Function):
    """All steps, forwards and backwards, with nothing kept but the potentials."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, dynamics: Dynamics) -> Tensor:
        # Negated potentials: `threshold` keeps what is above -theta and sets the rest to 0, a hard reset in one pass.
        negated = current * -dynamics.gain
        bound = -dynamics.threshold
        for n in range(1, len(negated)):
            after = F.threshold(negated[n - 1], bound, 0.0)
            if dynamics.reset == "soft":
                after = torch.where(negated[n - 1] > bound, after, negated[n - 1] - bound)
            negated[n].add_(after, alpha=dynamics.keep)
        ctx.save_for_backward(negated)
        ctx.dynamics = dynamics
        return (negated <= bound).to(current.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (negated,) = ctx.saved_tensors
        dynamics: Dynamics = ctx.dynamics
        bound = -dynamics.threshold
        slope = surrogate_derivative(bound - negated, dynamics.surrogate, dynamics.alpha)
        # The gradient with respect to the potentials; the slope is not needed again where the reset is detached.
        gradient = slope.mul_(gradients[0]) if dynamics.detach_reset else slope * gradients[0]
        for n in range(len(gradient) - 2, -1, -1):
            later = gradient[n + 1]
            if dynamics.reset == "soft":
                gradient[n].add_(later, alpha=dynamics.keep)
            else:
                gradient[n].add_(later.masked_fill(negated[n] <= bound, 0.0), alpha=dynamics.keep)
            if not dynamics.detach_reset and dynamics.threshold < torch.inf:
                lost = negated[n] if dynamics.reset == "hard" else bound
                gradient[n].add_(later * slope[n] * lost, alpha=dynamics.keep)
        return gradient.mul_(dynamics.gain), None


def integrate_and_fire(current: Float[Tensor, "time ..."], dynamics: Dynamics) -> Float[Tensor, "time ..."]:
    """Spikes of neurons that start at rest.

    It keeps one tensor of the current's size for the backward pass, and cannot be differentiated twice.

    Args:
        current: input of every step.
        dynamics: of the neurons.

    Returns:
        0 or 1, in the current's dtype.

    Raises:
        ValueError: no time steps, or a current that is not floating-point.
    """
    _check_current(current)
    spikes: Tensor = _Scan.apply(current, dynamics)  # type: ignore[no-untyped-call]
    return spikes


class _Neuron(nn.Module):
    """Neurons without parameters, of the dynamics ``self.dynamics``."""

    def __init__(self, dynamics: Dynamics) -> None:
        super().__init__()
        if not dynamics.threshold > 0:
            raise ValueError(f"a threshold is positive, got {dynamics.threshold}")
        if dynamics.reset not in get_args(Reset):
            raise ValueError(f"a reset is one of {', '.join(get_args(Reset))}, got {dynamics.reset!r}")
        check_surrogate(dynamics.surrogate, dynamics.alpha)
        self.dynamics = dynamics

    def forward(self, current: Float[Tensor, "time ..."]) -> Float[Tensor, "time ..."]:
        """Return the spikes, 0 or 1.

        Raises:
            ValueError: no time steps, or a current that is not floating-point.
        """
        return integrate_and_fire(current, self.dynamics)

    def extra_repr(self) -> str:
        """Return what differs from neuron to neuron."""
        return ", ".join(f"{name}={value!r}" for name, value in self.dynamics._asdict().items())


class LIF(_Neuron):
    """Leaky integrate-and-fire: ``U[n] = V[n-1] + (I[n] - V[n-1]) / tau``; see the module's head for the rest.

    Args:
        tau: time constant in steps, at least 1; ``beta = 1 - 1 / tau``.
        threshold: potential from which a neuron spikes.
        reset: to 0 ("hard", as in the paper's code), or by the threshold ("soft", as in its text).
        surrogate: "sigmoid" or "atan"; see `surrogate_derivative`.
        alpha: slope of the surrogate.
        detach_reset: whether the spike that resets counts as a constant in the gradient.
        decay_input: whether the current is divided by tau; else ``U[n] = beta V[n-1] + I[n]``.

    Raises:
        ValueError: a time constant below 1, a threshold or slope that is not positive, an unknown reset or surrogate.
    """

    def __init__(
        self,
        tau: float = 2.0,
        threshold: float = 1.0,
        *,
        reset: Reset = "hard",
        surrogate: Surrogate = "sigmoid",
        alpha: float = 4.0,
        detach_reset: bool = True,
        decay_input: bool = True,
    ) -> None:
        if not 1 <= tau < torch.inf:
            raise ValueError(f"a time constant is at least one step and finite, got tau={tau}")
        gain = 1 / tau if decay_input else 1.0
        super().__init__(Dynamics(1 - 1 / tau, gain, threshold, reset, surrogate, alpha, detach_reset))


class IF(_Neuron):
    """Integrate-and-fire, without a leak: ``U[n] = V[n-1] + I[n]``; see the module's head for the rest.

    Args:
        threshold: potential from which a neuron spikes.
        reset: to 0 ("hard"), or by the threshold ("soft").
        surrogate: "sigmoid" or "atan"; see `surrogate_derivative`.
        alpha: slope of the surrogate.
        detach_reset: whether the spike that resets counts as a constant in the gradient.

    Raises:
        ValueError: a threshold or slope that is not positive, an unknown reset or surrogate.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        *,
        reset: Reset = "hard",
        surrogate: Surrogate = "sigmoid",
        alpha: float = 4.0,
        detach_reset: bool = True,
    ) -> None:
        super().__init__(Dynamics(1.0, 1.0, threshold, reset, surrogate, alpha, detach_reset))


def _check_current(current: Tensor) -> None:
    if current.dim() < 1 or not current.shape[0] or not current.is_floating_point():
        raise ValueError(
            "currents are floating-point, [time, ...] with at least one time step, "
            f"got {current.dtype} {list(current.shape)}"
        )
