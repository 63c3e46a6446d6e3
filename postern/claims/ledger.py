"""The ledger: published evidence, one JSON document a claim, and the page that is generated from them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from postern.claims.criteria import Judgement, Verdict
from postern.claims.outcome import Outcome
from postern.claims.paper import Claim

FIRST_PUBLISHED_SEED = 1000
PACKAGE = Path(__file__).parents[1]
_VERSIONED = ("postern", "torch", "numpy", "scipy", "scikit-learn", "transformers")
_MARK = {Verdict.HOLDS: "✔", Verdict.REFUTED: "✘", Verdict.INCONCLUSIVE: "?"}


class LedgerError(RuntimeError):
    """The ledger cannot be read or written as asked; the text says why and what to do."""


def seeds_to_publish(results: Path, claim: Claim, count: int) -> range:
    """Return seeds for new evidence: from 1000 up, never used for this claim before, at whatever scale.

    Args:
        results: the ledger's folder.
        claim: the claim.
        count: how many seeds.
    """
    first = max(_used_seeds(results, claim), default=FIRST_PUBLISHED_SEED - 1) + 1
    return range(first, first + count)


def read_document(results: Path, claim: Claim) -> dict[str, Any] | None:
    """Return what the ledger has of a claim, or None.

    Raises:
        LedgerError: the file is there but is no document of the ledger.
    """
    path = _path(results, claim.paper, claim.name)
    return _read(path) if path.exists() else None


def read_all(results: Path) -> list[dict[str, Any]]:
    """Return every document of the ledger, sorted by paper and claim.

    Raises:
        LedgerError: a file that is no document of the ledger.
    """
    return [_read(path) for path in sorted(results.glob("*/*.json"))]


def publish(results: Path, outcomes: Iterable[Outcome], commit: str) -> list[Path]:
    """Write outcomes to the ledger.

    What a document said before stays in it, under ``history``: a claim that is measured again cannot lose a verdict.
    Outcomes that are no evidence (smoke, errors, not run) are left out.

    Args:
        results: the ledger's folder.
        outcomes: from `postern.claims.driver.execute`.
        commit: the commit that was measured.

    Returns:
        The files that were written.

    Raises:
        LedgerError: a seed below 1000 or one that was published before, a file that is no document of the ledger, or
            one that cannot be written. What the ledger had before is intact.
    """
    evidence = [(each, each.judgement) for each in outcomes if each.verdict in _MARK and each.judgement is not None]
    for outcome, _ in evidence:
        _check_seeds(results, outcome)
    written = []
    for outcome, judgement in evidence:
        path = _path(results, outcome.claim.paper, outcome.claim.name)
        entry = _entry(outcome, judgement, commit)
        entry["history"] = _entries(_read(path)) if path.exists() else []
        _write(path, json.dumps(_plain(entry), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        written.append(path)
    return written


def render(documents: Sequence[Mapping[str, Any]], claims: Mapping[str, Claim]) -> str:
    """Return RESULTS.md: what the ledger says, with each claim's note.

    Args:
        documents: from `read_all`.
        claims: the catalogue's claims by key, for their notes.
    """
    counts = {verdict: sum(d["verdict"] == verdict for d in documents) for verdict in _MARK}
    summary = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())
    lines = [
        "# Results",
        "",
        "<!-- Written by `postern results`. Do not edit. -->",
        "",
        f"{len(documents)} claims with published evidence: {summary}. "
        "Intervals are 95 % over seeds that were used once. How a claim is judged: "
        "[the criteria](postern/claims/criteria.py).",
    ]
    paper = None
    for document in documents:
        if document["paper"] != paper:
            paper = document["paper"]
            lines += ["", f"## {paper}", ""]
        lines += _render_claim(document, claims.get(f"{document['paper']}/{document['claim']}"))
    return "\n".join(lines).rstrip() + "\n"


def commit_of(folder: Path, package: Path = PACKAGE) -> str:
    """Return the commit that has the code that is running.

    Args:
        folder: somewhere in the checkout.
        package: where the running code is.

    Raises:
        LedgerError: ``folder`` is in no checkout, the running code is elsewhere, or no commit has it as it is.
    """
    try:
        top = Path(_git(folder, "rev-parse", "--show-toplevel")).resolve()
        commit = _git(folder, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", "")).strip() or error
        raise LedgerError(f"publishing needs a git checkout of postern, and {folder} is none: {reason}") from error
    if not package.resolve().is_relative_to(top):
        raise LedgerError(
            f"published numbers name a commit of {top}, but the code that is running is {package}: "
            "publish from its own checkout"
        )
    changes = _git(top, "status", "--porcelain", "--untracked-files=all", "--", str(package.resolve()))
    if changes:
        raise LedgerError(f"published numbers name a commit, and no commit has these files as they are:\n{changes}")
    return commit


def _git(folder: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return finished.stdout.strip()


def _path(results: Path, paper: str, claim: str) -> Path:
    return results / paper / f"{claim}.json"


def _read(path: Path) -> dict[str, Any]:
    remedy = f"restore it with: git checkout -- {path}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LedgerError(f"{path} is no JSON: {error}; {remedy}") from error
    if not isinstance(document, dict) or not {"paper", "claim", "verdict", "seeds"} <= document.keys():
        raise LedgerError(f"{path} is no document of the ledger; {remedy}")
    return document


def _used_seeds(results: Path, claim: Claim) -> set[int]:
    document = read_document(results, claim)
    return {seed for entry in _entries(document) for seed in entry["seeds"]} if document else set()


def _check_seeds(results: Path, outcome: Outcome) -> None:
    seeds = {result.job.seed for result in outcome.results}
    if min(seeds) < FIRST_PUBLISHED_SEED:
        raise LedgerError(
            f"{outcome.claim.key}: evidence takes seeds from {FIRST_PUBLISHED_SEED} up, those below are for building "
            f"and tuning; got seed {min(seeds)}"
        )
    again = seeds & _used_seeds(results, outcome.claim)
    if again:
        raise LedgerError(f"{outcome.claim.key}: seed {min(again)} was published before, and each seed counts once")


def _write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    fresh = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise LedgerError(f"cannot write {path}: {error}; what the ledger had before is intact") from error


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite become null, other things their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _entries(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A document's latest entry and its history, newest first."""
    latest = {key: value for key, value in document.items() if key != "history"}
    return [latest, *document.get("history", [])]


