"""NaLaFormer: a pyramid of four stages for images, with norm-aware linear attention where the tokens are many.

Paper: "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137, after its code. There the
first two stages alone have linear attention, and softmax the others; so it is here by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.framed import FramedSoftmaxAttention
from postern.attention.norm_aware import NormAwareLinearAttention

_HEAD_WIDTH = 1024


@dataclass(frozen=True)
class NaLaFormerSize:
    """One number a stage, where there are four.

    Attributes:
        widths: features of a token.
        depths: blocks.
        num_heads: attention heads a block.
        feedforward_ratio: hidden width of the feed-forward blocks, as a multiple of the tokens'.
        drop_path: how often the last block is left out in training; the first never is.
        layer_scale: what the blocks' outputs are multiplied by at the start.
    """

    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    feedforward_ratio: float
    drop_path: float = 0.0
    layer_scale: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)


NALAFORMER_SIZES: Mapping[str, NaLaFormerSize] = {
    "XT": NaLaFormerSize((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 3.5, 0.1),
    "T": NaLaFormerSize((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 4.0, 0.1),
    "S": NaLaFormerSize((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 3.5, 0.15),
    "B": NaLaFormerSize((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 4.0, 0.4, (1.0, 1.0, 1e-6, 1e-6)),
    "L": NaLaFormerSize((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 3.5, 0.55, (1e-6, 1e-6, 1e-6, 1e-6)),
}
"""The paper's sizes, of 6, 16, 26, 52 and 95 million parameters with 1000 classes."""


class NaLaFormerBlock(nn.Module):
    """``x + conv(x)``, then ``x + a * attention(norm(x))``, ``x + conv(x)``, ``x + b * feedforward(norm(x))``.

    The convolutions are depth-wise, 3x3. The feed-forward block has another one, around which its hidden features pass
    as well.

    Args:
        attention: ``(tokens, grid=(height, width)) -> tokens``, of this width.
        width: features of a token.
        feedforward_dim: hidden width of the feed-forward block.
        drop_path: how often either branch is left out for an image in training, in [0, 1).
        layer_scale: what ``a`` and ``b``, which are learned for each feature, start at.
    """

    def __init__(
        self, attention: nn.Module, width: int, feedforward_dim: int, drop_path: float, layer_scale: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.first_position = _depthwise(width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = attention
        self.attention_scale = nn.Parameter(torch.full((width,), layer_scale))
        self.second_position = _depthwise(width)
        self.feedforward_norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, feedforward_dim)
        self.mix = _depthwise(feedforward_dim)
        self.contract = nn.Linear(feedforward_dim, width)
        self.feedforward_scale = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Return the image after the block."""
        grid = (x.shape[2], x.shape[3])
        x = x + self.first_position(x)
        branch = self.attention(self.attention_norm(_tokens(x)), grid=grid)
        x = x + self._dropped(_image(self.attention_scale * branch, grid))
        x = x + self.second_position(x)
        hidden = _image(F.gelu(self.expand(self.feedforward_norm(_tokens(x)))), grid)
        branch = self.contract(_tokens(hidden + self.mix(hidden)))
        output: Tensor = x + self._dropped(_image(self.feedforward_scale * branch, grid))
        return output

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class NaLaFormer(nn.Module):
    """Convolutions down to a quarter of the size, four stages of `NaLaFormerBlock` each half of the one before, a head.

    Args:
        num_classes: number of logits.
        size: one of `NALAFORMER_SIZES`, or another.
        is_linear: for each stage, whether its attention is norm-aware linear attention; softmax in the same frame
            otherwise.
        in_channels: channels of the images.

    Raises:
        ValueError: sizes below 1, heads that do not divide the widths into multiples of 4, or a drop_path outside
            [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        size: NaLaFormerSize,
        *,
        is_linear: Sequence[bool] = (True, True, False, False),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not len(is_linear) == len(size.widths) == len(size.depths) == len(size.num_heads) == len(size.layer_scale):
            raise ValueError(f"every stage has a width, a depth, heads, a scale and a kind, got {size} and {is_linear}")
        if min(num_classes, in_channels, *size.widths, *size.depths, *size.num_heads) < 1 or size.widths[0] % 2:
            raise ValueError(
                f"sizes are positive and the first width is even, got {size}, num_classes={num_classes}, "
                f"in_channels={in_channels}"
            )
        if not 0 <= size.drop_path < 1:
            raise ValueError(f"drop_path lies in [0, 1), got {size.drop_path}")
        first = size.widths[0]
        self.stem = nn.Sequential(
            *_convolved(in_channels, first // 2, 2),
            nn.GELU(),
            *_convolved(first // 2, first // 2, 1),
            nn.GELU(),
            *_convolved(first // 2, first // 2, 1),
            nn.GELU(),
            *_convolved(first // 2, first, 2),
        )
        self.stages = nn.ModuleList()
        rates = torch.linspace(0, size.drop_path, sum(size.depths), device="cpu").tolist()
        for stage, (width, depth, heads) in enumerate(zip(size.widths, size.depths, size.num_heads, strict=True)):
            kind: Any = NormAwareLinearAttention if is_linear[stage] else FramedSoftmaxAttention
            blocks: list[nn.Module] = [
                NaLaFormerBlock(
                    kind(width, heads, rotary="2d", has_lepe=True),
                    width,
                    int(size.feedforward_ratio * width),
                    rates.pop(0),
                    size.layer_scale[stage],
                )
                for _ in range(depth)
            ]
            if stage > 0:
                blocks = [*_convolved(size.widths[stage - 1], width, 2), *blocks]
            self.stages.append(nn.Sequential(*blocks))
        self.project = nn.Linear(size.widths[-1], _HEAD_WIDTH)
        self.norm = nn.BatchNorm2d(_HEAD_WIDTH)
        self.head = nn.Linear(_HEAD_WIDTH, num_classes)
        self.apply(_initialise)

    def pyramid(self, images: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch c h w"]]:
        """Return the images after each stage, at a 4th, 8th, 16th and 32nd of their size, rounded up; for dense tasks.

        Raises:
            ValueError: not a batch of images.
        """
        if images.dim() != 4:
            raise ValueError(f"images have the shape [batch, channels, height, width], got {list(images.shape)}")
        x = self.stem(images)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1024"]:
        """Return what the head sees.

        Raises:
            ValueError: see `pyramid`.
        """
        last = self.pyramid(images)[-1]
        hidden = self.norm(_image(self.project(_tokens(last)), (last.shape[2], last.shape[3])))
        mean: Tensor = F.silu(hidden).mean((2, 3))
        return mean

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits.

        Raises:
            ValueError: see `pyramid`.
        """
        logits: Tensor = self.head(self.features(images))
        return logits


def _depthwise(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1, groups=width)


def _convolved(width: int, out_width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(width, out_width, 3, stride, 1), nn.BatchNorm2d(out_width)]


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
