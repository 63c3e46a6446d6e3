import pytest
import torch

from postern.nets import ResidualMLP
from tests.modules import check_module


def test_module():
    check_module(lambda: ResidualMLP(6, 3, width=8, depth=2), torch.rand(5, 2, 3))


def test_blocks_add_to_what_they_get():
    torch.manual_seed(0)
    network = ResidualMLP(4, 3, width=8, depth=3)
    inputs = torch.rand(5, 4)
    for block in network.blocks:
        torch.nn.init.zeros_(block.residual[-1].weight)
        torch.nn.init.zeros_(block.residual[-1].bias)
    torch.testing.assert_close(network(inputs), network.head(network.norm(network.stem(inputs))))
    assert [network.get_submodule(name) for name in network.layers] == list(network.blocks)


def test_bad_sizes():
    with pytest.raises(ValueError, match="'depth': 0"):
        ResidualMLP(4, 3, depth=0)
