import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from postern.experts import GaussianMixtureOfExperts, MixtureParameters, SoftmaxGate, fit_mixture
from postern.experts._likelihood import Coordinates, Likelihood
from tests.experts.test_gaussian_moe import drawn, samples

GATES = [SoftmaxGate(), SoftmaxGate(2), SoftmaxGate(3, "tanh"), SoftmaxGate(2, "sigmoid", "score+bias")]
TRUTH = MixtureParameters(
    [[-4.0], [4.0], [0.0]], [0.3, -0.3, 0.0], [[1.0], [-1.5], [0.5]], [-2.0, 2.0, 0.0], [0.25, 0.16, 0.36]
)


def from_truth(n=2000, truth=TRUTH, gate=SoftmaxGate(2), seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(n, truth.num_features, generator=g, dtype=torch.float64) - 1
    return x, GaussianMixtureOfExperts.from_parameters(truth, gate).sample(x, g)


def noisy(truth=TRUTH, starts=3, scale=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def near(value):
        return value + scale * torch.randn(starts, *value.shape, generator=g, dtype=torch.float64)

    b1, b0, a, b, v, tau = truth
    b1, b0 = near(b1), near(b0)
    b1[:, -1] = b0[:, -1] = 0
    return MixtureParameters(b1, b0, near(a), near(b), near(v.log()).exp(), near(tau.log()).exp())


def autograd_scores(model, x, y, coordinates):
    """Gradients by autograd in the order of the coordinates, ``[models, P]``."""
    model.zero_grad()
    model(x, y).mean(-1).sum().backward()
    gate = torch.cat([model.gate_coef.grad, model.gate_intercept.grad.unsqueeze(-1)], -1)[..., :-1, :]
    expert = torch.cat([model.coef.grad, model.intercept.grad.unsqueeze(-1)], -1)
    parts = [gate.flatten(-2), expert.flatten(-2), model.log_variance.grad]
    if coordinates.learns_temperature:
        parts.append(model.log_temperature.grad.unsqueeze(-1))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_value_and_gradient_are_those_of_autograd(gate, learns):
    parameters, (x, y) = drawn(4, 2, (3,)), samples(200)
    coordinates = Coordinates(4, 2, learns)
    likelihood = Likelihood(x, y, gate, coordinates, parameters, chunk_size=61)
    model = GaussianMixtureOfExperts.from_parameters(parameters, gate, learns_temperature=learns)
    flat = coordinates.flatten(parameters)
    value, gradient = likelihood.value_and_gradient(flat)
    torch.testing.assert_close(value, model(x, y).mean(-1).detach())
    torch.testing.assert_close(gradient, autograd_scores(model, x, y, coordinates))
    scores = torch.cat(list(likelihood.take(torch.tensor([1])).per_sample_scores(flat[1])))
    torch.testing.assert_close(scores.mean(0), gradient[1])
    for i in (0, 150):
        one = GaussianMixtureOfExperts.from_parameters(parameters[1], gate, learns_temperature=learns)
        torch.testing.assert_close(scores[i], autograd_scores(one, x[i : i + 1], y[i : i + 1], coordinates))


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_the_gradient_of_a_tied_variance_is_that_of_autograd(gate):
    b1, b0, a, b, v, tau = drawn(4, 2, (3,))
    parameters, (x, y) = MixtureParameters(b1, b0, a, b, v[:, :1].expand_as(v), tau), samples(200)
    coordinates = Coordinates(4, 2, True, shares_variance=True)
    flat = coordinates.flatten(parameters)
    assert flat.shape == (3, len(coordinates)) == (3, 9 + 12 + 1 + 1)
    assert coordinates.names[-2:] == ("log_variance", "log_temperature")
    likelihood = Likelihood(x, y, gate, coordinates, parameters, chunk_size=61)
    model = GaussianMixtureOfExperts.from_parameters(parameters, gate, learns_temperature=True, covariance="tied")
    value, gradient = likelihood.value_and_gradient(flat)
    torch.testing.assert_close(value, model(x, y).mean(-1).detach())
    torch.testing.assert_close(gradient, autograd_scores(model, x, y, coordinates))
    scores = torch.cat(list(likelihood.take(torch.tensor([1])).per_sample_scores(flat[1])))
    torch.testing.assert_close(scores.mean(0), gradient[1])


@pytest.mark.parametrize("solver", ["em", "lbfgs"])
@pytest.mark.parametrize(("covariance", "peer"), [("per-expert", "full"), ("tied", "tied")])
def test_without_inputs_it_is_the_mixture_of_scikit_learn(solver, covariance, peer):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-2, 0.5, 300), rng.normal(1, 1.0, 500), rng.normal(4, 0.7, 200)])
    means = np.array([-2.0, 1.0, 4.0])
    mixture = GaussianMixture(3, covariance_type=peer, tol=1e-10, max_iter=5000, means_init=means[:, None], reg_covar=0)
    mixture.fit(values[:, None])
    x, y = torch.zeros(1000, 1, dtype=torch.float64), torch.from_numpy(values)
    zeros = np.zeros((3, 1))
    start = MixtureParameters(zeros, np.zeros(3), zeros, means, [0.3, 1.0, 0.5])
    fit = fit_mixture(x, y, start, solver=solver, covariance=covariance, tol=1e-12, max_iter=5000)
    assert fit.log_likelihood.item() == pytest.approx(mixture.score(values[:, None]), abs=1e-6)
    found = fit.parameters
    np.testing.assert_allclose(found.intercept, mixture.means_[:, 0], atol=2e-3)
    np.testing.assert_allclose(found.gate_intercept.softmax(-1), mixture.weights_, atol=2e-3)
    np.testing.assert_allclose(found.variance, np.broadcast_to(mixture.covariances_.ravel(), 3), rtol=5e-3)
    assert (len(set(found.variance.tolist())) == 1) == (covariance == "tied")


