"""Fading sums against their definition."""

import pytest
import torch

from postern.attention import lightning_attention


def inputs(time, heads=3, kv_heads=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, 4), (kv_heads, 4), (kv_heads, 5)
    return [torch.randn(2, h, time, d, dtype=dtype, generator=generator) for h, d in shapes]


SLOPES = torch.tensor([0.0, 0.1, 2.0], dtype=torch.float64)


def definition(query, key, value, slopes):
    steps = torch.arange(query.shape[2], dtype=query.dtype)
    distance = steps[:, None] - steps
    fading = torch.exp(-slopes[:, None, None] * distance.clamp_min(0)) * (distance >= 0)
    return (query @ key.mT * fading) @ value


@pytest.mark.parametrize("time", [1, 7, 8, 9, 40])
def test_equals_its_definition(time):
    query, key, value = inputs(time)
    found, state = lightning_attention(query, key, value, SLOPES, block=8)
    torch.testing.assert_close(found, definition(query, key, value, SLOPES))
    fading = torch.exp(-SLOPES[:, None] * torch.arange(time - 1, -1, -1))
    torch.testing.assert_close(state, (key * fading[..., None]).mT @ value)


def test_continues_from_a_state():
    query, key, value = inputs(50)
    whole, last = lightning_attention(query, key, value, SLOPES)
    state, pieces = None, []
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        piece, state = lightning_attention(*(x[:, :, part] for x in (query, key, value)), SLOPES, state, block=8)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    torch.testing.assert_close(state, last)


def test_gradients():
    tensors = [x.requires_grad_() for x in inputs(11)]
    assert torch.autograd.gradcheck(lambda q, k, v: lightning_attention(q, k, v, SLOPES, block=4), tensors)


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="at least one token, got 0"):
        lightning_attention(*inputs(3), block=0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        lightning_attention(*inputs(3, kv_heads=2))
