"""What a temperature in the gate does to the statistics of a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import torch
from matplotlib.figure import Figure

from postern.claims import AllOf, AtLeast, AtMost, Metrics, Paper, Run, Within
from postern.experts import (
    GaussianMixtureOfExperts,
    IdentifiabilityReport,
    MixtureParameters,
    SoftmaxGate,
    identifiability_report,
    theorem_exponents,
)
from postern.papers._gaussian_experts import Errors, World, drawn_world, fit_to_the_end, replicates

PAPER = Paper(
    slug="temperature-gmoe",
    title="Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
    date=date(2024, 1, 24),
    arxiv="2401.13875",
    authors=3,
    family="experts",
    summary=(
        "Gates that go from dense to sparse divide their scores by a temperature, large at first and small later. "
        "In a Gaussian mixture of experts that temperature is entangled with the slopes of the gate, so that "
        "parameters may be learnt slower than any power of the sample size although the density is learnt fast. "
        "Passing the score through a non-linear activation before the temperature breaks the tie. Users get a gate "
        "whose temperature can be identified, and a diagnostic that tells which activations work."
    ),
    reported=(
        "Dense-to-sparse gate with linear scores: parameter estimates may converge as slowly as 1/log n (theorem).",
        "With an activation that meets the independence conditions, rates are polynomial, n^-1/2 when the number "
        "of experts is right (theorem).",
        "The density is learnt at n^-1/2 with either gate (theorem).",
    ),
    components=(
        "postern.experts.GaussianMixtureOfExperts",
        "postern.experts.GaussianMoERegressor",
        "postern.experts.temperature_softmax_gate",
        "postern.experts.TemperatureGate",
        "postern.experts.DenseToSparseRouter",
        "postern.experts.LinearTemperatureSchedule",
        "postern.experts.fit_mixture",
        "postern.experts.fisher_information",
        "postern.experts.identifiability_report",
        "postern.experts.activation_independence_rank",
        "postern.experts.dense_to_sparse_loss",
        "postern.experts.hellinger_1d",
        "postern.experts.fit_rate",
    ),
    details=(
        "With linear scores, slopes, biases and temperature times one number give the same gate. So only the ratios to "
        "the temperature can be learnt, whatever the number of samples: schedule a temperature, do not learn it.",
        "The same symmetry, with the activation's degree as its power, remains for every positively homogeneous "
        "activation: ReLU, leaky ReLU, the absolute value, powers. Holding one expert's row at zero does not end it; "
        "holding it at another value does for ReLU.",
        "tanh, sin, sigmoid, GELU, SiLU and softplus have no such symmetry, but differ in how well they are "
        "conditioned: the smallest eigenvalue of the information spans two orders of magnitude among them.",
        "A sigmoid's scores lie in (0, 1), so that at temperature 1 no expert gets e times the weight of another with "
        "the same bias. Start well below 1.",
        "The logarithm of the temperature is fitted, between log 0.01 and log 100.",
        "Weight decay or a penalty on the gate makes the linear gate converge, to the representative that the penalty "
        "prefers. That is not the truth.",
    ),
    differences=(
        "A reconstruction from the abstract and a public summary; the paper's own pages were not available. That the "
        "interaction of temperature and slopes is an exact symmetry follows from it.",
        "A rate of 1/log n is a statement on the worst case, over all truths. The claims show the mechanism, that "
        "nothing is learnt along the symmetry.",
        "The model is fitted by L-BFGS from near the truth, and nothing pulls it towards the truth's scale.",
    ),
    example="""import torch

from postern.experts import GaussianMixtureOfExperts, MixtureParameters, SoftmaxGate, identifiability_report

