"""Processes as the tests of the engine see them: which job one has, and whether it is gone."""

import contextlib
import re
import time

import psutil


def process_of(label: str) -> int:
    """The number of a job's process, which the slow claims of `tests.claims.papers` put into their label; else 0."""
    found = re.fullmatch(r"process (\d+)", label)
    return int(found[1]) if found else 0


def wait_until_gone(*numbers: int, seconds: float = 10.0) -> None:
    """Wait for processes to end. A zombie has ended; who waits for it is not ours to say."""

    def is_alive(number: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
        return False

    deadline = time.monotonic() + seconds
    while left := [number for number in numbers if is_alive(number)]:
        assert time.monotonic() < deadline, f"processes {left} linger"
        time.sleep(0.05)
