"""Experts drawn for each token: a router that knows nothing, which learnt ones have to beat."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.experts.routing import NO_CONTEXT, Routing, RoutingContext, check_sizes, check_tokens, evenly


class RandomRouter(nn.Module):
    """Experts drawn for each token anew, in training and evaluation, with torch's global generator.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: experts of a token, all different, with equal weights.

    Raises:
        ValueError: sizes below 1, or more experts a token than there are.
    """

    def __init__(self, width: int, num_experts: int, top_k: int = 1) -> None:
        super().__init__()
        check_sizes(width, num_experts, top_k)
        self.width = width
        self.num_experts = num_experts
        self.top_k = top_k

    def forward(self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT) -> Routing:
        """See `postern.experts.Router`; it uses nothing of the context.

        Raises:
            ValueError: tokens or a mask that do not fit.
        """
        check_tokens(self, tokens, context)
        draws = torch.rand(*tokens.shape[:2], self.num_experts, device=tokens.device)
        return evenly(tokens, draws.topk(self.top_k, dim=-1).indices, self.num_experts)
