"""`postern data`: list the data sets, fetch one from the Hub."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from postern.cli.selection import fail, print_json, wide_console

app = typer.Typer(name="data", help="List the data sets, or fetch one from the Hub.", no_args_is_help=True)


def _complete_name(incomplete: str) -> list[str]:
    from postern.data import catalogue

    return [data_set.name for data_set in catalogue() if data_set.name.startswith(incomplete)]


@app.command("list")
def list_data_sets(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False) -> None:
    """List the data sets: what they are, and where on this machine they are found."""
    from postern.data import catalogue, locate

    places = {data_set: locate(data_set.name) for data_set in catalogue()}
    if as_json:
        print_json(
            [
                {
                    "name": data_set.name,
                    "kind": data_set.kind,
                    "splits": list(data_set.splits),
                    "where": place.where,
                    "path": None if place.path is None else str(place.path),
                    "remedy": place.remedy,
                }
                for data_set, place in places.items()
            ]
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "kind", "splits", "where"):
        table.add_column(heading, overflow="fold")
    for data_set, place in places.items():
        table.add_row(data_set.name, data_set.kind, ", ".join(data_set.splits), place.where)
    wide_console().print(table)


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Data sets, by name.", autocompletion=_complete_name)],
) -> None:
    """Fetch data sets from the Hub, for later use without a network."""
    from postern.data import catalogue
    from postern.data import fetch as fetch_one

    known = {data_set.name for data_set in catalogue()}
    for name in names:
        if name not in known:
            from postern.cli.selection import nearest

            fail(f"unknown data set {name!r}; {nearest(name, sorted(known))}")
    for name in names:
        typer.echo(f"{name}: {fetch_one(name)}")
