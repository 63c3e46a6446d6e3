"""Timing for experiments and tuning: calls that take turns, so that all see the same disturbances.

A GPU works on while the program goes on: `waiting` makes a call end when its work does. Where the work takes less time
than the program takes to ask for it, `replayed` leaves the asking out, as serving does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

__all__ = ["best_times", "copies_beyond_cache", "replayed", "times_by_turns", "waiting"]

Name = TypeVar("Name", bound=str)


def best_times(calls: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, float]:
    """Seconds of the best of several calls of each; see `times_by_turns`.

    Args:
        calls: what to time, by name.
        repeats: calls of each, after one that warms up and counts as well.
    """
    return {name: min(seconds) for name, seconds in times_by_turns(calls, repeats + 1, warm_up=0).items()}


def times_by_turns(
    calls: Mapping[Name, Callable[[], object]], repeats: int, *, warm_up: int = 1, seed: int = 0, each: int = 1
) -> dict[Name, list[float]]:
    """Seconds of every call, round by round; in each round the calls take turns in another order.

    In a fixed order each call would always find the caches as the same other one has left them.

    Args:
        calls: what to time, by name.
        repeats: rounds that count.
        warm_up: rounds before them.
        seed: of the orders.
        each: how many times a call does what is timed; its seconds are divided by that.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    orders = random.Random(seed)
    for done in range(warm_up + repeats):
        for name in orders.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            seconds = time.perf_counter() - start
            if done >= warm_up:
                times[name].append(seconds / each)
    return times


def waiting(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return the call made to end when its work does.

    Args:
        call: what to time.
        device: where it works.
    """

    def call_and_wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call_and_wait


def replayed(
    calls: Sequence[Callable[[], object]], device: torch.device, *, is_recorded: bool = True
) -> Callable[[], None]:
    """All calls after each other as one, to be timed; on a GPU recorded once, as a CUDA graph, and waited for.

    Args:
        calls: what to time.
        device: where they work.
        is_recorded: False for calls that wait for results or ask for values on a GPU, which cannot be recorded.
    """

    def all_calls() -> None:
        for call in calls:
            call()

    if device.type != "cuda" or not is_recorded:
        return waiting(all_calls, device)
    others = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    others.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(others):  # kernels are compiled, and libraries take their memory, before the recording
        for _ in range(3):
            all_calls()
    torch.cuda.current_stream(device).wait_stream(others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    return waiting(graph.replay, device)


def copies_beyond_cache(num_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many tensors to go through in turn, so that a GPU finds none in its cache that it has read before.

    One on a CPU, where calls that take turns leave each other's data in the cache, or not, as in use.

    Args:
        num_bytes: of a tensor.
        device: where it is.
        most: not more than that.
    """
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(most, 1 + 2 * cache // max(1, num_bytes))
