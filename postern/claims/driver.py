"""The driver: plans jobs, lets an engine run them, stores what comes back, and judges or ranks."""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from postern.claims.comparison import TIMING, Contest, Ranking, Setting, rank
from postern.claims.engine import Engine, Progress
from postern.claims.fingerprint import fingerprint
from postern.claims.outcome import Job, JobResult, Outcome, Status, conclude
from postern.claims.paper import TIME_LIMITS_S, Claim
from postern.claims.store import Store
from postern.claims.worker import fingerprint_of

_BROKEN_OFF = "the run was broken off before this seed ended: go on with the same command and --resume"


@dataclass(frozen=True)
class Plan:
    """Jobs to run, results that need no run, and the claims they belong to.

    Attributes:
        subject: what is run, for the reader.
        claims: the claims, in order; none for a comparison.
        scale: the scale; of a comparison, the identity of its setting.
        jobs: what an engine has to run.
        known: results that are there already: resumed ones, and jobs that this machine cannot run.
    """

    subject: str
    claims: tuple[Claim, ...]
    scale: str
    jobs: tuple[Job, ...]
    known: tuple[JobResult, ...]


class Observer(Protocol):
    """Is told how a run goes. The commands show it on a terminal, a log or as JSON lines."""

    def begin(self, plan: Plan) -> None:
        """The run begins."""
        ...

    def progress(self, progress: Progress) -> None:
        """A job is underway."""
        ...

    def finished(self, result: JobResult) -> None:
        """A job has ended."""
        ...

    def concluded(self, outcome: Outcome) -> None:
        """All seeds of a claim have ended."""
        ...


def plan(
    claims: Sequence[Claim],
    scale: str,
    engine: Engine,
    *,
    seeds: Mapping[str, Sequence[int]],
    finished: Store | None = None,
    device: str | None = None,
    time_limit_s: float | None = None,
    memory_limit: int | None = None,
) -> Plan:
    """Plan the jobs of some claims.

    Args:
        claims: the claims.
        scale: the scale; a claim that lacks it is reported as not run.
        engine: tells what a job may use, and whether there is a GPU.
        seeds: the seeds of each claim, by its key.
        finished: a store whose finished jobs need not run again, for resuming.
        device: "cpu" or "cuda"; by default CUDA where a claim needs it, else the CPU.
        time_limit_s: seconds after which a job is stopped; by default the scale's.
        memory_limit: bytes that a job may hold; by default what the engine gives it.

    Returns:
        The plan.

    Raises:
        ValueError: a limit that is not positive.
    """
    for limit in (time_limit_s, memory_limit):
        if limit is not None and limit <= 0:
            raise ValueError(f"limits on time and memory are positive, got {limit:g}")
    jobs: list[Job] = []
    known: list[JobResult] = []
    for claim in claims:
        obstacle = _obstacle_to(claim, scale, engine, device)
        share = engine.share(claim.exclusive)
        code = fingerprint(claim, scale) if scale in claim.scales else ""
        for seed in seeds[claim.key]:
            job = Job(
                module=claim.experiment.__module__,
                paper=claim.paper,
                claim=claim.name,
                scale=scale,
                seed=seed,
                fingerprint=code,
                device=device or ("cuda" if scale in claim.gpu else "cpu"),
                threads=share.threads,
                time_limit_s=time_limit_s or TIME_LIMITS_S[scale],
                memory_limit=memory_limit or share.memory,
                exclusive=claim.exclusive,
            )
            done = finished.find_done(job) if finished is not None else None
            if done is not None:
                known.append(done)
            elif obstacle:
                known.append(JobResult(job, Status.NOT_RUN, obstacle))
            else:
                jobs.append(job)
    return Plan(f"{len(claims)} claims at the {scale} scale", tuple(claims), scale, tuple(jobs), tuple(known))


def plan_comparison(
    contest: Contest,
    setting: Setting,
    engine: Engine,
    *,
    seeds: Sequence[int],
    finished: Store | None = None,
    time_limit_s: float = TIME_LIMITS_S["full"],
) -> Plan:
    """Plan the jobs of a comparison: one a member and seed, and one a seed for times that are taken by turns.

    Args:
        contest: what is compared.
        setting: under what.
        engine: tells what a job may use.
        seeds: the seeds, the same for all members.
        finished: a store whose finished jobs need not run again, for resuming.
        time_limit_s: seconds after which a job is stopped.
    """
    jobs: list[Job] = []
    known: list[JobResult] = []
    text = setting.to_text()
    for name in contest.jobs(setting.members):
        share = engine.share(name == TIMING)
        for seed in seeds:
            job = Job(
                module=contest.module,
                paper=f"compare-{contest.family}",
                claim=name,
                scale=setting.identity,
                seed=seed,
                fingerprint="",
                device=setting.device,
                threads=share.threads,
                time_limit_s=time_limit_s,
                memory_limit=share.memory,
                exclusive=name == TIMING,
                setting=text,
            )
            job = replace(job, fingerprint=fingerprint_of(job))
            done = finished.find_done(job) if finished is not None else None
            if done is not None:
                known.append(done)
            else:
                jobs.append(job)
    subject = f"{len(setting.members)} members of {contest.family} on {setting.data}"
    return Plan(subject, (), setting.identity, tuple(jobs), tuple(known))


