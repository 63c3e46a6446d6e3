"""Calls take turns in changing orders, and the best of each counts."""

from collections import Counter

import pytest
import torch

from postern import timing

CPU = torch.device("cpu")


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


def test_seconds_are_those_of_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    three = timing.replayed([clock.call("a", 1.0)] * 3, CPU)
    found = timing.times_by_turns({"three": three}, 2, warm_up=0, each=3)
    assert found == {"three": pytest.approx([1.0, 1.0])}
    assert clock.called == ["a"] * 6


def test_a_processor_needs_neither_waiting_nor_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing.waiting(clock.call("a", 1.0), CPU)()
    assert clock.called == ["a"]
    assert timing.copies_beyond_cache(1, CPU) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU")
def test_a_recording_computes_anew_each_time() -> None:
    device = torch.device("cuda")
    x, found = torch.zeros(3, device=device), torch.zeros(3, device=device)
    call = timing.replayed([lambda: found.add_(x)] * 2, device)
    found.zero_()
    x.fill_(1.0)
    call()
    call()
    assert found.tolist() == [4.0] * 3
    assert timing.copies_beyond_cache(1 << 20, device) * (1 << 20) > torch.cuda.get_device_properties().L2_cache_size
