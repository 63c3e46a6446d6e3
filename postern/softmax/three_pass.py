"""Softmax in three passes: find the maximum, sum the exponentials of the differences to it, write the quotients.

The textbook form, in the two variants that "The Two-Pass Softmax Algorithm" (arXiv 2001.04438) compares itself with.
"Recompute" takes each exponential twice and writes once; "reload" takes it once, keeps it in the output, and scales
the output in a further pass of reading and writing. The kernels share the exponential and the unrolling with the
two-pass kernels, so that comparing them compares the algorithms.
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from postern.softmax import _rows

Variant = Literal["recompute", "reload"]


def three_pass_softmax(
    logits: Float[Tensor, "*shape"],
    dim: int = -1,
    *,
    variant: Variant = "recompute",
    backend: _rows.Backend = "auto",
    out: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return ``exp(x_i - max x) / sum_k exp(x_k - max x)`` in three passes over the row.

    Args:
        logits: float32, float64, bfloat16 or float16, of any shape and layout.
        dim: the dimension that sums to one.
        variant: "recompute" or "reload". In formats narrower than float32 a kept exponential would be rounded twice,
            so "reload" is "recompute" there.
        backend: "native" for the compiled kernels, "torch" for plain tensor operations (which are the same for both
            variants), "auto" for the kernels where they are.
        out: where to write; it may be the logits themselves.

    Returns:
        Probabilities in the logits' shape and dtype. Rows that hold NaN or plus infinity, or minus infinity alone,
        are NaN, as in torch.

    Raises:
        ValueError: an integer tensor, a dimension that is not there, an unknown variant or backend, an ``out`` of
            another shape, dtype or device, or one whose inputs require gradients.
        Unavailable: the native backend was asked for and is not installed.

    Source: arXiv 2001.04438, algorithms 1 and 2.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant is one of {', '.join(get_args(Variant))}; got {variant!r}")
    if variant == "reload" and logits.element_size() < 4:
        variant = "recompute"
    _rows.check(logits, dim, backend, 1, out)
    return _rows.run(logits, dim, f"three_pass_{variant}", False, backend, 1, out)
