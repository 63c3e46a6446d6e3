"""The exponential as a finite sum of products, so that softmax attention becomes linear attention with a large state.

``exp(q . k) = sum_p (q . k)^p / p!``, and ``(q . k)^p`` is a product of features: all monomials of degree p. Exact
softmax needs all degrees, that is an infinite state; cut off at a degree it needs a finite one, and the error is known.

Paper: "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", arXiv 2405.15731. The bounds are Taylor's remainder and what follows from it; they are ours.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import combinations_with_replacement, product

import torch
from jaxtyping import Float
from torch import Tensor

_MOST_FEATURES = 10_000_000


def taylor_softmax_features(
    x: Float[Tensor, "*batch dim"], order: int, *, is_symmetric: bool = True
) -> Float[Tensor, "*batch features"]:
    """``phi(x)`` with ``phi(q) . phi(k) = sum_{p <= order} (q . k)^p / p!``.

    Attention scales its logits by ``1 / sqrt(dim)``; give both sides ``dim^(-1/4)`` of that. The truncated sum is
    positive everywhere for even orders, and below 0 far to the left for odd ones.

    Args:
        x: queries or keys.
        order: highest degree, at least 0.
        is_symmetric: keep one feature a monomial, weighted by how often it occurs, instead of all tensor powers.

    Raises:
        ValueError: an order below 0, or more than ten million features.
    """
    count = taylor_feature_count(x.shape[-1], order, is_symmetric=is_symmetric)
    if count > _MOST_FEATURES:
        raise ValueError(f"order {order} of {x.shape[-1]} dimensions has {count} features, more than {_MOST_FEATURES}")
    features = [torch.ones_like(x[..., :1])]
    for degree in range(1, order + 1):
        factors, weights = _monomials(x.shape[-1], degree, is_symmetric)
        chosen = x[..., torch.tensor(factors, device=x.device)]
        features.append(chosen.prod(-1) * torch.tensor(weights, dtype=x.dtype, device=x.device))
    return torch.cat(features, dim=-1)


def taylor_feature_count(dim: int, order: int, *, is_symmetric: bool = True) -> int:
    """The number of features: ``C(dim + order, order)``, or ``sum_p dim^p`` where they are not symmetric.

    Raises:
        ValueError: a dimension below 1, or an order below 0.
    """
    if dim < 1 or order < 0:
        raise ValueError(f"features need a dimension of at least 1 and an order of at least 0, got {dim} and {order}")
    return math.comb(dim + order, order) if is_symmetric else sum(dim**degree for degree in range(order + 1))


@cache
def _monomials(dim: int, degree: int, is_symmetric: bool) -> tuple[list[tuple[int, ...]], list[float]]:
    """The factors of each monomial, and its weight ``1 / sqrt(prod_i m_i!)`` for the exponents m."""
    if not is_symmetric:
        ordered = list(product(range(dim), repeat=degree))
        return ordered, [math.factorial(degree) ** -0.5] * len(ordered)
    factors = list(combinations_with_replacement(range(dim), degree))
    return factors, [
        math.prod(math.factorial(exponent) for exponent in Counter(chosen).values()) ** -0.5 for chosen in factors
    ]


def taylor_exp(logits: Float[Tensor, "*shape"], order: int) -> Float[Tensor, "*shape"]:
    """``sum_{p <= order} z^p / p!``, elementwise.

    Raises:
        ValueError: an order below 0.
    """
    taylor_feature_count(1, order)
    total = torch.ones_like(logits)
    for degree in range(order, 0, -1):  # Horner's scheme
        total = 1 + logits * total / degree
    return total


def taylor_exp_error_bound(logits: Float[Tensor, "*shape"], order: int) -> Float[Tensor, "*shape"]:
    """``e^|z| |z|^(order+1) / (order+1)!``, at least the error of `taylor_exp`.

    Raises:
        ValueError: an order below 0.
    """
    taylor_feature_count(1, order)
    size = logits.abs()
    return torch.exp(size + (order + 1) * size.log() - math.lgamma(order + 2))


def taylor_softmax_error_bound(logits: Float[Tensor, "*batch keys"], order: int) -> Float[Tensor, "*batch"]:
    """A bound of ``sum_j |p_j - q_j|``, with p the softmax of a row and q its weights by `taylor_exp`, normalised.

    With ``d = sum_j bound_j / sum_j exp(z_j)`` it is ``2 d / (1 - d)``, and infinite from ``d = 1`` on. Masked logits
    are minus infinity; they do not count. An attention's output is off by at most this times the largest value.

    Raises:
        ValueError: an order below 0.
    """
    shown = logits > -math.inf
    bounds = torch.where(shown, taylor_exp_error_bound(torch.where(shown, logits, 0.0), order), 0.0)
    share = bounds.sum(-1) / logits.exp().sum(-1)
    return torch.where(share < 1, 2 * share / (1 - share), math.inf)


def required_taylor_order(magnitude: float, tolerance: float) -> int:
    """The least even order whose truncated exponential is off by at most a share of the exponential, for all |z| <= m.

    The bound is ``e^{2 m} m^(order+1) / (order+1)! <= tolerance``, relative to the smallest exponential, ``e^-m``.

    Args:
        magnitude: ``m``, at least 0.
        tolerance: the share, positive.

    Raises:
        ValueError: a negative magnitude or a tolerance that is not positive.
    """
    if not magnitude >= 0 or not tolerance > 0:
        raise ValueError(f"magnitude is at least 0 and tolerance positive, got {magnitude} and {tolerance}")
    order = 0
    while magnitude > 0 and (
        2 * magnitude + (order + 1) * math.log(magnitude) - math.lgamma(order + 2) > math.log(tolerance)
    ):
        order += 2
    return order
