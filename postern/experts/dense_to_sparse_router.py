"""A router whose temperature falls: all experts work at first, and few in the end.

Paper: "Dense-to-Sparse Gate for Mixture-of-Experts", arXiv 2112.14397.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.experts.gate_activation import Activation
from postern.experts.routing import NO_CONTEXT, Routing, RoutingContext, balance_loss, check_sizes, check_tokens
from postern.experts.softmax_router import check_losses, choose
from postern.experts.temperature_gate import TemperatureGate, check_temperature
from postern.experts.temperature_softmax import temperature_softmax_gate


def gumbel_noise(like: Tensor) -> Tensor:
    """``-log(-log U)`` with U uniform: the most of logits with such noise is a draw from their softmax.

    Args:
        like: gives shape, dtype and device.
    """
    least = torch.finfo(like.dtype).tiny
    return -torch.log(-torch.log(torch.rand_like(like).clamp(least, 1 - torch.finfo(like.dtype).eps)))


class DenseToSparseRouter(nn.Module):
    """Softmax at a temperature, with as many experts as hold more than ``threshold`` of a token.

    In training Gumbel noise is added to the scores, ``p = softmax((scores + noise) / temperature)``, and each token
    gets the K experts with the largest p, weighted by p as it is, where K is the mean number of experts above the
    threshold, and ``top_k`` at least. In evaluation there is no noise, and the best ``top_k`` share a weight of 1:
    their softmax at the temperature that training ended with, so that the layer goes on as it was trained. The code of
    VITA-Group/Random-MoE-as-Dropout takes the softmax of the kept scores at temperature 1 there, whatever the schedule
    ended with; ``evaluation_temperature=1`` does the same.

    How many experts work depends on the tokens: in training the layer cannot be compiled into one graph.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: the least number of experts of a token.
        temperature: at first; see `postern.experts.set_temperature` and `postern.experts.LinearTemperatureSchedule`.
            "learned" for a parameter. In [0.01, 100].
        threshold: the share of a token above which an expert works.
        activation: of the scores, see `TemperatureGate`.
        has_noise: whether there is noise in training.
        balance: weight of `postern.experts.balance_loss` in the auxiliary loss.
        evaluation_temperature: in evaluation, in [0.01, 100]; that of training if None.

    Raises:
        ValueError: sizes below 1, more experts a token than there are, a threshold outside [0, 1), a temperature
            outside [0.01, 100], or a negative weight of the loss.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int = 2,
        *,
        temperature: float | Literal["learned"] = 2.0,
        threshold: float = 1e-3,
        activation: str | Activation | None = None,
        has_noise: bool = True,
        balance: float = 0.01,
        evaluation_temperature: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(width, num_experts, top_k)
        check_losses(balance=balance)
        if evaluation_temperature is not None:
            check_temperature(evaluation_temperature, "evaluation_temperature")
        if not 0 <= threshold < 1:
            raise ValueError(f"a threshold is a share in [0, 1), got {threshold}")
        self.width = width
        self.num_experts = num_experts
        self.top_k = top_k
        self.threshold = threshold
        self.has_noise = has_noise
        self.balance = balance
        self.evaluation_temperature = evaluation_temperature
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
        temperature = None if self.training else self.evaluation_temperature
        probabilities = temperature_softmax_gate(scores, None, temperature or self.gate.temperature)
        if self.training:
            top_k = min(self.num_experts, max(top_k, self._num_active(probabilities, context.mask)))
        weights, indices = choose(probabilities, top_k, renormalises=not self.training)
        return Routing(
            weights, indices, self.balance * balance_loss(probabilities, indices, context.mask), probabilities
        )

    @torch.no_grad()
    def _num_active(self, probabilities: Tensor, mask: Tensor | None) -> int:
        active = (probabilities > self.threshold).sum(-1).double()
        return int((active if mask is None else active[mask]).mean().nan_to_num())
