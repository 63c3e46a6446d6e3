import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from postern.nets import Normalize
from postern.robust import ascend, bim, carlini_wagner_l2, deepfool, fgsm
from tests.anomaly.networks import digits, trained


def linear(weights, bias):
    network = nn.Sequential(nn.Flatten(), nn.Linear(len(weights[0]), len(weights)))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor(weights))
        network[1].bias.copy_(torch.tensor(bias))
    return network


W = [[1.0, -2.0, 0.0, 0.5], [-1.0, 1.0, 0.0, 0.5], [0.2, 0.2, 0.0, -3.0]]
BIAS = [0.5, 0.0, 1.0]


@pytest.fixture
def problem():
    network = linear(W, BIAS)
    images = 0.3 + 0.4 * torch.rand(30, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return network, images, network(images).argmax(dim=1)


def norms(images, changed):
    return (changed - images).flatten(1).norm(dim=1)


def shortest(images, labels):
    """Distance to the nearest boundary of the linear classifier."""
    weights, bias = torch.tensor(W), torch.tensor(BIAS)
    flat, distances = images.flatten(1), []
    for x, y in zip(flat, labels, strict=True):
        others = [k for k in range(3) if k != y]
        gaps = [((weights[y] - weights[k]) @ x + bias[y] - bias[k]) / (weights[y] - weights[k]).norm() for k in others]
        distances.append(min(gaps))
    return torch.stack(distances)


def test_fgsm_is_one_step_of_the_sign(problem):
    network, images, labels = problem
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), labels), x)
    changed = fgsm(network, images, labels, 0.1)
    torch.testing.assert_close(changed, images + 0.1 * gradient.sign())
    assert torch.equal(changed[..., 1, 0], images[..., 1, 0])  # the pixel that no logit reads


def test_a_normalising_first_layer_changes_no_step_in_pixels(problem):
    network, images, labels = problem
    normalised = nn.Sequential(Normalize((0.0,), (0.25,)), linear([[w / 4 for w in row] for row in W], BIAS))
    torch.testing.assert_close(fgsm(normalised, images, labels, 0.1), fgsm(network, images, labels, 0.1))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 0.3), st.integers(1, 6), st.floats(0.01, 0.5), st.integers(0, 100))
def test_iterated_steps_stay_in_the_box_and_raise_the_loss(step, num_steps, radius, seed):
    network = linear(W, BIAS)
    images = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    labels = network(images).argmax(dim=1)
    changed = bim(network, images, labels, step, num_steps, radius)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed - images).abs().max() <= min(radius, step * num_steps) + 1e-6
    before, after = (F.cross_entropy(network(x), labels, reduction="none") for x in (images, changed))
    if num_steps == 1:
        assert (after >= before - 1e-6).all()  # cross-entropy is convex in the inputs of a linear classifier


def test_ascent_of_a_linear_objective_ends_in_the_corner_of_the_box():
    slope = torch.tensor([1.0, -1.0, 2.0, -0.5]).view(1, 2, 2)
    images = torch.full((2, 1, 2, 2), 0.5)
    changed = ascend(lambda x: (slope * x).flatten(1).sum(dim=1), images, 0.1, 10, radius=0.25)
    torch.testing.assert_close(changed, images + 0.25 * slope.sign())


def test_deepfool_on_a_linear_classifier_is_the_projection_on_the_nearest_boundary(problem):
    network, images, labels = problem
    changed = deepfool(network, images, labels, overshoot=0.0, num_steps=1)
    inside = (changed > 0).flatten(1).all(dim=1) & (changed < 1).flatten(1).all(dim=1)
    assert inside.sum() > 10
    torch.testing.assert_close(norms(images, changed)[inside], shortest(images, labels)[inside], rtol=1e-4, atol=1e-6)
    logits = network(changed)[inside].sort(dim=1, descending=True).values
    torch.testing.assert_close(logits[:, 0], logits[:, 1], rtol=1e-4, atol=1e-5)


