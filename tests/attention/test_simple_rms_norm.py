"""The norm without parameters against its formula."""

import pytest
import torch
from torch import nn

from postern.attention import SimpleRMSNorm, simple_rms_norm
from tests.modules import check_module


def test_equals_its_formula():
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(simple_rms_norm(x, 0.1), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt())
    torch.testing.assert_close(SimpleRMSNorm()(x), nn.RMSNorm(7, 1e-6, dtype=torch.float64)(x))
    assert torch.autograd.gradcheck(simple_rms_norm, x.requires_grad_())


def test_zeros_stay_zeros_with_finite_gradients():
    x = torch.zeros(2, 5, requires_grad=True)
    output = simple_rms_norm(x)
    output.sum().backward()
    assert (output == 0).all()
    assert torch.isfinite(x.grad).all()


def test_16_bits_are_normalised_in_32():
    x = 300 * torch.ones(1, 64, dtype=torch.float16)  # the sum of squares is beyond the dtype
    assert (simple_rms_norm(x) == 1).all()
    assert simple_rms_norm(x).dtype == torch.float16


def test_survives_what_modules_must():
    check_module(SimpleRMSNorm, torch.randn(2, 3, 6))
    assert list(SimpleRMSNorm().parameters()) == []


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        SimpleRMSNorm(-1.0)
