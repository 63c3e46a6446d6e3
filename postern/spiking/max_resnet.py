"""Max-ResNet: a spiking residual network with a maximum where each later stage begins.

Blocks add membrane signals, ``x + BN(conv(LIF(BN(conv(LIF(x))))))``. Where the resolution halves, MS-ResNet has a
stride; Max-ResNet a convolution without, and a 3x3 maximum with stride 2 after its normalisation.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608; MS-ResNet is that of arXiv
2112.08954. As in the code, the convolution in a shortcut sees the membrane signal, not spikes.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from postern.spiking.max_former import check_images, repeat_steps
from postern.spiking.neurons import LIF
from postern.spiking.time_steps import ConvNorm


class MembraneBlock(nn.Module):
    """``shortcut(x) + BN(conv(LIF(pool(BN(conv(LIF(x)))))))``.

    Args:
        in_channels: channels of the input.
        out_channels: of the output.
        stride: 2 halves the resolution.
        has_max_pool: whether a maximum halves it instead of the first convolution's stride.

    Raises:
        ValueError: sizes below 1, or a maximum without a stride of 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, has_max_pool: bool = False) -> None:
        super().__init__()
        if has_max_pool and stride != 2:
            raise ValueError(f"the maximum has a stride of 2, got stride={stride}")
        first = ConvNorm(in_channels, out_channels, 3, 1 if has_max_pool else stride, has_max_pool=has_max_pool)
        self.residual = nn.Sequential(LIF(), first, LIF(), ConvNorm(out_channels, out_channels, 3))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride)

    def forward(self, x: Float[Tensor, "time batch in height width"]) -> Float[Tensor, "time batch out rows columns"]:
        """Return the membrane signal."""
        membrane: Tensor = self.shortcut(x) + self.residual(x)
        return membrane


class MaxResNet(nn.Module):
    """Stem, stages of `MembraneBlock`, spikes, the mean over space, a linear head, the mean over time.

    Its parts are called ``stem``, ``stages.0``, ..., ``neuron`` and ``head``. The default is the paper's Max-ResNet-18.

    Args:
        layers: blocks of each stage; each stage but the first halves the resolution.
        widths: channels of each stage.
        num_steps: how many time steps an image is shown; input that has time steps comes with its own.
        in_channels: channels of the input.
        num_classes: number of logits.
        stem_width: channels of the first convolution; half of the first stage's by default.
        has_max_blocks: whether maxima halve the resolution; strides otherwise, which makes it MS-ResNet.

    Raises:
        ValueError: no stages, not one width a stage, or sizes below 1.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 3, 2),
        widths: Sequence[int] = (128, 256, 512),
        num_steps: int = 4,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        stem_width: int | None = None,
        has_max_blocks: bool = True,
    ) -> None:
        super().__init__()
        if not layers or len(layers) != len(widths):
            raise ValueError(f"every stage has a depth and a width, got {list(layers)} and {list(widths)}")
        stem_width = max(1, widths[0] // 2) if stem_width is None else stem_width
        if min(*layers, *widths, num_steps, in_channels, num_classes, stem_width) < 1:
            raise ValueError(
                f"sizes are positive, got layers={list(layers)}, widths={list(widths)}, num_steps={num_steps}, "
                f"in_channels={in_channels}, num_classes={num_classes}, stem_width={stem_width}"
            )
        self.num_steps = num_steps
        self.stem = ConvNorm(in_channels, stem_width, 3)
        self.stages = nn.ModuleList()
        before = stem_width
        for stage, (depth, width) in enumerate(zip(layers, widths, strict=True)):
            is_later = stage > 0
            first = MembraneBlock(before, width, 1 + is_later, has_max_pool=is_later and has_max_blocks)
            self.stages.append(nn.Sequential(first, *(MembraneBlock(width, width) for _ in range(depth - 1))))
            before = width
        self.neuron = LIF()
        self.head = nn.Linear(before, num_classes)

    def forward(
        self, x: Float[Tensor, "batch channels height width"] | Float[Tensor, "time batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits.

        Raises:
            ValueError: neither images nor images in time.
        """
        check_images(x)
        x = self.stem(x) if x.dim() == 5 else repeat_steps(self.stem(x[None]), self.num_steps)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.neuron(x).mean((3, 4))).mean(0)
        return logits
