"""A small causal language model whose feed-forward blocks are mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from postern.attention.self_attention import SelfAttention
from postern.experts.mixture import MixtureOfExperts
from postern.experts.routing import Routing, RoutingContext
from postern.nets.language_model import initialise, next_token_loss

ExpertsBuilder = Callable[[int], MixtureOfExperts | None]


class ExpertLanguageModelLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + experts(norm(x))``.

    Args:
        attention: causal.
        width: features of a token.
        experts: a mixture, or an ordinary feed-forward block.
        dropout: share of each block's outputs that is zeroed in training.
    """

    def __init__(self, attention: SelfAttention, width: int, experts: nn.Module, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = experts
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        token_ids: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time width"], Routing | None]:
        """Return the tokens after both blocks, and how they were routed; None without experts."""
        attended = self.attention_norm(x)
        x = x + self.dropout(self.attention(attended, mask))
        normed = self.feedforward_norm(x)
        context = RoutingContext(mask, token_ids, is_causal=True)
        output, routing = feed_forward(self.feedforward, normed, context, self.attention, attended)
        return x + self.dropout(output), routing


def feed_forward(
    block: nn.Module,
    x: Float[Tensor, "batch time width"],
    context: RoutingContext,
    attention: SelfAttention,
    attended: Float[Tensor, "batch time width"],
) -> tuple[Float[Tensor, "batch time width"], Routing | None]:
    """Run a feed-forward block, and say how it routed tokens: a mixture of experts, or an ordinary one.

    Args:
        block: the block.
        x: tokens.
        context: what a router may know, but for queries and keys.
        attention: the layer before, which gives these to routers that need them.
        attended: what that layer saw.
    """
    if not isinstance(block, MixtureOfExperts):
        return block(x), None
    if getattr(block.router, "needs_attention", False):
        query, key, _ = attention.project(attended)
        context = replace(context, query=query, key=key)
    output, routing = block(x, context)
    return output, routing


class ExpertLanguageModel(nn.Module):
    """A causal transformer over tokens with experts in some of its layers.

    Learned positions, norms before the blocks and at the end, and an output layer that shares the embedding's weights,
    as in `postern.nets.LanguageModel`.

    Args:
        num_tokens: size of the vocabulary.
        experts: makes the mixture of layer 0, 1, ..., of this width; None for an ordinary block in that layer.
        width: features of a token, a multiple of ``num_heads``.
        num_layers: number of layers.
        num_heads: attention heads a layer.
        context: longest sequence.
        feedforward_dim: hidden width of ordinary blocks; by default four times the width.
        dropout: share of the embeddings and of each block's outputs that is zeroed in training.
        initial_std: standard deviation of the initial embeddings and linear weights; experts keep their own start.

    Raises:
        ValueError: a size below 1, or a mixture of another width.
    """

    def __init__(
        self,
        num_tokens: int,
        experts: ExpertsBuilder,
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        context: int = 128,
        *,
        feedforward_dim: int | None = None,
        dropout: float = 0.0,
        initial_std: float = 0.02,
    ) -> None:
        super().__init__()
        if min(num_tokens, width, num_layers, num_heads, context) < 1:
            raise ValueError(
                f"sizes are positive, got num_tokens={num_tokens}, width={width}, num_layers={num_layers}, "
                f"num_heads={num_heads}, context={context}"
            )
        self.num_tokens = num_tokens
        self.width = width
        self.context = context
        self.embedding = nn.Embedding(num_tokens, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        hidden = 4 * width if feedforward_dim is None else feedforward_dim
        self.layers = nn.ModuleList()
        for index in range(num_layers):
            mixture: nn.Module | None = experts(index)
            if mixture is not None and getattr(mixture, "width", None) != width:
                raise ValueError(
                    f"the experts of layer {index} must be of width {width}, got {getattr(mixture, 'width', None)}"
                )
            if mixture is None:
                mixture = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
            attention = SelfAttention(width, num_heads, is_causal=True)
            self.layers.append(ExpertLanguageModelLayer(attention, width, mixture, dropout))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(partial(initialise, std=initial_std))

    def route(
        self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> tuple[Float[Tensor, "batch time num_tokens"], list[Routing]]:
        """Return the logits of each next token, and how the tokens were routed in each layer with experts.

        Args:
            tokens: indices below ``num_tokens``.
            mask: true where a token counts.

        Raises:
            ValueError: tokens that are not integers ``[batch, time]``, or more than the context has room for.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are integers [batch, time], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > self.context:
            raise ValueError(f"the context has room for {self.context} tokens, got {tokens.shape[1]}")
        hidden = self.dropout(self.embedding(tokens) + self.position.weight[: tokens.shape[1]])
        routings = []
        for layer in self.layers:
            hidden, routing = layer(hidden, tokens, mask)
            if routing is not None:
                routings.append(routing)
        return self.head(self.norm(hidden)), routings

    def forward(
        self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time num_tokens"]:
        """Return the logits of each next token; see `route`.

        Raises:
            ValueError: see `route`.
        """
        return self.route(tokens, mask)[0]

    def loss(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats, of each token given those before it, with the routers' auxiliary losses.

        Raises:
            ValueError: see `route`.
        """
        logits, routings = self.route(tokens[:, :-1])
        auxiliary = torch.stack([routing.auxiliary_loss for routing in routings]).sum() if routings else 0.0
        return next_token_loss(logits, tokens) + auxiliary
