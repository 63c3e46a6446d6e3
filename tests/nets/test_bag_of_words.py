import pytest
import torch

from postern.nets import BagOfWords
from tests.modules import check_module


def test_module():
    check_module(lambda: BagOfWords(9, 6, 4), torch.tensor([[1, 2, 0], [3, 8, 1], [0, 0, 0]]))


def test_it_is_two_layers_on_the_mean_of_the_words():
    net = BagOfWords(9, 6, 4)
    found = net(torch.tensor([[1, 2, 0, 0], [3, 3, 1, 0], [0, 0, 0, 0]]))
    weight = net.embedding.weight
    mean = torch.stack([weight[[1, 2]].mean(0), weight[[3, 3, 1]].mean(0), torch.zeros(6)])
    torch.testing.assert_close(found, net.output((mean + net.bias).relu()))


def test_order_and_padding_do_not_matter():
    net = BagOfWords(9, 6, 4)
    torch.testing.assert_close(net(torch.tensor([[1, 2, 3]])), net(torch.tensor([[3, 0, 1, 2, 0]])))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="got num_tokens=0"):
        BagOfWords(0)
    for tokens in (torch.zeros(3), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"integers \[batch, words\], got"):
            BagOfWords(9)(tokens)
