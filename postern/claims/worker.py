"""What a worker process does: find the claim, run it once, hand the result back."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from postern import _native
from postern.claims.comparison import TIMING, Experiment, Setting
from postern.claims.fingerprint import fingerprint, hash_of
from postern.claims.outcome import Job, JobResult, Status
from postern.claims.paper import Claim
from postern.errors import Unavailable

OUTPUT_LIMIT = 8_000
_PROGRESS_PERIOD_S = 0.2


def find_experiment(job: Job) -> Claim | Experiment:
    """Import the job's module and return its claim, or its member of a comparison.

    Raises:
        ValueError: the module has no such claim or member.
    """
    module = importlib.import_module(job.module)
    if job.setting:
        if job.claim != TIMING:
            module.CONTEST.member(job.claim)
        return Experiment(module.CONTEST, job.claim, Setting.from_text(job.setting))
    claims = module.PAPER.claims
    if job.claim not in claims:
        raise ValueError(f"{job.module} has no claim {job.claim!r}; it has: {', '.join(claims)}")
    claim: Claim = claims[job.claim]
    return claim


def fingerprint_of(job: Job) -> str:
    """Hash the code that is here, as far as the job depends on it, with the job's configuration."""
    experiment = find_experiment(job)
    if isinstance(experiment, Experiment):
        return hash_of(job.module, job.setting)
    return fingerprint(experiment, job.scale)


def perform(job: Job, on_progress: Callable[[str, int, int | None], None] | None = None) -> JobResult:
    """Run a job in this process. Whatever the claim raises becomes part of the result.

    Args:
        job: the job.
        on_progress: called with (label, done, total).

    Returns:
        The result: done, error or not run.
    """
    started = time.perf_counter()
    try:
        experiment = find_experiment(job)
        if job.device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("needs a CUDA device, and this machine has none")
        with threadpool_limits(limits=job.threads):
            measurement = experiment.measure(
                job.scale, job.seed, device=job.device, threads=job.threads, on_progress=on_progress
            )
    except Unavailable as missing:
        return JobResult(job, Status.NOT_RUN, str(missing), seconds=time.perf_counter() - started)
    except MemoryError as error:
        message = f"ran out of memory: {error}".rstrip(": ")
        return JobResult(job, Status.ERROR, message, seconds=time.perf_counter() - started)
    except BaseException as error:  # also SystemExit: an experiment that exits costs its own job alone
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        return JobResult(job, Status.ERROR, message, seconds=time.perf_counter() - started)
    return JobResult(job, Status.DONE, measurement=measurement, seconds=time.perf_counter() - started)


def perform_apart(job: Job, folder: str) -> JobResult:
    """Run a job in a process that has nothing else to do.

    Writes into ``folder``: ``output``, all that the job prints, also from C; ``progress``, a JSON document with the
    process number and how far the job is. The process leads a group of its own, so that whoever stops it can stop
    what it started, too; when the process that started it is gone, all of them end.

    Args:
        job: the job.
        folder: an empty folder of its own.

    Returns:
        The result, with the end of the output.
    """
    _stand_alone(folder)
    # Compiled kernels that were loaded before a fork let go of torch's threads in it, as the parent might have been
    # using them; the parent of this process does nothing but fork.
    _native.share_threads()
    with _redirected(Path(folder, "output")):
        report = _ProgressFile(Path(folder, "progress"))
        report("starting", 0, None)
        result = perform(job, report)
    return JobResult(
        result.job,
        result.status,
        result.message,
        result.measurement,
        result.seconds,
        read_output(Path(folder, "output")),
    )


def read_output(path: Path) -> str:
    """Return the end of what a job printed, or nothing if the file is not there."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - OUTPUT_LIMIT))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _stand_alone(folder: str) -> None:
    """Lead a process group, and end it when the parent is gone, for nobody would stop it or clear up after it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if hasattr(os, "setsid"):
        os.setsid()

    def end_with_parent() -> None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


class _ProgressFile:
    """Leaves word of a job's progress in a file, at most a few times a second; a full disk does not stop the job.

    The beginning and the end of a loop are always told: the job may hang in between.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = -_PROGRESS_PERIOD_S
        self.label = ""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self.last < _PROGRESS_PERIOD_S and done != total and label == self.label:
            return
        self.last, self.label = now, label
        fresh = self.path.with_suffix(".new")
        with contextlib.suppress(OSError):
            fresh.write_text(json.dumps({"pid": os.getpid(), "label": label, "done": done, "total": total}))
            fresh.replace(self.path)


@contextlib.contextmanager
def _redirected(path: Path) -> Iterator[None]:
    """Send standard output and error, of Python and of C, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with path.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable(file.fileno())
        try:
            yield
        finally:
            faulthandler.disable()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
