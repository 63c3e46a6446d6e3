"""`postern check`: run claims, judge them, write the report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from postern.cli.places import DEFAULT_FOLDER, PAGE, RESULTS, Out
from postern.cli.selection import complete_family, complete_paper, fail, print_json, select_claims

if TYPE_CHECKING:
    from collections.abc import Sequence

    from postern.claims import Claim
    from postern.claims.engine import Engine
    from postern.claims.outcome import Outcome


class Scale(StrEnum):
    """How large the experiments are."""

    SMOKE = "smoke"
    SMALL = "small"
    FULL = "full"


class EngineName(StrEnum):
    """What runs the jobs."""

    LOCAL = "local"
    RAY = "ray"


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PAPER|PAPER/CLAIM]...", help="Papers, or single claims.", autocompletion=complete_paper
        ),
    ] = None,
    family: Annotated[
        str | None, typer.Option("--family", help="All papers of a family.", autocompletion=complete_family)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All papers.")] = False,
    scale: Annotated[
        Scale,
        typer.Option(
            "--scale",
            help="smoke: seconds, proves that the code runs. small: the evidence, minutes on two cores. "
            "full: the paper's own regime, mostly on a GPU.",
        ),
    ] = Scale.SMOKE,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Seeds a claim.  [default: one at smoke, else the claim's]")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Jobs at once.  [default: the cores]")] = None,
    engine: Annotated[EngineName, typer.Option("--engine", help="What runs the jobs.")] = EngineName.LOCAL,
    address: Annotated[
        str | None, typer.Option("--address", help="Address of the Ray cluster.  [default: one on this machine]")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda.  [default: cuda where a claim needs it, else cpu]")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", min=1, help="Seconds a job may take.  [default: the scale's]")
    ] = None,
    out: Out = DEFAULT_FOLDER,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep finished jobs of --out whose code and configuration are the same."),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 unless every claim holds.")] = False,
    publish: Annotated[
        bool,
        typer.Option("--publish", help="Write the evidence to results/ with seeds never used before, and RESULTS.md."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line, for programs.")] = False,
) -> None:
    """Run papers' claims on this machine and say which hold.

    Examples: `postern check soft-nms`, `postern check --family softmax --scale small`,
    `postern check --all --scale smoke`.
    """
    from postern.claims import ledger
    from postern.claims.driver import execute, plan
    from postern.claims.store import Store
    from postern.cli.display import choose_display, print_summary
    from postern.cli.report import write

    claims = select_claims(names or [], family, everything)
    if publish and scale is Scale.SMOKE:
        fail("a smoke run is no evidence: publish with --scale small or --scale full")
    if address is not None and engine is not EngineName.RAY:
        fail("--address goes with --engine ray")
    if device not in (None, "cpu", "cuda"):
        fail(f"unknown device {device!r}; there are: cpu, cuda")
    commit = ledger.commit_of(Path.cwd()) if publish else ""
    chosen = _choose_seeds(claims, scale.value, seeds, publish)
    runner = choose_engine(engine, jobs, address)
    display = choose_display(as_json)
    _warn_of_slow_paths(as_json)
    with Store(out) as store:
        planned = plan(
            claims,
            scale.value,
            runner,
            seeds=chosen,
            finished=store if resume else None,
            device=device,
            time_limit_s=time_limit,
        )
        try:
            outcomes = execute(planned, runner, store, display)
        finally:
            display.close()
        page = write(store)
    if publish:
        _publish(outcomes, commit)
    if as_json:
        print_json({"event": "report", "path": str(page)})
    else:
        print_summary(outcomes)
        typer.echo(f"Report: {page.resolve().as_uri()}")
    raise typer.Exit(_exit_code(outcomes, strict))


def _choose_seeds(claims: Sequence[Claim], scale: str, count: int | None, publish: bool) -> dict[str, range]:
    """Seeds by claim: 0, 1, .. for trying things out, fresh ones from 1000 up for what is published."""
    from postern.claims import ledger

    chosen = {}
    for claim in claims:
        wanted = count or claim.seeds_at(scale)
        chosen[claim.key] = ledger.seeds_to_publish(RESULTS, claim, wanted) if publish else range(wanted)
    return chosen


def choose_engine(name: EngineName, jobs: int | None, address: str | None) -> Engine:
    """The engine of a command line."""
    if name is EngineName.RAY:
        from postern.claims.ray_engine import RayEngine

        return RayEngine(address, workers=jobs)
    from postern.claims.engine import LocalEngine

    return LocalEngine(jobs)


def _publish(outcomes: Sequence[Outcome], commit: str) -> None:
    from postern.claims import ledger
    from postern.cli.results import render_catalogue

    written = ledger.publish(RESULTS, outcomes, commit)
    PAGE.write_text(render_catalogue(RESULTS), encoding="utf-8")
    typer.echo(f"Published {len(written)} claims under {RESULTS}/ and in {PAGE}.", err=True)


def _warn_of_slow_paths(quiet: bool) -> None:
    from postern._native import status

    native = status()
    if not native.available and not quiet:
        typer.echo(f"postern: slower path in use, without the compiled kernels: {native.reason}", err=True)


def _exit_code(outcomes: Sequence[Outcome], strict: bool) -> int:
    from postern.claims import Verdict

    passing = {Verdict.HOLDS, Verdict.SMOKE}
    if any(outcome.verdict is Verdict.ERROR for outcome in outcomes):
        return 1
    return int(strict and any(outcome.verdict not in passing for outcome in outcomes))
