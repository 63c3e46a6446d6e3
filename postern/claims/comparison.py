"""Comparisons: members of a family with the same data, budget, tuning grid and seeds, and how they come out.

A family's `Contest` says who takes part and trains one of them; it is found as ``CONTEST`` in its module. Each member
and seed is a job of its own, as a claim's seeds are. The times of all members are taken in one job, by turns.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import torch

from postern.claims.criteria import Metrics, mean_interval
from postern.claims.outcome import JobResult, Status
from postern.claims.run import Measurement, Run, check_metrics, seed_everything

TIMING = "timing"  # the name of the job that times all members; no member is called so


class CannotCompare(ValueError):
    """What was asked for cannot be compared; the text says why and what can."""


class Place(StrEnum):
    """How a member comes out."""

    BEST = "best"
    LEVEL = "level"
    BEHIND = "behind"
    ERROR = "error"


@dataclass(frozen=True)
class Quantity:
    """Something that is measured of every member.

    Attributes:
        name: its name among the metrics.
        label: what the reader sees, with the unit.
        higher_is_better: whether more of it is better.
        scale: what the metric is multiplied with to be shown, 100 for shares in percent.
    """

    name: str
    label: str
    higher_is_better: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Member:
    """One that takes part.

    Attributes:
        name: on the command line and in tables.
        title: what it is, in a few words.
        part: dotted public name of the part of postern, or of the library that it comes from.
        paper: slug of its paper, if postern has one.
    """

    name: str
    title: str
    part: str
    paper: str = ""


@dataclass(frozen=True)
class Curves:
    """A drawing with one curve a member: two of its metrics at several settings, against each other.

    Attributes:
        title: what it shows.
        across: label of the horizontal axis, with the unit.
        up: label of the vertical axis, with the unit.
        points: for each point in order, the metric across and the metric up.
        scales: what the metrics are multiplied with to be shown.
    """

    title: str
    across: str
    up: str
    points: tuple[tuple[str, str], ...]
    scales: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Setting:
    """What all members share.

    Attributes:
        data: the data, as asked for.
        kind: what it is: "text", "table" or "images".
        digest: hash of its content, so that results of other content are not taken for results of this.
        label: the column of the labels, for tables that need one.
        members: who takes part, in the contest's order.
        steps: the budget: optimiser steps of one training.
        learning_rates: the grid; each member takes its best on validation data.
        device: "cpu" or "cuda".
    """

    data: str
    kind: str
    digest: str
    label: str | None
    members: tuple[str, ...]
    steps: int
    learning_rates: tuple[float, ...]
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(
                f"a budget has at least one step and learning rates are positive, got {self.steps} steps and "
                f"{list(self.learning_rates)}"
            )

    def to_text(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Setting:
        """From `to_text`."""
        document = json.loads(text)
        return cls(
            **document | {name: tuple(document[name]) for name in ("members", "learning_rates")},
        )

    @property
    def baseline(self) -> str:
        """The member that times are compared with: the first, which is the contest's where it takes part."""
        return self.members[0]

    @property
    def identity(self) -> str:
        """A short name that differs where anything of the setting does."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:8]


Trial = Callable[[str, Setting, Run], Metrics]
Timing = Callable[[Setting, Run], Metrics]


@dataclass(frozen=True)
class Contest:
    """How the members of a family are compared.

    Attributes:
        family: the family.
        module: dotted name of the module that has this contest as ``CONTEST``.
        members: who can take part, the baseline first.
        task: for each kind of data that is taken, what is trained on it, in one sentence.
        quality: for each kind of data, what decides.
        costs: what else is measured of each training, such as memory; the times come besides.
        train: trains a member with every learning rate of the setting and returns its quality, the other qualities and
            costs, and ``learning_rate``, the chosen one.
        time: returns milliseconds of a training step of every member by the member's name, taken by turns, and those
            of the other ``paces`` by ``"pace member"``. What it draws and tabulates is shown as well. None where steps
            of the members are nothing alike.
        unsuited: for each member that does not suit the data of a setting, why.
        shown: further qualities of each kind that are shown where a member has them.
        paces: what else is timed, and what the reader sees of it, such as ``{"decoding": "time of a decoded word"}``.
        curves: what is drawn of all members' metrics, by the name of the drawing.
    """

    family: str
    module: str
    members: tuple[Member, ...]
    task: Mapping[str, str]
    quality: Mapping[str, Quantity]
    costs: tuple[Quantity, ...]
    train: Trial
    time: Timing | None
    unsuited: Callable[[Setting], Mapping[str, str]]
    shown: Mapping[str, tuple[Quantity, ...]] = field(default_factory=dict)
    paces: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Curves] = field(default_factory=dict)

    def jobs(self, members: Sequence[str]) -> tuple[str, ...]:
        """Names of the jobs of a seed: the members', and the one that times them.

        Args:
            members: who takes part.
        """
        return (*members, *([] if self.time is None else [TIMING]))

    def member(self, name: str) -> Member:
        """The member called ``name``.

        Raises:
            CannotCompare: there is none; the nearest names are suggested.
        """
        known = {member.name: member for member in self.members}
        if name in known:
            return known[name]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        raise CannotCompare(f"{self.family} has no member {name!r}; {hint}")


@dataclass(frozen=True)
class Experiment:
    """A job of a comparison as the worker runs it."""

    contest: Contest
    name: str
    setting: Setting

    def measure(
        self,
        scale: str,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        threads: int = 1,
        on_progress: Callable[[str, int, int | None], None] | None = None,
    ) -> Measurement:
        """Train a member, or take all members' times; see `postern.claims.Claim.measure`."""
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        seed_everything(seed)
        run = Run(seed=seed, scale=scale, device=torch.device(device), threads=threads, on_progress=on_progress)
        if self.name == TIMING:
            assert self.contest.time is not None, "no timing is planned where there is none"
            returned = self.contest.time(self.setting, run)
        else:
            returned = self.contest.train(self.name, self.setting, run)
        return Measurement(check_metrics(returned), tuple(run.logs), dict(run.figures), dict(run.tables))


