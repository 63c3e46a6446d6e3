import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.heads import Head, LowRankHead
from tests.modules import check_module


def test_module():
    hidden, target = torch.randn(2, 3, 6), torch.randint(9, (2, 3))
    check_module(lambda: LowRankHead(6, 9, 2), hidden)
    check_module(lambda: LowRankHead(6, 9, 2), hidden, target, call=lambda head, *inputs: head.loss(*inputs))
    assert isinstance(LowRankHead(6, 9, 2), Head)


@pytest.mark.parametrize("bias", [False, True])
def test_compression_is_the_truncated_svd(bias):
    linear = nn.Linear(6, 9, bias=bias).double()
    hidden = torch.randn(5, 6, dtype=torch.float64)
    left, values, right = torch.linalg.svd(linear.weight.detach())
    for rank in (1, 4, 6):
        head = LowRankHead.from_linear(linear, rank)
        matrix = left[:, :rank] @ values[:rank].diag() @ right[:rank]
        torch.testing.assert_close(head(hidden), F.linear(hidden, matrix, linear.bias))
    torch.testing.assert_close(LowRankHead.from_linear(linear, 6)(hidden), linear(hidden))


def test_loss_is_cross_entropy_of_the_logits():
    head, hidden, target = LowRankHead(6, 9, 2), torch.randn(4, 6), torch.randint(9, (4,))
    torch.testing.assert_close(head.loss(hidden, target), F.cross_entropy(head(hidden), target))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRankHead(6, 9, 7), "9 and 7"),
        (lambda: LowRankHead(6, 9, 0), "9 and 0"),
        (lambda: LowRankHead(6, 9, 2)(torch.zeros(2, 9)), r"\(2, 9\)"),
        (lambda: LowRankHead(6, 9, 2).loss(torch.zeros(2, 6), torch.zeros(2)), "float32"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