@pytest.mark.parametrize("select_on", ["score", "score+bias"])
@pytest.mark.parametrize("kept", range(1, 7))
def test_experts_that_are_dropped_count_for_nothing(kept, select_on):
    """Also where scores are equal, and where a dropped expert has by far the largest logit or density."""
    parameters, (x, y) = drawn(7, 2, (2,)), samples(300)
    parameters.gate_coef[:, 4] = parameters.gate_coef[:, 1]
    parameters.gate_intercept[:, 2] += 800
    parameters.variance[:, 3] = 1e-4
    gate, coordinates = SoftmaxGate(kept, select_on=select_on), Coordinates(7, 2, False)
    flat = coordinates.flatten(parameters)
    value, gradient = Likelihood(x, y, gate, coordinates, parameters, 77).value_and_gradient(flat)
    model = GaussianMixtureOfExperts.from_parameters(parameters, gate)
    torch.testing.assert_close(value, model(x, y).mean(-1).detach())
    expected = autograd_scores(model, x, y, coordinates)
    torch.testing.assert_close(gradient, expected, atol=1e-10 * expected.abs().max().item(), rtol=1e-9)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_statistics_of_the_gate_are_those_of_autograd(gate, learns):
    parameters, (x, y) = drawn(4, 2), samples(80)
    coordinates = Coordinates(4, 2, learns)
    flat = coordinates.flatten(parameters)
    statistics = Likelihood(x, y, gate, coordinates, parameters[None], 33).em_statistics(flat[None])
    model = GaussianMixtureOfExperts.from_parameters(parameters, gate, learns_temperature=learns)
    posterior = model.posterior(x, y).detach()

    def log_weights(flat):
        mixture = coordinates.unflatten(flat, parameters)
        scores = x @ mixture.gate_coef.T
        logs = gate.log_weights(scores, mixture.gate_intercept, mixture.temperature)
        return torch.where(logs.isinf(), 0.0, logs)

    jacobian = torch.func.jacfwd(log_weights)(flat)  # [samples, experts, P]
    index = [*range(coordinates.num_gate), *([len(coordinates) - 1] if learns else [])]
    gradient = (posterior.unsqueeze(-1) * jacobian).sum(1).mean(0)[index]
    weights = log_weights(flat).exp() * (model.log_weights(x).detach() > -1e300)
    information = torch.einsum("nk,nki,nkj->ij", weights, jacobian, jacobian)[index][:, index] / len(y)
    torch.testing.assert_close(statistics.gate_gradient[0], gradient)
    torch.testing.assert_close(statistics.gate_information[0], information)


