"""Jobs, their results, and what they add up to: the outcome of a claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from postern.claims.criteria import Judgement, Verdict
from postern.claims.paper import Claim
from postern.claims.run import Measurement, Picture


class Status(StrEnum):
    """How a job ended."""

    DONE = "done"
    ERROR = "error"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Job:
    """One claim at one scale with one seed, and the means it is given; or one member of a comparison with one seed.

    Attributes:
        module: dotted name of the paper's module, whose ``PAPER`` has the claim; or of the family's contest.
        paper: the paper's slug; of a comparison, "compare-" and the family.
        claim: the claim's name; of a comparison, the member's.
        scale: "smoke", "small" or "full"; of a comparison, the identity of its setting.
        seed: the seed.
        fingerprint: hash of the code and the configuration that the result depends on.
        device: "cpu" or "cuda".
        threads: how many threads it may use.
        time_limit_s: after how many seconds it is stopped.
        memory_limit: how many bytes of memory it may hold.
        exclusive: whether it must run alone on the machine.
        setting: of a comparison, what all its members share, as text; of a claim, empty.
    """

    module: str
    paper: str
    claim: str
    scale: str
    seed: int
    fingerprint: str
    device: str = "cpu"
    threads: int = 1
    time_limit_s: float = 900.0
    memory_limit: int = 8 * 2**30
    exclusive: bool = False
    setting: str = ""

    @property
    def key(self) -> str:
        """``paper/claim``, unique in the catalogue."""
        return f"{self.paper}/{self.claim}"

    def __str__(self) -> str:
        return f"{self.key} ({self.scale}, seed {self.seed})"


@dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
        job: the job.
        status: done, error or not run.
        message: why it is not done; empty if it is.
        measurement: what it measured, if it is done.
        seconds: how long it took.
        output: the end of what it printed.
        finished: when it ended (UTC).
    """

    job: Job
    status: Status
    message: str = ""
    measurement: Measurement = field(default_factory=lambda: Measurement({}))
    seconds: float = 0.0
    output: str = ""
    finished: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Outcome:
    """What a run says of one claim.

    Attributes:
        claim: the claim.
        scale: the scale it was run at.
        verdict: the verdict; "smoke" for a smoke run that came through, which is never evidence.
        judgement: the criterion's reading of the seeds, or None if no seed finished.
        results: one result a seed, by seed.
        message: why there is no verdict, else empty.
    """

    claim: Claim
    scale: str
    verdict: Verdict
    judgement: Judgement | None
    results: tuple[JobResult, ...]
    message: str = ""

    @property
    def seconds(self) -> float:
        """Seconds of all its jobs together."""
        return sum(result.seconds for result in self.results)

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """Metrics by seed, of the jobs that finished."""
        return {r.job.seed: r.measurement.metrics for r in self.results if r.status is Status.DONE}

    @property
    def figures(self) -> Mapping[str, Picture]:
        """The figures of the first seed that has any."""
        return next((r.measurement.figures for r in self.results if r.measurement.figures), {})


def conclude(claim: Claim, scale: str, results: Sequence[JobResult]) -> Outcome:
    """Judge a claim by its jobs' results.

    One job that is an error makes the claim an *error*, one that did not run makes it *not run*: a verdict over the
    seeds that happened to come through would be a biased one.

    Args:
        claim: the claim.
        scale: the scale of the results.
        results: one result a seed.

    Returns:
        The outcome. A smoke run that came through has the verdict "smoke" whatever its numbers say.
    """
    ordered = tuple(sorted(results, key=lambda result: result.job.seed))
    if not ordered:
        return Outcome(claim, scale, Verdict.NOT_RUN, None, (), "no seed was run")
    for status, verdict in ((Status.ERROR, Verdict.ERROR), (Status.NOT_RUN, Verdict.NOT_RUN)):
        failed = [result for result in ordered if result.status is status]
        if failed:
            return Outcome(claim, scale, verdict, None, ordered, failed[0].message)
    try:
        judgement = claim.holds_when.judge([result.measurement.metrics for result in ordered])
    except ValueError as error:
        return Outcome(claim, scale, Verdict.ERROR, None, ordered, f"{claim.holds_when.describe()}: {error}")
    verdict = Verdict.SMOKE if scale == "smoke" else judgement.verdict
    return Outcome(claim, scale, verdict, judgement, ordered)
