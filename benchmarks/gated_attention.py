"""What a gate costs: a training step of one attention layer with and without it, beside peers.

    python -m benchmarks.gated_attention [--width W] [--heads H] [--tokens T] [--batch B] [--seconds S] [--threads N]
        [--device cuda]

A step is the forward and the backward pass, to the parameters and the input. Qwen3-Next's layer has the same
elementwise gate, with its weights in the query projection, and norms and rotations as here; that both compute the same
is checked in the tests. Torch's own layer has neither gate nor norms nor rotations. On a GPU all is in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from benchmarks._tables import CPU, Row, best_times, device_arguments, place, prepare, record
from postern.attention import GatedAttention, SelfAttention

PLAIN = "no gate"


class Qwen3Next(nn.Module):
    """Transformers' layer with its rotations, on the fused kernel."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        config = Qwen3NextConfig(
            hidden_size=width,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width // heads,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
            attn_implementation="sdpa",
        )
        self.rotary = Qwen3NextRotaryEmbedding(config)
        self.attention = Qwen3NextAttention(config, 0)

    def forward(self, x: Tensor) -> Tensor:
        angles = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        output: Tensor = self.attention(x, angles, None)[0]
        return output


class Torch(nn.Module):
    """Torch's layer, causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        order = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        output: Tensor = self.attention(x, x, x, attn_mask=order, is_causal=True, need_weights=False)[0]
        return output


def step(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x.grad = None
    layer(x).sum().backward()


def milliseconds(layers: dict[str, nn.Module], x: Tensor, seconds: float, *, compiled: bool) -> Row:
    names: dict[str, object] = {"step": step, "x": x}
    for index, layer in enumerate(layers.values()):
        names[f"layer_{index}"] = torch.compile(layer) if compiled else layer
    statements = {name: f"step(layer_{index}, x)" for index, name in enumerate(layers)}
    return {name: 1e3 * best for name, best in best_times(statements, seconds, names, device=x.device).items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to time all layers, eager and compiled")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    dtype = torch.float32 if device == CPU else torch.bfloat16
    width, heads, kv_heads = arguments.width, arguments.heads, arguments.kv_heads
    layers: dict[str, nn.Module] = {PLAIN: _layer(SelfAttention, width, heads, kv_heads)}
    layers["headwise"] = _layer(GatedAttention, width, heads, kv_heads, granularity="head")
    layers["elementwise"] = _layer(GatedAttention, width, heads, kv_heads)
    layers["Qwen3-Next"] = Qwen3Next(width, heads, kv_heads)
    layers["torch, no gate"] = Torch(width, heads)
    for layer in layers.values():
        layer.to(device, dtype)
    x = torch.randn(arguments.batch, arguments.tokens, width, device=device, dtype=dtype, requires_grad=True)
    absolute: list[Row] = []
    relative: list[Row] = []
    for mode in ("eager", "compiled"):
        times = milliseconds(layers, x, arguments.seconds / 2, compiled=mode == "compiled")
        absolute.append({"mode": mode} | times)
        relative.append(
            {"mode": mode}
            | {name: float(value) / float(times[PLAIN]) for name, value in times.items() if name != PLAIN}
        )
    shape = (
        f"{arguments.batch} x {arguments.tokens} tokens of {width}, {heads} heads, {kv_heads} of keys, "
        f"{str(dtype).removeprefix('torch.')}, {place(device)}"
    )
    record(
        "gated_attention",
        "Training an attention layer: what a gate on the heads' outputs costs",
        {f"Milliseconds a step, {shape}": absolute, "Times as long as without a gate": relative},
        device,
    )


def _layer(kind: type[SelfAttention], width: int, heads: int, kv_heads: int, **options: object) -> SelfAttention:
    return kind(
        width,
        heads,
        num_kv_heads=kv_heads,
        is_causal=True,
        bias=False,
        rotary_base=10_000.0,
        has_qk_norm=True,
        **options,  # type: ignore[arg-type]
    )


if __name__ == "__main__":
    main()
