"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter, which is chosen when Triton is imported.

Either way in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ATTENTION = """
import itertools
import torch
from postern.attention import UnifiedMax, decode_attention, unified_decode_attention
torch.manual_seed(0)
recomputed = 0
for dtype, (heads, kv_heads, head_dim, value_dim, keys) in itertools.product(
    (torch.float32, torch.bfloat16, torch.float16),
    ((2, 2, 16, 16, 70), (4, 2, 24, 20, 133), (1, 1, 64, 64, 5)),
):
    if device == "cpu" and dtype == torch.bfloat16 and heads > kv_heads:
        continue  # the interpreter's product of bfloat16 is wrong
    query = torch.randn(2, heads, 1, head_dim).to(device, dtype)
    key = torch.randn(2, kv_heads, keys, head_dim).to(device, dtype)
    value = torch.randn(2, keys, kv_heads, value_dim).to(device, dtype).transpose(1, 2)  # strides of a cache by time
    key[0, 0] *= 40
    padding = torch.rand(2, keys, device=device) > 0.3
    padding[1] = False
    for mask in (None, padding):
        unified = UnifiedMax(1.0, -3.0, 3.0)
        found = decode_attention(query, key, value, mask, num_splits=3, backend="triton")
        expected = decode_attention(query, key, value, mask, num_splits=3, backend="torch")
        # a logit is rounded in float32, and its error is one of the probability's relative ones
        logits = query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).mT * head_dim**-0.5
        tolerance = 16 * torch.finfo(dtype).eps + logits.abs().max().item() * torch.finfo(torch.float32).eps
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        for check in ("safe", "paper"):
            results = [
                unified_decode_attention(query, key, value, unified, mask, num_splits=3, check=check, backend=backend)
                for backend in ("triton", "torch")
            ]
            torch.testing.assert_close(results[0][0], expected, rtol=tolerance, atol=tolerance)
            assert torch.equal(results[0][1], results[1][1]), (dtype, check)
            recomputed += int(results[0][1].sum())
assert recomputed > 20
print("equal")
"""

PRODUCTS = """
import torch
from torch.nn import functional as F
from postern.attention import flat_linear
torch.manual_seed(0)
for rows, outputs, inputs in ((1, 40, 33), (8, 130, 70), (9, 16, 16), (70, 100, 50)):
    # the interpreter's product of bfloat16 is wrong
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])):
        shapes = ((rows, inputs), (outputs, inputs), (outputs,))
        x, weight, bias = (torch.randn(*shape).to(device, dtype) for shape in shapes)
        tolerance = 1e-3 if dtype != torch.bfloat16 else 1e-2
        for b in (None, bias):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double()).to(dtype)
            found = flat_linear(x, weight, b, backend="triton")
            torch.testing.assert_close(found, expected, rtol=2 * tolerance, atol=tolerance)
    found = flat_linear(x.T.contiguous().T.float(), weight.float(), backend="triton")
    torch.testing.assert_close(found, F.linear(x.float(), weight.float()), rtol=1e-5, atol=1e-5)
print("equal")
"""

BLOCKS = """
import torch
from postern.attention import block_sparse_attention
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if device == "cuda" else [])):
    for block, time, heads, kv_heads, head_dim, value_dim in (
        (16, 77, 4, 2, 32, 32), (32, 64, 2, 2, 24, 40), (16, 5, 1, 1, 16, 16), (64, 130, 2, 1, 64, 64),
    ):
        query = torch.randn(2, heads, time, head_dim).to(device, dtype)
        key = torch.randn(2, time, kv_heads, head_dim).to(device, dtype).transpose(1, 2)
        value = torch.randn(2, kv_heads, time, value_dim).to(device, dtype)
        tensors = [x.requires_grad_() for x in (query, key, value)]
        n = -(-time // block)
        blocks = torch.rand(2, heads, n, n, device=device) < 0.5
        blocks[0, 0, -1] = False
        exact = [x.detach().double().requires_grad_() for x in tensors]
        expected = block_sparse_attention(*exact, blocks, block, implementation="dense", scale=0.3)
        found = block_sparse_attention(*tensors, blocks, block, implementation="triton", scale=0.3)
        assert found.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=16 * eps, atol=16 * eps)
        for ours, theirs in zip(
            torch.autograd.grad(found.double().sin().sum(), tensors),
            torch.autograd.grad(expected.sin().sum(), exact),
            strict=True,
        ):
            torch.testing.assert_close(ours.double(), theirs, rtol=64 * eps, atol=64 * eps)
print("equal")
"""

REFUSALS = """
import torch
from postern.attention import block_sparse_attention, decode_attention
x = torch.zeros(1, 1, 1, 4, dtype=torch.float64, device=device)
try:
    decode_attention(x, x, x, backend="triton")
except ValueError as error:
    assert "got torch.float64" in str(error), error
x = torch.zeros(1, 1, 48, 4, device=device)
try:
    blocks = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    block_sparse_attention(x, x, x, blocks, 48, implementation="triton")
except ValueError as error:
    assert "got blocks of 48" in str(error), error
    print("equal")
"""


@pytest.mark.parametrize(
    "code", [ATTENTION, PRODUCTS, BLOCKS, REFUSALS], ids=["attention", "products", "blocks", "refusals"]
)
def test_in_a_process_of_its_own(code):
    on_gpu = torch.cuda.is_available()
    done = subprocess.run(
        [sys.executable, "-c", f"device = {'cuda' if on_gpu else 'cpu'!r}" + code],
        cwd=Path(__file__).parents[2],
        env=os.environ | ({} if on_gpu else {"TRITON_INTERPRET": "1"}),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stdout + done.stderr