def _obstacle_to(claim: Claim, scale: str, engine: Engine, device: str | None) -> str:
    """Return why a claim cannot be run at a scale, or an empty text."""
    if scale not in claim.scales:
        return f"has no {scale} scale; it has: {', '.join(claim.scales)}"
    if (scale in claim.gpu or device == "cuda") and not engine.has_gpu:
        return f"the {scale} scale needs a CUDA device, and there is none"
    for extra in claim.extras:
        if importlib.util.find_spec(extra) is None:
            return f"needs the extra {extra!r}: pip install 'postern[{extra}]'"
    return ""


def execute(plan: Plan, engine: Engine, store: Store, observer: Observer) -> list[Outcome]:
    """Run a plan and judge its claims.

    Each result is stored before anybody is told of it. Stopping at any moment (Ctrl-C, kill) loses the jobs in flight
    and no others; until a job has ended the store says that it was not run, so that no claim is ever judged by the
    seeds that happened to come first.

    Args:
        plan: from `plan`.
        engine: runs the jobs.
        store: keeps the results.
        observer: is told how it goes.

    Returns:
        One outcome a claim, in the plan's order.

    Raises:
        StoreError: the store cannot be written; the results stored so far are intact.
    """
    claims = {claim.key: claim for claim in plan.claims}
    expected = Counter([*(job.key for job in plan.jobs), *(result.job.key for result in plan.known)])
    gathered: dict[str, list[JobResult]] = defaultdict(list)
    outcomes: dict[str, Outcome] = {}
    with closing(run_jobs(plan, engine, store, observer)) as results:
        for result in results:
            key = result.job.key
            gathered[key].append(result)
            if len(gathered[key]) == expected[key]:
                outcomes[key] = conclude(claims[key], plan.scale, gathered[key])
                observer.concluded(outcomes[key])
    return [outcomes[claim.key] for claim in plan.claims if claim.key in outcomes]


def run_jobs(plan: Plan, engine: Engine, store: Store, observer: Observer) -> Generator[JobResult, None, None]:
    """Run a plan's jobs and yield their results, those first that are known already.

    Each result is stored before anybody is told of it; until a job has ended the store says that it was not run.
    Closing the generator stops the jobs that run.

    Raises:
        StoreError: the store cannot be written; the results stored so far are intact.
    """
    observer.begin(plan)
    pending = [JobResult(job, Status.NOT_RUN, _BROKEN_OFF) for job in plan.jobs]
    store.add(*pending, *(result for result in plan.known if result.status is Status.NOT_RUN))
    for result in plan.known:
        observer.finished(result)
        yield result
    if plan.jobs:
        with closing(engine.run(plan.jobs, observer.progress)) as results:
            for result in results:
                store.add(result)
                observer.finished(result)
                yield result


def recall(store: Store, claims: Iterable[Claim]) -> list[Outcome]:
    """Judge again all that a run folder holds of some claims, one outcome a claim and scale.

    Of a claim's results those of the most recently measured code are taken; results of claims that are no longer in
    the catalogue are left out.
    """
    known = {claim.key: claim for claim in claims}
    groups: dict[tuple[str, str], list[JobResult]] = defaultdict(list)
    for result in store.latest():
        if result.job.key in known and result.job.scale in known[result.job.key].scales:
            groups[result.job.key, result.job.scale].append(result)
    outcomes = []
    for (key, scale), results in groups.items():
        newest = max(results, key=lambda result: result.finished).job.fingerprint
        current = [result for result in results if result.job.fingerprint == newest]
        outcomes.append(conclude(known[key], scale, current))
    return outcomes


def recall_comparisons(store: Store, contests: Iterable[Contest]) -> list[Ranking]:
    """Rank again all comparisons that a run folder holds, the latest first.

    Results of families and members that there are no more are left out, as are those of older code where a newer one
    measured the same.
    """
    known = {f"compare-{contest.family}": contest for contest in contests}
    groups: dict[tuple[str, str], list[JobResult]] = defaultdict(list)
    for result in store.latest():
        if result.job.paper in known and result.job.setting:
            groups[result.job.paper, result.job.setting].append(result)
    rankings = []
    for (paper, setting), results in groups.items():
        parsed = Setting.from_text(setting)
        names = {member.name for member in known[paper].members}
        if set(parsed.members) <= names and parsed.kind in known[paper].quality:
            newest = max(results, key=lambda result: result.finished).job.fingerprint
            current = [result for result in results if result.job.fingerprint == newest]
            rankings.append(rank(known[paper], parsed, current))
    return sorted(rankings, key=lambda each: max(result.finished for result in each.results), reverse=True)
