"""Slopes against their formulas."""

import pytest
import torch

from postern.attention import decay_slopes


def test_alibi_slopes_are_those_of_the_released_models():
    powers = 2.0 ** -torch.arange(1, 9)
    torch.testing.assert_close(decay_slopes(8), powers * (1 + 1e-5))
    torch.testing.assert_close(decay_slopes(8, 3, 10), powers * (1 - 3 / 9 + 1e-5))
    last = decay_slopes(8, 9, 10)
    torch.testing.assert_close(last, powers * 1e-5)
    assert last.dtype == torch.float32


def test_other_numbers_of_heads_interleave():
    torch.testing.assert_close(
        decay_slopes(6), torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]) * (1 + 1e-5)
    )
    assert decay_slopes(1).item() == pytest.approx(2**-8, rel=1e-4)
    for heads in range(1, 40):
        slopes = decay_slopes(heads)
        assert len(slopes.unique()) == heads
        assert slopes.min() > 2**-9


def test_the_papers_slopes_are_linear_and_the_last_layer_forgets_nothing():
    torch.testing.assert_close(decay_slopes(4, 0, 2, "paper"), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert (decay_slopes(4, 5, 6, "paper") == 0).all()
    slopes = torch.stack([decay_slopes(8, layer, 6, "paper") for layer in range(6)])
    assert (slopes[:, 0] == 0).all()
    assert (slopes.diff(dim=0)[:, 1:] < 0).all(), "upper layers forget more slowly"


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="got 0, 0 and 1"):
        decay_slopes(0)
    with pytest.raises(ValueError, match="a layer below num_layers, got 4, 3 and 3"):
        decay_slopes(4, 3, 3)
    with pytest.raises(ValueError, match="'alibi' or 'paper', got 'linear'"):
        decay_slopes(4, kind="linear")
