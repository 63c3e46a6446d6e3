"""Attention of one query over chunks of the keys, in every backend, against softmax attention in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern import _native
from postern.attention import SplitDecodingAttention, UnifiedMax, decode_attention, unified_decode_attention
from postern.attention.split_decoding import _operator
from postern.errors import Unavailable
from tests.modules import check_module

NATIVE = [("native", name) for name in _native.instruction_sets()]
BACKENDS = [("torch", None), *NATIVE]
FORMS = [("synchronised", "safe"), ("unified", "safe"), ("unified", "paper")]


@pytest.fixture(params=BACKENDS, ids=lambda backend: "-".join(filter(None, backend)))
def backend(request):
    name, instruction_set = request.param
    if instruction_set is None:
        yield name
    else:
        with _native.using(instruction_set):
            yield name


def tensors(batch, heads, kv_heads, keys, head_dim, value_dim=None, *, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = (scale * normal(batch, heads, 1, head_dim)).to(dtype)
    return query, normal(batch, kv_heads, keys, head_dim), normal(batch, kv_heads, keys, value_dim or head_dim)


def reference(query, key, value, mask=None, scale=None):
    """In float64; zeros for rows that may attend to nothing."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = (query.shape[-1] ** -0.5 if scale is None else scale) * query @ key.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ value


def assert_near(found, expected, tolerance=2e-6):
    """Relative to the length of each row; values are of size 1, and may cancel."""
    error = (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(0.2)
    assert error.max() <= tolerance, error.max()


@pytest.mark.parametrize(("form", "check"), FORMS)
@settings(max_examples=25)
@given(
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    keys=st.integers(1, 150),
    head_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    splits=st.integers(1, 7),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_softmax_attention(form, check, groups, kv_heads, keys, head_dim, value_dim, splits, masked, seed):
    query, key, value = tensors(2, groups * kv_heads, kv_heads, keys, head_dim, value_dim, seed=seed)
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    unified = UnifiedMax(0.5, -2.0, 2.0) if form == "unified" else None
    expected = reference(query, key, value, None if mask is None else mask[:, None, None])
    for name, instruction_set in BACKENDS:
        if instruction_set is None:
            found = decode_attention(
                query, key, value, mask, num_splits=splits, unified=unified, check=check, backend=name
            )
        else:
            with _native.using(instruction_set):
                found = decode_attention(
                    query, key, value, mask, num_splits=splits, unified=unified, check=check, backend=name
                )
        assert found.shape == (2, groups * kv_heads, 1, value_dim)
        assert_near(found, expected)


@pytest.mark.parametrize(("form", "check"), FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_thirty_two(backend, dtype, form, check):
    query, key, value = tensors(2, 4, 2, 70, 24, scale=3.0, dtype=dtype)
    unified = UnifiedMax(-12.0, -30.0, 40.0) if form == "unified" else None  # e^12 and more, beyond float16
    found = decode_attention(query, key, value, num_splits=3, unified=unified, check=check, backend=backend)
    assert found.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), reference(query, key, value), rtol=tolerance, atol=tolerance / 100)


def test_float64_in_tensor_operations():
    query, key, value = tensors(2, 4, 2, 70, 24, dtype=torch.float64)
    for unified in (None, UnifiedMax(1.0)):
        found = decode_attention(query, key, value, num_splits=4, unified=unified)
        torch.testing.assert_close(found, reference(query, key, value), rtol=1e-12, atol=1e-12)


def test_rows_that_leave_the_range_are_computed_again_and_no_others(backend):
    """Logits that are exact: the query picks a coordinate of the keys."""
    phi = 3.0
    logits = torch.randn(8, 200)
    logits[1, 7] = phi + 200  # overflows
    logits[2] = phi - 200  # all underflow
    logits[3, 150] = phi + 33
    logits[4] = phi - 33 - math.log(200)
    logits[5, 150] = phi + 31
    logits[6, :100] = -math.inf
    query, key, value = torch.zeros(1, 8, 1, 16), torch.randn(1, 8, 200, 16), torch.randn(1, 8, 200, 16)
    query[..., 0], key[0, :, :, 0] = 1, logits
    found, recomputed = unified_decode_attention(
        query, key, value, UnifiedMax(phi), scale=1.0, num_splits=4, backend=backend
    )
    assert recomputed.tolist() == [[False, True, True, True, True, False, False, False]]
    assert_near(found, torch.softmax(logits.double(), -1)[None, :, None] @ value.double())
    assert found.isfinite().all()

    narrow = UnifiedMax(phi, -6.0, 30.0)
    logits[:] = torch.linspace(-1, 1, 200)
    logits[1, 0], logits[2, 199], logits[3, 50] = phi - 6.0, phi + 30.0, phi + 29.9
    key[0, :, :, 0] = logits
    found, recomputed = unified_decode_attention(
        query, key, value, narrow, scale=1.0, num_splits=4, check="paper", backend=backend
    )
    assert recomputed[0].nonzero()[:, 0].tolist() == [1, 2]
    assert_near(found, torch.softmax(logits.double(), -1)[None, :, None] @ value.double())


def test_values_that_overflow_the_sum_are_computed_again(backend):
    query, key, value = tensors(1, 2, 2, 50, 8)
    value[:, 0] *= 1e37
    unified = UnifiedMax(-20.0)  # every weight is about e^20
    found, recomputed = unified_decode_attention(query, key, value, unified, backend=backend)
    assert recomputed.tolist() == [[True, False]]
    assert_near(found[:, 1:], reference(query, key, value)[:, 1:])
    assert_near(found[:, :1] / 1e37, reference(query, key, value / 1e37)[:, :1], 1e-5)


@pytest.mark.parametrize(("form", "check"), FORMS)
def test_masks(backend, form, check):
    query, key, value = tensors(3, 4, 2, 60, 8)
    generator = torch.Generator().manual_seed(2)
    unified = UnifiedMax(0.0, -9.0, 9.0) if form == "unified" else None
    key[:, :, ::7] = 1e4  # masked below: never seen, never tested
    usual = torch.rand(3, 60, generator=generator) < 0.5
    usual[:, ::7] = False
    by_head = (torch.rand(3, 4, 1, 60, generator=generator) < 0.5) & usual[:, None, None]
    nothing = usual.clone()
    nothing[1] = False
    for mask in (usual, by_head, nothing, usual[:1, None, None], by_head[:, :1], by_head[:1]):
        found = decode_attention(query, key, value, mask, num_splits=5, unified=unified, check=check, backend=backend)
        full = (mask[:, None, None] if mask.dim() == 2 else mask).expand(3, 4, 1, 60)
        assert_near(found, reference(query, key, value, full))
    if unified is not None:
        found, recomputed = unified_decode_attention(
            query, key, value, unified, nothing, num_splits=5, check=check, backend=backend
        )
        assert not recomputed.any()
        assert (found[1] == 0).all()


def test_keys_and_values_of_any_strides(backend):
    query, key, value = tensors(2, 4, 2, 50, 8)
    by_time = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]  # [batch, time, heads, dim]
    by_dim = [x.mT.contiguous().mT for x in (key, value)]
    slices = [torch.cat([x, x], 2)[:, :, :50] for x in (key, value)]  # of a cache with more room
    shared = [x[:1].expand(2, -1, -1, -1) for x in (key, value)]
    for k, v in (by_time, by_dim, slices, shared):
        for unified in (None, UnifiedMax(1.0)):
            found = decode_attention(query, k, v, num_splits=3, unified=unified, backend=backend)
            assert_near(found, reference(query, k, v))


