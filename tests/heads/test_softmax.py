import pytest
import torch

from postern.heads import Head, SoftmaxHead
from tests.modules import check_module


def build() -> SoftmaxHead:
    return SoftmaxHead(6, 4)


def test_module():
    hidden, target = torch.randn(2, 3, 6), torch.randint(4, (2, 3))
    check_module(build, hidden)
    check_module(build, hidden, target, call=lambda head, *inputs: head.loss(*inputs))
    assert isinstance(build(), Head)


def test_loss_is_the_closed_form_for_any_batch_shape():
    head = build().double()
    hidden, target = torch.randn(2, 3, 6, dtype=torch.float64), torch.randint(4, (2, 3), dtype=torch.int32)
    logits = hidden @ head.linear.weight.T + head.linear.bias
    expected = logits.exp().sum(-1).log() - logits.gather(-1, target.long()[..., None])[..., 0]
    torch.testing.assert_close(head.loss(hidden, target), expected.mean())
    torch.testing.assert_close(head.loss(hidden[0, 0], target[0, 0]), expected[0, 0])


@pytest.mark.parametrize(
    ("hidden", "target", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), "6 features.*5"),
        (torch.zeros(3, 6), torch.zeros(2, dtype=torch.long), r"shape \(3,\).*\(2,\)"),
        (torch.zeros(3, 6), torch.zeros(3), "float32"),
        (torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, dtype=torch.long), "floating point"),
        (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), "at least one"),
    ],
)
def test_bad_input(hidden, target, message):
    with pytest.raises(ValueError, match=message):
        build().loss(hidden, target)


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_classes >= 2"):
        SoftmaxHead(4, 1)
