import pytest
from torch import nn

from postern.nets import evaluating


def test_every_part_gets_its_own_mode_back():
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    network[1].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, True, False]


def test_also_after_an_error():
    network = nn.Dropout()
    with pytest.raises(RuntimeError), evaluating(network):
        raise RuntimeError
    assert network.training
