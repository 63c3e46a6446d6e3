"""What two_pass_softmax is to torch: gradients, compilation, the choice of an algorithm, errors; and the cost model."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from postern import _native
from postern._native import memory
from postern.errors import Unavailable
from postern.softmax import (
    TwoPassSoftmax,
    _operators,
    _rows,
    online_softmax,
    softmax_traffic,
    three_pass_softmax,
    two_pass,
    two_pass_log_softmax,
    two_pass_softmax,
)
from tests.modules import check_module

from .kernels import ALGORITHMS, BACKENDS, backend, uniform

every_backend = pytest.mark.parametrize("name", BACKENDS)
needs_kernels = pytest.mark.skipif(not _native.status().available, reason="no compiled kernels")
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "softmax": (two_pass_softmax, torch.softmax),
    "log_softmax": (two_pass_log_softmax, torch.log_softmax),
}
both = pytest.mark.parametrize("function", FUNCTIONS)


@both
@every_backend
def test_first_and_second_derivatives(function: str, name: str) -> None:
    logits = uniform(2, 3, 4, scale=2).double().requires_grad_()
    with backend(name) as chosen:
        for dim in (-1, 1):
            compute = partial(FUNCTIONS[function][0], dim=dim, backend=chosen)
            assert torch.autograd.gradcheck(compute, logits)
            assert torch.autograd.gradgradcheck(compute, logits)


@both
@every_backend
@pytest.mark.parametrize("shape", [(3, 1), (5, 777), (2, 70_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_are_those_of_torch(
    function: str, name: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, truth = FUNCTIONS[function]
    logits, weights = uniform(*shape, seed=2).to(dtype), uniform(*shape, scale=1, seed=3).to(dtype)
    for streaming_bytes in (0, 1 << 60):
        monkeypatch.setattr(_operators, "STREAMING_BYTES", streaming_bytes)
        ours, exact = logits.clone().requires_grad_(), logits.double().clone().requires_grad_()
        with backend(name) as chosen:
            compute(ours, backend=chosen).backward(weights)
        truth(exact, -1).backward(weights.double())
        assert ours.grad is not None
        assert exact.grad is not None
        scale = exact.grad.abs().max().item() or 1.0
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-13}[dtype]
        assert (ours.grad.double() - exact.grad).abs().max().item() <= tolerance * scale


@needs_kernels
def test_the_gradient_does_not_depend_on_the_threads() -> None:
    logits, weights = uniform(1, 150_000).requires_grad_(), uniform(1, 150_000, seed=1)
    before = torch.get_num_threads()
    gradients = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            gradients += torch.autograd.grad(two_pass_softmax(logits, backend="native"), logits, weights)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(gradients[0], gradients[1])


@both
@pytest.mark.parametrize("chosen", ["torch", pytest.param("native", marks=needs_kernels)])
def test_the_operators_are_well_behaved(function: str, chosen: str) -> None:
    is_log = function == "log_softmax"
    for logits in (uniform(3, 7).requires_grad_(), uniform(2, 3, 5).transpose(0, 1), uniform(4, 9)[:, :5]):
        torch.library.opcheck(_operators.softmax, (logits, "two_pass", is_log, chosen, 4))
    out = torch.empty(3, 7)
    torch.library.opcheck(_operators.softmax_into, (uniform(3, 7), "two_pass", is_log, chosen, 4, out))
    gradient = uniform(3, 7, seed=1).requires_grad_()
    probabilities = torch.softmax(uniform(3, 7), -1).requires_grad_()
    torch.library.opcheck(_operators.softmax_backward, (gradient, probabilities, is_log, chosen))


@both
@pytest.mark.parametrize("chosen", ["torch", pytest.param("native", marks=needs_kernels)])
def test_compilation_into_one_graph(function: str, chosen: str) -> None:
    compute, truth = FUNCTIONS[function]

    def layer(logits: Tensor) -> Tensor:
        return compute(logits * 2, backend=chosen) + 1

    logits = uniform(4, 130).requires_grad_()
    result = torch.compile(layer, fullgraph=True)(logits)
    torch.testing.assert_close(result, truth(logits * 2, -1) + 1)
    (ours,) = torch.autograd.grad(result.square().sum(), logits)
    (exact,) = torch.autograd.grad((truth(logits * 2, -1) + 1).square().sum(), logits)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_compilation_of_the_automatic_choice() -> None:
    compiled = torch.compile(two_pass_softmax, fullgraph=True)
    for columns in (100, 70_000):
        logits = uniform(2, columns)
        torch.testing.assert_close(compiled(logits), torch.softmax(logits, -1))
        out = torch.empty_like(logits)
        torch.testing.assert_close(compiled(logits, out=out), torch.softmax(logits, -1))


@both
@every_backend
def test_vmap(function: str, name: str) -> None:
    compute, truth = FUNCTIONS[function]
    logits, weights = uniform(5, 7, 3), uniform(5, 7, 3, seed=1)
    with backend(name) as chosen:
        mapped = torch.vmap(partial(compute, dim=0, backend=chosen), in_dims=1)(logits)
        torch.testing.assert_close(mapped, truth(logits, 0).movedim(1, 0))
        product = torch.vmap(_operators.softmax_backward, in_dims=(0, None, None, None))(
            weights, truth(logits[0], -1), function == "log_softmax", chosen
        )
    for k in range(5):
        leaf = logits[0].clone().requires_grad_()
        (exact,) = torch.autograd.grad(truth(leaf, -1), leaf, weights[k])
        torch.testing.assert_close(product[k], exact)


def test_the_automatic_choice_works_under_functional_transforms() -> None:
    logits = uniform(2, 70_000)
    gradient = torch.func.grad(lambda x: two_pass_softmax(x).square().sum())(logits)
    exact = torch.func.grad(lambda x: torch.softmax(x, -1).square().sum())(logits)
    torch.testing.assert_close(gradient, exact)


@needs_kernels
@pytest.mark.parametrize(
    "shape, dtype, expected",
    [
        ((8, 10), torch.float32, None),
        ((2000, 10), torch.float32, "three_pass_reload"),
        ((100, 100), torch.float32, None),
        ((64, 1024), torch.float32, None),
        ((1, 1 << 17), torch.float64, "three_pass_reload"),
        ((1 << 10,), torch.float32, None),
        ((1 << 17,), torch.float32, "three_pass_reload"),
        ((64, 4096), torch.float32, "blocked"),
        ((1000, 500), torch.float32, "three_pass_reload"),
        ((1000, 1000), torch.float32, "blocked"),
        ((1, 1 << 20), torch.float32, "three_pass_reload"),
        ((4096, 32_000), torch.float32, "blocked"),
        ((4096, 128_000), torch.float32, "two_pass"),
        ((1 << 17, 500), torch.float32, "three_pass_reload"),
        ((1 << 17, 500), torch.float64, "blocked"),
        ((4096, 32_000), torch.bfloat16, "two_pass"),
        ((4096, 1000), torch.bfloat16, None),
    ],
)
def test_the_automatic_choice(
    shape: tuple[int, int], dtype: torch.dtype, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rows, "IS_FAST", True)
    monkeypatch.setattr(_operators, "STREAMING_BYTES", 1 << 24)
    monkeypatch.setattr(two_pass, "_num_threads", lambda: 2)
    memory = torch.empty(1, dtype=dtype)
    assert two_pass._fastest(memory.expand(shape), -1, False) == expected
    assert len(shape) == 1 or two_pass._fastest(memory.expand(shape), 0, False) is None
    monkeypatch.setattr(_rows, "IS_FAST", False)
    assert two_pass._fastest(memory.expand(shape), -1, False) is None


@pytest.mark.parametrize("shape", [(8, 10), (2000, 10), (3, 50_000), (1, 1 << 17), (100, 200), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_automatic_choice_is_softmax_whatever_it_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = uniform(*shape).to(dtype)
    # torch rounds the exponentials of short bfloat16 rows before it adds them.
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float64: 1e-13}[dtype]
    floor = 4e-2 if dtype == torch.bfloat16 else 1e-6
    for function in FUNCTIONS:
        compute, truth = FUNCTIONS[function]
        expected = truth(logits.double(), -1).to(dtype)
        torch.testing.assert_close(compute(logits), expected, rtol=tolerance, atol=floor)
        out = torch.empty_like(logits)
        assert compute(logits, out=out) is out
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=floor)
        leaf = logits.clone().requires_grad_()
        compute(leaf).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == logits.shape


@needs_kernels
def test_writing_into_a_tensor_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(like: Tensor) -> Tensor:
        raise AssertionError("a result of its own")

    monkeypatch.setattr(_operators, "empty", fail)
    logits = uniform(4, 70_000)
    for chosen in ("auto", "native"):
        out = torch.empty_like(logits)
        two_pass_softmax(logits, out=out, backend=chosen)
        torch.testing.assert_close(out, torch.softmax(logits, -1))


def test_fresh_memory_for_large_results(monkeypatch: pytest.MonkeyPatch) -> None:
    if not _native.status().available:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(memory, "HUGE_PAGES_BYTES", 1 << 20)
    logits = uniform(3, 1 << 20)
    torch.testing.assert_close(two_pass_softmax(logits, backend="native"), torch.softmax(logits, -1))


def test_the_module() -> None:
    check_module(TwoPassSoftmax, uniform(3, 50))
    check_module(lambda: TwoPassSoftmax(dim=0, backend="torch"), uniform(3, 50))
    assert repr(TwoPassSoftmax(1)) == "TwoPassSoftmax(dim=1, backend='auto')"
    with pytest.raises(ValueError, match="'cuda'"):
        TwoPassSoftmax(backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", [two_pass_softmax, two_pass_log_softmax, three_pass_softmax, online_softmax])
def test_bad_arguments(compute: Callable[..., Tensor]) -> None:
    logits = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        compute(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(3, 4\) have no dimension 2"):
        compute(logits, 2)
    with pytest.raises(ValueError, match="no dimension 1"):
        compute(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match="'triton'"):
        compute(logits, backend="triton")
    with pytest.raises(ValueError, match="on the CPU, got meta"):
        compute(torch.zeros(3, device="meta"), backend="native")
    with pytest.raises(ValueError, match=r"out has the logits' shape, \(3, 4\); got \(4, 3\)"):
        compute(logits, out=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"out is torch\.float32 on cpu.*got torch\.float64"):
        compute(logits, out=torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        compute(logits.clone().requires_grad_(), out=torch.zeros(3, 4))
    if compute is not three_pass_softmax:
        with pytest.raises(ValueError, match="block is at least 1 element, got 0"):
            compute(logits, backend="torch", block=0)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="'rewrite'"):
        three_pass_softmax(torch.zeros(3), variant="rewrite")  # type: ignore[arg-type]


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "IS_FAST", False)
    monkeypatch.setattr(_rows, "_STATUS", _native.Status(False, None, "no compiler"))
    logits = uniform(2, 1 << 17)
    torch.testing.assert_close(two_pass_softmax(logits), torch.softmax(logits, -1))
    torch.testing.assert_close(online_softmax(logits), torch.softmax(logits, -1))
    with pytest.raises(Unavailable, match="no compiler"):
        two_pass_softmax(logits, backend="native")


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_block_of_the_reference_does_not_matter(block: int) -> None:
    logits = uniform(3, 100)
    for algorithm in ("two_pass", "online"):
        result = ALGORITHMS[algorithm](logits, backend="torch", block=block)
        torch.testing.assert_close(result, torch.softmax(logits, -1))


def test_traffic() -> None:
    assert softmax_traffic(1000, "two_pass") == 12_000
    assert softmax_traffic(1000, "online") == 12_000
    assert softmax_traffic(1000, "three_pass_recompute") == 16_000
    assert softmax_traffic(1000, "three_pass_reload") == 20_000
    # With a read of each line before it is written, the paper's gain shrinks from 4/3 to 5/4 and from 5/3 to 6/4.
    cached = [softmax_traffic(8, v, streams=False) for v in ("two_pass", "three_pass_recompute", "three_pass_reload")]
    assert [c / cached[0] for c in cached] == [1, 5 / 4, 6 / 4]
    assert softmax_traffic(8, "two_pass", element_bytes=2) == 48
    with pytest.raises(ValueError, match="n=-1"):
        softmax_traffic(-1, "two_pass")
    with pytest.raises(ValueError, match="'four_pass'"):
        softmax_traffic(1, "four_pass")  # type: ignore[arg-type]


def test_naive_sums_overflow_where_pairs_do_not() -> None:
    logits = uniform(1, 1000, scale=1000)
    assert not math.isfinite(logits.exp().sum().item())
    assert two_pass_softmax(logits, backend="torch").sum().item() == pytest.approx(1, abs=1e-6)
