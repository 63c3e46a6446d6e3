"""Residual networks for images of 32 pixels a side: a 3x3 stem without pooling, then four stages of basic blocks.

Paper: Deep Residual Learning for Image Recognition (arXiv 1512.03385), in the variant that papers on CIFAR use: the
ImageNet widths 64, 128, 256, 512, with a stem that keeps the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """``relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut, which is a 1x1 convolution where shapes differ.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, images: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out rows columns"]:
        """Return the block's output."""
        return torch.relu(self.shortcut(images) + self.residual(images))


class ResNet(nn.Module):
    """Stem, stages of basic blocks, mean over space, linear head.

    Its parts are called ``stem``, ``stages.0`` .. ``stages.3`` and ``head``; ``layers`` lists the first five.

    Args:
        blocks: number of blocks of each stage; each stage but the first halves the resolution.
        in_channels: channels of the images.
        num_classes: number of logits.
        width: channels of the first stage, doubled by each further one.

    Raises:
        ValueError: a size below 1 or no stages.
    """

    def __init__(
        self, blocks: Sequence[int] = (3, 4, 6, 3), in_channels: int = 3, num_classes: int = 10, width: int = 64
    ) -> None:
        super().__init__()
        if not blocks or min(*blocks, in_channels, num_classes, width) < 1:
            raise ValueError(
                "sizes are positive, "
                f"got blocks={list(blocks)}, in_channels={in_channels}, num_classes={num_classes}, width={width}"
            )
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        channels = width
        for index, depth in enumerate(blocks):
            after = width * 2**index
            stage = [BasicBlock(channels, after, 1 if index == 0 else 2)]
            stage += [BasicBlock(after, after) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*stage))
            channels = after
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def layers(self) -> list[str]:
        """Names of the stem and the stages, first to last."""
        return ["stem", *(f"stages.{index}" for index in range(len(self.stages)))]

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        """Return what the head sees: the last stage's mean over space."""
        images = self.stem(images)
        for stage in self.stages:
            images = stage(images)
        return images.mean(dim=(2, 3))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.head(self.features(images))
        return logits


def resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-18 for small images: 2, 2, 2, 2 blocks, 11.2 million parameters."""
    return ResNet((2, 2, 2, 2), in_channels, num_classes)


def resnet34(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-34 for small images: 3, 4, 6, 3 blocks, 21.3 million parameters."""
    return ResNet((3, 4, 6, 3), in_channels, num_classes)