def test_the_number_of_threads_changes_nothing(backend):
    query, key, value = tensors(2, 4, 2, 300, 16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(decode_attention(query, key, value, num_splits=7, unified=UnifiedMax(1.0), backend=backend))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(
        *results, rtol=0 if backend == "native" else 1e-6, atol=0 if backend == "native" else 1e-6
    )


def test_scale_and_chunks(backend):
    query, key, value = tensors(1, 2, 2, 600, 8)
    for scale, splits in itertools.product((None, 0.7), (None, 1, 599, 5000)):
        found = decode_attention(query, key, value, scale=scale, num_splits=splits, backend=backend)
        assert_near(found, reference(query, key, value, scale=scale))


def test_nan_stays_in_its_head(backend):
    query, key, value = tensors(1, 2, 2, 30, 8)
    key[0, 0, 3, 0] = math.nan
    for unified in (None, UnifiedMax(0.0)):
        found = decode_attention(query, key, value, num_splits=2, unified=unified, backend=backend)
        assert found[0, 0].isnan().all()
        assert_near(found[:, 1:], reference(query, key, value)[:, 1:])


def test_a_disabled_constant_is_not_used():
    query, key, value = tensors(1, 2, 2, 30, 8)
    disabled = decode_attention(query, key, value, unified=UnifiedMax(5.0, enabled=False))
    assert torch.equal(disabled, decode_attention(query, key, value))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unified", [None, UnifiedMax(0.4), UnifiedMax(900.0)])
def test_gradients(unified, masked):
    inputs = tensors(2, 2, 1, 4, 2, 3, dtype=torch.float64)
    for x in inputs:
        x.requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool)
    if masked:
        mask[0, 2:] = mask[1] = False

    def attend(query, key, value):
        return decode_attention(query, key, value, mask, num_splits=2, unified=unified)

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


