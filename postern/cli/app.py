"""The program: its commands, its exit codes, and how errors reach the user."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from postern import __version__
from postern.cli import check, compare, data, doctor, papers, report, results

EXIT_CODES = """Exit codes: 0, every claim or member was run (whatever came out); 1, one ended in an error, or --strict
and not every claim holds; 2, the command line is wrong; 3, the run cannot be done as asked (store, data set, ledger);
130, interrupted."""

INTERRUPTED = 130

app = typer.Typer(
    name="postern",
    help="Papers as working parts: run their claims, compare their methods, import them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("papers")(papers.papers)
app.command("check", epilog=EXIT_CODES)(check.check)
app.command("compare", epilog=EXIT_CODES)(compare.compare)
app.command("report")(report.report)
app.command("results")(results.results)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"postern {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Papers as working parts: run their claims, compare their methods, import them."""


def main() -> None:
    """Run the program. Expected errors become one message and an exit code; others keep their traceback."""
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as end:
        # Typer ends on Ctrl-C by itself, with the code but without a word.
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        _complain("interrupted; what was finished is stored: go on with the same command and --resume")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not _is_expected(error):
            raise
        _complain(str(error))
        sys.exit(3)


def _is_expected(error: Exception) -> bool:
    from postern.claims.ledger import LedgerError
    from postern.claims.store import StoreError
    from postern.data import InvalidData
    from postern.errors import Unavailable

    return isinstance(error, StoreError | LedgerError | InvalidData | Unavailable)


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]postern:[/] {escape(message)}", highlight=False)
