"""Exits around any network that is built in stages, and inference that stops at the first exit a policy accepts.

Papers: BranchyNet (arXiv 1709.01686) for exits along a network; Jointly-Learned Exit and Inference for a Dynamic Neural
Network (JEI-DNN, arXiv 2310.09163) for linear exits on a frozen backbone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from postern.adaptive.cost import counting_macs
from postern.adaptive.exit_policy import ExitPolicy
from postern.nets import evaluating

Pool = Literal["mean", "first"]
Visit = Callable[[int, Tensor], Tensor | None]


class DynamicOutput(NamedTuple):
    """What `EarlyExitModel.forward_dynamic` returns.

    Attributes:
        logits: of the exit at which each sample left.
        exit_index: that exit's number; the number of exits for the final head.
    """

    logits: Float[Tensor, "batch classes"]
    exit_index: Int64[Tensor, " batch"]


class EarlyExitModel(nn.Module):
    """A network with a linear classifier after some of its modules, and its own output as the final head.

    The modules' outputs are read by hooks, so the network needs no change: a Transformers ViT or BERT, or any list of
    modules each of which takes what the one before returns. `forward_dynamic` removes the samples that have stopped
    from the batch at each exit, and leaves the network as soon as none is left. For that, what goes from an exit to the
    modules behind it must be that exit's output alone, besides arguments named in ``row_arguments``.

    ``forward`` returns all logits and can be compiled. `forward_dynamic` decides by values and cannot.

    Args:
        backbone: returns logits, or an object with an attribute ``logits``.
        exits: names of the modules that exits come after, in the order in which they run.
        num_classes: number of logits.
        widths: features of each exit after pooling; one number if they all have as many.
        pool: "mean" over the pixels of an image or over the tokens of a sequence, "first" for the first token; neither
            changes vectors.
        norm: name of the backbone's module that normalises what its own head sees, applied to every exit's pooled
            features as well; None for no such module.
        is_frozen: keep the backbone without gradients and in evaluation mode.
        row_arguments: names of arguments of the backbone's modules that have a row for each sample, to be cut down with
            the batch: the attention mask of a Transformers encoder.

    Raises:
        ValueError: no exits, a name that the backbone does not have, sizes below 1, or other numbers of widths.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: Sequence[str],
        num_classes: int,
        widths: int | Sequence[int],
        pool: Pool = "mean",
        *,
        norm: str | None = None,
        is_frozen: bool = True,
        row_arguments: Sequence[str] = ("attention_mask",),
    ) -> None:
        super().__init__()
        names = dict(backbone.named_modules())
        missing = [name for name in (*exits, *([norm] if norm is not None else [])) if name not in names]
        if missing or not exits or len(set(exits)) < len(exits):
            raise ValueError(
                f"exits are different modules of the backbone, at least one, got {list(exits)}"
                + (f"; it has no {', '.join(missing)}" if missing else "")
            )
        each_width = [widths] * len(exits) if isinstance(widths, int) else list(widths)
        if len(each_width) != len(exits) or min(num_classes, *each_width) < 1:
            raise ValueError(
                f"{len(exits)} exits need as many positive widths, and classes, got widths={each_width}, "
                f"num_classes={num_classes}"
            )
        if pool not in get_args(Pool):
            raise ValueError(f"pool is one of {get_args(Pool)}, got {pool!r}")
        self.backbone = backbone
        self.exits, self.pool, self.norm, self.is_frozen = tuple(exits), pool, norm, is_frozen
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in each_width)
        self._taps = _Taps()
        for index, name in enumerate(exits):
            names[name].register_forward_hook(_Tap(index, self._taps))
        self._row_modules = {
            name: tuple(
                argument for argument in row_arguments if argument in inspect.signature(module.forward).parameters
            )
            for name, module in names.items()
        }
        if is_frozen:
            backbone.requires_grad_(False)
            backbone.eval()

    @property
    def num_exits(self) -> int:
        """Number of exits, without the final head."""
        return len(self.exits)

    def train(self, mode: bool = True) -> EarlyExitModel:
        """Set training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def features(
        self, *inputs: Any, **arguments: Any
    ) -> tuple[list[Float[Tensor, "batch width"]], Float[Tensor, "batch classes"]]:
        """Return what each exit's classifier sees, and the final logits.

        Args:
            inputs: of the backbone.
            arguments: of the backbone, by name.

        Raises:
            ValueError: exits that run in another order than they were given, or not once each.
        """
        found: list[Tensor] = []
        order: list[int] = []

        def visit(index: int, hidden: Tensor) -> None:
            order.append(index)
            found.append(self._pooled(hidden))

        self._taps.visit = visit
        try:
            final = _logits(self.backbone(*inputs, **arguments))
        finally:
            self._taps.visit = None
        if order != list(range(self.num_exits)):
            raise ValueError(
                f"each exit runs once, in the order given, {self.exits}; got {[self.exits[index] for index in order]}"
            )
        return found, final

    def exit_logits(self, features: Sequence[Float[Tensor, "batch width"]]) -> list[Float[Tensor, "batch classes"]]:
        """The classifiers' logits.

        Args:
            features: what each of them sees.
        """
        return [head(each) for head, each in zip(self.heads, features, strict=True)]

    def forward_all(self, *inputs: Any, **arguments: Any) -> list[Float[Tensor, "batch classes"]]:
        """Return the logits of every exit, the final head last.

        Args:
            inputs: of the backbone.
            arguments: of the backbone, by name.
        """
        features, final = self.features(*inputs, **arguments)
        return [*self.exit_logits(features), final]

    def forward(self, *inputs: Any, **arguments: Any) -> list[Float[Tensor, "batch classes"]]:
        """Return the logits of every exit; see `forward_all`."""
        return self.forward_all(*inputs, **arguments)

    @torch.no_grad()
    def forward_dynamic(self, *inputs: Any, policy: ExitPolicy, **arguments: Any) -> DynamicOutput:
        """Answer each sample from the first exit that the policy accepts, and compute nothing behind it.

        Args:
            inputs: of the backbone.
            policy: decides at each exit which of the samples that have come so far stop.
            arguments: of the backbone, by name.
        """
        passage = _Passage(self, policy)
        hooks = self._narrowing_hooks(passage)
        self._taps.visit = passage.visit
        try:
            passage.finish(_logits(self.backbone(*inputs, **arguments)))
        except _NothingLeft:
            pass
        finally:
            self._taps.visit = None
            for hook in hooks:
                hook.remove()
        return passage.output()

    def _pooled(self, hidden: Tensor) -> Tensor:
        if hidden.dim() == 2:
            pooled = hidden
        elif self.pool == "first":
            pooled = hidden[:, 0]
        else:
            pooled = hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)
        return pooled if self.norm is None else self.backbone.get_submodule(self.norm)(pooled)

    def _narrowing_hooks(self, passage: _Passage) -> list[torch.utils.hooks.RemovableHandle]:
        return [
            self.backbone.get_submodule(name).register_forward_pre_hook(passage.narrow(names), with_kwargs=True)
            for name, names in self._row_modules.items()
            if names and name  # the backbone itself runs before any sample has left
        ]


class _Taps:
    """What the hooks in a backbone do for the time being: nothing while it runs by itself."""

    def __init__(self) -> None:
        self.visit: Visit | None = None


class _Tap:
    """The hook after an exit's module; an object, so that a deep copy of the model copies it with the taps."""

    def __init__(self, index: int, taps: _Taps) -> None:
        self.index, self.taps = index, taps

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self.taps.visit is None:
            return None
        if isinstance(output, tuple):
            changed = self.taps.visit(self.index, output[0])
            return None if changed is None else (changed, *output[1:])
        return self.taps.visit(self.index, output)


