"""What a machine can do to a driver: kill it, interrupt it, fill its disk. Finished results are there afterwards."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from postern.claims import Verdict
from postern.claims.driver import execute, plan, recall
from postern.claims.engine import LocalEngine
from postern.claims.outcome import JobResult, Status
from postern.claims.store import Store, StoreError
from tests.claims.papers import PAPER
from tests.claims.processes import process_of, wait_until_gone
from tests.claims.test_driver import Witness

ROOT = Path(__file__).parents[2]


class Drive:
    """A running driver: a real process that leads a process group, as one that a shell started does."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder / "run"
        self.scratch = folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.claims.drive", str(self.folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self.scratch), "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def events(self) -> Iterator[dict]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until(self, *awaited: dict) -> list[dict]:
        """Read events until all that are awaited have come up, in any order."""
        told, left = [], list(awaited)
        for event in self.events():
            told.append(event)
            left = [each for each in left if not each.items() <= event.items()]
            if not left:
                return told
        raise AssertionError(f"{left} never came; told: {told}; {self.ended()}")

    def ended(self, seconds: float = 20.0) -> tuple[int, str]:
        """Wait for its end; return exit code and what it wrote to standard error."""
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors

    def descendants(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


@pytest.fixture
def drives() -> Iterator[list[Drive]]:
    """The drivers of a test, which end with it even if it fails."""
    started: list[Drive] = []
    yield started
    for drive in started:
        if drive.process.poll() is None:
            drive.process.kill()
            drive.process.communicate()


def done_rows(folder: Path) -> list[tuple[str, int, int]]:
    """How often each job has been done, by claim and seed."""
    with sqlite3.connect(folder / Store.FILE) as connection:
        return connection.execute(
            "SELECT claim, seed, count(*) FROM job WHERE status = 'done' GROUP BY claim, seed ORDER BY claim, seed"
        ).fetchall()


def statuses(folder: Path) -> dict[tuple[str, int], Status]:
    with Store(folder) as store:
        return {(result.job.claim, result.job.seed): result.status for result in store.latest()}


def test_kill_9_of_the_driver_loses_the_jobs_in_flight_and_no_others(tmp_path: Path, drives: list[Drive]) -> None:
    engine = LocalEngine(2)
    drive = Drive(tmp_path, "hangs:0", "is-slow:0,1,2")
    drives.append(drive)
    told = drive.until(
        {"event": "finished", "claim": "is-slow", "seed": 0, "status": "done"},
        {"event": "running", "claim": "is-slow", "seed": 1},
    )
    working = {process_of(event["label"]) for event in told if event["event"] == "running"} - {0}
    descendants = drive.descendants()
    assert len(working & set(descendants)) >= 1

    with pytest.raises(StoreError, match=r"another postern is using the run folder .*wait for it to end, or choose"):
        Store(drive.folder)

    os.kill(drive.process.pid, signal.SIGKILL)
    assert drive.ended()[0] == -signal.SIGKILL
    wait_until_gone(*descendants, *working)
    assert list(drive.scratch.glob("postern-*")) == []
    assert statuses(drive.folder) == {
        ("hangs", 0): Status.NOT_RUN,
        ("is-slow", 0): Status.DONE,
        ("is-slow", 1): Status.NOT_RUN,
        ("is-slow", 2): Status.NOT_RUN,
    }
    with Store(drive.folder) as store:
        [outcome] = recall(store, [PAPER.claims["is-slow"]])
    assert (outcome.verdict, list(outcome.metrics)) == (Verdict.NOT_RUN, [0])
    assert "--resume" in outcome.message

    witness = Witness()
    with Store(drive.folder) as store:
        rest = plan([PAPER.claims["is-slow"]], "smoke", engine, seeds={"hostile/is-slow": [0, 1, 2]}, finished=store)
        [outcome] = execute(rest, engine, store, witness)
    assert (outcome.verdict, list(outcome.metrics)) == (Verdict.SMOKE, [0, 1, 2])
    assert {progress.job.seed for progress in witness.heard} == {1, 2}
    assert done_rows(drive.folder) == [("is-slow", 0, 1), ("is-slow", 1, 1), ("is-slow", 2, 1)]


def test_ctrl_c_ends_at_once_and_keeps_what_is_finished(tmp_path: Path, drives: list[Drive]) -> None:
    drive = Drive(tmp_path, "hangs:0,1", "behaves:0")
    drives.append(drive)
    drive.until({"event": "running", "claim": "hangs", "seed": 0}, {"event": "running", "claim": "hangs", "seed": 1})
    descendants = drive.descendants()
    started = time.monotonic()
    os.killpg(drive.process.pid, signal.SIGINT)
    code, errors = drive.ended()
    assert time.monotonic() - started < 5
    assert code == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1
    wait_until_gone(*descendants)
    assert list(drive.scratch.glob("postern-*")) == []
    assert set(statuses(drive.folder).values()) == {Status.NOT_RUN}


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path: Path, drives: list[Drive]) -> None:
    drive = Drive(tmp_path, "--full-after", "1", "behaves:0", "hangs:0", "is-slow:0")
    drives.append(drive)
    drive.until({"event": "finished", "claim": "behaves", "seed": 0, "status": "done"})
    descendants = drive.descendants()
    code, errors = drive.ended()
    assert code == 3
    assert errors.startswith(f"cannot write to {drive.folder / Store.FILE}: ")
    assert errors.strip().endswith(
        f"Results stored so far are intact: see that the disk has room, then go on with --resume --out {drive.folder}"
    )
    wait_until_gone(*descendants)
    assert done_rows(drive.folder) == [("behaves", 0, 1)]
    assert statuses(drive.folder)["is-slow", 0] is Status.NOT_RUN

    claims = [PAPER.claims["behaves"], PAPER.claims["is-slow"]]
    with Store(drive.folder) as store:
        rest = plan(claims, "smoke", LocalEngine(2), seeds={claim.key: [0] for claim in claims}, finished=store)
        assert [job.claim for job in rest.jobs] == ["is-slow"]
        store.add(JobResult(rest.jobs[0], Status.DONE))
    assert done_rows(drive.folder) == [("behaves", 0, 1), ("is-slow", 0, 1)]


def test_a_disk_that_was_full_before_is_told_and_leaves_nothing_half(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(
            StoreError, match=rf"cannot use {tmp_path / Store.FILE} as a run's store: .*; choose another"
        ):
            Store(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert statuses(tmp_path) == {}
