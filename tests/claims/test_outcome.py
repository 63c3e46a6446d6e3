"""What the results of a claim's jobs add up to."""

from dataclasses import replace

import pytest

from postern.claims import Claim, Measurement, Picture, Verdict
from postern.claims.outcome import Job, JobResult, Status, conclude
from tests.claims.papers import PAPER

CLAIM = PAPER.claims["behaves"]
JOB = Job("tests.claims.papers", "hostile", "behaves", "small", 0, "fingerprint")


def done(seed: int, **changes) -> JobResult:
    measurement = Measurement({"value": float(seed)}, figures={"curve": Picture("<svg/>", f"Of seed {seed}.")})
    return JobResult(replace(JOB, seed=seed), Status.DONE, measurement=measurement, seconds=1.5, **changes)


def failed(seed: int, status: Status, message: str) -> JobResult:
    return JobResult(replace(JOB, seed=seed), status, message, seconds=0.5)


def test_seeds_are_judged_together_and_in_order() -> None:
    outcome = conclude(CLAIM, "small", [done(2), done(0), done(1)])
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.judgement is not None
    assert outcome.judgement.estimate == 1.0
    assert [result.job.seed for result in outcome.results] == [0, 1, 2]
    assert outcome.metrics == {0: {"value": 0.0}, 1: {"value": 1.0}, 2: {"value": 2.0}}
    assert outcome.seconds == 4.5
    assert outcome.figures["curve"].description == "Of seed 0."


def test_smoke_is_never_evidence() -> None:
    outcome = conclude(CLAIM, "smoke", [done(0), done(1), done(2)])
    assert outcome.verdict is Verdict.SMOKE
    assert outcome.judgement is not None
    assert outcome.judgement.verdict is Verdict.HOLDS


@pytest.mark.parametrize(
    ("results", "verdict", "message"),
    [
        ([done(0), failed(1, Status.ERROR, "broke")], Verdict.ERROR, "broke"),
        ([done(0), failed(1, Status.NOT_RUN, "no device")], Verdict.NOT_RUN, "no device"),
        ([failed(0, Status.NOT_RUN, "no device"), failed(1, Status.ERROR, "broke")], Verdict.ERROR, "broke"),
        ([], Verdict.NOT_RUN, "no seed was run"),
    ],
)
def test_seeds_that_came_through_alone_make_no_verdict(
    results: list[JobResult], verdict: Verdict, message: str
) -> None:
    outcome = conclude(CLAIM, "small", results)
    assert outcome.verdict is verdict
    assert outcome.message == message
    assert outcome.judgement is None


def test_metrics_that_cannot_be_judged_are_an_error() -> None:
    claim: Claim = PAPER.claims["forgets"]
    outcome = conclude(claim, "small", [done(0), done(1)])
    assert outcome.verdict is Verdict.ERROR
    assert outcome.message == "a - b >= 0: the claim returned no metric 'a'; it returned: value"


def test_a_job_reads_as_what_it_is() -> None:
    assert str(JOB) == "hostile/behaves (small, seed 0)"
