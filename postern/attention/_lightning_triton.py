"""Lightning Attention in blocks, as Triton kernels; see `postern.attention._lightning_blocks` for the equations.

All of output and gradients are one sum, forwards or backwards in time, of tensors x, y, z in changing roles:

    out_i = sum_j exp(-slope |i - j|) (x_i . y_j) z_j  over j <= i, or backwards over j >= i

    O: (Q, K, V)    dQ: (dO, V, K)    dK, backwards: (V, dO, Q)    dV, backwards: (K, Q, dO)

Long texts are cut into segments, which run side by side. Three kernels make such a sum: what each segment adds to the
state; the states before the segments, one after the other; the outputs of each segment, block by block, with the state
in registers. Only the states before the segments go through main memory. Sums and states are in float32.

In this module alone annotations are evaluated: Triton reads them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from postern.attention._lightning_blocks import allows_tf32, empty_like_heads, empty_states, register_operator

SEGMENT = 512
IS_INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def _load(x, first, step, column, stride, time, dim):
    """Rows ``first + step`` of x, zeros outside; only the first row's place needs 64 bits."""
    inside = (step[:, None] < time - first) & (column[None, :] < dim)
    place = x + first.to(tl.int64) * stride
    return tl.load(place + step[:, None] * stride.to(tl.int32) + column[None, :], mask=inside, other=0.0)


