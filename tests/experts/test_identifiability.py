import numpy as np
import pytest
import torch

from postern.experts import (
    GaussianMixtureOfExperts,
    MixtureParameters,
    SoftmaxGate,
    activation_independence_rank,
    fisher_information,
    identifiability_report,
)
from postern.experts.gate_activation import ACTIVATIONS, resolve_activation, value_and_derivative
from tests.experts.test_gaussian_moe import drawn

HOMOGENEOUS = {"identity": 1, "relu": 1, "leaky_relu": 1, "abs": 1, "square": 2}
TRUTH = MixtureParameters(
    [[2.0, -1.0], [0.0, 0.0]], [0.3, 0.0], [[1.0, 0.5], [-1.0, 0.8]], [1.0, -1.0], [0.3, 0.5], 0.5
)


def sampled(activation=None, n=600, truth=TRUTH, top_k=None, learns=True):
    g = torch.Generator().manual_seed(0)
    gate = SoftmaxGate(top_k, activation)
    model = GaussianMixtureOfExperts.from_parameters(truth, gate, learns_temperature=learns)
    x = 2 * torch.rand(n, truth.num_features, generator=g, dtype=torch.float64) - 1
    return model, x, model.sample(x, g)


def test_information_is_that_of_autograd():
    model, x, y = sampled("tanh", 50, drawn(3, 2), top_k=2)
    names, values = zip(*model.named_parameters(), strict=True)

    def log_prob(values, x, y):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x[None], y[None]))[0]

    scores = torch.func.vmap(torch.func.grad(log_prob), (None, 0, 0))(values, x, y)
    by_name = dict(zip(names, scores, strict=True))
    gate = torch.cat([by_name["gate_coef"], by_name["gate_intercept"][..., None]], -1)[:, :-1].flatten(1)
    expert = torch.cat([by_name["coef"], by_name["intercept"][..., None]], -1).flatten(1)
    reference = torch.cat([gate, expert, by_name["log_variance"], by_name["log_temperature"][:, None]], 1)
    torch.testing.assert_close(fisher_information(model, x, y, 17), (reference.T @ reference / 50).detach())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_direction_is_lost_exactly_if_the_activation_is_homogeneous(activation):
    report = identifiability_report(*sampled(activation))
    degree = HOMOGENEOUS.get(activation)
    assert len(report.names) == 12
    assert report.is_identifiable == (degree is None)
    if degree is None:
        assert report.eigenvalues[0] > 1e-5
        assert report.directions() == []
        return
    assert report.rank == 11
    # the symmetry c -> (c beta1, c^p beta0, c^p tau)
    expected = np.array([2.0, -1.0, degree * 0.3, degree])
    expected /= np.linalg.norm(expected)
    (direction,) = report.directions()
    assert list(direction) == ["gate_coef[0, 0]", "gate_coef[0, 1]", "gate_intercept[0]", "log_temperature"]
    found = np.array(list(direction.values()))
    np.testing.assert_allclose(found * np.sign(found[0]), expected, atol=1e-6)


def test_a_tied_variance_is_one_coordinate():
    b1, b0, a, b, v, tau = TRUTH
    truth = MixtureParameters(b1, b0, a, b, v[:1].expand(2), tau)
    model, x, y = sampled(n=300, truth=truth, learns=False)
    tied = GaussianMixtureOfExperts.from_parameters(truth, model.gate, covariance="tied")
    report = identifiability_report(tied, x, y)
    assert report.names[-1] == "log_variance"
    separate, pooled = fisher_information(model, x, y), fisher_information(tied, x, y)
    torch.testing.assert_close(pooled[-1, -1], separate[-2:, -2:].sum())
    torch.testing.assert_close(pooled[-1, :-1], separate[-2:, :-2].sum(0))


def test_without_a_learnt_temperature_a_linear_gate_is_identified():
    model, x, y = sampled(learns=False)
    report = identifiability_report(model, x, y)
    assert report.is_identifiable
    assert "log_temperature" not in report.names


def test_a_gate_that_keeps_one_expert_does_not_tell_its_own_parameters():
    report = identifiability_report(*sampled(top_k=1, learns=False))
    assert report.rank == len(report.names) - 3  # two slopes and a bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", [1, 2])
def test_homogeneous_activations_fail_the_independence_conditions(activation, order):
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(400, 2, generator=g, dtype=torch.float64) - 1
    slopes = torch.tensor([[2.0, -1.0], [0.5, 1.5]])
    found = activation_independence_rank(activation, slopes, x, order)
    # 1 + k (1 + d), and k (1 + d + d (d + 1)) more
    assert found.num_functions == (7 if order == 1 else 25)
    assert (found.rank == found.num_functions) == (activation not in HOMOGENEOUS)
    assert (found.smallest_singular_value > 1e-10) == (activation not in HOMOGENEOUS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_are_those_of_finite_differences(activation):
    z = torch.linspace(-2.03, 2, 41, dtype=torch.float64)
    value, derivative = value_and_derivative(activation, z)
    phi = resolve_activation(activation)
    torch.testing.assert_close(value, phi(z))
    torch.testing.assert_close(derivative, (phi(z + 1e-6) - phi(z - 1e-6)) / 2e-6, atol=1e-7, rtol=1e-6)


def test_bad_arguments_are_told():
    model, x, y = sampled(n=50)
    with pytest.raises(ValueError, match="information is that of one model, got 2"):
        fisher_information(GaussianMixtureOfExperts(2, 2, num_models=2), x, y)
    with pytest.raises(ValueError, match="tolerance lies between 0 and 1"):
        identifiability_report(model, x, y, 0.0)
    with pytest.raises(ValueError, match=r"samples are x \[samples, 2\]"):
        fisher_information(model, x[:, :1], y)
    with pytest.raises(ValueError, match="order is 1 or 2, got 3"):
        activation_independence_rank("tanh", torch.ones(1, 2), x, 3)
    with pytest.raises(ValueError, match="need at least as many samples, got 5"):
        activation_independence_rank("tanh", torch.ones(3, 2), x[:5])
    with pytest.raises(ValueError, match="works element by element"):
        value_and_derivative(torch.sum, x)
