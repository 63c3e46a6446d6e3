"""Softmaxes whose rows may sum to less than one, so that an attention head can add nothing.

Softmax gives every entry a positive share. A head that should leave a token alone must therefore look for tokens with
small values and push their logits ever higher, which is where the huge activations of transformers come from. Clipped
softmax stretches the probabilities and clips them, so that exact zeros are reached at a finite range of logits, where
the gradient stops. The off-by-one softmax adds an empty entry with logit 0 instead, which may take the whole share.

Paper: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929. The
off-by-one softmax is E. Miller's "Attention Is Off By One" (2023), the paper's closest rival.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

BERT_GAMMA = -0.03  # the paper's main setting, for 128 tokens


def clipped_softmax(
    logits: Float[Tensor, "*shape"],
    dim: int = -1,
    *,
    gamma: float | None = None,
    zeta: float = 1.0,
    alpha: float | None = None,
    length: int | None = None,
) -> Float[Tensor, "*shape"]:
    """``clip((zeta - gamma) * softmax(logits) + gamma, 0, 1)``.

    A probability below ``-gamma / (zeta - gamma)`` becomes exactly 0, one above ``(1 - gamma) / (zeta - gamma)``
    exactly 1; clipped entries get no gradient. Rows are not normalised again. In the paper ``gamma < 0`` does nearly
    all of the work.

    With ``gamma = -alpha / length`` a setting carries over to other lengths; the paper finds ``alpha`` of 2 to 4 useful
    for BERT and ViT. Mind that ``alpha > 1`` maps a uniform row to zeros without a gradient: a head whose logits start
    equal stays dead.

    Args:
        logits: any shape; entries of minus infinity (masked ones) become 0.
        dim: where the probabilities lie.
        gamma: lower end of the stretched interval, at most 0; 0 with ``zeta = 1`` is the plain softmax. If neither it
            nor ``alpha`` is given, -0.03, the paper's main setting.
        zeta: upper end of the stretched interval, at least 1.
        alpha: at least 0; gives ``gamma = -alpha / length``.
        length: number of entries that ``alpha`` refers to, in attention the longest sequence of training; by default
            the size of ``dim``.

    Returns:
        Numbers in [0, 1], in the shape and dtype of the logits; 16-bit logits are computed in float32.

    Raises:
        ValueError: logits that are not floating point, gamma above 0, zeta below 1, alpha below 0, length below 1, or
            both gamma and alpha.
    """
    if has_torch_function_unary(logits):  # one operation to whoever watches, so that quantizers see its output alone
        return handle_torch_function(
            clipped_softmax, (logits,), logits, dim, gamma=gamma, zeta=zeta, alpha=alpha, length=length
        )
    _check_floating_point(logits)
    lower = clipping_gamma(gamma, zeta, alpha, logits.shape[dim] if length is None else length)
    # in 16 bits the stretch would round away probabilities that differ by less than gamma's own rounding
    probabilities = torch.softmax(logits, dim, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.clamp(probabilities * (zeta - lower) + lower, 0.0, 1.0).to(logits.dtype)


def clipping_gamma(gamma: float | None, zeta: float, alpha: float | None, length: int) -> float:
    """The gamma that `clipped_softmax` uses: the given one, else ``-alpha / length``, else -0.03.

    Args:
        gamma: see `clipped_softmax`.
        zeta: checked only.
        alpha: see `clipped_softmax`.
        length: number of entries that alpha refers to.

    Raises:
        ValueError: see `clipped_softmax`.
    """
    if gamma is not None and alpha is not None:
        raise ValueError(f"gamma and alpha exclude each other, got gamma={gamma} and alpha={alpha}")
    if not zeta >= 1:
        raise ValueError(f"zeta must be at least 1, got {zeta}")
    if alpha is not None:
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        return -alpha / length
    if gamma is None:
        return BERT_GAMMA
    if not gamma <= 0:
        raise ValueError(f"gamma must be at most 0, got {gamma}")
    return gamma


def softmax_off_by_one(logits: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """``exp(logits_i) / (1 + sum_j exp(logits_j))``: softmax with an empty entry of logit 0, left out of the result.

    Args:
        logits: any shape; entries of minus infinity become 0, and a row of nothing else becomes zeros.
        dim: where the probabilities lie.

    Returns:
        Numbers in [0, 1) that sum to less than 1, in the shape and dtype of the logits.

    Raises:
        ValueError: logits that are not floating point.
    """
    if has_torch_function_unary(logits):
        return handle_torch_function(softmax_off_by_one, (logits,), logits, dim)
    _check_floating_point(logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(dim, keepdim=True).clamp_min(0).detach()
    exponentials = torch.exp(wide - top)
    return (exponentials / (torch.exp(-top) + exponentials.sum(dim, keepdim=True))).to(logits.dtype)


def _check_floating_point(logits: Tensor) -> None:
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
