"""The Triton programs of `postern.attention._triton_kernels`, which alone imports this module."""

# Triton reads this source: annotations are evaluated, and there is no room for types of postern's own.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _logits(q, k, GROUP_BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """``[groups, dim] x [keys, dim] -> [groups, keys]`` in float32."""
    if GROUP_BLOCK == 1:
        products = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :]
    else:
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return products


@triton.jit
def _weigh(weights, v, GROUP_BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """``[groups, keys] x [keys, dim] -> [groups, dim]`` in float32."""
    if GROUP_BLOCK == 1:
        total = tl.sum(tl.trans(weights) * v.to(tl.float32), axis=0)[None, :]
    else:
        total = tl.dot(weights, v.to(tl.float32), input_precision=PRECISION)
    return total


@triton.jit
def chunk(
    query,
    key,
    value,
    mask,
    numerators,
    denominators,
    origins,
    flags,
    num_keys,
    kv_heads,
    num_splits,
    key_batch,
    key_head,
    key_time,
    key_dim,
    value_batch,
    value_head,
    value_time,
    value_dim,
    mask_batch,
    mask_head,
    mask_time,
    scale,
    phi,
    low,
    high,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_UNIFIED: tl.constexpr,
    IS_CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of the keys of one head, for all the query heads that share it."""
    unit = tl.program_id(0)
    split = tl.program_id(1)
    batch = (unit // kv_heads).to(tl.int64)
    head = (unit % kv_heads).to(tl.int64)
    group = tl.arange(0, GROUP_BLOCK)
    row = unit.to(tl.int64) * GROUPS + group
    d = tl.arange(0, HEAD_BLOCK)
    e = tl.arange(0, VALUE_BLOCK)
    q = tl.load(
        query + row[:, None] * HEAD_DIM + d[None, :],
        mask=(group < GROUPS)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    keys = key + batch * key_batch + head * key_head
    values = value + batch * value_batch + head * value_head
    masks = mask + batch * mask_batch + (head * GROUPS + group)[:, None] * mask_head
    first = tl.cast(num_keys, tl.int64) * split // num_splits
    last = tl.cast(num_keys, tl.int64) * (split + 1) // num_splits
    numerator = tl.zeros((GROUP_BLOCK, VALUE_BLOCK), tl.float32)
    denominator = tl.zeros((GROUP_BLOCK,), tl.float32)
    # The lowest number, as no infinity is subtracted from another.
    origin = tl.full((GROUP_BLOCK,), -3.4028234663852886e38, tl.float32)
    leaves = tl.zeros((GROUP_BLOCK,), tl.int32)
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK).to(tl.int64)
        k = tl.load(
            keys + t[:, None] * key_time + d[None, :] * key_dim,
            mask=(t < last)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        v = tl.load(
            values + t[:, None] * value_time + e[None, :] * value_dim,
            mask=(t < last)[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        logits = scale * _logits(q, k, GROUP_BLOCK, PRECISION)
        allowed = (group < GROUPS)[:, None] & (t < last)[None, :]
        if HAS_MASK:
            allowed = allowed & (tl.load(masks + t[None, :] * mask_time, mask=allowed, other=0) != 0)
        if IS_UNIFIED:
            z = logits - phi
            if IS_CHECKED:
                outside = allowed & ((z <= low) | (z >= high))
                leaves = tl.maximum(leaves, tl.max(outside.to(tl.int32), axis=1))
            weights = tl.where(allowed, tl.exp(z), 0.0)
        else:
            greatest = tl.maximum(origin, tl.max(tl.where(allowed, logits, -float("inf")), axis=1))
            factor = tl.exp(origin - greatest)
            numerator = numerator * factor[:, None]
            denominator = denominator * factor
            origin = greatest
            weights = tl.where(allowed, tl.exp(logits - greatest[:, None]), 0.0)
        denominator += tl.sum(weights, axis=1)
        numerator += _weigh(weights, v, GROUP_BLOCK, PRECISION)
    place = row * num_splits + split
    tl.store(
        numerators + place[:, None] * VALUE_DIM + e[None, :],
        numerator,
        mask=(group < GROUPS)[:, None] & (e < VALUE_DIM)[None, :],
    )
    tl.store(denominators + place, denominator, mask=group < GROUPS)
    tl.store(origins + place, origin, mask=group < GROUPS)
    tl.store(flags + place, leaves, mask=group < GROUPS)


@triton.jit
def combine(
    numerators,
    denominators,
    origins,
    flags,
    out,
    recomputed,
    num_splits,
    least,
    greatest,
    IS_UNIFIED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    """Sum the chunks of one row, and raise its flag where the unified maximum does not fit it."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, VALUE_BLOCK)
    top = -3.4028234663852886e38
    leaves = 0
    numerator = tl.zeros((VALUE_BLOCK,), tl.float32)
    denominator = 0.0
    for start in range(0, num_splits, SPLIT_BLOCK):
        split = start + tl.arange(0, SPLIT_BLOCK)
        is_split = split < num_splits
        place = row * num_splits + split
        parts = tl.load(
            numerators + place[:, None] * VALUE_DIM + e[None, :],
            mask=is_split[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        totals = tl.load(denominators + place, mask=is_split, other=0.0)
        if IS_UNIFIED:
            leaves = tl.maximum(leaves, tl.max(tl.load(flags + place, mask=is_split, other=0), axis=0))
        else:
            tops = tl.load(origins + place, mask=is_split, other=-3.4028234663852886e38)
            higher = tl.maximum(top, tl.max(tops, axis=0))
            factor = tl.exp(top - higher)
            numerator = numerator * factor
            denominator = denominator * factor
            factors = tl.exp(tops - higher)
            parts = parts * factors[:, None]
            totals = totals * factors
            top = higher
        numerator += tl.sum(parts, axis=0)
        denominator += tl.sum(totals, axis=0)
    if IS_UNIFIED:
        is_finite = tl.min((tl.abs(numerator) < float("inf")).to(tl.int32), axis=0)
        fits = (denominator >= least) & (denominator <= greatest) & (leaves == 0) & (is_finite == 1)
        tl.store(recomputed + row, (1 - fits.to(tl.int32)).to(tl.uint8))
    mean = numerator / tl.where(denominator == 0, 1.0, denominator)
    tl.store(out + row * VALUE_DIM + e, mean.to(out.dtype.element_ty), mask=e < VALUE_DIM)


@triton.jit
def repair(
    query,
    key,
    value,
    mask,
    out,
    recomputed,
    num_keys,
    heads,
    groups,
    key_batch,
    key_head,
    key_time,
    key_dim,
    value_batch,
    value_head,
    value_time,
    value_dim,
    mask_batch,
    mask_head,
    mask_time,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute a row again with running maxima where its flag is up; take the flag down where nothing has weight."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(recomputed + row) != 0:
        batch = row // heads
        head = row % heads
        d = tl.arange(0, HEAD_BLOCK)
        e = tl.arange(0, VALUE_BLOCK)
        q = tl.load(query + row * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
        keys = key + batch * key_batch + (head // groups) * key_head
        values = value + batch * value_batch + (head // groups) * value_head
        masks = mask + batch * mask_batch + head * mask_head
        numerator = tl.zeros((VALUE_BLOCK,), tl.float32)
        denominator = 0.0
        origin = -3.4028234663852886e38
        for start in range(0, num_keys, BLOCK):
            t = start + tl.arange(0, BLOCK).to(tl.int64)
            k = tl.load(
                keys + t[:, None] * key_time + d[None, :] * key_dim,
                mask=(t < num_keys)[:, None] & (d < HEAD_DIM)[None, :],
                other=0.0,
            )
            v = tl.load(
                values + t[:, None] * value_time + e[None, :] * value_dim,
                mask=(t < num_keys)[:, None] & (e < VALUE_DIM)[None, :],
                other=0.0,
            )
            logits = scale * tl.sum(q * k.to(tl.float32), axis=1)
            allowed = t < num_keys
            if HAS_MASK:
                allowed = allowed & (tl.load(masks + t * mask_time, mask=allowed, other=0) != 0)
            greatest = tl.maximum(origin, tl.max(tl.where(allowed, logits, -float("inf")), axis=0))
            factor = tl.exp(origin - greatest)
            weights = tl.where(allowed, tl.exp(logits - greatest), 0.0)
            numerator = numerator * factor + tl.sum(weights[:, None] * v.to(tl.float32), axis=0)
            denominator = denominator * factor + tl.sum(weights, axis=0)
            origin = greatest
        is_empty = denominator == 0
        mean = numerator / tl.where(is_empty, 1.0, denominator)
        tl.store(out + row * VALUE_DIM + e, mean.to(out.dtype.element_ty), mask=e < VALUE_DIM)
        tl.store(recomputed + row, (1 - is_empty.to(tl.int32)).to(tl.uint8))


@triton.jit
def flat(
    x,
    weight,
    bias,
    out,
    rows,
    outputs,
    inputs,
    x_row,
    x_input,
    weight_output,
    weight_input,
    HAS_BIAS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
    INPUT_BLOCK: tl.constexpr,
):
    """Some outputs of up to 64 rows: ``out^T = W x^T``, over the inputs in order."""
    n = tl.program_id(0).to(tl.int64) * OUTPUT_BLOCK + tl.arange(0, OUTPUT_BLOCK)
    m = tl.program_id(1).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    total = tl.zeros((OUTPUT_BLOCK, ROW_BLOCK), tl.float32)
    for start in range(0, inputs, INPUT_BLOCK):
        k = start + tl.arange(0, INPUT_BLOCK)
        w = tl.load(
            weight + n[:, None] * weight_output + k[None, :] * weight_input,
            mask=(n < outputs)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        a = tl.load(
            x + m[None, :] * x_row + k[:, None] * x_input,
            mask=(m < rows)[None, :] & (k < inputs)[:, None],
            other=0.0,
        )
        total = tl.dot(w, a, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + m[None, :] * outputs + n[:, None],
        total.to(out.dtype.element_ty),
        mask=(m < rows)[None, :] & (n < outputs)[:, None],
    )


@triton.jit
def block_sparse(
    query,
    key,
    value,
    out,
    first,
    columns,
    has_own,
    time,
    num_blocks,
    heads,
    groups,
    query_batch,
    query_head,
    query_time,
    key_batch,
    key_head,
    key_time,
    value_batch,
    value_head,
    value_time,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of queries, which goes through the earlier blocks of keys on its list and then its own, if it is kept.

    Later blocks of queries have longer lists, and the last ones may keep all; they start first.
    """
    index = num_blocks - 1 - tl.program_id(0)
    unit = tl.program_id(1)
    batch = (unit // heads).to(tl.int64)
    head = (unit % heads).to(tl.int64)
    kv_head = head // groups
    row = unit.to(tl.int64) * num_blocks + index
    step = tl.arange(0, BLOCK)
    d = tl.arange(0, HEAD_BLOCK)
    e = tl.arange(0, VALUE_BLOCK)
    t = index * BLOCK + step
    is_token = t < time
    t = t.to(tl.int64)
    q = tl.load(
        query + batch * query_batch + head * query_head + t[:, None] * query_time + d[None, :],
        mask=is_token[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    keys = key + batch * key_batch + kv_head * key_head + d[:, None]
    values = value + batch * value_batch + kv_head * value_head + e[None, :]
    numerator = tl.zeros((BLOCK, VALUE_BLOCK), tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    # The lowest number, as no infinity is subtracted from another.
    origin = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    # exp2 is what the hardware has
    factor = scale * 1.4426950408889634
    for place in range(tl.load(first + row), tl.load(first + row + 1)):
        earlier = tl.load(columns + place) * BLOCK + step.to(tl.int64)
        k = tl.load(keys + earlier[None, :] * key_time, mask=(d < HEAD_DIM)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * factor
        greatest = tl.maximum(origin, tl.max(logits, axis=1))
        weights = tl.exp2(logits - greatest[:, None])
        shrunk = tl.exp2(origin - greatest)
        origin = greatest
        denominator = denominator * shrunk + tl.sum(weights, axis=1)
        v = tl.load(values + earlier[:, None] * value_time, mask=(e < VALUE_DIM)[None, :], other=0.0)
        numerator = numerator * shrunk[:, None]
        numerator = tl.dot(weights.to(v.dtype), v, numerator, input_precision=PRECISION)
    if tl.load(has_own + row) != 0:
        k = tl.load(keys + t[None, :] * key_time, mask=is_token[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * factor
        logits = tl.where(step[:, None] >= step[None, :], logits, -3.4028234663852886e38)
        greatest = tl.maximum(origin, tl.max(logits, axis=1))
        weights = tl.where(step[:, None] >= step[None, :], tl.exp2(logits - greatest[:, None]), 0.0)
        shrunk = tl.exp2(origin - greatest)
        denominator = denominator * shrunk + tl.sum(weights, axis=1)
        v = tl.load(values + t[:, None] * value_time, mask=is_token[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
        numerator = numerator * shrunk[:, None]
        numerator = tl.dot(weights.to(v.dtype), v, numerator, input_precision=PRECISION)
    mean = numerator / tl.where(denominator == 0, 1.0, denominator)[:, None]
    tl.store(
        out + (unit.to(tl.int64) * time + t)[:, None] * VALUE_DIM + e[None, :],
        mean.to(out.dtype.element_ty),
        mask=is_token[:, None] & (e < VALUE_DIM)[None, :],
    )
