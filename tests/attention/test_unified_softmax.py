"""The softmax with one constant: exact where the constant fits, and exactly recomputed where it does not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postern.attention import UnifiedMax, unified_softmax


@given(
    rows=st.integers(1, 4),
    keys=st.integers(1, 50),
    spread=st.floats(0, 10),
    centre=st.floats(-300, 300),
    phi=st.floats(-300, 300),
)
def test_is_softmax_whatever_phi_is(rows, keys, spread, centre, phi):
    x = centre + spread * torch.randn(rows, keys, generator=torch.Generator().manual_seed(keys))
    found, recomputed = unified_softmax(x, phi)
    torch.testing.assert_close(found, torch.softmax(x.double(), -1).float(), rtol=5e-6, atol=1e-30)
    total = (x.double() - phi).logsumexp(-1)
    assert torch.equal(recomputed, total.abs() > 32) or (total.abs() - 32).abs().min() < 1e-3


def test_recomputes_each_row_by_itself():
    x = torch.tensor([[0.0, 1.0], [200.0, 0.0], [-200.0, -200.0], [-100.0, 1.0]])
    found, recomputed = unified_softmax(x, 0.0)
    assert recomputed.tolist() == [False, True, True, False]
    torch.testing.assert_close(found, torch.softmax(x, -1))
    assert found.isfinite().all()


def test_the_papers_check_looks_at_every_entry():
    # the paper's example: a = -3, b = 3, phi = 6
    x = torch.tensor([[3.5, 8.5], [3.0, 8.5], [3.5, 9.0], [3.5, -math.inf]])
    _, recomputed = unified_softmax(x, 6.0, a=-3.0, b=3.0, check="paper")
    assert recomputed.tolist() == [False, True, True, False]
    assert not unified_softmax(x, 6.0, a=-3.0, b=3.0)[1].any()
    assert not unified_softmax(x, 6.0, check="paper")[1].any()


def test_masked_entries_get_nothing_and_trigger_nothing():
    x = torch.randn(3, 6)
    x[:, 4:] = -math.inf
    for check in ("safe", "paper"):
        found, recomputed = unified_softmax(x, 0.0, a=-10.0, b=10.0, check=check)
        assert not recomputed.any()
        assert (found[:, 4:] == 0).all()
        torch.testing.assert_close(found, torch.softmax(x, -1))


def test_any_dimension_and_sixteen_bits():
    x = (20 * torch.randn(5, 4)).half()  # e^20 overflows float16
    found, recomputed = unified_softmax(x, 0.0, dim=0)
    assert recomputed.shape == (4,)
    torch.testing.assert_close(found, torch.softmax(x, 0), rtol=2e-3, atol=1e-6)
    assert found.dtype == torch.float16


def test_nan_stays_in_its_row():
    x = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    found, recomputed = unified_softmax(x, 0.0)
    assert recomputed.tolist() == [True, False]
    assert found[0].isnan().all()
    assert found[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("phi", [0.3, 90.0])
def test_gradients_also_through_recomputed_rows(phi):
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1] += 900
    x.requires_grad_()
    assert unified_softmax(x, phi)[1][1]
    assert torch.autograd.gradcheck(lambda x: unified_softmax(x, phi)[0], x)
    weights = torch.randn(3, 4, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((weights * y).sum(), x)[0] for y in (unified_softmax(x, phi)[0], torch.softmax(x, -1))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unified_softmax(torch.zeros(2), math.nan), "phi is a finite number, got nan"),
        (lambda: unified_softmax(torch.zeros(2), 0.0, a=1.0, b=1.0), "a lies below b, got 1.0 and 1.0"),
        (lambda: unified_softmax(torch.zeros(2), 0.0, check="none"), "safe, paper; got 'none'"),
        (lambda: UnifiedMax(math.inf), "phi is a finite number, got inf"),
    ],
)
def test_rejects_impossible_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()
