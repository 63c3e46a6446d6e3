"""Attention whose sums fade, in time linear in the length, against PyTorch's fused softmax attention.

    python -m benchmarks.lightning_attention [--lengths 1024 ... 65536] [--seconds S] [--threads N] [--device cuda]

The first tables time the attention alone: queries, keys and values of one text, causal, forwards and forwards with
backwards, in microseconds a token; softmax is left out where it would take longer than ``--longest`` seconds. Equal
numbers of heads and features, but softmax makes other weights: this is what the parts cost, not what they are worth.
Before anything is timed, the forms are compared with the matrix of all pairs. The last table decodes one token in a
whole layer, after more and more others, whose keys and values softmax keeps in room made beforehand.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.attention import (
    GatedLinearAttention,
    LightningForm,
    SelfAttention,
    attend,
    decay_slopes,
    lightning_attention,
)
from postern.errors import Unavailable

SOFTMAX = "softmax (SDPA)"


def inputs(heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries, keys and values as a layer makes them: heads side by side."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, heads, head_dim)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_() for x in tensors]


def available(device: torch.device) -> list[LightningForm]:
    """The linear forms that run on this device."""
    forms: list[LightningForm] = ["chunk"]
    if device.type == "cuda":
        try:
            query, key, value = inputs(1, 16, 16, torch.bfloat16, device)
            lightning_attention(query, key, value, implementation="triton")
            forms.append("triton")
        except Unavailable as error:
            print(f"without the kernels: {error}")
    return forms


def check(forms: list[LightningForm], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    slopes = decay_slopes(heads, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs(heads, 600, head_dim, dtype, device)]

    def evaluate(tensors: list[Tensor], form: LightningForm) -> list[Tensor]:
        query, key, value = tensors
        output, _ = lightning_attention(query, key, value, slopes, implementation=form)
        return [output.detach(), *torch.autograd.grad((output * value.detach().cos()).sum(), tensors)]

    expected = evaluate(exact, "naive")
    for form in forms:
        for found, right in zip(evaluate(inputs(heads, 600, head_dim, dtype, device), form), expected, strict=True):
            error = float((found.double() - right).norm() / right.norm())
            assert error < 20 * torch.finfo(dtype).eps, f"{form} is off by {error:.2g}"


class Attention:
    """The calls that are timed, on one text."""

    def __init__(self, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = inputs(heads, length, head_dim, dtype, device)
        self.slopes = decay_slopes(heads, layer=1, num_layers=4, device=device)

    def output(self, name: str) -> Tensor:
        query, key, value = self.tensors
        if name == SOFTMAX:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        form: LightningForm = "triton" if name == "triton" else "chunk"
        return lightning_attention(query, key, value, self.slopes, implementation=form)[0]

    def forward(self, name: str) -> None:
        with torch.no_grad():
            self.output(name)

    def both(self, name: str) -> None:
        torch.autograd.grad(self.output(name).sum(), self.tensors)


def crossover(lengths: list[int], ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """The first of the lengths at which ours takes less time."""
    faster = [length for length in lengths if length in theirs and ours[length] < theirs[length]]
    return f"{faster[0]:,}" if faster else f"beyond {max(theirs):,}"


def time_attention(
    arguments: argparse.Namespace, forms: list[LightningForm], dtype: torch.dtype, device: torch.device
) -> dict[str, list[Row]]:
    tables: dict[str, list[Row]] = {}
    crossings: list[Row] = []
    for title, method in (("forwards", "forward"), ("forwards and backwards", "both")):
        rows: list[Row] = []
        times: dict[str, dict[int, float]] = {name: {} for name in (*forms, SOFTMAX)}
        expected = 0.0  # of softmax, which grows with the square of the length
        for length in arguments.lengths:
            attention = Attention(arguments.heads, length, arguments.head_dim, dtype, device)
            names = [*forms, SOFTMAX] if expected < arguments.longest else list(forms)
            statements = {name: f"attention.{method}({name!r})" for name in names}
            timed = best_times(statements, arguments.seconds, {"attention": attention}, rounds=2, device=device)
            for name, seconds in timed.items():
                times[name][length] = seconds
            expected = 4 * timed.get(SOFTMAX, expected)
            row: Row = {"tokens": f"{length:,}"}
            for name in (*forms, SOFTMAX):
                row[name] = 1e6 * timed[name] / length if name in timed else "-"
            rows.append(row)
        tables[f"Attention alone, {title}: microseconds a token"] = rows
        crossings.append(
            {"": title} | {form: crossover(arguments.lengths, times[form], times[SOFTMAX]) for form in forms}
        )
    tables["Tokens from which on it is faster than softmax, of the lengths above"] = crossings
    return tables


class Decoder:
    """A layer each, that decodes one token after a number of others."""

    def __init__(self, width: int, heads: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.linear = GatedLinearAttention(width, heads, layer=1, num_layers=4).to(device, dtype)
        self.softmax = SelfAttention(width, heads, is_causal=True, bias=False, rotary_base=10_000.0).to(device, dtype)
        x = torch.randn(1, length, width, device=device, dtype=dtype)
        self.token, self.length = x[:, -1:], length
        self.cache = self.linear.new_cache()
        with torch.no_grad():
            self.linear(x, cache=self.cache)
            _, self.keys, self.values = (y.contiguous() for y in self.softmax.project(x))

    @torch.no_grad()
    def step(self, name: str) -> None:
        if name == SOFTMAX:
            query, key, value = self.softmax.project(self.token, self.length - 1)
            self.keys[:, :, -1:], self.values[:, :, -1:] = key, value
            self.softmax.output(attend(query, self.keys, self.values).transpose(1, 2).flatten(2))
        else:
            self.linear(self.token, cache=self.cache)


def time_decoding(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[Row]:
    rows: list[Row] = []
    names = ("gated linear", SOFTMAX)
    for length in arguments.lengths:
        decoder = Decoder(arguments.heads * arguments.head_dim, arguments.heads, length, dtype, device)
        statements = {name: f"decoder.step({name!r})" for name in names}
        timed = best_times(statements, arguments.seconds / 4, {"decoder": decoder}, rounds=20, device=device)
        rows.append({"after tokens": f"{length:,}"} | {name: 1e6 * timed[name] for name in names})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**power for power in range(8, 17)])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each row at least")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds that a call of softmax may take")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.lengths.sort()
    device = prepare(arguments)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    forms = available(device)
    check(forms, arguments.heads, arguments.head_dim, dtype, device)
    tables = time_attention(arguments, forms, dtype, device)
    tables["Decoding with a whole layer: microseconds a token"] = time_decoding(arguments, dtype, device)
    shape = f"{arguments.heads} heads of {arguments.head_dim}, {str(dtype).removeprefix('torch.')}, {place(device)}"
    record(
        "lightning_attention",
        f"Lightning Attention against fused softmax attention: {shape}",
        tables,
        device,
    )


if __name__ == "__main__":
    main()
