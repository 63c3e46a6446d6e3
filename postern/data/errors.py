"""What can be wrong with a data set: it is not here, or its file is not what it should be."""

from __future__ import annotations

from pathlib import Path

from postern.errors import Unavailable


class DataUnavailable(Unavailable):
    """A data set that is nowhere to be found: not embedded, not below ``$POSTERN_DATA``, not on the Hub."""


class InvalidData(ValueError):
    """A file that is not the data set it stands for.

    Args:
        path: the file.
        found: what is wrong with it, in words.
        expected: what it should be.
        remedy: what to do.
    """

    def __init__(self, path: Path, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{path}: {found}; expected {expected}. {remedy}")
        self.path = path
