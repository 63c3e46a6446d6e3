"""Comparisons: for each family that has one, who takes part, on what networks, and how they are judged."""

from __future__ import annotations

import difflib
import importlib

from postern.claims.comparison import CannotCompare, Contest

__all__ = ["FAMILIES", "contests", "find"]

FAMILIES = ("softmax", "heads", "attention", "experts", "adaptive")


def find(family: str) -> Contest:
    """The contest of a family; imports its module alone.

    Raises:
        CannotCompare: the family has none (yet); the nearest names are suggested.
    """
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(FAMILIES)}"
        raise CannotCompare(f"no comparison of {family!r}; {hint}")
    contest: Contest = importlib.import_module(f"{__name__}.{family}").CONTEST
    return contest


def contests() -> tuple[Contest, ...]:
    """All contests; imports their modules."""
    return tuple(find(family) for family in FAMILIES)
