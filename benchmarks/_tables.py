"""What benchmarks share: statements that take turns, the circumstances, and the page with all tables.

A benchmark calls `record`. It writes ``benchmarks/results/<name>.json`` and renders ``benchmarks/README.md`` anew from
every file there, so that nobody edits numbers by hand.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
import subprocess
import time
import timeit
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import postern
from postern import _native
from postern.machine import processor
from postern.timing import waiting

FOLDER = Path(__file__).parent
CPU = torch.device("cpu")
Row = dict[str, str | float]

HEADER = """# Benchmarks

<!-- Written by the benchmarks. Do not edit. -->

Side by side with peers, in one run, with equal threads. Unless a table says otherwise, a number is a ratio: how many
times as fast as the peer, by the best time of each. `python -m benchmarks.NAME` runs one and renders this page anew.
"""


def best_times(
    statements: Mapping[str, str],
    seconds: float,
    names: Mapping[str, object],
    rounds: int = 7,
    device: torch.device = CPU,
) -> dict[str, float]:
    """Best seconds of each statement, as a user writes it; they take turns for ``seconds``, at least ``rounds`` times.

    In each round the turns come in another order, as each statement finds the caches as the one before has left them.

    Args:
        statements: code by name.
        seconds: how long to go on, in all.
        names: what the statements name.
        rounds: turns that each gets at least.
        device: where they work; a GPU is waited for.
    """
    calls = {key: timeit.Timer(statement, globals=dict(names)) for key, statement in statements.items()}

    def timed(call: timeit.Timer, count: int) -> float:
        start = time.perf_counter()
        waiting(lambda: call.timeit(count), device)()
        return time.perf_counter() - start

    for call in calls.values():
        timed(call, 1)
    # Statements of microseconds are timed several at once.
    at_once = max(1, int(2e-4 * len(calls) / sum(timed(call, 1) for call in calls.values())))
    best = dict.fromkeys(calls, float("inf"))
    end, done, orders = time.perf_counter() + seconds, 0, random.Random(0)
    while done < rounds or time.perf_counter() < end:
        for key, call in orders.sample(list(calls.items()), len(calls)):
            best[key] = min(best[key], timed(call, at_once) / at_once)
        done += 1
    return best


def device_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where to work; see `prepare`."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def prepare(arguments: argparse.Namespace) -> torch.device:
    """Set the threads and the seed; return the device."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return torch.device(arguments.device)


def place(device: torch.device) -> str:
    """Where it works, for headings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}"


def circumstances(device: torch.device = CPU) -> Row:
    """What a reader needs to judge the numbers."""
    if device.type == "cuda":
        return {
            "GPU": torch.cuda.get_device_name(device),
            "CUDA": str(torch.version.cuda),
            "triton": importlib.metadata.version("triton"),
            "torch": torch.__version__,
            "postern": postern.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "commit": commit(),
        }
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": str(_native.status().instruction_set),
        "last-level cache, MiB": _native.cache_bytes("last") / 2**20,
        "torch": torch.__version__,
        "torch's instructions": torch.backends.cpu.get_cpu_capability(),
        "postern": postern.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }


def commit() -> str:
    """The commit that is measured; its own results do not count as a change."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False
        ).stdout.strip()

    changes = git("status", "--porcelain", "--", "..", ":!results", ":!README.md", ":!../results", ":!../RESULTS.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" and changes" if changes else "")


def record(name: str, title: str, tables: Mapping[str, Sequence[Row]], device: torch.device = CPU) -> None:
    """Print the tables, keep them under ``results/``, and render the page.

    Args:
        name: the benchmark's module.
        title: its heading on the page.
        tables: rows by the table's title; all rows of a table have the same columns.
        device: where it was measured; a GPU's results are kept beside the CPU's.
    """
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    document = {"title": title, "circumstances": circumstances(device), "tables": tables}
    name = name if device.type == "cpu" else f"{name}.{device.type}"
    (results / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(section(name, document))
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """The page, from what is under ``results/``."""
    files = sorted((FOLDER / "results").glob("*.json"))
    return HEADER + "".join("\n" + section(file.stem, json.loads(file.read_text(encoding="utf-8"))) for file in files)


def section(name: str, document: Mapping[str, object]) -> str:
    """One benchmark's part of the page."""
    found, tables = document["circumstances"], document["tables"]
    assert isinstance(found, Mapping)
    assert isinstance(tables, Mapping)
    module, _, device = name.partition(".")
    command = f"python -m benchmarks.{module}" + (f" --device {device}" if device else "")
    text = f"## {document['title']}\n\n`{command}` on "
    text += ", ".join(f"{key} {value}" for key, value in found.items()) + ".\n"
    for title, rows in tables.items():
        text += f"\n### {title}\n\n{as_markdown(rows)}\n"
    return text


def as_markdown(rows: Sequence[Row]) -> str:
    columns = list(rows[0])
    cells = [[number(cell) if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    widths = [max(len(line[k]) for line in [columns, *cells]) for k in range(len(columns))]
    lines = [columns, ["-" * (width - 1) + ":" for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
