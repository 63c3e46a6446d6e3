"""The parts of the experiments that could be wrong without anyone noticing."""

import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import postern.papers.flashdecoding_pp as paper
from postern.attention import SelfAttention, UnifiedMax
from postern.claims import Run
from postern.errors import Unavailable


def test_made_up_queries_have_exactly_the_logits():
    config = paper.Logits(4, 1, 0, "python-stdlib", keys=50, head_dim=8)
    logits = 100 * torch.randn(4, 50)
    rows = paper._with_logits("", logits, torch.randn, UnifiedMax(0.0), config, Run(seed=0, scale="smoke"))
    assert torch.equal((rows.query @ rows.key.mT)[0, :, 0], logits)


def test_drawn_rows_are_normal_and_adversarial_ones_are_far_from_the_constant():
    config = paper.Logits(32, 1, 0, "python-stdlib", keys=200)
    for rows in paper._drawn(config, Run(seed=0, scale="smoke")):
        logits = (rows.query @ rows.key.mT)[0, :, 0]
        spread = float(rows.name.rpartition(" ")[2])
        if rows.name.startswith("normal"):
            assert logits.std().item() == pytest.approx(spread, rel=0.05)
            assert abs(rows.unified.phi) < spread
        else:
            above, below = logits.chunk(2)
            torch.testing.assert_close(above.amax(-1), torch.full((32,), rows.unified.phi + 200))
            torch.testing.assert_close(below.amax(-1), torch.full((32,), rows.unified.phi - 200))
            assert ((above - rows.unified.phi).abs() < 100).sum(-1).eq(199).all()


def test_every_query_of_a_window_is_a_step_of_its_own():
    torch.manual_seed(0)
    layer = SelfAttention(16, 2, is_causal=True).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    query, key, value, mask = paper._every_query(layer, x)
    rows = paper._Rows("", query, key, value, mask, UnifiedMax(0.0), 8**-0.5)
    expected = layer(x)
    found = layer.output(paper._exact(rows).view(3, 5, 16))
    torch.testing.assert_close(found, expected)


def test_the_error_is_relative_to_the_row():
    truth = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    assert paper._error(truth + torch.tensor([[0.0, 0.0], [0.05, 0.0]]), truth) == pytest.approx(0.1)


def test_scatter_and_bootstrap_agree_with_normal_theory():
    rng = np.random.default_rng(0)
    times = rng.normal(1, 0.1, 5000)
    assert paper._scatter(times) == pytest.approx(0.1, rel=0.05)
    assert paper._scatter([*times, 100.0, 200.0]) == pytest.approx(0.1, rel=0.05)
    low, high = paper._bootstrap(times[:400], rng)
    assert low < 1.01
    assert high > 0.99
    # the median's standard error is sqrt(pi / 2) that of the mean
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / 20, rel=0.4)


def test_a_busy_machine_is_no_evidence():
    delays = iter([0.0001, 0.01] * 1000)
    calls = {"baseline": lambda: time.sleep(next(delays))}
    options = {"warm_up": 0, "baseline": "baseline", "what": "naps", "each": 1}
    with pytest.raises(Unavailable, match=r"too busy.*those of naps scatter"):
        paper._times_in_quiet(calls, 8, run=Run(seed=0, scale="small"), **options)
    assert len(paper._times_in_quiet(calls, 8, run=Run(seed=0, scale="smoke"), **options)["baseline"]) == 8


def test_halves_of_the_rounds():
    times = paper._Times({"O": {1: {"flat": [1.0, 9.0, 2.0, 8.0, 3.0, 7.0]}}})
    assert times.medians(0, 2) == {"O": {1: {"flat": 2.0}}}
    assert times.medians(1, 2) == {"O": {1: {"flat": 8.0}}}


def test_shapes_are_those_of_linear_layers():
    config = paper.Products(16, 43)
    for outputs, inputs in config.shapes().values():
        x, weight, packed = paper._operands(config, (outputs, inputs), 3, Run(seed=0, scale="smoke"))
        assert F.linear(x, weight).shape == (3, outputs)
        assert packed.shape[1] == inputs
