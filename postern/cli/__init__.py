"""The commands: `postern papers`, `check`, `report`, `results`, `data` and `doctor`."""

from postern.cli.app import main

__all__ = ["main"]
