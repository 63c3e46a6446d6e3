"""Routers whose temperature falls: all experts work at first, and few in the end.

Papers: "Dense-to-Sparse Gate for Mixture-of-Experts", arXiv 2112.14397, and the "Is Temperature Sample Efficient for
Softmax Gaussian Mixture of Experts?", arXiv 2401.13875, which shows that a temperature cannot be learnt beside linear
scores, and passes the scores through an activation before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.experts.routing import (
    NO_CONTEXT,
    Routing,
    RoutingContext,
    balance_loss,
    check_sizes,
    check_tokens,
)
from postern.experts.softmax_router import check_losses, choose
from postern.precision import without_autocast

LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-2, 1e2


def gumbel_noise(like: Tensor) -> Tensor:
    """``-log(-log U)`` with U uniform: the most of logits with such noise is a draw from their softmax.

    Args:
        like: gives shape, dtype and device.
    """
    least = torch.finfo(like.dtype).tiny
    return -torch.log(-torch.log(torch.rand_like(like).clamp(least, 1 - torch.finfo(like.dtype).eps)))


class TemperatureGate(nn.Module):
    """``softmax((activation(W x) + b) / temperature)`` over all experts.

    Without an activation, or with one that is homogeneous as ReLU is, weights, bias and temperature can be scaled
    together and nothing changes: there, schedule a temperature rather than learn it.

    Args:
        width: features of a token.
        num_experts: how many there are.
        temperature: a number, or "learned", which starts at 1; its logarithm is the parameter, and it stays between
            0.01 and 100.
        activation: of the scores; None for none.
        bias: whether each expert has a bias, which is added after the activation.

    Raises:
        ValueError: sizes below 1, or a temperature that is not positive.
    """

    log_temperature: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        temperature: float | Literal["learned"] = 1.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(width, num_experts, 1)
        self.width = width
        self.num_experts = num_experts
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        if temperature == "learned":
            self.log_temperature = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("log_temperature", torch.zeros(()))
            self.set_temperature(temperature)

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """The temperature."""
        return self.log_temperature.exp().clamp(LEAST_TEMPERATURE, GREATEST_TEMPERATURE)

    @torch.no_grad()
    def set_temperature(self, temperature: float) -> None:
        """Set the temperature, e.g. by a schedule.

        Args:
            temperature: positive.

        Raises:
            ValueError: it is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"a temperature is positive, got {temperature}")
        self.log_temperature.fill_(math.log(temperature))

    def scores(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens num_experts"]:
        """``activation(W x) + b``, not yet divided by the temperature, in float32 at least."""
        with without_autocast(tokens.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            scores = nn.functional.linear(tokens.to(dtype), self.weight.to(dtype))
            scores = scores if self.activation is None else self.activation(scores)
            return scores if self.bias is None else scores + self.bias.to(dtype)

    def forward(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens num_experts"]:
        """Return the weights of all experts."""
        return (self.scores(tokens) / self.temperature).softmax(-1)


def set_temperature(module: nn.Module, temperature: float) -> None:
    """Set the temperature of every `TemperatureGate` in a model.

    Args:
        module: the model.
        temperature: positive.

    Raises:
        ValueError: a temperature that is not positive, or a model without such gates.
    """
    gates = [gate for gate in module.modules() if isinstance(gate, TemperatureGate)]
    if not gates:
        raise ValueError(f"{type(module).__name__} has no TemperatureGate whose temperature could be set")
    for gate in gates:
        gate.set_temperature(temperature)


class LinearTemperatureSchedule:
    """A temperature that goes from ``start`` to ``end`` in equal steps, and stays there.

    Args:
        steps: how many it takes.
        start: the first.
        end: the last.

    Raises:
        ValueError: steps below 1, or temperatures that are not positive.
    """

    def __init__(self, steps: int, start: float = 2.0, end: float = 0.3) -> None:
        if steps < 1 or not min(start, end) > 0:
            raise ValueError(f"a schedule has steps and positive temperatures, got {steps}, {start} and {end}")
        self.steps = steps
        self.start = start
        self.end = end

    def __call__(self, step: float) -> float:
        """Return the temperature after so many steps.

        Args:
            step: from 0 on; parts of a step count.
        """
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


class DenseToSparseRouter(nn.Module):
    """Softmax at a temperature, with as many experts as hold more than ``threshold`` of a token.

    In training Gumbel noise is added to the scores, ``p = softmax((scores + noise) / temperature)``, and each token
    gets the K experts with the largest p, weighted by p as it is, where K is the mean number of experts above the
    threshold, and ``top_k`` at least. In evaluation there is no noise, and the best ``top_k`` share a weight of 1.

    How many experts work depends on the tokens: in training the layer cannot be compiled into one graph.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: the least number of experts of a token.
        temperature: at first; see `set_temperature` and `LinearTemperatureSchedule`. "learned" for a parameter.
        threshold: the share of a token above which an expert works.
        activation: of the scores, see `TemperatureGate`.
        has_noise: whether there is noise in training.
        balance: weight of `postern.experts.balance_loss` in the auxiliary loss.

    Raises:
        ValueError: sizes below 1, more experts a token than there are, a threshold outside [0, 1), a temperature that
            is not positive, or a negative weight of the loss.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int = 2,
        *,
        temperature: float | Literal["learned"] = 2.0,
        threshold: float = 1e-3,
        activation: Callable[[Tensor], Tensor] | None = None,
        has_noise: bool = True,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        check_sizes(width, num_experts, top_k)
        check_losses(balance=balance)
        if not 0 <= threshold < 1:
            raise ValueError(f"a threshold is a share in [0, 1), got {threshold}")
        self.width = width
        self.num_experts = num_experts
        self.top_k = top_k
        self.threshold = threshold
        self.has_noise = has_noise
        self.balance = balance
        self.gate = TemperatureGate(width, num_experts, temperature=temperature, activation=activation)

    def forward(self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT) -> Routing:
        """See `postern.experts.Router`; of the context it uses the mask.

        Raises:
            ValueError: tokens or a mask that do not fit.
        """
        check_tokens(self, tokens, context)
        scores = self.gate.scores(tokens)
        top_k = self.top_k
        if self.training and self.has_noise:
            scores = scores + gumbel_noise(scores)
        probabilities = (scores / self.gate.temperature).softmax(-1)
        if self.training:
            top_k = min(self.num_experts, max(top_k, self._num_active(probabilities, context.mask)))
        weights, indices = choose(probabilities, top_k, renormalises=not self.training)
        return Routing(
            weights, indices, self.balance * balance_loss(probabilities, indices, context.mask), probabilities
        )

    @torch.no_grad()
    def _num_active(self, probabilities: Tensor, mask: Tensor | None) -> int:
        active = (probabilities > self.threshold).sum(-1).double()
        return int(active.mean() if mask is None else active[mask].mean().nan_to_num())
