"""Fits of Gaussian mixtures of experts: an iteration of EM, a gradient, and a million samples.

    python -m benchmarks.gaussian_experts [--threads N] [--seconds S]

EM stands beside that of scikit-learn's `GaussianMixture` with full covariances on inputs and outputs together, which
has no gate. Both run five iterations from the same clusters. The gradient stands beside autograd on the same model,
whose value and gradient are compared first.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from benchmarks._tables import Row, best_times, place, record
from postern.experts import (
    GaussianMixtureOfExperts,
    GaussianMoERegressor,
    MixtureParameters,
    SoftmaxGate,
    fit_mixture,
)
from postern.experts._likelihood import Coordinates, Likelihood

# samples, inputs, experts, kept experts
SIZES = [(1000, 1, 3, 2), (100_000, 1, 3, 2), (100_000, 10, 8, 2), (100_000, 10, 8, 8)]
ITERATIONS = 5
MILLION = (1_000_000, 10, 4, 2)


def drawn(d: int, k: int) -> MixtureParameters:
    g = torch.Generator().manual_seed(0)
    slopes = 2 * torch.randn(k, d, generator=g, dtype=torch.float64)
    slopes[-1] = 0
    intercepts = 2 * torch.arange(k, dtype=torch.float64) - k + 1
    coefs = torch.randn(k, d, generator=g, dtype=torch.float64) / d**0.5
    return MixtureParameters(slopes, torch.zeros(k), coefs, intercepts, torch.full((k,), 0.3, dtype=torch.float64))


def samples(n: int, truth: MixtureParameters, gate: SoftmaxGate) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = 2 * torch.rand(n, truth.num_features, generator=g, dtype=torch.float64) - 1
    return x, GaussianMixtureOfExperts.from_parameters(truth, gate).sample(x, g)


def iterations(n: int, d: int, k: int, kept: int, seconds: float) -> tuple[Row, Row]:
    truth, gate = drawn(d, k), SoftmaxGate(kept)
    x, y = samples(n, truth, gate)
    joint = np.column_stack([x.numpy(), y.numpy()])
    means = np.random.default_rng(0).choice(joint, k, replace=False)
    mixture = GaussianMixture(
        k, max_iter=ITERATIONS, tol=0, means_init=means, weights_init=np.full(k, 1 / k), init_params="random_from_data"
    )
    names = {"fit_mixture": fit_mixture, "x": x, "y": y, "start": truth, "gate": gate, "n": ITERATIONS}
    names |= {"mixture": mixture, "joint": joint}
    times = best_times(
        {"ours": "fit_mixture(x, y, start, gate, max_iter=n, tol=0)", "peer": "mixture.fit(joint)"}, seconds, names
    )
    sizes: Row = {"samples": f"{n:,}", "inputs": str(d), "experts": str(k), "kept": str(kept)}
    em = sizes | {
        "EM, ms": 1e3 * times["ours"] / ITERATIONS,
        "GaussianMixture, ms": 1e3 * times["peer"] / ITERATIONS,
        "ratio": times["peer"] / times["ours"],
    }

    coordinates = Coordinates(k, d, False)
    flat = coordinates.flatten(truth)[None]
    likelihood = Likelihood(x, y, gate, coordinates, truth)
    model = GaussianMixtureOfExperts.from_parameters(truth, gate)

    def autograd() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        value = model(x, y).mean()
        value.backward()
        return value.item(), model.intercept.grad

    value, gradient = likelihood.value_and_gradient(flat)
    np.testing.assert_allclose(value.item(), autograd()[0], rtol=1e-10)
    np.testing.assert_allclose(coordinates.split(gradient)[1][0, :, -1], autograd()[1], atol=1e-10)
    calls = {"ours": "likelihood.value_and_gradient(flat)", "peer": "autograd()"}
    times = best_times(calls, seconds, {"likelihood": likelihood, "flat": flat, "autograd": autograd})
    return em, sizes | {
        "one pass, ms": 1e3 * times["ours"],
        "autograd, ms": 1e3 * times["peer"],
        "ratio": times["peer"] / times["ours"],
    }


def million() -> Row:
    """A whole fit from clusters, and what it adds to the memory in use."""
    n, d, k, kept = MILLION
    truth, gate = drawn(d, k), SoftmaxGate(kept)
    x, y = (each.numpy() for each in samples(n, truth, gate))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    fitted = GaussianMoERegressor(k, top_k=kept, n_init=5, random_state=0).fit(x, y)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = GaussianMixtureOfExperts.from_parameters(truth, gate).requires_grad_(False)
    at_truth = model(torch.from_numpy(x), torch.from_numpy(y)).mean().item()
    return {
        "samples": f"{n:,}",
        "inputs": str(d),
        "experts": str(k),
        "kept": str(kept),
        "seconds": seconds,
        "iterations": str(fitted.n_iter_),
        "MiB of samples": (x.nbytes + y.nbytes) / 2**20,
        "MiB more at the peak": (after - before) / 2**10,
        "log-likelihood": f"{fitted.lower_bound_:.4f}",
        "at the truth": f"{at_truth:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each row of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # that five iterations are not enough
    with threadpool_limits(arguments.threads):
        whole = million()
        rows = [iterations(*sizes, arguments.seconds) for sizes in SIZES]
    where = place(torch.device("cpu"))
    record(
        "gaussian_experts",
        "Gaussian mixtures of experts against a mixture without a gate, and against autograd",
        {
            f"An iteration of EM, {where}": [em for em, _ in rows],
            f"Log-likelihood and gradient, {where}": [gradient for _, gradient in rows],
            f"A million samples from five starts, {where}": [whole],
        },
    )


if __name__ == "__main__":
    main()
