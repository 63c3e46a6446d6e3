"""Two passes and their loss against PyTorch's divergences, a loop of one's own, and models without experts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from postern.experts import (
    ConsistencyLoss,
    FeedForwardExperts,
    MixtureOfExperts,
    StochasticRouter,
    ensemble_log_probs,
    expert_agreement,
    expert_draws,
    symmetric_kl,
    thor_step,
    two_passes,
)
from tests.modules import check_module

WIDTH, EXPERTS, CLASSES = 6, 3, 7


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Tagger(nn.Module):
    """Two layers of experts and logits for each token."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(
            MixtureOfExperts(StochasticRouter(WIDTH, EXPERTS), FeedForwardExperts(EXPERTS, WIDTH, 8)) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.dropout(layer(x)[0])
        return self.head(x)


def inputs(batch=4, time=5):
    return torch.randn(batch, time, WIDTH)


def targets(batch=4, time=5):
    target = torch.randint(CLASSES, (batch, time))
    target[0, 3:] = -100
    return target


# -- the divergence ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), scale=st.floats(0.0, 30.0))
def test_is_the_mean_of_both_divergences(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    p, q = (scale * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    mask = torch.tensor([True, False, True])
    found = symmetric_kl(p, q, mask)
    both = [F.kl_div(a[mask], b[mask], reduction="sum", log_target=True) for a, b in ((p, q), (q, p))]
    torch.testing.assert_close(found, (both[0] + both[1]) / 2)
    torch.testing.assert_close(found, symmetric_kl(q, p, mask))
    assert found >= 0
    assert symmetric_kl(p, p) == 0


def test_gradients_reach_both_sides():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda x: symmetric_kl(*x.log_softmax(-1), mask), (logits,))
    (grad,) = torch.autograd.grad(symmetric_kl(*logits.log_softmax(-1), mask), logits)
    assert (grad[:, 1] == 0).all()
    assert (grad[:, ::2].abs().amax(-1) > 1e-4).all()


def test_16_bits_and_impossible_classes_do_no_harm():
    # in float16 the logarithm of the softmax of these is minus infinity
    p = torch.tensor([[0.0, -40.0]], dtype=torch.float16).log_softmax(-1)
    q = torch.tensor([[0.0, -20.0]], dtype=torch.float16).log_softmax(-1)
    found = symmetric_kl(p, q)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.5 * 20 * (math.exp(-20) - math.exp(-40)), rel=1e-3)
    impossible = torch.tensor([[0.0, -math.inf]])
    assert symmetric_kl(impossible, impossible) == 0


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_paper():
    first, second, target = torch.randn(4, 5, CLASSES), torch.randn(4, 5, CLASSES), targets()
    counted = target != -100
    expected = 0.0
    for p, q, y in zip(first[counted], second[counted], target[counted], strict=True):
        for logits in (p, q):
            log_probs = logits.log_softmax(-1)
            expected -= 0.9 * log_probs[y] + 0.1 * log_probs.mean()
        expected += 5.0 * symmetric_kl(p.log_softmax(-1), q.log_softmax(-1))
    loss = ConsistencyLoss(5.0, label_smoothing=0.1)
    torch.testing.assert_close(loss(first, second, target), expected / counted.sum())
    torch.testing.assert_close(loss(first, second, target, 50), expected / 50)


def test_without_a_weight_it_is_the_mean_cross_entropy_of_both():
    first, second, target = torch.randn(4, 5, CLASSES), torch.randn(4, 5, CLASSES), targets()
    found = ConsistencyLoss(0.0, label_smoothing=0.0)(first, second, target)
    parts = [F.cross_entropy(logits.flatten(0, 1), target.flatten()) for logits in (first, second)]
    torch.testing.assert_close(found, parts[0] + parts[1])


def test_takes_another_loss():
    def base(logits, target):
        return F.multi_margin_loss(logits, target, reduction="sum")

    first, second, target = torch.randn(4, CLASSES), torch.randn(4, CLASSES), torch.randint(CLASSES, (4,))
    found = ConsistencyLoss(0.0, base=base)(first, second, target)
    torch.testing.assert_close(found, (base(first, target) + base(second, target)) / 4)


def test_the_loss_survives():
    check_module(lambda: ConsistencyLoss(5.0), torch.randn(4, 5, CLASSES), torch.randn(4, 5, CLASSES), targets())


# -- two passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_concatenated", [True, False])
def test_passes_draw_experts_of_their_own(is_concatenated):
    model, x = Tagger(), inputs()
    every = []
    for first in range(EXPERTS):
        for second in range(EXPERTS):
            model.layers[0].router.force(first)
            model.layers[1].router.force(second)
            every.append(model(x))
    for layer in model.layers:
        layer.router.force(None)
    pairs = set()
    for _ in range(60):
        passes = two_passes(model, (x,), is_concatenated=is_concatenated)
        found = [[torch.allclose(one, known, atol=1e-5) for known in every] for one in passes]
        assert all(sum(matches) == 1 for matches in found)
        pairs.add(tuple(matches.index(True) for matches in found))
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == EXPERTS**2
    assert any(a != b for a, b in pairs)


