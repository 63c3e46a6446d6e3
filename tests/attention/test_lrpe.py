"""Products of turned queries and keys against the cosine of their distance."""

import pytest
import torch

from postern.attention import LRPE
from tests.modules import check_module


def test_products_depend_on_the_distance_alone():
    lrpe = LRPE(3, 5).double()
    query, key = torch.randn(2, 3, 7, 5, dtype=torch.float64), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    steps = torch.arange(7)
    turns = torch.cos((steps[:, None] - steps)[..., None] * lrpe.angle[:, None, None])
    expected = (query[..., :, None, :] * key[..., None, :, :] * turns).sum(-1)
    torch.testing.assert_close(lrpe(query) @ lrpe(key).mT, expected)
    torch.testing.assert_close(lrpe(query, 1000) @ lrpe(key, 1000).mT, expected)
    torch.testing.assert_close(lrpe(query)[:, :, 3:], lrpe(query[:, :, 3:], 3))


def test_angles_start_as_in_the_released_models():
    lrpe = LRPE(2, 3)
    torch.testing.assert_close(lrpe.angle, 10_000 ** (-2 * torch.arange(6.0).view(2, 3) / 6))
    assert lrpe.angle.requires_grad
    fixed = LRPE(2, 3, base=100.0, is_learnable=False)
    assert not fixed.angle.requires_grad
    with torch.no_grad():
        fixed.angle.zero_()
    fixed.reset_parameters()
    torch.testing.assert_close(fixed.angle, 100 ** (-2 * torch.arange(6.0).view(2, 3) / 6))


def test_in_16_bits_distant_positions_stay_apart():
    lrpe = LRPE(1, 4).bfloat16()
    x = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    turned = lrpe(x, 10_000)
    assert turned.dtype == torch.bfloat16
    exact = (10_000 + torch.arange(2.0))[:, None] * lrpe.angle.float()
    torch.testing.assert_close(turned[0, 0].float(), torch.cat([exact.cos(), exact.sin()], -1), rtol=0, atol=5e-3)


def test_survives_what_modules_must():
    check_module(lambda: LRPE(2, 4), torch.randn(2, 2, 5, 4))


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="positive, got 0, 4 and 10000"):
        LRPE(0, 4)
    with pytest.raises(ValueError, match=r"\[batch, 2, time, 4\], got \[1, 3, 5, 4\]"):
        LRPE(2, 4)(torch.zeros(1, 3, 5, 4))
