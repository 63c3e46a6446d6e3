"""Lightning Attention in blocks, in plain torch: operators with backward passes of their own.

The weight of key s for query t is ``exp(-slope (t - s))``. Cut into blocks of B tokens, where i and j count within a
block, all that crosses a boundary goes through the state S at the last token before it, and backwards through the
gradient E of the state at a block's last token:

    O = ((Q K^T) * D) V + rise * (Q S)        D_ij = exp(-slope (i - j)) for i >= j, else 0
    S <- exp(-slope B) S + (fall * K)^T V     rise_i = exp(-slope (i + 1))
                                              fall_i = exp(-slope (B - 1 - i))
    dQ = ((dO V^T) * D) K + rise * (dO S^T)
    dK = ((dO V^T) * D)^T Q + fall * (V E^T)
    dV = ((Q K^T) * D)^T dO + fall * (K E)
    E <- exp(-slope B) E + (rise * Q)^T dO    from the last block to the first

No exponent is positive. Blocks are taken several at once, a segment, so that products come in batches and a long text
costs few steps. The states within a segment follow from the one before it by one more product with a matrix of decays.
The forward pass keeps the states before the segments alone, and the backward pass makes the others again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postern.precision import without_autocast

_SEGMENT = 512  # tokens of a segment, about; a longer block is a segment of its own
_MOST_BLOCKS = 16  # of a segment, as the matrix of their decays has the square of it
_ROWS = 2048  # tokens, counted by head, that a thread works on at once: what fits its cache

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]
]
Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def fading(slopes: Tensor, time: int) -> Tensor:
    """``exp(-slope (i - j))`` for i >= j, else 0: ``[heads, time, time]``."""
    steps = torch.arange(time, device=slopes.device, dtype=slopes.dtype)
    distance = steps[:, None] - steps
    weights = torch.exp(-slopes[:, None, None] * distance.clamp_min(0))
    return torch.where(distance >= 0, weights, 0.0)


def allows_tf32() -> bool:
    """Whether torch's products of float32 matrices on CUDA devices may round to tf32."""
    allowed: str = torch.backends.cuda.matmul.fp32_precision
    return allowed == "tf32"


def empty_like_heads(x: Tensor) -> Tensor:
    """An empty ``[batch, heads, time, dim]`` whose heads lie side by side, so that merging them copies nothing."""
    batch, heads, time, dim = x.shape
    return x.new_empty((batch, time, heads, dim)).transpose(1, 2)


def empty_states(state: Tensor, segments: int) -> Tensor:
    """Room for the states before the segments: ``[batch, heads, segments, key_dim, value_dim]``."""
    return state.new_empty((*state.shape[:2], segments, *state.shape[2:]))