def test_without_experts_dropout_tells_passes_apart():
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
    first, second = two_passes(model, (inputs(),))
    assert not torch.equal(first, second)
    first, second = two_passes(model.eval(), (inputs(1, 2),))
    torch.testing.assert_close(first, second)


def test_takes_named_arguments_and_finds_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.tagger = Tagger()

        def forward(self, x, mask, scale):
            assert len(mask) == len(x)
            return (scale * self.tagger(x), "more")

    model, x = Wrapped(), inputs()
    batch = {"x": x, "mask": torch.ones(4, dtype=torch.bool), "scale": torch.tensor(2.0)}
    with expert_draws(model, expert=1):
        first, second = two_passes(model, batch)
        torch.testing.assert_close(first, 2 * model.tagger(x))
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("is_concatenated", [True, False])
def test_a_step_can_be_repeated_and_is_what_it_says(is_concatenated):
    model, x, target, loss = Tagger(), inputs(), targets(), ConsistencyLoss(1.0)

    def drawn(seed):
        return torch.Generator().manual_seed(seed)

    found = thor_step(model, (x,), target, loss, is_concatenated=is_concatenated, generator=drawn(1))
    again = thor_step(model, (x,), target, loss, is_concatenated=is_concatenated, generator=drawn(1))
    torch.testing.assert_close(found, again)
    passes = two_passes(model, (x,), is_concatenated=is_concatenated, generator=drawn(1))
    torch.testing.assert_close(found, loss(*passes, target))


def test_steps_make_experts_agree():
    model, x = Tagger(), inputs(16)
    target = targets(16)
    before = expert_agreement(model, (x,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        thor_step(model, (x,), target, ConsistencyLoss(5.0)).backward()
        optimizer.step()
    assert expert_agreement(model, (x,)) < before / 3


# -- agreement --------------------------------------------------------------------------------------------------------


def test_equal_experts_agree_and_others_do_not():
    model, x = Tagger(dropout=0.5), inputs()
    assert expert_agreement(model, (x,)) > 1e-3
    assert model.training
    with torch.no_grad():
        for layer in model.layers:
            for parameter in layer.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
    assert expert_agreement(model, (x,)) == pytest.approx(0, abs=1e-6)


def test_agreement_is_a_mean_over_pairs_and_counted_tokens():
    model, x, mask = Tagger(), inputs(), targets() != -100
    found = expert_agreement(model, (x,), mask, num_draws=3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), expert_draws(model.eval(), generator=torch.Generator().manual_seed(1)):
        a, b, c = (model(x).log_softmax(-1)[mask] for _ in range(3))
    expected = (symmetric_kl(a, b) + symmetric_kl(a, c) + symmetric_kl(b, c)) / 3 / mask.sum()
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("fixed", "seen"),
    [
        ({"level": "ensemble"}, "level='ensemble'; draw by"),
        ({"expert": 1}, "expert=1;"),
        ({"expert": torch.tensor([0, 2, 1, 1])}, r"expert=\[0, 2, 1, 1\];"),
    ],
)
def test_what_is_not_drawn_is_not_said_to_agree(fixed, seen):
    model, x = Tagger(), inputs()
    with expert_draws(model, **fixed):
        with pytest.raises(ValueError, match=seen):
            expert_agreement(model, (x,))
        model.layers[0].router.force(None)
        with expert_draws(model, level="sentence"):
            assert expert_agreement(model, (x,)) > 1e-3


def test_all_experts_predict_together():
    model, x = Tagger(), inputs()
    probabilities = []
    for expert in range(EXPERTS):
        with torch.no_grad(), expert_draws(model, expert=expert):
            probabilities.append(model(x).softmax(-1))
    torch.testing.assert_close(ensemble_log_probs(model, (x,)).exp(), torch.stack(probabilities).mean(0))


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: symmetric_kl(torch.zeros(2, 3), torch.zeros(2, 4)), r"\[2, 3\], \[2, 4\] and None"),
        (lambda: symmetric_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool)), r"and \[3\]"),
        (lambda: ConsistencyLoss(-1.0), "got -1.0"),
        (lambda: ConsistencyLoss(label_smoothing=1.0), "and 1.0"),
        (
            lambda: ConsistencyLoss()(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)),
            r"\[2, 3\], \[2, 3\] and \[3\]",
        ),
        (lambda: expert_agreement(Tagger(), (inputs(),), num_draws=1), "got 1"),
        (lambda: expert_agreement(nn.Linear(WIDTH, 2), (inputs(),)), "Linear has no StochasticRouter"),
    ],
)
def test_refuses_what_does_not_fit(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


def test_an_ensemble_needs_as_many_experts_everywhere():
    model = Tagger()
    model.layers[0] = MixtureOfExperts(StochasticRouter(WIDTH, 2), FeedForwardExperts(2, WIDTH, 8))
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        ensemble_log_probs(model, (inputs(),))