@triton.jit
def _sums_kernel(
    y, z, slopes, sums,
    y_batch, y_head, y_time, z_batch, z_head, z_time,
    heads, time, y_dim, z_dim,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, Z_BLOCK: tl.constexpr,
    BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the state: ``sum_j decay_j y_j z_j^T``."""
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (row // heads).to(tl.int64), row % heads
    slope = tl.load(slopes + head).to(tl.float32)
    z_tiles = tl.cdiv(z_dim, Z_BLOCK)
    y_column = tile // z_tiles * Y_BLOCK + tl.arange(0, Y_BLOCK)
    z_column = tile % z_tiles * Z_BLOCK + tl.arange(0, Z_BLOCK)
    y += batch * y_batch + head * y_head
    z += batch * z_batch + head * z_head
    start = segment * SEGMENT
    blocks = tl.cdiv(tl.minimum(SEGMENT, time - start), BLOCK)
    step = tl.arange(0, BLOCK)
    state = tl.zeros((Y_BLOCK, Z_BLOCK), dtype=tl.float32)
    for index in range(blocks):
        first = start + (blocks - 1 - index if BACKWARDS else index) * BLOCK
        tokens = tl.minimum(BLOCK, time - first)
        y_block = _load(y, first, step, y_column, y_time, time, y_dim)
        z_block = _load(z, first, step, z_column, z_time, time, z_dim)
        distance = step + 1 if BACKWARDS else tl.maximum(tokens - 1 - step, 0)
        faded = (y_block * tl.exp(-slope * distance)[:, None]).to(y_block.dtype)
        state = state * tl.exp(-slope * tokens)
        state += tl.dot(tl.trans(faded), z_block, input_precision=PRECISION)
    segments = tl.num_programs(1)
    sums += (row.to(tl.int64) * segments + segment) * y_dim * z_dim
    inside = (y_column[:, None] < y_dim) & (z_column[None, :] < z_dim)
    tl.store(sums + y_column[:, None] * z_dim + z_column[None, :], state, mask=inside)


@triton.jit
def _scan_kernel(
    sums, initial, slopes, final,
    heads, time, segments, size,
    SEGMENT: tl.constexpr, TILE: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Put the state before each segment (backwards: after it) in the place of what the segment adds."""
    tile, row = tl.program_id(0), tl.program_id(1)
    slope = tl.load(slopes + row % heads).to(tl.float32)
    index = tile * TILE + tl.arange(0, TILE)
    inside = index < size
    base = row.to(tl.int64) * size + index
    state = tl.load(initial + base, mask=inside, other=0.0)
    for step in range(segments):
        segment = segments - 1 - step if BACKWARDS else step
        place = sums + (row.to(tl.int64) * segments + segment) * size + index
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
        tokens = tl.minimum(SEGMENT, time - segment * SEGMENT)
        state = state * tl.exp(-slope * tokens) + added
    tl.store(final + base, state, mask=inside)


@triton.jit
def _outputs_kernel(
    x, y, z, slopes, states, out,
    x_batch, x_head, x_time, y_batch, y_head, y_time, z_batch, z_head, z_time, out_batch, out_head, out_time,
    state_y, state_z, heads, time, y_dim, z_dim,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, Z_BLOCK: tl.constexpr,
    BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a segment, for some of the columns of z."""
    tile, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (row // heads).to(tl.int64), row % heads
    slope = tl.load(slopes + head).to(tl.float32)
    y_column, z_column = tl.arange(0, Y_BLOCK), tile * Z_BLOCK + tl.arange(0, Z_BLOCK)
    x += batch * x_batch + head * x_head
    y += batch * y_batch + head * y_head
    z += batch * z_batch + head * z_head
    out += batch * out_batch + head * out_head
    segments = tl.num_programs(1)
    states += (row.to(tl.int64) * segments + segment) * y_dim * z_dim
    inside = (y_column[:, None] < y_dim) & (z_column[None, :] < z_dim)
    state = tl.load(states + y_column[:, None] * state_y + z_column[None, :] * state_z, mask=inside, other=0.0)
    start = segment * SEGMENT
    blocks = tl.cdiv(tl.minimum(SEGMENT, time - start), BLOCK)
    step = tl.arange(0, BLOCK)
    apart = step[None, :] - step[:, None] if BACKWARDS else step[:, None] - step[None, :]
    within = tl.where(apart >= 0, tl.exp(-slope * tl.maximum(apart, 0)), 0.0)
    for index in range(blocks):
        first = start + (blocks - 1 - index if BACKWARDS else index) * BLOCK
        tokens = tl.minimum(BLOCK, time - first)
        x_block = _load(x, first, step, y_column, x_time, time, y_dim)
        y_block = _load(y, first, step, y_column, y_time, time, y_dim)
        z_block = _load(z, first, step, z_column, z_time, time, z_dim)
        rise, fall = tl.exp(-slope * (step + 1)), tl.exp(-slope * tl.maximum(tokens - 1 - step, 0))
        enter, leave = (fall, rise) if BACKWARDS else (rise, fall)
        pairs = tl.dot(x_block, tl.trans(y_block), input_precision=PRECISION) * within
        total = tl.dot(pairs.to(z_block.dtype), z_block, input_precision=PRECISION)
        # 16 bits would round the state, and half precision overflow
        total += tl.dot(x_block.to(tl.float32), state, input_precision=PRECISION) * enter[:, None]
        faded = (y_block * leave[:, None]).to(y_block.dtype)
        state = state * tl.exp(-slope * tokens)
        state += tl.dot(tl.trans(faded), z_block, input_precision=PRECISION)
        place = out + first.to(tl.int64) * out_time
        stored = (step[:, None] < time - first) & (z_column[None, :] < z_dim)
        place += step[:, None] * out_time.to(tl.int32) + z_column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=stored)


def triton_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the last state; see `postern.attention.lightning_attention`."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    output, last = _operator(query.to(dtype), key.to(dtype), value.to(dtype), slopes, state, 0)
    return output.to(value.dtype), last


def _num_segments(time: int, block: int) -> int:
    return -(-time // SEGMENT)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_with_close_columns(x) for x in (query, key, value))
    before, last = _states(key, value, slopes, state.contiguous(), is_backwards=False)
    return _outputs(query, key, value, slopes, before, before.shape[4], 1, is_backwards=False), last, before


def _backward(
    grad: Tensor,
    grad_last: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    before: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, grad = (_with_close_columns(x) for x in (query, key, value, grad))
    after, grad_state = _states(query, grad, slopes, grad_last.contiguous(), is_backwards=True)
    columns = before.shape[4]
    grad_query = _outputs(grad, value, key, slopes, before, 1, columns, is_backwards=False)
    grad_key = _outputs(value, grad, query, slopes, after, 1, columns, is_backwards=True)
    grad_value = _outputs(key, query, grad, slopes, after, columns, 1, is_backwards=True)
    return grad_query, grad_key, grad_value, grad_state


def _with_close_columns(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _states(y: Tensor, z: Tensor, slopes: Tensor, initial: Tensor, *, is_backwards: bool) -> tuple[Tensor, Tensor]:
    """States before the segments (backwards: after them), and the one at the end."""
    batch, heads, time, y_dim = y.shape
    z_dim, segments = z.shape[3], _num_segments(time, 0)
    sums, final = empty_states(initial, segments), initial.new_empty(initial.shape)
    y_block, z_block = min(64, _power(y_dim)), min(64, _power(z_dim))
    tiles = triton.cdiv(y_dim, y_block) * triton.cdiv(z_dim, z_block)
    _sums_kernel[tiles, segments, batch * heads](
        y, z, slopes, sums, *y.stride()[:3], *z.stride()[:3], heads, time, y_dim, z_dim,
        SEGMENT=SEGMENT, BLOCK=64, Y_BLOCK=y_block, Z_BLOCK=z_block,
        BACKWARDS=is_backwards, PRECISION=precision(y.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    size, tile = y_dim * z_dim, 1024
    _scan_kernel[triton.cdiv(size, tile), batch * heads](
        sums, initial, slopes, final, heads, time, segments, size,
        SEGMENT=SEGMENT, TILE=tile, BACKWARDS=is_backwards, num_warps=4,
    )  # fmt: skip
    return sums, final


def _outputs(
    x: Tensor, y: Tensor, z: Tensor, slopes: Tensor, states: Tensor, state_y: int, state_z: int, *, is_backwards: bool
) -> Tensor:
    batch, heads, time, y_dim = y.shape
    z_dim = z.shape[3]
    out = empty_like_heads(z)
    block, y_block, z_block, warps = output_sizes(y_dim, z_dim, y.element_size())
    _outputs_kernel[triton.cdiv(z_dim, z_block), _num_segments(time, 0), batch * heads](
        x, y, z, slopes, states, out,
        *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *out.stride()[:3],
        state_y, state_z, heads, time, y_dim, z_dim,
        SEGMENT=SEGMENT, BLOCK=block, Y_BLOCK=y_block, Z_BLOCK=z_block,
        BACKWARDS=is_backwards, PRECISION=precision(y.dtype), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def output_sizes(y_dim: int, z_dim: int, element_size: int) -> tuple[int, int, int, int]:
    """Tokens of a block, columns of y and of z in a tile, and warps of the output kernel."""
    y_block = _power(y_dim)
    is_narrow = y_block * element_size <= 256
    z_block = min(_power(z_dim), 64 if is_narrow else 32)
    return (64 if is_narrow else 32), y_block, z_block, (4 if y_block * element_size <= 128 else 8)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as the user allows for torch's own products. 16-bit inputs lose nothing in tf32."""
    return "ieee" if dtype == torch.float32 and not allows_tf32() else "tf32"


def _power(dim: int) -> int:
    return 1 << max(4, (dim - 1).bit_length())


_operator = register_operator("lightning_triton", _forward, _backward, _num_segments)