def test_deepfool_crosses_the_boundary_also_where_pixels_are_at_their_bounds():
    """Black pixels that the shortest way would darken: the others must carry it."""
    network = linear([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0]], [-0.5, 0.0])
    images = torch.tensor([0.0, 0.0, 0.9]).view(1, 1, 1, 3)
    changed = deepfool(network, images, torch.tensor([0]), num_steps=3, overshoot=0.02)
    torch.testing.assert_close(changed.flatten(), torch.tensor([0.0, 0.0, 0.9 - 1.02 * 0.4]))
    assert network(changed).argmax(dim=1).item() == 1


def test_carlini_wagner_comes_near_the_shortest_way_and_deepfool_never_beats_it(problem):
    network, images, labels = problem
    changed = carlini_wagner_l2(network, images, labels, num_steps=200, num_searches=8)
    assert (network(changed).argmax(dim=1) != labels).all()
    truth = shortest(images, labels)
    found = norms(images, changed)
    assert (found >= truth - 1e-5).all()
    # pixels that would leave [0, 1] lengthen the way of some
    assert (found[truth < 0.25] <= 1.1 * truth[truth < 0.25] + 0.01).all()
    assert (truth < 0.25).sum() > 5


def test_confidence_buys_a_margin(problem):
    network, images, labels = problem
    changed = carlini_wagner_l2(network, images, labels, confidence=0.3, num_searches=8)
    moved = norms(images, changed) > 0
    logits = network(changed)
    others = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    assert moved.sum() > 15
    assert (others - logits.gather(1, labels[:, None])[:, 0])[moved].min() >= 0.3 - 1e-5


@pytest.mark.parametrize(
    "attack",
    [
        lambda *a: fgsm(*a, eps=0.2),
        lambda *a: bim(*a, step=0.05, num_steps=6),
        deepfool,
        lambda *a: carlini_wagner_l2(*a, num_searches=3),
    ],
)
def test_a_trained_network_is_fooled_and_left_as_it_was(attack):
    _, _, images, labels = digits()
    images, labels = images[:60], labels[:60]
    network = copy.deepcopy(trained()).train()
    state = copy.deepcopy(network.state_dict())
    changed = attack(network, images, labels)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not changed.requires_grad
    assert changed.min() >= 0
    assert changed.max() <= 1
    network.eval()
    assert (network(images).argmax(dim=1) == labels).float().mean() > 0.9
    assert (network(changed).argmax(dim=1) == labels).float().mean() < 0.5


def test_minimal_attacks_are_smaller_than_the_fast_one():
    _, _, images, labels = digits()
    images, labels = images[:40], labels[:40]
    network = trained()
    by_sign, by_projection = fgsm(network, images, labels, 0.2), deepfool(network, images, labels)
    by_penalty = carlini_wagner_l2(network, images, labels)
    fooled = network(by_sign).argmax(dim=1) != labels
    assert norms(images, by_projection)[fooled].mean() < norms(images, by_sign)[fooled].mean()
    assert norms(images, by_penalty)[fooled].mean() < norms(images, by_projection)[fooled].mean() * 1.05


def test_images_that_are_wrong_already_stay(problem):
    network, images, labels = problem
    wrong = (labels + 1) % 3
    torch.testing.assert_close(deepfool(network, images, wrong), images)
    torch.testing.assert_close(carlini_wagner_l2(network, images, wrong), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda n, x, y: fgsm(n, x * 3, y, 0.1), "normalisation in the network"),
        (lambda n, x, y: fgsm(n, x * math.nan, y, 0.1), "nan"),
        (lambda n, x, y: fgsm(n, x, y, 0.0), "step=0"),
        (lambda n, x, y: bim(n, x, y[:-1]), "as many class indices"),
        (lambda n, x, y: bim(n, x, y.float()), "float32"),
        (lambda n, x, y: bim(n, (x * 255).byte(), y), "uint8"),
        (lambda n, x, y: bim(n, x[:0], y[:0]), "at least one"),
        (lambda n, x, y: deepfool(n, x, y, num_steps=0), "num_steps"),
        (lambda n, x, y: carlini_wagner_l2(n, x, y, confidence=-1), "confidence=-1"),
    ],
)
def test_bad_input(problem, act, message):
    with pytest.raises(ValueError, match=message):
        act(*problem)
