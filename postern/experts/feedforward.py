"""Banks of experts: equal feed-forward blocks whose weights lie in one tensor, or any modules side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.experts import _expert_kernels, _gate_kernels
from postern.experts.grouped import grouped_mm, groups_of


@runtime_checkable
class Experts(Protocol):
    """A bank of experts, called with rows sorted by expert, or with tokens and the order of their assignments.

    Attributes:
        num_experts: how many there are.
    """

    num_experts: int

    def __call__(
        self,
        rows: Float[Tensor, "rows width"],
        ends: Int[Tensor, " num_experts"],
        order: Int[Tensor, " assignments"] | None = None,
    ) -> Float[Tensor, "assignments width"]:
        """Let each expert work on its rows.

        Args:
            rows: those of expert 0 first; or tokens, each of which has as many assignments as the others.
            ends: where the rows of each expert end, or its assignments in the order; what comes from the last end on
                has no expert and gives zeros.
            order: the assignments, those to expert 0 first, as `postern.experts.dispatch` sorts them; None where rows
                are sorted. A bank that knows no better than to sort tokens has `in_order` for that.

        Returns:
            A row for each row; or one for each assignment, those of the first token first.
        """
        ...


def in_order(
    experts: Callable[[Tensor, Tensor], Tensor],
    tokens: Float[Tensor, "tokens width"],
    ends: Int[Tensor, " num_experts"],
    order: Int[Tensor, " assignments"],
) -> Float[Tensor, "assignments width"]:
    """Let experts that take sorted rows work on tokens: gather rows in the order, and put the outputs back.

    Args:
        experts: called with rows sorted by expert and the ends.
        tokens: each has as many assignments as the others; assignment ``a`` is of token ``a // top_k``.
        ends: see `Experts`.
        order: see `Experts`.

    Returns:
        A row for each assignment, those of the first token first.

    Raises:
        ValueError: some tokens have more assignments than others.
    """
    top_k = len(order) // max(len(tokens), 1)
    if len(order) != top_k * len(tokens):
        raise ValueError(f"each token has as many assignments as the others, got {len(order)} for {len(tokens)} tokens")
    return experts(tokens[order // max(top_k, 1)], ends)[order.argsort()]


class FeedForwardExperts(nn.Module):
    """Equal feed-forward blocks: ``W2 activation(W1 x + b1) + b2``, gated ``W2 (activation(W1 x) * (V x))``.

    All experts work at once, in grouped matrix products: their number costs no time, but for what their weights weigh.
    Inference in float32 on the CPU, with ReLU, SiLU or GELU, runs through a compiled kernel, which reads tokens where
    they lie and keeps what is hidden in the processor's cache.

    Args:
        num_experts: how many there are.
        width: features of a token.
        hidden_dim: features between the products.
        activation: of the hidden features.
        is_gated: whether hidden features are gated by a second product, as in Llama and Mixtral.
        bias: whether the products have biases.
        dropout: share of the hidden features that is zeroed in training.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden_dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        is_gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(num_experts, width, hidden_dim) < 1:
            raise ValueError(
                f"sizes are positive, got num_experts={num_experts}, width={width}, hidden_dim={hidden_dim}"
            )
        self.num_experts = num_experts
        self.width = width
        self.activation = activation
        self.is_gated = is_gated
        expanded = 2 * hidden_dim if is_gated else hidden_dim
        self.expand = nn.Parameter(torch.empty(num_experts, width, expanded))
        self.contract = nn.Parameter(torch.empty(num_experts, hidden_dim, width))
        self.expand_bias = nn.Parameter(torch.empty(num_experts, expanded)) if bias else None
        self.contract_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw each expert's weights and biases as `torch.nn.Linear` does."""
        for weight, bias in ((self.expand, self.expand_bias), (self.contract, self.contract_bias)):
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound)
            if bias is not None:
                bias.uniform_(-bound, bound)

    def forward(
        self,
        rows: Float[Tensor, "rows width"],
        ends: Int[Tensor, " num_experts"],
        order: Int[Tensor, " assignments"] | None = None,
    ) -> Float[Tensor, "assignments width"]:
        """See `Experts`."""
        weights = self.expand, self.contract, self.expand_bias, self.contract_bias
        assignments = torch.arange(len(rows), device=rows.device) if order is None else order
        if (
            _expert_kernels.can_infer(rows, self.activation, *weights)
            and not (self.training and self.dropout.p > 0)
            # the kernel gives each thread some rows, where torch gives each some columns of the same rows
            and len(assignments) >= torch.get_num_threads()
        ):
            return _expert_kernels.feed_forward(rows, assignments, ends, *weights, self.activation)
        if order is None:
            return self._forward_sorted(rows, ends)
        return in_order(self._forward_sorted, rows, ends, order)

    def _forward_sorted(self, rows: Tensor, ends: Tensor) -> Tensor:
        if rows.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._work(rows, ends, self.expand, self.contract, self.expand_bias, self.contract_bias)
        # what is hidden stays in the processor's cache, and its memory is taken again and again
        output = torch.zeros_like(rows)
        weights = self.expand, self.contract, self.expand_bias, self.contract_bias
        for experts, part in _runs(ends.tolist()):
            these: Any = [None if weight is None else weight[experts] for weight in weights]
            output[part] = self._work(rows[part], ends[experts] - part.start, *these)
        return output

    def _work(
        self,
        rows: Tensor,
        ends: Tensor,
        expand: Tensor,
        contract: Tensor,
        expand_bias: Tensor | None,
        contract_bias: Tensor | None,
    ) -> Tensor:
        hidden = grouped_mm(rows, expand, ends)
        if expand_bias is None or contract_bias is None:
            return grouped_mm(self._activate(hidden), contract, ends)
        group = groups_of(ends, len(rows))
        # one more row, for those that have no expert
        first, second = (F.pad(bias, (0, 0, 0, 1))[group] for bias in (expand_bias, contract_bias))
        return grouped_mm(self._activate(hidden + first), contract, ends) + second

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.is_gated and _gate_kernels.can_gate(hidden, self.activation):
            activated = _gate_kernels.gate(hidden, self.activation)
        elif self.is_gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            activated = self.activation(gate)
            activated = activated * hidden if torch.is_grad_enabled() else activated.mul_(hidden)
        else:
            activated = self.activation(hidden)
        output: Tensor = self.dropout(activated)
        return output

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        _, hidden_dim, width = self.contract.shape
        return f"num_experts={self.num_experts}, width={width}, hidden_dim={hidden_dim}, is_gated={self.is_gated}"


def _runs(ends: list[int], least: int = 512) -> Iterator[tuple[slice, slice]]:
    """Experts in a row that have ``least`` rows together, and these rows."""
    first = start = 0
    for expert, end in enumerate(ends):
        if end - start >= least or expert == len(ends) - 1:
            yield slice(first, expert + 1), slice(start, end)
            first, start = expert + 1, end


class ModuleExperts(nn.Module):
    """Any modules as experts, which work one after the other.

    It cannot be compiled into one graph, as how many rows each gets is known only when it runs.

    Args:
        experts: called with rows ``[rows, width]``, and with no rows where nobody chose them; return as many.

    Raises:
        ValueError: no modules.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(self.experts)
        if not self.num_experts:
            raise ValueError("experts are at least one module, got none")

    def forward(
        self,
        rows: Float[Tensor, "rows width"],
        ends: Int[Tensor, " num_experts"],
        order: Int[Tensor, " assignments"] | None = None,
    ) -> Float[Tensor, "assignments width"]:
        """See `Experts`."""
        if order is not None:
            return in_order(self, rows, ends, order)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        *parts, rest = torch.split(rows, [*sizes, len(rows) - sum(sizes)])
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.cat([*outputs, torch.zeros_like(rest)])
