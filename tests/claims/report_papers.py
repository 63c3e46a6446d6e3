"""Papers for the tests of the report: small experiments on means and medians, whose truth is known."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime

import numpy as np
from matplotlib.figure import Figure

from postern.claims import (
    AllOf,
    AtLeast,
    AtMost,
    Claim,
    Difference,
    Metrics,
    Paper,
    Ratio,
    Run,
    Slope,
    Unavailable,
    Within,
)
from postern.claims.comparison import TIMING, Contest, Experiment, Member, Ranking, Setting, rank
from postern.claims.outcome import Job, JobResult, Outcome, Status, conclude
from tests.claims import contest

HOSTILE = '<script>document.title = "taken over"</script>'


@dataclass(frozen=True)
class Samples:
    """How many samples of how many values."""

    samples: int
    values: int = 25


MEDIANS = Paper(
    slug="robust-location",
    title="Medians for Heavy Tails",
    date=date(1964, 3, 1),
    arxiv="1234.56789",
    authors=1,
    family="location",
    summary="A single wild value moves a mean as far as it likes. The median gives up a little accuracy on clean data "
    "and keeps its head when tails are heavy: whoever averages measurements that may be wrong wants it.",
    reported=("Half the variance of the mean under Laplace noise", "57 % more variance under Gaussian noise"),
    components=("statistics.median", "statistics.fmean", "numpy.percentile"),
    code="example/medians",
    details=("With an even number of values, `median` returns the mean of the two in the middle.",),
    differences=("The original uses tables of quantiles; we draw samples.",),
    example="from statistics import fmean, median\n\nvalues = [1.0, 2.0, 300.0]  # one is wrong\n"
    'print(f"mean {fmean(values):.1f}, median {median(values):.1f}")\n',
)
SCALES = {"smoke": Samples(20), "small": Samples(400)}


def spread(run: Run, draws: np.ndarray) -> Metrics:
    """Return the variances of mean and median, and leave curves, a figure and a table."""
    means, medians = draws.mean(axis=1), np.median(draws, axis=1)
    for step in range(10, len(draws) + 1, 10):
        run.log(step, variance_mean=means[:step].var(), variance_median=medians[:step].var())
        run.log(step, samples_seen=step)
    figure = Figure(figsize=(6, 3.2))
    axes = figure.subplots()
    axes.hist(means, bins=20, alpha=0.7, label="mean")
    axes.hist(medians, bins=20, alpha=0.7, label="median", hatch="//")
    axes.set_xlabel("estimate")
    axes.set_ylabel("samples")
    axes.legend()
    axes.grid(alpha=0.3)
    run.figure("distribution", figure, "Histograms of both estimates: the wider one varies more.")
    run.table(
        "Spread",
        [
            {
                "of": "arithmetic mean",
                "variance of the estimate": means.var(),
                "number of samples": len(draws),
                "is robust": False,
            },
            {
                "of": "median",
                "variance of the estimate": medians.var(),
                "number of samples": len(draws),
                "is robust": True,
            },
        ],
    )
    return {
        "variance_mean": float(means.var()),
        "variance_median": float(medians.var()),
        "samples": float(len(draws)),
    }


@MEDIANS.claim(
    "The median of Laplace samples varies less than their mean.",
    reported="half the variance",
    holds_when=Ratio("variance_median", "variance_mean", at_most=0.8),
    scales=SCALES,
    seeds=5,
    note="With 25 values the ratio is a little above one half, its limit for long samples; see `statistics.median`.",
)
def helps_with_laplace(config: Samples, run: Run) -> Metrics:
    return spread(run, run.rng().laplace(size=(config.samples, config.values)))


@MEDIANS.claim(
    "The median of Gaussian samples varies less than their mean.",
    reported="it does not: 57 % more",
    holds_when=Ratio("variance_median", "variance_mean", at_most=1.0),
    scales=SCALES,
    seeds=3,
)
def helps_with_gauss(config: Samples, run: Run) -> Metrics:
    return spread(run, run.rng().normal(size=(config.samples, config.values)))


@MEDIANS.claim(
    "A fair coin shows heads more often than tails.",
    reported="nothing of the kind",
    holds_when=Difference("heads", "tails", at_least=0.0),
    scales=SCALES,
    seeds=6,
)
def coin_is_lucky(config: Samples, run: Run) -> Metrics:
    heads = float(run.rng().integers(2, size=config.samples).mean())
    return {"heads": heads, "tails": 1 - heads}


@MEDIANS.claim(
    "The error of a mean falls as the square root of the number of values.",
    reported="exponent -1/2",
    holds_when=AllOf(
        Slope({10: "error_10", 100: "error_100", 1000: "error_1000"}, at_least=-0.6, at_most=-0.4),
        Within("error_100", 0.05, 0.12),
    ),
    scales=SCALES | {"full": Samples(100_000)},
    seeds=4,
)
def error_falls(config: Samples, run: Run) -> Metrics:
    errors = {size: np.abs(run.rng(size).normal(size=(config.samples, size)).mean(axis=1)) for size in (10, 100, 1000)}
    for step in range(50):
        run.log(step, decay=10.0 ** (-step / 8))
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    image = axes.imshow(np.stack([error[:20] for error in errors.values()]), aspect="auto")
    figure.colorbar(image)
    run.figure("errors", figure, "Heat map: errors shrink from the first row (10 values) to the last (1000 values).")
    return {f"error_{size}": float(error.mean()) for size, error in errors.items()}


@MEDIANS.claim(
    "Nobody has measured this one.",
    reported="-",
    holds_when=AtMost("value", 1.0),
    scales=SCALES,
    seeds=2,
)
def waits(config: Samples, run: Run) -> Metrics:
    return {"value": 0.0}


TROUBLES = Paper(
    slug="troubles",
    title=f"Experiments in Trouble {HOSTILE}",
    date=date(2021, 12, 31),
    arxiv=None,
    authors=3,
    family="<b>odd</b>",
    summary=f"What goes wrong, and text that tries to be code: {HOSTILE} & \"quotes\" 'and' `<i>ticks</i>`.",
    reported=(HOSTILE,),
    details=(HOSTILE,),
    differences=(HOSTILE,),
    components=("postern.claims.Paper",),
    example=f"print('''{HOSTILE}''')",
)


@TROUBLES.claim(f"It raises {HOSTILE}", reported=HOSTILE, holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def raises(config: Samples, run: Run) -> Metrics:
    raise KeyError(HOSTILE)


@TROUBLES.claim("It lacks a device.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def lacks(config: Samples, run: Run) -> Metrics:
    run.require(False, f"needs a device that nobody has {HOSTILE}")
    return {"value": 1.0}


@TROUBLES.claim(
    "Names that never end must not widen a page " + "very" * 40 + ".",
    reported="un" * 60 + "breakable",
    holds_when=AtLeast("a_metric_whose_name_does_not_want_to_end_" * 3, 0.0),
    scales=SCALES,
    seeds=8,
    note=HOSTILE,
)
def is_long(config: Samples, run: Run) -> Metrics:
    figure = Figure(figsize=(9, 3))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=HOSTILE)
    axes.set_title(HOSTILE)
    run.figure(f"wide {HOSTILE}", figure, f'A "line" {HOSTILE}')
    run.table(HOSTILE, [{f"column {i} {HOSTILE}": HOSTILE for i in range(8)}])
    for step in range(3):
        run.log(step, **{f"curve {HOSTILE}": step + run.seed})
    return {"a_metric_whose_name_does_not_want_to_end_" * 3: run.rng().normal() + 9, HOSTILE: 1.0}


PLANNED = Paper(
    slug="planned",
    title="A Paper Still to Come",
    date=date(2024, 2, 29),
    arxiv="2402.00001",
    authors=None,
    family="location",
    summary="Nothing of Überraschung is written yet.",
)

PAPERS = (MEDIANS, TROUBLES, PLANNED)
FINISHED = datetime(2026, 3, 4, 12, tzinfo=UTC)


def run(claim: Claim, scale: str = "small", seeds: Sequence[int] | None = None) -> Outcome:
    """Measure a claim in this process and judge it, as the driver does with its jobs' results."""
    results = []
    for seed in range(claim.seeds_at(scale)) if seeds is None else seeds:
        job = Job(claim.experiment.__module__, claim.paper, claim.name, scale, seed, fingerprint="0" * 64)
        try:
            results.append(JobResult(job, Status.DONE, "", claim.measure(scale, seed), 0.25, "", FINISHED))
        except Unavailable as lack:
            results.append(JobResult(job, Status.NOT_RUN, str(lack), finished=FINISHED))
        except KeyError as error:
            output = f"\x1b[31mcolour\x1b[0m\nfirst\rsecond\rlast state\n{HOSTILE}\nKeyError: {error}\n"
            results.append(
                JobResult(job, Status.ERROR, f"KeyError: {error}", seconds=1.5, output=output, finished=FINISHED)
            )
    return conclude(claim, scale, results)


