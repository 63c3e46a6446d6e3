"""How fast each head of a layer forgets: geometric slopes as in ALiBi, or the linear ones of TransNormerLLM's text.

Papers: "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation", arXiv 2108.12409;
"Scaling TransNormer to 175 Billion Parameters", arXiv 2307.14995.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

DecayKind = Literal["alibi", "paper"]


def decay_slopes(
    num_heads: int,
    layer: int = 0,
    num_layers: int = 1,
    kind: DecayKind = "alibi",
    *,
    device: torch.device | None = None,
) -> Float[Tensor, " heads"]:
    """Slopes of the decay ``exp(-slope * distance)``, by head, in float32. Upper layers forget more slowly.

    =========== ======================================================= =============================
    kind        slope of head h = 0 .. H-1 in layer l = 0 .. L-1        the last layer
    =========== ======================================================= =============================
    ``"alibi"`` ``2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)``         hardly forgets
    ``"paper"`` ``8 h / H (1 - (l + 1) / L)``                           does not forget
    =========== ======================================================= =============================

    "alibi" is what the released models use; where H is no power of 2 it takes the slopes of the next lower power, and
    every second one of the next higher power. In "paper" the first head of each layer does not forget.

    Args:
        num_heads: H.
        layer: l.
        num_layers: L; a single layer has "alibi" slopes as they are.
        kind: which of the two.
        device: where to make them.

    Raises:
        ValueError: no heads, a layer outside the model, or an unknown kind.
    """
    if num_heads < 1 or not 0 <= layer < num_layers:
        raise ValueError(f"needs heads, and a layer below num_layers, got {num_heads}, {layer} and {num_layers}")
    if kind == "alibi":
        share = 1 - layer / max(1, num_layers - 1) + 1e-5
        slopes = [share * slope for slope in _alibi(num_heads)]
    elif kind == "paper":
        slopes = [8 * head / num_heads * (1 - (layer + 1) / num_layers) for head in range(num_heads)]
    else:
        raise ValueError(f"kind is 'alibi' or 'paper', got {kind!r}")
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _alibi(num_heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * (num_heads - power), 2)]
