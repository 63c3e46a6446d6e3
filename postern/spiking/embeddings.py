"""Patch embeddings of spiking transformers, with and without the maximum that keeps high frequencies.

All pass *membrane* signals on, real numbers after batch normalisation; a neuron in front turns them into spikes, and
the shortcut around what follows starts from the same spikes.

==================  =====================  =============================================  ===========================
class               in front               main path                                      shortcut
==================  =====================  =============================================  ===========================
EmbedOrig           Conv3 to D/2           Embed3 to D                                    Conv1
EmbedOrigImageNet   Conv3, stride 2, D/2   Embed3, stride 2, to D; Embed3                 Conv1, stride 2
EmbedOrigStrided                           Embed3 to D; Embed3, stride 2                  Conv1, stride 2
EmbedMax                                   MaxEmbed3 to D; Embed3                         Conv1 and maximum
EmbedMaxFirst       Conv3 to D/2           MaxEmbed3 to D; Embed3                         Conv1 and maximum
EmbedOneMax                                Embed3 to D; MaxEmbed3                         Conv1, stride 2
EmbedMaxPlus        Conv3 to D/8,          MaxEmbed3 to D/2; MaxEmbed3 to D               Conv1, stride 4
                    MaxEmbed3 to D/4
==================  =====================  =============================================  ===========================

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608, after its code: the text has no
maximum in the shortcut of EmbedMax. EmbedOneMax is that of QKFormer (arXiv 2403.16552).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from postern.spiking.neurons import LIF
from postern.spiking.time_steps import ConvNorm


class Embed(nn.Module):
    """Neuron, convolution, batch normalisation.

    Args:
        in_channels: channels of the input.
        out_channels: of the output.
        kernel_size: odd.
        stride: of the convolution.
        takes_spikes: whether the input is spikes already, so that there is no neuron.
        has_max_pool: whether a 3x3 maximum with stride 2 follows; see `MaxEmbed`.

    Raises:
        ValueError: sizes that are no sizes of a convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        takes_spikes: bool = False,
        has_max_pool: bool = False,
    ) -> None:
        super().__init__()
        self.neuron: nn.Module = nn.Identity() if takes_spikes else LIF()
        self.projection = ConvNorm(in_channels, out_channels, kernel_size, stride, has_max_pool=has_max_pool)

    def forward(self, x: Float[Tensor, "time batch in height width"]) -> Float[Tensor, "time batch out rows columns"]:
        """Return the membrane signal."""
        membrane: Tensor = self.projection(self.neuron(x))
        return membrane


class MaxEmbed(Embed):
    """Neuron, convolution, batch normalisation, 3x3 maximum with stride 2.

    Args:
        in_channels: channels of the input.
        out_channels: of the output.
        kernel_size: odd.
        takes_spikes: whether the input is spikes already.

    Raises:
        ValueError: sizes that are no sizes of a convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, takes_spikes: bool = False
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, takes_spikes=takes_spikes, has_max_pool=True)


class _TwoPaths(nn.Module):
    """``main(s) + shortcut(s)`` with ``s`` the spikes of one neuron."""

    def __init__(self, main: Sequence[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.neuron = LIF()
        self.main = nn.Sequential(*main)
        self.shortcut = shortcut

    def forward(self, x: Float[Tensor, "time batch in height width"]) -> Float[Tensor, "time batch out rows columns"]:
        """Return the membrane signal."""
        spikes = self.neuron(x)
        membrane: Tensor = self.main(spikes) + self.shortcut(spikes)
        return membrane


class ImageEmbed(nn.Module):
    """A convolution of the image, then an embedding of what it gives.

    ``stem`` has no memory: for an image that is shown at every step, it is enough to apply it once.
    """

    def __init__(self, stem: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.body = body

    def forward(self, x: Float[Tensor, "time batch in height width"]) -> Float[Tensor, "time batch out rows columns"]:
        """Return the membrane signal."""
        membrane: Tensor = self.body(self.stem(x))
        return membrane


class EmbedOrig(ImageEmbed):
    """First embedding for small images: keeps the resolution.

    Args:
        in_channels: channels of the image.
        dim: of the output; even.

    Raises:
        ValueError: an odd dim, or sizes below 1.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        half = _divided(dim, 2)
        main, shortcut = Embed(half, dim, takes_spikes=True), Embed(half, dim, 1, takes_spikes=True)
        super().__init__(ConvNorm(in_channels, half, 3), _TwoPaths([main], shortcut))


class EmbedOrigImageNet(ImageEmbed):
    """First embedding for large images: a quarter of the resolution.

    Args:
        in_channels: channels of the image.
        dim: of the output; even.

    Raises:
        ValueError: an odd dim, or sizes below 1.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        half = _divided(dim, 2)
        main = [Embed(half, dim, stride=2, takes_spikes=True), Embed(dim, dim)]
        shortcut = Embed(half, dim, 1, stride=2, takes_spikes=True)
        super().__init__(ConvNorm(in_channels, half, 3, stride=2), _TwoPaths(main, shortcut))


class EmbedMaxPlus(ImageEmbed):
    """First embedding for events: three maxima, an eighth of the resolution.

    Args:
        in_channels: channels of the events, two for both polarities.
        dim: of the output; a multiple of 8.

    Raises:
        ValueError: another dim, or sizes below 1.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        eighth = _divided(dim, 8)
        paths = _TwoPaths(
            [MaxEmbed(2 * eighth, 4 * eighth, takes_spikes=True), MaxEmbed(4 * eighth, dim)],
            Embed(2 * eighth, dim, 1, stride=4, takes_spikes=True),
        )
        body = nn.Sequential(MaxEmbed(eighth, 2 * eighth), paths)
        super().__init__(ConvNorm(in_channels, eighth, 3), body)


class EmbedOrigStrided(_TwoPaths):
    """Later embedding without a maximum: a stride halves the resolution.

    Args:
        in_channels: channels of the input.
        dim: of the output.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__(
            [Embed(in_channels, dim, takes_spikes=True), Embed(dim, dim, stride=2)],
            Embed(in_channels, dim, 1, stride=2, takes_spikes=True),
        )


class EmbedMax(_TwoPaths):
    """Later embedding with a maximum in both paths, which halves the resolution.

    Args:
        in_channels: channels of the input.
        dim: of the output.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__(
            [MaxEmbed(in_channels, dim, takes_spikes=True), Embed(dim, dim)],
            MaxEmbed(in_channels, dim, 1, takes_spikes=True),
        )


class EmbedMaxFirst(ImageEmbed):
    """First embedding for small images with the maxima of `EmbedMax`, which halve the resolution.

    The paper has found it harmful, and its code is without it: that it follows the convolution of `EmbedOrig` is our
    reading.

    Args:
        in_channels: channels of the image.
        dim: of the output; even.

    Raises:
        ValueError: an odd dim, or sizes below 1.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        half = _divided(dim, 2)
        super().__init__(ConvNorm(in_channels, half, 3), EmbedMax(half, dim))


class EmbedOneMax(_TwoPaths):
    """Later embedding of QKFormer: a maximum in the main path alone.

    Args:
        in_channels: channels of the input.
        dim: of the output.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__(
            [Embed(in_channels, dim, takes_spikes=True), MaxEmbed(dim, dim)],
            Embed(in_channels, dim, 1, stride=2, takes_spikes=True),
        )


def _divided(dim: int, by: int) -> int:
    if dim < by or dim % by:
        raise ValueError(f"dim is a multiple of {by}, got {dim}")
    return dim // by
