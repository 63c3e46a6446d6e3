"""A transformer that reads a few tokens and answers with one class, as in studies of algorithmic tasks."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn


class TokenTransformer(nn.Module):
    """Embedding, transformer encoder layers, and a linear head on the last token.

    There is no position code: it suits tasks whose answer does not depend on the order, or on it only by which token
    is last.

    Args:
        num_tokens: size of the vocabulary.
        num_classes: number of logits.
        width: width of the embeddings, a multiple of ``num_heads``.
        num_heads: attention heads a layer.
        num_layers: encoder layers (normalisation after each block).
        feedforward_dim: hidden width of the feed-forward blocks.
        dropout: probability of dropping an activation in training.

    Raises:
        ValueError: a size below 1, a width that the heads do not divide, or a probability outside [0, 1).
    """

    def __init__(
        self,
        num_tokens: int,
        num_classes: int,
        width: int = 128,
        num_heads: int = 4,
        num_layers: int = 1,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if min(num_tokens, num_classes, width, num_heads, num_layers, feedforward_dim) < 1:
            raise ValueError(
                f"sizes are positive, got num_tokens={num_tokens}, num_classes={num_classes}, width={width}, "
                f"num_heads={num_heads}, num_layers={num_layers}, feedforward_dim={feedforward_dim}"
            )
        if width % num_heads:
            raise ValueError(f"num_heads must divide the width, got num_heads={num_heads} and width={width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.embedding = nn.Embedding(num_tokens, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, feedforward_dim, dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.head = nn.Linear(width, num_classes)

    def features(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch width"]:
        """Return what the head sees: the last token's vector after the layers."""
        hidden: Tensor = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, -1]

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.head(self.features(tokens))
        return logits
