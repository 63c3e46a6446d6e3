"""Timing for experiments and tuning: calls that take turns, so that all see the same disturbances."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["best_times", "times_by_turns"]

Name = TypeVar("Name", bound=str)


def best_times(calls: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, float]:
    """Seconds of the best of several calls of each; see `times_by_turns`.

    Args:
        calls: what to time, by name.
        repeats: calls of each, after one that warms up and counts as well.
    """
    return {name: min(seconds) for name, seconds in times_by_turns(calls, repeats + 1, warm_up=0).items()}


def times_by_turns(
    calls: Mapping[Name, Callable[[], object]], repeats: int, *, warm_up: int = 1, seed: int = 0
) -> dict[Name, list[float]]:
    """Seconds of every call, round by round; in each round the calls take turns in another order.

    In a fixed order each call would always find the caches as the same other one has left them.

    Args:
        calls: what to time, by name.
        repeats: rounds that count.
        warm_up: rounds before them.
        seed: of the orders.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    orders = random.Random(seed)
    for done in range(warm_up + repeats):
        for name in orders.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            seconds = time.perf_counter() - start
            if done >= warm_up:
                times[name].append(seconds)
    return times
