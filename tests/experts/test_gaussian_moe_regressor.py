import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression
from sklearn.utils.estimator_checks import check_estimator

from postern.experts import GaussianMoERegressor, MixtureParameters, SoftmaxGate
from tests.experts.test_gaussian_moe_fit import TRUTH, from_truth


def data(n=1500, seed=0):
    x, y = from_truth(n, gate=SoftmaxGate(2), seed=seed)
    return x.numpy(), y.numpy()


@pytest.mark.parametrize(
    "estimator",
    [
        GaussianMoERegressor(),
        GaussianMoERegressor(3, top_k=2, solver="lbfgs", activation="tanh", temperature="learned", max_iter=30),
        GaussianMoERegressor(3, top_k=1, covariance="tied", max_iter=50),
    ],
)
def test_scikit_learn_accepts_it(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(estimator, on_skip=None)


@pytest.mark.parametrize("solver", ["em", "lbfgs"])
def test_experts_are_found_from_clusters(solver):
    X, y = data(3000)
    found = GaussianMoERegressor(3, top_k=2, solver=solver, n_init=5, random_state=0, tol=1e-8).fit(X, y)
    order = np.argsort(found.intercept_)
    np.testing.assert_allclose(found.intercept_[order], [-2, 0, 2], atol=0.2)
    np.testing.assert_allclose(found.coef_[order, 0], [1, 0.5, -1.5], atol=0.3)
    np.testing.assert_allclose(found.scale_[order], [0.5, 0.6, 0.4], atol=0.1)
    assert found.converged_
    assert found.lower_bound_ == pytest.approx(found.log_prob(X, y).mean())
    assert found.score(X, y) > LinearRegression().fit(X, y).score(X, y) + 0.05
    np.testing.assert_allclose(found.gate(X).sum(1), 1)
    assert ((found.gate(X) > 0).sum(1) == 2).all()
    np.testing.assert_allclose(found.posterior(X, y).sum(1), 1)


def test_tied_experts_share_the_scale_and_the_lower_likelihood():
    X, y = data(1500)
    settings = {"top_k": 2, "init": TRUTH, "tol": 1e-9}
    plain, tied = (GaussianMoERegressor(3, covariance=name, **settings).fit(X, y) for name in ("per-expert", "tied"))
    assert len(set(tied.scale_)) == 1
    squares = np.square(y[:, None] - X @ tied.coef_.T - tied.intercept_)
    assert tied.scale_[0] ** 2 == pytest.approx((tied.posterior(X, y) * squares).sum(1).mean(), rel=1e-3)
    assert plain.lower_bound_ > tied.lower_bound_
    assert tied.lower_bound_ == pytest.approx(tied.log_prob(X, y).mean())


def test_units_do_not_matter():
    X, y = data(400)
    estimator = GaussianMoERegressor(3, top_k=2, random_state=0)
    plain, scaled = estimator.fit(X, y), clone(estimator).fit(1e3 * X, 50 * y - 7)
    np.testing.assert_allclose(scaled.predict(1e3 * X), 50 * plain.predict(X) - 7, rtol=1e-6)
    np.testing.assert_allclose(scaled.scale_, 50 * plain.scale_, rtol=1e-6)
    np.testing.assert_allclose(scaled.log_prob(1e3 * X, 50 * y - 7), plain.log_prob(X, y) - np.log(50), atol=1e-6)
    assert scaled.lower_bound_ == pytest.approx(plain.lower_bound_ - np.log(50))


def test_given_parameters_are_where_it_starts():
    X, y = data(400)
    held = GaussianMoERegressor(3, top_k=2, init=TRUTH, max_iter=1, tol=np.inf).fit(X, y)
    np.testing.assert_allclose(held.intercept_, TRUTH.intercept.numpy(), atol=0.4)
    several = MixtureParameters(*(torch.stack([value, value]) for value in TRUTH))
    np.testing.assert_allclose(
        GaussianMoERegressor(3, top_k=2, init=several).fit(X, y).coef_,
        GaussianMoERegressor(3, top_k=2, init=TRUTH).fit(X, y).coef_,
    )


def test_starts_are_compared_on_a_part_of_many_samples():
    X, y = data(3000)
    estimator = GaussianMoERegressor(3, top_k=2, n_init=4, random_state=0, screening_samples=500)
    all_of_them = clone(estimator).set_params(screening_samples=10_000).fit(X, y)
    assert estimator.fit(X, y).lower_bound_ == pytest.approx(all_of_them.lower_bound_, abs=1e-3)


def test_samples_are_distributed_as_the_model_says():
    X, y = data(1500)
    found = GaussianMoERegressor(3, top_k=2, n_init=3, random_state=0).fit(X, y)
    X = data(4000, seed=1)[0]
    drawn = found.sample(X, random_state=3)
    np.testing.assert_array_equal(drawn, found.sample(X, random_state=3))
    assert stats.ks_2samp(found.log_prob(X, drawn), found.log_prob(X, found.sample(X, random_state=4))).pvalue > 1e-3
    assert abs((drawn - found.predict(X)).mean()) < 0.1


def test_it_warns_when_it_did_not_converge():
    X, y = data(200)
    with pytest.warns(ConvergenceWarning, match="did not converge in 2 iterations"):
        GaussianMoERegressor(3, max_iter=2, tol=0.0, random_state=0).fit(X, y)


def test_bad_settings_are_told():
    X, y = data(20)
    for settings, message in (
        ({"n_experts": 0}, "n_experts is at least 1, got 0"),
        ({"n_experts": 21}, "n_samples=20 should be at least n_experts=21"),
        ({"top_k": 3}, "top_k=3"),
        ({"temperature": -1.0}, "temperature is positive or 'learned', got -1.0"),
        ({"temperature": "low"}, "got 'low'"),
        ({"init": "random"}, "init is 'kmeans' or"),
        ({"init": TRUTH}, "init has 3 experts and 1 features, expected 2 and 1"),
        ({"activation": "sine"}, "activation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianMoERegressor(**settings).fit(X, y)
