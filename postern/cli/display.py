"""How a run is shown: a live table on a terminal, plain lines in a pipe, JSON lines for programs."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from postern.claims import Verdict
from postern.claims.comparison import TIMING, Place
from postern.claims.outcome import Status
from postern.cli.selection import wide_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from postern.claims.comparison import Estimate, Ranking
    from postern.claims.driver import Plan
    from postern.claims.engine import Progress as JobProgress
    from postern.claims.outcome import Job, JobResult, Outcome

STYLES = {
    Verdict.HOLDS: "bold green",
    Verdict.REFUTED: "bold red",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.SMOKE: "cyan",
    Verdict.ERROR: "bold white on red",
    Verdict.NOT_RUN: "dim",
}
PLACES = {Place.BEST: "bold green", Place.LEVEL: "green", Place.BEHIND: "bold red", Place.ERROR: "bold white on red"}


def number(value: float) -> str:
    """Format a number for reading: four significant digits."""
    return f"{value:.4g}"


def interval_in_words(outcome: Outcome) -> str:
    """Return estimate and interval, e.g. ``0.0213 [0.0157, 0.0269]``."""
    if outcome.judgement is None:
        return ""
    low, high = outcome.judgement.interval
    if math.isinf(low):
        return f"{number(outcome.judgement.estimate)} (one seed)"
    return f"{number(outcome.judgement.estimate)} [{number(low)}, {number(high)}]"


class LineDisplay:
    """Plain lines, for logs and pipes: one a finished job, one a verdict."""

    def __init__(self) -> None:
        self.total = self.ended = 0

    def begin(self, plan: Plan) -> None:
        """Say what will be run."""
        self.total = len(plan.jobs) + len(plan.known)
        print(f"{plan.subject}, {len(plan.jobs)} jobs", end="")
        print(f", {len(plan.known)} known already" if plan.known else "", flush=True)

    def progress(self, progress: JobProgress) -> None:
        """Say nothing: a log needs no bars."""

    def finished(self, result: JobResult) -> None:
        """Print how a job ended."""
        self.ended += 1
        told = f"[{self.ended}/{self.total}] {result.job}: {result.status.value}"
        told += f" in {result.seconds:.1f} s" if result.status is Status.DONE else f": {result.message}"
        print(told, flush=True)

    def concluded(self, outcome: Outcome) -> None:
        """Print a verdict."""
        print(f"{outcome.verdict.value.upper()} {outcome.claim.key} {interval_in_words(outcome)}".rstrip(), flush=True)

    def close(self) -> None:
        """End the display."""


class LiveDisplay:
    """A table that moves: overall bar, a row a running job with what it does and the time left, verdicts above."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[label]}"),
            console=console,
            transient=True,
        )
        self.rows: dict[Job, TaskID] = {}
        self.overall: TaskID | None = None

    def begin(self, plan: Plan) -> None:
        """Show the overall bar."""
        self.bars.start()
        total = len(plan.jobs) + len(plan.known)
        self.overall = self.bars.add_task(f"[bold]{escape(plan.subject)}[/]", total=total, label="jobs")

    def progress(self, progress: JobProgress) -> None:
        """Move a job's bar."""
        job = progress.job
        if job not in self.rows:
            self.rows[job] = self.bars.add_task(f"  {job.key} · seed {job.seed}", total=None, label="")
        self.bars.update(self.rows[job], completed=progress.done, total=progress.total, label=progress.label)

    def finished(self, result: JobResult) -> None:
        """Take a job's bar away."""
        if result.job in self.rows:
            self.bars.remove_task(self.rows.pop(result.job))
        if self.overall is not None:
            self.bars.advance(self.overall)

    def concluded(self, outcome: Outcome) -> None:
        """Print a verdict above the bars."""
        style = STYLES[outcome.verdict]
        told = f"[{style}]{outcome.verdict.value:>12}[/]  [bold]{outcome.claim.key}[/]  "
        told += escape(outcome.message) if outcome.message else interval_in_words(outcome).replace("[", r"\[")
        self.bars.console.print(told, highlight=False)

    def close(self) -> None:
        """Take the bars away."""
        self.bars.stop()