@dataclass(frozen=True)
class Estimate:
    """A mean over the seeds and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """How one member came out.

    Attributes:
        member: the member.
        place: best; level with the best, as far as the seeds tell; behind; or error.
        quality: what decides.
        lead: quality minus the best member's on the same seeds, turned so that less than 0 is worse; None for the best.
        others: the other quantities that it has, by name.
        step_time: milliseconds of a training step over the baseline's, the geometric mean; None where it was not timed.
        paces: the same of what else was timed, by name.
        curves: for each drawing that it has all metrics of, its points, means over the seeds, as they are shown.
        learning_rates: the chosen one of each seed.
        message: what went wrong, else empty.
    """

    member: Member
    place: Place
    quality: Estimate | None = None
    lead: Estimate | None = None
    others: Mapping[str, Estimate] = field(default_factory=dict)
    step_time: Estimate | None = None
    paces: Mapping[str, Estimate] = field(default_factory=dict)
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    message: str = ""


@dataclass(frozen=True)
class Ranking:
    """The outcome of a comparison.

    Attributes:
        contest: what was compared.
        setting: under what.
        standings: best first, errors last.
        seeds: the seeds.
        results: all jobs' results.
    """

    contest: Contest
    setting: Setting
    standings: tuple[Standing, ...]
    seeds: tuple[int, ...]
    results: tuple[JobResult, ...]

    @property
    def quality(self) -> Quantity:
        """What decided."""
        return self.contest.quality[self.setting.kind]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The other quantities that some member has, in order."""
        offered = (*self.contest.shown.get(self.setting.kind, ()), *self.contest.costs)
        return tuple(each for each in offered if any(each.name in standing.others for standing in self.standings))

    @property
    def paces(self) -> Mapping[str, str]:
        """What was timed besides the training step, of some member at least."""
        timed = {name for standing in self.standings for name in standing.paces}
        return {name: label for name, label in self.contest.paces.items() if name in timed}

    @property
    def seconds(self) -> float:
        """Seconds of all its jobs together."""
        return sum(result.seconds for result in self.results)

    @property
    def has_errors(self) -> bool:
        """Whether a member, or the timing, ended in an error."""
        return any(result.status is Status.ERROR for result in self.results)

    def to_document(self) -> dict[str, Any]:
        """For programs: plain values, infinite bounds as None."""

        def plain(value: Any) -> Any:
            if isinstance(value, Estimate):
                return {name: each if math.isfinite(each) else None for name, each in asdict(value).items()}
            return {name: plain(each) for name, each in value.items()} if isinstance(value, Mapping) else value

        standings = [
            {
                "member": each.member.name,
                "place": each.place.value,
                self.quality.name: plain(each.quality),
                "lead": plain(each.lead),
                **plain(each.others),
                "step_time": plain(each.step_time),
                **plain(each.paces),
                "curves": {name: [list(point) for point in points] for name, points in each.curves.items()},
                "learning_rates": list(each.learning_rates),
                "message": each.message,
            }
            for each in self.standings
        ]
        return {
            "family": self.contest.family,
            "setting": asdict(self.setting),
            "quality": self.quality.name,
            "seeds": list(self.seeds),
            "standings": standings,
        }