def _entry(outcome: Outcome, judgement: Judgement, commit: str) -> dict[str, Any]:
    claim, first = outcome.claim, outcome.results[0]
    configuration = claim.scales[outcome.scale]
    if is_dataclass(configuration) and not isinstance(configuration, type):
        configuration = asdict(configuration)
    return {
        "paper": claim.paper,
        "claim": claim.name,
        "statement": claim.statement,
        "reported": claim.reported,
        "scale": outcome.scale,
        "verdict": outcome.verdict.value,
        "estimate": judgement.estimate,
        "interval": judgement.interval,
        "criterion": judgement.criterion,
        "parts": [
            {
                "criterion": part.criterion,
                "verdict": part.verdict.value,
                "estimate": part.estimate,
                "interval": part.interval,
            }
            for part in judgement.parts
        ],
        "configuration": configuration,
        "metrics": {str(seed): metrics for seed, metrics in outcome.metrics.items()},
        "tables": dict(first.measurement.tables),
        "seeds": [result.job.seed for result in outcome.results],
        "seconds": round(outcome.seconds, 1),
        "device": first.job.device,
        "processor": processor(),
        "threads": first.job.threads,
        "versions": versions(),
        "commit": commit,
        "fingerprint": first.job.fingerprint,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _is_of(document: Mapping[str, Any], claim: Claim) -> bool:
    """Whether a document's numbers are of the claim as it is now: what it says, how it is judged, its settings."""
    scale = document["scale"]
    return (
        document["statement"] == claim.statement
        and document["criterion"] == claim.holds_when.describe()
        and scale in claim.scales
        and _agrees(document["configuration"], claim.scales[scale])
    )


def _agrees(written: Any, setting: Any) -> bool:
    """Whether a setting is as it was written; what it had not yet then has to be at its default."""
    if is_dataclass(setting) and not isinstance(setting, type):
        own = {field.name: field for field in fields(setting)}
        if not isinstance(written, Mapping) or not written.keys() <= own.keys():
            return False
        return all(
            _agrees(written[name], getattr(setting, name))
            if name in written
            else getattr(setting, name) == field.default
            for name, field in own.items()
        )
    if isinstance(setting, Mapping) and isinstance(written, Mapping):
        named = {str(name): value for name, value in setting.items()}
        return written.keys() == named.keys() and all(_agrees(written[name], value) for name, value in named.items())
    if isinstance(setting, list | tuple) and isinstance(written, list):
        return len(written) == len(setting) and all(map(_agrees, written, setting))
    return bool(written == _plain(setting))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the processor's model name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _render_claim(document: Mapping[str, Any], claim: Claim | None) -> list[str]:
    low, high = document["interval"]
    verdict = Verdict(document["verdict"])
    lines = [
        f"### {_MARK[verdict]} {verdict.value}: {document['statement']}",
        "",
        f"- Reported: {document['reported']}",
        f"- Measured: {document['estimate']:.4g}, 95 % interval {_bound(low)} to {_bound(high)}; "
        f"holds when {document['criterion']}",
    ]
    for part in document.get("parts", []):
        low, high = part["interval"]
        measured = f"measured {part['estimate']:.4g}, {_bound(low)} to {_bound(high)}"
        lines.append(f"  - {part['verdict']}: {part['criterion']} ({measured})")
    if claim is not None and claim.note:
        lines.append(f"- {claim.note}")
    if claim is not None and not _is_of(document, claim):
        lines.append("- To be measured again: since then the claim or its settings have changed; the note has the new.")
    lines.append(
        f"- `{document['scale']}`, seeds {document['seeds'][0]}-{document['seeds'][-1]}, {document['seconds']:.0f} s "
        f"on {document['processor']}, {document['date']}, commit {document['commit'][:10]}: "
        f"[{document['claim']}](results/{document['paper']}/{document['claim']}.json)"
    )
    earlier = [entry["verdict"] for entry in document.get("history", [])]
    if earlier:
        lines.append(f"- Earlier publications, newest first: {', '.join(earlier)}")
    return [*lines, ""]


def _bound(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
