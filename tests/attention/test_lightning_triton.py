"""The Triton kernels against the other forms: on a GPU if there is one, else in Triton's interpreter.

Triton decides when it is imported whether it interprets, so that without a GPU one test runs the others in a process of
their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from postern.attention import lightning_attention

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = pytest.mark.skipif(DEVICE == "cpu" and not IS_INTERPRETED, reason="runs in the interpreter")
SLOPES = torch.tensor([0.0, 0.05])


@pytest.fixture
def kernels(monkeypatch):
    """The module, with short segments, as the interpreter is slow."""
    from postern.attention import _lightning_triton

    monkeypatch.setattr(_lightning_triton, "SEGMENT", 64)
    return _lightning_triton


@pytest.mark.skipif(DEVICE == "cuda" or IS_INTERPRETED, reason="the others run as they are")
def test_all_of_it_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-v", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


def inputs(time, key_dim, value_dim, dtype=torch.float32):
    """Queries, keys and values as a layer makes them, with heads side by side; and a state."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, time, 2, key_dim), (1, time, 2, key_dim), (1, time, 2, value_dim)
    tensors = [torch.randn(shape, generator=generator).transpose(1, 2) / key_dim**0.5 for shape in shapes]
    state = torch.randn(1, 2, key_dim, value_dim, generator=generator)
    return [x.to(DEVICE, dtype).requires_grad_() for x in tensors] + [state.to(DEVICE).requires_grad_()]


def run(tensors, slopes, form):
    query, key, value, state = tensors
    output, last = lightning_attention(query, key, value, slopes, state, implementation=form)
    leaves = [*tensors, slopes]
    total = output.double().sin().sum() + last.double().square().sum()
    return output, last, *torch.autograd.grad(total, leaves)


# the interpreter multiplies bfloat16 as integers
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@RUNS
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("time", "key_dim", "value_dim"), [(1, 16, 16), (193, 20, 24)])
def test_equals_the_definition_with_its_gradients(time, key_dim, value_dim, dtype):
    tensors = inputs(time, key_dim, value_dim, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    slopes = SLOPES.to(DEVICE)
    expected = run(exact, slopes.double().requires_grad_(), "naive")
    found = run(tensors, slopes.requires_grad_(), "triton")
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    tolerance = 2e-5 if dtype == torch.float32 else 5 * torch.finfo(dtype).eps
    for name, x, y in zip(("output", "state", "q", "k", "v", "s", "slopes"), found, expected, strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < tolerance, f"{name}: {error:.2g}"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_is_chosen_on_a_gpu_in_16_bits(monkeypatch, kernels):
    called = []
    monkeypatch.setattr(kernels, "triton_attention", lambda *x: called.append(x) or x[:2])
    lightning_attention(*(x.detach().half() for x in inputs(4, 16, 16)[:3]))
    assert called


@RUNS
@pytest.mark.usefixtures("kernels")
def test_the_operator_is_what_torch_expects():
    *tensors, state = inputs(40, 16, 16)
    operator = torch.ops.postern.lightning_triton.default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*tensors, SLOPES.to(DEVICE), state, 0), test_utils=tests)


@RUNS
def test_rejects_what_the_kernels_cannot_do():
    with pytest.raises(ValueError, match=r"at most 256 features, got torch.float32 \[1, 2, 4, 300\]"):
        lightning_attention(*inputs(4, 300, 16)[:3], implementation="triton")
