"""`postern doctor`: what this machine has, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from postern.cli.selection import print_json, wide_console


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what kind of thing it is.
        name: the thing.
        is_there: whether it can be used.
        state: what was found.
        remedy: what to do where it is missing.
    """

    topic: str
    name: str
    is_there: bool
    state: str
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False) -> None:
    """Show which kernels, devices, extras and data sets there are, and what to do about what is missing."""
    found = [*_kernels(), *_devices(), *_extras(), *_data_sets()]
    if as_json:
        print_json([asdict(finding) for finding in found])
        return
    console = wide_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "kind", "what", "state"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "state")
    for finding in found:
        mark = "[green]✔[/]" if finding.is_there else "[yellow]–[/]"
        table.add_row(mark, finding.topic, finding.name, finding.state)
    console.print(table)
    missing = [finding for finding in found if not finding.is_there]
    if missing:
        console.print("\n[bold]What to do about what is missing[/]")
    for finding in missing:
        console.print(f"- {finding.name}: {escape(finding.remedy)}", highlight=False, soft_wrap=True)


def _kernels() -> list[Finding]:
    from postern._native import status

    native = status()
    remedy = "" if native.available else "install a C++ compiler (g++ or clang++) and install postern again"
    state = native.instruction_set if native.available else native.reason
    return [Finding("kernel", "compiled C++ kernels", native.available, str(state), remedy)]


def _devices() -> list[Finding]:
    import torch

    from postern.claims.engine import available_cores

    cpu = Finding("device", "cpu", True, f"{available_cores()} cores, torch {torch.__version__}")
    if torch.cuda.is_available():
        cuda = Finding("device", "cuda", True, torch.cuda.get_device_name())
    else:
        cuda = Finding("device", "cuda", False, "none", "most claims' full scale needs one; smoke and small do not")
    return [cpu, cuda]


def _extras() -> list[Finding]:
    metadata = importlib.metadata.metadata("postern")
    findings = []
    for extra in sorted(set(metadata.get_all("Provides-Extra") or []) - {"all", "lint", "test"}):
        needed = [
            requirement.partition(";")[0].strip()
            for requirement in importlib.metadata.requires("postern") or []
            if requirement.endswith(f'extra == "{extra}"')
        ]
        missing = [package for package in map(_package_of, needed) if importlib.util.find_spec(package) is None]
        state = "installed" if not missing else f"lacks {', '.join(missing)}"
        remedy = f"pip install 'postern[{extra}]'" if missing else ""
        findings.append(Finding("extra", extra, not missing, state, remedy))
    return findings


def _package_of(requirement: str) -> str:
    """The module that a requirement such as ``ray>=2.5`` brings."""
    name = requirement
    for sign in "<>=!~ ;[":
        name = name.partition(sign)[0]
    return name.replace("-", "_")


def _data_sets() -> list[Finding]:
    from postern.data import catalogue, locate

    findings = []
    for data_set in catalogue():
        place = locate(data_set.name)
        is_there = place.where != "missing"
        state = place.where if place.path is None else f"{place.where}: {place.path}"
        findings.append(Finding("data", data_set.name, is_there, state, "" if is_there else place.remedy))
    return findings
