"""The local engine on real processes: what a job does to itself it does to itself alone."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from postern.claims import engine as engine_module
from postern.claims.engine import LocalEngine, Progress, available_cores, available_memory
from postern.claims.outcome import Job, JobResult, Status
from tests.claims.processes import process_of, wait_until_gone


def job(claim: str, seed: int = 0, scale: str = "smoke", **means) -> Job:
    return Job("tests.claims.papers", "hostile", claim, scale, seed, "fingerprint", **means)


def ignore(progress: Progress) -> None:
    """Watch nothing."""


# All in one run, two at once, so that each could disturb the others.
MISBEHAVIOURS = (
    job("hangs", time_limit_s=1.5),
    job("hangs-deaf", time_limit_s=1.0),
    job("behaves", 5),
    job("raises"),
    job("exits"),
    job("exits-at-once"),
    job("exits-with-zero"),
    job("crashes"),
    job("runs-alone", exclusive=True, threads=2),
    job("eats-memory", memory_limit=2**30),
    job("prints"),
    job("prints-without-end"),
    job("returns-nan"),
    job("returns-text"),
    job("forgets"),
    job("lacks"),
    job("leaves-a-child", 0),
    job("leaves-a-child", 1, time_limit_s=1.0),
    job("leaves-its-mark", 0),
    job("leaves-its-mark", 1),
    job("no-such-claim"),
    job("behaves", 6),
)


@pytest.fixture(scope="module")
def landed() -> list[JobResult]:
    return list(LocalEngine(2).run(MISBEHAVIOURS, ignore))


@pytest.fixture(scope="module")
def results(landed: list[JobResult]) -> dict[tuple[str, int], JobResult]:
    return {(result.job.claim, result.job.seed): result for result in landed}


class TestMisbehaviour:
    def test_each_job_has_one_result(self, landed: list[JobResult]) -> None:
        assert sorted(map(str, (result.job for result in landed))) == sorted(map(str, MISBEHAVIOURS))

    @pytest.mark.parametrize(
        ("claim", "seed", "message"),
        [
            ("hangs", 0, "did not end within its limit of 1.5 s and was stopped"),
            ("hangs-deaf", 0, "did not end within its limit of 1 s and was stopped"),
            ("raises", 0, "KeyError: 'no such thing'"),
            ("exits", 0, "SystemExit: 0"),
            ("exits-at-once", 0, "its process ended early, with exit code 3"),
            ("exits-with-zero", 0, "its process ended early, with exit code 0"),
            ("crashes", 0, "its process crashed: SIGSEGV"),
            ("eats-memory", 0, r"held 1\.\d GiB of memory, more than its limit of 1\.0 GiB, and was stopped"),
            ("prints-without-end", 0, "printed more than 256 MiB, and was stopped"),
            ("returns-nan", 0, "ValueError: metric 'value' is nan: the experiment diverged or divided by zero"),
            ("returns-text", 0, "ValueError: metric 'value' must be a number, got 'high' of type str"),
            ("forgets", 0, "ValueError: claim hostile/forgets is judged by b, which .* returned: a"),
            ("leaves-a-child", 1, "did not end within its limit of 1 s and was stopped"),
            ("no-such-claim", 0, "ValueError: tests.claims.papers has no claim 'no-such-claim'; it has: behaves, .*"),
        ],
    )
    def test_is_an_error_that_says_what_happened(
        self, results: dict[tuple[str, int], JobResult], claim: str, seed: int, message: str
    ) -> None:
        result = results[claim, seed]
        assert result.status is Status.ERROR
        assert re.fullmatch(message, result.message)
        assert result.measurement.metrics == {}

    def test_leaves_the_others_as_they_are(self, results: dict[tuple[str, int], JobResult]) -> None:
        for seed in (5, 6):
            assert results["behaves", seed].status is Status.DONE
            assert results["behaves", seed].message == ""
            assert len(results["behaves", seed].measurement.logs) == 4
        assert results["behaves", 5].measurement.metrics != results["behaves", 6].measurement.metrics
        assert results["leaves-its-mark", 0].measurement.metrics == {"value": 1.0}
        assert results["leaves-its-mark", 1].measurement.metrics == {"value": 1.0}

    def test_is_told_apart_from_what_the_machine_lacks(self, results: dict[tuple[str, int], JobResult]) -> None:
        assert results["lacks", 0].status is Status.NOT_RUN
        assert results["lacks", 0].message == "needs a thing that nobody has"

    def test_what_a_job_prints_is_kept_from_python_and_c(self, results: dict[tuple[str, int], JobResult]) -> None:
        assert sorted(results["prints", 0].output.splitlines()) == ["from C", "from Python", "to standard error"]
        assert 'raise KeyError("no such thing")' in results["raises", 0].output
        assert results["exits-with-zero", 0].output == "leaving\n"
        assert "Segmentation fault" in results["crashes", 0].output
        assert results["prints-without-end", 0].output.count("and again") > 500
        assert len(results["prints-without-end", 0].output) <= 8_000

    def test_nothing_that_a_job_started_outlives_it(self, results: dict[tuple[str, int], JobResult]) -> None:
        assert results["leaves-a-child", 0].status is Status.DONE
        children = [int(results["leaves-a-child", seed].output) for seed in (0, 1)]
        wait_until_gone(*children, int(results["hangs-deaf", 0].output))

    def test_jobs_that_measure_time_run_last_with_their_threads(self, landed: list[JobResult]) -> None:
        last = landed[-1]
        assert last.job.claim == "runs-alone"
        assert last.measurement.metrics == {"value": 1.0, "threads": 2.0, "torch threads": 2.0}
        assert all(result.finished <= last.finished for result in landed)

    def test_seconds_are_those_of_the_job(self, results: dict[tuple[str, int], JobResult]) -> None:
        assert 1.5 <= results["hangs", 0].seconds < 3.5
        assert 0 < results["behaves", 5].seconds < 1


@pytest.fixture
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the engine makes its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_progress_is_told(own_scratch: Path) -> None:
    news: list[Progress] = []
    [result] = LocalEngine(1).run([job("is-slow")], news.append)
    assert result.status is Status.DONE
    assert all(progress.job == result.job for progress in news)
    steps = [progress.done for progress in news if process_of(progress.label)]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3
    assert {progress.total for progress in news if process_of(progress.label)} == {10}
    assert list(own_scratch.iterdir()) == []


def test_kill_9_of_a_worker_costs_that_job_alone() -> None:
    killed: list[int] = []

    def kill_first(progress: Progress) -> None:
        if progress.job.seed == 0 and process_of(progress.label) and not killed:
            killed.append(process_of(progress.label))
            os.kill(killed[0], signal.SIGKILL)

    results = {
        each.job.seed: each for each in LocalEngine(2).run([job("is-slow", seed) for seed in (0, 1, 2)], kill_first)
    }
    assert results[0].status is Status.ERROR
    assert results[0].message.startswith("its process was killed: by hand, or by the system because memory ran out")
    assert results[1].status is results[2].status is Status.DONE


def test_a_run_that_is_broken_off_leaves_nothing_behind(own_scratch: Path) -> None:
    seen: set[int] = set()

    def watch(progress: Progress) -> None:
        seen.add(process_of(progress.label))

    running = LocalEngine(2).run([job("hangs"), job("is-slow"), job("hangs", 1)], watch)
    assert next(running).job.claim == "is-slow"
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 2
    seen.discard(0)
    assert len(seen) >= 2
    wait_until_gone(*seen, seconds=1)
    assert list(own_scratch.iterdir()) == []


def test_a_job_for_a_gpu_begins_from_nothing() -> None:
    """Where there is none, the process says so itself: a cluster's node may differ from the driver's machine."""
    if LocalEngine().has_gpu:
        pytest.skip("needs a machine without a CUDA device")
    [result] = LocalEngine(1).run([job("behaves", device="cuda")], ignore)
    assert result.status is Status.NOT_RUN
    assert result.message == "needs a CUDA device, and this machine has none"


def test_a_job_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    results = list(LocalEngine(2).run([job("behaves", seed) for seed in range(3)], ignore))
    assert [result.status for result in results] == [Status.ERROR] * 3
    assert "could not be started: FileNotFoundError" in results[0].message


def test_two_runs_of_one_process_do_not_stop_each_other() -> None:
    one, other = (LocalEngine(2).run([job("behaves", seed), job("is-slow", seed)], ignore) for seed in (0, 1))
    assert next(one).job.claim == next(other).job.claim == "behaves"
    one.close()
    last = next(other)
    assert (last.job.claim, last.status) == ("is-slow", Status.DONE)


def test_no_jobs_no_processes() -> None:
    assert list(LocalEngine(1).run([], ignore)) == []


def test_the_machine_is_shared_out() -> None:
    cores, memory = available_cores(), available_memory()
    one = LocalEngine(1)
    assert one.share(False) == one.share(True)
    assert one.share(False).threads == cores
    many = LocalEngine(2 * cores)
    assert many.share(False).threads == 1
    assert many.share(False).memory == memory // (2 * cores)
    assert many.share(True) == one.share(True)
    assert LocalEngine().share(False).threads == 1
    assert 0 < memory < psutil.virtual_memory().total


def test_a_containers_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(engine_module, "_CGROUP_MEMORY", limit)
    whole = available_memory()
    limit.write_text("max\n")
    assert available_memory() == whole
    limit.write_text(f"{2**30}\n")
    assert available_memory() == int(0.8 * 2**30)


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LocalEngine(0)


@pytest.fixture(autouse=True)
def _no_process_lingers() -> Iterator[None]:
    yield
    names = [child.name for child in engine_module.multiprocessing.active_children()]
    assert not [name for name in names if name.startswith("postern-job")]
