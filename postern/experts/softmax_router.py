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


def route(
    logits: Float[Tensor, "batch time num_experts"],
    top_k: int,
    context: RoutingContext,
    *,
    renormalises: bool,
    balance: float,
    z: float,
) -> Routing:
    """The routing by the softmax of logits.

    Args:
        logits: of all experts.
        top_k: how many are chosen.
        context: of which the mask says who counts in the losses.
        renormalises: see `choose`.
        balance: weight of `balance_loss` in the auxiliary loss.
        z: weight of `router_z_loss` in the auxiliary loss.
    """
    probabilities = logits.softmax(-1)
    weights, indices = choose(probabilities, top_k, renormalises=renormalises)
    loss = balance * balance_loss(probabilities, indices, context.mask)
    if z:
        loss = loss + z * router_z_loss(logits, context.mask)
    return Routing(weights, indices, loss, probabilities)


class SoftmaxRouter(nn.Module):
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
        super().__init__()
        check_sizes(width, num_experts, top_k)
        check_losses(balance=balance, z=z)
        if not temperature > 0:
            raise ValueError(f"a temperature is positive, got {temperature}")
        self.width = width
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalises = top_k > 1 if renormalises is None else renormalises
        self.balance = balance
        self.z = z
        self.temperature = temperature
        self.gate = nn.Linear(width, num_experts, bias=bias)

    def logits(self, tokens: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time num_experts"]:
        """Before softmax, in float32 at least."""
        with without_autocast(tokens.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            weight, bias = self.gate.weight.to(dtype), None if self.gate.bias is None else self.gate.bias.to(dtype)
            return nn.functional.linear(tokens.to(dtype), weight, bias) / self.temperature

    def forward(self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT) -> Routing:
        """See `postern.experts.Router`; of the context it uses the mask.

        Raises:
            ValueError: tokens or a mask that do not fit.
        """
        check_tokens(self, tokens, context)
        return route(
            self.logits(tokens),
            self.top_k,
            context,
            renormalises=self.renormalises,
            balance=self.balance,
            z=self.z,
        )

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, balance={self.balance}, z={self.z}"


def check_losses(**weights: float) -> None:
    """Check the weights of auxiliary losses.

    Raises:
        ValueError: a negative one.
    """
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"the weight of a loss is 0 or more, got {name}={weight}")
