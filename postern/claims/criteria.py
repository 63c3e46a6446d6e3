"""Criteria: what the numbers of all seeds say about a claim, with a 95 % interval.

A criterion reduces each seed's metrics to one number (pairing metrics within the seed), and asks whether the mean of
these numbers passes a bound. With values ``v_1 .. v_n`` the interval is Student's

    mean(v) +- t(0.975, n - 1) * std(v, ddof=1) / sqrt(n)

and the verdict follows from it alone: it *holds* when the whole interval passes, is *refuted* when the whole interval
fails, else it is *inconclusive*. One seed gives no interval, so it is always inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
from scipy.special import stdtrit

Metrics = Mapping[str, float]
CONFIDENCE = 0.95


class Verdict(StrEnum):
    """What is known of a claim after a run."""

    HOLDS = "holds"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"
    SMOKE = "smoke"
    ERROR = "error"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Judgement:
    """A criterion's reading of the seeds.

    Attributes:
        verdict: holds, refuted or inconclusive.
        estimate: the mean over the seeds (geometric for ratios).
        interval: its 95 % interval (low, high); infinite where one seed leaves it unknown.
        criterion: the criterion in words, e.g. ``map_soft - map_hard >= 0.005``.
        parts: the parts' judgements, for `AllOf` and `Given`.
    """

    verdict: Verdict
    estimate: float
    interval: tuple[float, float]
    criterion: str
    parts: tuple[Judgement, ...] = field(default=())


@runtime_checkable
class Criterion(Protocol):
    """Reads the metrics of all seeds and judges them."""

    def judge(self, seeds: Sequence[Metrics]) -> Judgement:
        """Judge the metrics, one mapping a seed."""
        ...

    def describe(self) -> str:
        """Return the criterion in words."""
        ...

    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that it reads."""
        ...


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean of independent values and its Student t interval.

    Args:
        values: one number a seed, finite.
        confidence: coverage of the interval, between 0 and 1.

    Returns:
        (mean, low, high). With one value the interval is (-inf, inf).

    Raises:
        ValueError: no values, one that is not finite, or values too large for their squares to be summed.
    """
    if not values:
        raise ValueError("an interval needs the values of at least one seed, got none")
    sample = np.asarray(values, dtype=np.float64)
    if not np.isfinite(sample).all():
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    if len(sample) == 1:
        return float(sample[0]), -math.inf, math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = float(sample.mean()), float(sample.std(ddof=1))
    if not math.isfinite(mean) or not math.isfinite(deviation):
        raise ValueError(f"an interval needs values whose sum of squares is finite, got {list(values)}")
    half = float(stdtrit(len(sample) - 1, (1 + confidence) / 2)) * deviation / math.sqrt(len(sample))
    return mean, mean - half, mean + half


def _number(metrics: Metrics, name: str) -> float:
    try:
        return float(metrics[name])
    except KeyError:
        known = ", ".join(sorted(metrics)) or "none"
        raise ValueError(f"the claim returned no metric {name!r}; it returned: {known}") from None


def _bounds(criterion: str, at_least: float | None, at_most: float | None) -> tuple[float, float]:
    """Return (floor, ceiling), infinite where a side is open."""
    if at_least is None and at_most is None:
        raise ValueError(f"{criterion} needs a bound: give at_least, at_most or both")
    for bound in (at_least, at_most):
        if bound is not None and not math.isfinite(bound):
            raise ValueError(f"{criterion} needs finite bounds, got {bound}")
    floor = -math.inf if at_least is None else at_least
    ceiling = math.inf if at_most is None else at_most
    if floor > ceiling:
        raise ValueError(f"{criterion}: at_least={at_least} is above at_most={at_most}, so nothing can pass")
    return floor, ceiling


def _in_words(subject: str, floor: float, ceiling: float) -> str:
    if math.isinf(ceiling):
        return f"{subject} >= {floor:g}"
    if math.isinf(floor):
        return f"{subject} <= {ceiling:g}"
    return f"{floor:g} <= {subject} <= {ceiling:g}"


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class _OneNumber:
    """What the criteria share that reduce each seed to one number and compare the mean with bounds."""

    def bounds(self) -> tuple[float, float]:
        raise NotImplementedError

    def subject(self) -> str:
        raise NotImplementedError

    def value(self, metrics: Metrics) -> float:
        raise NotImplementedError

    def describe(self) -> str:
        """Return the criterion in words, e.g. ``map_soft - map_hard >= 0.005``."""
        return _in_words(self.subject(), *self.bounds())

    def judge(self, seeds: Sequence[Metrics]) -> Judgement:
        """Judge the mean over the seeds and its interval against the bounds.

        Raises:
            ValueError: no seeds, or a metric that the claim did not return.
        """
        return self._compare(*mean_interval([self.value(metrics) for metrics in seeds]))

    def _compare(self, estimate: float, low: float, high: float) -> Judgement:
        floor, ceiling = self.bounds()
        if low >= floor and high <= ceiling:
            verdict = Verdict.HOLDS
        elif high < floor or low > ceiling:
            verdict = Verdict.REFUTED
        else:
            verdict = Verdict.INCONCLUSIVE
        return Judgement(verdict, estimate, (low, high), self.describe())


@dataclass(frozen=True)
class Difference(_OneNumber):
    """``mean(first - second)``, paired by seed, against bounds.

    Args:
        first: name of the metric to subtract from.
        second: name of the metric that is subtracted.
        at_least: lowest difference that passes, in the metrics' unit.
        at_most: highest difference that passes.

    Raises:
        ValueError: no bound, or bounds that nothing can pass.
    """

    first: str
    second: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        self.bounds()

    def bounds(self) -> tuple[float, float]:
        """Return (floor, ceiling)."""
        return _bounds("Difference", self.at_least, self.at_most)

    def subject(self) -> str:
        """Return what is compared with the bounds."""
        return f"{self.first} - {self.second}"

    def value(self, metrics: Metrics) -> float:
        """Return one seed's number."""
        return _number(metrics, self.first) - _number(metrics, self.second)

    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that it reads."""
        return frozenset({self.first, self.second})


@dataclass(frozen=True)
class Ratio(_OneNumber):
    """Geometric mean of ``first / second``, paired by seed, against bounds.

    The interval is Student's on ``log(first / second)``, so that "twice as fast" and "half as fast" weigh the same.

    Args:
        first: name of the metric above the line.
        second: name of the metric below it.
        at_least: lowest ratio that passes.
        at_most: highest ratio that passes.

    Raises:
        ValueError: no bound, a bound that is not positive, or (when judging) a metric that is not positive.
    """

    first: str
    second: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        for bound in (self.at_least, self.at_most):
            if bound is not None and bound <= 0:
                raise ValueError(f"Ratio compares positive numbers, so its bounds are positive; got {bound}")
        self.bounds()

    def bounds(self) -> tuple[float, float]:
        """Return (floor, ceiling)."""
        return _bounds("Ratio", self.at_least, self.at_most)

    def subject(self) -> str:
        """Return what is compared with the bounds."""
        return f"{self.first} / {self.second}"

    def value(self, metrics: Metrics) -> float:
        """Return one seed's log ratio."""
        above, below = _number(metrics, self.first), _number(metrics, self.second)
        if above <= 0 or below <= 0:
            raise ValueError(f"Ratio needs positive metrics, got {self.first}={above:g} and {self.second}={below:g}")
        return math.log(above) - math.log(below)

    def judge(self, seeds: Sequence[Metrics]) -> Judgement:
        """Judge the geometric mean over the seeds and its interval against the bounds."""
        return self._compare(*map(_exp, mean_interval([self.value(metrics) for metrics in seeds])))

    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that it reads."""
        return frozenset({self.first, self.second})


@dataclass(frozen=True)
class Within(_OneNumber):
    """``low <= mean(metric) <= high``.

    Args:
        metric: name of the metric.
        low: lowest value that passes.
        high: highest value that passes.
    """

    metric: str
    low: float
    high: float

    def __post_init__(self) -> None:
        self.bounds()

    def bounds(self) -> tuple[float, float]:
        """Return (floor, ceiling)."""
        return _bounds("Within", self.low, self.high)

    def subject(self) -> str:
        """Return what is compared with the bounds."""
        return self.metric

    def value(self, metrics: Metrics) -> float:
        """Return one seed's number."""
        return _number(metrics, self.metric)

    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that it reads."""
        return frozenset({self.metric})


@dataclass(frozen=True)
class AtLeast(_OneNumber):
    """``mean(metric) >= bound``.

    Args:
        metric: name of the metric.
        bound: lowest value that passes.
    """

    metric: str
    bound: float

    def __post_init__(self) -> None:
        self.bounds()

    def bounds(self) -> tuple[float, float]:
        """Return (floor, ceiling)."""
        return _bounds("AtLeast", self.bound, None)

    def subject(self) -> str:
        """Return what is compared with the bound."""
        return self.metric

    def value(self, metrics: Metrics) -> float:
        """Return one seed's number."""
        return _number(metrics, self.metric)

    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that it reads."""
        return frozenset({self.metric})


@dataclass(frozen=True)
class AtMost(AtLeast):
    """``mean(metric) <= bound``.

    Args:
        metric: name of the metric.
        bound: highest value that passes.
    """

    def bounds(self) -> tuple[float, float]:
        """Return (floor, ceiling)."""
        return _bounds("AtMost", None, self.bound)


@dataclass(frozen=True)
class Slope(_OneNumber):
    """Least-squares slope of metrics against the sizes they were measured at, one slope a seed.

    With ``logarithmic`` (the default) the slope is that of ``log(metric)`` against ``log(size)``: the exponent ``b``
    of ``metric ~ size ** b``, as rates of convergence and costs are stated.

    Args:
        points: the metric's name at each size, e.g. ``{1000: "error_1000", 4000: "error_4000"}``.
        at_least: lowest slope that passes.
        at_most: highest slope that passes.
        logarithmic: take logarithms of both axes.

    Raises:
        ValueError: fewer than two sizes, sizes that are not positive on a logarithmic axis, or no bound.
    """

    points: Mapping[float, str]
    at_least: float | None = None
    at_most: float | None = None
    logarithmic: bool = True

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise ValueError(f"a slope needs at least two sizes, got {dict(self.points)}")
        if not all(math.isfinite(size) for size in self.points):
            raise ValueError(f"a slope needs finite sizes, got {sorted(self.points)}")
        if self.logarithmic and min(self.points) <= 0:
            raise ValueError(f"sizes on a logarithmic axis are positive, got {min(self.points)}")
        self.bounds()

    def __hash__(self) -> int:
        return hash((tuple(self.points.items()), self.at_least, self.at_most, self.logarithmic))

    def bounds(self) -> tuple[float, float]:
        """Return (floor, ceiling)."""
        return _bounds("Slope", self.at_least, self.at_most)

    def subject(self) -> str:
        """Return what is compared with the bounds."""
        sizes = sorted(self.points)
        kind = "log-log slope" if self.logarithmic else "slope"
        return f"{kind} of {self.points[sizes[0]]} .. {self.points[sizes[-1]]} over {sizes[0]:g} .. {sizes[-1]:g}"

    def value(self, metrics: Metrics) -> float:
        """Return one seed's slope."""
        sizes = np.array(sorted(self.points), dtype=np.float64)
        heights = np.array([_number(metrics, self.points[size]) for size in sorted(self.points)])
        if self.logarithmic:
            if heights.min() <= 0:
                raise ValueError(f"a log-log slope needs positive metrics, got {heights.min():g}")
            sizes, heights = np.log(sizes), np.log(heights)
        centred = sizes - sizes.mean()
        return float(centred @ heights / (centred @ centred))

    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that it reads."""
        return frozenset(self.points.values())


class AllOf:
    """Every part must hold.

    It holds when all parts hold (each at 95 %: an intersection-union test, which needs no correction), is refuted as
    soon as one part is refuted, else inconclusive. Its estimate and interval are those of the part that decides: the
    first refuted one, else the first inconclusive one, else the first.

    Args:
        parts: one or more criteria.

    Raises:
        ValueError: no parts.
    """

    def __init__(self, *parts: Criterion) -> None:
        if not parts:
            raise ValueError("AllOf needs at least one criterion, got none")
        self.parts = parts

    def describe(self) -> str:
        """Return the criterion in words."""
        return " and ".join(part.describe() for part in self.parts)

    def metrics(self) -> frozenset[str]:
        """Return the names of the metrics that the parts read."""
        return frozenset().union(*(part.metrics() for part in self.parts))

    def judge(self, seeds: Sequence[Metrics]) -> Judgement:
        """Judge every part and combine the verdicts."""
        judged = tuple(part.judge(seeds) for part in self.parts)
        severity = {Verdict.REFUTED: 0, Verdict.INCONCLUSIVE: 1, Verdict.HOLDS: 2}
        decisive = min(judged, key=lambda part: severity[part.verdict])
        return Judgement(decisive.verdict, decisive.estimate, decisive.interval, self.describe(), judged)


class Given(AllOf):
    """Parts that must hold where a condition does; where it does not, there is nothing to judge.

    For claims about the cure of something that must be there first. It is inconclusive unless the condition holds, and
    then shows the condition's numbers; else it is `AllOf` its parts.

    Args:
        condition: what must hold for the parts to count.
        parts: one or more criteria.

    Raises:
        ValueError: no parts.
    """

    def __init__(self, condition: Criterion, *parts: Criterion) -> None:
        if not parts:
            raise ValueError(f"given that {condition.describe()}, at least one criterion must hold; got none")
        super().__init__(condition, *parts)

    def describe(self) -> str:
        """Return the criterion in words."""
        condition, *parts = self.parts
        return f"given that {condition.describe()}: {' and '.join(part.describe() for part in parts)}"

    def judge(self, seeds: Sequence[Metrics]) -> Judgement:
        """Judge the condition, then the parts."""
        condition = self.parts[0].judge(seeds)
        rest = AllOf(*self.parts[1:]).judge(seeds)
        decisive, verdict = rest, rest.verdict
        if condition.verdict is not Verdict.HOLDS:
            decisive, verdict = condition, Verdict.INCONCLUSIVE
        return Judgement(verdict, decisive.estimate, decisive.interval, self.describe(), (condition, *rest.parts))