def rank(contest: Contest, setting: Setting, results: Iterable[JobResult]) -> Ranking:
    """Rank the members of a comparison by the mean of their quality over the seeds.

    A member is behind if the whole 95 % interval of its difference to the best, paired by seed, is below 0; else the
    seeds do not tell them apart and it is level. The best is chosen by the same seeds, and nothing corrects for the
    number of members, so a lead with an end near 0 deserves more seeds. One job that failed makes its member an error.

    Args:
        contest: what was compared.
        setting: under what.
        results: of all its jobs; those of members that are not in the setting are left out.
    """
    by_name: dict[str, list[JobResult]] = {}
    for result in sorted(results, key=lambda each: each.job.seed):
        if result.job.claim in contest.jobs(setting.members):
            by_name.setdefault(result.job.claim, []).append(result)
    quality = contest.quality[setting.kind]
    members = [contest.member(name) for name in setting.members]
    failed = {member.name: _failure(by_name.get(member.name, ()), quality) for member in members}
    values = {
        member.name: {r.job.seed: r.measurement.metrics[quality.name] for r in by_name[member.name]}
        for member in members
        if not failed[member.name]
    }
    sign = 1.0 if quality.higher_is_better else -1.0
    means = {name: sign * mean_interval(list(seeds.values()))[0] for name, seeds in values.items()}
    best = max(means, key=lambda name: means[name]) if means else ""
    times = [r.measurement.metrics for r in by_name.get(TIMING, ()) if r.status is Status.DONE]
    standings = [
        Standing(member, Place.ERROR, message=failed[member.name])
        if failed[member.name]
        else _standing(contest, setting, member, by_name[member.name], values, best, sign, times)
        for member in members
    ]
    standings.sort(key=lambda each: -means.get(each.member.name, float("-inf")))
    seeds = sorted({result.job.seed for each in by_name.values() for result in each})
    return Ranking(
        contest, setting, tuple(standings), tuple(seeds), tuple(r for each in by_name.values() for r in each)
    )


def _failure(results: Sequence[JobResult], quality: Quantity) -> str:
    if not results:
        return "was not run"
    for result in results:
        if result.status is not Status.DONE:
            return f"seed {result.job.seed}: {result.message}"
        if quality.name not in result.measurement.metrics:
            return f"seed {result.job.seed}: returned no {quality.name}, which decides"
    return ""


def _standing(
    contest: Contest,
    setting: Setting,
    member: Member,
    results: Sequence[JobResult],
    values: Mapping[str, Mapping[int, float]],
    best: str,
    sign: float,
    times: Sequence[Mapping[str, float]],
) -> Standing:
    own, of_best = values[member.name], values[best]
    lead = None
    place = Place.BEST
    if member.name != best:
        shared = sorted(own.keys() & of_best.keys())
        lead = _estimate([sign * (own[seed] - of_best[seed]) for seed in shared])
        place = Place.BEHIND if lead.high < 0 else Place.LEVEL
    measured = [result.measurement.metrics for result in results]
    offered = (*contest.shown.get(setting.kind, ()), *contest.costs)
    paces = {
        pace: _times_baseline(times, f"{pace} {member.name}", f"{pace} {setting.baseline}") for pace in contest.paces
    }
    return Standing(
        member,
        place,
        quality=_estimate(list(own.values())),
        lead=lead,
        others={
            each.name: _estimate([metrics[each.name] for metrics in measured])
            for each in offered
            if all(each.name in metrics for metrics in measured)
        },
        step_time=_times_baseline(times, member.name, setting.baseline),
        paces={pace: estimate for pace, estimate in paces.items() if estimate is not None},
        curves={
            name: tuple(_point(drawn, names, measured) for names in drawn.points)
            for name, drawn in contest.curves.items()
            if all(metric in metrics for names in drawn.points for metric in names for metrics in measured)
        },
        learning_rates=tuple(metrics["learning_rate"] for metrics in measured),
    )


def _point(drawn: Curves, names: tuple[str, str], measured: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    across, up = (
        scale * mean_interval([metrics[name] for metrics in measured])[0]
        for name, scale in zip(names, drawn.scales, strict=True)
    )
    return across, up


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(*mean_interval(values))


def _times_baseline(times: Sequence[Mapping[str, float]], name: str, baseline: str) -> Estimate | None:
    """The geometric mean of the ratios; the interval is of the logarithms, so that it cannot reach below 0."""
    ratios = [each[name] / each[baseline] for each in times if {name, baseline} <= each.keys()]
    if not ratios:
        return None
    mean, low, high = mean_interval([math.log(ratio) for ratio in ratios])
    return Estimate(math.exp(mean), math.exp(low), math.exp(high) if high < 700 else math.inf)
