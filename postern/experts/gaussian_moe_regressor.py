"""A scikit-learn regressor: a Gaussian mixture of experts by maximum likelihood.

Papers: arXiv 2309.13850 (top-K gates) and 2401.13875 (gates with a temperature and an activation).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from postern.experts.gate_activation import SIGMOID_TEMPERATURE, Activation
from postern.experts.gaussian_moe import Covariance, GaussianMixtureOfExperts, MixtureParameters, SoftmaxGate
from postern.experts.gaussian_moe_fit import MixtureFit, Solver, fit_mixture
from postern.experts.topk_softmax import SelectOn

_ROWS = 65_536  # that predictions hold at a time


class GaussianMoERegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    r"""``p(y|x) = sum_i w_i(x) N(y; a_i . x + b_i, sigma_i)``, fitted by maximum likelihood.

    The gate is ``w(x) = softmax(TopK((phi(beta1 . x) + beta0) / tau))``.

    `predict` gives the mean of ``y``, `score` its ``R^2`` as for any regressor, `log_prob` the log-density, and
    `sample` draws ``y``. Columns are scaled by their standard deviations and ``y`` is standardised before the fit, and
    the parameters scaled back: settings are in those units. Inputs are not centred, as this would change which experts
    a sparse gate keeps.

    Args:
        n_experts: ``k``.
        top_k: how many experts the gate keeps; all if None. With ``s`` spare experts raise it by ``s``.
        select_on: "score" or "score+bias"; see `SoftmaxGate`.
        activation: ``phi``, a name in ``ACTIVATIONS`` or an elementwise function; the identity if None.
        temperature: ``tau``, a positive number or "learned". With linear scores a learnt one means nothing.
        covariance: "per-expert": each expert has a variance; "tied": all have the same. Outputs are numbers, for which
            full, diagonal and spherical covariances are one and the same.
        solver: "em" or "lbfgs"; see `fit_mixture`.
        init: "kmeans": clusters of inputs and residuals, by k-means++; or parameters to start from, in the data's
            units, with a leading axis for several starts.
        n_init: number of starts with "kmeans", of which the likeliest is kept.
        max_iter: largest number of iterations of a start.
        tol: gain in the mean log-likelihood below which a start has converged.
        gate_penalty: of the gate's coordinates; see `fit_mixture`. With well separated data the likelihood has no
            maximum in the gate without it.
        min_variance: smallest variance of an expert, as a share of that of ``y``.
        screening_samples: with more samples than this the starts are compared on as many, drawn at random, and only the
            best goes on with all.
        chunk_size: samples at a time; chosen by the sizes if None.
        device: where the fit computes, "cpu" or a CUDA device.
        random_state: seed or generator of the starts.

    Attributes:
        model_: the `GaussianMixtureOfExperts`, on the CPU.
        coef_: slopes of the experts, experts by features.
        intercept_: intercepts of the experts.
        scale_: standard deviations of the experts.
        gate_coef_: slopes of the gate; the last row is zero.
        gate_intercept_: biases of the gate; the last is zero.
        temperature_: ``tau``.
        lower_bound_: mean log-likelihood of the training samples.
        n_iter_: iterations of the best start.
        converged_: whether it converged.
        n_features_in_: number of features.
    """

    model_: GaussianMixtureOfExperts
    n_features_in_: int

    def __init__(
        self,
        n_experts: int = 2,
        *,
        top_k: int | None = None,
        select_on: SelectOn = "score",
        activation: str | Activation | None = None,
        temperature: float | Literal["learned"] = 1.0,
        covariance: Covariance = "per-expert",
        solver: Solver = "em",
        init: Literal["kmeans"] | MixtureParameters = "kmeans",
        n_init: int = 1,
        max_iter: int = 500,
        tol: float = 1e-6,
        gate_penalty: float = 0.0,
        min_variance: float = 1e-6,
        screening_samples: int = 20_000,
        chunk_size: int | None = None,
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        self.n_experts = n_experts
        self.top_k = top_k
        self.select_on = select_on
        self.activation = activation
        self.temperature = temperature
        self.covariance = covariance
        self.solver = solver
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.gate_penalty = gate_penalty
        self.min_variance = min_variance
        self.screening_samples = screening_samples
        self.chunk_size = chunk_size
        self.device = device
        self.random_state = random_state

    def fit(self, X: Float[np.ndarray, "samples features"], y: Float[np.ndarray, " samples"]) -> Self:
        """Maximise the likelihood.

        Args:
            X: finite inputs, at least one sample an expert.
            y: finite outputs.

        Raises:
            ValueError: bad samples, fewer of them than experts, or a setting out of range.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = y.astype(np.float64)
        self._check_settings(len(y))
        rng = check_random_state(self.random_state)
        x_scale, y_mean, y_scale = X.std(axis=0), y.mean(), y.std()
        x_scale[x_scale < 1e-12 * np.abs(X).max(axis=0)] = 1.0
        x_scale[x_scale == 0] = 1.0
        y_scale = y_scale if y_scale > 0 else 1.0
        scales = (torch.from_numpy(x_scale), float(y_mean), float(y_scale))
        features = torch.from_numpy(X / x_scale).to(self.device)
        target = torch.from_numpy((y - y_mean) / y_scale).to(self.device)
        subset = None
        if len(y) > self.screening_samples:
            subset = np.sort(rng.choice(len(y), self.screening_samples, replace=False))
        screened, answers = (features, target) if subset is None else (features[subset], target[subset])
        if isinstance(self.init, MixtureParameters):
            starts = _scaled(self.init.to(device="cpu", dtype=torch.float64), *scales)
            starts = starts if starts.variance.dim() == 2 else starts[None]
        else:
            starts = self._starts(screened.cpu().numpy(), answers.cpu().numpy(), rng)
        if subset is not None and len(starts.variance) > 1:
            starts = self._fitted(screened, answers, starts).best().parameters[None]
        fit = self._fitted(features, target, starts).best()
        if not fit.has_converged:
            warnings.warn(
                f"{self.solver} did not converge in {int(fit.num_iterations)} iterations: raise max_iter or tol, or "
                "set gate_penalty",
                ConvergenceWarning,
                stacklevel=2,
            )
        self._keep(fit, scales)
        return self

    def predict(self, X: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, " samples"]:
        """``E[y|x]``."""
        return np.concatenate([self.model_.predict_mean(x).numpy() for x in self._batches(X)])

    def gate(self, X: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, "samples experts"]:
        """``w_i(x)``, zero for experts that are not kept."""
        return np.concatenate([self.model_.log_weights(x).exp().numpy() for x in self._batches(X)])

    def posterior(
        self, X: Float[np.ndarray, "samples features"], y: Float[np.ndarray, " samples"]
    ) -> Float[np.ndarray, "samples experts"]:
        """``P(expert i | x, y)``."""
        X, y = self._validated(X, y)
        return np.concatenate([self.model_.posterior(*each).numpy() for each in _rows(X, y)])

    def log_prob(
        self, X: Float[np.ndarray, "samples features"], y: Float[np.ndarray, " samples"]
    ) -> Float[np.ndarray, " samples"]:
        """``log p(y|x)``."""
        X, y = self._validated(X, y)
        return np.concatenate([self.model_.log_prob(*each).numpy() for each in _rows(X, y)])

    def sample(
        self, X: Float[np.ndarray, "samples features"], random_state: Any = None
    ) -> Float[np.ndarray, " samples"]:
        """Draw one ``y`` for each input.

        Args:
            X: inputs.
            random_state: seed or generator of the draws.
        """
        seed = check_random_state(random_state).randint(2**31 - 1)
        generator = torch.Generator().manual_seed(int(seed))
        return np.concatenate([self.model_.sample(x, generator).numpy() for x in self._batches(X)])

    def _check_settings(self, samples: int) -> None:
        whole = {"n_experts": self.n_experts, "n_init": self.n_init, "screening_samples": self.screening_samples}
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"{name} is at least 1, got {value}")
        if samples < self.n_experts:
            raise ValueError(f"n_samples={samples} should be at least n_experts={self.n_experts}")
        if self.temperature != "learned" and (isinstance(self.temperature, str) or not self.temperature > 0):
            raise ValueError(f"temperature is positive or 'learned', got {self.temperature!r}")
        if isinstance(self.init, MixtureParameters):
            if self.init.num_experts != self.n_experts or self.init.num_features != self.n_features_in_:
                raise ValueError(
                    f"init has {self.init.num_experts} experts and {self.init.num_features} features, expected "
                    f"{self.n_experts} and {self.n_features_in_}"
                )
        elif self.init != "kmeans":
            raise ValueError(f"init is 'kmeans' or MixtureParameters, got {self.init!r}")

    @property
    def _gate(self) -> SoftmaxGate:
        return SoftmaxGate(self.top_k, self.activation, self.select_on)

    def _fitted(self, features: Tensor, target: Tensor, starts: MixtureParameters) -> MixtureFit:
        return fit_mixture(
            features,
            target,
            starts,
            self._gate,
            solver=self.solver,
            learns_temperature=self.temperature == "learned",
            covariance=self.covariance,
            max_iter=self.max_iter,
            tol=self.tol,
            gate_penalty=self.gate_penalty,
            min_variance=self.min_variance,
            chunk_size=self.chunk_size,
        )

    def _starts(self, features: np.ndarray, target: np.ndarray, rng: np.random.RandomState) -> MixtureParameters:
        """Clusters of inputs and residuals, and what their members say of gate and experts."""
        design = np.column_stack([features, np.ones(len(features))])
        residual = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
        spread = residual.std()
        points = np.column_stack([features - features.mean(axis=0), residual / (spread if spread > 0 else 1.0)])
        # a learnt one starts where a sigmoid needs it; linear scores have the same gate with any
        tau = SIGMOID_TEMPERATURE if self.temperature == "learned" else float(self.temperature)
        starts = []
        for index in range(self.n_init):
            seed = rng.randint(2**31 - 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than experts
                labels = KMeans(self.n_experts, n_init=1, random_state=seed).fit(points).labels_
            start = _from_clusters(features, target, labels, self.n_experts)
            # a gate that keeps the wrong experts seldom finds out by itself
            noise = 0.0 if index == 0 else 1.0
            slopes = tau * (start[0] + noise * rng.normal(size=start[0].shape))
            starts.append((slopes - slopes[-1], tau * (start[1] - start[1][-1]), *start[2:], np.array(tau)))
        return MixtureParameters(*(torch.from_numpy(np.stack(part)) for part in zip(*starts, strict=True)))

    def _keep(self, fit: MixtureFit, scales: tuple[Tensor, float, float]) -> None:
        x_scale, y_mean, y_scale = scales
        mixture = _scaled(fit.parameters.to("cpu"), 1 / x_scale, -y_mean / y_scale, 1 / y_scale)
        model = GaussianMixtureOfExperts.from_parameters(mixture, self._gate, covariance=self.covariance)
        self.model_ = model.requires_grad_(False)
        self.coef_, self.intercept_ = mixture.coef.numpy(), mixture.intercept.numpy()
        self.scale_ = mixture.variance.sqrt().numpy()
        self.gate_coef_, self.gate_intercept_ = mixture.gate_coef.numpy(), mixture.gate_intercept.numpy()
        self.temperature_ = float(mixture.temperature)
        self.lower_bound_ = float(fit.log_likelihood) - float(np.log(y_scale))
        self.n_iter_ = int(fit.num_iterations)
        self.converged_ = bool(fit.has_converged)

    def _validated(self, X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        check_is_fitted(self)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, reset=False)
        return X, y.astype(np.float64)

    def _batches(self, X: np.ndarray) -> Iterator[Tensor]:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return (rows[0] for rows in _rows(X))


def _rows(*arrays: np.ndarray) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(arrays[0]), _ROWS):
        yield tuple(torch.from_numpy(np.ascontiguousarray(array[start : start + _ROWS])) for array in arrays)


