import math

import pytest
import torch
from torch import nn

from postern.spiking import (
    STRIDED,
    EmbedMax,
    MaxFormer,
    MaxResNet,
    MembraneBlock,
    max_former_cifar,
    max_former_events,
    max_former_imagenet,
    ms_qkformer_cifar,
)
from tests.modules import check_module


def millions(build):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters()) / 1e6


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (max_former_cifar, 6.57),
        (lambda: max_former_cifar(100), 6.60),
        (max_former_imagenet, 63.99),
        (MaxResNet, 12.5),
        (lambda: MaxResNet(has_max_blocks=False), 12.5),
    ],
)
def test_published_sizes(build, published):
    assert millions(build) == pytest.approx(published, abs=0.006)


def images(side=8, channels=2):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0))


MIXERS = ("identity", "dwc3", "dwc5", "dwc7", "ssa", "qk", "avg", "max")


@pytest.mark.parametrize("mixer", MIXERS)
def test_max_former(mixer):
    def build():
        return MaxFormer(2, 3, (8, 16), STRIDED[:2], (mixer, mixer), (1, 1), num_heads=4, num_steps=2).eval()

    check_module(build, images(), tolerance=math.inf, compile=mixer == "identity")  # see test_blocks for the others


@pytest.mark.parametrize("has_max_blocks", [True, False])
def test_max_resnet(has_max_blocks):
    check_module(
        lambda: MaxResNet((1, 2), (4, 8), 2, in_channels=2, has_max_blocks=has_max_blocks).eval(),
        images(),
        tolerance=math.inf,
        compile=has_max_blocks,
    )


NETWORKS = {
    "max-former": lambda: max_former_cifar(dim=64, num_steps=3),
    "ms-qkformer": lambda: ms_qkformer_cifar(dim=64, num_steps=3),
    "max-resnet": lambda: MaxResNet((1, 1), (8, 16), 3),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("is_training", [True, False])
def test_an_image_is_that_image_at_every_step(name, is_training):
    """The first convolution runs once, which changes neither its output nor its statistics."""
    network = NETWORKS[name]().train(is_training)
    x = images(16, 3)
    logits = network(x)
    torch.testing.assert_close(network(x.expand(3, *x.shape)), logits, atol=1e-4, rtol=1e-3)


def test_an_embedding_without_a_convolution_of_the_image_spikes_at_it():
    network = MaxFormer(2, 3, (8,), (EmbedMax,), ("identity",), (1,), num_steps=3).eval()
    x = 2 * images()
    torch.testing.assert_close(network(x), network(x.expand(3, *x.shape)))


def test_images_do_not_see_each_other_and_nothing_is_kept():
    network = NETWORKS["max-former"]().eval()
    x = images(16, 3)
    both = network(x)
    torch.testing.assert_close(network(x[:1]), both[:1])
    torch.testing.assert_close(network(x), both)


def test_resolutions_of_the_published_networks():
    with torch.device("meta"):
        small = max_former_cifar().features(torch.rand(1, 3, 32, 32))
        large = max_former_imagenet(num_steps=1).features(torch.rand(1, 3, 224, 224))
        events = max_former_events().features(torch.rand(16, 1, 2, 128, 128))
    assert [tuple(x.shape) for x in small] == [(4, 1, 96, 32, 32), (4, 1, 192, 16, 16), (4, 1, 384, 8, 8)]
    assert [tuple(x.shape) for x in large] == [(1, 1, 192, 56, 56), (1, 1, 384, 28, 28), (1, 1, 768, 14, 14)]
    assert [tuple(x.shape) for x in events] == [(16, 1, 128, 16, 16), (16, 1, 256, 8, 8)]


def test_max_resnet_has_two_maxima_more_and_otherwise_the_same_weights():
    with torch.device("meta"):
        networks = [MaxResNet(has_max_blocks=has) for has in (True, False)]
    maxima = [sum(isinstance(module, nn.MaxPool2d) for module in network.modules()) for network in networks]
    assert maxima == [2, 0]
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in networks]
    assert shapes[0] == shapes[1]


def test_a_block_of_zeros_is_its_shortcut():
    block = MembraneBlock(4, 8, 2, has_max_pool=True).eval()
    nn.init.zeros_(block.residual[-1].norm.weight)
    x = torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut(x))


def test_initial_weights():
    network = max_former_imagenet(10, 128, num_steps=1)
    weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert max_former_cifar(dim=64).embeds[0].stem.conv.weight.std() > 0.05


def test_a_small_network_learns_to_tell_stripes():
    """Horizontal from vertical: gradients reach all weights through the spikes."""
    torch.manual_seed(0)
    network = MaxFormer(1, 2, (8, 16), STRIDED[:2], ("max", "dwc3"), (1, 1), num_steps=2)
    stripes = (torch.arange(8) % 2).float().expand(1, 8, 8)
    x = torch.stack([stripes, stripes.mT] * 16) + 0.3 * torch.randn(32, 1, 8, 8)
    target = torch.tensor([0, 1] * 16)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
    assert (network(x).argmax(1) == target).float().mean() > 0.95


def test_bad_input():
    with pytest.raises(ValueError, match="1, 2, 1 and 1"):
        MaxFormer(1, 2, (8,), STRIDED[:2], ("max",), (1,))
    with pytest.raises(ValueError, match="num_steps=0"):
        MaxFormer(1, 2, (8,), STRIDED[:1], ("max",), (1,), num_steps=0)
    with pytest.raises(ValueError, match="got 'min'"):
        MaxFormer(1, 2, (8,), STRIDED[:1], ("min",), (1,))
    with pytest.raises(ValueError, match=r"\[1\] and \[4, 8\]"):
        MaxResNet((1,), (4, 8))
    with pytest.raises(ValueError, match="stem_width=0"):
        MaxResNet((1,), (4,), stem_width=0)
    with pytest.raises(ValueError, match="stride=1"):
        MembraneBlock(4, 4, has_max_pool=True)
    for network in (MaxResNet((1,), (4,)), max_former_cifar(dim=64)):
        with pytest.raises(ValueError, match=r"got \[3, 8, 8\]"):
            network(torch.rand(3, 8, 8))
