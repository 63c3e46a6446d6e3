import pytest
import torch
from torch import nn

from postern.spiking import (
    LIF,
    ConvNorm,
    SpikingSelfAttention,
    count_sops,
    dense_energy_mj,
    energy_mj,
    max_former_cifar,
)


class OneSpikeALayer(nn.Module):
    """A convolution of real numbers, then one of given spikes."""

    def __init__(self):
        super().__init__()
        self.first = ConvNorm(2, 3, 3)
        self.second = nn.Conv2d(4, 5, 1)
        self.spikes = (torch.arange(4 * 6 * 6) % 3 == 0).float().view(1, 4, 6, 6)

    def forward(self, images):
        return self.first(images[None]).sum() + self.second(self.spikes.expand(2 * len(images), -1, -1, -1)).sum()


def test_operations_by_hand():
    """Two images; the second layer sees each at two time steps, a third of its inputs are spikes."""
    operations = count_sops(OneSpikeALayer(), torch.rand(2, 2, 6, 6))
    first, second = operations["first.conv"], operations["second"]
    assert first.flops == first.macs == 6 * 6 * 3 * 2 * 9
    assert (first.firing_rate, first.sops) == (None, 0)
    assert second.flops == 2 * 6 * 6 * 5 * 4
    assert second.firing_rate == pytest.approx(1 / 3)
    assert second.macs == 0
    assert second.sops == pytest.approx(second.flops / 3)
    assert energy_mj(operations) == pytest.approx((4.6 * first.flops + 0.9 * second.flops / 3) * 1e-9)
    assert energy_mj(operations, 1.0, 0.0) == pytest.approx(first.flops * 1e-9)
    assert dense_energy_mj(operations) == pytest.approx(4.6 * (first.flops + second.flops) * 1e-9)


def test_additions_of_attention_are_counted_one_by_one():
    """Every pair of a key and a value that spike at the same place; every feature for each spike of a query."""
    torch.manual_seed(0)
    attention = SpikingSelfAttention(8, 2).eval()
    for module in attention.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 5)  # so that neurons behind it spike
    seen = {}
    attention.product.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs))
    x = 4 * torch.rand(3, 2, 8, 3, 3)
    operations = count_sops(attention, x)["product"]
    query, key, value = (tensor.flatten(0, 2) for tensor in seen["inputs"])
    heads, tokens, dim = query.shape
    assert key.any()
    assert value.any()
    additions = sum(
        (key[h, n, i] and value[h, n, j]) + query[h, n, i]
        for h in range(heads)
        for n in range(tokens)
        for i in range(dim)
        for j in range(dim)
    )
    assert operations.sops == pytest.approx(float(additions) / 2)
    assert operations.flops == 2 * heads * tokens * dim * dim / 2


def test_only_the_first_convolution_of_a_max_former_multiplies():
    network = max_former_cifar(dim=64, num_steps=2)
    operations = count_sops(network, torch.rand(1, 3, 16, 16))
    assert [name for name, layer in operations.items() if layer.macs] == ["embeds.0.stem.conv"]
    assert operations["embeds.0.stem.conv"].flops == 16 * 16 * 8 * 27
    assert network.training


def test_a_layer_that_is_called_twice():
    layer = nn.Linear(2, 3)
    model = nn.Sequential(LIF(), layer, LIF(), nn.Linear(3, 2), LIF(), layer)
    operations = count_sops(model, torch.rand(1, 1, 1, 2))
    assert operations["1"].flops == 2 * 2 * 3
    with pytest.raises(ValueError, match=r"got \[3, 4\]"):
        count_sops(model, torch.rand(3, 4))
