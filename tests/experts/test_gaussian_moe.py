import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.special import softmax

from postern.experts import GaussianMixtureOfExperts, MixtureParameters, SoftmaxGate, temperature_softmax_gate
from tests.modules import check_module


def drawn(k=3, d=2, models=(), seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn((*models, *shape), generator=g, dtype=torch.float64)

    positive = [0.3 + torch.rand((*models, *shape), generator=g, dtype=torch.float64) for shape in ((k,), ())]
    return MixtureParameters(normal(k, d), normal(k), normal(k, d), normal(k), *positive)


def samples(n=30, d=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)


def reference_density(parameters, gate, x, y):
    """One sample and one expert at a time."""
    phi = {None: lambda z: z, "tanh": np.tanh}[gate.activation]
    b1, b0, a, b, v, tau = (value.numpy() for value in parameters)
    densities = []
    for row, value in zip(x.numpy(), y.numpy(), strict=True):
        score = phi(b1 @ row)
        by = score if gate.select_on == "score" else score + b0
        kept = np.argsort(-by, kind="stable")[: gate.top_k or len(by)]
        weights = softmax((score + b0)[kept] / tau)
        densities.append(weights @ stats.norm.pdf(value, a[kept] @ row + b[kept], np.sqrt(v[kept])))
    return np.array(densities)


@pytest.mark.parametrize(
    "gate", [SoftmaxGate(), SoftmaxGate(2), SoftmaxGate(2, "tanh"), SoftmaxGate(1), SoftmaxGate(2, None, "score+bias")]
)
def test_density_is_that_of_the_definition(gate):
    parameters, (x, y) = drawn(), samples()
    model = GaussianMixtureOfExperts.from_parameters(parameters, gate)
    np.testing.assert_allclose(model(x, y).exp().detach(), reference_density(parameters, gate, x, y), rtol=1e-12)


def test_a_tied_density_is_that_of_equal_covariances():
    b1, b0, a, b, v, tau = drawn()
    parameters, (x, y) = MixtureParameters(b1, b0, a, b, v[:1].expand(3), tau), samples()
    model = GaussianMixtureOfExperts.from_parameters(parameters, SoftmaxGate(2), covariance="tied")
    assert model.log_variance.shape == (1,)
    weights = model.log_weights(x).exp().detach().numpy()
    means = (x @ a.T + b).numpy()
    expected = [
        sum(w * stats.multivariate_normal([m], [[v[0].item()]]).pdf(value) for w, m in zip(row, mean, strict=True))
        for row, mean, value in zip(weights, means, y.numpy(), strict=True)
    ]
    np.testing.assert_allclose(model(x, y).exp().detach(), expected, rtol=1e-12)
    torch.testing.assert_close(model.mixture.variance, parameters.variance)
    plain = GaussianMixtureOfExperts.from_parameters(parameters, SoftmaxGate(2))
    drawn_values = [each.sample(x, torch.Generator().manual_seed(0)) for each in (model, plain)]
    torch.testing.assert_close(*drawn_values)


def test_several_models_are_each_of_them():
    parameters, (x, y) = drawn(models=(4,)), samples()
    model = GaussianMixtureOfExperts.from_parameters(parameters, SoftmaxGate(2, "sigmoid"))
    for i in range(4):
        one = GaussianMixtureOfExperts.from_parameters(parameters[i], SoftmaxGate(2, "sigmoid"))
        torch.testing.assert_close(model(x, y)[i], one(x, y))
        torch.testing.assert_close(model.posterior(x, y)[i], one.posterior(x, y))
        torch.testing.assert_close(model.predict_mean(x)[i], one.predict_mean(x))


def test_density_integrates_to_one_and_has_the_predicted_mean():
    model = GaussianMixtureOfExperts.from_parameters(drawn(), SoftmaxGate(2)).requires_grad_(False)
    x = samples(1)[0]

    def density(y):
        return float(model(x, torch.tensor([y], dtype=torch.float64)).exp())

    assert integrate.quad(density, -30, 30, limit=200)[0] == pytest.approx(1, abs=1e-8)
    mean = integrate.quad(lambda y: y * density(y), -30, 30, limit=200)[0]
    assert mean == pytest.approx(float(model.predict_mean(x)), abs=1e-7)


def test_posterior_is_bayes_rule():
    parameters, (x, y) = drawn(), samples()
    model = GaussianMixtureOfExperts.from_parameters(parameters, SoftmaxGate(2)).requires_grad_(False)
    weights = model.log_weights(x).exp()
    normal = torch.distributions.Normal(model.means(x), parameters.variance.sqrt())
    joint = weights * normal.log_prob(y[:, None]).exp()
    torch.testing.assert_close(model.posterior(x, y), joint / joint.sum(-1, keepdim=True))
    assert ((weights > 0).sum(-1) == 2).all()


def test_samples_come_from_the_model():
    model = GaussianMixtureOfExperts.from_parameters(drawn(models=(2,)), SoftmaxGate(2))
    point = torch.tensor([[0.4, -0.7]], dtype=torch.float64)
    y = model.sample(point.expand(20_000, 2), torch.Generator().manual_seed(0))
    for i in range(2):
        weights = model.log_weights(point)[i, 0].detach().exp().numpy()
        means, scales = (
            model.means(point)[i, 0].detach().numpy(),
            torch.exp(0.5 * model.log_variance[i]).detach().numpy(),
        )

        def cdf(values, weights=weights, means=means, scales=scales):
            return (weights * stats.norm.cdf(values[:, None], means, scales)).sum(1)

        assert stats.kstest(y[i].numpy(), cdf).pvalue > 1e-3


def test_an_expert_without_weight_is_never_drawn():
    model = GaussianMixtureOfExperts.from_parameters(drawn(), SoftmaxGate(1))
    x, _ = samples(500)
    drawn_experts = model.sample_experts(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn_experts, model.log_weights(x).argmax(-1))


def test_gradients_are_those_of_finite_differences():
    x, y = samples(7)
    model = GaussianMixtureOfExperts.from_parameters(drawn(), SoftmaxGate(2, "tanh"), learns_temperature=True)
    names, values = zip(*model.named_parameters(), strict=True)

    def log_prob(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x, y))

    assert torch.autograd.gradcheck(log_prob, values)


