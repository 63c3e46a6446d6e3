"""Fading sums against their definition, in every form."""

import itertools
import math

import pytest
import torch

from postern.attention import _lightning_blocks as blocks
from postern.attention import lightning_attention
from postern.errors import Unavailable

FORMS = ("chunk", "tiled", "recurrent", "naive")
OPERATORS = ("chunk", "tiled")
SLOPES = torch.tensor([0.0, 0.1, 2.0], dtype=torch.float64)


def inputs(time, heads=3, kv_heads=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, 4), (kv_heads, 4), (kv_heads, 5)
    return [torch.randn(2, h, time, d, dtype=dtype, generator=generator) for h, d in shapes]


def first_state():
    return torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def definition(query, key, value, slopes, state=None):
    """A loop over all pairs of tokens."""
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for t in range(query.shape[2]):
        for s in range(t + 1):
            weight = (query[:, :, t] * key[:, :, s]).sum(-1) * torch.exp(-slopes * (t - s))
            output[:, :, t] += weight[..., None] * value[:, :, s]
        if state is not None:
            faded = torch.exp(-slopes * (t + 1))[:, None] * query[:, :, t]
            output[:, :, t] += (faded[:, :, None] @ state)[:, :, 0]
    return output


@pytest.fixture
def short_segments(monkeypatch):
    """Two blocks of 8 tokens a segment, and one sequence with two heads at once."""
    monkeypatch.setattr(blocks, "_SEGMENT", 16)
    monkeypatch.setattr(blocks, "_ROWS", 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("time", [1, 7, 8, 9, 16, 40, 43])
@pytest.mark.parametrize("form", FORMS)
def test_equals_its_definition(form, time):
    query, key, value = inputs(time)
    found, state = lightning_attention(query, key, value, SLOPES, block=8, implementation=form)
    torch.testing.assert_close(found, definition(query, key, value, SLOPES))
    fading = torch.exp(-SLOPES[:, None] * torch.arange(time - 1, -1, -1))
    torch.testing.assert_close(state, (key * fading[..., None]).mT @ value)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("form", FORMS)
def test_continues_from_a_state(form):
    query, key, value = inputs(50)
    whole, last = lightning_attention(query, key, value, SLOPES, first_state())
    torch.testing.assert_close(whole, definition(query, key, value, SLOPES, first_state()))
    state, pieces = first_state(), []
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        tensors = (x[:, :, part] for x in (query, key, value))
        piece, state = lightning_attention(*tensors, SLOPES, state, block=8, implementation=form)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("time", [3, 37])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_all_that_goes_in(form, time):
    def run(form, *tensors):
        query, key, value, slopes, state = tensors
        output, last = lightning_attention(query, key, value, slopes, state, block=8, implementation=form)
        return output.sin().sum() + last.square().sum()

    tensors = [x.clone().requires_grad_() for x in (*inputs(time), SLOPES, first_state())]
    expected = torch.autograd.grad(run("naive", *tensors), tensors)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    torch.testing.assert_close(torch.autograd.grad(run(form, *tensors), tensors), expected)


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_differences(form):
    tensors = [x.requires_grad_() for x in (*inputs(11), SLOPES.clone(), first_state())]
    assert torch.autograd.gradcheck(
        lambda q, k, v, s, state: lightning_attention(q, k, v, s, state, block=4, implementation=form),
        tensors,
        fast_mode=True,
    )


@pytest.mark.parametrize("form", FORMS)
def test_heads_may_share_keys(form):
    query, key, value = inputs(20, heads=6, kv_heads=3)
    slopes = torch.rand(6, dtype=torch.float64)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    expected, _ = lightning_attention(query, *repeated, slopes, implementation="naive")
    found, _ = lightning_attention(query, key, value, slopes, block=8, implementation=form)
    torch.testing.assert_close(found, expected)


def test_without_slopes_nothing_is_forgotten():
    tensors = inputs(20)
    torch.testing.assert_close(
        lightning_attention(*tensors), lightning_attention(*tensors, torch.zeros(3, dtype=torch.float64))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_summed_in_32(dtype):
    """Trap: with the state in bfloat16 the error after 1000 steps is a fifth of the result."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.nn.functional.silu(torch.randn(1, 1, 1000, 16, generator=generator)) for _ in range(2))
    value, slopes = torch.randn(1, 1, 1000, 16, generator=generator), torch.tensor([1 / 256])
    lower = [x.to(dtype) for x in (query, key, value)]
    expected, _ = lightning_attention(*(x.double() for x in lower), slopes.double(), implementation="naive")
    for form in FORMS:
        found, state = lightning_attention(*lower, slopes, implementation=form)
        assert (found.dtype, state.dtype) == (dtype, torch.float32)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 3 * torch.finfo(dtype).eps, form


def test_autocast_does_not_reach_the_sums():
    tensors, slopes = inputs(100, dtype=torch.float32), SLOPES.float()
    for form in FORMS:
        leaves = [x.clone().requires_grad_() for x in tensors]
        expected, _ = lightning_attention(*leaves, slopes, implementation=form)
        gradients = torch.autograd.grad(expected.sum(), leaves)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = lightning_attention(*leaves, slopes, implementation=form)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), gradients, rtol=0, atol=0)


def test_huge_slopes_and_long_texts_stay_finite():
    tensors = [x.requires_grad_() for x in inputs(3000, dtype=torch.float32)]
    slopes = torch.tensor([0.0, 5.0, 1e4])
    output, state = lightning_attention(*tensors, slopes)
    (output.sum() + state.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (output, state, *(x.grad for x in tensors)))
    query, key, value = tensors
    own = (query * key).sum(-1, keepdim=True) * value
    torch.testing.assert_close(output[:, 2], own[:, 2], msg="at once forgotten")


@pytest.mark.parametrize("form", OPERATORS)
def test_the_operators_are_what_torch_expects(form):
    query, key, value = (x.requires_grad_() for x in inputs(21))
    operator = getattr(torch.ops.postern, f"lightning_{form}").default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (query, key, value, SLOPES, first_state(), 8), test_utils=tests)
    strided = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key, value))
    torch.library.opcheck(operator, (*strided, SLOPES, first_state().mT.contiguous().mT, 8), test_utils=tests)


def test_compiles_without_unrolling():
    """The graph of a long text is the graph of a short one."""
    sizes = []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    for time in (200, 5000):
        torch.compiler.reset()
        tensors = inputs(time, dtype=torch.float32)
        compiled = torch.compile(lightning_attention, fullgraph=True, backend=count)
        torch.testing.assert_close(compiled(*tensors, SLOPES.float()), lightning_attention(*tensors, SLOPES.float()))
    assert sizes[0] == sizes[1] < 40


def test_the_backward_pass_keeps_a_state_a_segment():
    def kept(form, time):
        total = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (total.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()), x)[1],
            lambda x: x,
        ):
            tensors = [x.requires_grad_() for x in inputs(time, dtype=torch.float32)]
            output, _ = lightning_attention(*tensors, SLOPES.float(), implementation=form)
        for x in tensors:
            total.pop(x.untyped_storage().data_ptr())
        assert output.requires_grad
        return sum(total.values())

    per_token = 4 * 2 * 3 * (4 * 5)  # the states of 2 texts and 3 heads
    assert kept("chunk", 4096) <= per_token * (8 + 3)
    assert kept("naive", 1024) > 4 * 2 * 3 * 1024**2


def test_merging_the_heads_copies_nothing():
    output, _ = lightning_attention(*inputs(20))
    merged = output.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == output.data_ptr()


@pytest.mark.parametrize(("time", "block"), list(itertools.product([1, 8, 511, 512, 513, 1100], [1, 8, 64, 600])))
def test_pieces_cover_a_text(time, block):
    block = min(block, time)
    steps = list(blocks._steps(time, block))
    assert len(steps) == blocks._num_pieces(time, block)
    assert steps[0][0] == 0
    assert steps[-1][1] == time
    assert all(before[1] == after[0] for before, after in itertools.pairwise(steps))
    assert all((stop - start) % size == 0 for start, stop, size in steps)
    assert len(steps) <= math.ceil(time / (block * min(16, max(1, 512 // block)))) + 1


def test_rejects_what_cannot_be():
    query, key, value = inputs(3)
    with pytest.raises(ValueError, match="at least one token, got 0"):
        lightning_attention(query, key, value, block=0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        lightning_attention(*inputs(3, kv_heads=2))
    with pytest.raises(ValueError, match=r"at least one token, got \[2, 3, 0, 4\]"):
        lightning_attention(*(x[:, :, :0] for x in (query, key, value)))
    with pytest.raises(ValueError, match=r"fit queries of \[2, 3, 3, 4\].*got torch.float64 \[2, 3, 2, 4\]"):
        lightning_attention(query, key[:, :, 1:], value)
    with pytest.raises(ValueError, match=r"one number a head, \[3\], got \[2\]"):
        lightning_attention(query, key, value, SLOPES[:2])
    with pytest.raises(ValueError, match=r"state must be \[2, 3, 4, 5\], got \[2, 3, 5, 4\]"):
        lightning_attention(query, key, value, SLOPES, first_state().mT)
    with pytest.raises(ValueError, match="'chunk', 'triton', 'tiled', 'recurrent' or 'naive', got 'fast'"):
        lightning_attention(query, key, value, implementation="fast")
    with pytest.raises(ValueError, match=r"'triton' takes float32, float16 or bfloat16.*got torch.float64"):
        lightning_attention(query, key, value, implementation="triton")
    with pytest.raises((ValueError, Unavailable), match="'triton' needs"):
        lightning_attention(query.float(), key.float(), value.float(), implementation="triton")