def test_chunks_do_not_matter():
    x, y = from_truth(500)
    fits = [fit_mixture(x, y, noisy(), SoftmaxGate(2), max_iter=5, chunk_size=size) for size in (500, 77, 1)]
    for fit in fits[1:]:
        torch.testing.assert_close(fit.parameters.gate_coef, fits[0].parameters.gate_coef)


def test_both_solvers_reach_the_same_maximum_near_the_truth():
    x, y = from_truth(4000)
    em, lbfgs = (fit_mixture(x, y, noisy(), SoftmaxGate(2), solver=solver, tol=1e-10) for solver in ("em", "lbfgs"))
    assert em.has_converged.all()
    assert lbfgs.has_converged.all()
    torch.testing.assert_close(em.log_likelihood, lbfgs.log_likelihood, atol=1e-6, rtol=0)
    assert em.log_likelihood.max() - em.log_likelihood.min() < 1e-6
    truth = GaussianMixtureOfExperts.from_parameters(TRUTH, SoftmaxGate(2))(x, y).mean()
    assert 0 < em.best().log_likelihood - truth < 12 / 4000  # half a chi square of 13 degrees, over n
    assert (em.parameters.intercept - TRUTH.intercept).abs().max() < 0.15
    model = GaussianMixtureOfExperts.from_parameters(em.best().parameters, SoftmaxGate(2))
    gradient = autograd_scores(model, x, y, Coordinates(3, 1, False))
    assert gradient.abs().max() < 1e-3


def test_starts_together_are_starts_alone():
    x, y = from_truth(300)
    starts = noisy(starts=3, scale=0.4)
    together = fit_mixture(x, y, starts, SoftmaxGate(2), tol=1e-7)
    for i in range(3):
        alone = fit_mixture(x, y, starts[i], SoftmaxGate(2), tol=1e-7)
        assert alone.num_iterations == together.num_iterations[i]
        torch.testing.assert_close(alone.log_likelihood, together.log_likelihood[i])
        torch.testing.assert_close(alone.parameters.coef, together.parameters.coef[i])


@pytest.mark.parametrize("gate", [SoftmaxGate(1), SoftmaxGate(2), SoftmaxGate(2, "tanh")], ids=str)
def test_the_likelihood_never_falls(gate):
    x, y = samples(150, seed=5)
    curves = []
    start = drawn(4, 2, (6,), seed=3)
    fit_mixture(
        x, y, start, gate, learns_temperature=True, max_iter=60, on_step=lambda _, value: curves.append(value.clone())
    )
    steps = torch.stack(curves).diff(dim=0)
    assert (steps >= 0).all()
    assert (steps.sum(0) > 0).all()


