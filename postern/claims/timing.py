"""Timing for experiments about speed: calls that take turns, so that all see the same disturbances."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=str)


def best_times(calls: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, float]:
    """Seconds of the best of several calls of each; the calls take turns.

    Args:
        calls: what to time, by name.
        repeats: calls of each, after one that warms up and counts as well.
    """
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
