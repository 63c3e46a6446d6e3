"""The ledger: seeds that count once, verdicts that cannot be lost, and commits that have the code."""

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from postern.claims import AllOf, AtLeast, AtMost, Claim, Measurement, Verdict, ledger
from postern.claims.ledger import LedgerError, commit_of, publish, read_all, read_document, render, seeds_to_publish
from postern.claims.outcome import Job, JobResult, Outcome, Status, conclude
from tests.claims.papers import PAPER, Setting

CLAIM = replace(PAPER.claims["behaves"], note="A note for readers.")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Nested:
    """Settings within settings."""

    numbers: tuple[int, ...]
    named: dict[str, tuple[Setting, ...]]
    later: float = 0.0


def outcome(values: Sequence[float], first_seed: int = 1000, scale: str = "small", claim: Claim = CLAIM) -> Outcome:
    job = Job("tests.claims.papers", claim.paper, claim.name, scale, 0, "fedcba9876543210", threads=2)
    rows = [{"name": "x", "value": math.nan}]
    return conclude(
        claim,
        scale,
        [
            JobResult(
                replace(job, seed=first_seed + number),
                Status.DONE,
                measurement=Measurement({"value": value}, tables={"rows": rows}),
                seconds=1.26,
            )
            for number, value in enumerate(values)
        ],
    )


class TestPublish:
    def test_writes_all_that_a_reader_needs(self, tmp_path: Path) -> None:
        [path] = publish(tmp_path, [outcome([1.0, 2.0, 3.0])], COMMIT)
        assert path == tmp_path / "hostile" / "behaves.json"
        document = json.loads(path.read_text(), parse_constant=pytest.fail)
        versions = document.pop("versions")
        assert versions.keys() >= {"python", "postern", "torch", "numpy", "scipy"}
        assert document.pop("date") == datetime.now(UTC).date().isoformat()
        assert document.pop("processor")
        low, high = document.pop("interval")
        assert (low, high) == pytest.approx((-0.484137711, 4.484137711))
        assert document == {
            "paper": "hostile",
            "claim": "behaves",
            "statement": "A random number is above minus ten.",
            "reported": "-",
            "scale": "small",
            "verdict": "holds",
            "estimate": 2.0,
            "criterion": "value >= -10",
            "parts": [],
            "configuration": {"amount": 0.6},
            "metrics": {"1000": {"value": 1.0}, "1001": {"value": 2.0}, "1002": {"value": 3.0}},
            "tables": {"rows": [{"name": "x", "value": None}]},
            "seeds": [1000, 1001, 1002],
            "seconds": 3.8,
            "device": "cpu",
            "threads": 2,
            "commit": COMMIT,
            "fingerprint": "fedcba9876543210",
            "history": [],
        }

    def test_keeps_what_was_published_before(self, tmp_path: Path) -> None:
        publish(tmp_path, [outcome([-20.0, -20.1])], "first")
        publish(tmp_path, [outcome([1.0, 900.0], first_seed=1002)], "second")
        publish(tmp_path, [outcome([1.0, 1.1], first_seed=1004, scale="small")], "third")
        document = read_document(tmp_path, CLAIM)
        assert document is not None
        entries = [document, *document["history"]]
        assert [(entry["verdict"], entry["commit"], entry["seeds"]) for entry in entries] == [
            ("holds", "third", [1004, 1005]),
            ("inconclusive", "second", [1002, 1003]),
            ("refuted", "first", [1000, 1001]),
        ]
        assert all("history" not in entry for entry in document["history"])

    def test_leaves_out_what_is_no_evidence(self, tmp_path: Path) -> None:
        failed = JobResult(Job("m", "hostile", "behaves", "small", 1000, "f"), Status.ERROR, "broke")
        missing = replace(failed, status=Status.NOT_RUN)
        nothing = [
            outcome([1.0, 2.0], scale="smoke"),
            conclude(CLAIM, "small", [failed]),
            conclude(CLAIM, "small", [missing]),
        ]
        assert publish(tmp_path, nothing, COMMIT) == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("first_seed", "told"),
        [
            (0, "takes seeds from 1000 up.*; got seed 0"),
            (999, "got seed 999"),
            (1001, "seed 1001 was published before"),
        ],
    )
    def test_refuses_seeds_that_are_not_fresh_before_it_writes_anything(
        self, tmp_path: Path, first_seed: int, told: str
    ) -> None:
        publish(tmp_path, [outcome([1.0, 2.0])], COMMIT)
        before = (tmp_path / "hostile" / "behaves.json").read_bytes()
        another = replace(CLAIM, name="another")
        with pytest.raises(LedgerError, match=f"hostile/behaves: .*{told}"):
            publish(tmp_path, [outcome([1.0, 2.0], claim=another), outcome([1.0, 2.0], first_seed)], COMMIT)
        assert (tmp_path / "hostile" / "behaves.json").read_bytes() == before
        assert not (tmp_path / "hostile" / "another.json").exists()

    def test_leaves_what_was_there_when_it_cannot_write(self, tmp_path: Path) -> None:
        publish(tmp_path, [outcome([1.0, 2.0])], COMMIT)
        path = tmp_path / "hostile" / "behaves.json"
        before = path.read_bytes()
        (tmp_path / "hostile" / "behaves.new").mkdir()
        with pytest.raises(LedgerError, match=r"cannot write .*what the ledger had before is intact"):
            publish(tmp_path, [outcome([1.0, 2.0], first_seed=1002)], COMMIT)
        assert path.read_bytes() == before

    def test_of_one_seed_says_that_the_interval_is_unknown(self, tmp_path: Path) -> None:
        publish(tmp_path, [outcome([1.0])], COMMIT)
        document = read_document(tmp_path, CLAIM)
        assert document is not None
        assert (document["verdict"], document["interval"]) == ("inconclusive", [None, None])


