"""Numbers that cannot overflow: an unevaluated pair (m, n) that stands for m * 2^n, n being a whole number in a float.

Exponentials are kept as such pairs and summed by aligning their exponents, so a softmax needs no maximum beforehand.

Paper: "The Two-Pass Softmax Algorithm" (arXiv 2001.04438), section "Extended exponent range", and its code.
These are the definitions in tensor operations; `postern.softmax.two_pass_softmax` has them fused in compiled loops.
The reduction of the argument is done in float64 for float32 inputs, because torch has no fused multiply-add; float64
inputs, which the paper does not treat, get a polynomial of degree 11 in place of the paper's of degree 5.
Minus infinity is (0, -inf), plus infinity (1, inf).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# exp(t) = 1 + c1 t + c2 t^2 + ..., relative error at most 9.2e-8 and 1.8e-17 for |t| <= ln(2) / 2.
_POLYNOMIALS = {
    torch.float32: ("0x1.FFFFF6p-1", "0x1.FFFDC6p-2", "0x1.555A80p-3", "0x1.573A1Ap-5", "0x1.0F9F9Cp-7"),
    torch.float64: (
        *("0x1.0000000000003p+0", "0x1.0000000000005p-1", "0x1.5555555554825p-3", "0x1.55555555520edp-5"),
        *("0x1.111111137a350p-7", "0x1.6c16c17f35aafp-10", "0x1.a019f624dccc3p-13", "0x1.a019a68ff59cfp-16"),
        *("0x1.71f610b693ddap-19", "0x1.28a29f2174a1ap-22", "0x1.8ad03a702a2bdp-26"),
    ),
}
# ln(2) in two parts; the first has 32 bits, so that its product with a whole number below 2^21 is exact in float64.
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")

# Pairs are exact while |n| is at most this, that is for |x| <= 1.45e6.
EXACT_EXPONENT = 2**21 - 2048

Pair = tuple[Tensor, Tensor]


def ext_exp(x: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return (m, n) with ``exp(x) = m * 2^n``, ``n = round(x log2(e))`` and m between 1/sqrt(2) and sqrt(2).

    Never overflows. Not differentiable: n is constant between jumps.

    Args:
        x: exponents, float32 or float64; exact for ``|x| <= 1.45e6``.

    Returns:
        m and n, each in the shape and dtype of x. (0, -inf) for minus infinity, (1, inf) for infinity, NaN for NaN.

    Raises:
        ValueError: x is neither float32 nor float64.

    Source: arXiv 2001.04438, ExtExp; constants of its code.
    """
    if x.dtype not in _POLYNOMIALS:
        raise ValueError(f"ext_exp needs float32 or float64, got {x.dtype}")
    x = x.detach()
    wide = x.double()
    n = torch.round(wide * math.log2(math.e))
    # Between neighbouring numbers beyond 1e15 lie many multiples of log(2): there m says nothing, but stays in range.
    t = ((wide - n * _LN2_HIGH) - n * _LN2_LOW).clamp(-0.35, 0.35).to(x.dtype)
    *others, last = (float.fromhex(coefficient) for coefficient in _POLYNOMIALS[x.dtype])
    m = torch.full_like(t, last)
    for coefficient in reversed(others):
        m = m * t + coefficient
    m = m * t + 1
    m = torch.where(x == -torch.inf, 0.0, torch.where(x == torch.inf, 1.0, m))
    return m, n.to(x.dtype)


def ext_add(a: Pair, b: Pair) -> Pair:
    """Return the sum of two numbers given as pairs: ``n = max(n1, n2)``, ``m = m1 2^(n1-n) + m2 2^(n2-n)``.

    The exponents' differences are at most 0, so nothing overflows.

    Args:
        a: mantissa and exponent of the first, in shapes that broadcast.
        b: of the second.

    Returns:
        Mantissa and exponent of the sum.
    """
    (m1, n1), (m2, n2) = a, b
    n = torch.maximum(n1, n2)
    return _align(m1, n1, n) + _align(m2, n2, n), n


def ext_sum(m: Float[Tensor, "*shape"], n: Float[Tensor, "*shape"], dim: int = -1, keepdim: bool = False) -> Pair:
    """Return the sum over a dimension of numbers given as pairs.

    Args:
        m: mantissas.
        n: exponents, in the shape of m.
        dim: the dimension to sum over.
        keepdim: whether it stays, with size 1.

    Returns:
        Mantissa and exponent of the sum; (0, -inf) over an empty dimension.

    Raises:
        ValueError: m and n differ in shape.
    """
    if m.shape != n.shape:
        raise ValueError(f"mantissas and exponents have one shape, got {tuple(m.shape)} and {tuple(n.shape)}")
    if m.shape[dim] == 0:
        total = m.sum(dim, keepdim)
        return total, torch.full_like(total, -torch.inf)
    greatest = n.amax(dim, keepdim=True)
    total = _align(m, n, greatest).sum(dim, keepdim)
    return total, greatest if keepdim else greatest.squeeze(dim)


def ext_logsumexp(x: Float[Tensor, "*shape"], dim: int = -1, keepdim: bool = False) -> Float[Tensor, "*reduced"]:
    """Return ``log(sum(exp(x)))`` over a dimension as ``log(M) + E log(2)``, from the pair (M, E) of the sum.

    Args:
        x: float32 or float64, ``|x| <= 1.45e6``.
        dim: the dimension to sum over.
        keepdim: whether it stays, with size 1.

    Returns:
        The logarithms, in the dtype of x.

    Raises:
        ValueError: x is neither float32 nor float64.
    """
    m, n = ext_sum(*ext_exp(x), dim, keepdim)
    # In float64, because E log(2) may be thousands while the digits that matter are those of the sum's end.
    wide, exponent = m.double(), n.double()
    finite = torch.isfinite(exponent)
    logarithm = (torch.log(wide) + exponent * _LN2_LOW) + exponent * _LN2_HIGH
    return torch.where(finite | exponent.isnan(), logarithm, exponent).to(x.dtype)


def minus_logarithm(x: Tensor, mantissa: Tensor, exponent: Tensor) -> Tensor:
    """``x - log(mantissa * 2^exponent)``, the pair being float64, in the dtype of x and to all of its digits."""
    return ((x.double() - exponent * _LN2_HIGH) - (torch.log(mantissa) + exponent * _LN2_LOW)).to(x.dtype)


def _align(m: Tensor, n: Tensor, greatest: Tensor) -> Tensor:
    """``m * 2^(n - greatest)``; equal exponents need no scaling, and infinite ones have no difference."""
    # Far below the greatest nothing is left, and exp2 of it would be slow in denormals.
    power = torch.exp2((n - greatest).clamp_min(-1100))
    return torch.where(n == greatest, m, m * power)
