"""A driver in a process of its own, for the tests that do to it what a machine can do to a driver.

Usage: python -m tests.claims.drive FOLDER [--full-after RESULTS] CLAIM:SEED,SEED..
"""

import argparse
import json
import resource
import sys
from pathlib import Path

from postern.claims.driver import Plan, execute, plan
from postern.claims.engine import LocalEngine, Progress
from postern.claims.outcome import JobResult, Outcome, Status
from postern.claims.store import Store, StoreError
from tests.claims.papers import PAPER


def tell(event: str, **details: object) -> None:
    print(json.dumps({"event": event, **details}), flush=True)


class Teller:
    """Prints every event as a line of JSON, and fills the disk after some results if asked to."""

    def __init__(self, folder: Path, full_after: int | None) -> None:
        self.wal = folder / f"{Store.FILE}-wal"
        self.full_after = full_after
        self.done = 0

    def begin(self, plan: Plan) -> None:
        tell("began", jobs=len(plan.jobs), known=len(plan.known))

    def progress(self, progress: Progress) -> None:
        tell("running", claim=progress.job.claim, seed=progress.job.seed, label=progress.label)

    def finished(self, result: JobResult) -> None:
        tell("finished", claim=result.job.claim, seed=result.job.seed, status=result.status)
        self.done += result.status is Status.DONE
        if self.done == self.full_after:
            # No file of this process may grow any more: what a full disk does to it.
            size = self.wal.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def concluded(self, outcome: Outcome) -> None:
        tell("concluded", claim=outcome.claim.name, verdict=outcome.verdict)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full-after", type=int)
    parser.add_argument("claims", nargs="+")
    asked = parser.parse_args()
    seeds = {name: list(map(int, numbers.split(","))) for name, _, numbers in (c.partition(":") for c in asked.claims)}
    claims = [PAPER.claims[name] for name in seeds]
    engine = LocalEngine(2)
    try:
        with Store(asked.folder) as store:
            planned = plan(claims, "smoke", engine, seeds={claim.key: seeds[claim.name] for claim in claims})
            execute(planned, engine, store, Teller(asked.folder, asked.full_after))
    except StoreError as error:
        print(error, file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
