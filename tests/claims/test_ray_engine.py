"""The Ray engine on a real cluster of two nodes, whose workers and nodes are killed while they have jobs."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from postern.claims import ray_engine
from postern.claims.engine import Progress
from postern.claims.fingerprint import fingerprint
from postern.claims.outcome import Job, Status
from postern.claims.ray_engine import RayEngine
from postern.claims.worker import perform
from postern.errors import MissingExtra, Unavailable
from tests.claims.papers import PAPER
from tests.claims.processes import process_of, wait_until_gone

MIB = 2**20


def job(claim: str, seed: int = 0, scale: str = "smoke", **means) -> Job:
    code = fingerprint(PAPER.claims[claim], scale)
    return Job("tests.claims.papers", "hostile", claim, scale, seed, code, **{"memory_limit": 600 * MIB} | means)


def ignore(progress: Progress) -> None:
    """Watch nothing."""


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"The Ray engine needs the extra 'ray': pip install 'postern\[ray\]'"):
        RayEngine()


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RayEngine(workers=0)


pytest.importorskip("ray")


@pytest.mark.parametrize("address", ["here", "head:", "http://head:dashboard", ":6379"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(Unavailable, match=r"is its head's host:port, like 10\.0\.0\.1:6379; got "):
        RayEngine(address)


def test_a_port_where_nobody_listens_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(
        Unavailable, match=rf"no Ray cluster at 127\.0\.0\.1:{port}: Connection refused; see that it runs"
    ):
        RayEngine(f"127.0.0.1:{port}")
    assert time.monotonic() - started < 5


@pytest.mark.ray
def test_a_port_where_something_else_listens_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "_ANSWER_S", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(Unavailable, match=rf"what listens at 127\.0\.0\.1:{port} does not answer as a Ray cluster"):
            RayEngine(f"127.0.0.1:{port}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two nodes, with one core and with two; gone with all their processes after the tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    before = set(psutil.Process().children(recursive=True))
    common = {"object_store_memory": 80 * MIB, "memory": 4096 * MIB, "include_dashboard": False}
    alert = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": alert, **common})
    cluster.other_node = cluster.add_node(num_cpus=2, **common)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    after = [child.pid for child in set(psutil.Process().children(recursive=True)) - before]
    wait_until_gone(*after)


@pytest.fixture(scope="module")
def engine(cluster) -> RayEngine:
    return RayEngine(cluster.address, workers=2)


@pytest.mark.ray
class TestCluster:
    def test_is_shared_out(self, engine: RayEngine) -> None:
        assert not engine.has_gpu
        assert (engine.share(False).threads, engine.share(False).memory) == (1, 2048 * MIB)
        assert (engine.share(True).threads, engine.share(True).memory) == (2, 4096 * MIB)

    def test_gives_the_results_and_the_messages_of_one_machine(self, engine: RayEngine) -> None:
        jobs = [
            job("behaves", 0),
            job("hangs", time_limit_s=2.0),
            job("raises"),
            job("exits-at-once"),
            job("eats-memory"),
            job("lacks"),
            job("runs-alone", exclusive=True, threads=2),
            job("behaves", 1),
            replace(job("behaves", 2), fingerprint="of other code"),
            job("behaves", 3, threads=3),
            job("behaves", 4, device="cuda"),
            job("behaves", 5, memory_limit=5000 * MIB),
        ]
        landed = list(engine.run(jobs, ignore))
        results = {(each.job.claim, each.job.seed): each for each in landed}
        assert len(landed) == len(results) == len(jobs)
        for seed in (0, 1):
            result = results["behaves", seed]
            assert result.measurement.metrics == perform(result.job).measurement.metrics
        assert landed[-1].job.claim == "runs-alone"
        assert landed[-1].measurement.metrics == {"value": 1.0, "threads": 2.0, "torch threads": 2.0}
        messages = {
            ("hangs", 0): "did not end within its limit of 2 s and was stopped",
            ("raises", 0): "KeyError: 'no such thing'",
            ("exits-at-once", 0): "its process ended early, with exit code 3",
            ("eats-memory", 0): "more than its limit of 0.6 GiB, and was stopped",
            ("behaves", 2): "has the fingerprint",
            ("behaves", 3): "no node of the Ray cluster has what it needs: 3 cores and 0.6 GiB of memory",
            ("behaves", 4): "no node of the Ray cluster has what it needs: 1 cores, a GPU and 0.6 GiB of memory",
            ("behaves", 5): "no node of the Ray cluster has what it needs: 1 cores and 4.9 GiB of memory",
        }
        for key, message in messages.items():
            assert results[key].status is Status.ERROR
            assert message in results[key].message
        assert "the same version of postern" in results["behaves", 2].message
        assert results["lacks", 0].status is Status.NOT_RUN
        assert 'raise KeyError("no such thing")' in results["raises", 0].output

    def test_runs_a_job_once_more_when_its_worker_was_killed(
        self, engine: RayEngine, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Seed 0 loses its first worker, seed 1 each that it gets."""
        processes: dict[int, list[int]] = {0: [], 1: []}

        def kill(progress: Progress) -> None:
            number, seen = process_of(progress.label), processes[progress.job.seed]
            if number and number not in seen:
                seen.append(number)
                if progress.job.seed == 1 or len(seen) == 1:
                    ray_worker(number).kill()
                    wait_until_gone(number)

        results = {each.job.seed: each for each in engine.run([job("is-slow", seed, "small") for seed in (0, 1)], kill)}
        assert [results[seed].status for seed in (0, 1)] == [Status.DONE, Status.ERROR]
        assert results[1].message.startswith(
            "its Ray worker or node died, also when it was run again: WorkerCrashedError"
        )
        assert [len(processes[seed]) for seed in (0, 1)] == [2, 2]
        assert capfd.readouterr().out == ""

    def test_ctrl_c_stops_the_jobs_of_which_no_more_ran_than_asked_for(self, engine: RayEngine) -> None:
        seen: dict[int, int] = {}

        def interrupt(progress: Progress) -> None:
            if number := process_of(progress.label):
                seen[progress.job.seed] = number
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(engine.run([job("hangs", seed) for seed in range(3)], interrupt))
        assert set(seen) == {0, 1}
        wait_until_gone(*seen.values())

    def test_a_job_moves_when_its_node_dies(self, cluster, engine: RayEngine) -> None:
        """Last, for the cluster has one node less afterwards."""
        [raylet] = cluster.other_node.all_processes["raylet"]
        seen: dict[int, set[int]] = {0: set(), 1: set()}
        lost: list[int] = []

        def remove(progress: Progress) -> None:
            number = process_of(progress.label)
            seen[progress.job.seed].add(number)
            if (
                number
                and not lost
                and raylet.process.pid in [parent.pid for parent in psutil.Process(number).parents()]
            ):
                lost.append(progress.job.seed)
                cluster.remove_node(cluster.other_node, allow_graceful=False)

        results = list(engine.run([job("is-slow", seed, "small") for seed in (0, 1)], remove))
        assert [result.status for result in results] == [Status.DONE] * 2
        assert len(lost) == 1
        [moved] = [result for result in results if result.job.seed == lost[0]]
        assert len(seen[lost[0]] - {0, moved.measurement.metrics["process"]}) == 1  # the one that was lost
        assert engine.share(True).threads == 1


def ray_worker(number: int) -> psutil.Process:
    """The Ray worker to which a job's process belongs: its fork server's parent."""
    return next(parent for parent in psutil.Process(number).parents() if parent.name().startswith("ray::"))