def register_operator(
    name: str, forward: Forward, backward: Backward, num_segments: Callable[[int, int], int]
) -> Operator:
    """Make an operator of a forward and a backward pass; autograd and ``torch.compile`` see it as one step.

    Args:
        name: of the operator in the namespace "postern".
        forward: ``(query, key, value, slopes, state, block) -> (output, last state, states before the segments)``.
        backward: ``(grad of the output, grad of the last state, query, key, value, slopes, states before the segments,
            block) -> gradients of (query, key, value, state)``.
        num_segments: how many there are, from the tokens of the text and of a block.
    """
    run = torch.library.custom_op(
        f"postern::{name}",
        forward,
        mutates_args=(),
        schema="(Tensor query, Tensor key, Tensor value, Tensor slopes, Tensor state, int block) "
        "-> (Tensor, Tensor, Tensor)",
    )
    run_backward = torch.library.custom_op(
        f"postern::{name}_backward",
        backward,
        mutates_args=(),
        schema="(Tensor grad, Tensor grad_last, Tensor query, Tensor key, Tensor value, Tensor slopes, Tensor before, "
        "int block) -> (Tensor, Tensor, Tensor, Tensor)",
    )

    def fake(
        query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor, block: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = empty_states(state, num_segments(query.shape[2], block))
        return empty_like_heads(value), state.new_empty(state.shape), before

    def fake_backward(
        grad: Tensor,
        grad_last: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slopes: Tensor,
        before: Tensor,
        block: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value = (empty_like_heads(x) for x in (query, key, value))
        return query, key, value, grad_last.new_empty(grad_last.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.block = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    def differentiate(ctx: Any, grad: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, slopes, state, last, before = ctx.saved_tensors
        grad_query, grad_key, grad_value, grad_state = run_backward(
            grad, grad_last, query, key, value, slopes, before, ctx.block
        )
        grad_slopes = None
        if ctx.needs_input_grad[3]:
            grad_slopes = _slope_gradient(
                (query, grad_query), (key, grad_key), (state, grad_state), (last, grad_last)
            ).to(slopes.dtype)
        return grad_query, grad_key, grad_value, grad_slopes, grad_state, None

    run.register_fake(fake)
    run_backward.register_fake(fake_backward)
    run.register_autograd(differentiate, setup_context=setup_context)

    def operator(
        query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor, block: int
    ) -> tuple[Tensor, Tensor]:
        output, last, _ = run(query, key, value, slopes, state, block)
        return output, last

    return operator


Pair = tuple[Tensor, Tensor]


def _slope_gradient(query: Pair, key: Pair, state: Pair, last: Pair) -> Tensor:
    """The gradient by the slopes, from each tensor and its gradient.

    A product of a key at s with a query at t fades by ``exp(-slope (t - s))``, so that its share of the gradient is
    ``-(t - s)`` times its value. Queries and keys times their gradients are sums of these values by t and by s. The
    first state stands before token 0, the last one at the last token.
    """
    time = query[0].shape[2]
    steps = torch.arange(time, device=query[0].device, dtype=torch.float64)
    ends, starts = ((x.double() * grad.double()).sum((0, 3)) @ steps for x, grad in (query, key))
    first, final = ((x.double() * grad.double()).sum((0, 2, 3)) for x, grad in (state, last))
    return starts - ends - first - (time - 1) * final


# -- in blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """A segment, or the last tokens, which fill no block and are one of their own length.

    Attributes:
        tokens: where it is.
        blocks: how many blocks it has.
        inside: D by head, ``[heads, 1, block, block]``.
        rise: by head, ``[heads, 1, block, 1]``.
        fall: by head, ``[heads, 1, block, 1]``.
        across: D for states and whole blocks, ``[heads, blocks + 1, blocks + 1]``.
    """

    tokens: slice
    blocks: int
    inside: Tensor
    rise: Tensor
    fall: Tensor
    across: Tensor

    def of_heads(self, heads: slice) -> _Piece:
        """The same for some heads."""
        decays = (x[heads] for x in (self.inside, self.rise, self.fall, self.across))
        return _Piece(self.tokens, self.blocks, *decays)

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the piece of ``[batch, heads, time, dim]``, as ``[batch, heads, blocks, block, dim]``."""
        part = x[:, :, self.tokens]
        copy = part.new_empty(part.shape, dtype=dtype).copy_(part)
        return copy.view(*part.shape[:2], self.blocks, -1, part.shape[3])

    def states(self, first: Tensor, added: Tensor) -> Tensor:
        """The states before each block and after the last, from the first and what the blocks add."""
        all_states = self.across @ torch.cat([first[:, :, None], added], 2).flatten(3)
        return all_states.view(*all_states.shape[:3], *added.shape[3:])

    def ends(self, last: Tensor, added: Tensor) -> Tensor:
        """What reaches the last token before the piece and that of each block, backwards."""
        all_ends = self.across.mT @ torch.cat([added, last[:, :, None]], 2).flatten(3)
        return all_ends.view(*all_ends.shape[:3], *added.shape[3:])


def _steps(time: int, block: int) -> Iterator[tuple[int, int, int]]:
    """First token, next after the last, and tokens a block, of each piece."""
    whole = time - time % block
    step = block * _blocks_at_once(block)
    for start in range(0, whole, step):
        yield start, min(start + step, whole), block
    if whole < time:
        yield whole, time, time - whole


def _blocks_at_once(block: int) -> int:
    return min(_MOST_BLOCKS, max(1, _SEGMENT // block))


def _num_pieces(time: int, block: int) -> int:
    whole = time // block
    return -(-whole // _blocks_at_once(block)) + -(-(time - whole * block) // block)


def _pieces(slopes: Tensor, time: int, block: int) -> list[_Piece]:
    decays: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    pieces = []
    for start, stop, size in _steps(time, block):
        blocks = (stop - start) // size
        if (blocks, size) not in decays:
            steps = torch.arange(size, device=slopes.device, dtype=slopes.dtype)
            decays[blocks, size] = (
                fading(slopes, size)[:, None],
                torch.exp(-slopes[:, None] * (steps + 1))[:, None, :, None],
                torch.exp(-slopes[:, None] * (size - 1 - steps))[:, None, :, None],
                fading(slopes * size, blocks + 1),
            )
        pieces.append(_Piece(slice(start, stop), blocks, *decays[blocks, size]))
    return pieces


def _shares(query: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sequences and heads that are worked on at once: all of them, or on the CPU what fits the cache."""
    batch, heads = query.shape[:2]
    rows = max(1, _ROWS * torch.get_num_threads() // _SEGMENT) if query.device.type == "cpu" else batch * heads
    some, several = max(1, rows // heads), min(heads, rows)
    for row in range(0, batch, some):
        for head in range(0, heads, several):
            yield slice(row, row + some), slice(head, head + several)


def _chunk_forward(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    time, dtype = query.shape[2], state.dtype
    output, last = empty_like_heads(value), state.new_empty(state.shape)
    before = empty_states(state, _num_pieces(time, block))
    with without_autocast(query.device):
        pieces = _pieces(slopes, time, block)
        for share in _shares(query):
            current = state[share]
            for index, whole in enumerate(pieces):
                piece = whole.of_heads(share[1])
                before[share][:, :, index] = current
                q, k, v = (piece.cut(x[share], dtype) for x in (query, key, value))
                states = piece.states(current, (k * piece.fall).mT @ v)
                current = states[:, :, -1]
                pairs = (q @ k.mT).mul_(piece.inside)
                outputs = _add_products(q.mul_(piece.rise) @ states[:, :, :-1], pairs, v)
                output[share][:, :, piece.tokens] = outputs.flatten(2, 3)
            last[share] = current
    return output, last, before


def _chunk_backward(
    grad: Tensor,
    grad_last: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    before: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    time, dtype = query.shape[2], before.dtype
    grads = [empty_like_heads(x) for x in (query, key, value)]
    grad_state = grad_last.new_empty(grad_last.shape)
    with without_autocast(query.device):
        pieces = _pieces(slopes, time, block)
        for share in _shares(query):
            end = grad_last[share]
            for index, whole in reversed(list(enumerate(pieces))):
                piece = whole.of_heads(share[1])
                q, k, v, g = (piece.cut(x[share], dtype) for x in (query, key, value, grad))
                faded_q, faded_k = q * piece.rise, k * piece.fall
                states = piece.states(before[share][:, :, index], faded_k.mT @ v)[:, :, :-1]
                ends = piece.ends(end, faded_q.mT @ g)
                end, ends = ends[:, :, 0], ends[:, :, 1:]
                pairs, grad_pairs = (q @ k.mT).mul_(piece.inside), (g @ v.mT).mul_(piece.inside)
                found = (
                    _add_products((g @ states.mT).mul_(piece.rise), grad_pairs, k),
                    _add_products((v @ ends.mT).mul_(piece.fall), grad_pairs.mT, q),
                    _add_products(faded_k @ ends, pairs.mT, g),
                )
                for whole_grad, part in zip(grads, found, strict=True):
                    whole_grad[share][:, :, piece.tokens] = part.flatten(2, 3)
            grad_state[share] = end
    return grads[0], grads[1], grads[2], grad_state


def _add_products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``x + first @ second`` of many matrices, in place."""
    x.flatten(0, 2).baddbmm_(first.flatten(0, 2), second.flatten(0, 2))
    return x


chunk_attention = register_operator("lightning_chunk", _chunk_forward, _chunk_backward, _num_pieces)


# -- in tiles ----------------------------------------------------------------------------------------------------------


def _tiled_forward(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's forward pass: row of tiles by row of tiles, up to the diagonal; the state is left as it is."""
    output = empty_like_heads(value)
    with without_autocast(query.device):
        inside, rise, fall, over = _tile_decays(slopes, block)
        keys, values = torch.split(key, block, 2), torch.split(value, block, 2)
        for row, q in enumerate(torch.split(query, block, 2)):
            tokens = q.shape[2]
            total = (q @ keys[row].mT * inside[:, :tokens, :tokens]) @ values[row]
            q = q * rise[:, :tokens]
            for column in reversed(range(row)):
                total += (q @ (keys[column] * fall).mT) @ values[column]
                q = q * over
            output[:, :, row * block : row * block + tokens] = total
    return output, state.clone(memory_format=torch.contiguous_format), empty_states(state, 0)


def _tiled_backward(
    grad: Tensor,
    grad_last: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    before: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The paper's backward pass, over the same tiles."""
    grads = [empty_like_heads(x).zero_() for x in (query, key, value)]
    with without_autocast(query.device):
        inside, rise, fall, over = _tile_decays(slopes, block)
        tiles = list(zip(*(torch.split(x, block, 2) for x in (query, key, value, grad, *grads)), strict=True))
        for row, (q, k, v, g, grad_q, grad_k, grad_v) in enumerate(tiles):
            tokens = q.shape[2]
            within = inside[:, :tokens, :tokens]
            pairs, grad_pairs = q @ k.mT * within, g @ v.mT * within
            grad_q += grad_pairs @ k
            grad_k += grad_pairs.mT @ q
            grad_v += pairs.mT @ g
            weight = rise[:, :tokens]
            for _, k, v, _, _, grad_k, grad_v in reversed(tiles[:row]):
                faded_q, faded_k, grad_pairs = q * weight, k * fall, g @ v.mT
                grad_q += grad_pairs @ faded_k * weight
                grad_k += grad_pairs.mT @ faded_q * fall
                grad_v += (faded_k @ faded_q.mT) @ g
                weight = weight * over
    return grads[0], grads[1], grads[2], grad_last.clone(memory_format=torch.contiguous_format)


def _tile_decays(slopes: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays by head on the diagonal, from a tile's start, to its end, and over a whole tile."""
    steps = torch.arange(block, device=slopes.device, dtype=slopes.dtype)
    slope = slopes[:, None, None]
    return (
        fading(slopes, block),
        torch.exp(-slope * (steps[:, None] + 1)),
        torch.exp(-slope * (block - 1 - steps[:, None])),
        torch.exp(-slope * block),
    )


_tiled = register_operator("lightning_tiled", _tiled_forward, _tiled_backward, lambda time, block: 0)


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, block: int) -> Tensor:
    """The paper's kernel, over tiles of the pairs of tokens; dtypes must be equal."""
    state = query.new_zeros((*query.shape[:2], query.shape[3], value.shape[3]))
    return _tiled(query, key, value, slopes, state, block)[0]
