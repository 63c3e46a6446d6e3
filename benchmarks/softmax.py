"""Softmax side by side with torch, in ratios: how many times as fast postern is, in one run, with equal threads.

    python -m benchmarks.softmax [--threads N] [--seconds S]

Each ratio is the best time of torch over the best time of postern. The two take turns, so that both see the same
machine; inputs are uniform in +-10, memory that is written into has been written before.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks._tables import Row, best_times, record
from postern import _native
from postern.softmax import online_softmax, three_pass_softmax, two_pass_log_softmax, two_pass_softmax

# What the timed statements name.
FUNCTIONS = {
    "torch": torch,
    "two_pass_softmax": two_pass_softmax,
    "two_pass_log_softmax": two_pass_log_softmax,
    "three_pass_softmax": three_pass_softmax,
    "online_softmax": online_softmax,
}

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
                "torch": "torch.softmax(logits, -1, out=out)",
                "postern": "two_pass_softmax(logits, out=out)",
                "torch, new": "torch.softmax(logits, -1)",
                "postern, new": "two_pass_softmax(logits)",
            },
            seconds,
            FUNCTIONS | {"logits": logits, "out": out},
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
                {"torch": "torch.softmax(logits, -1, out=out)", "postern": "two_pass_softmax(logits, out=out)"},
                seconds,
                FUNCTIONS | {"logits": logits, "out": out},
            )
            row[str(dtype).removeprefix("torch.")] = times["torch"] / times["postern"]
        logits = uniform(shape)
        out = torch.softmax(logits, -1)
        times = best_times(
            {"torch": "torch.log_softmax(logits, -1, out=out)", "postern": "two_pass_log_softmax(logits, out=out)"},
            seconds,
            FUNCTIONS | {"logits": logits, "out": out},
        )
        row["log-softmax"] = times["torch"] / times["postern"]
        times = best_times(
            {
                "torch": "torch.autograd.grad(torch.softmax(logits, -1), logits, weights)",
                "postern": "torch.autograd.grad(two_pass_softmax(logits), logits, weights)",
            },
            seconds,
            FUNCTIONS | {"logits": logits.requires_grad_(), "weights": uniform(shape)},
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
                statements = {
                    "two-pass": "two_pass_softmax(logits, out=out, backend='native')",
                    "recomputing": "three_pass_softmax(logits, out=out, backend='native')",
                    "reloading": "three_pass_softmax(logits, out=out, variant='reload', backend='native')",
                    "online": "online_softmax(logits, out=out, backend='native')",
                }
                with _native.using(instruction_set):
                    times = best_times(statements, 2 * seconds, FUNCTIONS | {"logits": logits, "out": out})
                row: Row = {"instructions": instruction_set, "elements": f"{size:,}", "row and result in": place}
                for name in ("recomputing", "reloading", "online"):
                    row[f"against {name}"] = times[name] / times["two-pass"]
                rows.append(row)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="how long to time each shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    status = _native.status()
    if not status.available:
        raise SystemExit(status.reason)
    seconds = arguments.seconds
    record(
        "softmax",
        "Softmax against torch",
        {
            "Softmax in float32, automatic choice: times as fast as torch.softmax": shapes(seconds),
            "Other formats and passes: times as fast as torch, result given (gradients: new)": formats_and_passes(
                seconds
            ),
            "The two-pass kernel on one thread: times as fast as other algorithms' kernels": algorithms(seconds),
        },
    )


if __name__ == "__main__":
    main()
