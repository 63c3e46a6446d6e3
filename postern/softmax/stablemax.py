"""StableMax: a softmax whose exponential is replaced by a positive map that grows only linearly.

Softmax turns a gap of 17 between two logits into a probability that float32 cannot tell from one; the loss and its
gradient are then exactly zero and learning stops. StableMax needs a gap of ten million for that.

Paper: "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697), section 4 and proposition 1.
The paper's code computes ``s(z) / sum s(z)`` in float64. Here it is the softmax of ``g(z)``, which is the same function
(proposition 1), needs no float64 and cannot overflow; precisions below float32 are computed in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def stablemax(
    logits: Float[Tensor, "*shape"], dim: int = -1, dtype: torch.dtype | None = None
) -> Float[Tensor, "*shape"]:
    """Return the StableMax probabilities of logits.

    ``stablemax(z)_i = s(z_i) / sum_j s(z_j)`` with ``s(z) = z + 1`` for ``z >= 0`` and ``1 / (1 - z)`` below.

    Not invariant to shifts of the logits, unlike softmax: do not subtract their maximum. The order of the classes is
    that of the logits, and a logit of ``-inf`` gets probability 0.

    Args:
        logits: scores of any shape.
        dim: the dimension that sums to one.
        dtype: what to compute in and return; None keeps the logits' dtype.

    Returns:
        Probabilities, in the logits' shape.

    Raises:
        ValueError: logits or a dtype that are not floating point, or a dimension that the logits lack.
    """
    _check(logits, dim, dtype)
    scores = _signed_log1p(logits if dtype is None else logits.to(dtype))
    return torch.softmax(scores, dim).to(logits.dtype if dtype is None else dtype)


def log_stablemax(
    logits: Float[Tensor, "*shape"], dim: int = -1, dtype: torch.dtype | None = None
) -> Float[Tensor, "*shape"]:
    """Return the logarithm of `stablemax`, computed as ``log_softmax(g(z))`` with ``g(z) = sign(z) log(1 + |z|)``.

    Its gradient is softmax's, damped by ``g'(z) = 1 / (1 + |z|)``.

    Args:
        logits: scores of any shape.
        dim: the dimension whose probabilities sum to one.
        dtype: what to compute in and return; None keeps the logits' dtype.

    Returns:
        Logarithms of probabilities, in the logits' shape.

    Raises:
        ValueError: logits or a dtype that are not floating point, or a dimension that the logits lack.
    """
    _check(logits, dim, dtype)
    scores = _signed_log1p(logits if dtype is None else logits.to(dtype))
    return torch.log_softmax(scores, dim).to(logits.dtype if dtype is None else dtype)


def _signed_log1p(z: Tensor) -> Tensor:
    """``g(z) = log s(z)``, in float32 at least.

    The sign is a constant to autograd: with ``sign(z) * log1p(abs(z))`` the gradient at z = 0 is 0 instead of 1, and
    there lie all logits of a zero-initialised head.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    side = torch.ones_like(z).copysign(z.detach())
    return side * torch.log1p(side * z)


def _check(logits: Tensor, dim: int, dtype: torch.dtype | None) -> None:
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    if not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no dimension {dim}")