class JsonDisplay:
    """One JSON document a line: ``begin``, ``progress`` (at most one a second a job), ``finished``, ``concluded``."""

    def __init__(self) -> None:
        self.told: dict[Job, float] = {}

    def _print(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}, ensure_ascii=False), flush=True)

    def begin(self, plan: Plan) -> None:
        """Print what will be run."""
        claims = [claim.key for claim in plan.claims]
        told = {"subject": plan.subject, "scale": plan.scale, "claims": claims}
        self._print("begin", **told, jobs=len(plan.jobs), known=len(plan.known))

    def progress(self, progress: JobProgress) -> None:
        """Print how far a job is."""
        now = time.monotonic()
        if now - self.told.get(progress.job, -1.0) >= 1.0:
            self.told[progress.job] = now
            self._print(
                "progress", **_identity(progress.job), label=progress.label, done=progress.done, total=progress.total
            )

    def finished(self, result: JobResult) -> None:
        """Print how a job ended."""
        self._print(
            "finished",
            **_identity(result.job),
            status=result.status.value,
            message=result.message,
            metrics=result.measurement.metrics,
            seconds=round(result.seconds, 3),
        )

    def concluded(self, outcome: Outcome) -> None:
        """Print a verdict."""
        judgement = outcome.judgement
        self._print(
            "concluded",
            paper=outcome.claim.paper,
            claim=outcome.claim.name,
            scale=outcome.scale,
            verdict=outcome.verdict.value,
            estimate=None if judgement is None else judgement.estimate,
            interval=None if judgement is None else [b if math.isfinite(b) else None for b in judgement.interval],
            criterion=outcome.claim.holds_when.describe(),
            message=outcome.message,
        )

    def close(self) -> None:
        """End the display."""


Display = LineDisplay | LiveDisplay | JsonDisplay


def choose_display(as_json: bool) -> Display:
    """Return the display that fits where the output goes."""
    if as_json:
        return JsonDisplay()
    console = Console()
    return LiveDisplay(console) if console.is_terminal and sys.stdout.isatty() else LineDisplay()


def print_summary(outcomes: Sequence[Outcome]) -> None:
    """Print a table of verdicts."""
    console = wide_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("claim", overflow="fold")
    table.add_column("measured", overflow="fold")
    table.add_column("holds when", overflow="fold")
    for outcome in outcomes:
        measured = outcome.message or interval_in_words(outcome)
        table.add_row(
            f"[{STYLES[outcome.verdict]}]{outcome.verdict.value}[/]",
            outcome.claim.key,
            escape(measured),
            escape(outcome.claim.holds_when.describe()),
        )
    console.print()
    console.print(table)
    counts = {verdict: sum(outcome.verdict is verdict for outcome in outcomes) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    console.print(f"\n{len(outcomes)} claims: {told}.", highlight=False)
    if counts[Verdict.SMOKE]:
        console.print("A smoke run only proves that the code runs; the evidence is --scale small.", style="dim")


def print_ranking(ranking: Ranking) -> None:
    """Print a comparison's table, best first."""
    console = wide_console()
    console.print(f"\n{ranking.contest.task[ranking.setting.kind]}", style="dim", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    quantities = (ranking.quality, *ranking.quantities)
    for heading in ("member", "place", ranking.quality.label, "against the best"):
        table.add_column(heading, overflow="fold")
    for quantity in ranking.quantities:
        table.add_column(quantity.label, justify="right")
    are_steps_timed = any(each.step_time for each in ranking.standings)
    for label in (*(["step time"] if are_steps_timed else []), *ranking.paces.values()):
        table.add_column(f"{label}, times {ranking.setting.baseline}'s", justify="right")
    table.add_column("learning rates", overflow="fold")
    for each in ranking.standings:
        style = PLACES[each.place]
        if each.quality is None:
            table.add_row(each.member.name, f"[{style}]{each.place.value}[/]", escape(each.message))
            continue
        others = [each.others.get(quantity.name) for quantity in quantities[1:]]
        times = [*([each.step_time] if are_steps_timed else []), *map(each.paces.get, ranking.paces)]
        table.add_row(
            each.member.name,
            f"[{style}]{each.place.value}[/]",
            _estimate_in_words(each.quality, ranking.quality.scale),
            _estimate_in_words(each.lead, ranking.quality.scale) if each.lead else "",
            *("" if o is None else number(o.mean * q.scale) for q, o in zip(quantities[1:], others, strict=True)),
            *(number(time.mean) if time else "" for time in times),
            ", ".join(f"{rate:g}" for rate in sorted(set(each.learning_rates))),
        )
    console.print(table)
    console.print(
        f"\nMeans over {len(ranking.seeds)} seeds with 95 % intervals. Behind: the whole interval of the paired "
        "difference to the best is below 0; level: these seeds do not tell.",
        style="dim",
        highlight=False,
    )
    for result in ranking.results:
        if result.job.claim == TIMING and result.message:
            console.print(f"Steps were not timed: {escape(result.message)}", style="yellow", highlight=False)


def _estimate_in_words(estimate: Estimate, scale: float) -> str:
    if math.isinf(estimate.low):
        return f"{number(estimate.mean * scale)} (one seed)"
    low, high = number(estimate.low * scale), number(estimate.high * scale)
    return rf"{number(estimate.mean * scale)} \[{low}, {high}]"


def _identity(job: Job) -> dict[str, Any]:
    return {"paper": job.paper, "claim": job.claim, "scale": job.scale, "seed": job.seed}
