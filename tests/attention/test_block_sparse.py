"""Pooling, the gate, its target, choosing blocks and attention to those that are chosen, against plain loops."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from postern.attention import (
    BLOCK_SCORERS,
    AttnGate,
    ScorerInput,
    attention_weights,
    block_density,
    block_sparse_attention,
    gate_distillation_loss,
    pool_blocks,
    pooled_attention_target,
    rotary_angles,
    rotate,
    select_blocks,
)
from tests.modules import check_module

REDUCE = {"avg": lambda x: x.mean(0), "max": lambda x: x.amax(0), "min": lambda x: x.amin(0)}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def heads(time, *, batch=2, count=4, kv_count=2, dim=6):
    make = lambda number: torch.randn(batch, number, time, dim, dtype=torch.float64)  # noqa: E731
    return make(count), make(kv_count), make(kv_count)


def number_of_blocks(time, block):
    return -(-time // block)


# -- pooling and the gate ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(time=st.integers(1, 9), block=st.integers(1, 4), cut=st.integers(0, 8))
def test_pooling_is_over_each_blocks_own_tokens(time, block, cut):
    x = torch.randn(2, 3, time, 4, dtype=torch.float64)
    lengths = torch.tensor([time, max(0, time - cut)])
    poolings = ("max", "avg", "min")
    pooled = pool_blocks(x, block, poolings)
    padded = pool_blocks(x, block, poolings, lengths)
    assert pooled.shape == (2, 3, number_of_blocks(time, block), 12)
    for sequence, length in enumerate(lengths.tolist()):
        for index in range(pooled.shape[2]):
            own = x[sequence, :, index * block : min((index + 1) * block, length)]
            for found, until in ((pooled, time), (padded, length)):
                own = x[sequence, :, index * block : min((index + 1) * block, until)]
                expected = (
                    torch.cat([REDUCE[name](own.transpose(0, 1)) for name in poolings], dim=-1)
                    if own.shape[1]
                    else torch.zeros(3, 12, dtype=torch.float64)
                )
                torch.testing.assert_close(found[sequence, :, index], expected)


@pytest.mark.parametrize(
    ("options", "has_query_weight", "key_heads"),
    [
        ({}, False, 4),
        ({"key_pooling": ("avg",)}, False, 4),
        ({"gate_dim": 10}, True, 2),
        ({"query_pooling": ("avg", "max")}, True, 2),
        ({"has_query_weight": True}, True, 2),
        ({"rotary_base": None}, False, 4),
        ({"rotary_base": None, "frequencies": torch.tensor([0.5, 0.1, 0.02])}, False, 4),
    ],
)
def test_the_gate_is_a_small_attention_over_blocks(options, has_query_weight, key_heads):
    gate = AttnGate(6, 4, 2, block=3, **options).double()
    query, key, _ = heads(10)
    scores = gate(query, key)
    assert (gate.query_weight is not None) == has_query_weight
    assert len(gate.keys.weight) == key_heads
    positions = 3 * torch.arange(4, dtype=torch.float64)
    if "frequencies" in options:
        angles = positions[:, None] * options["frequencies"]
    elif options.get("rotary_base", 10_000.0) is None:
        angles = torch.zeros(4, gate.gate_dim // 2)
    else:
        angles = rotary_angles(10, gate.gate_dim)[::3]
    for head in range(4):
        q = pool_blocks(query, 3, gate.query_pooling)[:, head]
        if has_query_weight:
            q = q @ gate.query_weight[head]
        k = pool_blocks(key, 3, gate.keys.poolings)[:, head // 2]
        k = k @ gate.keys.weight[head // 2 if has_query_weight else head]
        expected = rotate(q, angles) @ rotate(k, angles).transpose(1, 2) / math.sqrt(gate.gate_dim)
        order = torch.ones(4, 4, dtype=torch.bool).tril()
        torch.testing.assert_close(scores[:, head][:, order], expected[:, order])
    assert (scores.softmax(-1).triu(1) == 0).all()


def test_the_gate_knows_distances_of_blocks_alone():
    gate = AttnGate(6, 2, block=2).double()
    query, key, _ = heads(8, count=2)
    torch.testing.assert_close(gate(query, key)[:, :, 2:, 2:], gate(query[:, :, 4:], key[:, :, 4:]))


@pytest.mark.parametrize("options", [{}, {"gate_dim": 4, "query_pooling": ("max", "min")}])
def test_the_gate_as_a_module(options):
    query, key, _ = heads(9)
    check_module(lambda: AttnGate(6, 4, 2, block=2, **options), query.float(), key.float(), torch.tensor([9, 4]))


# -- the target and the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements_at_once", [1, 500, 1 << 20])
@pytest.mark.parametrize(("time", "block"), [(12, 4), (13, 4), (3, 4), (5, 1)])
def test_the_target_is_the_pooled_map(time, block, elements_at_once):
    query, key, _ = heads(time)
    lengths = torch.tensor([time, max(1, time - 5)])
    weights = attention_weights(query, key, is_causal=True, scale=0.7)
    n = number_of_blocks(time, block)
    expected = torch.zeros(2, 4, n, n, dtype=torch.float64)
    for sequence, length in enumerate(lengths.tolist()):
        for i in range(number_of_blocks(length, block)):
            for j in range(i + 1):
                rows = slice(i * block, min((i + 1) * block, length))
                expected[sequence, :, i, j] = weights[sequence, :, rows, j * block : (j + 1) * block].amax((1, 2))
    expected = expected / expected.sum(-1, keepdim=True).clamp_min(1e-300)
    found = pooled_attention_target(query, key, block, lengths=lengths, scale=0.7, elements_at_once=elements_at_once)
    torch.testing.assert_close(found, expected)


def test_the_target_keeps_a_needle_that_a_mean_would_hide():
    query, key = torch.zeros(2, 1, 1, 64, 4)
    query[..., -1, 0], key[..., 3, 0] = 20.0, 20.0
    target = pooled_attention_target(query, key, 16)
    assert target[0, 0, 3].argmax() == 0
    assert target[0, 0, 3, 0] > 0.9


def test_the_target_is_stable_and_detached():
    query, key, _ = heads(8)
    target = pooled_attention_target((1e4 * query).requires_grad_(), key, 2)
    assert torch.isfinite(target).all()
    assert not target.requires_grad
    assert pooled_attention_target(query.bfloat16(), key.bfloat16(), 2).dtype == torch.float32


def test_the_loss_is_the_divergence_of_the_later_rows():
    scores = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9)
    target = torch.rand(2, 3, 8, 8, dtype=torch.float64).tril()
    target = target / target.sum(-1, keepdim=True)
    q = scores.softmax(-1)[:, :, 2:]
    p = target[:, :, 2:]
    divergence = torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0.0)
    torch.testing.assert_close(gate_distillation_loss(scores, target), divergence.sum(-1).mean())
    torch.testing.assert_close(
        gate_distillation_loss(scores, target, reduction="mean"),
        torch.nn.KLDivLoss(reduction="mean")(scores[:, :, 2:].log_softmax(-1), p),
    )
    assert gate_distillation_loss(target.log().clamp_min(-1e9), target, drop_first=0.0).abs() < 1e-12
    with_padding = torch.cat([target, torch.zeros(2, 3, 2, 8, dtype=torch.float64)], dim=2)[:, :, 2:]
    padded_scores = torch.cat([scores, scores[:, :, :2]], dim=2)[:, :, 2:]
    torch.testing.assert_close(
        gate_distillation_loss(padded_scores, with_padding, drop_first=0.0), divergence.sum(-1).mean()
    )


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_rules():
    scores = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    probabilities = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -1e9).softmax(-1)
    own = torch.eye(10, dtype=torch.bool)
    bare = {"dense_last": 0, "keeps_diagonal": False}
    assert torch.equal(select_blocks(scores, threshold=0.1, **bare), probabilities > 0.1)
    assert torch.equal(select_blocks(scores, threshold=0.1, dense_last=0), (probabilities > 0.1) | own)
    assert torch.equal(select_blocks(scores, threshold=0.0), torch.ones_like(scores).tril().bool())
    for k in (1, 3, 10, 12):
        kept = select_blocks(scores, top_k=k, **bare)
        forced = select_blocks(scores, top_k=k, dense_last=0)
        for i in range(10):
            counted = torch.full((2, 3), min(k, i + 1))
            assert torch.equal(kept[:, :, i].sum(-1), counted)
            assert torch.equal(forced[:, :, i].sum(-1), counted)
            lowest_kept = probabilities[:, :, i].where(kept[:, :, i], torch.inf).amin(-1)
            assert (lowest_kept >= probabilities[:, :, i].where(~kept[:, :, i], -1.0).amax(-1)).all()
        assert forced.diagonal(dim1=2, dim2=3).all()
    last = select_blocks(scores, top_k=1)
    assert torch.equal(last[:, :, -2:], torch.ones(2, 3, 10, 10).tril()[:, :, -2:].bool())
    assert (last[:, :, :-2].sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("density", "n", "k"), [(0.1, 64, 3), (0.1, 256, 13), (0.5, 16, 4), (0.001, 8, 1), (1.0, 7, 7)]
)
def test_the_density_is_about_that_of_the_triangle(density, n, k):
    kept = select_blocks(torch.randn(1, 1, n, n), density=density, dense_last=0)
    assert kept[..., -1, :].sum() == k
    assert block_density(kept) == pytest.approx(kept.sum().item() / (n * (n + 1) / 2))
    if n >= 64:
        assert block_density(kept) == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize("rule", [{"density": 0.5}, {"top_k": 2}, {"threshold": 0.15}])
def test_shorter_sequences_are_chosen_for_as_if_alone(rule):
    scores = torch.randn(2, 3, 12, 12)
    together = select_blocks(scores, **rule, num_blocks=torch.tensor([12, 7]))
    assert torch.equal(together[0], select_blocks(scores[:1], **rule)[0])
    assert torch.equal(together[1, :, :7, :7], select_blocks(scores[1:, :, :7, :7], **rule)[0])


# -- scores without training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time", "lengths"), [(12, None), (11, None), (12, [12, 7])])
def test_scorers(time, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    query, key, _ = heads(time)
    plain_query, plain_key, _ = heads(time)
    x = ScorerInput(query, key, plain_query, plain_key, 4, lengths, scale=0.5)
    scores = {name: scorer(x) for name, scorer in BLOCK_SCORERS.items()}
    assert all(found.shape == (2, 4, 3, 3) for found in scores.values())
    torch.testing.assert_close(
        scores["oracle"].exp().tril()[0], pooled_attention_target(query, key, 4, scale=0.5)[0], atol=1e-12, rtol=1e-9
    )
    assert torch.equal(select_blocks(scores["streaming"], top_k=2)[0, 0, 2], torch.tensor([True, True, True]))
    for head in range(4):
        for i in range(3):
            for j in range(i + 1):
                q, k = (side[0, h, n * 4 : (n + 1) * 4] for side, h, n in ((query, head, i), (key, head // 2, j)))
                plain_q = plain_query[0, head, i * 4 : (i + 1) * 4].mean(0)
                plain_k = plain_key[0, head // 2, j * 4 : (j + 1) * 4].mean(0)
                torch.testing.assert_close(scores["minference_block"][0, head, i, j], 0.5 * q.mean(0) @ k.mean(0))
                torch.testing.assert_close(scores["avgpool_qk"][0, head, i, j], 0.5 * plain_q @ plain_k)
                bound = torch.maximum(q * k.amax(0), q * k.amin(0)).sum(-1).max()
                torch.testing.assert_close(scores["quest"][0, head, i, j], 0.5 * bound)
                assert bound >= (q @ k.T).max() - 1e-12


def test_streaming_keeps_the_first_block_and_the_latest():
    query, key, _ = heads(20)
    kept = select_blocks(BLOCK_SCORERS["streaming"](ScorerInput(query, key, query, key, 2)), top_k=3, dense_last=0)
    for i in range(10):
        assert kept[0, 0, i].nonzero().flatten().tolist() == sorted({0, max(0, i - 1), i})


# -- sparse attention -------------------------------------------------------------------------------------------------


def naive(query, key, value, blocks, block, scale):
    """One query at a time, in a loop."""
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                kept = [s for s in range(t + 1) if blocks[b, h, t // block, s // block]]
                if kept:
                    weights = torch.softmax(scale * key[b, h // group, kept] @ query[b, h, t], 0)
                    output[b, h, t] = weights @ value[b, h // group, kept]
    return output


@settings(deadline=None, max_examples=25)
@given(time=st.integers(1, 14), block=st.integers(1, 5), share=st.floats(0, 1), seed=st.integers(0, 1000))
@pytest.mark.parametrize("implementation", ["auto", "dense"])
def test_attends_to_what_is_kept(implementation, time, block, share, seed):
    torch.manual_seed(seed)
    query, key, value = heads(time)
    n = number_of_blocks(time, block)
    blocks = torch.rand(2, 4, n, n) < share
    found = block_sparse_attention(query, key, value[..., :5], blocks, block, scale=0.6, implementation=implementation)
    torch.testing.assert_close(found, naive(query, key, value[..., :5], blocks, block, 0.6))


@pytest.mark.parametrize("time", [16, 13])
def test_flex_attention_attends_to_what_is_kept(time):
    query, key, value = (x.float() for x in heads(time))
    n = number_of_blocks(time, 4)
    blocks = (torch.rand(2, 4, n, n) < 0.5) | torch.eye(n, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        found = block_sparse_attention(query, key, value, blocks, 4, implementation="flex")
    torch.testing.assert_close(found, block_sparse_attention(query, key, value, blocks, 4, implementation="dense"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "time", "head_dim"), [(64, 1000, 64), (64, 512, 128), (48, 200, 16), (16, 77, 32)])
def test_all_forms_agree_on_a_gpu(block, time, head_dim, dtype):
    query = torch.randn(2, 4, time, head_dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 2, 2, time, head_dim, device="cuda", dtype=dtype)
    n = number_of_blocks(time, block)
    blocks = (torch.rand(2, 4, n, n, device="cuda") < 0.5) | torch.eye(n, dtype=torch.bool, device="cuda")
    exact = [x.double() for x in (query, key, value)]
    expected = block_sparse_attention(*exact, blocks, block, implementation="dense").to(dtype)
    for implementation in ("auto", "flex", "gather"):
        found = block_sparse_attention(query, key, value, blocks, block, implementation=implementation)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=3e-2 if dtype == torch.bfloat16 else 5e-3)


def test_with_all_blocks_it_is_attention():
    query, key, value = heads(37)
    blocks = torch.ones(2, 4, 5, 5, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(block_sparse_attention(query, key, value, blocks, 8), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precisions(dtype):
    query, key, value = heads(50)
    blocks = select_blocks(torch.randn(2, 4, 7, 7), top_k=3)
    exact = block_sparse_attention(query, key, value, blocks, 8)
    found = block_sparse_attention(query.to(dtype), key.to(dtype), value.to(dtype), blocks, 8)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=0.03 if dtype != torch.float32 else 1e-5, rtol=0.03)


def test_gradients_equal_those_of_masked_attention():
    tensors = [x.requires_grad_() for x in heads(11)]
    blocks = select_blocks(torch.randn(2, 4, 4, 4), top_k=2, dense_last=1)
    blocks[0, 0, 1] = False
    grad = torch.randn(2, 4, 11, 6, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(block_sparse_attention(*tensors, blocks, 3, implementation=name), tensors, grad)
        for name in ("gather", "dense")
    )
    torch.testing.assert_close(found, expected)
    half = [x.detach().bfloat16().requires_grad_() for x in tensors]
    for x, y in zip(
        torch.autograd.grad(block_sparse_attention(*half, blocks, 3), half, grad.bfloat16()), expected, strict=True
    ):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.double(), y, atol=0.1, rtol=0.05)


def test_gradcheck():
    tensors = [x.requires_grad_() for x in heads(5, batch=1, count=2, kv_count=1, dim=2)]
    blocks = select_blocks(torch.randn(1, 2, 3, 3), top_k=2, dense_last=0)
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, blocks, 2), tensors)


def test_the_operator_keeps_torchs_rules():
    tensors = [x.requires_grad_() for x in heads(7)]
    blocks = select_blocks(torch.randn(2, 4, 3, 3), top_k=2)
    torch.library.opcheck(torch.ops.postern.block_sparse_attention.default, (*tensors, blocks, 3, 0.5, False))


def test_memory_follows_the_blocks_that_are_kept():
    """16,384 tokens: the whole map would take 1 GiB."""
    query, key, value = torch.randn(3, 1, 1, 16_384, 4)
    blocks = select_blocks(torch.randn(1, 1, 256, 256), top_k=2, dense_last=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        block_sparse_attention(query, key, value, blocks, 64)
    assert max(event.cpu_memory_usage for event in profile.events()) < 32 * 2**20


# -- errors -----------------------------------------------------------------------------------------------------------

BLOCKS = torch.ones(1, 2, 2, 2, dtype=torch.bool)
QKV = torch.zeros(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttnGate(6, 4, 3), "num_kv_heads, got 4 and 3"),
        (lambda: AttnGate(5, 2), "even number of features.*got 5"),
        (lambda: AttnGate(6, 2, query_pooling=("sum",)), r"avg, max, min, each once; got \('sum',\)"),
        (lambda: AttnGate(6, 2, key_pooling=()), r"got \(\)"),
        (lambda: AttnGate(6, 2, key_pooling=("avg", "avg")), "each once"),
        (lambda: AttnGate(6, 2, gate_dim=4, has_query_weight=False), r"got \('avg',\), 4 and 6"),
        (lambda: AttnGate(6, 2, block=0), "block=0"),
        (lambda: AttnGate(6, 2, frequencies=torch.ones(2)), r"3 pairs, got frequencies \[2\]"),
        (lambda: AttnGate(4, 2)(QKV, torch.zeros(1, 1, 4, 4)), r"of 2 heads.*got \[1, 2, 4, 4\] and \[1, 1, 4, 4\]"),
        (lambda: pool_blocks(QKV, 0), "blocks of 0 and 4 tokens"),
        (lambda: pooled_attention_target(QKV, QKV[:, :, :3], 2), "blocks of 2, 4 queries and 3 keys"),
        (lambda: gate_distillation_loss(QKV, QKV[:, :1]), r"got \[1, 2, 4, 4\] and \[1, 1, 4, 4\]"),
        (lambda: gate_distillation_loss(QKV, QKV, drop_first=1.0), r"\[0, 1\), got 1\.0"),
        (lambda: gate_distillation_loss(QKV, QKV, reduction="sum"), "got 'sum'"),
        (lambda: select_blocks(QKV), "one of threshold, density and top_k, got none"),
        (lambda: select_blocks(QKV, density=0.5, top_k=1), r"got \{'density': 0\.5, 'top_k': 1\}"),
        (lambda: select_blocks(QKV, threshold=1.0), r"\[0, 1\), got 1\.0"),
        (lambda: select_blocks(QKV, density=0.0), r"\(0, 1\], got 0\.0"),
        (lambda: select_blocks(QKV, top_k=0), "at least 1, got 0"),
        (lambda: select_blocks(QKV, top_k=1, dense_last=-1), "at least 0; got -1"),
        (lambda: block_sparse_attention(QKV, QKV, QKV, BLOCKS, 3, implementation="fast"), "got 'fast'"),
        (lambda: block_sparse_attention(QKV, QKV, QKV, BLOCKS, 1), r"\[1, 2, 4, 4\], got torch.bool \[1, 2, 2, 2\]"),
        (lambda: block_sparse_attention(QKV, QKV, QKV, BLOCKS.float(), 2), r"got torch\.float32"),
        (lambda: block_sparse_attention(QKV, QKV[:, :, :3], QKV, BLOCKS, 2), r"\[1, 2, 3, 4\]"),
        (lambda: block_sparse_attention(QKV, QKV, QKV, BLOCKS, 0), "blocks of 0"),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()
