"""Online softmax: one pass keeps a running maximum and a sum that is rescaled when the maximum grows, one writes.

Paper: "Online normalizer calculation for softmax" (Milakov and Gimelshein, arXiv 1805.02867). It reads and writes as
much as the two-pass algorithm and is its modern rival. As in today's kernels, the sum is rescaled once a block instead
of once an element, in each vector lane separately.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from postern.softmax import _rows


def online_softmax(
    logits: Float[Tensor, "*shape"],
    dim: int = -1,
    *,
    block: int = 4096,
    backend: _rows.Backend = "auto",
    out: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return ``exp(x_i - m) / d`` with the maximum m and the sum ``d = sum_k exp(x_k - m)`` found in one pass.

    For each block b: ``m' = max(m, max b)``, ``d' = d exp(m - m') + sum_b exp(x - m')``.

    Args:
        logits: float32, float64, bfloat16 or float16, of any shape and layout.
        dim: the dimension that sums to one.
        block: elements that share a rescaling in the "torch" backend; the kernels' blocks are 8 vectors.
        backend: "native" for the compiled kernels, "torch" for plain tensor operations, "auto" for the kernels where
            they are.
        out: where to write; it may be the logits themselves.

    Returns:
        Probabilities in the logits' shape and dtype. Rows that hold NaN or plus infinity, or minus infinity alone,
        are NaN, as in torch.

    Raises:
        ValueError: an integer tensor, a dimension that is not there, an unknown backend, a block below 1, an ``out``
            of another shape, dtype or device, or one whose inputs require gradients.
        Unavailable: the native backend was asked for and is not installed.

    Source: arXiv 1805.02867, algorithm 3.
    """
    _rows.check(logits, dim, backend, block, out)
    return _rows.run(logits, dim, "online", False, backend, block, out)