class _NothingLeft(Exception):
    """Every sample has stopped: the rest of the backbone need not run."""


class _Passage:
    """One batch on its way through the network."""

    def __init__(self, model: EarlyExitModel, policy: ExitPolicy) -> None:
        self.model, self.policy = model, policy
        self.state: Tensor | None = None
        self.batch = 0  # samples at the start; known at the first exit
        self.rows: Tensor | None = None  # of the samples that go on; None while all do
        self.found: list[tuple[Tensor | None, Tensor, int]] = []  # rows, logits, exit

    def visit(self, index: int, hidden: Tensor) -> Tensor | None:
        if not index:
            self.batch = len(hidden)
        logits = self.model.heads[index](self.model._pooled(hidden))
        stops, self.state = self.policy.decide(logits, index, self.state)
        stopping = torch.nonzero(stops).squeeze(1)
        if not len(stopping):
            return None
        if len(stopping) == len(logits):
            self.found.append((self.rows, logits, index))
            raise _NothingLeft
        going = torch.nonzero(~stops).squeeze(1)
        self.found.append((stopping if self.rows is None else self.rows[stopping], logits[stopping], index))
        self.rows = going if self.rows is None else self.rows[going]
        self.state = None if self.state is None else self.state[going]
        return hidden[going]

    def finish(self, logits: Tensor) -> None:
        self.found.append((self.rows, logits, self.model.num_exits))

    def narrow(self, names: Sequence[str]) -> Callable[..., Any]:
        """A hook before a module that leaves the rows of samples which have stopped out of its arguments."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
            if self.rows is None:
                return None
            bound = inspect.signature(module.forward).bind_partial(*inputs, **arguments)
            for name in names:
                value = bound.arguments.get(name)
                # A mask that all samples share has one row; one that an outer module got is narrow already.
                if isinstance(value, Tensor) and len(value) == self.batch:
                    bound.arguments[name] = value[self.rows]
            return bound.args, bound.kwargs

        return hook

    def output(self) -> DynamicOutput:
        rows, logits, index = self.found[0]
        if rows is None:  # all left at once
            return DynamicOutput(logits, torch.full((len(logits),), index, device=logits.device))
        order = torch.cat([rows for rows, _, _ in self.found if rows is not None]).argsort()
        exits = torch.cat([torch.full((len(part),), at, device=part.device) for _, part, at in self.found])
        return DynamicOutput(torch.cat([part for _, part, _ in self.found])[order], exits[order])


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def exit_costs(model: EarlyExitModel, *inputs: Any, operations: int = 0, **arguments: Any) -> Float[Tensor, " exits"]:
    """Multiply-adds of one sample that leaves at each exit: the backbone so far, and the classifiers passed.

    Args:
        model: with its exits.
        inputs: of the backbone, of one sample or several alike.
        operations: what a policy computes at an exit, counted as if they were multiply-adds; see `gate_operations`.
        arguments: of the backbone, by name.

    Returns:
        One number for each exit and one for the final head, in float64. Divided by the last they are the shares of the
        full cost that JEI-DNN's objective uses.
    """
    totals: list[float] = []
    batch = 0
    with torch.no_grad(), evaluating(model), counting_macs() as macs:

        def visit(index: int, hidden: Tensor) -> None:
            nonlocal batch
            batch = len(hidden)
            model.heads[index](model._pooled(hidden))
            totals.append(macs() / batch + (index + 1) * operations)

        model._taps.visit = visit
        try:
            model.backbone(*inputs, **arguments)
        finally:
            model._taps.visit = None
        totals.append(macs() / batch + model.num_exits * operations)
    return torch.tensor(totals, dtype=torch.float64)
