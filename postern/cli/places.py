"""Where the commands read and write, unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_FOLDER = Path("postern-report")
RESULTS = Path("results")
PAGE = Path("RESULTS.md")

Out = Annotated[
    Path, typer.Option("--out", help="Run folder: finished jobs and the report.", file_okay=False, metavar="DIR")
]
