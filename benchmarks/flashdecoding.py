"""Decoding: attention of one query over a long cache, and matrix products with a few rows.

    python -m benchmarks.flashdecoding [--lengths 1024 4096 16384 32768] [--hidden 4096] [--seconds S] [--threads N]
        [--device cuda]

Attention is timed in its unified form (one constant for all maxima) against the synchronised form of the same kernel
and PyTorch's fused one; products in the flat form against PyTorch's, and the choice by a table that is tuned in
the same run against each kernel alone. On a GPU both are Triton kernels in float16; every call is replayed from a CUDA
graph, as in serving, and goes through copies of the cache or the weights that do not fit into the GPU's own cache.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._tables import CPU, Row, best_times, device_arguments, place, prepare, record
from postern.attention import (
    GemmDispatcher,
    UnifiedMax,
    decode_attention,
    flat_linear,
    pack_weight,
    unified_decode_attention,
)
from postern.attention.gemm_dispatch import KERNELS, ROWS, copies_of, gemm_calls
from postern.timing import copies_beyond_cache, replayed


def attention(length: int, heads: int, kv_heads: int, seconds: float, device: torch.device, dtype: torch.dtype) -> Row:
    query = torch.randn(1, heads, 1, 128).to(device, dtype)
    key, value = (torch.randn(1, kv_heads, length, 128).to(device, dtype) for _ in range(2))
    unified = UnifiedMax(2.0)
    found, recomputed = unified_decode_attention(query, key, value, unified)
    assert not recomputed.any()
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(query, key, value, enable_gqa=True), rtol=1e-2, atol=2e-3
    )
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "unified": partial(decode_attention, query, unified=unified),
        "synchronised": partial(decode_attention, query),
        "unified_in_torch": partial(decode_attention, query, unified=unified, backend="torch"),
        "sdpa": partial(F.scaled_dot_product_attention, query, enable_gqa=True),
    }
    num_bytes = key.nbytes + value.nbytes
    count = copies_beyond_cache(num_bytes, device)
    caches = [(key, value), *((key.clone(), value.clone()) for _ in range(count - 1))]
    timed = {
        # in tensor operations the unified form asks whether a row is to be computed again
        name: replayed([partial(call, *cache) for cache in caches], device, is_recorded=name != "unified_in_torch")
        for name, call in calls.items()
    }
    times = {
        name: found / count
        for name, found in best_times({name: f"{name}()" for name in timed}, seconds, timed, device=device).items()
    }
    return {
        "keys": f"{length:,}",
        "heads": f"{heads} on {kv_heads}",
        "unified, ms": 1e3 * times["unified"],
        "GB/s": num_bytes / times["unified"] / 1e9,
        "against synchronised": times["synchronised"] / times["unified"],
        "against tensor operations": times["unified_in_torch"] / times["unified"],
        "against SDPA": times["sdpa"] / times["unified"],
    }


def products(
    shapes: dict[str, tuple[int, int]], seconds: float, device: torch.device, dtype: torch.dtype
) -> tuple[list[Row], list[Row]]:
    table: list[Row] = []
    measured = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape).to(device, dtype)
        packed = pack_weight(weight) if device == CPU else None
        weights = copies_of(weight)
        measured[shape] = {}
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).to(device, dtype)
            found, expected = flat_linear(x, weight, packed=packed), F.linear(x, weight)
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * shape[1] ** 0.5)
            calls: dict[str, Callable[[], None]] = {**gemm_calls(x, weights, packed)}
            calls["padded"] = gemm_calls(F.pad(x, (0, 0, 0, 64 - rows)), weights, packed)["vendor"]
            times = {
                name: timed / len(weights)
                for name, timed in best_times(
                    {name: f"{name}()" for name in calls}, seconds, calls, device=device
                ).items()
            }
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16_384, 32_768])
    parser.add_argument("--hidden", type=int, default=4096, help="width of the model, in Llama's proportions")
    parser.add_argument("--heads", type=int, default=32, help="of 128 features each")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each line of a table at least")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    dtype = torch.float32 if device == CPU else torch.float16
    hidden, feedforward = arguments.hidden, arguments.hidden * 43 // 16
    shapes = {
        "QKV": (3 * hidden, hidden),
        "O": (hidden, hidden),
        "FFN1": (feedforward, hidden),
        "FFN2": (hidden, feedforward),
    }
    where = f"{str(dtype).removeprefix('torch.')}, {place(device)}"
    with torch.no_grad():
        attended = [
            attention(length, arguments.heads, kv_heads, arguments.seconds, device, dtype)
            for kv_heads in (arguments.heads, max(1, arguments.heads // 4))
            for length in arguments.lengths
        ]
        multiplied, policies = products(shapes, arguments.seconds, device, dtype)
    record(
        "flashdecoding",
        "Decoding: attention without an exchange of maxima, and matrix products with a few rows",
        {
            f"Attention of one query, heads of 128 features, {where}": attended,
            f"Products with a few rows, {where}": multiplied,
            f"Geometric mean over weights and rows, {where}": policies,
        },
        device,
    )


if __name__ == "__main__":
    main()
