import pytest
import torch

from postern.nets import AgarapCNN, initialize_truncated
from tests.modules import check_module


def test_module():
    check_module(lambda: AgarapCNN(2, (6, 7), (3, 4), 3, 5).eval(), torch.randn(2, 2, 6, 7))


def test_the_papers_sizes_and_initialisation():
    torch.manual_seed(0)
    network = AgarapCNN()
    counts = [sum(p.numel() for p in layer.parameters()) for layer in (network.stages[0], network.stages[3])]
    assert counts == [5 * 5 * 32 + 32, 5 * 5 * 32 * 64 + 64]
    assert network.hidden.in_features == 7 * 7 * 64
    weight = network.hidden.weight
    assert weight.abs().max() <= 0.2
    # a normal cut at two standard deviations keeps 0.8796 of its standard deviation
    assert weight.std().item() == pytest.approx(0.08796, rel=0.01)
    assert (network.hidden.bias == 0.1).all()


def test_initialisation_leaves_other_layers_alone():
    norm = torch.nn.BatchNorm2d(2)
    initialize_truncated(norm)
    assert (norm.weight == 1).all()


@pytest.mark.parametrize("change", [{"kernel_size": 4}, {"dropout": 1.0}, {"image_shape": (0, 5)}, {"channels": (3,)}])
def test_bad_sizes(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values()))).strip("()").partition(",")[0]):
        AgarapCNN(**change)
