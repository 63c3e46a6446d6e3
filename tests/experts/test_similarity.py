"""The matrix of similarities against its definition, entry by entry."""

import math

import pytest
import torch

from postern.experts import related_tokens, similarity_matrix

KINDS = ("bilinear", "dot", "cosine", "distance")


def similarity(kind, u, v, weight):
    if kind == "bilinear":
        return float(u @ weight @ v)
    if kind == "dot":
        return float(u @ v) / math.sqrt(len(u))
    if kind == "cosine":
        return float(u @ v) / float(u.norm() * v.norm())
    return -float((u - v).square().sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
def test_equals_its_definition(kind, is_causal, is_packed):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 3, dtype=torch.float64, generator=generator) if kind == "bilinear" else None
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    documents = torch.tensor([[3, 3, 3, 3, 1], [0, 0, 1, 0, 1]])
    found = similarity_matrix(
        tokens, kind, 0.7, mask, is_causal=is_causal, weight=weight, document_ids=documents if is_packed else None
    )
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    for b in range(2):
        for i in range(5):
            others = [j for j in range(5) if (mask[b, j] or i == j) and (j <= i or not is_causal)]
            others = [j for j in others if documents[b, j] == documents[b, i] or not is_packed]
            terms = {j: math.exp(similarity(kind, tokens[b, i], tokens[b, j], weight) / 0.7) for j in others}
            for j in range(5):
                expected = terms.get(j, 0.0) / sum(terms.values())
                assert found[b, i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "distance"])
def test_towards_no_temperature_a_token_relates_to_itself_alone(kind):
    tokens = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = similarity_matrix(tokens, kind, 1e-4, is_causal=False)
    torch.testing.assert_close(found, torch.eye(6).expand(2, 6, 6))


def test_towards_a_high_temperature_all_are_alike():
    tokens = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(similarity_matrix(tokens, "dot", 1e7), expected[None])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    tokens = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True) if kind == "bilinear" else None
    torch.autograd.gradcheck(lambda u: similarity_matrix(u, kind, weight=weight), tokens)
    if weight is not None:
        torch.autograd.gradcheck(lambda w: similarity_matrix(tokens.detach(), kind, weight=w), weight)


def test_related_tokens_count_and_are_not_later():
    mask = torch.tensor([[False, True, True, False]])
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(related_tokens(4, mask)[0], expected)
    assert related_tokens(4, is_causal=False).all()
    documents = torch.tensor([[0, 0, 1, 1]])
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(related_tokens(4, document_ids=documents)[0], expected)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (("dot", 0.0), "got 0.0"),
        (("edit", 1.0), "got 'edit'"),
        (("bilinear", 1.0), "got 'bilinear' without one"),
    ],
)
def test_impossible_settings_are_refused(arguments, seen):
    with pytest.raises(ValueError, match=seen):
        similarity_matrix(torch.zeros(1, 2, 3), *arguments)
    with pytest.raises(ValueError, match="got 'dot' with one"):
        similarity_matrix(torch.zeros(1, 2, 3), "dot", weight=torch.eye(3))
