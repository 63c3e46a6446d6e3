import copy
import pickle

import pytest
import torch
from torch import nn

from postern.anomaly import FeatureTaps, spatial_mean
from postern.nets import ConvNet
from tests.modules import check_module


def build():
    return FeatureTaps(ConvNet(1, 3, widths=(4, 5)).eval(), ["stages.0", "stages.1"])


def test_module():
    check_module(build, torch.rand(3, 1, 6, 6))


def test_features_are_the_pooled_outputs_of_the_layers():
    torch.manual_seed(0)
    taps, images = build(), torch.rand(3, 1, 6, 6)
    logits, (first, second) = taps(images)
    network = taps.model
    torch.testing.assert_close(first, network.stages[0](images).mean(dim=(2, 3)))
    torch.testing.assert_close(second, network.features(images))
    torch.testing.assert_close(logits, network(images))


def test_matrices_stay_and_other_pools_are_used():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(2, 4)
    torch.testing.assert_close(FeatureTaps(network, ["0"])(x)[1][0], network[0](x))
    tokens = torch.randn(2, 7, 4)
    _, (pooled,) = FeatureTaps(network, ["0"], pool=lambda output: output.mean(dim=1))(tokens)
    torch.testing.assert_close(pooled, network[0](tokens).mean(dim=1))
    torch.testing.assert_close(spatial_mean(torch.ones(2, 3, 4, 5, 6)), torch.ones(2, 3))


def test_nothing_is_kept_and_the_network_by_itself_is_not_watched():
    taps = build()
    taps(torch.rand(2, 1, 6, 6))
    taps.model(torch.rand(2, 1, 6, 6))
    assert all(tap.features is None for tap in taps._taps)
    copy.deepcopy(taps.model)
    pickle.dumps(taps)
    taps.remove()
    assert not any(module._forward_hooks for module in taps.model.modules())


def test_two_taps_on_one_network_do_not_mix():
    network = ConvNet(1, 3, widths=(4, 5)).eval()
    first, second = FeatureTaps(network, ["stages.0"]), FeatureTaps(network, ["stages.0", "stages.1"])
    images = torch.rand(2, 1, 6, 6)
    torch.testing.assert_close(first(images)[1][0], second(images)[1][0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [([], "at least one"), (["head", "head"], "different"), ("head", "list"), (["body"], "no layer 'body'.*stages.0")],
)
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match=message):
        FeatureTaps(ConvNet(1, 3), layers)


def test_a_layer_that_does_not_run_or_gives_no_features():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.LSTM(3, 4), nn.Linear(1, 1)

        def forward(self, x):
            return self.used(x)[0]

    with pytest.raises(ValueError, match="'idle' did not run"):
        FeatureTaps(Idle(), ["idle"])(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"'used' must return a tensor.*tuple"):
        FeatureTaps(Idle(), ["used"])(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"\[2, 4, 6, 6\]"):
        FeatureTaps(ConvNet(1, 3, widths=(4,)), ["stages.0"], pool=lambda output: output)(torch.rand(2, 1, 6, 6))
