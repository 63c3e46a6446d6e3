"""Routers that learn nothing: what every learnt one has to beat.

Hash routing is that of "Hash Layers for Large Sparse Models", arXiv 2106.04426.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.experts.routing import NO_CONTEXT, Routing, RoutingContext, check_sizes, check_tokens


def evenly(
    tokens: Float[Tensor, "batch time width"], indices: Int[Tensor, "batch time top_k"], num_experts: int
) -> Routing:
    """Equal weights for the chosen experts, and probabilities likewise.

    Args:
        tokens: what is routed.
        indices: the chosen experts, all different.
        num_experts: how many there are.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    weights = torch.full(indices.shape, 1 / indices.shape[-1], dtype=dtype, device=indices.device)
    probabilities = weights.new_zeros(*indices.shape[:-1], num_experts).scatter(-1, indices, weights)
    return Routing(weights, indices, weights.new_zeros(()), probabilities)


class HashRouter(nn.Module):
    """Fixed experts for each token of the vocabulary, drawn once, as evenly over the vocabulary as can be.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        num_tokens: size of the vocabulary.
        top_k: experts of a token, with equal weights.
        seed: of the draw.

    Raises:
        ValueError: sizes below 1, or more experts a token than there are.
    """

    experts: Tensor

    def __init__(self, width: int, num_experts: int, num_tokens: int, top_k: int = 1, *, seed: int = 0) -> None:
        super().__init__()
        check_sizes(width, num_experts, top_k)
        if num_tokens < 1:
            raise ValueError(f"a vocabulary has at least one token, got {num_tokens}")
        self.width = width
        self.num_experts = num_experts
        self.top_k = top_k
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(num_tokens, generator=generator) % num_experts
        steps = torch.stack([torch.randperm(num_experts - 1, generator=generator) for _ in range(num_tokens)])
        others = (first[:, None] + 1 + steps[:, : top_k - 1]) % num_experts
        self.register_buffer("experts", torch.cat([first[:, None], others], dim=1))

    def forward(self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT) -> Routing:
        """See `postern.experts.Router`; of the context it needs the tokens' numbers.

        Raises:
            ValueError: tokens that do not fit, or no numbers of tokens.
        """
        check_tokens(self, tokens, context)
        if context.token_ids is None:
            raise ValueError("a hash router needs the tokens' numbers: RoutingContext(token_ids=...)")
        return evenly(tokens, self.experts[context.token_ids], self.num_experts)


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
