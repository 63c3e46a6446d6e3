"""The usual learnt router: softmax over experts, of which the best few work.

With one expert a token and weights over all it is that of "Switch Transformers", arXiv 2101.03961; with two and weights
over the chosen it is Mixtral's, arXiv 2401.04088.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.experts.routing import (
    NO_CONTEXT,
    Routing,
    RoutingContext,
    balance_loss,
    check_sizes,
    check_tokens,
    router_z_loss,
)
from postern.precision import without_autocast


def choose(
    probabilities: Float[Tensor, "*tokens num_experts"], top_k: int, *, renormalises: bool
) -> tuple[Float[Tensor, "*tokens top_k"], Int[Tensor, "*tokens top_k"]]:
    """The largest probabilities and whose they are; equal ones by number.

    Args:
        probabilities: of all experts.
        top_k: how many are chosen.
        renormalises: whether those of the chosen are divided by their sum, which is the softmax of their logits.
    """
    weights, indices = probabilities.topk(top_k, dim=-1)
    if renormalises:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights, indices


class LogitRouter(nn.Module):
    """``p = softmax(logits(x))``; the ``top_k`` largest choose, and weigh. What routers by logits share.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: experts of a token.
        renormalises: see `SoftmaxRouter`, as for the next ones.
        balance: see `SoftmaxRouter`.
        z: see `SoftmaxRouter`.

    Raises:
        ValueError: sizes below 1, more experts a token than there are, or negative weights of losses.
    """

    def __init__(
        self, width: int, num_experts: int, top_k: int, *, renormalises: bool | None, balance: float, z: float
    ) -> None:
        super().__init__()
        check_sizes(width, num_experts, top_k)
        check_losses(balance=balance, z=z)
        self.width = width
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalises = top_k > 1 if renormalises is None else renormalises
        self.balance = balance
        self.z = z

    def logits(self, tokens: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time num_experts"]:
        """Before softmax, in float32 at least."""
        raise NotImplementedError

    def forward(self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT) -> Routing:
        """See `postern.experts.Router`; of the context it uses the mask.

        Raises:
            ValueError: tokens or a mask that do not fit.
        """
        check_tokens(self, tokens, context)
        logits = self.logits(tokens)
        probabilities = logits.softmax(-1)
        weights, indices = choose(probabilities, self.top_k, renormalises=self.renormalises)
        return Routing(weights, indices, self.auxiliary_loss(logits, probabilities, indices, context), probabilities)

    def auxiliary_loss(
        self,
        logits: Float[Tensor, "batch time num_experts"],
        probabilities: Float[Tensor, "batch time num_experts"],
        indices: Int[Tensor, "batch time top_k"],
        context: RoutingContext,
    ) -> Float[Tensor, ""]:
        """The weighted sum of `balance_loss` and `router_z_loss`.

        Args:
            logits: of all experts.
            probabilities: of all experts.
            indices: the chosen ones.
            context: of which the mask says who counts.
        """
        loss = self.balance * balance_loss(probabilities, indices, context.mask)
        return loss + self.z * router_z_loss(logits, context.mask) if self.z else loss

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, balance={self.balance}, z={self.z}"


class SoftmaxRouter(LogitRouter):
    """``p = softmax(W x)``; the ``top_k`` largest choose, and weigh.

    Probabilities are computed in float32 at least, also under autocast.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: experts of a token.
        renormalises: whether the weights of a token add up to 1; by default where there is more than one, as the
            gradient of a single weight of 1 is 0.
        bias: whether the logits have a bias.
        balance: weight of `balance_loss` in the auxiliary loss.
        z: weight of `router_z_loss` in the auxiliary loss.
        temperature: divides the logits.

    Raises:
        ValueError: sizes below 1, more experts a token than there are, negative weights of losses, or a temperature
            that is not positive.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int = 2,
        *,
        renormalises: bool | None = None,
        bias: bool = False,
        balance: float = 0.01,
        z: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(width, num_experts, top_k, renormalises=renormalises, balance=balance, z=z)
        if not temperature > 0:
            raise ValueError(f"a temperature is positive, got {temperature}")
        self.temperature = temperature
        self.gate = nn.Linear(width, num_experts, bias=bias)

    def logits(self, tokens: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time num_experts"]:
        """Before softmax, in float32 at least."""
        with without_autocast(tokens.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            weight, bias = self.gate.weight.to(dtype), None if self.gate.bias is None else self.gate.bias.to(dtype)
            return nn.functional.linear(tokens.to(dtype), weight, bias) / self.temperature


def check_losses(**weights: float) -> None:
    """Check the weights of auxiliary losses.

    Raises:
        ValueError: a negative one.
    """
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"the weight of a loss is 0 or more, got {name}={weight}")
