"""The engine for a cluster: every job is a Ray task with the cores, memory and GPU that it needs.

Ray places the tasks. On its node a task runs the job as the local engine does, in a process of its own with its limits,
so that a job that hangs, crashes or eats memory ends with the same words as on one machine. Only the loss of a node or
of a Ray worker is handled here: the job is run once more, then it is an error.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postern.claims.engine import LocalEngine, Observer, Progress, Share, one_by_one_last
from postern.claims.outcome import Job, JobResult, Status
from postern.claims.worker import fingerprint_of
from postern.errors import MissingExtra, Unavailable

_POLL_S = 0.2
_DIAL_S = 5.0
_ANSWER_S = 20.0
_STOP_S = 10.0
_ATTEMPTS = 2
_INIT = {"log_to_driver": False, "logging_level": "ERROR"}
_PROBE = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"


class RayEngine:
    """Runs jobs on a Ray cluster on which the same postern is installed.

    Args:
        address: of the cluster's head, "host:port" (mostly port 6379), "auto" for the one that runs on this machine,
            or None for that one if there is one, else a new one on this machine.
        workers: how many jobs at once; by default as many as the cluster has cores.

    Raises:
        ValueError: fewer than one job at once.
        MissingExtra: Ray is not installed.
        Unavailable: no cluster answers at the address, or it has no cores to give.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"the number of jobs at once must be at least 1, got {workers}")
        self._workers = workers
        self._ray = _connect(address or os.environ.get("RAY_ADDRESS"))
        if not self._nodes():
            raise Unavailable("the Ray cluster has no node with a core to give")
        self._board = self._ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()

    def _nodes(self) -> list[Mapping[str, float]]:
        """What each node has that can run a job."""
        resources = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [each for each in resources if each.get("CPU", 0) >= 1]

    @property
    def has_gpu(self) -> bool:
        """Whether a node has a GPU."""
        return any(node.get("GPU", 0) >= 1 for node in self._nodes())

    def share(self, exclusive: bool) -> Share:
        """What each job may use: an exclusive one has all of the largest node; see `Engine.share`."""
        nodes = self._nodes()
        largest = max(nodes, key=lambda node: node["CPU"])
        if exclusive:
            return Share(int(largest["CPU"]), int(largest["memory"]))
        cores = int(sum(node["CPU"] for node in nodes))
        threads = min(max(1, cores // (self._workers or cores)), int(largest["CPU"]))
        return Share(threads, int(min(node["memory"] / node["CPU"] for node in nodes) * threads))

    def run(self, jobs: Sequence[Job], observe: Observer) -> Generator[JobResult, None, None]:
        """Run the jobs; see `Engine.run`."""
        list(self._news())  # what a run before this one has left
        for batch in one_by_one_last(jobs):
            yield from self._run_batch(batch, observe)

    def _run_batch(self, jobs: Sequence[Job], observe: Observer) -> Generator[JobResult, None, None]:
        waiting = [_Attempt(job, 1) for job in jobs]
        flights: dict[Any, _Attempt] = {}
        try:
            while waiting or flights:
                while waiting and (self._workers is None or len(flights) < self._workers):
                    attempt = waiting.pop(0)
                    obstacle = self._obstacle_to(attempt.job)
                    if obstacle:
                        yield JobResult(attempt.job, Status.ERROR, obstacle)
                    else:
                        flights[self._submit(attempt.job)] = attempt
                running = {attempt.job for attempt in flights.values()}
                for progress in self._news():
                    if progress.job in running:
                        observe(progress)
                if not flights:
                    continue
                for reference in self._ray.wait(list(flights), timeout=_POLL_S)[0]:
                    attempt = flights.pop(reference)
                    result = self._land(reference, attempt)
                    if result is None:
                        waiting.insert(0, _Attempt(attempt.job, attempt.number + 1))
                    else:
                        yield result
        finally:
            for reference in flights:
                self._ray.cancel(reference, force=True)
            if flights:
                self._ray.wait(list(flights), num_returns=len(flights), timeout=_STOP_S)

    def _obstacle_to(self, job: Job) -> str:
        """Why no node could ever run a job, for Ray would wait for such a node without end."""
        for node in self._nodes():
            has_gpu = job.device == "cpu" or node.get("GPU", 0) >= 1
            if node["CPU"] >= job.threads and node["memory"] >= job.memory_limit and has_gpu:
                return ""
        gpu = "" if job.device == "cpu" else ", a GPU"
        return (
            f"no node of the Ray cluster has what it needs: {job.threads} cores{gpu} and "
            f"{job.memory_limit / 2**30:.1f} GiB of memory"
        )

    def _submit(self, job: Job) -> Any:
        task = self._ray.remote(_run_on_node).options(
            num_cpus=job.threads,
            num_gpus=0 if job.device == "cpu" else 1,
            memory=job.memory_limit,
            max_retries=0,  # `_land` sees to it: Ray would repeat a task that ran out of memory without end
        )
        return task.remote(job, self._board)

    def _news(self) -> Iterator[Progress]:
        """News of jobs; none while the board starts, or moves from a node that died."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            yield from self._ray.get(self._board.take.remote(), timeout=_POLL_S)

    def _land(self, reference: Any, attempt: _Attempt) -> JobResult | None:
        """Return what became of a job, or None if it is to be run again."""
        errors = self._ray.exceptions
        try:
            result: JobResult = self._ray.get(reference)
            return result
        except errors.RayTaskError as error:
            message = (
                f"its node could not run it: {error.cause!r}; "
                "the same version of postern, with its extras, must be installed on every node"
            )
        except errors.RayError as error:
            if attempt.number < _ATTEMPTS:
                return None
            reason = str(error).strip().partition("\n")[0]
            message = f"its Ray worker or node died, also when it was run again: {type(error).__name__}: {reason}"
        return JobResult(attempt.job, Status.ERROR, message)


@dataclass(frozen=True)
class _Attempt:
    """A job, and the how manieth time it is run."""

    job: Job
    number: int


class _Board:
    """An actor on which the nodes leave word of their jobs' progress, and where the driver finds it."""

    def __init__(self) -> None:
        self.news: dict[Job, Progress] = {}

    def put(self, progress: Progress) -> None:
        self.news[progress.job] = progress

    def take(self) -> list[Progress]:
        taken, self.news = list(self.news.values()), {}
        return taken


def _run_on_node(job: Job, board: Any) -> JobResult:
    """The task: run a job on this node in a process of its own.

    Raises:
        RuntimeError: the node has other code than the driver, whose fingerprint the result would be stored under.
    """
    found = fingerprint_of(job)
    if found != job.fingerprint:
        raise RuntimeError(f"this node's code of {job.key} has the fingerprint {found}, the driver's {job.fingerprint}")
    last: list[Progress] = []

    def tell(progress: Progress) -> None:
        if last != [progress]:
            last[:] = [progress]
            board.put.remote(progress)

    [result] = LocalEngine(workers=1).run([job], tell)
    return result


def _connect(address: str | None) -> Any:
    """Return the module `ray`, connected to a cluster.

    Ray itself tries for two minutes to reach a cluster that is not there, and then ends the process. So another process
    tries first.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "The Ray engine") from error
    if ray.is_initialized():
        return ray
    if address not in (None, "auto", "local"):
        _knock(str(address))
    try:
        ray.init(address, include_dashboard=None if address else False, **_INIT)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise Unavailable(f"cannot use the Ray cluster at {address or 'this machine'}: {error}") from error
    # Ray prints what its nodes complain of on our standard output, where only our own lines belong. It has no switch.
    ray._private.worker._worker_logs_enabled = False
    return ray


def _knock(address: str) -> None:
    """Raise `Unavailable` unless a Ray cluster answers at an address."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise Unavailable(f"the address of a Ray cluster is its head's host:port, like 10.0.0.1:6379; got {address!r}")
    remedy = (
        "see that it runs there (`ray status`) and that no firewall is between, or start it with `ray start --head`"
    )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_DIAL_S).close()
        subprocess.run([sys.executable, "-c", _PROBE, address], timeout=_ANSWER_S, check=True, capture_output=True)
    except OSError as error:
        raise Unavailable(f"no Ray cluster at {address}: {error.strerror or error}; {remedy}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"what listens at {address} does not answer as a Ray cluster's head does; {remedy}"
        ) from error
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
        raise Unavailable(f"cannot use the Ray cluster at {address}: {reason[0]}") from error
