"""The convolutional network under the heads that "CNN-SVM" compares (arXiv 1712.03541)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AgarapCNN(nn.Module):
    """Two stages of convolution, ReLU and 2x2 max pooling, then a dense layer with ReLU and dropout; no head.

    Initialised as in the paper's code by `initialize_truncated`.

    Args:
        in_channels: channels of the images.
        image_shape: height and width of the images.
        channels: channels of the two stages.
        kernel_size: side of the convolutions, odd; the padding keeps the size.
        hidden_dim: width of the vectors that a head gets.
        dropout: share of them that training drops.

    Raises:
        ValueError: sizes that are not positive, an even kernel, or a share outside [0, 1).
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_shape: tuple[int, int] = (28, 28),
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 5,
        hidden_dim: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        sizes = (in_channels, *image_shape, *channels, kernel_size, hidden_dim)
        if min(sizes) < 1 or len(channels) != 2 or kernel_size % 2 == 0:
            raise ValueError(
                "sizes are positive, there are two stages and the kernel is odd; got "
                f"in_channels={in_channels}, image_shape={image_shape}, channels={tuple(channels)}, "
                f"kernel_size={kernel_size}, hidden_dim={hidden_dim}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a share in [0, 1), got {dropout}")
        stages: list[nn.Module] = []
        for before, after in ((in_channels, channels[0]), (channels[0], channels[1])):
            stages += [
                nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        height, width = (-(-side // 4) for side in image_shape)
        self.stages = nn.Sequential(*stages)
        self.hidden = nn.Linear(channels[1] * height * width, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        initialize_truncated(self)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch hidden_dim"]:
        """Return the hidden vectors."""
        hidden: Tensor = self.dropout(self.hidden(self.stages(images).flatten(1)).relu())
        return hidden


def initialize_truncated(module: nn.Module, std: float = 0.1, bias: float = 0.1) -> None:
    """Draw weights from a normal distribution cut at two standard deviations, and set biases to a constant.

    Args:
        module: whose convolutions and linear layers to initialise, in place.
        std: standard deviation before the cut.
        bias: the biases' value.
    """
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, bias)
