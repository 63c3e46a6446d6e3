"""A layer of linear attention against softmax, forward and backward, by length: time and memory.

    python -m benchmarks.linear_attention [--lengths 256 1024 4096 8192] [--causal] [--seconds S] [--threads N]
        [--device cuda]

All layers are in the same frame, with its norm and gate, so that they differ in the attention alone. Softmax runs on
torch's fused kernel. Memory is that of the tensors of a forward and backward pass at their height.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.attention import FramedLinearAttention, FramedSoftmaxAttention, NormAwareLinearAttention, relu_features
from postern.compare.memory import TensorMemory


def layers(width: int, num_heads: int, *, is_causal: bool) -> Mapping[str, nn.Module]:
    kinds: Mapping[str, Any] = {
        "softmax": FramedSoftmaxAttention,
        "linear, elu + 1": FramedLinearAttention,
        "linear, ReLU": partial(FramedLinearAttention, query_features=relu_features),
        "norm-aware": NormAwareLinearAttention,
        "norm-aware, soft": partial(NormAwareLinearAttention, phase="soft"),
    }
    return {name: kind(width, num_heads, is_causal=is_causal) for name, kind in kinds.items()}


def step(layer: nn.Module, x: Tensor) -> None:
    torch.autograd.backward([layer(x).square().mean()])


def peak_bytes(layer: nn.Module, x: Tensor) -> int:
    memory = TensorMemory()
    with memory:
        step(layer, x)
    return memory.peak


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--causal", action="store_true", help="a token sees earlier ones only")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to time each length at least")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    rivals = layers(arguments.width, arguments.heads, is_causal=arguments.causal)
    for layer in rivals.values():
        layer.to(device)
    times: list[Row] = []
    memory: list[Row] = []
    for length in arguments.lengths:
        x = torch.randn(1, length, arguments.width, device=device, requires_grad=True)
        names: dict[str, object] = {"step": step, "x": x, "rivals": rivals}
        seconds = best_times(
            {name: f"step(rivals[{name!r}], x)" for name in rivals}, arguments.seconds, names, rounds=3, device=device
        )
        first: Row = {"tokens": f"{length:,}"}
        times.append(first | {name: 1e3 * value for name, value in seconds.items()})
        memory.append(first | {name: peak_bytes(layer, x) / 2**20 for name, layer in rivals.items()})
    order = "causal" if arguments.causal else "bidirectional"
    shape = f"{arguments.heads} heads, {arguments.width} wide, {order}, {place(device)}"
    record(
        "linear_attention",
        "A layer of linear attention against softmax, forward and backward",
        {f"Milliseconds, {shape}": times, f"MiB, {shape}": memory},
        device,
    )


if __name__ == "__main__":
    main()
