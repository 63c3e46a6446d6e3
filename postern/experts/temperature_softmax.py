"""The dense-to-sparse gate: scores, or an activation of them, over a temperature, and a softmax.

Paper: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", arXiv 2401.13875.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from postern.experts.gate_activation import Activation, resolve_activation


def temperature_softmax_gate(
    scores: Float[Tensor, "*shape experts"],
    bias: Float[Tensor, " experts"] | None,
    temperature: float | Tensor,
    activation: str | Activation | None = None,
) -> Float[Tensor, "*shape experts"]:
    """``softmax((phi(v) + u) / tau)``: a large temperature uses every expert, a small one the best alone.

    With linear scores ``v_i = beta1_i . x`` and ``phi`` the identity, ``c (beta1, u, tau)`` gives the same weights for
    every ``c > 0``: only the ratios to the temperature can be learnt. An activation that is not homogeneous, such as
    "tanh", ends that.

    Args:
        scores: ``v``.
        bias: ``u``; zero if None.
        temperature: ``tau``, positive; a tensor broadcasts against the scores.
        activation: ``phi``: a name in ``ACTIVATIONS`` or an elementwise function; the identity if None.

    Raises:
        ValueError: a temperature that is a number and not positive, an unknown activation, or a bias of another length.
    """
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"a temperature is positive, got {temperature}")
    if bias is not None and bias.shape[-1:] != scores.shape[-1:]:
        raise ValueError(f"one bias for each of {scores.shape[-1]} experts, got shape {list(bias.shape)}")
    logits = resolve_activation(activation)(scores)
    if bias is not None:
        logits = logits + bias
    return torch.softmax(logits / temperature, dim=-1)
