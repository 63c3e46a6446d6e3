import pytest
import torch
from torch import nn

from postern.claims import Run
from postern.papers import max_former as paper
from postern.spiking import IF, LIF, Dynamics, integrate_and_fire


def test_the_rate_warms_up_and_falls_along_a_cosine():
    rates = [paper._rate(epoch, 10, 2, 0.01) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.01, 0.505, 1, 0.505, 0.01])
    assert paper._rate(0, 10, 0, 0.0) == 1


def test_moved_images_are_moved_by_whole_pixels_and_mirrored():
    image = torch.rand(1, 2, 6, 6) + 1
    padded = nn.functional.pad(image, [2] * 4)
    possible = [
        each[..., row : row + 6, column : column + 6]
        for each in (padded, padded.flip(-1))
        for row in range(5)
        for column in range(5)
    ]
    moved = paper._moved(image.expand(200, -1, -1, -1), 2, torch.Generator().manual_seed(0))
    which = [[k for k, other in enumerate(possible) if torch.equal(each, other[0])] for each in moved]
    assert all(len(found) == 1 for found in which)
    assert len({found[0] for found in which}) > 40


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
