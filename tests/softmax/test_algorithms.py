"""All algorithms and backends against float64, on ordinary and on nasty rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern import _native
from postern.softmax import _operators, two_pass_log_softmax, two_pass_softmax

from .kernels import ALGORITHMS, BACKENDS, backend, relative_error, uniform

every_way = pytest.mark.parametrize(
    "algorithm, name", [(algorithm, name) for algorithm in ALGORITHMS for name in BACKENDS]
)
every_backend = pytest.mark.parametrize("name", BACKENDS)
# Subtracting a maximum of 100 rounds the difference to 4e-6; the two-pass algorithm has no such step.
TOLERANCE = {"two_pass": 1e-6, "recompute": 6e-6, "reload": 6e-6, "online": 6e-6, "blocked": 6e-6}


@every_way
@pytest.mark.parametrize("scale", [1, 10, 100, 1e3, 1e4, 1e6])
def test_accuracy_at_every_scale(algorithm: str, name: str, scale: float) -> None:
    logits = uniform(4, 20_000, scale=scale)
    with backend(name) as chosen:
        result = ALGORITHMS[algorithm](logits, backend=chosen)
    assert relative_error(result, logits) <= TOLERANCE[algorithm]
    assert (result.double().sum(-1) - 1).abs().max() <= 1e-6


@every_way
@settings(max_examples=25, deadline=None)
@given(
    columns=st.one_of(st.integers(1, 300), st.integers(16_370, 16_400), st.integers(32_760, 32_780)),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_length(algorithm: str, name: str, columns: int, rows: int, seed: int) -> None:
    logits = uniform(rows, columns, seed=seed)
    with backend(name) as chosen:
        result = ALGORITHMS[algorithm](logits, backend=chosen)
        logarithm = two_pass_log_softmax(logits, backend=chosen)
    assert relative_error(result, logits) <= TOLERANCE[algorithm]
    torch.testing.assert_close(logarithm.double(), torch.log_softmax(logits.double(), -1), rtol=2e-7, atol=2e-7)


@every_way
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_sixteen_bit_formats_are_rounded_once(algorithm: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    logits = uniform(3, 1037, scale=6).to(dtype)
    with backend(name) as chosen:
        result = ALGORITHMS[algorithm](logits, backend=chosen)
    assert result.dtype == dtype
    # Below 6e-5 float16 has fewer digits.
    assert relative_error(result, logits, above=6.2e-5) <= tolerance * 1.01
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    truth = torch.softmax(logits.double(), -1)
    assert ((result.double() - truth).abs() <= truth * tolerance * 1.01 + smallest / 2 * 1.01).all()


@every_way
def test_sixteen_bit_specials_and_range(algorithm: str, name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        logits = torch.tensor([[largest, -largest, 0.0], [-math.inf, 1, 2], [math.nan, 1, 2]], dtype=dtype)
        with backend(name) as chosen:
            result = ALGORITHMS[algorithm](logits, backend=chosen)
        torch.testing.assert_close(result, torch.softmax(logits, -1), equal_nan=True)


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs a long double wider than double")
@every_way
@pytest.mark.parametrize("scale", [1, 100, 1e5])
def test_float64(algorithm: str, name: str, scale: float) -> None:
    logits = uniform(1, 3001, scale=scale).double() * 1.00000001
    with backend(name) as chosen:
        result = ALGORITHMS[algorithm](logits, backend=chosen)
        logarithm = two_pass_log_softmax(logits, backend=chosen)
    wide = logits.numpy().astype(np.longdouble)
    wide -= wide.max()
    total = np.exp(wide).sum()
    truth = np.exp(wide) / total
    counted = truth > 1e-200
    error = (np.abs(result.numpy().astype(np.longdouble) - truth) / truth)[counted].max()
    # Subtracting the maximum is exact to half a unit in the last place of a difference of up to 460.
    assert error <= (2e-15 if algorithm == "two_pass" else 1e-13)
    exact = wide - np.log(total)
    assert (np.abs(logarithm.numpy().astype(np.longdouble) - exact) <= 4e-16 * (2 + np.abs(exact))).all()


@every_way
def test_masks_and_non_finite_rows_are_as_in_torch(algorithm: str, name: str) -> None:
    infinity, nan = math.inf, math.nan
    logits = uniform(9, 700)
    logits[0, :650] = -infinity  # whole blocks before the first finite logit
    logits[1, 50:] = -infinity
    logits[2, ::2] = -infinity
    logits[3] = -infinity
    logits[4, 333] = infinity
    logits[5, 699] = nan
    logits[6, 0], logits[6, 1] = nan, -infinity
    logits[7] = infinity
    logits[8, :699] = -infinity
    with backend(name) as chosen:
        result = ALGORITHMS[algorithm](logits, backend=chosen)
        logarithm = two_pass_log_softmax(logits, backend=chosen)
    torch.testing.assert_close(result, torch.softmax(logits, -1), equal_nan=True)
    torch.testing.assert_close(logarithm, torch.log_softmax(logits, -1), equal_nan=True)
    assert result[8].tolist() == [0.0] * 699 + [1.0]
    assert (result[0, :650] == 0).all()


@every_way
@pytest.mark.parametrize("offset", [-3e38, -1e9, -3e6, -2.9e6, -2e6, 0, 2e6, 2.9e6, 3e6, 1e9, 3e38])
def test_huge_logits(algorithm: str, name: str, offset: float) -> None:
    logits = uniform(2, 500, scale=20) + offset
    logits[1, :3] = torch.tensor([-3e38, 3e38, 3e38])
    with backend(name) as chosen:
        result = ALGORITHMS[algorithm](logits, backend=chosen)
        logarithm = two_pass_log_softmax(logits, backend=chosen)
    torch.testing.assert_close(result, torch.softmax(logits, -1), rtol=6e-6, atol=0)
    torch.testing.assert_close(logarithm, torch.log_softmax(logits.double(), -1).float(), rtol=1e-6, atol=1e-6)


@every_way
def test_denormal_probabilities_are_kept(algorithm: str, name: str) -> None:
    logits = torch.cat([torch.zeros(1), torch.linspace(-110, -80, 400)])[None]
    with backend(name) as chosen:
        result = ALGORITHMS[algorithm](logits, backend=chosen)
    truth = torch.softmax(logits.double(), -1)
    smallest = 2.0**-149
    assert ((result.double() - truth).abs() <= 6e-6 * truth + smallest).all()
    assert ((result > 0) & (result < 2.0**-126)).sum() > 50
    # Denormal logits are as good as zero.
    tiny = torch.full((1, 64), 1e-42)
    with backend(name) as chosen:
        assert (ALGORITHMS[algorithm](tiny, backend=chosen) == 1 / 64).all()


@pytest.mark.parametrize("name", _native.INSTRUCTION_SETS)
@pytest.mark.parametrize("columns", [40_000, 70_000, 100])
def test_denormals_are_flushed_when_torch_flushes_them(name: str, columns: int) -> None:
    logits = torch.full((3, columns), -95.0)
    logits[:, 0] = 0
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with backend(name) as chosen:
            for shares in (True, False):
                _native.share_threads(shares)
                # A thread that starts while denormals are flushed goes on flushing them, torch's threads too.
                two_pass_softmax(logits, backend=chosen)
                if not torch.set_flush_denormal(True):
                    pytest.skip("this processor cannot flush denormals")
                assert two_pass_softmax(logits, backend=chosen).view(torch.int32).count_nonzero() == 3
                # The next caller's wish counts for it, on all threads.
                torch.set_flush_denormal(False)
                assert two_pass_softmax(logits, backend=chosen).view(torch.int32).count_nonzero() == 3 * columns
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        _native.share_threads()


@every_way
def test_any_dimension_and_layout(algorithm: str, name: str) -> None:
    base = uniform(6, 5, 4, seed=1)
    with backend(name) as chosen:
        for dim in range(-3, 3):
            result = ALGORITHMS[algorithm](base, dim, backend=chosen)
            assert result.is_contiguous()
            torch.testing.assert_close(result, torch.softmax(base, dim))
        for view in (base.transpose(0, 2), base[:, ::2], base[..., 1:3], base[0].expand(3, 5, 4), base[:, 0, :3]):
            torch.testing.assert_close(ALGORITHMS[algorithm](view, backend=chosen), torch.softmax(view, -1))
        scalar = ALGORITHMS[algorithm](torch.tensor(3.0), backend=chosen)
        assert scalar.shape == ()
        assert scalar.item() == 1
        for empty in (torch.zeros(3, 0), torch.zeros(0, 3), torch.zeros(0)):
            assert ALGORITHMS[algorithm](empty, backend=chosen).shape == empty.shape


@every_way
def test_writing_into_a_tensor(algorithm: str, name: str) -> None:
    logits = uniform(5, 301)
    expected = torch.softmax(logits, -1)
    with backend(name) as chosen:
        out = torch.empty_like(logits)
        assert ALGORITHMS[algorithm](logits, out=out, backend=chosen) is out
        torch.testing.assert_close(out, expected)
        transposed = torch.empty(301, 5).t()
        ALGORITHMS[algorithm](logits, out=transposed, backend=chosen)
        torch.testing.assert_close(transposed, expected)
        first = torch.empty(301, 5)
        ALGORITHMS[algorithm](logits.t(), 0, out=first, backend=chosen)
        torch.testing.assert_close(first, expected.t())
        scalar = torch.empty(())
        ALGORITHMS[algorithm](torch.tensor(-2.0), out=scalar, backend=chosen)
        assert scalar.item() == 1
        in_place = logits.clone()
        ALGORITHMS[algorithm](in_place, out=in_place, backend=chosen)
        torch.testing.assert_close(in_place, expected)


@every_way
def test_streaming_stores_at_any_alignment(algorithm: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_operators, "STREAMING_BYTES", 0)
    monkeypatch.setattr(_operators, "STREAMING_ROW_BYTES", 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for columns, offset in ((5, 1), (64, 0), (257, 3), (1000, 7), (20_001, 5)):
            logits = uniform(3, columns).to(dtype)
            memory = torch.full((3 * columns + 64,), -5.0, dtype=dtype)
            out = memory[offset : offset + 3 * columns].view(3, columns)
            with backend(name) as chosen:
                ALGORITHMS[algorithm](logits, out=out, backend=chosen)
            torch.testing.assert_close(out, torch.softmax(logits.double(), -1).to(dtype), rtol=1e-2, atol=1e-6)
            assert (memory[:offset] == -5).all()
            assert (memory[offset + 3 * columns :] == -5).all()


@pytest.mark.parametrize(
    "algorithm, name", [(algorithm, name) for algorithm in ALGORITHMS for name in BACKENDS if name != "torch"]
)
@pytest.mark.parametrize("shape", [(1, 200_001), (3, 70_000), (1000, 130), (17, 20_000)])
def test_the_result_does_not_depend_on_the_threads(algorithm: str, name: str, shape: tuple[int, int]) -> None:
    logits = uniform(*shape)
    before = torch.get_num_threads()
    results = []
    try:
        with backend(name) as chosen:
            for threads, shares in ((1, True), (2, True), (2, False), (5, True), (5, False)):
                torch.set_num_threads(threads)
                _native.share_threads(shares)
                results.append(ALGORITHMS[algorithm](logits, backend=chosen))
    finally:
        torch.set_num_threads(before)
        _native.share_threads()
    for result in results[1:]:
        assert torch.equal(results[0], result)
    torch.testing.assert_close(results[0], torch.softmax(logits.double(), -1).float(), rtol=6e-6, atol=0)
