"""Static pruning, the measure of every dynamic method: the filters with the smallest weights are cut off for good.

Paper: Pruning Filters for Efficient ConvNets (arXiv 1608.08710).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from postern.nets import ConvNet


def largest_filters(weight: Tensor, count: int) -> Int64[Tensor, " count"]:
    """Numbers of the filters with the largest l1 norm, rising.

    Args:
        weight: of a convolution, filters first.
        count: how many.

    Raises:
        ValueError: none, or more than there are.
    """
    if not 1 <= count <= len(weight):
        raise ValueError(f"between 1 and {len(weight)} filters can be kept, got {count}")
    return weight.detach().abs().flatten(1).sum(1).topk(count).indices.sort().values


@torch.no_grad()
def slim_conv_net(network: ConvNet, widths: Sequence[int]) -> ConvNet:
    """A smaller copy: in each stage the filters with the largest l1 norm, in the next one their input channels.

    Args:
        network: trained, as a rule.
        widths: filters to keep in each stage.

    Raises:
        ValueError: another number of stages, or more filters than a stage has.
    """
    stages = [(stage[0], stage[1]) for stage in network.stages if isinstance(stage, nn.Sequential)]
    if len(widths) != len(stages):
        raise ValueError(f"{len(stages)} stages need as many widths, got {list(widths)}")
    pairs = [(conv, bn) for conv, bn in stages if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)]
    first = pairs[0][0]
    strides = [conv.stride[0] for conv, _ in pairs]
    slim = ConvNet(first.in_channels, network.head.out_features, widths, strides).to(first.weight.device)
    kept = torch.arange(first.in_channels, device=first.weight.device)
    for index, ((conv, bn), width) in enumerate(zip(pairs, widths, strict=True)):
        chosen = largest_filters(conv.weight, width)
        slim.get_submodule(f"stages.{index}.0").load_state_dict({"weight": conv.weight[chosen][:, kept]})
        slim.get_submodule(f"stages.{index}.1").load_state_dict(
            {name: value[chosen] if value.dim() else value for name, value in bn.state_dict().items()}
        )
        kept = chosen
    slim.head.load_state_dict({"weight": network.head.weight[:, kept], "bias": network.head.bias})
    return slim.train(network.training)
