"""Attention by its circuits against attention by queries, keys and values."""

import pytest
import torch
from torch import nn

from postern.dynamics import InContextAttention, InContextRegression, in_context_attention, linear_mean, linear_sum
from postern.softmax import clipped_softmax
from tests.modules import check_module

WEIGHTINGS = {
    "softmax": (torch.softmax, lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True)),
    "sum": (linear_sum, lambda logits: logits),
    "mean": (linear_mean, lambda logits: logits / 11),
}


def prompts(outputs=1, batch=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    task = InContextRegression(4, tasks=[range(4)] * outputs)
    return task.sample(batch, 11, generator=generator, dtype=dtype)


def projected(examples, query, model, weigh, index=...):
    """The definition: three projections of every token, head by head, and the output's projection."""
    total = 0
    for head in range(model.num_heads):
        w_q, w_k, w_v, w_o = (p[index][head] for p in (model.query, model.key, model.value, model.output))
        queries, keys, values = query @ w_q.T, examples @ w_k.T, examples @ w_v.T
        logits = torch.einsum("ble,be->bl", keys, queries) / queries.shape[-1] ** 0.5
        total = total + torch.einsum("bl,ble->be", weigh(logits), values) @ w_o.T
    return total


@pytest.mark.parametrize("kind", WEIGHTINGS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_equals_projected_attention_with_its_gradients(kind, outputs):
    torch.manual_seed(0)
    weighting, weigh = WEIGHTINGS[kind]
    model = InContextAttention(4, 3, outputs, weighting=weighting).double()
    batch = prompts(outputs)
    found, expected = model(batch.examples, batch.query), projected(batch.examples, batch.query, model, weigh)
    torch.testing.assert_close(found, expected)
    gradients = (
        torch.autograd.grad((out - batch.target).square().mean(), model.parameters()) for out in (found, expected)
    )
    for own, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(own, reference)
        assert own.abs().max() > 0


def test_models_side_by_side_are_models_alone():
    torch.manual_seed(0)
    model = InContextAttention(4, 2, 2, num_models=3).double()
    batch = prompts(2)
    found = model(batch.examples, batch.query)
    assert found.shape == (3, 6, 2)
    for index in range(3):
        expected = projected(batch.examples, batch.query, model, WEIGHTINGS["softmax"][1], index)
        torch.testing.assert_close(found[index], expected)
    first = model.circuits()[0]
    alone = in_context_attention(batch.examples, batch.query, first.key_query, first.output_value)
    torch.testing.assert_close(found[0], alone)


def test_training_side_by_side_is_training_alone():
    torch.manual_seed(0)
    together = InContextAttention(4, 2, num_models=2)
    alone = InContextAttention(4, 2)
    with torch.no_grad():
        for own, both in zip(alone.parameters(), together.parameters(), strict=True):
            own.copy_(both[1])
    for model in (together, alone):
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            batch = InContextRegression(4).sample(16, 12, generator=generator)
            loss = (model(batch.examples, batch.query) - batch.target).square().mean((-2, -1)).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for own, both in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(own, both[1], atol=1e-4, rtol=1e-3)


def test_the_order_of_examples_does_not_matter_and_softmax_forgets_their_number():
    torch.manual_seed(0)
    batch = prompts()
    model = InContextAttention(4, 3).double()
    found = model(batch.examples, batch.query)
    torch.testing.assert_close(model(batch.examples.flip(1), batch.query), found)
    twice = torch.cat([batch.examples, batch.examples], 1)
    torch.testing.assert_close(model(twice, batch.query), found)
    for weighting, factor in ((linear_mean, 1), (linear_sum, 2)):
        linear = InContextAttention(4, 3, weighting=weighting).double()
        torch.testing.assert_close(linear(twice, batch.query), factor * linear(batch.examples, batch.query))


def test_any_softmax_can_weigh():
    torch.manual_seed(0)
    batch = prompts()
    model = InContextAttention(4, 3).double()
    model.weighting = lambda logits, dim: clipped_softmax(logits, dim, gamma=-0.1)
    found = model(batch.examples, batch.query)
    expected = projected(batch.examples, batch.query, model, lambda logits: clipped_softmax(logits, -1, gamma=-0.1))
    torch.testing.assert_close(found, expected)


def test_random_values_are_those_of_linear_layers():
    torch.manual_seed(0)
    model = InContextAttention(4, 200)
    for own, layer in (
        (model.query, nn.Linear(5, 5 * 200, bias=False)),
        (model.output, nn.Linear(5 * 200, 1, bias=False)),
    ):
        assert own.abs().max().item() == pytest.approx(layer.weight.abs().max().item(), rel=0.01)
        assert own.std().item() == pytest.approx(layer.weight.std().item(), rel=0.05)


def test_opposite_heads_start_small_in_pairs_with_matching_signs():
    torch.manual_seed(0)
    model = InContextAttention(4, 6, 2, init="opposite", num_models=3)
    circuits = model.circuits()
    signs = torch.tensor([1.0] * 3 + [-1.0] * 3)
    torch.testing.assert_close(circuits.omega, (signs * 1e-12 / 6**0.5).expand(3, 6), atol=1e-16, rtol=1e-4)
    assert (circuits.mu[..., 0] * signs > 0).all()
    assert (circuits.mu[..., 1] * signs > 0).all()


def test_module():
    batch = prompts(2, dtype=torch.float32)
    for options in ({}, {"init": "opposite", "num_models": 2}, {"weighting": linear_mean}):
        check_module(lambda options=options: InContextAttention(4, 2, 2, **options), batch.examples, batch.query)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "'dim': 0"),
        ({"num_models": 0}, "'num_models': 0"),
        ({"init": "zero"}, "got 'zero'"),
        ({"init": "opposite", "num_heads": 3}, "num_heads=3"),
    ],
)
def test_impossible_models(options, message):
    with pytest.raises(ValueError, match=message):
        InContextAttention(**{"dim": 4, "num_heads": 2} | options)


def test_impossible_prompts():
    model, batch = InContextAttention(4, 2), prompts(dtype=torch.float32)
    with pytest.raises(ValueError, match="belong together"):
        model(batch.examples[..., :4], batch.query)
    with pytest.raises(ValueError, match=r"\[6, 5\], got \[5, 5\]"):
        model(batch.examples, batch.query[:5])
