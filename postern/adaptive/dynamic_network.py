"""Any convolutional network with dynamic filters: found by its graph, wired by masks, counted by what runs.

Paper: Fire Together Wire Together (FTWT, arXiv 2110.08232).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from postern.adaptive.dynamic_conv import (
    BlockReport,
    DynamicConvBlock,
    Execution,
    Mode,
    Rule,
    can_be_dynamic,
)
from postern.adaptive.mask_predictor import MaskPredictor, PixelPool
from postern.nets import evaluating

Residual = Literal["branch", "sum", "dense"]

_ACTIVATIONS: Mapping[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU,
    F.relu: nn.ReLU,
    F.relu6: nn.ReLU6,
    "relu": nn.ReLU,
}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
# What keeps each channel to itself and zero where it was.
_CHANNELWISE_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)
_CHANNELWISE_FUNCTIONS = (*_ACTIVATIONS, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout)


class DynamicNetwork(nn.Module):
    """A network whose convolutions are `DynamicConvBlock`; made by `convert_to_dynamic`.

    Args:
        graph: returns the network's output and the blocks' reports.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    @property
    def blocks(self) -> list[DynamicConvBlock]:
        """The dynamic convolutions in the order in which they run."""
        return [module for module in self.graph.modules() if isinstance(module, DynamicConvBlock)]

    @property
    def predictors(self) -> nn.ModuleList:
        """The blocks' predictors."""
        return nn.ModuleList(block.predictor for block in self.blocks)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Parameters of everything but the predictors."""
        own = {id(parameter) for parameter in self.predictors.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the network's output."""
        output: Tensor = self.graph(inputs)[0]
        return output

    def with_reports(self, inputs: Tensor) -> tuple[Tensor, tuple[BlockReport, ...]]:
        """Return the network's output and a report of each block; not in gathered execution.

        Args:
            inputs: a batch.

        Raises:
            ValueError: execution is gathered.
        """
        output, reports = self.graph(inputs)
        if any(report is None for report in reports):
            raise ValueError("gathered execution makes no reports; set_execution('masked') does")
        return output, reports

    def set_execution(self, execute: Execution) -> DynamicNetwork:
        """Choose how all blocks run, and return the network; see `DynamicConvBlock`.

        Args:
            execute: "masked", "gathered" (for inference; again after changing weights) or "unpruned".
        """
        for block in self.blocks:
            block.set_execution(execute)
        return self

    def set_keep(self, keep: float) -> DynamicNetwork:
        """Set the share that targets keep, or prune by the uniform rule, in all blocks, and return the network.

        Args:
            keep: see `DynamicConvBlock`.

        Raises:
            ValueError: a share that the rule does not take.
        """
        for block in self.blocks:
            block.keep = keep
        return self


def convert_to_dynamic(
    model: nn.Module,
    keep: float,
    include_first: bool = True,
    *,
    residual: Residual = "branch",
    pool: PixelPool = "max",
    has_softmax: bool = True,
    mode: Mode = "decoupled",
    rule: Rule = "mass",
) -> DynamicNetwork:
    """Copy a network and make its convolutions dynamic, wherever one is followed by batch normalisation.

    Its graph is traced, so control flow must not depend on values. Stacks of convolution, normalisation and ReLU,
    residual blocks and depth-wise convolutions are found. A convolution that only fits the shape of a shortcut, and
    grouped ones, stay as they are. Where a block's input comes from another block through operations that keep each
    channel to itself, the channels that are off are known and not computed with; behind a sum all channels are on.

    Args:
        model: trained, as a rule.
        keep: see `DynamicConvBlock`.
        include_first: whether the first convolution becomes dynamic.
        residual: what to do with the last convolution of a residual branch: "branch" masks it before the sum, as the
            paper does by default; "sum" masks what comes out of the sum and its ReLU; "dense" leaves it as it is.
        pool: see `MaskPredictor`.
        has_softmax: see `MaskPredictor`.
        mode: see `DynamicConvBlock`.
        rule: see `DynamicConvBlock`.

    Raises:
        ValueError: an unknown option, a share that the rule does not take, or no convolution that can be dynamic.
    """
    if residual not in get_args(Residual):
        raise ValueError(f"residual is one of {get_args(Residual)}, got {residual!r}")
    traced = fx.symbolic_trace(copy.deepcopy(model))
    graph, modules = traced.graph, dict(traced.named_modules())
    active: dict[fx.Node, fx.Node] = {}
    reports: list[fx.Node] = []
    is_first = True
    for node in list(graph.nodes):
        _inherit(node, active, modules)
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d):
            continue
        skips, is_first = is_first and not include_first, False
        found = None if skips else _Pattern.at(node, modules, residual)
        if found is None:
            continue
        name = f"dynamic_{len(reports)}"
        predictor = MaskPredictor(conv.in_channels, conv.out_channels, pool, has_softmax).to(conv.weight.device)
        block = DynamicConvBlock(conv, found.bn, found.act, predictor, keep, mode, rule)
        traced.add_submodule(name, block.train(model.training))
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with graph.inserting_after(found.nodes[-1]):
            call = graph.call_module(name, (source, active.get(source), found.residual))
        with graph.inserting_after(call):
            parts = [graph.call_function(operator.getitem, (call, index)) for index in (2, 1, 0)]
        report, mask, output = parts
        found.nodes[-1].replace_all_uses_with(output)
        for old in reversed(found.nodes):
            graph.erase_node(old)
        reports.append(report)
        active[output] = mask
    if not reports:
        raise ValueError("no convolution followed by batch normalisation was found that can be dynamic")
    (end,) = (node for node in graph.nodes if node.op == "output")
    end.args = ((end.args[0], tuple(reports)),)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return DynamicNetwork(traced).train(model.training)


