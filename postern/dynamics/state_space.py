"""Sequence layers as one linear recurrence whose coefficients vary with time.

Attention, linear attention, selective state-space models and gated recurrent networks all compute

    h_i = A_i h_{i-1} + B_i u_i,    y_i = C_i h_i + D_i u_i + e_i,    h_{-1} = 0,

with a diagonal A_i. They differ in how the input gives the coefficients, and in the size of the state.

Paper: "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", arXiv 2405.15731. The term e_i is ours: it takes up what biases of values and outputs add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from postern.dynamics.scan import diagonal_scan


@dataclass(frozen=True)
class LinearTimeVarying:
    """The coefficients of one sequence, or of a batch of them in leading dimensions.

    It is for analysis and for tests: it holds ``time * state * (width + out)`` numbers, and none is computed twice
    faster than by the layer that it describes.

    Attributes:
        A: the diagonal of the transition; the first one multiplies the state before the first token.
        B: from the input to the state.
        C: from the state to the output.
        D: from the input to the output; None for zeros.
        offset: ``e``, what the output is without inputs; None for zeros.

    Raises:
        ValueError: shapes that do not fit.
    """

    A: Float[Tensor, "*batch time state"]
    B: Float[Tensor, "*batch time state width"]
    C: Float[Tensor, "*batch time out state"]
    D: Float[Tensor, "*batch time out width"] | None = None
    offset: Float[Tensor, "*batch time out"] | None = None

    def __post_init__(self) -> None:
        shape, read = self.A.shape, self.C.shape
        if len(shape) < 2 or self.B.shape[:-1] != shape or (*read[:-2], read[-1]) != shape:
            raise ValueError(
                "A, B and C have the shapes [..., time, state], [..., time, state, width] and [..., time, out, state], "
                f"got {list(shape)}, {list(self.B.shape)} and {list(self.C.shape)}"
            )
        expected = (*shape[:-1], self.out, self.width)
        if self.D is not None and self.D.shape != expected:
            raise ValueError(f"D has the shape {list(expected)}, got {list(self.D.shape)}")
        if self.offset is not None and self.offset.shape != expected[:-1]:
            raise ValueError(f"the offset has the shape {list(expected[:-1])}, got {list(self.offset.shape)}")

    @property
    def time(self) -> int:
        """Number of tokens."""
        return self.A.shape[-2]

    @property
    def num_states(self) -> int:
        """Numbers of the state: the state expansion times the width."""
        return self.A.shape[-1]

    @property
    def width(self) -> int:
        """Features of an input."""
        return self.B.shape[-1]

    @property
    def out(self) -> int:
        """Features of an output."""
        return self.C.shape[-2]

    def run(
        self, u: Float[Tensor, "*batch time width"], state: Float[Tensor, "*batch state"] | None = None
    ) -> Float[Tensor, "*batch time out"]:
        """Return the outputs ``y`` of inputs, by the recurrence.

        Args:
            u: inputs.
            state: before the first token; zeros if None.

        Raises:
            ValueError: inputs of another shape.
        """
        if u.shape != (*self.B.shape[:-2], self.width):
            raise ValueError(f"inputs have the shape {[*self.B.shape[:-2], self.width]}, got {list(u.shape)}")
        states = diagonal_scan(self.A, (self.B @ u.unsqueeze(-1)).squeeze(-1), state)
        y = (self.C @ states.unsqueeze(-1)).squeeze(-1)
        if self.D is not None:
            y = y + (self.D @ u.unsqueeze(-1)).squeeze(-1)
        return y if self.offset is None else y + self.offset

    def unroll(self) -> Float[Tensor, "*batch time time out width"]:
        """Return the matrix ``Phi`` with ``y = Phi u + e``: blocks ``C_i A_i ... A_{j+1} B_j``, 0 for j > i.

        ``D_i`` is added on the diagonal. It takes work of the order ``time^2 * state * width * out``.
        """
        rows = []
        carried = torch.zeros_like(self.B)
        for i in range(self.time):
            carried = carried * self.A[..., i, :].unsqueeze(-2).unsqueeze(-1)
            carried[..., i, :, :] = self.B[..., i, :, :]
            rows.append(self.C[..., i, :, :].unsqueeze(-3) @ carried)
        phi = torch.stack(rows, dim=-4)
        if self.D is not None:
            diagonal = torch.arange(self.time, device=phi.device)
            phi[..., diagonal, diagonal, :, :] += self.D
        return phi

    def effective_attention(
        self, value: Float[Tensor, "out width"] | None = None, tolerance: float = 1e-6
    ) -> Float[Tensor, "*batch time time"]:
        """Return how much of each input is in each output.

        Args:
            value: the matrix of the values, ``W``. Then the blocks of ``Phi`` are multiples of it, ``w_ij W``, and the
                weights ``w`` are returned. None: the blocks' Frobenius norms, for systems without such a matrix.
            tolerance: largest accepted distance of ``Phi`` from multiples of ``W``, relative to the largest entry.

        Raises:
            ValueError: a matrix of another shape, or blocks that are no multiples of it.
        """
        phi = self.unroll()
        if value is None:
            norms: Tensor = torch.linalg.vector_norm(phi, dim=(-2, -1))
            return norms
        if value.shape != phi.shape[-2:]:
            raise ValueError(f"the values' matrix has the shape {list(phi.shape[-2:])}, got {list(value.shape)}")
        weights = (phi * value).sum((-1, -2)) / value.square().sum()
        residual = relative_distance(weights[..., None, None] * value, phi)
        if not residual <= tolerance:
            raise ValueError(f"the blocks are no multiples of the values' matrix: off by {residual:.3g} of the largest")
        return weights

    def project(
        self,
        *,
        input: Float[Tensor, "*#batch width new_width"] | None = None,
        output: Float[Tensor, "*#batch new_out out"] | None = None,
    ) -> LinearTimeVarying:
        """Return the system with a matrix before it, ``u -> input u``, and one behind it, ``y -> output y``.

        Args:
            input: a matrix, or one a token, ``[..., time, width, new_width]``.
            output: likewise, ``[..., time, new_out, out]``.
        """
        B, C, D, offset = self.B, self.C, self.D, self.offset
        if input is not None:
            B, D = B @ input, None if D is None else D @ input
        if output is not None:
            C, D = output @ C, None if D is None else output @ D
            offset = None if offset is None else (output @ offset.unsqueeze(-1)).squeeze(-1)
        return LinearTimeVarying(self.A, B, C, D, offset)

    def with_offset(self, offset: Float[Tensor, "*#batch #time out"]) -> LinearTimeVarying:
        """Return the system with something more added to its output."""
        offset = offset if self.offset is None else self.offset + offset
        return LinearTimeVarying(self.A, self.B, self.C, self.D, offset.expand(*self.C.shape[:-1]))

    @classmethod
    def parallel(cls, systems: Sequence[LinearTimeVarying]) -> LinearTimeVarying:
        """Return the system whose output is the sum of theirs, for the same inputs; its state holds all of theirs.

        Raises:
            ValueError: no systems, or systems whose shapes do not fit.
        """
        if len({(*system.A.shape[:-1], system.out, system.width) for system in systems}) != 1:
            raise ValueError(
                "parallel systems have the same batch, time, inputs and outputs, got "
                f"{[(*system.A.shape[:-1], system.out, system.width) for system in systems]}"
            )
        D, offset = None, None
        for system in systems:
            if system.D is not None:
                D = system.D if D is None else D + system.D
            if system.offset is not None:
                offset = system.offset if offset is None else offset + system.offset
        return cls(
            torch.cat([system.A for system in systems], dim=-1),
            torch.cat([system.B for system in systems], dim=-2),
            torch.cat([system.C for system in systems], dim=-1),
            D,
            offset,
        )


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference as a share of the largest absolute expected value; 0 where both are zeros."""
    difference = (found - expected).abs().max().item()
    return 0.0 if difference == 0 else difference / max(expected.abs().max().item(), torch.finfo(expected.dtype).tiny)
