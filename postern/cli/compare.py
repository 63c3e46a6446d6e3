"""`postern compare`: put the members of a family through the same budget on the user's data."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from postern.cli.check import EngineName, choose_engine
from postern.cli.places import DEFAULT_FOLDER, Out
from postern.cli.selection import fail, print_json

if TYPE_CHECKING:
    from postern.claims.comparison import Contest, Setting

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
KINDS = {"text": "a text", "table": "a table", "images": "images"}
DEFAULT_DATA = {"images": "digits", "text": "python-stdlib"}  # by kind; the first that a family takes


def complete_contest(incomplete: str) -> list[str]:
    """Complete the name of a family that has a comparison."""
    from postern.compare import FAMILIES

    return [family for family in FAMILIES if family.startswith(incomplete)]


def compare(
    family: Annotated[
        str,
        typer.Argument(
            metavar="FAMILY", help="softmax, heads, attention, experts or adaptive.", autocompletion=complete_contest
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="A text file, a table (.csv, .tsv, .parquet) with --label, a folder with one folder of images a "
            "class, a data set that postern knows (`postern data list`), or any other of the Hub.  [default: digits, "
            "or python-stdlib for members that take texts alone]",
        ),
    ] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="COLUMN", help="The column of the classes.")] = None,
    members: Annotated[
        str | None, typer.Option("--members", help="Who takes part, separated by commas.  [default: all that can]")
    ] = None,
    budget: Annotated[int, typer.Option("--budget", min=1, metavar="STEPS", help="Steps of each training.")] = 400,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds of each member.")] = 5,
    learning_rates: Annotated[
        str, typer.Option("--learning-rates", help="The grid; each member takes its best on validation data.")
    ] = ",".join(f"{rate:g}" for rate in LEARNING_RATES),
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Jobs at once.  [default: the cores]")] = None,
    engine: Annotated[EngineName, typer.Option("--engine", help="What runs the jobs.")] = EngineName.LOCAL,
    address: Annotated[
        str | None, typer.Option("--address", help="Address of the Ray cluster.  [default: one on this machine]")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    out: Out = DEFAULT_FOLDER,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished jobs of --out whose code, data and setting are the same.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document a line, for programs.")] = False,
) -> None:
    """Compare the members of a family: same data, same budget, same learning rates, same seeds.

    Each member is trained from scratch with every learning rate of the grid and every seed, takes the rate that is best
    on validation data, and is tested once. Training steps are timed besides, by turns.

    Examples: `postern compare heads`, `postern compare softmax --data mine.txt --budget 1000`,
    `postern compare heads --data mine.csv --label species --members softmax,svm`.
    """
    if device not in ("cpu", "cuda"):
        fail(f"unknown device {device!r}; there are: cpu, cuda")
    if address is not None and engine is not EngineName.RAY:
        fail("--address goes with --engine ray")
    rates = _rates(learning_rates)

    from postern import compare as contests
    from postern.claims.comparison import CannotCompare, rank
    from postern.claims.driver import plan_comparison, run_jobs
    from postern.claims.store import Store
    from postern.cli.display import choose_display, print_ranking
    from postern.cli.report import write

    runner = choose_engine(engine, jobs, address)
    if device == "cuda" and not runner.has_gpu:
        fail("--device cuda: there is no CUDA device; leave --device out")
    try:
        contest = contests.find(family)
        source = data or next(name for kind, name in DEFAULT_DATA.items() if kind in contest.task)
        setting = _setting(contest, source, label, members, budget, rates, device, quiet=as_json)
    except CannotCompare as error:
        fail(str(error))
    display = choose_display(as_json)
    with Store(out) as store:
        planned = plan_comparison(contest, setting, runner, seeds=range(seeds), finished=store if resume else None)
        try:
            with closing(run_jobs(planned, runner, store, display)) as running:
                ranking = rank(contest, setting, list(running))
        finally:
            display.close()
        page = write(store)
    if as_json:
        print_json({"event": "ranked", **ranking.to_document()})
        print_json({"event": "report", "path": str(page)})
    else:
        print_ranking(ranking)
        typer.echo(f"Report: {page.resolve().as_uri()}")
    raise typer.Exit(int(ranking.has_errors))


def _rates(asked: str) -> tuple[float, ...]:
    try:
        rates = tuple(dict.fromkeys(float(rate) for rate in asked.split(",")))
    except ValueError:
        fail(f"--learning-rates takes numbers separated by commas, such as 0.001,0.003; got {asked!r}")
    if not all(0 < rate < float("inf") for rate in rates):
        fail(f"learning rates are positive, got {asked!r}")
    return rates


def _setting(
    contest: Contest,
    data: str,
    label: str | None,
    members: str | None,
    budget: int,
    rates: tuple[float, ...],
    device: str,
    *,
    quiet: bool,
) -> Setting:
    """Read the data, and find out who can take part.

    Raises:
        CannotCompare: fewer than two, or one that was asked for and does not suit the data.
    """
    from dataclasses import replace

    from postern.claims.comparison import CannotCompare, Setting
    from postern.compare.problems import digest_of, kind_of, make_problem
    from postern.data import load_own_splits

    source = str(Path(data).resolve()) if Path(data).exists() else data
    try:
        splits = load_own_splits(source, label=label)
    except ValueError as error:  # an unknown name, a missing label; InvalidData is reported as such
        raise CannotCompare(str(error)) from error
    make_problem(splits)
    if not quiet:
        for split, part in splits.items():
            typer.echo(f"{split}: {part!r}", err=True)
    kind = kind_of(splits)
    if kind not in contest.task:
        taken = " or ".join(KINDS[each] for each in contest.task)
        raise CannotCompare(f"members of {contest.family} need {taken}; {data} is {KINDS[kind]}")
    names = [member.name for member in contest.members]
    asked = [contest.member(name.strip()).name for name in members.split(",")] if members else names
    setting = Setting(
        source,
        kind,
        digest_of(splits),
        label,
        tuple(name for name in names if name in asked),
        budget,
        rates,
        device,
    )
    unsuited = {name: why for name, why in contest.unsuited(setting).items() if name in asked}
    if members and unsuited:
        raise CannotCompare("; ".join(f"{name} cannot take part: {why}" for name, why in unsuited.items()))
    for name, why in unsuited.items():
        if not quiet:
            typer.echo(f"{name} is left out: {why}", err=True)
    left = tuple(name for name in setting.members if name not in unsuited)
    if len(left) < 2:
        raise CannotCompare(
            f"a comparison takes two members or more, got {', '.join(left) or 'none'}; {contest.family} has: "
            f"{', '.join(names)}"
        )
    return replace(setting, members=left)
