"""The frame around attention: positions in images, padding in them, and softmax inside."""

import pytest
import torch

from postern.attention import (
    FramedLinearAttention,
    FramedSoftmaxAttention,
    attention_weights,
    grid_angles,
    relu_features,
    rotate,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_softmax_in_the_frame_equals_its_definition():
    layer = FramedSoftmaxAttention(16, 2, rotary="2d", has_lepe=True).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    query, key, value = layer.project(x)
    angles = grid_angles(2, 3, 8)
    heads = attention_weights(rotate(query, angles), rotate(key, angles)) @ value
    local = layer.lepe(layer.value(x).mT.unflatten(-1, (2, 3))).flatten(2).mT
    merged = layer.norm(heads.transpose(1, 2).flatten(2) + local)
    expected = layer.output(merged * torch.nn.functional.silu(layer.gate(x)))
    torch.testing.assert_close(layer(x, grid=(2, 3)), expected)


def test_eps_weighs_the_same_at_any_length():
    """Ten times the same tokens: the same output, although the products are near eps."""
    layer = FramedLinearAttention(8, 2, query_features=relu_features).double()
    with torch.no_grad():
        for projection in (layer.query, layer.key):
            projection.weight.mul_(1e-3)
            projection.bias.zero_()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x.repeat(1, 10, 1))[:, :4], layer(x))


@pytest.mark.parametrize("kind", [FramedLinearAttention, FramedSoftmaxAttention])
def test_padding_does_not_leak_into_an_image(kind):
    layer = kind(8, 2, rotary="2d", has_lepe=True).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[:, 6:] = False
    other = x.clone()
    other[:, 6:] = torch.randn(1, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(other, mask)[:, :6], layer(x, mask)[:, :6])


def test_rotation_knows_the_shift_in_each_direction_alone():
    query, key = torch.randn(2, 8, dtype=torch.float64)
    angles = grid_angles(5, 6, 8).double()
    at = lambda row, column: angles[row * 6 + column]  # noqa: E731

    def product(one, other):
        return rotate(query[None], at(*one)[None])[0] @ rotate(key[None], at(*other)[None])[0]

    torch.testing.assert_close(product((0, 0), (2, 3)), product((2, 2), (4, 5)), rtol=1e-5, atol=1e-6)
    assert (product((0, 0), (2, 3)) - product((0, 0), (3, 2))).abs() > 1e-3


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="3 x 3 has as many tokens, got 10; give its grid"):
        FramedLinearAttention(8, 2, has_lepe=True)(torch.zeros(1, 10, 8))
    with pytest.raises(ValueError, match="not causal; got rotary='2d', has_lepe=False, is_causal=True"):
        FramedLinearAttention(8, 2, rotary="2d", is_causal=True)
    with pytest.raises(ValueError, match="got rotary=None, has_lepe=True"):
        FramedSoftmaxAttention(8, 2, has_lepe=True, is_causal=True)
    with pytest.raises(ValueError, match="multiple of 4 features and a positive base, got 6"):
        FramedLinearAttention(12, 2, rotary="2d")
    with pytest.raises(ValueError, match=r"even number of features.*got 3"):
        FramedLinearAttention(6, 2, rotary="1d")
    with pytest.raises(ValueError, match="'1d', '2d' or None, got '3d'"):
        FramedLinearAttention(8, 2, rotary="3d")
