import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from postern.softmax import collapse_gap, softmax_collapse_fraction, zero_loss_fraction


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24), (torch.float64, 53)]
)
@pytest.mark.parametrize("num_classes", [2, 10, 113])
def test_first_collapse_lies_where_theory_says(dtype, bits, num_classes):
    low, high = collapse_gap(dtype, num_classes)
    assert low == pytest.approx(bits * math.log(2))
    assert high == pytest.approx(low + math.log(num_classes - 1))
    step = low * torch.finfo(dtype).eps  # the gap itself is rounded to the precision of the logits
    direction = one_hot(torch.tensor([1]), num_classes).to(dtype)
    assert softmax_collapse_fraction((low - max(0.01, step)) * direction) == 0
    assert softmax_collapse_fraction((high + max(0.01, 2 * step * high)) * direction) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapsed_rows_have_no_loss_and_no_gradient_of_the_true_class(dtype):
    _, high = collapse_gap(dtype, 10)
    logits = ((high + 0.1) * one_hot(torch.tensor([3, 4]), 10)).to(dtype).requires_grad_()
    target = torch.tensor([3, 5])
    losses = cross_entropy(logits, target, reduction="none")
    losses.sum().backward()
    assert softmax_collapse_fraction(logits) == 1
    assert softmax_collapse_fraction(logits, target) == 0.5
    assert zero_loss_fraction(losses) == 0.5
    assert logits.grad[0, 3] == 0
    assert logits.grad[1, 5] == -1


def test_fraction_counts_rows_and_does_not_change_with_shifts():
    generator = torch.Generator().manual_seed(0)
    gaps = torch.rand(4, 50, generator=generator) * 40
    logits = torch.zeros(4, 50, 2)
    logits[..., 0] = gaps
    expected = (gaps > 24 * math.log(2)).double().mean().item()
    assert softmax_collapse_fraction(logits) == pytest.approx(expected)
    assert softmax_collapse_fraction(logits.double() + 1000, dtype=torch.float32) == pytest.approx(expected, abs=0.01)
    assert softmax_collapse_fraction(logits, dtype=torch.float64) == (gaps > 53 * math.log(2)).double().mean().item()


def test_precision_is_that_of_the_loss():
    logits = torch.tensor([[0.0, 10.0]], dtype=torch.float64)
    assert softmax_collapse_fraction(logits, dtype=torch.float16) == 1
    assert softmax_collapse_fraction(logits, dtype=torch.float32) == 0


def test_bad_input():
    with pytest.raises(ValueError, match="int64"):
        softmax_collapse_fraction(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        softmax_collapse_fraction(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"targets of shape \(2,\), got \(3,\)"):
        softmax_collapse_fraction(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one"):
        zero_loss_fraction(torch.zeros(0))
    with pytest.raises(ValueError, match="at least 2"):
        collapse_gap(torch.float32, 1)
    with pytest.raises(ValueError, match="int8"):
        collapse_gap(torch.int8, 3)
