"""Routers in which related tokens agree on their experts, against a plain one.

    python -m benchmarks.graph_router [--tokens 512 1024 2048 4096] [--experts 16 64] [--width D] [--heads H]
        [--seconds S] [--threads N] [--device cuda]

One sequence, causal, in float32; forward pass only. Queries and keys are given, as the attention layer before has made
them. "explicit" first puts the attention weights into memory, which fused attention with preferences as values does not
need. "experts" is the time of the experts themselves, two for each token, which no router changes. MiB are the memory
that each router takes at its peak besides its inputs: on a GPU all of it, on a processor that of the tensors that are
made, without what a kernel uses inside. That fused and explicit averages agree is checked before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.attention import attention_weights
from postern.compare.memory import TensorMemory
from postern.experts import FeedForwardExperts, RoutingContext, SoftmaxRouter, TokenGraphRouter, dispatch

TOP_K = 2


def check(width: int, heads: int, device: torch.device) -> None:
    tokens = torch.randn(2, 300, width, device=device)
    query, key = torch.randn(2, 2, heads, 300, width // heads, device=device)
    router = TokenGraphRouter(width, 16, TOP_K, "attention").to(device)
    fused = router(tokens, RoutingContext(query=query, key=key))
    explicit = router(tokens, attention=attention_weights(query, key, is_causal=True))
    torch.testing.assert_close(fused.probabilities, explicit.probabilities, rtol=1e-4, atol=1e-5)


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Memory that a call takes at its peak, besides what was there."""
    if device.type == "cpu":
        memory = TensorMemory()
        with memory:
            call()
        return memory.peak / 2**20
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(num_tokens: int, experts: int, width: int, heads: int, seconds: float, device: torch.device) -> Row:
    tokens = torch.randn(1, num_tokens, width, device=device)
    query, key = torch.randn(2, 1, heads, num_tokens, width // heads, device=device)
    context = RoutingContext(query=query, key=key)
    plain = SoftmaxRouter(width, experts, TOP_K).to(device)
    similarity = TokenGraphRouter(width, experts, TOP_K, "similarity").to(device)
    attention = TokenGraphRouter(width, experts, TOP_K, "attention").to(device)
    bank = FeedForwardExperts(experts, width, width).to(device)
    found = dispatch(plain(tokens), experts)
    rows: Tensor = tokens[0][found.order // TOP_K]
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(tokens),
        "similarity": lambda: similarity(tokens),
        "attention": lambda: attention(tokens, context),
        "explicit": lambda: attention(tokens, attention=attention_weights(query, key, is_causal=True)),
        "experts": lambda: bank(rows, found.ends),
    }
    times = best_times({name: f"{name}()" for name in calls}, seconds, calls, rounds=3, device=device)
    row: Row = {"tokens": f"{num_tokens:,}", "experts": experts}
    row |= {f"{name}, ms": 1e3 * time for name, time in times.items()}
    return row | {f"{name}, MiB": peak_mib(call, device) for name, call in calls.items() if name != "experts"}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--width", type=int, default=352)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each case at least")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    width, heads = arguments.width, arguments.heads
    check(width, heads, device)
    rows = [
        measure(tokens, experts, width, heads, arguments.seconds, device)
        for tokens in arguments.tokens
        for experts in arguments.experts
    ]
    shape = f"{width} features, {heads} heads, {TOP_K} experts a token, {place(device)}"
    record(
        "graph_router",
        "Routers over graphs of tokens against a plain router",
        {f"Times of routing one sequence, and memory at the peak, {shape}": rows},
        device,
    )


if __name__ == "__main__":
    main()