truth = MixtureParameters(
    gate_coef=[[2.0, -1.0], [0.0, 0.0]], gate_intercept=[0.3, 0.0], temperature=0.5,
    coef=[[1.0, 0.5], [-1.0, 0.8]], intercept=[1.0, -1.0], variance=[0.3, 0.5],
)
generator = torch.Generator().manual_seed(0)
x = 2 * torch.rand(4000, 2, generator=generator, dtype=torch.float64) - 1
for activation in ("identity", "relu", "tanh"):
    gate = SoftmaxGate(activation=activation)
    model = GaussianMixtureOfExperts.from_parameters(truth, gate, learns_temperature=True)
    report = identifiability_report(model, x, model.sample(x, generator))
    print(f"{activation:8} rank {report.rank} of {len(report.names)}", *report.directions())
""",
)

SINGULAR = ("identity", "relu", "square")
REGULAR = ("sigmoid", "tanh", "sin")
WEAKLY_REGULAR = ("gelu", "silu", "softplus")

# Inputs are uniform in [-1, 1]^2; the second row of the gate is held at zero.
TWO_FEATURES = MixtureParameters(
    [[2.0, -1.0], [0.0, 0.0]], [0.3, 0.0], [[1.0, 0.5], [-1.0, 0.8]], [1.0, -1.0], [0.3, 0.5], 0.5
)
# Inputs are uniform in [-2, 2].
ONE_FEATURE = MixtureParameters([[2.0], [0.0]], [0.3, 0.0], [[1.0], [-1.0]], [1.0, -1.0], [0.16, 0.25], 0.5)


@dataclass(frozen=True)
class Information:
    """Samples that the Fisher information is measured on."""

    samples: int = 4000


@dataclass(frozen=True)
class Study:
    """Sample sizes, and how often each is drawn for a seed."""

    sizes: tuple[int, ...]
    replicates: int  # data sets of each size
    starts: int = 1
    noise: float = 0.3  # standard deviation of a start around the truth
    penalty: float = 1e-3  # of the gate, in the arm that is regularised
    features: int = 1  # inputs; with more than one the true mixture is drawn
    experts: int = 2  # of a drawn mixture

    def world(self, activation: str) -> World:
        """The true mixture, its gate with an activation."""
        gate = SoftmaxGate(activation=None if activation == "identity" else activation)
        if self.features == 1:
            return World(ONE_FEATURE, gate, 2.0)
        drawn = drawn_world(self.experts, self.features, None).truth
        return World(replace(drawn, temperature=torch.tensor(0.5, dtype=torch.float64)), gate, 2.0)


SMOKE = Study((500, 2000), 2)
SMALL = Study((1000, 4000, 16_000, 64_000), 20)
FULL = Study((10_000, 100_000, 1_000_000), 10, features=8, experts=4)
STUDIES = {"smoke": SMOKE, "small": SMALL, "full": FULL}
DENSITIES = STUDIES | {"small": replace(SMALL, replicates=4)}


# -- the claims -------------------------------------------------------------------------------------------------------


@PAPER.claim(
    "The Fisher information loses exactly one direction with the identity, ReLU or the square, and none with tanh, "
    "sigmoid or the sine.",
    reported="Linear scores interact with the temperature; activations that meet independence conditions do not.",
    holds_when=AllOf(
        *(Within(f"null_directions_{name}", 1, 1) for name in SINGULAR),
        *(AtLeast(f"smallest_{name}", 1e-5) for name in REGULAR),
    ),
    scales={"smoke": Information(), "small": Information(), "full": Information(1_000_000)},
    seeds=10,
    gpu=(),
    note=(
        "Twelve free coordinates, two experts of two inputs; an eigenvalue below 1e-10 counts as a lost direction, the "
        "largest is about two. The direction is that of slopes, bias and the logarithm of the temperature growing "
        "together."
    ),
)
def information_is_singular(config: Information, run: Run) -> Metrics:
    """Measure the Fisher information at the truth, for each activation."""
    metrics: dict[str, float] = {}
    rows, spectra = [], {}
    for stream, name in enumerate(run.progress((*SINGULAR, *REGULAR, *WEAKLY_REGULAR), "activations")):
        report = _information(name, config.samples, run.generator(stream))
        values = report.eigenvalues
        spectra[name] = values.numpy()
        metrics[f"null_directions_{name}"] = int((values < 1e-10).sum())
        metrics[f"smallest_{name}"] = float(values[0])
        rows.append(
            {
                "activation": name,
                "smallest": float(values[0]),
                "second": float(values[1]),
                "largest": float(values[-1]),
                "direction lost": "; ".join(
                    ", ".join(f"{key} {value:+.3f}" for key, value in direction.items())
                    for direction in report.directions()
                )
                or "none",
            }
        )
    run.table("eigenvalues of the Fisher information", rows)
    run.figure(
        "spectra",
        _spectra(spectra),
        "Eigenvalues of the Fisher information by activation. Smallest: "
        + ", ".join(f"{name} {values[0]:.1e}" for name, values in spectra.items()),
    )
    return metrics


@PAPER.claim(
    "A linear gate does not recover slope and temperature, only their ratio; with tanh or sigmoid both converge like "
    "n^-1/2.",
    reported="Slower than any power of n with linear scores, n^-1/2 with a suitable activation (theorems).",
    holds_when=AllOf(
        AtLeast("identity_gate_coef_slope", -0.3),
        AtLeast("identity_temperature_slope", -0.3),
        AtMost("identity_ratio_slope", -0.4),
        *(
            Within(f"{name}_{error}_slope", -0.75, -0.3)
            for name in ("tanh", "sigmoid")
            for error in ("gate_coef", "temperature")
        ),
    ),
    scales=STUDIES,
    seeds=10,
    note=(
        "Slopes of log median error on log n. Fits start at the truth plus noise and are not regularised; beside them "
        "is a linear gate with a small penalty, which converges to the representative that the penalty prefers. The "
        "paper's 1/log n is a statement on the worst truth; this shows that nothing is learnt along the symmetry."
    ),
)
def linear_gates_learn_no_temperature(config: Study, run: Run) -> Metrics:
    """Fit gates with a learnt temperature at growing sample sizes: linear, tanh and sigmoid."""
    errors = Errors(config.sizes)
    for name in ("identity", "tanh", "sigmoid"):
        _measure(config, run, name, name, errors)
    _measure(config, run, "identity", "penalised", errors, config.penalty)
    exponents = {f"{name}_{error}": -0.5 for name in ("tanh", "sigmoid") for error in theorem_exponents(1)}
    exponents |= {f"{name}_{error}": -0.5 for name in ("tanh", "sigmoid") for error in ("temperature", "ratio")}
    _show(run, errors, exponents | {"identity_ratio": -0.5})
    return errors.slopes() | errors.last()


@PAPER.claim(
    "Homogeneous activations, ReLU and leaky ReLU, recover slope and temperature no better than a linear gate.",
    reported="Not reported: follows from the independence conditions.",
    holds_when=AllOf(
        *(
            AtLeast(f"{name}_{error}_slope", -0.3)
            for name in ("relu", "leaky_relu")
            for error in ("gate_coef", "temperature")
        )
    ),
    scales=STUDIES,
    seeds=10,
    note="Non-linear, and yet of no help: the symmetry needs no more than phi(c z) = c phi(z) for c > 0.",
)
def homogeneous_activations_do_not_help(config: Study, run: Run) -> Metrics:
    """Fit gates with a learnt temperature and a homogeneous activation at growing sample sizes."""
    errors = Errors(config.sizes)
    for name in ("relu", "leaky_relu"):
        _measure(config, run, name, name, errors)
    _show(run, errors, {f"{name}_ratio": -0.5 for name in ("relu", "leaky_relu")})
    return errors.slopes() | errors.last()


@PAPER.claim(
    "The density converges like n^-1/2 with every activation, also where the parameters do not.",
    reported="n^-1/2 up to logarithms with either gate (theorem).",
    holds_when=AllOf(
        *(
            Within(f"{name}_hellinger_slope", -0.6, -0.4)
            for name in ("identity", "relu", "leaky_relu", "tanh", "sigmoid")
        )
    ),
    scales=DENSITIES,
    seeds=10,
    note="Mean Hellinger distance between the fitted and the true density.",
)
def densities_converge_with_every_activation(config: Study, run: Run) -> Metrics:
    """Fit gates with a learnt temperature and measure the distance of the densities."""
    errors = Errors(config.sizes)
    for activation in ("identity", "relu", "leaky_relu", "tanh", "sigmoid"):
        world = config.world(activation)
        for _, size, x, y, generator in replicates(run, world, config.sizes, config.replicates, activation):
            starts = _starts(world, config, generator)
            fitted = fit_to_the_end(x, y, starts, world.gate, learns_temperature=True).parameters
            errors.add(f"{activation}_hellinger", size, world.hellinger(fitted, world.gate))
    _show(run, errors, dict.fromkeys(errors.found, -0.5))
    return errors.slopes() | errors.last()


# -- what they share --------------------------------------------------------------------------------------------------


def _information(activation: str, samples: int, generator: torch.Generator) -> IdentifiabilityReport:
    model = GaussianMixtureOfExperts.from_parameters(
        TWO_FEATURES, SoftmaxGate(activation=activation), learns_temperature=True
    )
    x = 2 * torch.rand(samples, 2, generator=generator, dtype=torch.float64) - 1
    return identifiability_report(model, x, model.sample(x, generator))


def _starts(world: World, config: Study, generator: torch.Generator) -> MixtureParameters:
    everyone = tuple(range(world.truth.num_experts))
    starts = world.starts(everyone, config.starts, config.noise, config.noise, generator)
    noise = config.noise * torch.randn(config.starts, generator=generator, dtype=torch.float64)
    return replace(starts, temperature=starts.temperature * noise.exp())


def _measure(config: Study, run: Run, activation: str, label: str, errors: Errors, penalty: float = 0.0) -> None:
    """Errors of the gate's slopes, of the temperature, of their ratio and of the experts."""
    world = config.world(activation)
    truth = world.truth
    for _, size, x, y, generator in replicates(run, world, config.sizes, config.replicates, label):
        fit = fit_to_the_end(
            x, y, _starts(world, config, generator), world.gate, learns_temperature=True, gate_penalty=penalty
        )
        fitted = fit.parameters.to("cpu")
        ratios = [each.gate_coef / each.temperature for each in (fitted, truth)]
        found = {
            "gate_coef": (fitted.gate_coef - truth.gate_coef).norm(),
            "temperature": (fitted.temperature - truth.temperature).abs(),
            "ratio": (ratios[0] - ratios[1]).norm(),
            "coef": (fitted.coef - truth.coef).norm(),
            "intercept": (fitted.intercept - truth.intercept).norm(),
            "variance": (fitted.variance - truth.variance).norm(),
        }
        for name, value in found.items():
            errors.add(f"{label}_{name}", size, float(value))


def _show(run: Run, errors: Errors, exponents: dict[str, float]) -> None:
    run.table("median errors, and slopes on logarithmic axes", errors.rows(exponents))
    drawn = Errors(errors.sizes)
    drawn.found = {name: found for name, found in errors.found.items() if not name.endswith(("coef", "cept", "iance"))}
    drawn.found |= {name: found for name, found in errors.found.items() if name.endswith("gate_coef")}
    run.figure(
        "rates",
        drawn.draw("median error"),
        f"Median error against the number of samples, both on logarithmic axes. Slopes: {errors.in_words()}",
    )


def _spectra(spectra: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(6, 3.4))
    axes = figure.add_subplot()
    for place, values in enumerate(spectra.values()):
        axes.semilogy([place] * len(values), np.maximum(values, 1e-17), "_", markersize=18)
    axes.axhline(1e-10, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(spectra)), list(spectra), rotation=30)
    axes.set_ylabel("eigenvalue, at least 1e-17")
    figure.tight_layout()
    return figure
