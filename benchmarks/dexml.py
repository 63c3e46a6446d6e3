"""Soft top-k beside the bisection of the paper's code, and streamed decoupled softmax beside the dense one.

    python -m benchmarks.dexml [--seconds S] [--threads N]

The soft top-k is measured forward, on scores of three kinds, with torch.logsumexp for comparison: the least that any
loss over all labels costs. Streaming is measured forward and backward, with the memory that it needs on top of
embeddings and their gradients. All results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._tables import Row, best_times, record
from postern.heads import decoupled_softmax_loss, soft_topk, streaming_decoupled_softmax_loss

SIZES = ((256, 4_000), (64, 131_000), (8, 1_000_000))  # queries and labels: EURLex-4K, LF-AmazonTitles-131K and -1.3M
PROBLEMS = ((256, 131_000), (256, 500_000))
DIM, BLOCK = 64, 8192
K, ALPHA = 5, 2.0
STATEMENTS = {
    "bisection": "bisected_topk(scores)",
    "postern": "soft_topk(scores, K, ALPHA)",
    "logsumexp": "torch.logsumexp(scores, 1)",
}


def bisected_topk(scores: Tensor, n_iter: int = 32) -> Tensor:
    """As the paper's code: a fixed bracket, halved 32 times, updated by masks."""
    low = -scores.max(dim=1, keepdim=True).values - 10 / ALPHA
    high = -scores.min(dim=1, keepdim=True).values + 10 / ALPHA
    for _ in range(n_iter):
        middle = (high + low) / 2
        is_low = torch.sigmoid(ALPHA * (scores + middle)).sum(dim=1) < K
        low[is_low] = middle[is_low]
        high[~is_low] = middle[~is_low]
    return torch.sigmoid(ALPHA * (scores + (low + high) / 2))


def scores_of(kind: str, queries: int, labels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(queries, labels, generator=generator)
    if kind == "fresh":  # an encoder before training: cosines spread by 0.1, over 0.05
        return 2 * noise
    scores = 4 * noise  # a trained one: a few labels stand out
    scores[:, :K] += 12
    return scores if kind == "trained" else scores.clamp(-20, 20).round()  # ties


def time_topk(seconds: float) -> list[Row]:
    rows: list[Row] = []
    for queries, labels in SIZES:
        for kind in ("fresh", "trained", "tied"):
            scores = scores_of(kind, queries, labels)
            torch.testing.assert_close(soft_topk(scores, K, ALPHA), bisected_topk(scores), rtol=0, atol=1e-3)
            names = {"torch": torch, "scores": scores, "K": K, "ALPHA": ALPHA}
            names |= {"bisected_topk": bisected_topk, "soft_topk": soft_topk}
            times = best_times(STATEMENTS, seconds, names, rounds=3)
            row: Row = {"queries": f"{queries:,}", "labels": f"{labels:,}", "scores": kind}
            rows.append(row | {name: times["bisection"] / times[name] for name in ("postern", "logsumexp")})
    return rows


def problem(queries: int, labels: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    q, l = (torch.randn(n, DIM, generator=generator) / DIM**0.25 for n in (queries, labels))
    pairs = torch.arange(queries).repeat_interleave(3), torch.randint(labels, (3 * queries,), generator=generator)
    return q.requires_grad_(), l.requires_grad_(), pairs


def dense(q: Tensor, l: Tensor, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    loss = decoupled_softmax_loss(q @ l.T, pairs)
    return (loss, *torch.autograd.grad(loss, (q, l)))


def streamed(q: Tensor, l: Tensor, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    loss = streaming_decoupled_softmax_loss(q, l, pairs, block=BLOCK)
    return (loss, *torch.autograd.grad(loss, (q, l)))


WAYS = {"dense": dense, "streamed": streamed}


def peak_mib(way: str, queries: int, labels: int) -> float:
    """Memory at most, on top of what is there before the loss, without the gradient of the embeddings; on Linux."""
    arguments = problem(queries, labels)
    WAYS[way](*problem(8, 64))  # what torch needs once
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_mib("VmRSS")
    WAYS[way](*arguments)
    return status_mib("VmHWM") - before - (queries + labels) * DIM * 4 / 2**20


def status_mib(name: str) -> float:
    """A number of /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def time_streaming(seconds: float) -> list[Row]:
    rows: list[Row] = []
    for queries, labels in PROBLEMS:
        q, l, pairs = problem(queries, labels)
        for found, expected in zip(streamed(q, l, pairs), dense(q, l, pairs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        names = {"dense": dense, "streamed": streamed, "q": q, "l": l, "pairs": pairs}
        times = best_times({way: f"{way}(q, l, pairs)" for way in WAYS}, seconds, names, rounds=3)
        row: Row = {"queries": f"{queries:,}", "labels": f"{labels:,}"}
        for way in WAYS:
            row[f"{way}, MiB"] = peak_mib(way, queries, labels)
        rows.append(row | {"streamed, times as fast": times["dense"] / times["streamed"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to time each row of a table")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tables = {
        "Soft top-k, k = 5: times as fast as the 32 bisections of the paper's code": time_topk(arguments.seconds),
        f"Decoupled softmax and its gradient, {DIM} features, blocks of {BLOCK:,} labels": time_streaming(
            arguments.seconds
        ),
    }
    record("dexml", "Soft top-k and decoupled softmax over very many labels", tables)


if __name__ == "__main__":
    main()