def test_scaling_a_linear_gate_and_its_temperature_changes_nothing_but_an_activation_tells():
    parameters, (x, y) = drawn(), samples()
    b1, b0, *rest, tau = parameters
    scaled = MixtureParameters(3 * b1, 3 * b0, *rest, 3 * tau)
    for activation, agrees in ((None, True), ("leaky_relu", True), ("tanh", False), ("sin", False)):
        both = [
            GaussianMixtureOfExperts.from_parameters(each, SoftmaxGate(None, activation))(x, y)
            for each in (parameters, scaled)
        ]
        assert torch.allclose(*both) == agrees, activation


def test_parameters_go_in_and_out():
    parameters = drawn(models=(2,))
    model = GaussianMixtureOfExperts.from_parameters(parameters)
    for found, expected in zip(model.mixture, parameters, strict=True):
        torch.testing.assert_close(found, expected)
    listed = MixtureParameters([[1.0]], [0.0], [[2.0]], [0.5], [1.0])
    assert listed.temperature == 1
    assert listed.coef.dtype == torch.float64


def test_the_temperature_is_trained_only_if_asked():
    assert not GaussianMixtureOfExperts(2, 3, temperature=0.5).log_temperature.requires_grad
    model = GaussianMixtureOfExperts(2, 3, temperature=0.5, learns_temperature=True)
    assert model.log_temperature.requires_grad
    assert model.log_temperature.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(("num_models", "covariance"), [(None, "per-expert"), (2, "tied")])
def test_it_survives_what_modules_must(num_models, covariance):
    x, y = samples()

    def build():
        return GaussianMixtureOfExperts(
            2,
            4,
            2,
            activation="tanh",
            learns_temperature=True,
            num_models=num_models,
            covariance=covariance,
            temperature=0.7,
        )

    check_module(build, x, y)


def test_autocast_takes_no_digits():
    x, y = (each.float() for each in samples())
    model = GaussianMixtureOfExperts(2, 4, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, y)
    torch.testing.assert_close(found, model(x, y))


@pytest.mark.parametrize("activation", [None, "tanh", "relu"])
def test_the_temperature_gate_is_a_softmax_of_scaled_activations(activation):
    rng = np.random.default_rng(0)
    scores, bias = rng.normal(size=(20, 4)), rng.normal(size=4)
    phi = {None: lambda z: z, "tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}[activation]
    found = temperature_softmax_gate(torch.from_numpy(scores), torch.from_numpy(bias), 0.3, activation)
    np.testing.assert_allclose(found, softmax((phi(scores) + bias) / 0.3, axis=1))
    cold = temperature_softmax_gate(torch.from_numpy(scores), None, 1e-3, activation)
    if activation != "relu":  # of several equal scores none is the best
        np.testing.assert_array_equal(cold.argmax(-1), scores.argmax(1))
        assert cold.max(-1).values.min() > 0.6


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got .*'num_experts': 0"):
        GaussianMixtureOfExperts(2, 0)
    with pytest.raises(ValueError, match="got top_k=4"):
        GaussianMixtureOfExperts(2, 3, 4)
    with pytest.raises(ValueError, match="top_k=0"):
        SoftmaxGate(0)
    with pytest.raises(ValueError, match="covariance must be 'per-expert' or 'tied', got 'diag'"):
        GaussianMixtureOfExperts(2, 3, covariance="diag")
    with pytest.raises(ValueError, match="of a tied covariance have one variance"):
        GaussianMixtureOfExperts.from_parameters(drawn(), covariance="tied")
    with pytest.raises(ValueError, match="activation must be"):
        SoftmaxGate(activation="rleu")
    with pytest.raises(ValueError, match="each variance is positive"):
        MixtureParameters([[1.0]], [0.0], [[2.0]], [0.5], [0.0])
    with pytest.raises(ValueError, match=r"have the shapes"):
        MixtureParameters([[1.0], [2.0]], [0.0], [[2.0]], [0.5], [1.0])
    with pytest.raises(ValueError, match="temperature is positive"):
        temperature_softmax_gate(torch.zeros(1, 2), None, 0.0)
    model = GaussianMixtureOfExperts(2, 3)
    with pytest.raises(ValueError, match=r"inputs are \[samples, 2\], got shape \[5, 3\]"):
        model.predict_mean(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one y for each of 5 samples"):
        model(torch.zeros(5, 2), torch.zeros(4))
