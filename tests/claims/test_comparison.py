"""Comparisons: settings, ranking against hand-computed cases, and whole runs through driver and store."""

from dataclasses import replace
from pathlib import Path

import pytest

from postern.claims import Measurement
from postern.claims.comparison import TIMING, CannotCompare, Place, Ranking, Setting, rank
from postern.claims.criteria import mean_interval
from postern.claims.driver import plan_comparison, recall_comparisons, run_jobs
from postern.claims.engine import LocalEngine
from postern.claims.outcome import JobResult, Status
from postern.claims.store import Store
from postern.claims.worker import fingerprint_of

from .contest import ACCURACY, CONTEST, setting
from .test_driver import Inline, Witness


def results(*members: str, seeds: int = 4, kind: str = "table") -> list[JobResult]:
    engine = Inline()
    planned = plan_comparison(CONTEST, setting(*members, kind=kind), engine, seeds=range(seeds))
    return list(engine.run(planned.jobs, lambda progress: None))


def ranked(*members: str, **named: int) -> Ranking:
    return rank(CONTEST, setting(*members), results(*members, **named))


def test_a_setting_survives_as_text() -> None:
    each = setting("leader", "rival")
    assert Setting.from_text(each.to_text()) == each
    assert each.identity == setting("leader", "rival").identity
    for other in (
        setting("leader"),
        setting("leader", "rival", steps=101),
        replace(each, digest="4567"),
        replace(each, device="cuda"),
    ):
        assert other.identity != each.identity


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rates": ()}, {"learning_rates": (1e-3, 0.0)}])
def test_a_budget_is_positive(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least one step and learning rates are positive"):
        replace(setting(), **wrong)


def test_ranks_by_mean_quality_and_tells_what_the_seeds_cannot() -> None:
    ranking = ranked()
    assert [(s.member.name, s.place) for s in ranking.standings] == [
        ("leader", Place.BEST),
        ("rival", Place.LEVEL),
        ("loser", Place.BEHIND),
    ]
    best, rival, loser = ranking.standings
    assert best.quality is not None
    assert (best.quality.mean, best.quality.low, best.quality.high) == mean_interval(ACCURACY["leader"])
    assert best.lead is None
    leads = [b - a for a, b in zip(ACCURACY["leader"], ACCURACY["loser"], strict=True)]
    assert loser.lead is not None
    assert (loser.lead.mean, loser.lead.low, loser.lead.high) == pytest.approx(mean_interval(leads))
    assert rival.lead is not None
    assert rival.lead.low < 0 < rival.lead.high
    assert ranking.seeds == (0, 1, 2, 3)


def test_less_is_better_where_the_quantity_says_so() -> None:
    ranking = rank(CONTEST, setting("leader", "rival", kind="text"), results("leader", "rival", kind="text"))
    assert [s.member.name for s in ranking.standings] == ["leader", "rival"]  # 1 - accuracy, lowest first
    assert ranking.standings[1].lead is not None
    assert ranking.standings[1].lead.mean == pytest.approx(-0.0025)
    assert ranking.quality.name == "loss"


def test_one_seed_tells_nobody_apart() -> None:
    ranking = ranked(seeds=1)
    assert [s.place for s in ranking.standings] == [Place.BEST, Place.LEVEL, Place.LEVEL]


def test_times_are_relative_to_the_first_member_of_the_same_seed() -> None:
    standings = {s.member.name: s for s in ranked().standings}
    for name, ratio in (("leader", 1.0), ("rival", 1.5), ("loser", 0.5)):
        time = standings[name].step_time
        assert time is not None
        assert (time.mean, time.low, time.high) == pytest.approx((ratio, ratio, ratio))
    alone = {s.member.name: s for s in ranked("rival", "loser").standings}
    assert alone["loser"].step_time is not None
    assert alone["loser"].step_time.mean == pytest.approx(1 / 3)


def test_other_times_are_relative_too_where_they_were_taken() -> None:
    ranking = rank(CONTEST, setting(), results())
    paces = {each.member.name: each.paces for each in ranking.standings}
    assert paces["loser"]["playing"].mean == pytest.approx(3.0)
    assert paces["rival"] == {}
    assert ranking.paces == {"playing": "time of a game"}


def test_the_mean_of_times_is_geometric() -> None:
    jobs = results("leader", "rival", seeds=2)
    times = [({"leader": 1.0, "rival": 2.0}), ({"leader": 1.0, "rival": 8.0})]
    changed = [replace(r, measurement=Measurement(times[r.job.seed])) if r.job.claim == TIMING else r for r in jobs]
    rival = next(s for s in rank(CONTEST, setting("leader", "rival"), changed).standings if s.member.name == "rival")
    assert rival.step_time is not None
    assert rival.step_time.mean == pytest.approx(4.0)
    assert 0 < rival.step_time.low < 2 < 8 < rival.step_time.high


def test_curves_are_means_over_the_seeds_of_members_that_have_all_of_it() -> None:
    ranking = ranked()
    curves = {each.member.name: each.curves for each in ranking.standings}
    assert curves["loser"].keys() == {"accuracy-by-memory"}
    assert curves["leader"].keys() == {"accuracy-by-memory", "accuracy-by-loss"}
    accuracy = sum(ACCURACY["leader"]) / 4
    small, large = curves["leader"]["accuracy-by-memory"]
    assert small == pytest.approx((1.024, 100 * accuracy))
    assert large == pytest.approx((5.5 * 1024, 100 * accuracy))
    assert curves["leader"]["accuracy-by-loss"][0] == pytest.approx((1 - accuracy, accuracy))
    told = ranking.to_document()["standings"][0]["curves"]["accuracy-by-memory"]
    assert told == [list(small), list(large)]


def test_quantities_that_a_member_lacks_are_left_out_for_it_alone() -> None:
    ranking = ranked()
    assert [each.name for each in ranking.quantities] == ["loss", "memory_mib"]
    standings = {s.member.name: s for s in ranking.standings}
    assert set(standings["loser"].others) == {"memory_mib"}
    assert set(standings["leader"].others) == {"loss", "memory_mib"}
    assert standings["leader"].others["memory_mib"].mean == pytest.approx(5.5)
    assert standings["leader"].learning_rates == (1e-3,) * 4


def test_a_member_that_fails_is_an_error_and_comes_last() -> None:
    ranking = ranked("leader", "broken", "loser")
    assert [s.member.name for s in ranking.standings] == ["leader", "loser", "broken"]
    broken = ranking.standings[-1]
    assert broken.place is Place.ERROR
    assert broken.message == "seed 0: ArithmeticError: diverged"
    assert broken.quality is None


def test_a_member_without_the_deciding_quality_is_an_error() -> None:
    ranking = rank(CONTEST, setting("leader", "loser", kind="text"), results("leader", "loser", kind="text"))
    assert ranking.standings[-1].message == "seed 0: returned no loss, which decides"


def test_results_of_others_are_left_out() -> None:
    ranking = rank(CONTEST, setting("leader", "loser"), results("leader", "loser", "rival"))
    assert {result.job.claim for result in ranking.results} == {"leader", "loser", TIMING}


def test_nobody_is_best_where_all_fail() -> None:
    ranking = rank(CONTEST, setting("leader", "loser"), [])
    assert [(s.place, s.message) for s in ranking.standings] == [(Place.ERROR, "was not run")] * 2


def test_an_unknown_member_gets_the_nearest_names() -> None:
    with pytest.raises(CannotCompare, match="toys has no member 'loosr'; did you mean loser"):
        CONTEST.member("loosr")
    with pytest.raises(CannotCompare, match="there are: leader, rival, loser, broken"):
        CONTEST.member("q")


def test_the_plan_has_a_job_for_each_member_and_seed_and_times_alone() -> None:
    planned = plan_comparison(CONTEST, setting(), Inline(), seeds=range(2))
    assert [(job.claim, job.seed) for job in planned.jobs] == [
        (name, seed) for name in ("leader", "rival", "loser", TIMING) for seed in range(2)
    ]
    assert [job.claim for job in planned.jobs if job.exclusive] == [TIMING, TIMING]
    assert {job.fingerprint for job in planned.jobs} == {fingerprint_of(planned.jobs[0])}
    assert planned.subject == "3 members of toys on wine"
    untimed = plan_comparison(replace(CONTEST, time=None), setting(), Inline(), seeds=range(2))
    assert [job.claim for job in untimed.jobs] == [job.claim for job in planned.jobs if job.claim != TIMING]
    other = plan_comparison(CONTEST, setting(steps=101), Inline(), seeds=range(2))
    assert other.jobs[0].fingerprint != planned.jobs[0].fingerprint


def test_a_whole_run_is_stored_resumed_and_recalled(tmp_path: Path) -> None:
    engine, witness = LocalEngine(2), Witness()
    with Store(tmp_path) as store:
        planned = plan_comparison(CONTEST, setting(), engine, seeds=range(3))
        done = list(run_jobs(planned, engine, store, witness))
        assert {result.status for result in done} == {Status.DONE}
        assert len(witness.results) == 12
    with Store(tmp_path) as store:
        again = plan_comparison(CONTEST, setting(), engine, seeds=range(4), finished=store)
        assert len(again.known) == 12
        assert {job.seed for job in again.jobs} == {3}
        list(run_jobs(again, engine, store, Witness()))
        other = plan_comparison(CONTEST, setting("leader", "loser"), engine, seeds=range(2), finished=store)
        list(run_jobs(other, engine, store, Witness()))
        newest, oldest = recall_comparisons(store, [CONTEST])
    assert newest.setting.members == ("leader", "loser")
    assert [s.place for s in oldest.standings] == [Place.BEST, Place.LEVEL, Place.BEHIND]
    assert oldest.seeds == (0, 1, 2, 3)
    assert oldest.standings[0].quality == ranked().standings[0].quality


def test_a_run_that_is_broken_off_says_so(tmp_path: Path) -> None:
    engine = Inline()
    with Store(tmp_path) as store:
        planned = plan_comparison(CONTEST, setting(), engine, seeds=range(1))
        running = run_jobs(planned, engine, store, Witness())
        next(running)
        running.close()
        [ranking] = recall_comparisons(store, [CONTEST])
    assert engine.is_closed
    assert [s.place for s in ranking.standings] == [Place.BEST, Place.ERROR, Place.ERROR]
    assert "go on with the same command and --resume" in ranking.standings[1].message


def test_comparisons_of_families_that_are_gone_are_left_out(tmp_path: Path) -> None:
    engine = Inline()
    with Store(tmp_path) as store:
        planned = plan_comparison(CONTEST, setting(), engine, seeds=range(1))
        list(run_jobs(planned, engine, store, Witness()))
        assert recall_comparisons(store, []) == []
        assert recall_comparisons(store, [replace(CONTEST, members=CONTEST.members[:2])]) == []