def _inherit(node: fx.Node, active: dict[fx.Node, fx.Node], modules: Mapping[str, nn.Module]) -> None:
    """Channels that are off stay off through operations that keep channels to themselves."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source not in active:
        return
    if node.op == "call_module":
        keeps = isinstance(modules.get(str(node.target)), _CHANNELWISE_MODULES)
    else:
        keeps = node.op in ("call_function", "call_method") and node.target in _CHANNELWISE_FUNCTIONS
    if keeps:
        active[node] = active[source]


class _Pattern:
    """A convolution and what belongs to it in the graph."""

    def __init__(self, nodes: list[fx.Node], bn: nn.BatchNorm2d) -> None:
        self.nodes, self.bn = nodes, bn
        self.act: nn.Module | None = None
        self.residual: fx.Node | None = None

    @classmethod
    def at(cls, node: fx.Node, modules: Mapping[str, nn.Module], residual: Residual) -> _Pattern | None:
        conv, after = modules[str(node.target)], _only_user(node)
        bn = modules.get(str(after.target)) if after is not None and after.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d) or not can_be_dynamic(conv) or not isinstance(bn, nn.BatchNorm2d):
            return None
        assert after is not None
        found = cls([node, after], bn)
        user = _only_user(after)
        if user is None:
            return found
        if user.op != "call_module" and user.target in _SUMS:
            other = user.args[1] if user.args[0] is after else user.args[0]
            source = node.args[0]
            assert isinstance(source, fx.Node)
            is_shortcut = len(source.users) > 1 and other is not source
            if is_shortcut or residual == "dense" or not isinstance(other, fx.Node):
                return None
            behind = _only_user(user)
            act = None if behind is None else _activation(behind, modules)
            if residual == "sum":
                found.nodes.append(user)
                found.residual = other
                if act is not None and behind is not None:
                    found.nodes.append(behind)
                    found.act = act
            return found
        found.act = _activation(user, modules)
        if found.act is not None:
            found.nodes.append(user)
        return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return module if isinstance(module, nn.ReLU | nn.ReLU6) else None
    kind = _ACTIVATIONS.get(node.target)
    return None if kind is None else kind()


# -- multiply-adds ----------------------------------------------------------------------------------------------------


def measure_flops_reduction(model: DynamicNetwork, batches: Iterable[Tensor], counts_predictors: bool = False) -> float:
    """``1 - mean F / F_dense``: the share of the convolutions' multiply-adds that the masks save.

    Convolutions that are not dynamic count on both sides. Normalisation and linear layers are not counted.

    Args:
        model: run in evaluation mode, as it is set: in unpruned execution the saving is that of the targets.
        batches: inputs.
        counts_predictors: whether the predictors' multiply-adds are charged.

    Raises:
        ValueError: no samples.
    """
    spent = dense = samples = 0.0
    with evaluating(model), torch.no_grad():
        for inputs in batches:
            others = 0.0

            def count(conv: nn.Module, _: Any, output: Tensor) -> None:
                nonlocal others
                assert isinstance(conv, nn.Conv2d)
                others += output[0].numel() * conv.weight[0].numel()

            blocks = {id(block.conv) for block in model.blocks}
            hooks = [
                each.register_forward_hook(count)
                for each in model.modules()
                if isinstance(each, nn.Conv2d) and id(each) not in blocks
            ]
            try:
                _, reports = model.with_reports(inputs)
            finally:
                for hook in hooks:
                    hook.remove()
            spent += sum(report.macs.double().sum().item() for report in reports) + others * len(inputs)
            dense += (sum(report.dense_macs.double().item() for report in reports) + others) * len(inputs)
            samples += len(inputs)
    if not samples:
        raise ValueError("a saving is measured on at least one sample, got none")
    if counts_predictors:
        spent += samples * sum(int(getattr(block.predictor, "macs", 0)) for block in model.blocks)
    return 1 - spent / dense


def estimate_flops_reduction(
    model: DynamicNetwork, batches: Sequence[Tensor], keeps: Sequence[float]
) -> dict[float, float]:
    """The saving to expect before anything is trained: that of the targets of the unpruned network.

    Args:
        model: whose execution and share are restored afterwards.
        batches: inputs, of the training data as a rule.
        keeps: shares to try; see `DynamicConvBlock`.

    Returns:
        The reduction for each share; see `measure_flops_reduction`.
    """
    before = [(block.execute, block.keep) for block in model.blocks]
    model.set_execution("unpruned")
    try:
        return {keep: measure_flops_reduction(model.set_keep(keep), batches) for keep in keeps}
    finally:
        for block, (execute, keep) in zip(model.blocks, before, strict=True):
            block.set_execution(execute)
            block.keep = keep
