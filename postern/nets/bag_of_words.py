"""An encoder of texts that looks at their words alone, not at the order."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn


class BagOfWords(nn.Module):
    """``W_2 relu(mean of the words' vectors + b_1) + b_2``: a linear layer on the bag of words, ReLU, a linear layer.

    Args:
        num_tokens: size of the vocabulary; token 0 is padding.
        width: of the hidden layer.
        dim: of the output.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_tokens: int, width: int = 128, dim: int = 64) -> None:
        super().__init__()
        if min(num_tokens, width, dim) < 1:
            raise ValueError(f"sizes are positive, got num_tokens={num_tokens}, width={width}, dim={dim}")
        self.embedding = nn.EmbeddingBag(num_tokens, width, mode="mean", padding_idx=0)
        self.bias = nn.Parameter(self.embedding.weight.new_zeros(width))
        self.output = nn.Linear(width, dim)

    def forward(self, tokens: Int[Tensor, "batch words"]) -> Float[Tensor, "batch dim"]:
        """Return one vector a text; a text of padding alone gives that of no words.

        Raises:
            ValueError: tokens that are not integers ``[batch, words]``.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are integers [batch, words], got {tokens.dtype} {list(tokens.shape)}")
        vectors: Tensor = self.output((self.embedding(tokens) + self.bias).relu())
        return vectors
