"""`postern results`: write RESULTS.md from the ledger, or check that it is in step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postern.cli.places import PAGE, RESULTS


def results(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if RESULTS.md differs from what would be.")
    ] = False,
) -> None:
    """Write RESULTS.md from the published evidence under `results/`."""
    text = render_catalogue(RESULTS)
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        typer.echo(f"{PAGE} is out of step with {RESULTS}/: run `postern results`", err=True)
        raise typer.Exit(1)


def render_catalogue(folder: Path) -> str:
    """Return the text of RESULTS.md for a ledger, with the notes of the catalogue's claims."""
    from postern.claims import ledger
    from postern.papers import catalogue

    claims = {claim.key: claim for paper in catalogue() for claim in paper.claims.values()}
    return ledger.render(ledger.read_all(folder), claims)