class TestSeeds:
    def test_begin_at_1000(self, tmp_path: Path) -> None:
        assert seeds_to_publish(tmp_path, CLAIM, 3) == range(1000, 1003)

    def test_are_never_used_again_whatever_the_scale_and_the_code(self, tmp_path: Path) -> None:
        publish(tmp_path, [outcome([1.0, 2.0, 3.0])], "first")
        assert seeds_to_publish(tmp_path, CLAIM, 2) == range(1003, 1005)
        publish(tmp_path, [outcome([1.0, 2.0], first_seed=1003)], "second")
        assert seeds_to_publish(tmp_path, CLAIM, 2) == range(1005, 1007)

    def test_of_one_claim_do_not_use_up_those_of_another(self, tmp_path: Path) -> None:
        publish(tmp_path, [outcome([1.0, 2.0, 3.0])], "first")
        assert seeds_to_publish(tmp_path, replace(CLAIM, name="another"), 2) == range(1000, 1002)


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is no JSON"), ("[]", "is no document"), ('{"paper": "x"}', "is no document")]
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "hostile" / "behaves.json"
    path.parent.mkdir()
    path.write_text(text)
    for reading in (lambda: read_all(tmp_path), lambda: seeds_to_publish(tmp_path, CLAIM, 2)):
        with pytest.raises(LedgerError, match=f"{path} {told}.*git checkout -- {path}"):
            reading()
    with pytest.raises(LedgerError, match=told):
        publish(tmp_path, [outcome([1.0, 2.0])], COMMIT)
    assert path.read_text() == text


class TestRender:
    def test_says_what_the_documents_say(self, tmp_path: Path) -> None:
        publish(tmp_path, [outcome([-20.0, -20.1, -20.3])], COMMIT)
        publish(tmp_path, [outcome([1.0, 2.0, 3.0], first_seed=1003)], COMMIT)
        parted = replace(
            CLAIM, name="both", statement="Both hold.", holds_when=AllOf(AtLeast("value", 0.0), AtMost("value", 2.0))
        )
        single = replace(CLAIM, paper="another", name="single", statement="Who knows.", note="")
        publish(tmp_path, [outcome([1.0, 1.5], claim=parted), outcome([1.0], claim=single)], COMMIT)
        documents = read_all(tmp_path)
        for document in documents:
            document |= {"processor": "A Processor", "date": "2026-01-02"}
        text = render(documents, {claim.key: claim for claim in (CLAIM, parted, single)})
        assert text == RENDERED

    @pytest.mark.parametrize(
        ("changed", "is_stale"),
        [
            ({"note": "Another note."}, False),
            ({"scales": {**CLAIM.scales, "full": Setting(9.0)}}, False),
            ({"statement": "Another."}, True),
            ({"holds_when": AtLeast("value", -9.0)}, True),
            ({"scales": {"smoke": Setting(), "small": Setting(0.7)}}, True),
            ({"scales": {"smoke": Setting()}}, True),
        ],
    )
    def test_tells_what_is_of_the_claim_as_it_is_now(
        self, tmp_path: Path, changed: dict[str, Any], is_stale: bool
    ) -> None:
        publish(tmp_path, [outcome([1.0, 2.0])], COMMIT)
        text = render(read_all(tmp_path), {CLAIM.key: replace(CLAIM, **changed)})
        assert ("To be measured again" in text) == is_stale

    @pytest.mark.parametrize(
        ("now", "is_stale"),
        [
            (Nested((1, 2), {"a": (Setting(0.5),)}), False),
            (Nested((1, 2), {"a": (Setting(0.5),)}, 3.0), True),  # was at its default
            (Nested((1, 3), {"a": (Setting(0.5),)}), True),
            (Nested((1,), {"a": (Setting(0.5),)}), True),
            (Nested((1, 2), {"b": (Setting(0.5),)}), True),
            (Nested((1, 2), {"a": (Setting(0.6),)}), True),
            (Setting(0.5), True),
        ],
    )
    def test_looks_for_settings_everywhere(self, tmp_path: Path, now: object, is_stale: bool) -> None:
        before = replace(CLAIM, scales={"smoke": Setting(), "small": Nested((1, 2), {"a": (Setting(0.5),)})})
        [path] = publish(tmp_path, [outcome([1.0, 2.0], claim=before)], COMMIT)
        document = json.loads(path.read_text())
        del document["configuration"]["later"]  # written before there was such a setting
        text = render([document], {CLAIM.key: replace(before, scales={"smoke": Setting(), "small": now})})
        assert ("To be measured again" in text) == is_stale

    def test_of_nothing_is_a_page_too(self, tmp_path: Path) -> None:
        text = render(read_all(tmp_path), {})
        assert "0 claims with published evidence: 0 holds, 0 refuted, 0 inconclusive." in text

    def test_needs_no_catalogue(self, tmp_path: Path) -> None:
        publish(tmp_path, [outcome([1.0, 2.0])], COMMIT)
        text = render(read_all(tmp_path), {})
        assert "A random number is above minus ten." in text
        assert "A note for readers." not in text


