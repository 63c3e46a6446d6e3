"""A small convolutional network in stages, for images of 8 to 32 pixels a side, trained in seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, batch normalisation and ReLU, then the mean over space, then a linear head.

    Its parts are called ``stages.0``, ``stages.1``, ... and ``head``; ``layers`` lists the stages' names, for whoever
    reads features from the middle.

    Args:
        in_channels: channels of the images, e.g. 1 for grey ones.
        num_classes: number of logits.
        widths: channels of each stage.
        strides: stride of each stage's convolution; by default 1, 2, 2, 1, 1, ...

    Raises:
        ValueError: a size below 1, no stages, or as many strides as do not match the widths.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64, 64),
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1 or not widths or min(widths) < 1:
            raise ValueError(
                "channels, classes and widths are positive, "
                f"got in_channels={in_channels}, num_classes={num_classes}, widths={list(widths)}"
            )
        if strides is None:
            strides = [2 if stage in (1, 2) else 1 for stage in range(len(widths))]
        if len(strides) != len(widths):
            raise ValueError(f"{len(widths)} stages need as many strides, got {list(strides)}")
        channels = pairwise([in_channels, *widths])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for (before, after), stride in zip(channels, strides, strict=True)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    @property
    def layers(self) -> list[str]:
        """Names of the stages, first to last."""
        return [f"stages.{index}" for index in range(len(self.stages))]

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        """Return what the head sees: the last stage's mean over space."""
        for stage in self.stages:
            images = stage(images)
        return images.mean(dim=(2, 3))

    def fold(self) -> ConvNet:
        """Put the normalisations into the convolutions before them, for inference, in place; return the network."""
        self.eval()
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            conv, norm = stage[0], stage[1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                stage[0], stage[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return self

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.head(self.features(images))
        return logits
