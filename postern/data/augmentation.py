"""Images drawn anew at each use: moved by some pixels and mirrored, as networks for small photographs are trained."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F


def shift_and_mirror(
    images: Shaped[Tensor, "batch channels height width"], margin: int, generator: torch.Generator | None = None
) -> Shaped[Tensor, "batch channels height width"]:
    """Move every image by up to ``margin`` whole pixels in both directions, and mirror half of them.

    So each is a crop of its own from itself with a margin of zeros, left and right swapped or not. All
    ``2 (2 margin + 1)^2`` outcomes are as likely.

    Args:
        images: zero is what comes into view at the edges.
        margin: in pixels; 0 to mirror alone.
        generator: on the processor, whatever the images' device; the global one if None.

    Raises:
        ValueError: a negative margin, or a tensor that is no batch of images.
    """
    if margin < 0 or images.dim() != 4:
        raise ValueError(
            "images are [batch, channels, height, width] and move by 0 pixels or more, got "
            f"shape={list(images.shape)}, margin={margin}"
        )
    count, _, height, width = images.shape
    device = images.device
    down, across = torch.randint(2 * margin + 1, (2, count, 1), generator=generator).to(device)
    is_mirrored = torch.randint(2, (count, 1), generator=generator).bool().to(device)
    columns = torch.arange(width, device=device)
    columns = torch.where(is_mirrored, columns.flip(0), columns) + across
    rows = torch.arange(height, device=device) + down
    image = torch.arange(count, device=device)[:, None, None]
    padded = F.pad(images, [margin] * 4)
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
