"""Statistics of top-K gates: how fast a sparse Gaussian mixture of experts is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import torch
from sklearn.model_selection import KFold

from postern.claims import AllOf, AtLeast, AtMost, Metrics, Paper, Ratio, Run
from postern.data import load
from postern.experts import (
    GaussianMoERegressor,
    MixtureParameters,
    SoftmaxGate,
    align_gate_translation,
    voronoi_loss,
)
from postern.papers._gaussian_experts import (
    BLOCKS,
    SPLIT_OF_TRUTH,
    Errors,
    Fits,
    World,
    drawn_world,
    exponents_by_block,
    replicates,
)

PAPER = Paper(
    slug="topk-gating-gmoe",
    title="Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts",
    date=date(2023, 9, 24),
    arxiv="2309.13850",
    authors=4,
    family="experts",
    summary=(
        "How many samples does it take to recover the experts of a mixture whose softmax gate keeps only the K "
        "largest scores? With the right number of experts, maximum likelihood finds density and parameters at the "
        "parametric rate. With spare experts the density is still learnt that fast, but only if K is raised enough "
        "to hold every duplicate, and the duplicated experts themselves converge very slowly. The result is a "
        "laboratory with known truth, and a rule for practice: raise K by as many experts as you add."
    ),
    reported=(
        "Right number of experts: density and all parameters converge at n^-1/2 up to logarithms (theorem; "
        "synthetic EM study).",
        "Too many experts: the density keeps n^-1/2 if the fitted K reaches the total size of the Voronoi cells of "
        "the kept experts, and stays away from the truth if it does not (theorem).",
        "A true expert fitted by two copies is recovered only at n^-1/8 (gate slope, intercept) and n^-1/4 (slope, "
        "variance) (theorem).",
    ),
    components=(
        "postern.experts.GaussianMixtureOfExperts",
        "postern.experts.GaussianMoERegressor",
        "postern.experts.topk_softmax_gate",
        "postern.experts.topk_indices",
        "postern.experts.fit_mixture",
        "postern.experts.voronoi_cells",
        "postern.experts.voronoi_loss",
        "postern.experts.align_gate_translation",
        "postern.experts.hellinger_1d",
        "postern.experts.fit_rate",
        "postern.experts.theorem_exponents",
    ),
    details=(
        "The gate selects by the slope's score alone and adds the bias afterwards. Most layers of language models "
        "select by the sum; that is another model with other regions.",
        "Before parameters are compared, the gate is moved to the true one's convention, as a common vector added to "
        "all slopes changes nothing.",
        "The scale of an expert is its variance: the rates of the theorem are those of variances.",
        "With K = 1 a gate has no bias and no scale that data could tell, so parameters are recovered for K >= 2 only.",
        "The likelihood jumps where a sample changes its experts. A step of EM counts only if the likelihood of the "
        "samples does not fall; with steps for the gate alone it does fall.",
        "With spare experts the likelihood has long flat valleys. Fits that end at a gain of 1e-9 in its mean are "
        "still between merged and separate copies, and look as if these converged fast; the claims go on to 1e-13.",
        "Of equal scores the first is kept. Copies of an expert start at almost equal slopes, so this is no detail.",
        "All scores and means are matrix products and cheap. Where at most half of the experts are kept, the logits "
        "and residuals of these alone are gathered, and no exponential is taken for the others. That is all of a "
        "pass for the gradient; EM sums the normal equations and the gate's information over all experts, with zeros "
        "for those that are dropped.",
        "The loss is the largest sum over K cells, which is the sum of the K largest cells: no subsets are listed.",
    ),
    differences=(
        "A reconstruction from the abstract, reviews and a later paper that restates the losses; the paper's own pages "
        "were not available.",
        "The paper's simulations use EM. The claims use L-BFGS on the exact gradient, which ends at the same maximum "
        "in fewer passes over the samples; both are in fit_mixture.",
        "Outputs are numbers, as in the paper, so that a covariance is a variance: one for each expert or one for all.",
        "The gate's step of EM is a damped Newton step. Inputs of a million samples are passed in chunks.",
        "The designs are our own, of one input, and the fits start near the truth, as is usual in such studies: that "
        "measures the statistical error, not the search for a good start. One more start, of all fits, is the truth "
        "itself, where copies of an expert have noise of standard deviation 0.01 on each coordinate.",
        "Slopes are those of the medians over the data sets of one seed, and intervals are over seeds: a verdict needs "
        "an interval, which the slope of a median over all seeds has not. Copies have 15 data sets a seed and size, as "
        "the slopes of so slow errors are noisier than what the claim allows for.",
        "At full scale spare experts are added to two true ones, both kept. Where the gate cuts the inputs into "
        "regions, no K holds the copies everywhere unless the expert that they share is kept in every region, as in "
        "the design of four fitted experts.",
    ),
    example="""import numpy as np
