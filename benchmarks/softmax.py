"""Softmax side by side with torch, in ratios: how many times as fast postern is, in one run, with equal threads.

    python benchmarks/softmax.py [--threads N] [--seconds S]

Each ratio is the best time of torch over the best time of postern. The two take turns, call by call, so that both see
the same machine; inputs are uniform in +-10, memory that is written into has been written before. It prints a table,
and writes it with the circumstances to ``benchmarks/results/softmax.md`` and ``softmax.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import postern
from postern import _native
from postern.softmax import online_softmax, three_pass_softmax, two_pass_log_softmax, two_pass_softmax

RESULTS = Path(__file__).parent / "results"
Calls = Mapping[str, Callable[[], object]]
Row = dict[str, str | float]

SHAPES = (
    *((1, 1 << power) for power in (6, 10, 12, 14, 16, 17, 18, 20, 22, 23, 24, 26)),
    *((8, 1 << 20), (64, 1 << 20)),
    *((8, 10), (64, 10), (1024, 10), (1 << 20, 10)),
    *((32, 128), (1024, 128), (100_000, 128)),
    *((128, 1000), (4096, 1000), (32_768, 1000)),
    *((16, 4096), (512, 4096), (8192, 4096)),
    *((1, 32_000), (8, 32_000), (128, 32_000), (4096, 32_000)),
    *((32, 50_257), (8, 128_256), (128, 128_256)),
)


def best_times(calls: Calls, seconds: float) -> dict[str, float]:
    """Best seconds of one call of each; they take turns for about ``seconds``, at least seven times."""
    for call in calls.values():
        call()
    start = time.perf_counter()
    for call in calls.values():
        call()
    # Calls of microseconds are timed several at once.
    at_once = max(1, int(2e-4 * len(calls) / (time.perf_counter() - start)))
    best = dict.fromkeys(calls, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 7 or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(at_once):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / at_once)
        rounds += 1
    return best


def uniform(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape).uniform_(-10, 10).to(dtype)


def shapes(seconds: float) -> list[Row]:
    """Softmax in float32 over many shapes, into a given tensor and into a new one."""
    rows: list[Row] = []
    for shape in SHAPES:
        logits = uniform(shape)
        out = torch.softmax(logits, -1)
        times = best_times(
            {
                "torch": partial(torch.softmax, logits, -1, out=out),
                "postern": partial(two_pass_softmax, logits, out=out),
                "torch, new": partial(torch.softmax, logits, -1),
                "postern, new": partial(two_pass_softmax, logits),
            },
            seconds,
        )
        rows.append(
            {
                "rows": f"{shape[0]:,}",
                "columns": f"{shape[1]:,}",
                "with out=": times["torch"] / times["postern"],
                "new result": times["torch, new"] / times["postern, new"],
            }
        )
    return rows


def formats_and_passes(seconds: float) -> list[Row]:
    """Other formats, log-softmax and the backward pass, over long and short rows."""
    rows: list[Row] = []
    for shape in ((256, 1000), (128, 32_000), (1024, 32_000), (1, 1 << 20), (1, 1 << 25)):
        row: Row = {"rows": f"{shape[0]:,}", "columns": f"{shape[1]:,}"}
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            logits = uniform(shape, dtype)
            out = torch.softmax(logits, -1)
            times = best_times(
                {
                    "torch": partial(torch.softmax, logits, -1, out=out),
                    "postern": partial(two_pass_softmax, logits, out=out),
                },
                seconds,
            )
            row[str(dtype).removeprefix("torch.")] = times["torch"] / times["postern"]
        logits = uniform(shape)
        out = torch.softmax(logits, -1)
        times = best_times(
            {
                "torch": partial(torch.log_softmax, logits, -1, out=out),
                "postern": partial(two_pass_log_softmax, logits, out=out),
            },
            seconds,
        )
        row["log-softmax"] = times["torch"] / times["postern"]
        leaf, weights = logits.requires_grad_(), uniform(shape)

        def forward_and_backward(
            softmax: Callable[[Tensor, int], Tensor], x: Tensor = leaf, g: Tensor = weights
        ) -> None:
            torch.autograd.grad(softmax(x, -1), x, g)

        times = best_times(
            {
                "torch": partial(forward_and_backward, torch.softmax),
                "postern": partial(forward_and_backward, two_pass_softmax),
            },
            seconds,
        )
        row["forward and backward"] = times["torch"] / times["postern"]
        rows.append(row)
    return rows


def algorithms(seconds: float) -> list[Row]:
    """The paper's comparison: the two-pass kernel against its rivals, one row, one thread, denormals flushed."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    smallest = 2 * _native.cache_bytes("last") // 8
    try:
        for instruction_set in _native.instruction_sets():
            if instruction_set == "portable":
                continue
            for size, place in (
                (1 << 16, "2nd-level cache"),
                (1 << 20, "last cache"),
                (smallest, "memory"),
                (4 * smallest, "memory"),
            ):
                logits, out = uniform((size,)) * 100, torch.ones(size)
                calls = {
                    "two-pass": partial(two_pass_softmax, logits, out=out, backend="native"),
                    "recomputing": partial(three_pass_softmax, logits, out=out, backend="native"),
                    "reloading": partial(three_pass_softmax, logits, out=out, variant="reload", backend="native"),
                    "online": partial(online_softmax, logits, out=out, backend="native"),
                }
                with _native.using(instruction_set):
                    times = best_times(calls, 2 * seconds)
                row: Row = {"instructions": instruction_set, "elements": f"{size:,}", "row and result in": place}
                for name in ("recomputing", "reloading", "online"):
                    row[f"against {name}"] = times[name] / times["two-pass"]
                rows.append(row)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    return rows


def circumstances() -> Row:
    """What a reader needs to judge the numbers."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
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
        "commit": commit or "unknown",
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.partition(":")[::2] for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in known.items()}
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def as_markdown(rows: list[Row]) -> str:
    columns = list(rows[0])
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    widths = [max(len(line[k]) for line in [columns, *cells]) for k in range(len(columns))]
    lines = [columns, ["-" * (width - 1) + ":" for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="how long to time each shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    status = _native.status()
    if not status.available:
        raise SystemExit(status.reason)
    found = circumstances()
    tables = {
        "Softmax in float32, automatic choice: times as fast as torch.softmax": shapes(arguments.seconds),
        "Other formats and passes: times as fast as torch, result given (gradients: new)": formats_and_passes(
            arguments.seconds
        ),
        "The two-pass kernel on one thread: times as fast as other algorithms' kernels": algorithms(arguments.seconds),
    }
    text = "# Softmax against torch\n\n" + "\n".join(f"- {key}: {value}" for key, value in found.items()) + "\n"
    for title, rows in tables.items():
        text += f"\n## {title}\n\n{as_markdown(rows)}\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "softmax.md").write_text(text)
    (RESULTS / "softmax.json").write_text(json.dumps({"circumstances": found, "ratios": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
