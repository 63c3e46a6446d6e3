"""A convolution, its normalisation and its activation, of which each input runs some filters only.

Paper: Fire Together Wire Together (FTWT, arXiv 2110.08232). Multiply-adds are counted as gathered execution runs them;
the paper's code counts less in two places, which `DynamicConvBlock` names.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.adaptive._filtered_conv import can_run, filtered_conv, output_size
from postern.adaptive.mass_mask import heatmap_mass_mask, topk_uniform_mask

Mode = Literal["decoupled", "joint"]
Execution = Literal["masked", "gathered", "unpruned"]
Rule = Literal["mass", "uniform"]


class BlockReport(NamedTuple):
    """What a block did with a batch.

    Attributes:
        logits: the predictor's log-odds.
        target: which filters were among the most active.
        mask: which filters counted: those predicted; the target where the block was left unpruned.
        macs: multiply-adds of each sample.
        dense_macs: multiply-adds of a sample without pruning.
    """

    logits: Float[Tensor, "batch channels"]
    target: Bool[Tensor, "batch channels"]
    mask: Bool[Tensor, "batch channels"]
    macs: Float[Tensor, " batch"]
    dense_macs: Float[Tensor, ""]


class DynamicConvBlock(nn.Module):
    """``O = act(bn(conv(I)) [+ residual])`` and ``O * m``, where ``m = 1{sigmoid(predictor(I)) > 0.5}``.

    Execution is "masked" (everything runs, then the mask is applied; for training), "gathered" (only the filters that
    are on run, on the input channels that are on; for inference) or "unpruned" (no mask is applied, and multiply-adds
    are those that the targets would leave). Masked and gathered execution give the same output up to rounding.

    Gathered execution decides by values, so it cannot be compiled, has no gradient, and folds the normalisation into
    the weights when `set_execution` is called: call it again after changing weights or device. In float32 on a
    processor with AVX2 a compiled kernel reads the weights that are on where they lie, for each sample by itself.
    Elsewhere they are gathered, and samples with equal masks run together.

    Multiply-adds of a sample are ``on filters * on input channels * kernel * output pixels``. A depth-wise filter costs
    its kernel where its channel is on on both sides, where the paper's code counts nothing as soon as one input channel
    is off. An input that is a sum is dense, where the paper's code charges only the channels of one summand.

    Args:
        conv: ordinary or depth-wise, with zero padding.
        bn: its normalisation, or None.
        act: its activation, or None.
        predictor: gives the log-odds of the filters from the input; a `MaskPredictor`, or what has its interface.
        keep: the ``mass`` of `heatmap_mass_mask`, or the ``prune_ratio`` of `topk_uniform_mask`.
        mode: "decoupled", or "joint" to let the predictor's loss shape what comes before the block.
        rule: "mass" or "uniform", for the targets.

    Raises:
        ValueError: other groups or padding, an unknown mode or rule, or a share that the rule does not take.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        act: nn.Module | None,
        predictor: nn.Module,
        keep: float,
        mode: Mode = "decoupled",
        rule: Rule = "mass",
    ) -> None:
        super().__init__()
        if not can_be_dynamic(conv):
            raise ValueError(
                f"a dynamic convolution has groups=1 or is depth-wise, with zero padding given in pixels, got {conv}"
            )
        if mode not in get_args(Mode) or rule not in get_args(Rule):
            raise ValueError(f"mode is one of {get_args(Mode)}, rule of {get_args(Rule)}, got {mode!r} and {rule!r}")
        self.conv, self.bn, self.act, self.predictor = conv, bn, act, predictor
        self.mode, self.rule = mode, rule
        self.keep = keep
        self.execute: Execution = "masked"
        self._folded: tuple[Tensor, Tensor] | None = None

    @property
    def keep(self) -> float:
        """The share by which targets are made; setting one that the rule does not take raises ValueError."""
        return self._keep

    @keep.setter
    def keep(self, keep: float) -> None:
        if self.rule == "mass" and not keep <= 1:
            raise ValueError(
                f"by the mass rule keep is the share of the activation to keep, at most 1, got {keep}: "
                "1 drops only what is dead, a negative number keeps every filter"
            )
        if self.rule == "uniform" and not 0 <= keep <= 1:
            raise ValueError(
                f"by the uniform rule keep is the share of the filters to drop, in [0, 1], got {keep}: 0 drops only "
                "what is dead"
            )
        self._keep = keep

    @property
    def is_depthwise(self) -> bool:
        """Whether each filter sees one channel."""
        return self.conv.groups > 1

    @torch.no_grad()
    def set_execution(self, execute: Execution) -> None:
        """Choose how to run.

        Args:
            execute: "masked", "gathered" or "unpruned".

        Raises:
            ValueError: another word, or gathered execution of a normalisation without running statistics.
        """
        if execute not in get_args(Execution):
            raise ValueError(f"execution is one of {get_args(Execution)}, got {execute!r}")
        self.execute, self._folded = execute, self._fold() if execute == "gathered" else None

    def forward(
        self,
        inputs: Float[Tensor, "batch in height width"],
        active_in: Bool[Tensor, "batch in"] | None = None,
        residual: Float[Tensor, "batch out rows columns"] | None = None,
    ) -> tuple[Float[Tensor, "batch out rows columns"], Bool[Tensor, "batch out"], BlockReport | None]:
        """Return the output, which of its channels are on, and a report; gathered execution makes none.

        Args:
            inputs: zero in the channels that are off.
            active_in: which input channels are on; None for all.
            residual: added before the activation.
        """
        if self.execute == "gathered":
            return (*self._gathered(inputs, active_in, residual), None)
        output = self.conv(inputs)
        output = output if self.bn is None else self.bn(output)
        output = output if residual is None else output + residual
        output = output if self.act is None else self.act(output)
        target = (heatmap_mass_mask if self.rule == "mass" else topk_uniform_mask)(output, self.keep)
        logits = self.predictor(inputs.detach() if self.mode == "decoupled" else inputs)
        mask = target if self.execute == "unpruned" else logits.detach() > 0
        report = BlockReport(logits, target, mask, *self._macs(mask, active_in, output))
        return (output if self.execute == "unpruned" else output * mask[:, :, None, None]), mask, report

    def _macs(self, mask: Tensor, active_in: Tensor | None, output: Tensor) -> tuple[Tensor, Tensor]:
        conv = self.conv
        per_pair = conv.kernel_size[0] * conv.kernel_size[1] * output.shape[2] * output.shape[3]
        filters = mask.sum(1).float()
        if self.is_depthwise:
            pairs = filters if active_in is None else (mask & active_in).sum(1).float()
        else:
            pairs = filters * (conv.in_channels if active_in is None else active_in.sum(1).float())
        dense = torch.full_like(pairs[0], conv.out_channels * (conv.in_channels // conv.groups) * per_pair)
        return pairs * per_pair, dense

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Weights and shifts of the convolution with its normalisation."""
        weight, bias = self.conv.weight.contiguous(), self.conv.bias
        shift = weight.new_zeros(len(weight)) if bias is None else bias
        if self.bn is None:
            return weight.detach().clone(), shift.detach().clone()
        mean, variance = self.bn.running_mean, self.bn.running_var
        if mean is None or variance is None:
            raise ValueError(
                "gathered execution folds running statistics into the weights, and the normalisation has none: make it "
                "with track_running_stats=True, or stay with set_execution('masked')"
            )
        scale = (variance + self.bn.eps).rsqrt()
        scale = scale if self.bn.weight is None else scale * self.bn.weight
        shift = (shift - mean) * scale
        return weight * scale[:, None, None, None], shift if self.bn.bias is None else shift + self.bn.bias

    @torch.no_grad()
    def _gathered(self, inputs: Tensor, active_in: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._folded is None or self.training:
            raise ValueError("gathered execution is for evaluation mode, after set_execution('gathered')")
        mask = self.predictor(inputs) > 0
        if can_run(inputs, self.act):
            return filtered_conv(self.conv, *self._folded, self.act, inputs, active_in, mask, residual), mask
        if len(inputs) == 1:
            return self._run(inputs, mask[0], None if active_in is None else active_in[0], residual), mask
        keys = mask if active_in is None else torch.cat([mask, active_in], dim=1)
        _, which = torch.unique(keys, dim=0, return_inverse=True)
        output: Tensor | None = None
        for group in range(int(which.max()) + 1):
            rows = torch.nonzero(which == group).squeeze(1)
            part = self._run(
                inputs[rows],
                mask[rows[0]],
                None if active_in is None else active_in[rows[0]],
                None if residual is None else residual[rows],
            )
            if output is None:
                output = part.new_empty(len(inputs), *part.shape[1:])
            output[rows] = part
        assert output is not None
        return output, mask

    def _run(self, inputs: Tensor, mask: Tensor, active_in: Tensor | None, residual: Tensor | None) -> Tensor:
        """The output of samples that share their masks."""
        conv = self.conv
        assert self._folded is not None
        weight, shift = self._folded
        height, width = output_size(conv, *inputs.shape[2:])
        output = inputs.new_zeros(len(inputs), len(mask), height, width)
        filters = torch.nonzero(mask).squeeze(1)
        if not len(filters):
            return output
        channels = None if active_in is None else torch.nonzero(active_in).squeeze(1)
        if self.is_depthwise:
            # A filter whose channel is off sees zeros, and gives its shift everywhere.
            values = shift[filters][:, None, None].expand(len(inputs), -1, height, width).clone()
            on = torch.arange(len(filters), device=filters.device)
            if active_in is not None:
                on = on[active_in[filters]]
            both = filters[on]
            if len(both):
                values[:, on] = self._conv(inputs.index_select(1, both), weight[both], shift[both], len(both))
        elif channels is not None and not len(channels):
            values = shift[filters][:, None, None].expand(len(inputs), -1, height, width)
        else:
            weight = weight.index_select(0, filters)
            if channels is not None and len(channels) < conv.in_channels:
                weight, inputs = weight.index_select(1, channels), inputs.index_select(1, channels)
            values = self._conv(inputs, weight, shift[filters], 1)
        if residual is not None:
            values = values + residual.index_select(1, filters)
        values = values if self.act is None else self.act(values)
        return output.index_copy_(1, filters, values.to(output.dtype))

    def _conv(self, inputs: Tensor, weight: Tensor, shift: Tensor, groups: int) -> Tensor:
        conv = self.conv
        return F.conv2d(inputs, weight, shift, conv.stride, conv.padding, conv.dilation, groups)


def can_be_dynamic(conv: nn.Conv2d) -> bool:
    """Whether a convolution can become a `DynamicConvBlock`: ordinary or depth-wise, with zero padding in pixels."""
    is_depthwise = conv.groups == conv.in_channels == conv.out_channels
    return (conv.groups == 1 or is_depthwise) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
