"""Engines: what runs jobs. The local one is here; `postern.claims.ray_engine` has the one for a cluster."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
from pebble import ProcessExpired, ProcessPool

from postern.claims.outcome import Job, JobResult, Status
from postern.claims.worker import perform_apart, read_output

_POLL_S = 0.1


@dataclass(frozen=True)
class Progress:
    """How far a running job is."""

    job: Job
    label: str
    done: int
    total: int | None


Observer = Callable[[Progress], None]


class Engine(Protocol):
    """Runs jobs and yields their results as they end, in any order, one for each job."""

    @property
    def workers(self) -> int:
        """How many jobs run at once."""
        ...

    @property
    def threads(self) -> int:
        """How many threads a job that shares the machine may use."""
        ...

    def run(self, jobs: Sequence[Job], observe: Observer) -> Iterator[JobResult]:
        """Run the jobs.

        Args:
            jobs: the jobs.
            observe: told how far the running jobs are.

        Yields:
            A result for each job: one that crashes, hangs or runs out of memory yields an error.
        """
        ...


def available_cores() -> int:
    """How many cores this process may use (a container's CPU set counts; its quota does not)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class _Flight:
    """A job that a worker has."""

    job: Job
    future: Any
    folder: Path
    started: float
    over_memory: int = 0

    def progress(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads((self.folder / "progress").read_text())
        except (OSError, ValueError):
            return {}
        return known


class LocalEngine:
    """Runs every job in a process of its own on this machine.

    Processes are forked from a server that has imported torch and the papers' modules once, so that a job starts in
    milliseconds and yet shares nothing with the others. Jobs that measure time (``Job.exclusive``) run last, one by
    one, with all the threads.

    Args:
        workers: how many jobs at once; by default as many as there are cores.
    """

    def __init__(self, workers: int | None = None) -> None:
        cores = available_cores()
        if workers is not None and workers < 1:
            raise ValueError(f"the number of jobs at once must be at least 1, got {workers}")
        self._workers = workers if workers is not None else cores
        self._cores = cores

    @property
    def workers(self) -> int:
        """How many jobs run at once."""
        return self._workers

    @property
    def threads(self) -> int:
        """How many threads a job that shares the machine may use."""
        return max(1, self._cores // self._workers)

    def run(self, jobs: Sequence[Job], observe: Observer) -> Iterator[JobResult]:
        """Run the jobs; see `Engine.run`."""
        shared = [job for job in jobs if not job.exclusive]
        alone = [job for job in jobs if job.exclusive]
        scratch = Path(tempfile.mkdtemp(prefix="postern-"))
        try:
            for batch, workers in ((shared, min(self._workers, len(shared))), (alone, 1)):
                if batch:
                    yield from self._run_batch(batch, workers, scratch, observe)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _run_batch(self, jobs: Sequence[Job], workers: int, scratch: Path, observe: Observer) -> Iterator[JobResult]:
        context = _context(sorted({job.module for job in jobs}))
        waiting = list(enumerate(jobs))
        flights: list[_Flight] = []
        pool = ProcessPool(max_workers=workers, max_tasks=1, context=context)
        try:
            while waiting or flights:
                while waiting and len(flights) < workers:
                    flights.append(self._launch(pool, scratch, *waiting.pop(0)))
                time.sleep(_POLL_S)
                for flight in list(flights):
                    self._watch(flight, observe)
                    if flight.future.done():
                        flights.remove(flight)
                        yield _landed(flight)
                        shutil.rmtree(flight.folder, ignore_errors=True)
        finally:
            pool.stop()
            pool.join()

    @staticmethod
    def _launch(pool: Any, scratch: Path, number: int, job: Job) -> _Flight:
        folder = scratch / f"{job.paper}-{job.claim}-{job.scale}-{job.seed}-{number}"
        folder.mkdir()
        future = pool.schedule(perform_apart, args=[job, str(folder)], timeout=job.time_limit_s)
        return _Flight(job, future, folder, time.perf_counter())

    @staticmethod
    def _watch(flight: _Flight, observe: Observer) -> None:
        known = flight.progress()
        if not known:
            return
        observe(Progress(flight.job, known["label"], known["done"], known["total"]))
        held = _memory_of(known["pid"])
        if held > flight.job.memory_limit and not flight.over_memory:
            flight.over_memory = held
            _kill(known["pid"])


def _context(modules: list[str]) -> Any:
    """A start method whose processes begin with the papers' modules imported, where the system has one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["postern.claims.worker", *modules])
    return context


def _memory_of(pid: int) -> int:
    """Bytes that a process and its children hold; 0 if it is gone."""
    try:
        process = psutil.Process(pid)
        return sum(int(each.memory_info().rss) for each in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0


def _kill(pid: int) -> None:
    try:
        psutil.Process(pid).kill()
    except psutil.Error:
        return


def _landed(flight: _Flight) -> JobResult:
    seconds = time.perf_counter() - flight.started
    try:
        result: JobResult = flight.future.result()
        return result
    except (FutureTimeout, TimeoutError):
        message = f"did not end within its limit of {flight.job.time_limit_s:g} s and was stopped"
    except ProcessExpired as expired:
        if flight.over_memory:
            message = (
                f"held {flight.over_memory / 2**30:.1f} GiB of memory, more than its limit of "
                f"{flight.job.memory_limit / 2**30:.1f} GiB, and was stopped"
            )
        else:
            message = f"its process died: {_cause(expired.exitcode)}"
    except Exception as error:
        message = f"its result could not be read: {type(error).__name__}: {error}"
    return JobResult(flight.job, Status.ERROR, message, seconds=seconds, output=read_output(flight.folder / "output"))


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            return f"killed by {signal.Signals(-exitcode).name}"
        except ValueError:
            return f"killed by signal {-exitcode}"
    return f"it exited with code {exitcode}"
