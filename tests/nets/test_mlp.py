import pytest
import torch
from torch import nn

from postern.nets import MLP
from tests.modules import check_module


def test_module():
    check_module(lambda: MLP(6, 4, (5, 7)), torch.randn(3, 6))
    check_module(lambda: MLP(6, 4, (), bias=False), torch.randn(3, 2, 3))


def test_is_linear_layers_with_relu_between():
    model = MLP(6, 4, (5, 7))
    x = torch.randn(3, 6)
    first, second = (stage[0] for stage in model.stages)
    hidden = torch.relu(torch.relu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    torch.testing.assert_close(model.features(x), hidden)
    torch.testing.assert_close(model(x), nn.functional.linear(hidden, model.head.weight, model.head.bias))


def test_is_homogeneous_without_biases():
    model = MLP(6, 4, (5, 7), bias=False).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    scaled = {name: 1.7 * parameter for name, parameter in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, scaled, x), 1.7**3 * model(x))


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_classes=0"):
        MLP(3, 0)
    with pytest.raises(ValueError, match=r"widths=\[0\]"):
        MLP(3, 2, (0,))
