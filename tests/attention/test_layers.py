"""What every attention layer must do, whatever it computes: see `postern.attention.Attention`."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.attention import Attention, Cache
from tests.attention.layers import LAYERS, TIME, WIDTH
from tests.modules import check_module

CAUSAL = [name for name, layer in LAYERS.items() if True in layer.directions]
BOTH_WAYS = [name for name, layer in LAYERS.items() if False in layer.directions]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tokens(batch=2, time=TIME):
    return torch.randn(batch, time, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "is_causal"), [(name, direction) for name, layer in LAYERS.items() for direction in layer.directions]
)
def test_satisfies_the_protocol(name, is_causal):
    layer = LAYERS[name]
    module = layer.build(is_causal=is_causal)
    assert isinstance(module, Attention)
    assert (module.width, module.is_causal) == (WIDTH, is_causal)
    assert isinstance(module.new_cache(), Cache)
    check_module(
        partial(layer.build, is_causal=is_causal),
        torch.randn(2, TIME, WIDTH),
        compile=layer.compile,
        bfloat16=layer.bfloat16,
        tolerance=layer.tolerance,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_survives_with_a_padding_mask(name):
    layer = LAYERS[name]
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[0, 5:] = False
    build = partial(layer.build, is_causal=layer.directions[0])
    check_module(
        build, torch.randn(2, TIME, WIDTH), mask, compile=False, bfloat16=layer.bfloat16, tolerance=layer.tolerance
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_token_by_token_equals_every_prefix(name):
    layer = LAYERS[name].build(is_causal=True).double().eval()
    x, cache = tokens(), layer.new_cache()
    with torch.no_grad():
        for end in range(1, TIME + 1):
            step = layer(x[:, end - 1 : end], cache=cache)
            assert len(cache) == end
            torch.testing.assert_close(step, layer(x[:, :end])[:, -1:])


@settings(deadline=None, max_examples=10)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=5))
@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_in_chunks_equals_the_whole(name, chunks):
    torch.manual_seed(0)
    layer = LAYERS[name].build(is_causal=True).double().eval()
    x = tokens(time=sum(chunks))
    padding = torch.ones(2, sum(chunks), dtype=torch.bool)
    padding[1, 0] = False
    cache, pieces, seen = layer.new_cache(), [], 0
    for piece in x.split(chunks, dim=1):
        seen += piece.shape[1]
        pieces.append(layer(piece, padding[:, :seen], cache=cache))
    assert len(cache) == seen
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x, padding))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_layer_does_not_see_the_future(name):
    layer = LAYERS[name].build(is_causal=True).double().eval()
    x = tokens(1)
    changed = x.clone()
    changed[:, 4:] = tokens(1, TIME - 4)
    torch.testing.assert_close(layer(changed)[:, :4], layer(x)[:, :4])
    assert (layer(changed)[:, 4:] - layer(x)[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_bidirectional_layer_sees_all_tokens(name):
    layer = LAYERS[name].build(is_causal=False).double().eval()
    x, order = tokens(1), torch.randperm(TIME)
    changed = x.clone()
    changed[:, -1] = tokens(1, 1)[:, 0]
    assert ((layer(changed) - layer(x)).abs().amax(-1) > 1e-6).all()
    if LAYERS[name].knows_positions:
        assert (layer(x[:, order]) - layer(x)[:, order]).abs().max() > 1e-4
    else:
        torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@pytest.mark.parametrize("name", LAYERS)
def test_padding_changes_nothing_for_the_others(name):
    layer = LAYERS[name].build(is_causal=LAYERS[name].directions[0]).double().eval()
    x = tokens()
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(layer(x, mask)[:, :5], layer(x[:, :5]))


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_padded_on_the_left_are_as_if_they_were_not_there(name):
    """Rotations know distances alone; so the shift of the others makes no difference."""
    layer = LAYERS[name].build(is_causal=True).double().eval()
    x = tokens()
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[:, :2] = False
    torch.testing.assert_close(layer(x, mask)[:, 2:], layer(x[:, 2:]))


@pytest.mark.parametrize("name", LAYERS)
def test_masks_by_query(name):
    layer = LAYERS[name].build(is_causal=LAYERS[name].directions[0]).double().eval()
    x = tokens()
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[:, 5:] = False
    if LAYERS[name].has_any_mask:
        torch.testing.assert_close(layer(x, mask[:, None, None]), layer(x, mask))
    else:
        with pytest.raises(ValueError, match=r"its mask is boolean and \[2, 7\].*got torch.bool \[2, 1, 1, 7\]"):
            layer(x, mask[:, None, None])


@pytest.mark.parametrize("name", CAUSAL)
def test_a_copied_cache_decodes_by_itself_and_beams_reorder_it(name):
    layer = LAYERS[name].build(is_causal=True).double().eval()
    x, cache = tokens(3, 5), layer.new_cache()
    with torch.no_grad():
        layer(x[:, :3], cache=cache)
        other = copy.deepcopy(cache)
        layer(x[:, 3:], cache=other)
        assert (len(cache), len(other)) == (3, 5)
        rows = torch.tensor([2, 0])
        cache.reorder(rows)
        torch.testing.assert_close(layer(x[rows, 3:], cache=cache), layer(x)[rows, 3:])


@pytest.mark.parametrize("name", LAYERS)
def test_rejects_other_tokens(name):
    layer = LAYERS[name].build(is_causal=LAYERS[name].directions[0])
    with pytest.raises(ValueError, match=rf"\[batch, time, {WIDTH}\], got \[1, 3, 9\]"):
        layer(torch.zeros(1, 3, 9))
    with pytest.raises(ValueError, match=r"floating-point tokens, got torch\.int64"):
        layer(torch.zeros(1, 3, WIDTH, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask.*boolean.*torch\.float32"):
        layer(torch.zeros(1, 3, WIDTH), torch.ones(1, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU")
@pytest.mark.parametrize(
    ("name", "is_causal"), [(name, direction) for name, layer in LAYERS.items() for direction in layer.directions]
)
def test_a_gpu_gives_the_same_with_gradients_and_by_steps(name, is_causal):
    layer = LAYERS[name].build(is_causal=is_causal).double().eval()
    x, mask = tokens(), torch.ones(2, TIME, dtype=torch.bool)
    mask[0, :2] = False
    expected = layer(x, mask)
    parameters = [name for name, p in layer.named_parameters() if p.requires_grad]

    def gradients(module, output):
        leaves = [module.get_parameter(name) for name in parameters]
        found = torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True)
        return {name: None if g is None else g.cpu().double() for name, g in zip(parameters, found, strict=True)}

    on_gpu = copy.deepcopy(layer).to("cuda", torch.float32)
    x, mask = x.to("cuda", torch.float32), mask.cuda()
    found = on_gpu(x, mask)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients(on_gpu, found), gradients(layer, expected), rtol=1e-3, atol=1e-3)
    if is_causal:
        cache = on_gpu.new_cache()
        with torch.no_grad():
            steps = [on_gpu(x[:, t : t + 1], mask[:, : t + 1], cache=cache) for t in range(TIME)]
        torch.testing.assert_close(torch.cat(steps, 1), found, rtol=1e-3, atol=1e-4)