def run_all() -> list[Outcome]:
    """Return outcomes of every kind."""
    medians, troubles = MEDIANS.claims, TROUBLES.claims
    return [
        run(medians["helps-with-laplace"]),
        run(medians["helps-with-laplace"], "smoke"),
        run(medians["helps-with-gauss"]),
        run(medians["coin-is-lucky"], "smoke"),
        run(medians["error-falls"]),
        *(run(claim) for claim in troubles.values()),
    ]


def compare(setting: Setting, seeds: int = 4, family: Contest = contest.CONTEST) -> Ranking:
    """Train and time the members of a setting in this process and rank them."""
    results = []
    for name in (*setting.members, TIMING):
        for seed in range(seeds):
            job = Job(
                contest.__name__,
                f"compare-{family.family}",
                name,
                setting.identity,
                seed,
                fingerprint="0" * 64,
                threads=2 if name == TIMING else 1,
                setting=setting.to_text(),
            )
            try:
                measurement = Experiment(family, name, setting).measure(job.scale, seed)
                results.append(JobResult(job, Status.DONE, "", measurement, 0.5, "", FINISHED))
            except ArithmeticError as error:
                message, output = f"ArithmeticError: {error} {HOSTILE}", f"step 1\n{HOSTILE}\n"
                results.append(JobResult(job, Status.ERROR, message, output=output, finished=FINISHED))
    return rank(family, setting, results)


