"""Averages over related tokens: fused, with explicit weights, and head by head."""

import pytest
import torch

from postern.attention import attention_entropy, attention_weights
from postern.compare.memory import TensorMemory
from postern.experts import propagate, propagate_with_sdpa, sharpest_head

DOCUMENTS = {"one document": None, "two": torch.tensor([[4, 4, 4, 0, 0, 0], [0, 1, 0, 1, 1, 0]])}
MASKS = {"all": None, "padded": torch.tensor([[True] * 6, [True, True, False, True, False, False]])}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def given(generator):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    return draw(2, 4, 6, 3), draw(2, 2, 6, 3), draw(2, 6, 5)


def explicit(query, key, mask, is_causal, documents):
    """Weights of the heads, pair by pair."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    if documents is not None:
        others = [[[float("-inf") if a != b else 0.0 for b in row] for a in row] for row in documents.tolist()]
        logits = logits + torch.tensor(others)[:, None]
    return logits.softmax(-1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_fused_equals_explicit_with_gradients(given, mask, is_causal, is_weighted, documents):
    query, key, preferences = given
    mask, documents = MASKS[mask], DOCUMENTS[documents]
    counts = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) if is_weighted else None
    attention = explicit(query, key, mask, is_causal, documents)
    combined = (attention * (weights.view(1, 4, 1, 1) if is_weighted else 0.25)).sum(1)
    fused = propagate_with_sdpa(
        query, key, preferences, mask, is_causal=is_causal, head_weights=weights, document_ids=documents
    )
    for found in (fused, propagate(attention, preferences, mask, weights)):
        torch.testing.assert_close(found[counts], (combined @ preferences)[counts])
        ours = torch.autograd.grad(found[counts].sin().sum(), given, retain_graph=True)
        theirs = torch.autograd.grad((combined @ preferences)[counts].sin().sum(), given, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_experts", [8, 32])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_attention_weights_are_never_in_memory(generator, num_experts, kv_heads):
    query, key = (torch.randn(1, heads, 256, 16, generator=generator) for heads in (4, kv_heads))
    preferences = torch.randn(1, 256, num_experts, generator=generator).softmax(-1)
    memory = TensorMemory()
    with memory:
        found = propagate_with_sdpa(query, key, preferences)
    weights = attention_weights(query, key, is_causal=True)
    assert memory.peak < weights.nbytes
    torch.testing.assert_close(found, propagate(weights, preferences))


def test_what_attention_lacks_stays_with_the_token():
    preferences = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    # attention to earlier tokens alone: the first has none
    attention = torch.tensor([[[[0.0, 0, 0], [1, 0, 0], [0.5, 0.5, 0]]]])
    found = propagate(attention, preferences)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]]))
    without_second = propagate(attention, preferences, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(without_second[0, 2], 0.5 * preferences[0, 0] + 0.5 * preferences[0, 2])
    documents = torch.tensor([[0, 1, 1]])
    packed = propagate(attention, preferences, document_ids=documents)
    expected = torch.stack([preferences[0, 0], preferences[0, 1], 0.5 * (preferences[0, 1] + preferences[0, 2])])
    torch.testing.assert_close(packed, expected[None])


def test_the_sharpest_head_is_each_tokens_own(generator):
    attention = torch.randn(2, 3, 5, 5, generator=generator).mul(2).softmax(-1)
    found = sharpest_head(attention)
    assert found.shape == (2, 1, 5, 5)
    torch.testing.assert_close(attention_entropy(found[:, 0]), attention_entropy(attention).amin(1))
    assert len(attention_entropy(attention).argmin(1).unique()) > 1
