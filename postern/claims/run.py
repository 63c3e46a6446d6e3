"""What a claim's experiment sees of the run it is part of, and what it leaves behind."""

from __future__ import annotations

import io
import numbers
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from postern.errors import Unavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")
Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Picture:
    """A figure as it is stored: SVG, and its text alternative."""

    svg: str
    description: str

    @classmethod
    def of(cls, figure: Figure, description: str) -> Picture:
        """Draw a matplotlib figure on nothing, so that it suits dark pages too."""
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
        return cls(text.getvalue(), description)


@dataclass
class Run:
    """One claim at one scale with one seed.

    Attributes:
        seed: the seed of this job; torch's, NumPy's and Python's global generators are seeded with it.
        scale: "smoke", "small" or "full".
        device: where the experiment computes.
        threads: how many threads it may use (already set for torch).
    """

    seed: int
    scale: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    on_progress: Callable[[str, int, int | None], None] | None = None
    logs: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, Picture] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)

    def generator(self, stream: int = 0) -> torch.Generator:
        """Return a torch generator (CPU) that depends on the seed and on ``stream`` alone."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Return a NumPy generator that depends on the seed and on ``stream`` alone."""
        return np.random.default_rng((self.seed, stream))

    def progress(self, iterable: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
        """Yield the items, showing how far the loop is.

        Args:
            iterable: what to loop over.
            label: what the loop does, two or three words.
            total: number of items, where ``len`` does not tell.
        """
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self._report(label, 0, total)
        for done, item in enumerate(iterable, start=1):
            yield item
            self._report(label, done, total)

    def log(self, step: int, **values: float) -> None:
        """Record a point of one or several curves.

        Args:
            step: where on the horizontal axis.
            values: one number a curve.

        Raises:
            ValueError: a value that is no number.
        """
        self.logs.append({"step": int(step)} | {name: _as_number(name, value) for name, value in values.items()})

    def figure(self, name: str, figure: Figure, description: str) -> None:
        """Keep a figure for the report.

        Args:
            name: file-name-like, unique within the claim ("precision-recall").
            figure: a matplotlib figure.
            description: what a reader who cannot see it needs to know.

        Raises:
            ValueError: an empty description.
        """
        if not description.strip():
            raise ValueError(f"figure {name!r} needs a description, for readers who cannot see it")
        self.figures[name] = Picture.of(figure, description)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a table for the report.

        Args:
            name: its heading.
            rows: one mapping a row, all with the same keys; values are text or numbers.

        Raises:
            ValueError: no rows, or rows whose keys differ.
        """
        if not rows:
            raise ValueError(f"table {name!r} has no rows")
        columns = list(rows[0])
        for row in rows:
            if list(row) != columns:
                raise ValueError(f"table {name!r}: a row has the columns {list(row)}, the first has {columns}")
        self.tables[name] = [{column: _as_cell(value) for column, value in row.items()} for row in rows]

    def require(self, condition: bool, reason: str) -> None:
        """Stop here as *not run* unless the machine has what the experiment needs.

        Args:
            condition: whether it has.
            reason: what is missing and what to do about it.

        Raises:
            Unavailable: the condition is false.
        """
        if not condition:
            raise Unavailable(reason)

    def _report(self, label: str, done: int, total: int | None) -> None:
        if self.on_progress is not None:
            self.on_progress(label, done, total)


@dataclass(frozen=True)
class Measurement:
    """What one job measured."""

    metrics: dict[str, float]
    logs: tuple[dict[str, float], ...] = ()
    figures: Mapping[str, Picture] = field(default_factory=dict)
    tables: Mapping[str, list[dict[str, Cell]]] = field(default_factory=dict)


def _as_number(name: str, value: object) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise ValueError(f"metric {name!r} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)


def _as_cell(value: object) -> Cell:
    if isinstance(value, torch.Tensor | np.generic):
        value = value.item()
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def check_metrics(returned: object) -> dict[str, float]:
    """Check what a claim returned: a mapping of names to finite numbers.

    Raises:
        ValueError: it is something else; the text names the metric and the value.
    """
    if not isinstance(returned, Mapping):
        raise ValueError(f"a claim returns a mapping of metric names to numbers, got {type(returned).__name__}")
    if not returned:
        raise ValueError("a claim returns at least one metric, got an empty mapping")
    metrics: dict[str, float] = {}
    for name, value in returned.items():
        if not isinstance(name, str):
            raise ValueError(f"metric names are strings, got {name!r}")
        number = _as_number(name, value)
        if not np.isfinite(number):
            raise ValueError(f"metric {name!r} is {number}: the experiment diverged or divided by zero")
        metrics[name] = number
    return metrics


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that an experiment calls may use the global generator
    torch.manual_seed(seed)
