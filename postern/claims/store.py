"""The store: one SQLite file in the run folder that keeps every finished job. One driver writes it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from postern.claims.outcome import Job, JobResult, Status
from postern.claims.run import Measurement, Picture

SCHEMA_VERSION = 2  # 1 had no comparisons; its rows are read as they are
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE job (
    id INTEGER PRIMARY KEY,
    paper TEXT NOT NULL,
    claim TEXT NOT NULL,
    scale TEXT NOT NULL,
    seed INTEGER NOT NULL,
    fingerprint TEXT NOT NULL,
    status TEXT NOT NULL,
    finished TEXT NOT NULL,
    result TEXT NOT NULL
);
CREATE INDEX job_identity ON job (paper, claim, scale, seed, fingerprint);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
_REMEDY = "choose another --out, or move the file away"


class StoreError(RuntimeError):
    """The run folder cannot be used as asked; the text says why and what to do."""


class Store:
    """The finished jobs of a run folder.

    Every result is committed as it comes, so that a driver that is killed loses at most the jobs in flight. Nothing is
    ever deleted: a job that is run again adds a row.

    Args:
        folder: the run folder; created if missing.

    Raises:
        StoreError: another driver uses the folder, it cannot be written, the file is no store of ours, or a newer
            version of postern wrote it.
    """

    FILE = "run.sqlite"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / "driver.lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise StoreError(
                f"another postern is using the run folder {folder}: wait for it to end, or choose another --out"
            ) from None
        except OSError as error:
            raise StoreError(f"cannot write to the run folder {folder}: {error}; choose another --out") from error
        try:
            self._connection = self._open(folder / self.FILE)
        except BaseException:
            self._lock.release()
            raise

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        connection = None
        try:
            connection = sqlite3.connect(path, isolation_level=None)
            connection.execute("PRAGMA busy_timeout = 5000")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreError(
                    f"{path} was written by a newer postern (format {version}; this one knows {SCHEMA_VERSION}): "
                    f"upgrade postern, or {_REMEDY}. Nothing was changed"
                )
            if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StoreError(f"{path} is the database of another program: {_REMEDY}. Nothing was changed")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if version == 0:
                connection.executescript(_SCHEMA)
            elif version < SCHEMA_VERSION:
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except StoreError:
            if connection is not None:
                connection.close()
            raise
        except sqlite3.DatabaseError as error:
            if connection is not None:
                connection.close()
            raise StoreError(f"cannot use {path} as a run's store: {error}; {_REMEDY}") from error
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other drivers in."""
        self._connection.close()
        self._lock.release()

    def add(self, *results: JobResult) -> None:
        """Keep results: all or none of them.

        Raises:
            StoreError: they cannot be written, as on a full disk. Results added before are intact.
        """
        rows = [
            (
                *(result.job.paper, result.job.claim, result.job.scale, result.job.seed, result.job.fingerprint),
                *(result.status.value, result.finished.isoformat(), json.dumps(_to_document(result))),
            )
            for result in results
        ]
        with self._explained_writing(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                "INSERT INTO job (paper, claim, scale, seed, fingerprint, status, finished, result) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    def find_done(self, job: Job) -> JobResult | None:
        """Return the latest result of the same code, configuration and seed that is done, or None."""
        with self._explained_reading():
            row = self._connection.execute(
                "SELECT result FROM job WHERE paper = ? AND claim = ? AND scale = ? AND seed = ? AND fingerprint = ? "
                "AND status = 'done' ORDER BY id DESC LIMIT 1",
                (job.paper, job.claim, job.scale, job.seed, job.fingerprint),
            ).fetchone()
        return None if row is None else _from_document(json.loads(row[0]))

    def latest(self) -> list[JobResult]:
        """Return the latest result of every claim, scale and seed that this folder has."""
        with self._explained_reading():
            rows = self._connection.execute(
                "SELECT result FROM job WHERE id IN (SELECT max(id) FROM job GROUP BY paper, claim, scale, seed) "
                "ORDER BY paper, claim, scale, seed"
            ).fetchall()
        return [_from_document(json.loads(row[0])) for row in rows]

    @contextmanager
    def _explained_writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(
                f"cannot write to {self.folder / self.FILE}: {error}. Results stored so far are intact: "
                f"see that the disk has room, then go on with --resume --out {self.folder}"
            ) from error

    @contextmanager
    def _explained_reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"cannot read {self.folder / self.FILE}: {error}; {_REMEDY}") from error


def _to_document(result: JobResult) -> dict[str, Any]:
    document = asdict(result)
    document["finished"] = result.finished.isoformat()
    return document


def _from_document(document: dict[str, Any]) -> JobResult:
    measured = document["measurement"]
    return JobResult(
        job=Job(**document["job"]),
        status=Status(document["status"]),
        message=document["message"],
        measurement=Measurement(
            metrics=measured["metrics"],
            logs=tuple(measured["logs"]),
            figures={name: Picture(**picture) for name, picture in measured["figures"].items()},
            tables=measured["tables"],
        ),
        seconds=document["seconds"],
        output=document["output"],
        finished=datetime.fromisoformat(document["finished"]),
    )
