"""Reading a prompt with blocks of attention left out, against dense attention.

    python -m benchmarks.seer_attention [--tokens 4096 8192 16384 32768] [--densities 0.1 0.2 0.3 0.5] [--seconds S]
        [--heads H] [--head-dim D] [--threads N] [--device cuda]

Dense attention is PyTorch's fused kernel, causal, in float32, on a GPU in bfloat16. The gate's time is that of pooling,
projecting, scoring and choosing blocks; its weights are random, so that the blocks lie anywhere, and the two last rows
are dense. On a GPU PyTorch may choose another kernel than FlashAttention, which is timed beside it. Ideal is one over
the share of blocks kept. That sparse attention is right is checked before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._tables import CPU, Row, best_times, device_arguments, place, prepare, record
from postern.attention import AttnGate, block_density, block_sparse_attention, select_blocks

BLOCK = 64


def check(heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 1, heads, 1000, head_dim).to(device, dtype)
    gate = AttnGate(head_dim, heads, block=BLOCK).to(device, dtype)
    blocks = select_blocks(gate(query, key), density=0.3)
    found = block_sparse_attention(query, key, value, blocks, BLOCK)
    expected = block_sparse_attention(query, key, value, blocks, BLOCK, implementation="dense")
    closeness = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **closeness)
    everything = torch.ones_like(blocks)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(block_sparse_attention(query, key, value, everything, BLOCK), dense, **closeness)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def measure(
    tokens: int, density: float, heads: int, head_dim: int, seconds: float, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of each, and the share of blocks kept."""
    query, key, value = torch.randn(3, 1, heads, tokens, head_dim, device=device, dtype=dtype)
    gate = AttnGate(head_dim, heads, block=BLOCK).to(device, dtype)
    blocks = select_blocks(gate(query, key), density=density)
    names = {
        "attend": F.scaled_dot_product_attention,
        "flash_attention": flash_attention,
        "sparse": block_sparse_attention,
        "choose": lambda: select_blocks(gate(query, key), density=density),
        "qkv": (query, key, value),
        "blocks": blocks,
        "size": BLOCK,
    }
    statements = {
        "dense": "attend(*qkv, is_causal=True)",
        "gate": "choose()",
        "sparse": "sparse(*qkv, blocks, size)",
    } | ({"flash": "flash_attention(*qkv)"} if device.type == "cuda" else {})
    return best_times(statements, seconds, names, rounds=3, device=device) | {"density": block_density(blocks)}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each case at least")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    dtype = torch.float32 if device == CPU else torch.bfloat16
    heads, head_dim = arguments.heads, arguments.head_dim
    check(heads, head_dim, device, dtype)
    rows: list[Row] = []
    for tokens in arguments.tokens:
        for density in arguments.densities:
            found = measure(tokens, density, heads, head_dim, arguments.seconds, device, dtype)
            gated = found["gate"] + found["sparse"]
            row: Row = {
                "tokens": f"{tokens:,}",
                "density asked for": density,
                "blocks kept": found["density"],
                "dense, ms": 1e3 * found["dense"],
                "gate, ms": 1e3 * found["gate"],
                "sparse, ms": 1e3 * found["sparse"],
                "dense / (gate + sparse)": found["dense"] / gated,
                "ideal": 1 / found["density"],
            }
            if "flash" in found:
                row["FlashAttention / (gate + sparse)"] = found["flash"] / gated
            rows.append(row)
    shape = f"{heads} heads of {head_dim}, blocks of {BLOCK}, {place(device)}"
    record(
        "seer_attention",
        "Block-sparse attention with a gate (SeerAttention) against dense attention",
        {f"Times of reading a prompt, {shape}": rows},
        device,
    )


if __name__ == "__main__":
    main()
