import copy
import sys

import pytest
import torch
from torch import nn

from postern.errors import MissingExtra
from postern.spiking import IF, LIF, MaxResNet, SnnTorchNeuron, replace_neurons


def small():
    torch.manual_seed(0)
    return MaxResNet((1, 1), (4, 8), 3, in_channels=1, num_classes=3)


def test_every_neuron_is_replaced_and_nothing_else():
    network = small()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = sum(isinstance(module, LIF) for module in network.modules())
    assert replace_neurons(network, lambda neuron: IF(neuron.dynamics.threshold)) is network
    assert before == sum(isinstance(module, IF) for module in network.modules()) == 5
    assert not any(isinstance(module, LIF) for module in network.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_without_spikes_one_step_is_all_steps():
    """A network of ReLUs has no memory, so that all steps say the same."""
    images = torch.rand(2, 1, 8, 8)
    network = replace_neurons(small(), lambda _: nn.ReLU()).eval()
    expected = network(images)
    network.num_steps = 1
    torch.testing.assert_close(network(images), expected)


def test_a_neuron_alone_cannot_be_replaced():
    with pytest.raises(ValueError, match="inside a network"):
        replace_neurons(LIF(), lambda _: nn.ReLU())


def test_without_snntorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(MissingExtra, match=r"postern\[snntorch\]"):
        SnnTorchNeuron(LIF())


@pytest.mark.parametrize(
    "neuron",
    [
        LIF(),
        LIF(4.0, 0.5),
        LIF(detach_reset=False),
        LIF(surrogate="atan", alpha=2.0, decay_input=False),
        LIF(3.0, 2.5, reset="soft", detach_reset=False),
        IF(2.0),
    ],
)
def test_spikes_and_gradients_are_those_of_snntorch(neuron):
    pytest.importorskip("snntorch")
    current = torch.randn(8, 6, 50, generator=torch.Generator().manual_seed(0)) * 2 + 1
    found = []
    for each in (neuron, SnnTorchNeuron(neuron)):
        leaf = current.clone().requires_grad_()
        spikes = each(leaf)
        weight = torch.linspace(-1, 1, spikes.numel()).view_as(spikes)
        found.append((spikes.detach(), torch.autograd.grad((weight * spikes).sum(), leaf)[0]))
    assert found[0][0].any()
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_a_network_on_snntorch_says_the_same_and_can_be_copied():
    pytest.importorskip("snntorch")
    images = torch.rand(4, 1, 8, 8)
    ours = small()
    theirs = replace_neurons(copy.deepcopy(ours), SnnTorchNeuron)
    logits = ours(images), theirs(images)
    torch.testing.assert_close(*logits)
    for network, output in zip((ours, theirs), logits, strict=True):
        torch.autograd.backward(output.square().sum())
        copy.deepcopy(network)
    for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad)


def test_dynamics_that_snntorch_has_not():
    pytest.importorskip("snntorch")
    with pytest.raises(ValueError, match="delay"):
        SnnTorchNeuron(LIF(reset="soft"))
