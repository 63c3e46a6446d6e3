"""Flat products in every backend against float64, and the layer that uses them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from postern import _native
from postern.attention import FlatLinear, GemmDispatcher, flat_linear, pack_weight, unpack_weight
from postern.attention.flat_linear import linear_by_rows
from tests.modules import check_module

SETS = _native.instruction_sets()
needs_kernels = pytest.mark.skipif("avx2" not in SETS, reason="no compiled kernels with AVX2")


def every_backend(x, weight, bias):
    yield flat_linear(x, weight, bias, backend="torch")
    for instruction_set in SETS:
        with _native.using(instruction_set):
            yield flat_linear(x, weight, bias, packed=pack_weight(weight), backend="native")


@settings(max_examples=40)
@given(
    rows=st.integers(0, 20),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 70),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_a_linear_layer(rows, outputs, inputs, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for found in every_backend(x, weight, bias):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(unpack_weight(pack_weight(weight), outputs), weight)


def test_more_inputs_than_a_block_of_the_kernel_and_more_threads():
    x, weight = torch.randn(9, 2500), torch.randn(70, 2500)
    expected = F.linear(x.double(), weight.double())
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for found in every_backend(x, weight, None):
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_thirty_two(dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 64), (40, 64), (40,)))
    expected = F.linear(x.double(), weight.double(), bias.double())
    for found in every_backend(x, weight, bias):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_inputs_of_any_shape_and_strides():
    weight = torch.randn(33, 12)
    expected = F.linear(torch.arange(60.0).view(5, 12), weight)
    for found in every_backend(torch.arange(60.0).view(5, 12), weight, None):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for x in (torch.randn(2, 3, 12), torch.randn(12), torch.randn(12, 4).T, torch.randn(4, 24)[:, ::2]):
        for found in every_backend(x, weight, None):
            torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear_by_rows(x, weight, None), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_row():
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    for found in every_backend(x, torch.randn(5, 8), None):
        assert found.isnan().any(1).tolist() == [False, True, False]


X, W = torch.zeros(2, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flat_linear(torch.zeros(2, 5), W), r"got \[2, 5\] and \[3, 4\]"),
        (lambda: flat_linear(X.double(), W), r"torch\.float64 on cpu and torch\.float32"),
        (lambda: flat_linear(X, W, torch.zeros(4)), r"3 elements of torch\.float32, got \[4\]"),
        (lambda: flat_linear(X, W, packed=torch.zeros(1, 4, 16)), r"packed as \[1, 4, 32\], got \[1, 4, 16\]"),
        (lambda: flat_linear(X.clone().requires_grad_(), W), "have no gradient"),
        (lambda: flat_linear(X, W, backend="mkl"), "got 'mkl'"),
        (lambda: pack_weight(torch.zeros(3)), r"\[outputs, inputs\], got \[3\]"),
        (lambda: unpack_weight(torch.zeros(2, 4, 32), 20), r"packed as \[1, 4, 32\], got \[2, 4, 32\]"),
    ],
)
def test_rejects_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@needs_kernels
def test_the_compiled_kernel_needs_packed_weights():
    with pytest.raises(ValueError, match="packed weights in float32, bfloat16 or float16 on the CPU; got none"):
        flat_linear(X, W, backend="native")


# -- the layer --------------------------------------------------------------------------------------------------------


def test_the_layer_survives_what_modules_must():
    check_module(lambda: FlatLinear(12, 40), torch.randn(3, 12))
    check_module(lambda: FlatLinear(12, 40, bias=False).eval(), torch.randn(2, 3, 12))


def test_the_layer_trains_as_a_linear_one_and_infers_flat():
    torch.manual_seed(0)
    linear = nn.Linear(20, 50)
    layer = FlatLinear.from_linear(linear)
    assert layer.training
    assert layer.weight is linear.weight
    x = torch.randn(2, 3, 20, requires_grad=True)
    gradients = [torch.autograd.grad(module(x).square().sum(), x)[0] for module in (layer, linear)]
    torch.testing.assert_close(*gradients)
    layer.eval()
    layer(x)  # gradients
    with torch.no_grad():
        layer(torch.randn(9, 20))  # more than 8 rows
        layer.train()(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.eval()(x).dtype == torch.bfloat16
        assert layer.packed is None
        torch.testing.assert_close(layer(x), linear(x))
        assert (layer.packed is not None) is ("avx2" in SETS)


def test_the_state_is_that_of_a_linear_layer():
    layer = FlatLinear(20, 50).eval()
    linear = nn.Linear(20, 50)
    x = torch.randn(4, 20)
    with torch.no_grad():
        layer(x)
        assert layer.state_dict().keys() == linear.state_dict().keys()
        layer.load_state_dict(linear.state_dict())
        torch.testing.assert_close(layer(x), linear(x))


@needs_kernels
def test_the_packed_copy_follows_the_weights():
    torch.manual_seed(0)
    layer, x = FlatLinear(20, 50).eval(), torch.randn(4, 20)
    with torch.no_grad():
        layer(x)
        packed = layer.packed
        assert packed.shape == (2, 20, 32)
        layer(x)
        assert layer.packed is packed
        copied = copy.deepcopy(layer)
        assert copied.packed is None
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(copied(x), F.linear(x, copied.weight, copied.bias))
        layer.double()
        torch.testing.assert_close(layer(x.double()), F.linear(x.double(), layer.weight, layer.bias))
        assert layer.packed is None
    with torch.inference_mode():
        made_there = FlatLinear(20, 50).eval()
        torch.testing.assert_close(made_there(x), F.linear(x, made_there.weight, made_there.bias))


def test_the_layer_asks_its_dispatcher():
    times = {"gemv": 1.0, "flat": 2.0, "vendor": 3.0}
    dispatcher = GemmDispatcher({(50, 20): {1: times, 4: times | {"gemv": 5.0}, 8: times | {"flat": 5.0, "gemv": 5.0}}})
    layer = FlatLinear(20, 50, dispatcher=dispatcher).eval()
    for rows, packs in ((1, False), (8, False), (30, False), (4, True)):
        x = torch.randn(rows, 20)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert (layer.packed is not None) is (packs and "avx2" in SETS)


def test_the_layer_compiles_with_its_packed_copy():
    torch.manual_seed(0)
    layer, x = FlatLinear(20, 50).eval(), torch.randn(4, 20)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
