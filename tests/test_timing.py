"""Calls take turns in changing orders, and the best of each counts."""

from collections import Counter

import pytest

from postern import timing


class Clock:
    """Time that passes in calls alone, as long as each says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.called: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, *seconds: float):
        def run() -> None:
            done = self.called.count(name)
            self.called.append(name)
            self.now += seconds[min(done, len(seconds) - 1)]

        return run


def test_warm_up_does_not_count_and_every_round_has_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls = {"a": clock.call("a", 9.0, 3.0, 2.0), "b": clock.call("b", 8.0, 4.0), "c": clock.call("c", 1.0)}
    found = timing.times_by_turns(calls, 12)
    assert found["a"] == pytest.approx([3.0] + [2.0] * 11)
    assert found["b"] == pytest.approx([4.0] * 12)
    rounds = [tuple(clock.called[start : start + 3]) for start in range(0, 39, 3)]
    assert all(Counter(each) == Counter("abc") for each in rounds)
    assert len(set(rounds)) > 1


def test_the_best_of_all_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = timing.best_times({"a": clock.call("a", 1.0, 3.0), "b": clock.call("b", 5.0, 4.0, 6.0)}, 2)
    assert found == pytest.approx({"a": 1.0, "b": 4.0})
    assert Counter(clock.called) == {"a": 3, "b": 3}
