"""The store: what goes in comes out, and files that it must not touch."""

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from postern.claims import Measurement, Picture
from postern.claims.outcome import Job, JobResult, Status
from postern.claims.store import SCHEMA_VERSION, Store, StoreError

JOB = Job("tests.claims.papers", "hostile", "behaves", "small", 3, "0123456789abcdef", threads=2, exclusive=True)
RESULT = JobResult(
    JOB,
    Status.DONE,
    measurement=Measurement(
        {"value": 0.1 + 0.2, "tiny": 5e-324},
        ({"step": 1.0, "loss": 0.5}, {"step": 2.0, "loss": float("inf")}),
        {"curve": Picture("<svg/>", "A curve – rising.")},
        {"rows": [{"name": "ä", "value": 1.5, "best": True, "none": None}]},
    ),
    seconds=1.25,
    output="printed\n",
    finished=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
)


def rows(folder: Path) -> list[tuple]:
    with sqlite3.connect(folder / Store.FILE) as connection:
        return connection.execute("SELECT paper, claim, scale, seed, fingerprint, status FROM job").fetchall()


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(RESULT)
        assert store.find_done(JOB) == RESULT
        assert store.latest() == [RESULT]
    with Store(tmp_path) as store:
        assert store.find_done(JOB) == RESULT
    assert rows(tmp_path) == [("hostile", "behaves", "small", 3, "0123456789abcdef", "done")]


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, paper="x"),
        replace(JOB, claim="x"),
        replace(JOB, scale="full"),
        replace(JOB, seed=4),
        replace(JOB, fingerprint="fedcba9876543210"),
    ],
    ids=["paper", "claim", "scale", "seed", "code"],
)
def test_a_job_is_done_only_if_all_that_matters_is_the_same(tmp_path: Path, other: Job) -> None:
    with Store(tmp_path) as store:
        store.add(RESULT)
        assert store.find_done(other) is None


def test_a_job_is_done_however_many_threads_it_had_and_whatever_came_after(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(RESULT)
        store.add(JobResult(JOB, Status.ERROR, "broke"))
        assert store.find_done(replace(JOB, threads=1, time_limit_s=5.0)) == RESULT


def test_errors_and_jobs_that_did_not_run_are_run_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(JobResult(JOB, Status.ERROR, "broke"), JobResult(JOB, Status.NOT_RUN, "no device"))
        assert store.find_done(JOB) is None


def test_latest_is_the_last_of_each_claim_scale_and_seed(tmp_path: Path) -> None:
    later = replace(RESULT, job=replace(JOB, fingerprint="later"), message="", seconds=9.0)
    other_seed = replace(RESULT, job=replace(JOB, seed=2))
    other_scale = replace(RESULT, job=replace(JOB, scale="full"))
    with Store(tmp_path) as store:
        store.add(RESULT)
        store.add(later, other_seed, other_scale)
        assert store.latest() == [other_scale, other_seed, later]
    assert len(rows(tmp_path)) == 4


def test_several_results_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    unfit = replace(RESULT, job=replace(JOB, seed=2**70))
    with Store(tmp_path) as store:
        with pytest.raises(OverflowError):
            store.add(RESULT, unfit)
        assert store.latest() == []
        store.add(RESULT)
        assert store.latest() == [RESULT]


def test_a_folder_is_created(tmp_path: Path) -> None:
    with Store(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / Store.FILE).exists()


def test_two_drivers_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    with (
        Store(tmp_path) as store,
        pytest.raises(StoreError, match=f"another postern is using the run folder {tmp_path}: wait .*--out"),
    ):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_store_of_a_newer_version_is_left_as_it_is(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(RESULT)
    with sqlite3.connect(tmp_path / Store.FILE) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = (tmp_path / Store.FILE).read_bytes()
    with pytest.raises(
        StoreError, match=rf"newer postern \(format {SCHEMA_VERSION + 1}; this one knows {SCHEMA_VERSION}\): upgrade"
    ):
        Store(tmp_path)
    assert (tmp_path / Store.FILE).read_bytes() == before
    with pytest.raises(StoreError, match="newer"):  # not "another postern is using the run folder"
        Store(tmp_path)


def test_a_store_of_the_version_before_is_read_on(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(RESULT)
    with sqlite3.connect(tmp_path / Store.FILE) as connection:
        connection.execute("PRAGMA user_version = 1")
        connection.execute("""UPDATE job SET result = replace(result, ', "setting": ""', '')""")
    connection.close()
    with Store(tmp_path) as store:
        assert store.latest() == [RESULT]
    with sqlite3.connect(tmp_path / Store.FILE) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    connection.close()


def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / Store.FILE) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    before = (tmp_path / Store.FILE).read_bytes()
    with pytest.raises(StoreError, match="database of another program: choose another --out, or move the file away"):
        Store(tmp_path)
    assert (tmp_path / Store.FILE).read_bytes() == before


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / Store.FILE).write_bytes(b"my diary " * 1000)
    with pytest.raises(StoreError, match=r"cannot use .* as a run's store: file is not a database; choose another"):
        Store(tmp_path)
    assert (tmp_path / Store.FILE).read_bytes() == b"my diary " * 1000


def test_a_damaged_store_is_told_from_a_full_disk(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for seed in range(200):
            store.add(replace(RESULT, job=replace(JOB, seed=seed)))
    path = tmp_path / Store.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with Store(tmp_path) as store, pytest.raises(StoreError, match=r"cannot read .*malformed; choose another --out"):
        store.latest()


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"cannot write to the run folder .*choose another --out"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot write to the run folder"):
        Store(tmp_path / "file" / "below")
