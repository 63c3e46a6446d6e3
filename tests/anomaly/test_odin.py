import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from torch import nn
from torch.nn import functional as F

from postern.anomaly import ODIN, MaxSoftmax, ood_metrics
from tests.anomaly.networks import digits, noise, trained


def test_without_a_step_at_temperature_1_it_is_the_largest_probability():
    _, _, test, _ = digits()
    expected = MaxSoftmax(trained()).score_samples(test)
    np.testing.assert_allclose(ODIN(trained(), 1.0, 0.0).fit().score_samples(test), expected, rtol=1e-12)


def test_score_is_the_papers():
    """The step from cross-entropy with the network's own answer as the label, one temperature throughout."""
    _, _, test, _ = digits()
    images, temperature, eps = test[:30].clone().requires_grad_(), 10.0, 0.01
    logits = trained()(images) / temperature
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(dim=1)), images)
    with torch.no_grad():
        stepped = trained()(images - eps * torch.where(gradient >= 0, 1.0, -1.0))
    expected = softmax(stepped.double().numpy() / temperature, axis=1).max(axis=1)
    scores = ODIN(trained(), temperature, eps).fit().score_samples(images.detach())
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_high_temperatures_keep_their_digits():
    """In float32 the scores at T = 1e6 would fall together."""
    _, _, test, _ = digits()
    assert len(np.unique(ODIN(trained(), 1e6, 0.0).fit().score_samples(test))) > 340


def test_a_linear_network_steps_along_the_weights():
    """For two logits (w.x, -w.x) the step adds eps |w|_1 to |w.x|."""
    network = nn.Linear(3, 2, bias=False)
    w = torch.tensor([1.0, -2.0, 0.5])
    with torch.no_grad():
        network.weight.copy_(torch.stack([w, -w]))
    x = torch.tensor([[1.0, 0.2, 0.3], [-1.0, 0.5, 0.1]])
    margin = (x @ w).abs() + 0.1 * w.abs().sum()
    expected = 1 / (1 + torch.exp(-2 * margin / 5))
    np.testing.assert_allclose(ODIN(network, 5.0, 0.1).fit().score_samples(x), expected.numpy(), rtol=1e-6)


def test_tuning_takes_the_best_pair():
    _, _, test, _ = digits()
    temperatures, steps = (1.0, 100.0), (0.0, 0.02)
    tuned = ODIN(trained()).tune(test, noise(200), temperatures, steps, by="auroc")
    quality = {
        (t, eps): ood_metrics(
            ODIN(trained(), t, eps).fit().score_samples(test), ODIN(trained(), t, eps).fit().score_samples(noise(200))
        )["auroc"]
        for t in temperatures
        for eps in steps
    }
    assert len(set(quality.values())) == 4
    assert (tuned.temperature_, tuned.eps_) == max(quality, key=quality.get)
    found = ood_metrics(tuned.score_samples(test), tuned.score_samples(noise(200)))["auroc"]
    assert found == pytest.approx(max(quality.values()))


def test_scikit_learn_conventions_and_bad_input():
    params = clone(ODIN(trained(), 7.0, 0.1, (0.5,))).get_params()
    assert (params["temperature"], params["eps"], params["std"]) == (7.0, 0.1, (0.5,))
    for arguments, message in [((0.0, 0.1), "temperatures"), ((1.0, -0.1), "-0.1"), ((float("nan"), 0.0), "nan")]:
        with pytest.raises(ValueError, match=message):
            ODIN(trained(), *arguments).fit()
    with pytest.raises(ValueError, match="temperatures"):
        ODIN(trained()).tune(noise(9), noise(9), temperatures=())
    with pytest.raises(ValueError, match="1 channels"):
        ODIN(trained(), std=(0.1, 0.2)).fit().score_samples(noise(2))
