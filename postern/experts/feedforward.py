"""Banks of experts: equal feed-forward blocks whose weights lie in one tensor, or any modules side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.experts.grouped import grouped_mm, groups_of


@runtime_checkable
class Experts(Protocol):
    """A bank of experts, called with rows sorted by expert.

    Attributes:
        num_experts: how many there are.
    """

    num_experts: int

    def __call__(
        self, rows: Float[Tensor, "rows width"], ends: Int[Tensor, " num_experts"]
    ) -> Float[Tensor, "rows width"]:
        """Let each expert work on its rows.

        Args:
            rows: those of expert 0 first.
            ends: where the rows of each expert end; rows from the last end on have no expert and give zeros.
        """
        ...


class FeedForwardExperts(nn.Module):
    """Equal feed-forward blocks: ``W2 activation(W1 x + b1) + b2``, gated ``W2 (activation(W1 x) * (V x))``.

    All experts work at once, in grouped matrix products: their number costs no time, but for what their weights weigh.

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
        self, rows: Float[Tensor, "rows width"], ends: Int[Tensor, " num_experts"]
    ) -> Float[Tensor, "rows width"]:
        """See `Experts`."""
        if rows.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._work(rows, ends, slice(None))
        # what is hidden stays in the processor's cache, and its memory is taken again and again
        output = torch.zeros_like(rows)
        for experts, part in _runs(ends.tolist()):
            output[part] = self._work(rows[part], ends[experts] - part.start, experts)
        return output

    def _work(self, rows: Tensor, ends: Tensor, experts: slice) -> Tensor:
        """Let some of the experts work on their rows."""
        expand, contract = self.expand[experts], self.contract[experts]
        hidden = grouped_mm(rows, expand, ends)
        if self.expand_bias is None or self.contract_bias is None:
            return grouped_mm(self._activate(hidden), contract, ends)
        group = groups_of(ends, len(rows))
        # one more row, for those that have no expert
        first, second = (F.pad(bias[experts], (0, 0, 0, 1))[group] for bias in (self.expand_bias, self.contract_bias))
        return grouped_mm(self._activate(hidden + first), contract, ends) + second

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.is_gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            activated = self.activation(gate) * hidden
        else:
            activated = self.activation(hidden)
        output: Tensor = self.dropout(activated)
        return output

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        _, hidden_dim, width = self.contract.shape
        return f"num_experts={self.num_experts}, width={width}, hidden_dim={hidden_dim}, is_gated={self.is_gated}"


def _runs(ends: list[int], least: int = 256) -> Iterator[tuple[slice, slice]]:
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
        self, rows: Float[Tensor, "rows width"], ends: Int[Tensor, " num_experts"]
    ) -> Float[Tensor, "rows width"]:
        """See `Experts`."""
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        *parts, rest = torch.split(rows, [*sizes, len(rows) - sum(sizes)])
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return torch.cat([*outputs, torch.zeros_like(rest)])
