"""Reading a prompt with blocks of attention left out, against dense attention.

    python -m benchmarks.seer_attention [--tokens 4096 8192 16384 32768] [--densities 0.1 0.2 0.3 0.5] [--seconds S]
        [--threads N]

Dense attention is PyTorch's fused kernel, causal, in float32. The gate's time is that of pooling, projecting, scoring
and choosing blocks; its weights are random, so that the blocks lie anywhere, and the two last rows are dense. Ideal is
one over the share of blocks kept. That sparse attention is right is checked before anything is timed.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from benchmarks._tables import Row, best_times, record
from postern.attention import AttnGate, block_density, block_sparse_attention, select_blocks

BLOCK = 64


def check(heads: int, head_dim: int) -> None:
    query, key, value = torch.randn(3, 1, heads, 1000, head_dim)
    blocks = select_blocks(AttnGate(head_dim, heads, block=BLOCK)(query, key), density=0.3)
    found = block_sparse_attention(query, key, value, blocks, BLOCK)
    expected = block_sparse_attention(query, key, value, blocks, BLOCK, implementation="dense")
    torch.testing.assert_close(found, expected)
    everything = torch.ones_like(blocks)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(block_sparse_attention(query, key, value, everything, BLOCK), dense)


def measure(tokens: int, density: float, heads: int, head_dim: int, seconds: float) -> dict[str, float]:
    """Seconds of each, and the share of blocks kept."""
    query, key, value = torch.randn(3, 1, heads, tokens, head_dim)
    gate = AttnGate(head_dim, heads, block=BLOCK)
    blocks = select_blocks(gate(query, key), density=density)
    names = {
        "attend": F.scaled_dot_product_attention,
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
    }
    return best_times(statements, seconds, names, rounds=3) | {"density": block_density(blocks)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each case at least")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    heads, head_dim = arguments.heads, arguments.head_dim
    check(heads, head_dim)
    rows: list[Row] = []
    for tokens in arguments.tokens:
        for density in arguments.densities:
            found = measure(tokens, density, heads, head_dim, arguments.seconds)
            rows.append(
                {
                    "tokens": f"{tokens:,}",
                    "density asked for": density,
                    "blocks kept": found["density"],
                    "dense, ms": 1e3 * found["dense"],
                    "gate, ms": 1e3 * found["gate"],
                    "sparse, ms": 1e3 * found["sparse"],
                    "dense / (gate + sparse)": found["dense"] / (found["gate"] + found["sparse"]),
                    "ideal": 1 / found["density"],
                }
            )
    shape = f"{heads} heads of {head_dim}, blocks of {BLOCK}, {arguments.threads} thread(s)"
    record(
        "seer_attention",
        "Block-sparse attention with a gate (SeerAttention) against dense attention",
        {f"Times of reading a prompt, {shape}": rows},
    )


if __name__ == "__main__":
    main()