import torch

from postern.experts import GaussianMixtureOfExperts, GaussianMoERegressor, MixtureParameters, SoftmaxGate
from postern.experts import align_gate_translation, voronoi_loss

# Three experts, of which the gate keeps two: on the left the first and third, on the right the second and third.
truth = MixtureParameters(
    gate_coef=[[-4.0], [4.0], [0.0]], gate_intercept=[0.3, -0.3, 0.0],
    coef=[[1.0], [-1.5], [0.5]], intercept=[-2.0, 2.0, 0.0], variance=[0.25, 0.16, 0.36],
)
x = torch.linspace(-1, 1, 4000, dtype=torch.float64)[:, None]
y = GaussianMixtureOfExperts.from_parameters(truth, SoftmaxGate(top_k=2)).sample(x, torch.Generator().manual_seed(0))

fitted = GaussianMoERegressor(3, top_k=2, n_init=4, random_state=0).fit(x.numpy(), y.numpy())
for expert in np.argsort(fitted.intercept_):
    slope, intercept, scale = fitted.coef_[expert, 0], fitted.intercept_[expert], fitted.scale_[expert]
    print(f"y = {slope:5.2f} x + {intercept:5.2f}, give or take {scale:.2f}")
loss = voronoi_loss(align_gate_translation(fitted.model_.mixture, truth), truth, top_k=2)
print(f"mean log-likelihood {fitted.lower_bound_:.3f}, loss {loss:.3f}")
""",
)

# Inputs are uniform in [-1, 1]. Left of 0 the sparse gate keeps experts 0 and 2, right of it 1 and 2.
THREE_EXPERTS = World(
    MixtureParameters(
        [[-4.0], [4.0], [0.0]], [0.3, -0.3, 0.0], [[1.0], [-1.5], [0.5]], [-2.0, 2.0, 0.0], [0.25, 0.16, 0.36]
    ),
    SoftmaxGate(2),
)
# Both are kept everywhere. With a spare copy of the first, two kept experts cannot be the right two on both sides of 0.
TWO_EXPERTS = World(
    MixtureParameters([[2.0], [0.0]], [0.3, 0.0], [[1.0], [-1.0]], [1.5, -1.5], [0.25, 0.36]), SoftmaxGate(2)
)


@dataclass(frozen=True)
class Study:
    """Sample sizes, and how often each is drawn for a seed."""

    sizes: tuple[int, ...]
    replicates: int  # data sets of each size
    starts: int = 2  # near the truth, of each fit
    noise: float = 0.1  # standard deviation of a start around the truth
    split: float = 0.3  # the same for the copies of one expert
    features: int = 1  # inputs; with more than one the true mixture is drawn
    experts: tuple[int, ...] = (3,)  # of drawn mixtures, one after the other
    folds: int = 0  # of the diabetes data; 0 to leave it out

    def exact(self) -> dict[str, World]:
        """True mixtures with more experts than they keep, by what is put after the names of their errors."""
        if self.features == 1:
            return {"": THREE_EXPERTS}
        return {f"_{experts}_experts": drawn_world(experts, self.features, 2) for experts in self.experts}

    def spare(self) -> World:
        """A true mixture that keeps all experts."""
        return TWO_EXPERTS if self.features == 1 else drawn_world(2, self.features, 2)


EXACT = {
    "smoke": Study((500, 2000), 2),
    "small": Study((1000, 3162, 10_000, 31_623, 100_000), 4),
    "full": Study((10_000, 100_000, 1_000_000, 10_000_000), 10, features=10, experts=(4, 8)),
}
SPARE = {
    "smoke": Study((1000, 8000), 2),
    "small": Study((1000, 4000, 16_000, 64_000), 4),
    "full": Study((10_000, 100_000, 1_000_000, 10_000_000), 10, features=10),
}
COPIES = SPARE | {"small": replace(SPARE["small"], replicates=15)}
REGIONS = {
    "smoke": Study((500, 2000), 2),
    "small": Study((1000, 4000, 16_000), 7),
    "full": Study((1000, 4000, 16_000, 64_000, 256_000), 30),
}
CONTROL = {scale: replace(study, folds=2 if scale == "smoke" else 5) for scale, study in EXACT.items()}


# -- the claims -------------------------------------------------------------------------------------------------------


@PAPER.claim(
    "With the right number of experts, the density and the parameters of a top-K mixture converge like n^-1/2.",
    reported="n^-1/2 up to logarithms for both (theorem).",
    holds_when=AllOf(
        AtMost("largest_hellinger_slope", -0.4),
        AtLeast("smallest_hellinger_slope", -0.6),
        AtMost("largest_parameters_slope", -0.35),
        AtLeast("smallest_parameters_slope", -0.65),
    ),
    scales=EXACT,
    seeds=10,
    note=(
        "Slopes of log median error on log n: Hellinger distance, and the Voronoi loss D1 of all parameters; of "
        "several mixtures the largest and the smallest slope. Fits start twice near the truth and once at the truth, "
        "and the likeliest counts; truth_start_share is the share that the start at the truth won, by "
        "missed_likelihood at most."
    ),
)
def exact_parametric_rate(config: Study, run: Run) -> Metrics:
    """Fit three experts of which two are kept, at growing sample sizes."""
    errors, fits = Errors(config.sizes), Fits()
    worlds = config.exact()
    for label, world in worlds.items():
        _exact_errors(config, run, world, errors, fits, "{}" + label)
    _show(run, errors, dict.fromkeys(errors.found, -0.5))
    slopes = errors.slopes()
    extremes: dict[str, float] = {}
    for error in ("hellinger", "parameters"):
        extremes |= _extremes(f"{error}_slope", [slopes[f"{error}{label}_slope"] for label in worlds])
    return slopes | extremes | errors.last() | fits.metrics()


@PAPER.claim(
    "With a spare expert the density converges if K is raised by one, and stays away from the truth if it is not.",
    reported="n^-1/2 up to logarithms with a K that holds all copies; bounded away from the truth otherwise (theorem).",
    holds_when=AllOf(
        AtMost("raised_slope", -0.35),
        AtMost("raised_last", 0.02),
        AtLeast("same_slope", -0.1),
        Ratio("same_last", "raised_last", at_least=5.0),
    ),
    scales=SPARE,
    seeds=10,
    note=(
        "Two true experts, both kept; three are fitted, of which two (same) or three (raised) are kept, with the same "
        "starts and the same optimiser: two starts near the truth and one at it, of which the likeliest counts. "
        "truth_start_share is the share that the start at the truth won with three kept, by missed_likelihood at most; "
        "same_truth_start_share and same_missed_likelihood are those with two kept, whose model does not hold the "
        "truth. The statement is about copies near the truth: in other designs one copy for each region does with the "
        "same K, as the claim on four experts measures."
    ),
)
def spare_experts_need_a_larger_k(config: Study, run: Run) -> Metrics:
    """Fit one expert too many and keep as many as in truth, or one more."""
    world = config.spare()
    errors, fits = Errors(config.sizes), {"raised": Fits(), "same": Fits()}
    for _, size, x, y, generator in replicates(run, world, config.sizes, config.replicates):
        starts = _starts(config, world, (0, 0, 1), generator)
        for name, gate in (("raised", SoftmaxGate(3)), ("same", SoftmaxGate(2))):
            fit = fits[name].best(x, y, *starts, gate)
            errors.add(name, size, world.hellinger(fit.parameters, gate))
    _show(run, errors, {"raised": -0.5, "same": 0.0}, "Hellinger distance")
    return errors.slopes() | errors.last() | fits["raised"].metrics() | fits["same"].metrics("same_")


@PAPER.claim(
    "Copies that share a true expert converge more slowly than n^-0.35 in every parameter, a single one faster than "
    "n^-0.4.",
    reported="n^-1/8 for gate slope and intercept, n^-1/4 for slope and variance; n^-1/2 for a single one (theorem).",
    holds_when=AllOf(
        *(AtLeast(f"copies_{name}_slope", -0.35) for name in BLOCKS),
        *(AtMost(f"single_{name}_slope", -0.4) for name in BLOCKS if name != "gate_coef"),
    ),
    scales=COPIES,
    seeds=10,
    note=(
        "Mean distance of two fitted copies to the true expert that they start at, beside that of the expert that is "
        "fitted once, which is the gate's reference and so has no slope of its own. Fits start twice near the truth "
        "and once at the truth: truth_start_share is the share that this start won, by missed_likelihood at most. "
        "Inconclusive at small scale for one slope alone: the single expert's intercept has -0.46, interval to -0.39 "
        "where -0.4 is asked. Its other slopes are -0.51 and -0.53, those of the copies -0.06 to -0.13."
    ),
)
def copies_converge_slowly(config: Study, run: Run) -> Metrics:
    """Fit one expert too many with K raised by one, and follow the copies and the single expert."""
    world = config.spare()
    errors, fits = Errors(config.sizes), Fits()
    for _, size, x, y, generator in replicates(run, world, config.sizes, config.replicates):
        near, truth = _starts(config, world, (0, 0, 1), generator)
        fit = fits.best(x, y, near, truth, SoftmaxGate(3))
        fitted = align_gate_translation(fit.parameters.to("cpu"), world.truth)
        errors.add_by_block(size, fitted, world.truth, (0, 0, 1))
        errors.add("loss", size, float(voronoi_loss(fitted, world.truth, 2, "over")))
    _show(run, errors, exponents_by_block() | {"loss": -0.5})
    return errors.slopes() | errors.last() | fits.metrics()


@PAPER.claim(
    "Where a gate cuts the inputs into regions, a spare expert with K raised by one leaves the density faster than "
    "n^-0.35; the copies are slower than that in every parameter, the others faster than n^-0.4.",
    reported="n^-1/2 for the density and for single experts, n^-1/8 and n^-1/4 for copies (theorem).",
    holds_when=AllOf(
        AtMost("hellinger_slope", -0.35),
        *(AtLeast(f"copies_{name}_slope", -0.35) for name in BLOCKS),
        *(AtMost(f"single_{name}_slope", -0.4) for name in BLOCKS),
    ),
    scales=REGIONS,
    seeds=10,
    gpu=(),
    note=(
        "Three true experts of which the gate keeps two; the one that is kept everywhere is fitted twice and three are "
        "kept. Beside it, not judged, the density of the same fits with two kept (same_k), where one copy for each "
        "region could do. All fits start twice near the truth and once at the truth: truth_start_share is the share "
        "that this start won with three kept, by missed_likelihood at most; same_truth_start_share and "
        "same_missed_likelihood are those with two kept, whose model does not hold this start's density. At small "
        "scale all means are where the theorem has them, the density at n^-0.53, single experts between n^-0.48 and "
        "n^-0.52; seven data sets of three sizes leave the slopes of single experts too wide to say so. With two kept "
        "the density converges as fast (n^-0.52): one copy for each region does."
    ),
)
def copies_converge_slowly_across_regions(config: Study, run: Run) -> Metrics:
    """Fit four experts to three, with K raised by one, and follow the density, the copies and the single experts."""
    world, raised, same = THREE_EXPERTS, SoftmaxGate(3), SoftmaxGate(2)
    copies = (0, 1, 2, 2)
    errors, fits, fits_of_same = Errors(config.sizes), Fits(), Fits()
    for _, size, x, y, generator in replicates(run, world, config.sizes, config.replicates):
        starts = _starts(config, world, copies, generator)
        found = fits.best(x, y, *starts, raised).parameters
        errors.add("hellinger", size, world.hellinger(found, raised))
        errors.add("same_k", size, world.hellinger(fits_of_same.best(x, y, *starts, same).parameters, same))
        errors.add_by_block(size, align_gate_translation(found.to("cpu"), world.truth), world.truth, copies)
    _show(run, errors, exponents_by_block() | {"hellinger": -0.5})
    return errors.slopes() | errors.last() | fits.metrics() | fits_of_same.metrics("same_")


@PAPER.claim(
    "Sparsity costs no rate: with all experts kept, the slopes differ by at most 0.15 from those with top-K.",
    reported="The theorems give n^-1/2 for either (dense gates in earlier papers).",
    holds_when=AllOf(
        AtMost("largest_hellinger_difference", 0.15),
        AtLeast("smallest_hellinger_difference", -0.15),
        AtMost("largest_parameters_difference", 0.15),
        AtLeast("smallest_parameters_difference", -0.15),
    ),
    scales=CONTROL,
    seeds=10,
    note=(
        "The same parameters, once with a gate that keeps two of three experts in truth and fit, once with all three. "
        "Differences are slopes of the sparse mixture less those of the dense one; of several mixtures the largest and "
        "the smallest. Fits start near the truth and at the truth, as for the first claim. The second table is "
        "descriptive: mixtures of one to five experts on the diabetes data, by the mean log-likelihood of test samples."
    ),
)
def sparsity_costs_no_rate(config: Study, run: Run) -> Metrics:
    """Fit a sparse and a dense mixture of the same experts at growing sample sizes."""
    errors, fits = Errors(config.sizes), Fits()
    worlds = config.exact()
    for gate in ("sparse", "dense"):
        for label, world in worlds.items():
            judged = world if gate == "sparse" else replace(world, gate=SoftmaxGate())
            _exact_errors(config, run, judged, errors, fits, gate + "_{}" + label)
    _show(run, errors, dict.fromkeys(errors.found, -0.5))
    slopes = errors.slopes()
    extremes: dict[str, float] = {}
    for error in ("hellinger", "parameters"):
        names = [f"{error}{label}_slope" for label in worlds]
        extremes |= _extremes(
            f"{error}_difference", [slopes[f"sparse_{name}"] - slopes[f"dense_{name}"] for name in names]
        )
    if config.folds:
        run.table("mean log-likelihood of test samples, diabetes", _diabetes(config.folds, run))
    return slopes | extremes | fits.metrics()


# -- what they share --------------------------------------------------------------------------------------------------


def _starts(
    config: Study, world: World, copies: tuple[int, ...], generator: torch.Generator
) -> tuple[MixtureParameters, MixtureParameters]:
    """Starts near the truth, and the truth itself."""
    near = world.starts(copies, config.starts, config.noise, config.split, generator)
    return near, world.starts(copies, 1, 0.0, SPLIT_OF_TRUTH, generator)


def _exact_errors(config: Study, run: Run, world: World, errors: Errors, fits: Fits, name: str) -> None:
    """Add the errors with the right number of experts, under names made by a format."""
    everyone = tuple(range(world.truth.num_experts))
    kept = world.gate.top_k or world.truth.num_experts
    for _, size, x, y, generator in replicates(run, world, config.sizes, config.replicates):
        fit = fits.best(x, y, *_starts(config, world, everyone, generator), world.gate)
        fitted = fit.parameters.to("cpu")
        errors.add(name.format("hellinger"), size, world.hellinger(fitted, world.gate))
        aligned = align_gate_translation(fitted, world.truth)
        errors.add(name.format("parameters"), size, float(voronoi_loss(aligned, world.truth, kept)))


def _extremes(name: str, values: Sequence[float]) -> dict[str, float]:
    """The largest and the smallest value of all mixtures: one number of either sign would cancel over seeds."""
    return {f"largest_{name}": max(values), f"smallest_{name}": min(values)}


def _show(run: Run, errors: Errors, exponents: Mapping[str, float | str], label: str = "median error") -> None:
    run.table("median errors, and slopes on logarithmic axes", errors.rows(exponents))
    run.figure(
        "rates",
        errors.draw(label),
        f"Median error against the number of samples, both on logarithmic axes. Slopes: {errors.in_words()}",
    )


def _diabetes(folds: int, run: Run) -> list[dict[str, float | str]]:
    """Mean log-likelihood of test samples by numbers of experts (rows) and of kept experts (columns)."""
    table = load("diabetes", "all")
    features, target = table.features, table.target.astype(np.float64)
    rows = []
    for experts in run.progress(range(1, 6), "diabetes"):
        row: dict[str, float | str] = {"experts": str(experts)}
        for kept in range(1, 6):
            row[f"K = {kept}"] = "" if kept > experts else _test_likelihood(features, target, experts, kept, folds, run)
        rows.append(row)
    return rows


def _test_likelihood(features: np.ndarray, target: np.ndarray, experts: int, kept: int, folds: int, run: Run) -> float:
    found = []
    for train, test in KFold(folds, shuffle=True, random_state=run.seed).split(features):
        model = GaussianMoERegressor(
            experts, top_k=kept, n_init=2, max_iter=100, tol=1e-5, gate_penalty=1e-3, min_variance=0.01, random_state=0
        )
        found.append(model.fit(features[train], target[train]).log_prob(features[test], target[test]).mean())
    return float(np.mean(found))
