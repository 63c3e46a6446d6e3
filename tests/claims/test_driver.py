"""The driver, with an engine that runs jobs in this process: plans, resuming, and what a broken-off run says."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from postern.claims import Claim, Verdict
from postern.claims.driver import Plan, execute, plan, recall
from postern.claims.engine import Observer, Progress, Share
from postern.claims.fingerprint import fingerprint
from postern.claims.outcome import Job, JobResult, Outcome, Status
from postern.claims.paper import TIME_LIMITS_S
from postern.claims.store import Store, StoreError
from postern.claims.worker import perform
from tests.claims.papers import PAPER

GIB = 2**30


@dataclass
class Inline:
    """Runs jobs here, one by one, and remembers which it ran and whether it was closed."""

    has_gpu: bool = False
    ran: list[Job] = field(default_factory=list)
    is_closed: bool = False

    def share(self, exclusive: bool) -> Share:
        return Share(4, 8 * GIB) if exclusive else Share(1, 2 * GIB)

    def run(self, jobs: Sequence[Job], observe: Observer) -> Generator[JobResult, None, None]:
        try:
            for job in jobs:
                self.ran.append(job)
                yield perform(job, lambda label, done, total, job=job: observe(Progress(job, label, done, total)))
        finally:
            self.is_closed = True


@dataclass
class Witness:
    """Writes down what it is told, and interrupts the run after some results if asked to."""

    interrupt_after: int | None = None
    began: Plan | None = None
    heard: list[Progress] = field(default_factory=list)
    results: list[JobResult] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def begin(self, plan: Plan) -> None:
        self.began = plan

    def progress(self, progress: Progress) -> None:
        self.heard.append(progress)

    def finished(self, result: JobResult) -> None:
        self.results.append(result)
        if len(self.results) == self.interrupt_after:
            raise KeyboardInterrupt

    def concluded(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def claims(*names: str) -> list[Claim]:
    return [PAPER.claims[name] for name in names]


def plan_for(*names: str, scale: str = "smoke", seeds: Sequence[int] = (0, 1, 2), engine=None, **changes) -> Plan:
    chosen = claims(*names)
    return plan(chosen, scale, engine or Inline(), seeds={claim.key: seeds for claim in chosen}, **changes)


class TestPlan:
    def test_has_a_job_for_each_claim_and_seed_with_what_it_may_use(self) -> None:
        planned = plan_for("behaves", "runs-alone", seeds=(3, 4))
        assert [(job.claim, job.seed) for job in planned.jobs] == [
            ("behaves", 3),
            ("behaves", 4),
            ("runs-alone", 3),
            ("runs-alone", 4),
        ]
        shared, alone = planned.jobs[0], planned.jobs[2]
        assert (shared.exclusive, shared.threads, shared.memory_limit) == (False, 1, 2 * GIB)
        assert (alone.exclusive, alone.threads, alone.memory_limit) == (True, 4, 8 * GIB)
        assert shared.module == "tests.claims.papers"
        assert shared.fingerprint == fingerprint(PAPER.claims["behaves"], "smoke")
        assert shared.device == "cpu"
        assert shared.time_limit_s == TIME_LIMITS_S["smoke"]
        assert planned.known == ()

    def test_takes_the_limits_and_the_device_that_it_is_given(self) -> None:
        engine = Inline(has_gpu=True)
        planned = plan_for("behaves", engine=engine, time_limit_s=7.0, memory_limit=GIB, device="cuda")
        assert {(job.time_limit_s, job.memory_limit, job.device) for job in planned.jobs} == {(7.0, GIB, "cuda")}

    def test_gives_a_gpu_where_the_claim_asks_for_one_and_the_engine_has_one(self) -> None:
        assert [job.device for job in plan_for("needs-device", scale="full", engine=Inline(True)).jobs] == ["cuda"] * 3
        assert [job.device for job in plan_for("needs-device", scale="small", engine=Inline(True)).jobs] == ["cpu"] * 3

    @pytest.mark.parametrize(
        ("name", "scale", "changes", "told"),
        [
            ("needs-device", "full", {}, "the full scale needs a CUDA device, and there is none"),
            ("behaves", "small", {"device": "cuda"}, "needs a CUDA device, and there is none"),
            ("behaves", "full", {}, "has no full scale; it has: smoke, small"),
            ("needs-extra", "smoke", {}, "needs the extra 'no_such_package': pip install 'postern[no_such_package]'"),
        ],
    )
    def test_knows_beforehand_what_cannot_be_run(self, name: str, scale: str, changes: dict, told: str) -> None:
        planned = plan_for(name, scale=scale, **changes)
        assert planned.jobs == ()
        assert [result.status for result in planned.known] == [Status.NOT_RUN] * 3
        assert all(told in result.message for result in planned.known)

    @pytest.mark.parametrize("limit", [{"time_limit_s": 0.0}, {"memory_limit": -1}])
    def test_refuses_limits_that_nothing_could_keep(self, limit: dict) -> None:
        with pytest.raises(ValueError, match="limits on time and memory are positive, got"):
            plan_for("behaves", **limit)


class TestExecute:
    def test_runs_stores_tells_and_judges(self, tmp_path: Path) -> None:
        witness = Witness()
        planned = plan_for("behaves", "lacks", "raises", "needs-extra", scale="small")
        with Store(tmp_path) as store:
            outcomes = execute(planned, Inline(), store, witness)
            stored = {(each.job.claim, each.job.seed): each.status for each in store.latest()}
        assert witness.began is planned
        assert [(outcome.claim.name, outcome.verdict) for outcome in outcomes] == [
            ("behaves", Verdict.HOLDS),
            ("lacks", Verdict.NOT_RUN),
            ("raises", Verdict.ERROR),
            ("needs-extra", Verdict.NOT_RUN),
        ]
        assert sorted(witness.outcomes, key=outcomes.index) == outcomes
        assert len(witness.results) == 12
        assert {progress.label for progress in witness.heard} == {"steps"}
        assert stored == {(result.job.claim, result.job.seed): result.status for result in witness.results}

    def test_stores_a_result_before_anybody_hears_of_it(self, tmp_path: Path) -> None:
        class Checking(Witness):
            def finished(self, result: JobResult) -> None:
                assert store.find_done(result.job) == result
                super().finished(result)

        with Store(tmp_path) as store:
            witness = Checking()
            execute(plan_for("behaves"), Inline(), store, witness)
            assert len(witness.results) == 3

    def test_a_claim_is_judged_as_soon_as_its_seeds_are_there(self, tmp_path: Path) -> None:
        class Counting(Witness):
            def concluded(self, outcome: Outcome) -> None:
                assert len(self.results) == 3 * (len(self.outcomes) + 1)
                super().concluded(outcome)

        with Store(tmp_path) as store:
            execute(plan_for("behaves", "prints"), Inline(), store, Counting())

    def test_a_store_that_fails_stops_the_engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = Inline()
        with Store(tmp_path) as store:
            planned = plan_for("behaves")
            adding = store.add

            def add(*results: JobResult) -> None:
                if results[0].job.seed == 1 and results[0].status is Status.DONE:
                    raise StoreError("the disk is full")
                adding(*results)

            monkeypatch.setattr(store, "add", add)
            with pytest.raises(StoreError, match="the disk is full") as caught:
                execute(planned, engine, store, Witness())
        assert engine.is_closed, f"although the traceback of {caught.value} is still held"
        assert len(engine.ran) == 2


class TestBrokenOff:
    """A run of three seeds that is interrupted after the first."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        engine = Inline()
        with Store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
            execute(plan_for("behaves", scale="small"), engine, store, Witness(interrupt_after=1))
        assert engine.is_closed
        return tmp_path

    def test_is_not_judged_by_the_seeds_that_came_first(self, folder: Path) -> None:
        with Store(folder) as store:
            [outcome] = recall(store, claims("behaves"))
        assert outcome.verdict is Verdict.NOT_RUN
        assert outcome.message.endswith("go on with the same command and --resume")
        assert list(outcome.metrics) == [0]

    def test_is_resumed_with_what_is_left(self, folder: Path) -> None:
        engine, witness = Inline(), Witness()
        with Store(folder) as store:
            planned = plan_for("behaves", scale="small", finished=store)
            assert [result.job.seed for result in planned.known] == [0]
            [outcome] = execute(planned, engine, store, witness)
            [recalled] = recall(store, claims("behaves"))
        assert [job.seed for job in engine.ran] == [1, 2]
        assert outcome.verdict is Verdict.HOLDS
        assert recalled == outcome
        with Store(folder) as store:
            assert plan_for("behaves", scale="small", finished=store).jobs == ()

    def test_is_run_anew_when_the_code_has_changed(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("postern.claims.driver.fingerprint", lambda claim, scale: "other code")
        with Store(folder) as store:
            assert len(plan_for("behaves", scale="small", finished=store).jobs) == 3


class TestRecall:
    def test_judges_each_scale_by_its_newest_code(self, tmp_path: Path) -> None:
        with Store(tmp_path) as store:
            execute(plan_for("behaves", scale="small"), Inline(), store, Witness())
            execute(plan_for("behaves", scale="smoke", seeds=(0,)), Inline(), store, Witness())
            old = [replace(each, job=replace(each.job, fingerprint="old", seed=9)) for each in store.latest()[:1]]
            store.add(replace(old[0], finished=old[0].finished.replace(year=2000)))
            outcomes = {outcome.scale: outcome for outcome in recall(store, claims("behaves", "lacks"))}
        assert {scale: list(outcome.metrics) for scale, outcome in outcomes.items()} == {
            "small": [0, 1, 2],
            "smoke": [0],
        }
        assert outcomes["small"].verdict is Verdict.HOLDS
        assert outcomes["smoke"].verdict is Verdict.SMOKE

    def test_leaves_out_what_the_catalogue_no_longer_has(self, tmp_path: Path) -> None:
        with Store(tmp_path) as store:
            execute(plan_for("behaves"), Inline(), store, Witness())
            assert recall(store, claims("lacks")) == []

    def test_shows_what_could_not_be_run(self, tmp_path: Path) -> None:
        with Store(tmp_path) as store:
            execute(plan_for("needs-extra"), Inline(), store, Witness())
            [outcome] = recall(store, claims("needs-extra"))
        assert outcome.verdict is Verdict.NOT_RUN
        assert "pip install" in outcome.message