def test_one_expert_is_ordinary_least_squares():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 3 + torch.randn(200, generator=g, dtype=torch.float64)
    fit = fit_mixture(x, y, drawn(1, 3), tol=1e-12)
    design = torch.cat([x, x.new_ones(200, 1)], dim=1)
    solution = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    torch.testing.assert_close(fit.parameters.coef[0], solution[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(fit.parameters.intercept[0], solution[3], atol=1e-6, rtol=0)
    torch.testing.assert_close(fit.parameters.variance[0], (y - design @ solution).square().mean())


def test_the_last_row_of_the_gate_and_a_held_temperature_stay():
    x, y = from_truth(300)
    start = noisy()
    for solver in ("em", "lbfgs"):
        found = fit_mixture(x, y, start, SoftmaxGate(2), solver=solver, max_iter=10).parameters
        assert (found.gate_coef[:, -1] == 0).all()
        torch.testing.assert_close(found.temperature, start.temperature)
        learnt = fit_mixture(x, y, start, SoftmaxGate(2, "tanh"), solver=solver, learns_temperature=True, max_iter=10)
        assert (learnt.parameters.temperature != start.temperature).all()


def test_a_penalty_shrinks_the_gate_and_both_solvers_agree_on_it():
    x, y = from_truth(500)
    plain = fit_mixture(x, y, noisy(starts=1), SoftmaxGate(2), tol=1e-10)
    fits = [
        fit_mixture(x, y, noisy(starts=1), SoftmaxGate(2), solver=solver, tol=1e-11, gate_penalty=0.01)
        for solver in ("em", "lbfgs")
    ]
    assert fits[0].parameters.gate_coef.norm() < 0.9 * plain.parameters.gate_coef.norm()
    torch.testing.assert_close(fits[0].parameters.gate_coef, fits[1].parameters.gate_coef, atol=2e-3, rtol=0)
    assert (fits[0].log_likelihood < plain.log_likelihood).all()


def test_variances_keep_above_their_floor():
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    y = x[:, 0].abs()  # two exact lines
    start = MixtureParameters([[-4.0], [0.0]], [0.0, 0.0], [[-0.8], [0.8]], [0.1, 0.1], [0.1, 0.1])
    fit = fit_mixture(x, y, start, min_variance=1e-4, max_iter=100)
    torch.testing.assert_close(fit.parameters.variance, torch.full((2,), 1e-4, dtype=torch.float64))
    torch.testing.assert_close(
        fit.parameters.coef[:, 0], torch.tensor([-1.0, 1.0], dtype=torch.float64), atol=1e-2, rtol=0
    )


def test_bad_arguments_are_told():
    x, y = from_truth(20)
    with pytest.raises(ValueError, match=r"samples are x \[samples, 1\]"):
        fit_mixture(x.expand(20, 2), y, noisy())
    with pytest.raises(ValueError, match="NaN"):
        fit_mixture(x, y * float("nan"), noisy())
    with pytest.raises(ValueError, match="got none"):
        fit_mixture(x[:0], y[:0], noisy())
    with pytest.raises(ValueError, match="solver must be one of em, lbfgs, got 'sgd'"):
        fit_mixture(x, y, noisy(), solver="sgd")
    with pytest.raises(ValueError, match="covariance must be 'per-expert' or 'tied', got 'full'"):
        fit_mixture(x, y, noisy(), covariance="full")
    with pytest.raises(ValueError, match="top_k=4"):
        fit_mixture(x, y, noisy(), SoftmaxGate(4))
    with pytest.raises(ValueError, match="min_variance is positive, got 0"):
        fit_mixture(x, y, noisy(), min_variance=0)
    with pytest.raises(ValueError, match="gate_penalty is at least 0, got -1"):
        fit_mixture(x, y, noisy(), gate_penalty=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU")
@pytest.mark.parametrize("solver", ["em", "lbfgs"])
def test_a_gpu_finds_what_the_cpu_finds(solver):
    x, y = from_truth(2000)
    gate = SoftmaxGate(2, "tanh")
    settings = {"solver": solver, "learns_temperature": True, "max_iter": 20}
    here = fit_mixture(x, y, noisy(), gate, **settings)
    there = fit_mixture(x.cuda(), y.cuda(), noisy(), gate, **settings)
    assert there.log_likelihood.is_cuda
    torch.testing.assert_close(there.log_likelihood.cpu(), here.log_likelihood, atol=1e-6, rtol=0)
