import pytest
import torch

from postern.nets import ResNet, resnet18, resnet34
from tests.modules import check_module


def test_module():
    check_module(lambda: ResNet((1, 1), 2, 3, width=4).eval(), torch.rand(3, 2, 8, 8))


@pytest.mark.parametrize(
    ("network", "convolutions", "parameters"), [(resnet18, 20, 11_173_962), (resnet34, 36, 21_282_122)]
)
def test_published_sizes(network, convolutions, parameters):
    """17 and 33 convolutions and three shortcuts; the counts of the variant that papers on CIFAR use."""
    with torch.device("meta"):
        built = network()
    assert sum(isinstance(module, torch.nn.Conv2d) for module in built.modules()) == convolutions
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters


def test_stages_halve_the_resolution_and_double_the_channels():
    network = ResNet((1, 2, 1), 3, 5, width=4).eval()
    images = torch.rand(2, 3, 16, 16)
    shapes = []
    for name in network.layers:
        images = network.get_submodule(name)(images)
        shapes.append(tuple(images.shape[1:]))
    assert shapes == [(4, 16, 16), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


def test_a_block_without_residual_is_its_shortcut():
    network = ResNet((1,), 1, 2, width=3).eval()
    block = network.stages[0][0]
    torch.nn.init.zeros_(block.residual[-1].weight)
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(block(images), images)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"blocks=\[0\]"):
        ResNet((0,))
    with pytest.raises(ValueError, match="num_classes=0"):
        ResNet((1,), num_classes=0)
