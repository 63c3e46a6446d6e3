"""`postern report`: write the report of a run folder again, and open it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from postern.cli.places import DEFAULT_FOLDER, RESULTS, Out

if TYPE_CHECKING:
    from postern.claims.store import Store


def report(
    out: Out = DEFAULT_FOLDER,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the report of a run folder: a static site that needs no network.

    It shows the folder's runs beside the published evidence, if the working directory has `results/`.
    """
    from postern.claims.store import Store, StoreError

    if not (out / Store.FILE).exists():
        raise StoreError(f"{out} holds no run: run `postern check` first, or name another folder with --out")
    with Store(out) as store:
        page = write(store)
    typer.echo(f"Report: {page.resolve().as_uri()}")
    if open_browser and typer.launch(page.resolve().as_uri()) != 0:
        typer.echo("No browser could be opened here; the address above works in any.", err=True)


def write(store: Store) -> Path:
    """Write the report of an open store into its folder and return its first page."""
    from postern.claims import ledger
    from postern.claims.driver import recall, recall_comparisons
    from postern.claims.report import write_report
    from postern.compare import contests
    from postern.papers import catalogue

    papers = catalogue()
    outcomes = recall(store, [claim for paper in papers for claim in paper.claims.values()])
    published = ledger.read_all(RESULTS) if RESULTS.is_dir() else []
    environment = ledger.versions() | {"processor": ledger.processor()}
    comparisons = recall_comparisons(store, contests())
    return write_report(store.folder, papers, outcomes, published, environment, comparisons)
