"""Attention with the clipped softmax, whose heads can add exactly nothing at finite logits.

Paper: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929. For the
same in a Transformers model see `postern.attention.register_clipped_softmax`.
"""

from __future__ import annotations

from functools import partial
from typing import Unpack

from postern.attention.self_attention import HeadOptions, SelfAttention
from postern.softmax.clipped import clipped_softmax, clipping_gamma


class ClippedSoftmaxAttention(SelfAttention):
    """Self-attention with weights ``clip((zeta - gamma) softmax(Q K^T / sqrt(head_dim)) + gamma, 0, 1)``.

    Weights are not normalised again, so that they may sum to less than 1, down to 0. Masked tokens stay at 0. The clip
    needs the final sum of the row, which rules out PyTorch's fused kernel: memory grows with the square of the time.

    The paper finds that it does not help causal language models (there use `PerHeadGatedAttention`).

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        alpha: ``gamma = -alpha / length``; the paper finds 2 to 4 useful at 128 to 512 tokens, but more than 1 lets a
            head die whose logits start equal, which is a danger in short sequences.
        length: tokens of the longest sequence of training.
        zeta: upper end of the stretched interval, at least 1.
        options: see `SelfAttention`; dropout acts on the clipped weights.

    Raises:
        ValueError: impossible sizes, alpha below 0, length below 1, or zeta below 1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        alpha: float,
        length: int,
        zeta: float = 1.0,
        **options: Unpack[HeadOptions],
    ) -> None:
        gamma = clipping_gamma(None, zeta, alpha, length)
        super().__init__(
            width,
            num_heads,
            normalise=partial(clipped_softmax, gamma=gamma, zeta=zeta),
            **options,
        )
        self.gamma = gamma
        self.zeta = zeta

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"{super().extra_repr()}, gamma={self.gamma:g}, zeta={self.zeta:g}"
