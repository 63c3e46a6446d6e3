import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postern.softmax import ext_add, ext_exp, ext_logsumexp, ext_sum

ANY_SIZE = st.floats(-1.4e6, 1.4e6)


def value(m: torch.Tensor, n: torch.Tensor) -> Decimal:
    """The number that a pair stands for."""
    return Decimal(m.item()) * Decimal(2) ** int(n.item())


@given(ANY_SIZE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2.5e-7), (torch.float64, 5e-16)])
def test_a_pair_is_the_exponential(dtype: torch.dtype, tolerance: float, x: float) -> None:
    argument = torch.tensor(x, dtype=dtype)
    m, n = ext_exp(argument)
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 40, 10**8, -(10**8)
        truth = Decimal(argument.item()).exp()
        assert abs(value(m, n) / truth - 1) <= tolerance
    assert n.item() == int(n.item())
    assert 0.7 <= m.item() <= 1.42


def test_special_arguments() -> None:
    m, n = ext_exp(torch.tensor([-math.inf, math.inf, math.nan, 0.0]))
    assert m[:2].tolist() == [0, 1]
    assert n[:2].tolist() == [-math.inf, math.inf]
    assert m[2].isnan()
    assert (m[3].item(), n[3].item()) == (1, 0)
    m, n = ext_exp(torch.tensor([-2e38, 2e38]))
    assert ((m > 0.7) & (m < 1.43)).all()
    assert n.tolist() == pytest.approx([-2e38 / math.log(2), 2e38 / math.log(2)])


def test_adding_aligns_the_exponents() -> None:
    def pair(m: float, n: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(m), torch.tensor(n)

    m, n = ext_add(pair(1.25, 1000), pair(1.0, 998))
    assert (m.item(), n.item()) == (1.5, 1000)
    m, n = ext_add(pair(1.25, -3), pair(1.0, 4000))
    assert (m.item(), n.item()) == (1, 4000)
    m, n = ext_add(pair(0, -math.inf), pair(0, -math.inf))
    assert (m.item(), n.item()) == (0, -math.inf)


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=40))
def test_a_sum_is_the_sum(logits: list[float]) -> None:
    x = torch.tensor(logits, dtype=torch.float64)
    m, n = ext_sum(*ext_exp(x), 0)
    exact = math.fsum(math.exp(v) for v in x.tolist())
    assert m.item() * 2 ** n.item() == pytest.approx(exact, rel=1e-14)


def test_sums_over_any_dimension() -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64) * 300
    for dim in (0, 1, -1):
        kept = ext_logsumexp(x, dim, keepdim=True)
        torch.testing.assert_close(kept, torch.logsumexp(x, dim, keepdim=True), rtol=1e-14, atol=1e-12)
        torch.testing.assert_close(ext_logsumexp(x, dim), kept.squeeze(dim), rtol=0, atol=0)


def test_logsumexp_of_special_rows() -> None:
    infinity = math.inf
    x = torch.tensor([[-infinity, -infinity], [infinity, 0], [math.nan, 0], [-infinity, 3]])
    torch.testing.assert_close(ext_logsumexp(x, -1), torch.logsumexp(x, -1), equal_nan=True)


def test_logsumexp_of_large_float32_rows_keeps_its_digits() -> None:
    x = torch.full((1, 1000), 1e6)
    assert ext_logsumexp(x, -1).item() == np.float32(1e6 + math.log(1000))


def test_empty_sum_is_zero() -> None:
    m, n = ext_sum(torch.zeros(2, 0), torch.zeros(2, 0))
    assert m.tolist() == [0, 0]
    assert n.tolist() == [-math.inf, -math.inf]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.int64"):
        ext_exp(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        ext_sum(torch.zeros(2), torch.zeros(3))
