import math

import pytest
import torch

from postern.boxes import gaussian_decay, hard_decay, linear_decay


def test_closed_forms():
    iou = torch.tensor([0.0, 0.3, 0.31, 0.6, 1.0], dtype=torch.float64)
    assert hard_decay(iou).tolist() == [1, 1, 0, 0, 0]
    assert linear_decay(iou).tolist() == pytest.approx([1, 1, 0.69, 0.4, 0])
    assert gaussian_decay(iou).tolist() == pytest.approx(
        [1, math.exp(-0.18), math.exp(-0.1922), math.exp(-0.72), math.exp(-2)]
    )


@pytest.mark.parametrize("decay", [hard_decay, linear_decay, gaussian_decay])
def test_what_the_paper_asks_for(decay):
    iou = torch.linspace(0, 1, 1001)
    factors = decay(iou)
    assert factors.dtype == iou.dtype
    assert factors[0] == 1
    assert (factors.diff() <= 0).all()
    assert factors[-1] < 0.2


def test_only_the_gaussian_is_continuous():
    iou = torch.linspace(0, 1, 1001)
    assert gaussian_decay(iou).diff().abs().max() < 0.002
    assert linear_decay(iou).diff().abs().max() > 0.29