def _scaled(mixture: MixtureParameters, x_scale: Tensor, y_mean: float, y_scale: float) -> MixtureParameters:
    """The mixture of ``(y - y_mean) / y_scale`` given ``x / x_scale``."""
    return MixtureParameters(
        mixture.gate_coef * x_scale,
        mixture.gate_intercept,
        mixture.coef * x_scale / y_scale,
        (mixture.intercept - y_mean) / y_scale,
        mixture.variance / y_scale**2,
        mixture.temperature,
    )


def _from_clusters(
    features: np.ndarray, target: np.ndarray, labels: np.ndarray, num_experts: int
) -> tuple[np.ndarray, ...]:
    """Gate by linear discriminants of the clusters, experts by ridge regression on their members."""
    num_features = features.shape[1]
    design = np.column_stack([features, np.ones(len(features))])
    share = np.bincount(labels, minlength=num_experts) / len(labels)
    centres, expert = np.zeros((num_experts, num_features)), np.zeros((num_experts, num_features + 1))
    variance = np.ones(num_experts)
    within = 0.1 * np.eye(num_features)
    for i in range(num_experts):
        members = labels == i
        rows, values = design[members], target[members]
        if len(rows):
            centres[i] = rows[:, :-1].mean(axis=0)
            centred = rows[:, :-1] - centres[i]
            within += centred.T @ centred / len(labels)
            gram = rows.T @ rows / len(rows) + 1e-3 * np.eye(num_features + 1)
            expert[i] = np.linalg.solve(gram, rows.T @ values / len(rows))
            variance[i] = np.square(values - rows @ expert[i]).mean()
    slopes = np.linalg.solve(within, centres.T).T
    biases = np.log(np.maximum(share, 1 / len(labels))) - 0.5 * (slopes * centres).sum(axis=1)
    return slopes, biases, expert[:, :-1], expert[:, -1], np.maximum(variance, 1e-2)
