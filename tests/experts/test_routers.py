"""What every router, and a layer with it, must do: see `postern.experts.Router` and `MixtureOfExperts`."""

from dataclasses import replace

import pytest
import torch

from postern.experts import FeedForwardExperts, MixtureOfExperts, Router, evaluate_densely
from tests.experts.routers import BATCH, EXPERTS, ROUTERS, TIME, WIDTH, context, double
from tests.modules import check_module

SURE = [name for name, entry in ROUTERS.items() if not entry.draws]
LEARNT = [name for name, entry in ROUTERS.items() if list(entry.build().parameters())]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tokens():
    return torch.randn(BATCH, TIME, WIDTH)


def padding():
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[0, 4:] = False
    return mask


def layer_with(name):
    return MixtureOfExperts(ROUTERS[name].build(), FeedForwardExperts(EXPERTS, WIDTH, 12))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("is_training", [False, True])
def test_satisfies_the_protocol(name, is_training):
    router = ROUTERS[name].build().train(is_training)
    assert isinstance(router, Router)
    assert (router.width, router.num_experts) == (WIDTH, EXPERTS)
    routing = router(tokens(), context(mask=padding()))
    top_k = routing.indices.shape[-1]
    assert routing.weights.shape == routing.indices.shape == (BATCH, TIME, top_k)
    assert routing.indices.dtype == torch.int64
    assert ((routing.indices >= 0) & (routing.indices < EXPERTS)).all()
    ordered = routing.indices.sort(-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all(), "chosen twice"
    assert (routing.weights >= 0).all()
    assert routing.probabilities.shape == (BATCH, TIME, EXPERTS)
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(BATCH, TIME))
    assert routing.auxiliary_loss.shape == ()
    assert routing.auxiliary_loss >= 0
    if ROUTERS[name].sums_to_one and not is_training:
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(BATCH, TIME))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("is_training", [False, True])
def test_survives_in_a_layer(name, is_training):
    entry = ROUTERS[name]
    is_static = entry.compile or not is_training
    check_module(
        lambda: layer_with(name).train(is_training),
        tokens(),
        context(mask=padding()),
        compile=is_static and not entry.draws,
        meta=is_static,
        tolerance=float("inf"),
    )


@pytest.mark.parametrize("name", SURE)
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_layer_equals_its_dense_form_with_gradients(name, is_masked):
    layer = layer_with(name).double().eval()
    given = double(context(mask=padding() if is_masked else None))
    x = tokens().double().requires_grad_()
    leaves = [x, *layer.parameters()]
    found, expected = layer(x, given)[0], evaluate_densely(layer, x, given)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), leaves, allow_unused=True),
        torch.autograd.grad(expected.sin().sum(), leaves, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LEARNT)
def test_what_it_learns_has_gradients(name):
    layer = layer_with(name)
    output, routing = layer(tokens(), context())
    (output.square().sum() + routing.auxiliary_loss).backward()
    for parameter in layer.router.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", SURE)
def test_the_future_does_not_matter_where_it_may_not(name):
    router = ROUTERS[name].build().eval()
    x, given = tokens(), context()
    later = x.clone()
    later[:, 4:] = torch.randn(BATCH, TIME - 4, WIDTH)
    changed = replace(
        given,
        query=torch.cat([given.query[:, :, :4], torch.randn(BATCH, 4, TIME - 4, 6)], 2),
        key=torch.cat([given.key[:, :, :4], torch.randn(BATCH, 2, TIME - 4, 6)], 2),
    )
    before, after = router(x, given), router(later, changed)
    torch.testing.assert_close(after.probabilities[:, :4], before.probabilities[:, :4])
    assert torch.equal(after.indices[:, :4], before.indices[:, :4])


@pytest.mark.parametrize("name", SURE)
@pytest.mark.parametrize("is_causal", [True, False])
def test_tokens_that_do_not_count_do_not_matter(name, is_causal):
    layer = layer_with(name).eval()
    x, mask = tokens(), padding()
    given = context(mask=mask, is_causal=is_causal)
    (before, routing), (after, other) = layer(x, given), layer(x + 3 * ~mask[..., None], given)
    assert (before[~mask] == 0).all()
    torch.testing.assert_close(after[mask], before[mask])
    torch.testing.assert_close(other.auxiliary_loss, routing.auxiliary_loss)


@pytest.mark.parametrize("name", ROUTERS)
def test_refuses_tokens_that_do_not_fit(name):
    router = ROUTERS[name].build()
    with pytest.raises(ValueError, match=rf"\[batch, time, {WIDTH}\].*\[2, 7, 9\]"):
        router(torch.zeros(BATCH, TIME, WIDTH + 1), context())
    with pytest.raises(ValueError, match=r"mask is boolean, \[2, 7\]; got torch\.float32 \[2, 3\]"):
        router(tokens(), context(mask=torch.ones(BATCH, 3)))
    with pytest.raises(ValueError, match=r"document_ids is integer, \[2, 7\]; got torch\.float32 \[2, 7\]"):
        router(tokens(), replace(context(), document_ids=torch.ones(BATCH, TIME)))
