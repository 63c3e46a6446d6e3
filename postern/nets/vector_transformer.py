"""A small transformer encoder over a few vectors (the columns of a table, the patches of an image) for one answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.self_attention import SelfAttention
from postern.nets.language_model import AttentionBuilder, LanguageModelLayer


class VectorTransformer(nn.Module):
    """A linear embedding with learned positions, layers that normalise first, their mean over the tokens, a head.

    Args:
        in_features: numbers in a token.
        num_tokens: tokens of an input.
        num_classes: number of logits.
        width: features of a token inside, a multiple of ``num_heads``.
        num_layers: number of layers.
        num_heads: attention heads a layer, for the default attention.
        attention: makes the attention of layer 0, 1, ... of this width; by default `postern.attention.SelfAttention`.
        activation: of the feed-forward blocks, which are twice as wide as the tokens.
        position_std: standard deviation of the initial positions; larger where a token says little without its place.

    Raises:
        ValueError: a size below 1, a width that the heads do not divide, or a negative standard deviation.
    """

    def __init__(
        self,
        in_features: int,
        num_tokens: int,
        num_classes: int,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        *,
        attention: AttentionBuilder | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        position_std: float = 0.02,
    ) -> None:
        super().__init__()
        if min(in_features, num_tokens, num_classes, width, num_layers, num_heads) < 1:
            raise ValueError(
                f"sizes are positive, got in_features={in_features}, num_tokens={num_tokens}, "
                f"num_classes={num_classes}, width={width}, num_layers={num_layers}, num_heads={num_heads}"
            )
        if not position_std >= 0:
            raise ValueError(f"position_std must be at least 0, got {position_std}")
        self.embedding = nn.Linear(in_features, width)
        self.position = nn.Parameter(torch.randn(num_tokens, width) * position_std)
        self.layers = nn.ModuleList(
            LanguageModelLayer(
                SelfAttention(width, num_heads) if attention is None else attention(index),
                width,
                2 * width,
                activation,
                dropout=0.0,
            )
            for index in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, tokens: Float[Tensor, "batch tokens in_features"]) -> Float[Tensor, "batch width"]:
        """Return what the head sees: the mean of the normalised tokens after the layers."""
        hidden: Tensor = self.embedding(tokens) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        mean: Tensor = self.norm(hidden).mean(1)
        return mean

    def forward(self, tokens: Float[Tensor, "batch tokens in_features"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.head(self.features(tokens))
        return logits
