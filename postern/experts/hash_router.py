"""Fixed experts for each token of the vocabulary: a router that learns nothing, which learnt ones have to beat.

Paper: "Hash Layers for Large Sparse Models", arXiv 2106.04426.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.experts.routing import NO_CONTEXT, Routing, RoutingContext, check_sizes, check_tokens, evenly


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