def crowd(size: int) -> Ranking:
    """Compare members whose qualities and times lie close together, but for one that is far from them."""
    names = [f"member-{index}" for index in range(size)]
    family = replace(
        contest.CONTEST,
        family="crowd",
        members=tuple(Member(name, "one of many", "torch.softmax", "robust-location") for name in names),
        train=lambda name, setting, run: {
            "accuracy": 0.5
            + 0.02 * (7 * names.index(name) % size)
            - 0.4 * (name == names[-1])
            + 0.01 * run.rng().normal(),
            "learning_rate": 2e-3,
        },
        time=lambda setting, run: {
            name: 1 + 0.1 * (5 * index % size) + 3 * (name == names[-1]) + 0.05 * run.rng().random()
            for index, name in enumerate(names)
        },
    )
    return compare(replace(TOYS, members=tuple(names), learning_rates=(1e-3, 2e-3, 3e-3)), seeds=3, family=family)


TOYS = replace(
    contest.setting("leader", "rival", "loser", "broken"), data=f"<b>x</b>.csv {HOSTILE}", label=f"kind {HOSTILE}"
)
ONE_SEED = contest.setting("leader", "rival", kind="text")
COMPARED = tuple(f"comparisons/toys-{setting.identity}.html" for setting in (TOYS, ONE_SEED))


def compare_all() -> list[Ranking]:
    """Return one comparison with every place, and one of one seed."""
    return [compare(TOYS), compare(ONE_SEED, seeds=1)]