def test_the_operator_keeps_its_promises_and_compiles():
    query, key, value = tensors(2, 4, 2, 40, 8)
    mask = torch.rand(2, 4, 40) < 0.7
    for phi in (None, 1.0):
        torch.library.opcheck(
            _operator,
            (query[:, :, 0].clone().requires_grad_(), key, value, mask, 0.3, 3, phi, None, None, "torch"),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, key, value):
        return decode_attention(query, key, value, unified=UnifiedMax(1.0), num_splits=2)

    for x in (query, key):
        x.requires_grad_()
    found, expected = step(query, key, value), reference(query, key, value)
    assert_near(found.detach(), expected.detach())
    gradients = torch.autograd.grad(found.square().sum(), (query, key))
    for gradient, other in zip(gradients, torch.autograd.grad(expected.square().sum(), (query, key)), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_the_layer_decodes_with_the_kernels_in_float32_and_bfloat16():
    torch.manual_seed(0)
    layer = SplitDecodingAttention(
        24, 6, num_kv_heads=2, is_causal=True, rotary_base=100.0, has_qk_norm=True, unified=UnifiedMax(0.0)
    )
    x = torch.randn(2, 9, 24)
    layer.eval()
    with torch.no_grad():
        expected = layer(x)
        for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.05)):
            cache = layer.new_cache()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                steps = [layer(x[:, t : t + 1], cache=cache) for t in range(9)]
            torch.testing.assert_close(torch.cat(steps, 1).float(), expected, rtol=tolerance, atol=tolerance)
    assert "phi=0" in repr(layer)
    assert "synchronised" in repr(SplitDecodingAttention(8, 2))


def test_a_single_token_survives_what_modules_must():
    check_module(
        lambda: SplitDecodingAttention(24, 6, num_kv_heads=3, unified=UnifiedMax(0.0), num_splits=2),
        torch.randn(2, 1, 24),
    )


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    layer = SplitDecodingAttention(8, 2, dropout=0.9)
    x = torch.randn(64, 1, 8)
    assert (layer(x) - layer.eval()(x)).abs().max() > 1e-3
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)


def bad(**changes):
    query, key, value = tensors(2, 4, 2, 6, 8)
    return {"query": query, "key": key, "value": value} | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(query=torch.zeros(2, 4, 2, 8)), r"\[batch, heads, 1, head_dim\].*\[2, 4, 2, 8\]"),
        (bad(query=torch.zeros(2, 3, 1, 8)), r"heads that divide its own; got query \[2, 3, 1, 8\]"),
        (bad(query=torch.zeros(1, 4, 1, 8)), "have the query's batch"),
        (bad(value=torch.zeros(2, 2, 5, 8)), r"value \[2, 2, 5, 8\]"),
        (bad(key=torch.zeros(2, 2, 0, 8), value=torch.zeros(2, 2, 0, 8)), "at least one key"),
        (bad(key=torch.zeros(2, 2, 6, 8, dtype=torch.float64)), r"torch\.float32, torch\.float64"),
        (bad(num_splits=0), "num_splits is at least 1, got 0"),
        (bad(mask=torch.ones(2, 6)), r"boolean.*torch\.float32"),
        (bad(mask=torch.ones(2, 5, dtype=torch.bool)), r"got \[2, 1, 1, 5\]"),
        (bad(mask=torch.ones(3, 6, dtype=torch.bool)), r"broadcasts to \[2, 4, 1, 6\], got \[3, 1, 1, 6\]"),
        (bad(check="none"), "got 'none'"),
        (bad(backend="cuda"), "auto, torch, native, triton; got 'cuda'"),
    ],
)
def test_rejects_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels")
def test_the_compiled_kernels_refuse_what_they_cannot():
    query, key, value = tensors(1, 2, 2, 6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16 on the CPU; got torch\.float64"):
        decode_attention(query, key, value, backend="native")


def test_triton_on_the_cpu_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query, key, value = tensors(1, 2, 2, 6, 8)
    with pytest.raises(Unavailable, match=r"pip install triton|TRITON_INTERPRET=1"):
        decode_attention(query, key, value, backend="triton")


def test_rejects_impossible_layers():
    with pytest.raises(ValueError, match="num_splits is at least 1, got 0"):
        SplitDecodingAttention(8, 2, num_splits=0)
    with pytest.raises(ValueError, match="got 'never'"):
        SplitDecodingAttention(8, 2, check="never")
