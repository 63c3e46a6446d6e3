"""Fingerprints, on packages that are written for the purpose: what changes one, and what does not."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from postern.claims import Claim
from postern.claims.fingerprint import _code, _imports, fingerprint
from tests.claims.papers import PAPER, Setting

PAPER_MODULE = """
from datetime import date
from postern.claims import AtLeast, Paper
from .parts import direct
import fresh.tools.used
PAPER = Paper("slug", "T", date(2020, 1, 1), None, 1, "softmax", "S.")
@PAPER.claim("It is so.", reported="-", holds_when=AtLeast("x", 0), scales={"smoke": 1, "small": 2}, seeds=2)
def experiment(config, run):
    from fresh.parts import late
    return {"x": 1.0}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `fresh` on the path: a paper, modules that it imports at several removes, and others."""
    files = {
        "__init__.py": "",
        "paper.py": PAPER_MODULE,
        "parts/__init__.py": "",
        "parts/direct.py": "from fresh.parts import indirect",
        "parts/indirect.py": "value = 1",
        "parts/late.py": "value = 1",
        "parts/unrelated.py": "value = 1",
        "parts/fast.cpp": "int one() { return 1; }",
        "tools/__init__.py": "",
        "tools/used.py": "import json",
        "tools/unrelated.py": "value = 1",
    }
    for name, text in files.items():
        path = tmp_path / "fresh" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "fresh"
    for name in [name for name in sys.modules if name.partition(".")[0] == "fresh"]:
        del sys.modules[name]
    _code.cache_clear()
    _imports.cache_clear()


def fresh_fingerprint(scale: str = "smoke") -> str:
    _code.cache_clear()
    _imports.cache_clear()
    claim: Claim = importlib.import_module("fresh.paper").PAPER.claims["experiment"]
    return fingerprint(claim, scale)


@pytest.mark.parametrize(
    "name",
    [
        "paper.py",
        "parts/__init__.py",
        "parts/direct.py",
        "parts/indirect.py",
        "parts/late.py",
        "parts/fast.cpp",
        "tools/__init__.py",
        "tools/used.py",
    ],
)
def test_changes_with_every_file_that_the_experiment_uses(package: Path, name: str) -> None:
    before = fresh_fingerprint()
    path = package / name
    path.write_text(path.read_text() + "\n")
    assert fresh_fingerprint() != before


@pytest.mark.parametrize("name", ["parts/unrelated.py", "tools/unrelated.py"])
def test_does_not_change_with_a_file_that_it_does_not_use(package: Path, name: str) -> None:
    before = fresh_fingerprint()
    (package / name).write_text("value = 2")
    (package / "tools" / "new.py").write_text("value = 2")
    assert fresh_fingerprint() == before


def test_does_not_depend_on_where_the_package_is(
    package: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fresh_fingerprint()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    package.rename(elsewhere / "fresh")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fresh"]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(elsewhere)
    importlib.invalidate_caches()
    assert fresh_fingerprint() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda claim: replace(claim, name="another"),
        lambda claim: replace(claim, paper="another"),
        lambda claim: replace(claim, scales=MappingProxyType({"smoke": Setting(3.0)})),
    ],
    ids=["claim", "paper", "configuration"],
)
def test_changes_with_the_claim_and_its_configuration(change: Callable[[Claim], Claim]) -> None:
    claim = PAPER.claims["behaves"]
    assert fingerprint(change(claim), "smoke") != fingerprint(claim, "smoke")


def test_differs_by_scale_and_is_stable() -> None:
    claim = PAPER.claims["behaves"]
    assert fingerprint(claim, "smoke") == fingerprint(claim, "smoke") != fingerprint(claim, "small")
    assert len(fingerprint(claim, "smoke")) == 16


def test_does_not_change_with_the_words_around_the_experiment() -> None:
    """What describes a measurement is no part of it."""
    claim = PAPER.claims["behaves"]
    assert fingerprint(replace(claim, note="A note.", statement="Better said."), "smoke") == fingerprint(claim, "smoke")
