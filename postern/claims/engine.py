"""Engines: what runs jobs. The local one is here; `postern.claims.ray_engine` has the one for a cluster."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from pebble import ProcessExpired, concurrent

from postern.claims.outcome import Job, JobResult, Status
from postern.claims.worker import perform_apart, read_output

_POLL_S = 0.1
_STOP_S = 10.0
_MEMORY_SHARE = 0.8
_OUTPUT_LIMIT = 2**28
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_batches = itertools.count()


@dataclass(frozen=True)
class Progress:
    """How far a running job is."""

    job: Job
    label: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Share:
    """What a job may use: so many threads and so many bytes of memory."""

    threads: int
    memory: int


Observer = Callable[[Progress], None]


class Engine(Protocol):
    """Runs jobs and yields their results as they end, in any order, one for each job."""

    @property
    def has_gpu(self) -> bool:
        """Whether a job that needs a CUDA device finds one."""
        ...

    def share(self, exclusive: bool) -> Share:
        """What each job may use: one that shares the machine, or one that has it for itself (``exclusive``)."""
        ...

    def run(self, jobs: Sequence[Job], observe: Observer) -> Generator[JobResult, None, None]:
        """Run the jobs. Closing the generator stops those that run.

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


def available_memory() -> int:
    """How many bytes of memory jobs may hold together: 80 % of the machine's, or of the container's limit."""
    total: int = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, int(_CGROUP_MEMORY.read_text()))
    return int(total * _MEMORY_SHARE)


def one_by_one_last(jobs: Sequence[Job]) -> list[list[Job]]:
    """Batches to run one after the other: all jobs that share the machine, then each that must be alone."""
    shared = [job for job in jobs if not job.exclusive]
    return [batch for batch in (shared, *([job] for job in jobs if job.exclusive)) if batch]


@dataclass
class _Flight:
    """A job, the process that has it, and why it was stopped if it was."""

    job: Job
    future: Any
    folder: Path
    started: float
    stopped: str = ""

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

    Raises:
        ValueError: fewer than one job at once.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"the number of jobs at once must be at least 1, got {workers}")
        self._cores = available_cores()
        self._workers = workers if workers is not None else self._cores

    @property
    def has_gpu(self) -> bool:
        """Whether this machine has a CUDA device."""
        return torch.cuda.is_available()

    def share(self, exclusive: bool) -> Share:
        """What each job may use; see `Engine.share`."""
        sharing = 1 if exclusive else self._workers
        return Share(max(1, self._cores // sharing), available_memory() // sharing)

    def run(self, jobs: Sequence[Job], observe: Observer) -> Generator[JobResult, None, None]:
        """Run the jobs; see `Engine.run`."""
        for batch in one_by_one_last(jobs):
            yield from self._run_batch(batch, observe)

    def _run_batch(self, jobs: Sequence[Job], observe: Observer) -> Generator[JobResult, None, None]:
        modules = sorted({job.module for job in jobs})
        waiting = list(jobs)
        flights: list[_Flight] = []
        name = f"postern-job-{next(_batches)}"
        try:
            while waiting or flights:
                while waiting and len(flights) < self._workers:
                    job = waiting.pop(0)
                    try:
                        flights.append(_launch(job, name, modules))
                    except (OSError, EOFError) as error:
                        yield JobResult(job, Status.ERROR, f"could not be started: {error!r}")
                time.sleep(_POLL_S)
                for flight in list(flights):
                    _watch(flight, observe)
                    if flight.future.done():
                        flights.remove(flight)
                        yield _land(flight)
        finally:
            _stop(name, flights)


def _launch(job: Job, name: str, modules: Sequence[str]) -> _Flight:
    folder = Path(tempfile.mkdtemp(prefix="postern-"))
    start = concurrent.process(name=name, daemon=False, timeout=job.time_limit_s, context=_context(job, modules))
    return _Flight(job, start(perform_apart)(job, str(folder)), folder, time.perf_counter())


def _context(job: Job, modules: Sequence[str]) -> Any:
    """How a job's process begins: where the system can, forked from a server that has imported the papers' modules.

    One that uses a GPU begins from nothing: a cluster grants GPUs by the environment, and the server keeps the
    environment that it began with.
    """
    if job.device != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["postern.claims.worker", *modules])
    return context


def _watch(flight: _Flight, observe: Observer) -> None:
    """Tell how far a job is, and stop it if it takes more than it may."""
    known = flight.progress()
    if not known or flight.stopped:
        return
    observe(Progress(flight.job, known["label"], known["done"], known["total"]))
    held = _memory_of(known["pid"])
    if held > flight.job.memory_limit:
        flight.stopped = (
            f"held {held / 2**30:.1f} GiB of memory, more than its limit of {flight.job.memory_limit / 2**30:.1f} GiB"
        )
    elif _size_of(flight.folder / "output") > _OUTPUT_LIMIT:
        flight.stopped = f"printed more than {_OUTPUT_LIMIT // 2**20} MiB"
    if flight.stopped:
        _kill_group(known["pid"])


def _memory_of(pid: int) -> int:
    """Bytes that a process and its children hold; 0 if it is gone."""
    try:
        process = psutil.Process(pid)
        return sum(int(each.memory_info().rss) for each in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _kill_group(pid: int) -> None:
    """Kill a job's process and all that it started; see `postern.claims.worker.perform_apart`."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    else:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()


def _land(flight: _Flight) -> JobResult:
    """Return what became of a job whose process has ended, and clear up after it."""
    seconds = time.perf_counter() - flight.started
    try:
        result: JobResult = flight.future.result()
        return result
    except ProcessExpired as expired:
        message = f"{flight.stopped}, and was stopped" if flight.stopped else _cause(expired.exitcode)
    except TimeoutError:
        message = f"did not end within its limit of {flight.job.time_limit_s:g} s and was stopped"
    except Exception as error:
        message = f"could not be run: {type(error).__name__}: {error}"
    finally:
        output = read_output(flight.folder / "output")
        _clear(flight)
    return JobResult(flight.job, Status.ERROR, message, seconds=seconds, output=output)


def _clear(flight: _Flight) -> None:
    known = flight.progress()
    if known:
        _kill_group(known["pid"])
    shutil.rmtree(flight.folder, ignore_errors=True)


def _stop(name: str, flights: Sequence[_Flight]) -> None:
    """Stop the processes of a batch that was broken off."""
    for process in multiprocessing.active_children():
        if process.name == name:
            process.kill()
    wait([flight.future for flight in flights], timeout=_STOP_S)
    for flight in flights:
        _clear(flight)


def _cause(exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return "its process was killed: by hand, or by the system because memory ran out (fewer --jobs need less of it)"
    if exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"its process crashed: {signal.Signals(-exitcode).name}"
    return f"its process ended early, with exit code {exitcode}"
