import pytest
import torch
from torch import nn

from postern.nets import ConvNet
from tests.modules import check_module


def test_module():
    # in evaluation mode: batch statistics leave rounding errors where true gradients vanish
    check_module(lambda: ConvNet(2, 3, widths=(4, 8)).eval(), torch.rand(5, 2, 8, 8))


def test_head_sees_the_mean_of_the_last_stage():
    torch.manual_seed(0)
    network = ConvNet(1, 3, widths=(4, 6, 5), strides=(1, 2, 2)).eval()
    images = torch.rand(2, 1, 12, 12)
    stages = images
    for name in network.layers:
        stages = network.get_submodule(name)(stages)
    assert stages.shape == (2, 5, 3, 3)
    torch.testing.assert_close(network.features(images), stages.mean(dim=(2, 3)))
    torch.testing.assert_close(network(images), network.head(stages.mean(dim=(2, 3))))


def test_default_strides_halve_twice():
    network = ConvNet().eval()
    sizes = []
    for stage in network.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    network(torch.rand(1, 1, 16, 16))
    assert sizes == [16, 8, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"widths": ()}, r"widths=\[\]"),
        ({"widths": (4, 0)}, r"\[4, 0\]"),
        ({"widths": (4, 4), "strides": (1,)}, "2 stages"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(**arguments)


def test_folding_leaves_the_outputs_and_no_normalisation() -> None:
    torch.manual_seed(0)
    network = ConvNet(3, 5, (8, 12, 16))
    for _ in range(3):
        network(torch.randn(16, 3, 12, 12) * 2 + 1)
    images = torch.randn(4, 3, 12, 12)
    expected = network.eval()(images)
    folded = network.fold()
    assert folded is network
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.fold()(images), network(images))
