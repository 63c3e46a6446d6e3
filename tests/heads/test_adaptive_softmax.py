import pytest
import torch
from torch.nn import functional as F

from postern.heads import AdaptiveSoftmaxHead, Head
from tests.modules import check_module

COUNTS = torch.tensor([5, 1, 30, 2, 2, 9, 0, 11, 1])


def build() -> AdaptiveSoftmaxHead:
    return AdaptiveSoftmaxHead(6, COUNTS, (2, 5), div_value=2)


def test_module():
    hidden, target = torch.randn(2, 3, 6), torch.randint(9, (2, 3))
    check_module(build, hidden, compile=False)
    check_module(build, hidden, target, call=lambda head, *inputs: head.loss(*inputs), compile=False, meta=False)
    assert isinstance(build(), Head)


def test_frequent_classes_come_first_and_probabilities_sum_to_one():
    head, hidden = build(), torch.randn(2, 3, 6)
    assert head.ranks.tolist() == [3, 6, 0, 4, 5, 2, 8, 1, 7]
    log_probs = head(hidden)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))
    # the two most frequent classes are columns of the first layer, each in its place
    first = F.log_softmax(head.softmax.head(hidden), -1)
    torch.testing.assert_close(log_probs[..., [2, 7]], first[..., :2])


def test_loss_is_that_of_the_log_probabilities():
    head, hidden, target = build(), torch.randn(20, 6), torch.arange(20) % 9
    torch.testing.assert_close(head.loss(hidden, target), F.nll_loss(head(hidden), target))
    torch.testing.assert_close(
        head.loss(hidden.reshape(4, 5, 6), target.reshape(4, 5)), F.nll_loss(head(hidden), target)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveSoftmaxHead(6, torch.zeros(9), (2,)), "all zero"),
        (lambda: AdaptiveSoftmaxHead(6, COUNTS, (5, 2)), "cutoffs"),
        (lambda: build()(torch.zeros(2, 5)), r"\(2, 5\)"),
        (lambda: build().loss(torch.zeros(2, 6), torch.zeros(2)), "float32"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
