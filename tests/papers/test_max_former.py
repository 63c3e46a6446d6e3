from dataclasses import replace

import pytest
import torch
from torch import nn

from postern.claims import Run
from postern.papers import max_former as paper
from postern.spiking import (
    IF,
    LIF,
    Dynamics,
    LayerOperations,
    count_sops,
    integrate_and_fire,
    max_former_cifar,
    ms_qkformer_cifar,
)


def test_the_rate_warms_up_and_falls_along_a_cosine():
    rates = [paper._rate(epoch, 10, 2, 0.01) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.01, 0.505, 1, 0.505, 0.01])
    assert paper._rate(0, 10, 0, 0.0) == 1


def test_mixup_mixes_images_and_targets_in_the_same_share():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    target = torch.eye(8)
    mixed, weights = paper._mixed(images, target, 0.75, torch.Generator().manual_seed(1))
    torch.testing.assert_close(mixed[:, 0, 0, 0], weights @ torch.arange(8.0))
    torch.testing.assert_close(weights.sum(1), torch.ones(8))
    assert (weights > 0).sum() > 8


def test_arms_start_from_the_same_weights_and_the_control_has_no_spikes():
    run = Run(seed=3, scale="smoke")
    config = paper.SETTINGS["smoke"]
    data = paper._data(config, run)
    assert (len(data.train), len(data.test)) == (400, 200)
    assert data.train.mean().abs() < 1e-5
    networks = [paper._max_former(arm, config, data, run) for arm in ("avg", "max")]
    for first, second in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(first, second)
    for pool, network in zip((nn.AvgPool2d, nn.MaxPool2d), networks, strict=True):
        assert sum(isinstance(module, nn.MaxPool2d | nn.AvgPool2d) for module in network.modules()) == 3
        assert sum(isinstance(module, pool) for module in network.modules()) == 3
        assert sum(isinstance(module, LIF | IF) for module in network.modules()) == 12


def test_twice_the_threshold_is_half_the_current():
    current = 1 + torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    spikes = paper.NEURONS["if_half"](current)
    assert torch.equal(spikes, integrate_and_fire(current, Dynamics(keep=1.0, gain=0.5)))
    assert not torch.equal(spikes, paper.NEURONS["if"](current))


@pytest.mark.parametrize(("name", "build"), [("max_former", max_former_cifar), ("ms_qkformer", ms_qkformer_cifar)])
def test_designs_are_the_networks_of_the_library(name, build):
    run = Run(seed=3, scale="smoke")
    config = replace(paper.SETTINGS["smoke"], dims=(16, 32, 64), depths=(1, 1, 2), num_steps=4)
    network = paper._max_former(name, config, paper._data(config, run), run)
    assert repr(network) == repr(build(dim=64, in_channels=1))


def test_every_design_of_the_ablation_is_trained_at_full_scale():
    """Each in one of the two claims, and each can be trained: gradients reach all stages and embeddings."""
    mixers, transformers = (
        paper.PAPER.claims[name].scales["full"].beside
        for name in ("maximum-mixes-better-than-average", "max-former-beats-ms-qkformer")
    )
    assert sorted([*paper.ARMS, *mixers, *paper.TRANSFORMERS, *transformers]) == sorted(paper.DESIGNS)
    run = Run(seed=3, scale="smoke")
    config = replace(paper.SETTINGS["smoke"], training_images=100, epochs=2, weight_decay=0.0)
    data = paper._data(config, run)
    for name in paper.DESIGNS:
        network = paper._max_former(name, config, data, run)
        before = {key: each.clone() for key, each in network.named_parameters()}
        paper._trained(network, data, config, run, name)
        moved = {key for key, each in network.named_parameters() if not torch.equal(each, before[key])}
        for part in [f"{kind}.{stage}." for kind in ("embeds", "stages") for stage in range(3)] + ["head."]:
            assert any(key.startswith(part) for key in moved), (name, part)
        assert all(each.isfinite().all() for each in network.parameters()), name


def test_firing_rates_are_those_of_the_spikes():
    """By layer what goes into it; by stage weighted with the operations; nothing where the input is real."""
    run = Run(seed=3, scale="smoke")
    operations = {
        "embeds.0.stem.conv": LayerOperations(1000, None),
        "embeds.0.body.main.0.projection.conv": LayerOperations(300, 0.1),
        "stages.0.0.mlp.layers.1.conv": LayerOperations(100, 0.5),
        "stages.1.0.mlp.layers.1.conv": LayerOperations(50, 0.2),
        "head": LayerOperations(10, 0.4),
    }
    fewer = {name: operations[name] for name in ("stages.0.0.mlp.layers.1.conv", "head")}
    paper._firing_rates({"all": paper._Energy(operations), "fewer": paper._Energy(fewer)}, run)
    assert run.tables["firing rates by stage"] == [
        {"stage": "stage 1", "all": 0.2, "fewer": 0.5},
        {"stage": "stage 2", "all": 0.2, "fewer": None},
        {"stage": "head", "all": 0.4, "fewer": 0.4},
    ]
    layers = {row["layer"]: (row["all"], row["fewer"]) for row in run.tables["firing rates by layer"]}
    assert layers == {
        "embeds.0.body.main.0.projection.conv": (0.1, None),
        "stages.0.0.mlp.layers.1.conv": (0.5, 0.5),
        "stages.1.0.mlp.layers.1.conv": (0.2, None),
        "head": (0.4, 0.4),
    }


def test_a_layers_firing_rate_is_the_share_of_spikes_that_go_into_it():
    torch.manual_seed(0)
    network = paper.MaxResNet((1, 1), (4, 8), 3, in_channels=1).eval()
    seen = {}
    neuron, layer = network.stages[1][0].residual[0], "stages.1.0.residual.1.conv"
    neuron.register_forward_hook(lambda module, inputs, spikes: seen.update(rate=spikes.mean().item()))
    operations = count_sops(network, 3 * torch.randn(4, 1, 8, 8))
    energy = paper._Energy({layer: operations[layer]})
    assert 0 < seen["rate"] < 1
    assert energy.firing_rate == pytest.approx(seen["rate"])
    assert energy.sops == pytest.approx(seen["rate"] * operations[layer].flops)
