"""Other neurons in a network that is there already: other constants, other libraries, or none that spike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.errors import MissingExtra
from postern.spiking.neurons import IF, LIF, Dynamics

Network = TypeVar("Network", bound=nn.Module)


def replace_neurons(network: Network, make: Callable[[LIF | IF], nn.Module]) -> Network:
    """Put ``make(neuron)`` in the place of every `LIF` and `IF` of a network, in place.

    ``replace_neurons(network, lambda neuron: LIF(4.0, neuron.dynamics.threshold))`` changes a constant;
    ``lambda _: nn.ReLU()``, with one time step, makes an ordinary network of the same graph.

    Args:
        network: what is changed. Weights and everything else stay.
        make: called with each neuron; what it returns maps [time, ...] to the same shape.

    Returns:
        The network.

    Raises:
        ValueError: the network is itself a neuron, which cannot be replaced in place.
    """
    if isinstance(network, LIF | IF):
        raise ValueError("a neuron cannot be replaced in place, only what is inside a network")
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LIF | IF):
                setattr(module, name, make(child))
    return network


class SnnTorchNeuron(nn.Module):
    """A neuron of snntorch over all time steps, with the dynamics of one of ours; for `replace_neurons`.

    The reset is that of our neuron as long as one reset is enough to fall below the threshold. What snntorch does
    otherwise: it spikes above the threshold, not at it, and gives float32. Its sigmoid surrogate is NaN backwards where
    the potential lies more than ``88 / alpha`` below the threshold.

    Args:
        neuron: a `LIF` or `IF`. Hard resets may be detached or not; soft ones must not be.

    Raises:
        MissingExtra: snntorch is not installed.
        ValueError: dynamics that snntorch does not have.
    """

    def __init__(self, neuron: LIF | IF) -> None:
        super().__init__()
        try:
            import snntorch
            from snntorch import surrogate
        except ImportError:
            raise MissingExtra("snntorch", "Running a network on the neurons of snntorch") from None
        dynamics: Dynamics = neuron.dynamics
        if dynamics.reset == "soft" and dynamics.detach_reset:
            raise ValueError(f"snntorch's soft reset is detached only with a delay that ours has not, got {dynamics}")
        gradient: Any = getattr(surrogate, dynamics.surrogate)
        self.gain = dynamics.gain
        self.cell = snntorch.Leaky(
            beta=dynamics.keep,
            threshold=dynamics.threshold,
            spike_grad=gradient(**{"slope" if dynamics.surrogate == "sigmoid" else "alpha": dynamics.alpha}),
            reset_mechanism="zero" if dynamics.reset == "hard" else "subtract",
            reset_delay=dynamics.detach_reset,
        )

    def forward(self, current: Float[Tensor, "time ..."]) -> Float[Tensor, "time ..."]:
        """Return the spikes."""
        potential = torch.zeros_like(current[0])
        spikes = []
        for step in current:
            spike, potential = self.cell(self.gain * step, potential)
            spikes.append(spike)
        # The cell would keep the last potential with its graph, and could not be copied.
        self.cell.mem = current.new_zeros(0)
        return torch.stack(spikes)
