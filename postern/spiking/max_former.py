"""Max-Former: a spiking transformer with maxima in its patch embeddings and attention in the last stage alone.

Stages of a patch embedding and blocks; a block mixes positions and then channels. Spiking neurons pass low
frequencies; maxima and depth-wise convolutions are to bring high ones back.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608. An image is shown at every time
step, so its first convolution runs once. On ImageNet the code has two blocks in the second stage, as here by default,
and the text three. MS-QKFormer, the paper's baseline, is QKFormer (arXiv 2403.16552) with membrane shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from postern.spiking.attention import QKTokenAttention, SpikingSelfAttention
from postern.spiking.embeddings import (
    EmbedMax,
    EmbedMaxPlus,
    EmbedOneMax,
    EmbedOrig,
    EmbedOrigImageNet,
    EmbedOrigStrided,
    ImageEmbed,
)
from postern.spiking.mixers import DWCMixer, PoolMixer
from postern.spiking.mlp import SpikingMLP
from postern.spiking.neurons import LIF

Mixer = Literal["identity", "dwc3", "dwc5", "dwc7", "ssa", "qk", "avg", "max"]
Embedding = Callable[[int, int], nn.Module]
_MIXERS = get_args(Mixer)


class SpikingBlock(nn.Module):
    """Positions are mixed, then channels.

    Args:
        dim: channels.
        mixer: "identity"; "dwc3", "dwc5", "dwc7" for `DWCMixer`; "ssa" for `SpikingSelfAttention`; "qk" for
            `QKTokenAttention`; "avg", "max" for `PoolMixer`.
        num_heads: of attention.
        mlp_ratio: hidden channels of `SpikingMLP` as a multiple of ``dim``.

    Raises:
        ValueError: an unknown mixer, sizes below 1, or heads that do not divide the channels.
    """

    def __init__(self, dim: int, mixer: Mixer, num_heads: int = 8, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.mixer = _mixer(mixer, dim, num_heads)
        self.mlp = SpikingMLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Float[Tensor, "time batch dim height width"]) -> Float[Tensor, "time batch dim height width"]:
        """Return the membrane signal."""
        membrane: Tensor = self.mlp(self.mixer(x))
        return membrane


def _mixer(mixer: Mixer, dim: int, num_heads: int) -> nn.Module:
    if mixer not in _MIXERS:
        raise ValueError(f"a mixer is one of {', '.join(_MIXERS)}, got {mixer!r}")
    if mixer == "identity":
        return nn.Identity()
    if mixer in ("ssa", "qk"):
        return (SpikingSelfAttention if mixer == "ssa" else QKTokenAttention)(dim, num_heads)
    if mixer == "avg" or mixer == "max":
        return PoolMixer(mixer)
    return DWCMixer(dim, int(mixer.removeprefix("dwc")))


class MaxFormer(nn.Module):
    """Stages of an embedding and blocks; then the mean over space, spikes, a linear head, and the mean over time.

    Its parts are called ``embeds.0``, ``stages.0``, ..., ``neuron`` and ``head``.

    Args:
        in_channels: channels of the input.
        num_classes: number of logits.
        dims: channels of each stage.
        embeds: the embedding of each stage, ``(in_channels, dim) -> module``, such as `EmbedMax`.
        mixers: the mixer of the blocks of each stage; see `SpikingBlock`.
        depths: blocks of each stage.
        num_heads: of attention, the same in all stages.
        mlp_ratio: hidden channels as a multiple of the stage's.
        num_steps: how many time steps an image is shown; input that has time steps comes with its own.
        conv_std: standard deviation of the convolutions' initial weights, with biases of 0; torch's default if None.

    Raises:
        ValueError: no stages, or not one of everything a stage; sizes below 1; an unknown mixer.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        dims: Sequence[int],
        embeds: Sequence[Embedding],
        mixers: Sequence[Mixer],
        depths: Sequence[int],
        *,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_steps: int = 4,
        conv_std: float | None = None,
    ) -> None:
        super().__init__()
        if not dims or not len(dims) == len(embeds) == len(mixers) == len(depths):
            raise ValueError(
                "every stage has channels, an embedding, a mixer and a depth, "
                f"got {len(dims)}, {len(embeds)}, {len(mixers)} and {len(depths)}"
            )
        if min(in_channels, num_classes, num_steps, *dims, *depths) < 1:
            raise ValueError(
                f"sizes are positive, got in_channels={in_channels}, num_classes={num_classes}, "
                f"num_steps={num_steps}, dims={list(dims)}, depths={list(depths)}"
            )
        self.num_steps = num_steps
        inputs = [in_channels, *dims[:-1]]
        self.embeds = nn.ModuleList(make(before, dim) for make, before, dim in zip(embeds, inputs, dims, strict=True))
        self.stages = nn.ModuleList(
            nn.Sequential(*(SpikingBlock(dim, mixer, num_heads, mlp_ratio) for _ in range(depth)))
            for dim, mixer, depth in zip(dims, mixers, depths, strict=True)
        )
        self.neuron = LIF()
        self.head = nn.Linear(dims[-1], num_classes)
        initialise_head(self.head)
        if conv_std is not None:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.trunc_normal_(module.weight, std=conv_std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def features(
        self, x: Float[Tensor, "batch channels height width"] | Float[Tensor, "time batch channels height width"]
    ) -> list[Float[Tensor, "time batch dim rows columns"]]:
        """Return the membrane signal after each stage.

        Raises:
            ValueError: neither images nor images in time.
        """
        check_images(x)
        found: list[Tensor] = []
        for index, (embed, stage) in enumerate(zip(self.embeds, self.stages, strict=True)):
            x = stage(embed(x) if index else self._first(x))
            found.append(x)
        return found

    def _first(self, x: Tensor) -> Tensor:
        """What the first embedding gives; the convolution of a still image runs once."""
        embed = self.embeds[0]
        if x.dim() == 5:
            embedded: Tensor = embed(x)
        elif isinstance(embed, ImageEmbed):
            embedded = embed.body(repeat_steps(embed.stem(x[None]), self.num_steps))
        else:
            embedded = embed(repeat_steps(x[None], self.num_steps))
        return embedded

    def forward(
        self, x: Float[Tensor, "batch channels height width"] | Float[Tensor, "time batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits.

        Raises:
            ValueError: neither images nor images in time.
        """
        spikes = self.neuron(self.features(x)[-1].mean((3, 4)))
        logits: Tensor = self.head(spikes).mean(0)
        return logits


def max_former_cifar(num_classes: int = 10, dim: int = 384, *, in_channels: int = 3, num_steps: int = 4) -> MaxFormer:
    """For images of 32 pixels a side, 6.57 million parameters: Identity, DWC-3 and SSA; Embed-Orig, -Max and -Max.

    Args:
        num_classes: number of logits.
        dim: channels of the last stage; a multiple of 8.
        in_channels: channels of the images.
        num_steps: how often an image is shown.

    Raises:
        ValueError: impossible sizes.
    """
    return MaxFormer(
        in_channels,
        num_classes,
        (dim // 4, dim // 2, dim),
        (EmbedOrig, EmbedMax, EmbedMax),
        ("identity", "dwc3", "ssa"),
        (1, 1, 2),
        num_steps=num_steps,
    )


def max_former_imagenet(
    num_classes: int = 1000, dim: int = 768, *, depths: Sequence[int] = (1, 2, 7), num_steps: int = 4
) -> MaxFormer:
    """For images of 224 pixels a side, 63.99 million parameters with 768 channels: DWC-7, DWC-5 and SSA.

    Args:
        num_classes: number of logits.
        dim: channels of the last stage: 384, 512 or 768, a multiple of 64.
        depths: blocks of each stage; the paper's text has (1, 3, 7).
        num_steps: how often an image is shown.

    Raises:
        ValueError: impossible sizes.
    """
    return MaxFormer(
        3,
        num_classes,
        (dim // 4, dim // 2, dim),
        (EmbedOrigImageNet, EmbedMax, EmbedMax),
        ("dwc7", "dwc5", "ssa"),
        depths,
        num_heads=dim // 64,
        num_steps=num_steps,
        conv_std=0.02,
    )


def max_former_events(num_classes: int = 10, dim: int = 256, *, mlp_ratio: float = 4.0) -> MaxFormer:
    """For events of 128 pixels a side in time steps, [time, batch, 2, 128, 128]: DWC-3 and SSA, two stages.

    Args:
        num_classes: number of logits.
        dim: channels of the last stage; a multiple of 16.
        mlp_ratio: hidden channels as a multiple of the stage's.

    Raises:
        ValueError: impossible sizes.
    """
    return MaxFormer(
        2,
        num_classes,
        (dim // 2, dim),
        (EmbedMaxPlus, EmbedMax),
        ("dwc3", "ssa"),
        (1, 1),
        num_heads=16,
        mlp_ratio=mlp_ratio,
        num_steps=16,
    )


def ms_qkformer_cifar(num_classes: int = 10, dim: int = 384, *, in_channels: int = 3, num_steps: int = 4) -> MaxFormer:
    """MS-QKFormer for images of 32 pixels a side: QK attention, then SSA; one maximum in each later embedding.

    Args:
        num_classes: number of logits.
        dim: channels of the last stage; a multiple of 32.
        in_channels: channels of the images.
        num_steps: how often an image is shown.

    Raises:
        ValueError: impossible sizes.
    """
    return MaxFormer(
        in_channels,
        num_classes,
        (dim // 4, dim // 2, dim),
        (EmbedOrig, EmbedOneMax, EmbedOneMax),
        ("qk", "qk", "ssa"),
        (1, 1, 2),
        num_steps=num_steps,
    )


STRIDED = (EmbedOrig, EmbedOrigStrided, EmbedOrigStrided)
"""Embed-Orig in three stages: no maximum anywhere, for the comparison of mixers."""


def repeat_steps(x: Float[Tensor, "1 ..."], num_steps: int) -> Float[Tensor, "time ..."]:
    """The same at every time step."""
    return x.expand(num_steps, *x.shape[1:])


def check_images(x: Tensor) -> None:
    """Raise ValueError unless ``x`` has the shape of images, with or without time steps."""
    if x.dim() not in (4, 5):
        raise ValueError(
            "images have the shape [batch, channels, height, width], or [time, batch, channels, height, width]; "
            f"got {list(x.shape)}"
        )


def initialise_head(head: nn.Linear) -> None:
    """Truncated normal weights of standard deviation 0.02, biases of 0."""
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