RENDERED = """# Results

<!-- Written by `postern results`. Do not edit. -->

3 claims with published evidence: 1 holds, 0 refuted, 2 inconclusive. Intervals are 95 % over seeds that were used \
once. How a claim is judged: [the criteria](postern/claims/criteria.py).

## another

### ? inconclusive: Who knows.

- Reported: -
- Measured: 1, 95 % interval unknown to unknown; holds when value >= -10
- `small`, seeds 1000-1000, 1 s on A Processor, 2026-01-02, commit 0123456789: [single](results/another/single.json)


## hostile

### ✔ holds: A random number is above minus ten.

- Reported: -
- Measured: 2, 95 % interval -0.4841 to 4.484; holds when value >= -10
- A note for readers.
- `small`, seeds 1003-1005, 4 s on A Processor, 2026-01-02, commit 0123456789: [behaves](results/hostile/behaves.json)
- Earlier publications, newest first: refuted

### ? inconclusive: Both hold.

- Reported: -
- Measured: 1.25, 95 % interval -1.927 to 4.427; holds when value >= 0 and value <= 2
  - inconclusive: value >= 0 (measured 1.25, -1.927 to 4.427)
  - inconclusive: value <= 2 (measured 1.25, -1.927 to 4.427)
- A note for readers.
- `small`, seeds 1000-1001, 2 s on A Processor, 2026-01-02, commit 0123456789: [both](results/hostile/both.json)
"""


class TestCommit:
    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        """A git repository with a package `postern` and something else, all committed."""
        folder = tmp_path / "checkout"
        (folder / "postern").mkdir(parents=True)
        (folder / "docs").mkdir()
        (folder / "postern" / "__init__.py").write_text("")
        (folder / "docs" / "index.md").write_text("")
        (folder / ".gitignore").write_text("__pycache__/\n")
        self.git(folder, "init", "-q")
        self.git(folder, "add", ".")
        identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        self.git(folder, *identity, "commit", "-q", "-m", "Begin")
        return folder

    @staticmethod
    def git(folder: Path, *arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout

    def test_is_that_of_a_clean_checkout_seen_from_anywhere_in_it(self, checkout: Path) -> None:
        head = self.git(checkout, "rev-parse", "HEAD").strip()
        (checkout / "docs" / "index.md").write_text("A change that no number depends on.")
        (checkout / "results").mkdir()
        (checkout / "results" / "new.json").write_text("{}")
        (checkout / "postern" / "__pycache__").mkdir()
        (checkout / "postern" / "__pycache__" / "x.pyc").write_text("")
        for folder in (checkout, checkout / "docs"):
            assert commit_of(folder, checkout / "postern") == head

    @pytest.mark.parametrize(("name", "mark"), [("__init__.py", "M"), ("new.py", r"\?\?")])
    def test_is_refused_where_no_commit_has_the_code(self, checkout: Path, name: str, mark: str) -> None:
        (checkout / "postern" / name).write_text("changed = True")
        for folder in (checkout, checkout / "docs"):
            with pytest.raises(LedgerError, match=f"no commit has these files as they are:\n{mark} postern/{name}"):
                commit_of(folder, checkout / "postern")

    def test_is_refused_where_a_staged_change_waits(self, checkout: Path) -> None:
        (checkout / "postern" / "__init__.py").write_text("changed = True")
        self.git(checkout, "add", ".")
        with pytest.raises(LedgerError, match=r"M  postern/__init__\.py"):
            commit_of(checkout, checkout / "postern")

    def test_is_refused_in_the_checkout_of_something_else(self, checkout: Path) -> None:
        with pytest.raises(
            LedgerError, match=f"a commit of {checkout}, but the code that is running is {ledger.PACKAGE}"
        ):
            commit_of(checkout)

    def test_is_refused_outside_of_any_checkout(self, tmp_path: Path) -> None:
        with pytest.raises(LedgerError, match=f"needs a git checkout of postern, and {tmp_path} is none: .*not a git"):
            commit_of(tmp_path)


def test_a_verdict_is_evidence_or_not() -> None:
    """A new verdict must be thought of here, or it would silently not be published."""
    assert set(Verdict) - set(ledger._MARK) == {Verdict.SMOKE, Verdict.ERROR, Verdict.NOT_RUN}
