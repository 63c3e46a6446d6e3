"""Closed forms against automatic differentiation, minimisation and random prompts."""

import math

import pytest
import torch
from scipy.optimize import minimize

from postern.dynamics import (
    InContextRegression,
    approximate_loss,
    approximate_loss_gradient,
    autoregressive_covariance,
    gradient_descent_predict,
    gradient_descent_risk,
    gradient_flow,
    optimal_mu,
    optimal_preconditioner,
    optimal_single_head,
    optimal_step_size,
    preconditioned_risk,
    reduced_attention,
)

SETTING = (5, 40, 0.1)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_gradient_is_that_of_the_loss():
    torch.manual_seed(0)
    omega, mu = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = approximate_loss(0.3 * omega, mu, *SETTING)
    assert loss.shape == (3,)
    found = approximate_loss_gradient(0.3 * omega, mu, *SETTING)
    expected = torch.autograd.grad(loss.sum(), (omega, mu))
    torch.testing.assert_close(0.3 * found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_the_loss_of_one_and_of_two_heads():
    omega, mu = 0.3, 1.7
    one = 1.1 - 2 * omega * mu + mu**2 * (omega**2 + 1.1 / 40 * math.exp(5 * omega**2))
    assert approximate_loss(vector(omega), vector(mu), *SETTING).item() == pytest.approx(one)
    two = 1.1 - 4 * omega * mu + 4 * omega**2 * mu**2 + 4 * 1.1 * mu**2 / 40 * math.sinh(5 * omega**2)
    found = approximate_loss(vector(omega, -omega), vector(mu, -mu), *SETTING).item()
    assert found == pytest.approx(two)
    assert approximate_loss(vector(0.5), vector(0.0), *SETTING).item() == pytest.approx(1.1)


def test_small_opposite_heads_cost_what_a_gradient_step_costs():
    eta = 1 / (1 + 5 * 1.1 / 40)
    omega = 1e-4
    found = approximate_loss(vector(omega, -omega), vector(eta, -eta) / (2 * omega), *SETTING).item()
    assert found == pytest.approx(1.1 - eta, abs=1e-6)


def test_the_best_mu_is_a_minimum():
    omega = vector(0.3, -0.2, 0.1)
    mu = optimal_mu(omega, *SETTING)
    torch.testing.assert_close(
        approximate_loss_gradient(omega, mu, *SETTING)[1], torch.zeros(3).double(), atol=1e-9, rtol=0
    )
    least = approximate_loss(omega, mu, *SETTING)
    for _ in range(20):
        assert approximate_loss(omega, mu + 0.1 * torch.randn(3), *SETTING) > least


def test_equal_heads_share_the_best_mu():
    one, two = optimal_mu(vector(0.4), *SETTING), optimal_mu(vector(0.4, 0.4), *SETTING)
    torch.testing.assert_close(two, (one / 2).expand(2))


def test_the_best_single_head():
    omega, mu, loss = optimal_single_head(*SETTING)
    assert approximate_loss(vector(omega), vector(mu), *SETTING).item() == pytest.approx(loss)
    assert optimal_mu(vector(omega), *SETTING).item() == pytest.approx(mu)
    for gradient in approximate_loss_gradient(vector(omega), vector(mu), *SETTING):
        assert gradient.item() == pytest.approx(0, abs=1e-9)
    found = minimised(lambda both: approximate_loss(both[:1], both[1:], *SETTING).item(), vector(0.3, 1.0))
    assert found == pytest.approx(loss, abs=1e-6)


def minimised(function, start):
    return minimize(lambda x: function(torch.from_numpy(x)), start.numpy(), method="Nelder-Mead").fun


def test_the_approximate_loss_is_near_the_loss_of_long_prompts():
    generator = torch.Generator().manual_seed(0)
    prompts = InContextRegression(5).sample(20_000, 400, generator=generator)
    for omega in (vector(0.3), vector(0.2, -0.2)):
        mu = optimal_mu(omega, 5, 400, 0.1)
        output = reduced_attention(prompts.inputs, prompts.labels, prompts.query_input, omega, mu)
        found = (output - prompts.target).square().mean().item()
        assert approximate_loss(omega, mu, 5, 400, 0.1).item() == pytest.approx(found, rel=0.05)


def test_the_flow_follows_the_gradient_down():
    omega, mu = vector(0.05, -0.02, 0.01), vector(0.3, -0.2, 0.1)
    flow = gradient_flow(omega, mu, *SETTING, duration=4.0, points=401)
    torch.testing.assert_close(flow.omega[0], omega)
    torch.testing.assert_close(flow.mu[0], mu)
    assert (flow.loss.diff() <= 1e-9).all()
    middle = 200
    slopes = ((each[middle + 1] - each[middle - 1]) / (2 * 0.01) for each in (flow.omega, flow.mu))
    for slope, gradient in zip(
        slopes, approximate_loss_gradient(flow.omega[middle], flow.mu[middle], *SETTING), strict=True
    ):
        torch.testing.assert_close(slope, -gradient, atol=1e-3, rtol=1e-2)


def test_the_flow_from_small_opposite_heads_ends_in_a_balanced_pair():
    flow = gradient_flow(vector(0.0, 0.0), vector(0.02, -0.01), *SETTING, duration=60.0)
    omega, mu = flow.omega[-1], flow.mu[-1]
    assert (omega * mu > 0).all()
    assert omega[0].item() == pytest.approx(-omega[1].item(), rel=0.01)
    assert abs(mu.sum().item()) < 0.01 * mu.abs().sum().item()
    assert flow.loss[-1].item() == pytest.approx(1.1 - 1 / (1 + 5.5 / 40), abs=5e-3), "omega goes to 0 slowly"
    stuck = gradient_flow(vector(0.0, 0.0), vector(0.02, 0.01), *SETTING, duration=20.0)
    assert stuck.loss[-1].item() == pytest.approx(optimal_single_head(*SETTING)[2], abs=1e-3)


def test_a_flow_that_overflows_is_an_error():
    for start in (40.0, math.nan):
        with pytest.raises(ValueError, match="finite gradient, got omega"):
            gradient_flow(vector(start), vector(1.0), *SETTING, duration=1.0)


@pytest.mark.parametrize("is_debiased", [False, True])
def test_risks_are_those_of_random_prompts(is_debiased):
    covariance = autoregressive_covariance(4, 0.6)
    generator = torch.Generator().manual_seed(0)
    prompts = InContextRegression(4, 0.3, covariance=covariance, coefficient_variance=0.25).sample(
        100_000, 7, generator=generator
    )
    matrix = 0.4 * torch.eye(4) + 0.1 * torch.randn(4, 4, generator=generator)
    output = gradient_descent_predict(
        prompts.inputs, prompts.labels, prompts.query_input, matrix, is_debiased=is_debiased
    )
    found = (output - prompts.target).square().mean().item()
    assert preconditioned_risk(matrix, covariance, 7, 0.3, is_debiased=is_debiased) == pytest.approx(found, rel=0.015)


@pytest.mark.parametrize("is_debiased", [False, True])
def test_isotropic_risk_and_step_are_special_cases(is_debiased):
    for step in (0.3, 0.9):
        general = preconditioned_risk(step * torch.eye(5), torch.eye(5), 40, 0.1, is_debiased=is_debiased)
        assert gradient_descent_risk(step, *SETTING, is_debiased=is_debiased) == pytest.approx(general)
    best = optimal_step_size(*SETTING, is_debiased=is_debiased)
    torch.testing.assert_close(
        optimal_preconditioner(torch.eye(5), 40, 0.1, is_debiased=is_debiased), best * torch.eye(5)
    )
    least = gradient_descent_risk(best, *SETTING, is_debiased=is_debiased)
    assert least == pytest.approx(1.1 - 39 / 45.5 if is_debiased else 1.1 - 40 / 46.5)
    for step in (0.99 * best, 1.01 * best):
        assert gradient_descent_risk(step, *SETTING, is_debiased=is_debiased) > least


@pytest.mark.parametrize("is_debiased", [False, True])
def test_the_best_preconditioner_is_a_minimum(is_debiased):
    covariance = autoregressive_covariance(4, 0.6).double()
    best = optimal_preconditioner(covariance, 7, 0.3, is_debiased=is_debiased)
    least = preconditioned_risk(best, covariance, 7, 0.3, is_debiased=is_debiased)
    torch.manual_seed(0)
    for _ in range(20):
        other = best + 0.05 * torch.randn(4, 4)
        assert preconditioned_risk(other, covariance, 7, 0.3, is_debiased=is_debiased) > least


def test_impossible_settings():
    for call in (
        lambda: approximate_loss(vector(0.1), vector(0.1, 0.2), *SETTING),
        lambda: approximate_loss(vector(0.1), vector(0.1), 5, 0, 0.1),
        lambda: optimal_single_head(0, 40, 0.1),
        lambda: gradient_descent_risk(0.5, 5, 40, -1.0),
        lambda: gradient_flow(vector(0.1), vector(0.1), *SETTING, duration=0.0),
        lambda: optimal_preconditioner(torch.ones(2, 3), 40, 0.1),
        lambda: preconditioned_risk(torch.eye(2), torch.eye(3), 40, 0.1),
    ):
        with pytest.raises(ValueError, match="got"):
            call()
