import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from postern.nets import MLP
from postern.optim import nlm_alignment, weight_norm


def test_gradient_that_shrinks_or_grows_the_weights():
    model = nn.Linear(3, 2)
    for target, expected in [(0.0, -1.0), (2.0, 1.0)]:
        model.zero_grad()
        (model.weight.square().sum() * (1 - target) + (model.bias - model.bias.detach()).sum()).backward()
        cosines = nlm_alignment(model)
        assert cosines["weight"] == pytest.approx(expected)
        assert cosines["bias"] == pytest.approx(-(model.bias.sum() / (math.sqrt(2) * model.bias.norm())).item())


def test_all_layers_of_a_homogeneous_network_share_their_product():
    """Euler's theorem: <W, dL/dW> is the same for every layer of a network that is linear in each layer's scale."""
    model = MLP(4, 3, (6, 5), bias=False).double()
    logits, target = model(torch.randn(8, 4, dtype=torch.float64)), torch.randint(3, (8,))
    logits.retain_grad()
    cross_entropy(logits, target).backward()
    along = (logits * logits.grad).sum().item()
    cosines = nlm_alignment(model)
    for name, parameter in model.named_parameters():
        assert cosines[name] * parameter.norm().item() * parameter.grad.norm().item() == pytest.approx(-along)


def test_tiny_gradients_have_a_direction():
    model = nn.Linear(3, 2, bias=False)
    model.weight.grad = -1e-35 * model.weight.detach()
    assert nlm_alignment(model)["weight"] == pytest.approx(1, abs=1e-3)


def test_zeros_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    nn.init.zeros_(model[1].weight)
    mse_loss(model(torch.ones(1, 3)), torch.ones(1, 1)).backward()
    assert nlm_alignment(model).keys() == {"1.weight", "1.bias"}
    assert nlm_alignment(model)["1.weight"] == 0
    with pytest.raises(ValueError, match="backward"):
        nlm_alignment(nn.Linear(2, 2))


def test_weight_norm():
    assert weight_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]) == 5
    assert weight_norm([]) == 0
