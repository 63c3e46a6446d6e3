import numpy as np
import pytest
import torch
from scipy import integrate

from postern.experts import GaussianMixtureOfExperts, MixtureParameters, SoftmaxGate, fit_rate, hellinger_1d
from postern.experts.rates import theorem_exponents
from tests.experts.test_gaussian_moe import drawn


def gaussian(mean, variance):
    return GaussianMixtureOfExperts.from_parameters(MixtureParameters([[0.0]], [0.0], [[0.0]], [mean], [variance]))


@pytest.mark.parametrize("first, second", [((0.0, 1.0), (0.7, 1.0)), ((0.0, 1.0), (0.3, 2.5)), ((0, 1), (1e-4, 1))])
def test_the_distance_of_gaussians_is_the_closed_form(first, second):
    (m, v), (w, u) = first, second
    overlap = np.sqrt(2 * np.sqrt(v * u) / (v + u)) * np.exp(-((m - w) ** 2) / (4 * (v + u)))
    found = hellinger_1d(
        gaussian(*first),
        gaussian(*second),
        torch.zeros(2, 1).double(),
        torch.linspace(-15, 15, 201, dtype=torch.float64),
    )
    assert found.item() == pytest.approx(np.sqrt(1 - overlap), rel=1e-5)


def test_the_distance_of_mixtures_is_the_integral():
    p = GaussianMixtureOfExperts.from_parameters(drawn(3, 1, (2,)), SoftmaxGate(2)).requires_grad_(False)
    q = GaussianMixtureOfExperts.from_parameters(drawn(2, 1, seed=5)).requires_grad_(False)
    inputs = torch.tensor([[-0.6], [0.3], [1.1]], dtype=torch.float64)
    found = hellinger_1d(p, q, inputs, torch.linspace(-20, 20, 801, dtype=torch.float64))
    for index in range(2):
        expected = []
        for x in inputs:

            def integrand(y, x=x, index=index):
                y = torch.tensor([y], dtype=torch.float64)
                roots = [(0.5 * each).exp().item() for each in (p(x[None], y)[index, 0], q(x[None], y)[0])]
                return 0.5 * (roots[0] - roots[1]) ** 2

            expected.append(np.sqrt(integrate.quad(integrand, -20, 20, limit=300)[0]))
        assert found[index].item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_power_law_is_found_exactly():
    sizes = [100, 1000, 5000]
    rate = fit_rate(sizes, [[3.0 * n**-0.25 for n in sizes]])
    assert rate.slope == pytest.approx(-0.25)
    assert rate.interval == (-np.inf, np.inf)


def test_intervals_cover_the_exponent_as_often_as_they_say():
    sizes = np.array([1000, 4000, 16_000, 64_000])
    rng = np.random.default_rng(0)
    covered, slopes, errors = [], [], []
    for _ in range(200):
        noise = np.exp(0.3 * rng.normal(size=(20, 4)))
        rate = fit_rate(sizes, sizes**-0.5 * noise, num_resamples=300)
        covered.append(rate.agrees_with(-0.5))
        slopes.append(rate.slope)
        errors.append(rate.stderr)
    assert 0.9 <= np.mean(covered) <= 1
    assert np.mean(slopes) == pytest.approx(-0.5, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(slopes), rel=0.35)


def test_the_median_ignores_a_fit_that_went_astray():
    sizes = [1000, 4000, 16_000]
    errors = np.array([[n**-0.5 for n in sizes]] * 5)
    errors[2, 1] = 1e6
    assert fit_rate(sizes, errors).slope == pytest.approx(-0.5)


def test_exponents_are_those_of_the_theorems():
    assert set(theorem_exponents(1).values()) == {-0.5}
    assert theorem_exponents(2) == {"gate_coef": -1 / 8, "coef": -1 / 4, "intercept": -1 / 8, "variance": -1 / 4}
    assert theorem_exponents(3) == {"gate_coef": -1 / 12, "coef": -1 / 6, "intercept": -1 / 12, "variance": -1 / 6}
    activated = {"gate_coef": -1 / 4, "coef": -1 / 4, "intercept": -1 / 8, "variance": -1 / 4}
    assert theorem_exponents(2, "activated") == activated


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match="at least two positive sample sizes, got"):
        fit_rate([100, 100], np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"errors are \[replicates, 2\]"):
        fit_rate([100, 200], np.ones((2, 3)))
    with pytest.raises(ValueError, match="positive and finite"):
        fit_rate([100, 200], np.zeros((2, 2)))
    with pytest.raises(ValueError, match="gate must be"):
        theorem_exponents(2, "sparse")
    p, y = gaussian(0.0, 1.0), torch.linspace(-1, 1, 5).double()
    with pytest.raises(ValueError, match="x_grid holds inputs"):
        hellinger_1d(p, p, torch.zeros(3), y)
    with pytest.raises(ValueError, match="equally spaced"):
        hellinger_1d(p, p, torch.zeros(3, 1), y**3)
