"""Decoding: attention of one query over a long cache, and matrix products with a few rows.

    python -m benchmarks.flashdecoding [--lengths 1024 4096 16384 32768] [--hidden 4096] [--seconds S] [--threads N]

Attention is timed in its unified form (one constant for all maxima) against the synchronised form of the same kernel
and PyTorch's fused one; products in the flat form against PyTorch's, and the choice by a table that is tuned in
the same run against each kernel alone. On a GPU both are Triton kernels in float16, and every statement waits for its
result.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch.nn import functional as F

from benchmarks._tables import Row, best_times, record
from postern.attention import (
    GemmDispatcher,
    UnifiedMax,
    decode_attention,
    pack_weight,
    unified_decode_attention,
)
from postern.attention.gemm_dispatch import KERNELS, ROWS, gemm_calls

WAIT = {"cpu": "", "cuda": "; wait()"}


def attention(length: int, heads: int, kv_heads: int, seconds: float, device: str, dtype: torch.dtype) -> Row:
    query = torch.randn(1, heads, 1, 128).to(device, dtype)
    key, value = (torch.randn(1, kv_heads, length, 128).to(device, dtype) for _ in range(2))
    unified = UnifiedMax(2.0)
    found, recomputed = unified_decode_attention(query, key, value, unified)
    assert not recomputed.any()
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(query, key, value, enable_gqa=True), rtol=1e-2, atol=2e-3
    )
    call = "decode_attention(query, key, value, unified={}, backend={!r})"
    times = best_times(
        {
            name: statement + WAIT[device]
            for name, statement in {
                "unified": call.format("unified", "auto"),
                "synchronised": call.format("None", "auto"),
                "unified in torch": call.format("unified", "torch"),
                "SDPA": "sdpa(query, key, value, enable_gqa=True)",
            }.items()
        },
        seconds,
        {
            "decode_attention": decode_attention,
            "sdpa": F.scaled_dot_product_attention,
            "query": query,
            "key": key,
            "value": value,
            "unified": unified,
            "wait": torch.cuda.synchronize,
        },
    )
    num_bytes = (key.numel() + value.numel()) * key.element_size()
    return {
        "keys": f"{length:,}",
        "heads": f"{heads} on {kv_heads}",
        "unified, ms": 1e3 * times["unified"],
        "GB/s": num_bytes / times["unified"] / 1e9,
        "against synchronised": times["synchronised"] / times["unified"],
        "against tensor operations": times["unified in torch"] / times["unified"],
        "against SDPA": times["SDPA"] / times["unified"],
    }


def products(
    shapes: dict[str, tuple[int, int]], seconds: float, device: str, dtype: torch.dtype
) -> tuple[list[Row], list[Row]]:
    table: list[Row] = []
    measured = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape).to(device, dtype)
        packed = pack_weight(weight) if device == "cpu" else None
        measured[shape] = {}
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).to(device, dtype)
            calls = gemm_calls(x, weight, packed)
            torch.testing.assert_close(calls["flat"](), F.linear(x, weight), rtol=1e-2, atol=1e-2 * shape[1] ** 0.5)
            filled = F.pad(x, (0, 0, 0, 64 - rows))
            names = {**calls, "linear": F.linear, "filled": filled, "weight": weight, "wait": torch.cuda.synchronize}
            times = best_times(
                {kernel: f"{kernel}()" for kernel in KERNELS} | {"padded": f"linear(filled, weight){WAIT[device]}"},
                seconds,
                names,
            )
            measured[shape][rows] = {kernel: times[kernel] for kernel in KERNELS}
            table.append(
                {
                    "weights": f"{name} {list(shape)}",
                    "rows": str(rows),
                    "flat, ms": 1e3 * times["flat"],
                    "GB/s": weight.numel() * weight.element_size() / times["flat"] / 1e9,
                    "against F.linear": times["vendor"] / times["flat"],
                    "against F.linear on 64 rows": times["padded"] / times["flat"],
                    "against row by row": times["gemv"] / times["flat"],
                }
            )
    # Tuned and judged on times of different calls.
    tuned = GemmDispatcher.profile(shapes.values(), dtype=dtype, device=device)
    cells = [(shape, rows) for shape in measured for rows in ROWS]

    def geometric(times: list[float]) -> float:
        return 1e3 * math.exp(sum(map(math.log, times)) / len(times))

    chosen = geometric([measured[shape][rows][tuned.choose(rows, *shape)] for shape, rows in cells])
    policies: list[Row] = [{"policy": "the table", "ms": chosen, "against the table": 1.0}]
    for kernel in KERNELS:
        alone = geometric([measured[shape][rows][kernel] for shape, rows in cells])
        policies.append({"policy": f"{kernel} alone", "ms": alone, "against the table": alone / chosen})
    return table, policies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16_384, 32_768])
    parser.add_argument("--hidden", type=int, default=4096, help="width of the model, in Llama's proportions")
    parser.add_argument("--heads", type=int, default=32, help="of 128 features each")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each line of a table at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = torch.float16 if arguments.device == "cuda" else torch.float32
    hidden, feedforward = arguments.hidden, arguments.hidden * 43 // 16
    shapes = {
        "QKV": (3 * hidden, hidden),
        "O": (hidden, hidden),
        "FFN1": (feedforward, hidden),
        "FFN2": (hidden, feedforward),
    }
    place = f"{arguments.device}, {str(dtype).removeprefix('torch.')}, {arguments.threads} thread(s)"
    with torch.no_grad():
        attended = [
            attention(length, arguments.heads, kv_heads, arguments.seconds, arguments.device, dtype)
            for kv_heads in (arguments.heads, max(1, arguments.heads // 4))
            for length in arguments.lengths
        ]
        multiplied, policies = products(shapes, arguments.seconds, arguments.device, dtype)
    record(
        "flashdecoding",
        "Decoding: attention without an exchange of maxima, and matrix products with a few rows",
        {
            f"Attention of one query, heads of 128 features, {place}": attended,
            f"Products with a few rows, {place}": multiplied,
            f"Geometric mean over weights and rows, {place}": policies,
        },
    )


if __name__ == "__main__":
    main()
