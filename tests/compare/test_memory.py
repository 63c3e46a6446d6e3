"""Counting the bytes of tensors, against sums by hand."""

import torch

from postern.compare.memory import TensorMemory


def test_counts_what_lives_at_once() -> None:
    with TensorMemory() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 4000
        del a
        c = b * 2  # 4000, in the place of a
        assert memory.live == 8000
        del b, c
        d = torch.zeros(500, dtype=torch.float64)
    assert memory.peak == 8000
    assert d.numel() == 500
    assert memory.live == 4000


def test_views_and_changes_in_place_are_free() -> None:
    with TensorMemory() as memory:
        a = torch.zeros(10, 10)
        a.t().add_(1)
        b = a[2:].view(-1)
        b.mul_(2)
    assert memory.peak == 400


def test_counts_what_autograd_keeps() -> None:
    x = torch.ones(1000, requires_grad=True)  # made before
    with TensorMemory() as memory:
        y = x.exp()  # kept for the backward pass
        z = y.sum()
        kept = memory.live
        torch.autograd.backward([z])
    assert kept == 4004
    # Backward: the gradient of the sum is a view of one number, the product with y is the gradient of x.
    assert 8000 <= memory.peak <= 8100
