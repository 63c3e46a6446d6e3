"""Grids and rounding against torch's fake quantisation, and what a grid must satisfy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from postern.quantize import (
    RunningRange,
    asymmetric_grid,
    fake_quantize,
    min_max_weight_grid,
    mse_weight_grid,
    symmetric_grid,
)
from tests.modules import check_module

VALUES = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30).map(torch.tensor)
BITS = st.integers(2, 12)


@settings(deadline=None)
@given(VALUES, BITS)
def test_rounds_like_torch(x, bits):
    grid = asymmetric_grid(x.min(), x.max(), bits)
    expected = torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point.int(), grid.lowest, grid.highest)
    # torch multiplies by the reciprocal of the scale, so that ties may fall to the other side
    assert (fake_quantize(x, grid) - expected).abs().max() <= 1.001 * grid.scale
    ties = (x / grid.scale - (x / grid.scale).floor() - 0.5).abs() < 1e-3
    torch.testing.assert_close(fake_quantize(x, grid)[~ties], expected[~ties])


@settings(deadline=None)
@given(VALUES, BITS)
def test_the_error_within_the_range_is_at_most_a_step(x, bits):
    grid = asymmetric_grid(x.min(), x.max(), bits)
    assert (fake_quantize(x, grid) - x).abs().max() <= grid.scale * 1.001
    weight = min_max_weight_grid(x, bits)
    assert (fake_quantize(x, weight) - x).abs().max() <= weight.scale * 0.501


@settings(deadline=None)
@given(VALUES, BITS)
def test_zero_is_on_the_grid_and_rounding_twice_changes_nothing(x, bits):
    for grid in (asymmetric_grid(x.min(), x.max(), bits), min_max_weight_grid(x, bits)):
        assert fake_quantize(torch.zeros(1), grid) == 0
        once = fake_quantize(x, grid)
        torch.testing.assert_close(fake_quantize(once, grid), once)
        assert len(once.unique()) <= 2**bits


@settings(deadline=None)
@given(VALUES, BITS)
def test_weights_are_symmetric(x, bits):
    grid = min_max_weight_grid(x, bits)
    torch.testing.assert_close(fake_quantize(-x, grid), -fake_quantize(x, grid))


def test_scales_have_the_papers_form():
    grid = asymmetric_grid(torch.tensor(-1.0), torch.tensor(3.0), 8)
    torch.testing.assert_close(grid.scale, torch.tensor(4 / 255))
    assert grid.zero_point == round(255 / 4)
    assert (grid.lowest, grid.highest) == (0, 255)
    torch.testing.assert_close(symmetric_grid(torch.tensor(2.54), 8).scale, torch.tensor(0.02))
    # a range that leaves 0 out is widened to it
    torch.testing.assert_close(asymmetric_grid(torch.tensor(1.0), torch.tensor(2.0), 2).scale, torch.tensor(2 / 3))


def test_the_gradient_passes_where_nothing_is_clipped():
    x = torch.tensor([-5.0, -0.9, 0.3, 0.8, 9.0], requires_grad=True)
    grid = asymmetric_grid(torch.tensor(-1.0), torch.tensor(1.0), 4)
    fake_quantize(x, grid).backward(torch.arange(1.0, 6.0))
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 2.0, 3.0, 4.0, 0.0]))
    torch.testing.assert_close(fake_quantize(x, grid).detach(), fake_quantize(x.detach(), grid))


def test_the_mse_grid_is_the_best_of_the_candidates():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, generator=generator, dtype=torch.float64)
    weight[0] = 8.0

    def error(grid):
        return (fake_quantize(weight, grid) - weight).square().mean().item()

    for bits in (3, 4, 8):
        best = error(mse_weight_grid(weight, bits))
        largest = weight.abs().max()
        tried = [error(symmetric_grid(largest * part / 100, bits)) for part in range(1, 101)]
        assert best == pytest.approx(min(tried))
    assert error(mse_weight_grid(weight, 4)) < 0.9 * error(min_max_weight_grid(weight, 4))


def test_a_running_range_follows_the_formula():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.5, 8.0])]
    running = RunningRange(momentum=0.9)
    low = high = None
    for batch in batches:
        running.update(batch)
        low = batch.min() if low is None else 0.9 * low + 0.1 * batch.min()
        high = batch.max() if high is None else 0.9 * high + 0.1 * batch.max()
    torch.testing.assert_close(running.low, low)
    torch.testing.assert_close(running.high, high)


def test_percentiles_leave_out_the_extremes():
    x = torch.arange(-500.0, 501.0)[torch.randperm(1001)]
    running = RunningRange(percentile=99.0)
    running.update(x.view(7, 143))
    expected = torch.quantile(x, 0.99, interpolation="nearest")
    torch.testing.assert_close(running.high, expected)
    torch.testing.assert_close(running.low, -expected)
    whole = RunningRange(percentile=100.0)
    whole.update(x)
    assert (whole.low, whole.high) == (-500, 500)


def test_a_constant_zero_stays_zero():
    running = RunningRange()
    running.update(torch.zeros(4))
    assert (running(torch.zeros(4), 8) == 0).all()


def test_survives():
    def build():
        class Calibrated(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(5, 5)
                self.range = RunningRange()
                self.range.update(self.linear(torch.randn(64, 5)))

            def forward(self, x):
                return self.range(self.linear(x), 8)

        return Calibrated()

    check_module(build, torch.randn(3, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: symmetric_grid(torch.tensor(1.0), 1), r"bits lie in 2\.\.16, got 1"),
        (lambda: asymmetric_grid(torch.tensor(0.0), torch.tensor(1.0), 17), r"bits lie in 2\.\.16, got 17"),
        (lambda: min_max_weight_grid(torch.tensor([1.0, torch.nan]), 8), r"shape \[2\]"),
        (lambda: min_max_weight_grid(torch.zeros(0), 8), r"shape \[0\]"),
        (lambda: mse_weight_grid(torch.ones(2), 8, candidates=0), "at least 1, got 0"),
        (lambda: RunningRange(momentum=1.0), r"\[0, 1\), got 1\.0"),
        (lambda: RunningRange(percentile=50), "above 50 and at most 100, got 50"),
        (lambda: RunningRange().update(torch.tensor([torch.inf])), "finite activations"),
        (lambda: RunningRange().update(torch.zeros(0)), "finite activations"),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()
