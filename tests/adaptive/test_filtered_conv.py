"""The compiled convolution of chosen filters, with every set of instructions, against PyTorch's in float64."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from postern import _native
from postern.adaptive import DynamicConvBlock, MaskPredictor, count_macs
from postern.adaptive._filtered_conv import can_run, filtered_conv, output_size
from postern.errors import Unavailable

VECTORS = [name for name in _native.instruction_sets() if name != "portable"]
pytestmark = pytest.mark.skipif(not VECTORS, reason="no compiled kernels, or no vectors for them")
ACTS = (None, nn.ReLU(), nn.ReLU6())


@pytest.fixture(params=VECTORS)
def instructions(request):
    with _native.using(request.param):
        yield request.param


@contextmanager
def threads_of_torch(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def case(conv, samples, height, width, seed=0, density=0.6):
    """Inputs, which of their channels are on, which filters are, and residuals."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 * torch.randn(samples, conv.in_channels, height, width, generator=generator)
    active = torch.rand(samples, conv.in_channels, generator=generator) < density
    mask = torch.rand(samples, conv.out_channels, generator=generator) < density
    shape = (samples, conv.out_channels, *output_size(conv, height, width))
    return inputs, active, mask, torch.randn(shape, generator=generator)


def expected(conv, act, inputs, active, mask, residual):
    """PyTorch's convolution of everything in float64, then the masks."""
    inputs = inputs.double() if active is None else inputs.double() * active[:, :, None, None]
    output = nn.functional.conv2d(
        inputs, conv.weight.double(), conv.bias.double(), conv.stride, conv.padding, conv.dilation, conv.groups
    )
    output = output if residual is None else output + residual.double()
    output = output if act is None else act(output)
    return (output * mask[:, :, None, None]).float()


def check(conv, act, inputs, active, mask, residual):
    with torch.no_grad():
        found = filtered_conv(conv, conv.weight, conv.bias, act, inputs, active, mask, residual)
    torch.testing.assert_close(found, expected(conv, act, inputs, active, mask, residual), atol=2e-5, rtol=1e-4)
    return found


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    is_depthwise=st.booleans(),
    act=st.sampled_from(ACTS),
    samples=st.integers(1, 5),
    seed=st.integers(0, 1000),
    knows_active=st.booleans(),
    has_residual=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
@settings(max_examples=150)
@torch.no_grad()
def test_any_geometry(
    kernel,
    stride,
    dilation,
    padding,
    size,
    channels,
    is_depthwise,
    act,
    samples,
    seed,
    knows_active,
    has_residual,
    density,
):
    given_channels, filters = (channels[0], channels[0]) if is_depthwise else channels
    groups = given_channels if is_depthwise else 1
    conv = nn.Conv2d(given_channels, filters, kernel, stride, padding, dilation, groups)
    if min(output_size(conv, *size)) < 1:
        return
    inputs, active, mask, residual = case(conv, samples, *size, seed, density)
    for name in VECTORS:
        with _native.using(name):
            check(conv, act, inputs, active if knows_active else None, mask, residual if has_residual else None)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("samples", [1, 3, 12])
@pytest.mark.parametrize("side", [2, 8, 16, 33])
def test_one_after_another_or_side_by_side(instructions, threads, samples, side):
    torch.manual_seed(0)
    conv = nn.Conv2d(30, 50, 3, padding=1)
    operands = case(conv, samples, side, side)
    with threads_of_torch(threads):
        found = check(conv, nn.ReLU(), *operands)
    with threads_of_torch(1):
        assert torch.equal(check(conv, nn.ReLU(), *operands), found)


def test_operands_that_are_not_dense(instructions):
    conv = nn.Conv2d(6, 7, 3)
    inputs, active, mask, residual = case(conv, 4, 9, 10)
    inputs, residual = (each.contiguous(memory_format=torch.channels_last) for each in (inputs, residual))
    check(conv, None, inputs[::2], active[::2], mask[::2], residual[::2])


def test_channels_that_are_off_do_not_count(instructions):
    conv = nn.Conv2d(6, 7, 3)
    inputs, active, mask, _ = case(conv, 4, 9, 10)
    found = check(conv, None, inputs, active, mask, None)
    inputs[~active] = math.nan
    with torch.no_grad():
        assert torch.equal(filtered_conv(conv, conv.weight, conv.bias, None, inputs, active, mask, None), found)


@pytest.mark.parametrize("act", ACTS)
def test_nan_stays(instructions, act):
    conv = nn.Conv2d(1, 7, 1)
    inputs = torch.randn(1, 1, 4, 9)
    inputs[0, 0, 2, 3] = math.nan
    mask = torch.tensor([[True] * 6 + [False]])
    with torch.no_grad():
        found = filtered_conv(conv, conv.weight, conv.bias, act, inputs, None, mask, None)
    wrong = torch.zeros(1, 7, 4, 9, dtype=torch.bool)
    wrong[0, :6, 2, 3] = True
    assert torch.equal(found.isnan(), wrong)


@torch.no_grad()
def test_its_multiply_adds_are_counted(instructions):
    conv = nn.Conv2d(6, 7, 3, padding=1)
    inputs, active, mask, _ = case(conv, 4, 9, 10)

    def run():
        return filtered_conv(conv, conv.weight, conv.bias, None, inputs, active, mask, None)

    assert count_macs(run) == (active.sum(1) * mask.sum(1)).sum() * 9 * 90
    assert count_macs(lambda: (count_macs(run), run())) == 2 * count_macs(run)


def test_who_can_run(instructions):
    single = torch.zeros(1)
    assert can_run(single, None)
    assert can_run(single, nn.ReLU6())
    assert not can_run(single.double(), None)
    assert not can_run(single.to("meta"), None)
    assert not can_run(single, nn.GELU())
    with _native.using("portable"):
        assert not can_run(single, None)
        with pytest.raises(Unavailable, match="slow"):
            check(nn.Conv2d(1, 1, 1), None, torch.zeros(1, 1, 1, 1), None, torch.ones(1, 1, dtype=torch.bool), None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inputs": (2, 5, 9, 9)}, "2, 5, 9, 9"),
        ({"inputs": (2, 6, 9, 2)}, "2, 6, 9, 2"),
        ({"active": (2, 7)}, r"active_in .* \(2, 6\), got \(2, 7\)"),
        ({"mask": (1, 7)}, r"mask .* \(2, 7\), got \(1, 7\)"),
        ({"residual": (2, 7, 7, 9)}, r"residual .* \(2, 7, 7, 7\), got"),
    ],
)
def test_what_does_not_fit(instructions, changed, message):
    shapes = {"inputs": (2, 6, 9, 9), "active": (2, 6), "mask": (2, 7), "residual": (2, 7, 7, 7)} | changed
    inputs, active, mask, residual = (torch.zeros(shape) for shape in shapes.values())
    conv = nn.Conv2d(6, 7, 3)
    with pytest.raises(ValueError, match=message):
        filtered_conv(conv, conv.weight, conv.bias, None, inputs, active.bool(), mask.bool(), residual)


@torch.no_grad()
def test_other_activations_run_without_it(instructions):
    torch.manual_seed(0)
    module = DynamicConvBlock(
        nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), nn.GELU(), MaskPredictor(6, 7, has_softmax=False), 0.8
    ).eval()
    inputs = torch.randn(3, 6, 9, 9)
    masked = module(inputs)[0]
    module.set_execution("gathered")
    torch.testing.assert_close(module(inputs)[0], masked, atol=1e-5, rtol=1e-4)
