"""Norm-aware linear attention: features that grow spiky with the length of the query, and keep signs apart.

The denominator of linear attention cancels any factor of the query's features, so that the length of the query does not
matter; under softmax a long query is a sharp one. Here the length is an exponent, which does not cancel. A ReLU would
forget what negative coordinates have in common; a cosine and a sine keep each sign in its own half of the features.

Paper: "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137. The phase "sign" is that of
its code; "soft" is a reading of its text that keeps all products positive.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from postern.attention.framed import FramedLinearAttention, FrameOptions
from postern.precision import without_autocast

Phase = Literal["sign", "soft"]
_LEAST_LOG = -40.0  # smaller features are 0: no product of two is a denormal number of float32, which would be slow


def norm_exponent(norm: Float[Tensor, "*batch"], *, power: float = 3.0, offset: float = 0.5) -> Float[Tensor, "*batch"]:
    """``p(x) = power (offset + tanh(x))``: between 1.5 and 4.5 with the paper's constants."""
    return power * (offset + torch.tanh(norm))


def norm_aware_query_features(
    query: Float[Tensor, "*batch head_dim"],
    *,
    power: float = 3.0,
    offset: float = 0.5,
    phase: Phase | None = "sign",
    has_norm_exponent: bool = True,
    eps: float = 1e-6,
) -> Float[Tensor, "*batch features"]:
    """``[|d|^p cos(a), |d|^p sin(a)]`` with the direction ``d = q / |q|`` and the exponent ``p`` of `norm_exponent`.

    ===========  ============================================  ==========================================
    phase        angle ``a`` of coordinate i                   coordinates of opposite signs
    ===========  ============================================  ==========================================
    ``"sign"``   0 where ``d_i`` is positive, else ``pi / 2``  do not interact
    ``"soft"``   ``pi / 4 (1 - d_i)``                          interact less, the larger both are
    None         none: the features are ``|d|^p``              interact like equal ones
    ===========  ============================================  ==========================================

    They are at least 0, and a phase does not change their norm. Features below 4e-18 are 0; so are those of a query 0.

    Args:
        query: queries.
        power: scale of the exponent, and the exponent itself without the norm.
        offset: share of the exponent that does not depend on the norm.
        phase: how signs are kept.
        has_norm_exponent: whether the norm is in the exponent.
        eps: shorter queries are not stretched to length 1.

    Returns:
        ``2 head_dim`` features, or ``head_dim`` without a phase; in float32 at least.

    Raises:
        ValueError: a power or offset that is not positive, or an unknown phase.
    """
    _check(power, offset, phase)
    with without_autocast(query.device):
        q = query.to(torch.promote_types(query.dtype, torch.float32))
        norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        length = norm.clamp_min(eps)
        exponent = norm_exponent(norm, power=power, offset=offset) if has_norm_exponent else power
        return _lift(_powers(q.abs(), exponent, length), q, length, phase)


def norm_aware_key_features(
    key: Float[Tensor, "*batch head_dim"], *, power: float = 3.0, phase: Phase | None = "sign", eps: float = 1e-6
) -> Float[Tensor, "*batch features"]:
    """``[|k|^power cos(a), |k|^power sin(a)]``, with the angles of `norm_aware_query_features`; keys keep their norm.

    Args:
        key: keys.
        power: exponent.
        phase: how signs are kept.
        eps: shorter keys have no full direction.

    Returns:
        ``2 head_dim`` features, or ``head_dim`` without a phase; in float32 at least.

    Raises:
        ValueError: a power that is not positive, or an unknown phase.
    """
    _check(power, 1.0, phase)
    with without_autocast(key.device):
        k = key.to(torch.promote_types(key.dtype, torch.float32))
        length = torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_min(eps)
        return _lift(_powers(k.abs(), power), k, length, phase)


def _check(power: float, offset: float, phase: str | None) -> None:
    if not (power > 0 and offset > 0):
        raise ValueError(f"power and offset must be positive, got {power} and {offset}")
    if phase not in ("sign", "soft", None):
        raise ValueError(f"phase is 'sign', 'soft' or None, got {phase!r}")


def _powers(size: Tensor, exponent: Tensor | float, length: Tensor | None = None) -> Tensor:
    """``(size / length)^exponent``, without powers of tiny numbers, and with the gradient 0 at 0."""
    logs = size.clamp_min(torch.finfo(size.dtype).tiny).log()
    if length is not None:
        logs = logs - length.log()
    logs = exponent * logs
    return torch.where(logs > _LEAST_LOG, logs, -torch.inf).exp()


def _lift(size: Tensor, x: Tensor, length: Tensor, phase: Phase | None) -> Tensor:
    if phase is None:
        return size
    if phase == "sign":
        return torch.cat([size * (x > 0), size * (x < 0)], dim=-1)
    angle = math.pi / 4 * (1 - x / length)
    return torch.cat([size * angle.cos(), size * angle.sin()], dim=-1)


class NormAwareLinearAttention(FramedLinearAttention):
    """Linear attention on norm-aware features, which follows the protocol of `postern.attention.Attention`.

    ``W_o (norm(concat_h(O_h) + lepe(V)) * silu(X W_g))`` where ``O_h`` is `linear_attention` of the features of queries
    and keys. For images take ``rotary="2d"`` and ``has_lepe``, as the paper does; for texts ``is_causal`` and
    ``rotary="1d"``. Its cost grows with the time, its cache does not grow.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        power: see `norm_aware_query_features`.
        offset: see `norm_aware_query_features`.
        phase: see `norm_aware_query_features`.
        has_norm_exponent: see `norm_aware_query_features`.
        options: see `FramedLinearAttention`.

    Raises:
        ValueError: see `norm_aware_query_features` and `FramedLinearAttention`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        power: float = 3.0,
        offset: float = 0.5,
        phase: Phase | None = "sign",
        has_norm_exponent: bool = True,
        **options: Unpack[FrameOptions],
    ) -> None:
        _check(power, offset, phase)
        super().__init__(
            width,
            num_heads,
            query_features=partial(
                norm_aware_query_features,
                power=power,
                offset=offset,
                phase=phase,
                has_norm_exponent=has_norm_exponent,
            ),
            key_features=partial(norm_aware_key_features, power=power, phase=phase),
            **options,
        )
