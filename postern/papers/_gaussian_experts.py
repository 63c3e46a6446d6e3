"""Experiments on rates: draw samples from a known mixture of experts, fit it from near the truth, measure errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from postern.claims import Run
from postern.experts import (
    GateKind,
    GaussianMixtureOfExperts,
    MixtureFit,
    MixtureParameters,
    Rate,
    SoftmaxGate,
    fit_mixture,
    fit_rate,
    hellinger_1d,
    theorem_exponents,
)

# The gain in the mean log-likelihood at which a fit ends. Where experts share a true one the likelihood is so flat that
# fits end between merged and separate copies, far from the maximum, if they end at gains of 1e-9.
TOLERANCE = 1e-13
# Between two fits, a gain in the mean log-likelihood above this is counted as another maximum; below it the same climb
# has ended a little earlier.
OTHER_MAXIMUM = 1e-9
# Copies of a true expert that are exactly equal move as one. Those of a start at the truth have noise of this standard
# deviation on each coordinate.
SPLIT_OF_TRUTH = 0.01
# The most outputs that a Hellinger distance is integrated over; narrow densities that reach far would want more.
MOST_OUTPUTS = 8001
# An expert that nowhere has more than this weight is left out of the choice of these outputs.
LEAST_WEIGHT = 1e-9

BLOCKS = ("gate_coef", "coef", "intercept", "variance")


@dataclass(frozen=True)
class World:
    """A true mixture, its gate, and where its inputs lie.

    Attributes:
        truth: the parameters.
        gate: how it weighs its experts.
        half_width: inputs are uniform in ``[-half_width, half_width]`` in each direction.
    """

    truth: MixtureParameters
    gate: SoftmaxGate
    half_width: float = 1.0

    def samples(self, count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw inputs and outputs."""
        x = torch.rand(count, self.truth.num_features, generator=generator, dtype=torch.float64)
        x = self.half_width * (2 * x - 1)
        return x.to(device), self.model().sample(x, generator).to(device)

    def model(self) -> GaussianMixtureOfExperts:
        """The true model."""
        return GaussianMixtureOfExperts.from_parameters(self.truth, self.gate).requires_grad_(False)

    def starts(
        self, copies: Sequence[int], count: int, noise: float, split: float, generator: torch.Generator
    ) -> MixtureParameters:
        """Points near the truth.

        Args:
            copies: for each fitted expert the true one that it starts at; the last is the reference of both gates.
            count: how many starts.
            noise: standard deviation of what is added to the coordinates of an expert that is fitted once.
            split: the same for those that share a true one, whose mass they share as well.
            generator: of the noise.
        """
        index = torch.tensor(copies)
        shared = torch.bincount(index, minlength=self.truth.num_experts)[index]
        scale = torch.where(shared > 1, split, noise).double()

        def near(value: Tensor, scale: Tensor) -> Tensor:
            return value + scale * torch.randn(count, *value.shape, generator=generator, dtype=torch.float64)

        truth = self.truth
        slopes = near(truth.gate_coef[index], scale[:, None])
        # what all experts share of the bias is free: the reference keeps its own, whatever its share of a mass
        share = truth.temperature * (shared[-1] / shared).log()
        biases = near(truth.gate_intercept[index] + share, scale)
        slopes[:, -1], biases[:, -1] = truth.gate_coef[-1], truth.gate_intercept[-1]
        return MixtureParameters(
            slopes,
            biases,
            near(truth.coef[index], scale[:, None]),
            near(truth.intercept[index], scale),
            near(truth.variance[index].log(), scale).exp(),
            truth.temperature.expand(count).clone(),
        )

    def hellinger(self, fitted: MixtureParameters, gate: SoftmaxGate) -> float:
        """Mean Hellinger distance between the fitted and the true density.

        Outputs to integrate over reach eight standard deviations beyond the means of both, in steps of an eighth of
        the smallest standard deviation, as long as these are at most `MOST_OUTPUTS`, else in as many steps.
        """
        d = self.truth.num_features
        if d == 1:  # midpoints, off the boundaries of a sparse gate
            x = torch.linspace(-1, 1, 201, dtype=torch.float64)[1::2, None]
        else:
            x = 2 * torch.rand(1000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
        x = self.half_width * x
        models = (GaussianMixtureOfExperts.from_parameters(fitted.to("cpu"), gate), self.model())
        return float(hellinger_1d(*models, x, _outputs(models, x)))


@torch.no_grad()
def _outputs(models: Sequence[GaussianMixtureOfExperts], x: Tensor) -> Tensor:
    """Equally spaced outputs that cover the densities at all inputs, see `World.hellinger`."""
    lows, highs, smallest = [], [], []
    for model in models:
        means, deviation = model.means(x), (0.5 * model.log_variances).exp()
        has_weight = model.log_weights(x).exp() > LEAST_WEIGHT
        lows.append((means - 8 * deviation)[has_weight].min())
        highs.append((means + 8 * deviation)[has_weight].max())
        smallest.append(deviation[has_weight.any(dim=0)].min())
    low, high = min(lows).item(), max(highs).item()
    count = min(MOST_OUTPUTS, 1 + math.ceil((high - low) / (0.125 * min(smallest).item())))
    return torch.linspace(low, high, count, dtype=torch.float64)


def drawn_world(num_experts: int, num_features: int, top_k: int | None) -> World:
    """A mixture in more dimensions, drawn once and for all; neighbours differ by two in their intercepts."""
    g = torch.Generator().manual_seed(num_experts * 1000 + num_features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    slopes, biases = 2 * normal(num_experts, num_features), 0.3 * normal(num_experts)
    slopes[-1], biases[-1] = 0.0, 0.0
    intercepts = 2 * torch.arange(num_experts, dtype=torch.float64) - num_experts + 1
    variances = 0.15 + 0.25 * torch.rand(num_experts, generator=g, dtype=torch.float64)
    coefs = normal(num_experts, num_features) / num_features**0.5
    return World(MixtureParameters(slopes, biases, coefs, intercepts, variances), SoftmaxGate(top_k))


def fit_to_the_end(
    x: Tensor,
    y: Tensor,
    starts: MixtureParameters,
    gate: SoftmaxGate,
    *,
    learns_temperature: bool = False,
    gate_penalty: float = 0.0,
) -> MixtureFit:
    """The likeliest of the fits from all starts, by L-BFGS: it ends where EM does, after fewer passes."""
    fits = fit_mixture(
        x,
        y,
        starts.to(x.device),
        gate,
        solver="lbfgs",
        learns_temperature=learns_temperature,
        tol=TOLERANCE,
        gate_penalty=gate_penalty,
    )
    return fits.best()


class Fits:
    """Fits from near the truth and, beside each, one from the truth itself. The likelier counts.

    Attributes:
        gains: what the start at the truth gained in the mean log-likelihood; negative where it ended lower.
    """

    def __init__(self) -> None:
        self.gains: list[float] = []

    def best(
        self,
        x: Tensor,
        y: Tensor,
        near: MixtureParameters,
        at: MixtureParameters,
        gate: SoftmaxGate,
        *,
        learns_temperature: bool = False,
    ) -> MixtureFit:
        """The likelier of the fits from near the truth and from the truth."""
        found, from_truth = (
            fit_to_the_end(x, y, starts, gate, learns_temperature=learns_temperature) for starts in (near, at)
        )
        self.gains.append(float(from_truth.log_likelihood - found.log_likelihood))
        return from_truth if self.gains[-1] > 0 else found

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """The share of fits whose likeliest end was found from the truth alone, and the most that this gained.

        Args:
            prefix: of the metrics' names.
        """
        won = [gain for gain in self.gains if gain > OTHER_MAXIMUM]
        found = {"truth_start_share": len(won) / len(self.gains), "missed_likelihood": max(won, default=0.0)}
        return {prefix + name: value for name, value in found.items()}


def exponents_by_block(num_copies: int = 2, gate: GateKind = "linear", suffix: str = "") -> dict[str, float]:
    """The theorems' exponents for the errors that `Errors.add_by_block` adds."""
    kinds = {"copies": theorem_exponents(num_copies, gate), "single": theorem_exponents(1)}
    return {f"{kind}_{name}{suffix}": exponent for kind, found in kinds.items() for name, exponent in found.items()}


class Errors:
    """Errors of all replicates at all sample sizes, by name."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.found: dict[str, dict[int, list[float]]] = {}

    def add(self, name: str, size: int, value: float) -> None:
        """Add one replicate. What is not told from zero counts as the spacing of floating-point numbers."""
        self.found.setdefault(name, {}).setdefault(size, []).append(max(value, float(np.finfo(np.float64).eps)))

    def add_by_block(
        self, size: int, fitted: MixtureParameters, truth: MixtureParameters, copies: Sequence[int], suffix: str = ""
    ) -> None:
        """Add the mean distance of copies to the expert that they start at, and that of the experts fitted once.

        The gate's slope of the true reference is zero by convention and says nothing where it is fitted once.

        Args:
            size: of the data set.
            fitted: one mixture.
            truth: the true one.
            copies: for each fitted expert the true one that it starts at.
            suffix: of the errors' names.
        """
        index = torch.tensor(copies)
        is_copy = torch.bincount(index)[index] > 1
        for name in BLOCKS:
            distance = (getattr(fitted, name) - getattr(truth, name)[index]).reshape(len(index), -1).norm(dim=-1)
            self.add(f"copies_{name}{suffix}", size, float(distance[is_copy].mean()))
            is_told = ~is_copy & (index < truth.num_experts - 1) if name == "gate_coef" else ~is_copy
            if is_told.any():
                self.add(f"single_{name}{suffix}", size, float(distance[is_told].mean()))

    def medians(self, name: str) -> dict[int, float]:
        """Median over the replicates, by sample size."""
        return {size: float(np.median(self.found[name][size])) for size in self.sizes}

    def rate(self, name: str) -> Rate:
        """The power law of the medians."""
        return fit_rate(self.sizes, np.array([self.found[name][size] for size in self.sizes]).T)

    def slopes(self) -> dict[str, float]:
        """One metric for the slope of each error."""
        return {f"{name}_slope": self.rate(name).slope for name in self.found}

    def last(self) -> dict[str, float]:
        """One metric for the median of each error at the largest sample size."""
        return {f"{name}_last": self.medians(name)[self.sizes[-1]] for name in self.found}

    def rows(self, exponents: Mapping[str, float | str]) -> list[dict[str, float | str]]:
        """Rows of a table: errors by sample size, the slope with its interval, and the theorem's exponent."""
        rows = []
        for name in self.found:
            rate = self.rate(name)
            rows.append(
                {"error": name.replace("_", " ")}
                | {f"n = {size:,}": value for size, value in self.medians(name).items()}
                | {
                    "slope": rate.slope,
                    "95 % interval": "{:.2f} to {:.2f}".format(*rate.interval),
                    "theorem": exponents.get(name, "none"),
                }
            )
        return rows

    def in_words(self) -> str:
        """The slopes."""
        return ", ".join(f"{name.replace('_', ' ')} {self.rate(name).slope:.2f}" for name in self.found) + "."

    def draw(self, title: str) -> Figure:
        """All errors against the sample size, with the slope of the parametric rate beside them."""
        figure = Figure(figsize=(5.5, 3.8))
        axes = figure.add_subplot()
        sizes = np.array(self.sizes, dtype=np.float64)
        highest = 0.0
        for name in self.found:
            medians = self.medians(name)
            axes.loglog(list(medians), list(medians.values()), marker="o", label=name.replace("_", " "))
            highest = max(highest, medians[self.sizes[0]])
        guide = highest * (sizes / sizes[0]) ** -0.5
        axes.loglog(sizes, guide, color="grey", linewidth=0.8, linestyle=":", label="n^-1/2")
        axes.set_xlabel("samples")
        axes.set_ylabel(title)
        axes.legend(fontsize="small")
        figure.tight_layout()
        return figure


def replicates(
    run: Run, world: World, sizes: Sequence[int], count: int, label: str = "data sets"
) -> Iterator[tuple[int, int, Tensor, Tensor, torch.Generator]]:
    """Independent data sets of each size: (replicate, size, x, y, generator of the starts)."""
    jobs = [(replicate, size) for replicate in range(count) for size in sizes]
    for replicate, size in run.progress(jobs, label):
        generator = run.generator(replicate * 1000 + sizes.index(size))
        x, y = world.samples(size, generator, run.device)
        yield replicate, size, x, y, generator
