"""Rotations against complex numbers, and their products against distances."""

import pytest
import torch

from postern.attention import rotary_angles, rotate


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_rotates_pairs_as_complex_numbers():
    x, angles = torch.randn(2, 3, 5, 8, dtype=torch.float64), rotary_angles(5, 8, start=3, base=100.0)
    steps = torch.arange(3, 8)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(angles, steps.float())
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles.double())
    torch.testing.assert_close(rotate(x, angles), torch.cat([turned.real, turned.imag], -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotate(x, angles).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    query, key = torch.randn(2, 16, dtype=torch.float64)
    products = [
        rotate(query[None], rotary_angles(1, 16, start=s + 5)) @ rotate(key[None], rotary_angles(1, 16, start=s)).T
        for s in (0, 7, 100)
    ]
    torch.testing.assert_close(products[1], products[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products[2], products[0], rtol=1e-4, atol=1e-4)


def test_agrees_with_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=2, vocab_size=5, intermediate_size=8)
    query, key = torch.randn(2, 1, 2, 6, 16)
    cos, sin = llama.LlamaRotaryEmbedding(config)(query, torch.arange(6)[None])
    expected = llama.apply_rotary_pos_emb(query, key, cos, sin)
    angles = rotary_angles(6, 16)
    torch.testing.assert_close((rotate(query, angles), rotate(key, angles)), expected)


@pytest.mark.parametrize(("dim", "base"), [(3, 10.0), (0, 10.0), (4, 0.0)])
def test_rejects_what_cannot_be(dim, base):
    with pytest.raises(ValueError, match=f"got {dim} and {base}"):
        rotary_angles(5, dim, base=base)


def test_frequencies_can_be_given():
    frequencies = torch.tensor([1.0, 0.3, 0.01])
    angles = rotary_angles(4, 6, start=2, step=5, frequencies=frequencies)
    torch.testing.assert_close(angles, torch.tensor([2.0, 7.0, 12.0, 17.0])[:, None] * frequencies)
    with pytest.raises(ValueError, match=r"8 features rotate in 4 pairs, got frequencies \[3\]"):
        rotary_angles(4, 8, frequencies=frequencies)
