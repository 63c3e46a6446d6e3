"""Activations of a gate's scores, and what the statistics need of them: values and first derivatives.

Paper: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", arXiv 2401.13875. An activation keeps
the temperature identifiable unless it is positively homogeneous, ``z phi'(z) = p phi(z)``, as "identity", "relu",
"leaky_relu", "abs" and "square" are; see `activation_independence_rank`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]

# Where a learnt temperature starts beside a sigmoid: at 1 its scores in (0, 1) tell little apart.
SIGMOID_TEMPERATURE = 0.3


def _identity(z: Tensor) -> Tensor:
    return z


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "identity": _identity,
        "relu": torch.relu,
        "leaky_relu": functional.leaky_relu,
        "abs": torch.abs,
        "square": torch.square,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "sin": torch.sin,
        "gelu": functional.gelu,
        "silu": functional.silu,
        "softplus": functional.softplus,
    }
)


def resolve_activation(activation: str | Activation | None) -> Activation:
    """Return the function of a name in ``ACTIVATIONS``; a function stays as it is, and None is the identity.

    Raises:
        ValueError: an unknown name.
    """
    if activation is None:
        return _identity
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be a function or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]


def is_sigmoid(activation: Activation) -> bool:
    """Whether a function is PyTorch's sigmoid, under any of its names."""
    names = (torch.sigmoid, functional.sigmoid, torch.Tensor.sigmoid, torch.special.expit)
    return isinstance(activation, nn.Sigmoid) or activation in names


def value_and_derivative(
    activation: str | Activation | None, z: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """``phi(z)`` and ``phi'(z)`` of an elementwise function, by forward differentiation, of tanh in closed form.

    Raises:
        ValueError: an unknown name, or a function that changes the shape.
    """
    phi = resolve_activation(activation)
    if phi is _identity:
        return z, torch.ones((), dtype=z.dtype, device=z.device).expand_as(z)
    if phi is torch.tanh:  # forward differentiation would be a quarter of a pass over the samples
        value = torch.tanh(z)
        return value, 1 - value * value
    value, derivative = torch.func.jvp(phi, (z,), (torch.ones_like(z),))[:2]
    if value.shape != z.shape:
        raise ValueError(f"an activation works element by element, got {list(value.shape)} of {list(z.shape)}")
    return value, derivative
