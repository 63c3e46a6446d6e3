"""Timing for claims; see `postern.timing`."""

from postern.timing import best_times, times_by_turns

__all__ = ["best_times", "times_by_turns"]
