import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from postern.adaptive import (
    EarlyExitModel,
    ExitFeatures,
    JEIDNNTrainer,
    exit_costs,
    exit_losses,
    exit_probabilities,
    gate_loss,
    gate_targets,
    im_loss,
    positive_weights,
    replay_exits,
)
from postern.nets import ResidualMLP

COST = torch.tensor([0.25, 0.5, 1.0])


def test_losses_by_kind():
    logits = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, 0.0]])]
    labels = torch.tensor([0, 1])
    p = [each.softmax(1) for each in logits]
    expected = torch.stack([-each[[0, 1], labels].log() for each in p], 1)
    torch.testing.assert_close(exit_losses(logits, labels), expected)
    assert exit_losses(logits, labels, "error").tolist() == [[0, 1], [0, 1]]  # a tie goes to the first class
    confidence = torch.tensor([[-p[0][0, 0], 0.0], [-p[0][1, 1], 0.0]])
    torch.testing.assert_close(exit_losses(logits, labels, "confidence"), confidence)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=3, max_size=3), st.floats(0, 5))
def test_targets_against_a_loop(losses, lam):
    targets, best = gate_targets(torch.tensor([losses], dtype=torch.float64), COST.double(), lam)
    totals = [loss + lam * cost for loss, cost in zip(losses, COST.tolist(), strict=True)]
    expected = totals.index(min(totals))
    assert best.item() == expected
    assert targets[0].tolist() == [float(gate >= expected) for gate in range(2)]


def test_the_final_head_silences_all_gates():
    targets, best = gate_targets(torch.tensor([[3.0, 3.0, 0.0]]), COST, 0.1)
    assert best.item() == 2
    assert targets.tolist() == [[0.0, 0.0]]


def test_positive_weights_are_capped():
    best = torch.tensor([0] * 6 + [1] * 3 + [3])
    torch.testing.assert_close(positive_weights(best, 3), torch.tensor([4 / 6, 7 / 3, 5.0]))


def test_gate_loss_by_hand():
    log_odds = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([2.0, 3.0], dtype=torch.float64)
    g = torch.sigmoid(log_odds)
    terms = [-(1 - g[0, 0]).log(), -3 * g[0, 1].log(), -2 * g[1, 0].log(), -3 * g[1, 1].log()]
    assert gate_loss(log_odds, targets, weight).item() == pytest.approx(sum(terms).item() / 4)


def losses_and_probabilities(seed=0):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(30, 4, generator=generator, dtype=torch.float64) + 0.1
    p_exit = exit_probabilities(torch.rand(30, 4, generator=generator, dtype=torch.float64))[0][:, :-1]
    return losses.requires_grad_(), p_exit


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_differentiated_ratio_cancels_the_weights(seed):
    losses, p_exit = losses_and_probabilities(seed)
    (released,) = torch.autograd.grad(im_loss(losses, p_exit, ratio_grad=True), losses)
    (plain,) = torch.autograd.grad(losses.mean(), losses)
    assert im_loss(losses, p_exit, ratio_grad=True).item() == pytest.approx(losses.mean().item(), abs=1e-6)
    assert (released - plain).abs().max() < 1e-6


def test_a_detached_ratio_weighs_the_gradient():
    losses, p_exit = losses_and_probabilities()
    loss = im_loss(losses, p_exit)
    assert loss.item() == pytest.approx(losses.mean().item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, losses)
    ratio = losses.sum(1) / (p_exit * losses).sum(1)
    torch.testing.assert_close(gradient, p_exit * ratio[:, None].detach() / losses.numel(), rtol=1e-6, atol=1e-9)


def test_a_sample_that_no_gate_takes_gives_no_gradient():
    losses = torch.ones(2, 3, requires_grad=True)
    loss = im_loss(losses, torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))
    loss.backward()
    assert losses.grad[0].tolist() == [0, 0, 0]
    assert (losses.grad[1] > 0).all()


def test_the_weights_are_not_differentiated():
    losses, p_exit = losses_and_probabilities()
    p_exit = p_exit.clone().requires_grad_()
    im_loss(losses, p_exit, ratio_grad=True).backward()
    assert p_exit.grad is None


# -- training -------------------------------------------------------------------------------------------------------


def problem(samples=600, seed=0):
    """Features of three exits: the first tells half of the samples, the second most, and the final head all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    signal = F.one_hot(labels, 3).float()
    is_easy = torch.rand(samples, generator=generator) < 0.5
    noise = torch.randn(3, samples, 3, generator=generator)
    first = torch.where(is_easy[:, None], 3 * signal, torch.zeros(())) + 0.3 * noise[0]
    second = 2 * signal + 0.5 * noise[1]
    return ExitFeatures((first, second), 9 * signal, labels), is_easy


def model():
    torch.manual_seed(0)
    backbone = ResidualMLP(2, 3, width=3, depth=3)
    return EarlyExitModel(backbone, backbone.layers[:2], 3, widths=3)


def trainer(exits, lam, **options):
    generator = torch.Generator().manual_seed(0)
    settings = {"phase_batches": 4, "gate_lr": 0.3, "head_lr": 0.1, "batch_size": 50, "generator": generator}
    return JEIDNNTrainer(exits, lam, torch.tensor([1.0, 2.0, 4.0]), **(settings | options))


def test_easy_samples_leave_first():
    (train, _), (validation, is_easy) = problem(), problem(seed=1)
    exits = model()
    training = trainer(exits, 0.6)
    training.warm_up(train, validation)
    policy = training.fit(train, validation, epochs=6)
    with torch.no_grad():
        found = replay_exits(policy, validation.all_logits(exits))
    assert (found[is_easy] == 0).float().mean() > 0.9
    assert (found[~is_easy] == 0).float().mean() < 0.3


def test_a_higher_price_makes_samples_leave_earlier():
    (train, _), (validation, _) = problem(), problem(seed=1)
    means = []
    for lam in (0.0, 0.6, 20.0):
        exits = model()
        training = trainer(exits, lam)
        training.warm_up(train, validation)
        policy = training.fit(train, validation, epochs=6)
        with torch.no_grad():
            means.append(replay_exits(policy, validation.all_logits(exits)).double().mean().item())
    assert means[0] > means[1] + 0.3
    assert means[1] > means[2] + 0.3
    assert means[2] < 0.05


def test_warm_up_keeps_the_best():
    (train, _), (validation, _) = problem(200), problem(200, seed=1)
    exits = model()
    best = trainer(exits, 0.1, head_lr=30.0).warm_up(train, validation, epochs=5)  # far too large: it gets worse
    with torch.no_grad():
        found = [F.cross_entropy(each, validation.labels).item() for each in validation.all_logits(exits)[:2]]
    assert found == pytest.approx(best)


def test_warm_up_weighs_the_earlier_heads_more():
    """Of G = 2 exits the first one's loss counts 3 times, the last one's 2 times; seen in the first step of descent."""
    train, _ = problem(200)
    exits = model()
    expected = []
    for head, features, weight in zip(exits.heads, train.features, (3, 2), strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(head(features), train.labels), head.weight)[0]
        expected.append(head.weight.detach() - 0.1 * weight * gradient)
    trainer(exits, 0.1, batch_size=200, weight_decay=0.0).warm_up(train, train, epochs=1)
    for head, weight in zip(exits.heads, expected, strict=True):
        torch.testing.assert_close(head.weight.detach(), weight)


def test_warm_up_stops_heads_that_wait():
    """The first head learns what is wrong on validation samples: it has its best after one epoch, and is left alone."""
    (train, _), (validation, _) = problem(200), problem(200, seed=1)
    features = (validation.features[0].roll(1, 1), validation.features[1])
    misleading = ExitFeatures(features, validation.final_logits, validation.labels)
    exits = model()
    calls, states = [0, 0], []

    def count(index):
        def hook(head, inputs, output):
            calls[index] += 1
            if index == 0 and not torch.is_grad_enabled():  # the end of an epoch
                states.append(head.weight.clone())

        return hook

    for index, head in enumerate(exits.heads):
        head.register_forward_hook(count(index))
    best = trainer(exits, 0.1).warm_up(train, misleading, epochs=5, patience=1)
    assert calls == [2 * (4 + 1), 5 * (4 + 1)]  # four batches and the validation samples in an epoch
    assert torch.equal(exits.heads[0].weight, states[0])
    assert not torch.equal(states[0], states[1])
    assert best[0] > best[1]


def rates_of(training, call):
    """Learning rates at each step of descent, by the module that is trained."""
    rates, made = {}, training._optimizer

    def optimizer(module, rate):
        found = made(module, rate)
        step, seen = found.step, rates.setdefault(module, [])
        found.step = lambda: (seen.append(found.param_groups[0]["lr"]), step())
        return found

    training._optimizer = optimizer
    call()
    return rates


def test_the_rates_fall_along_a_cosine():
    """Both by the same share from batch to batch, whoever's turn it is: here each has every second batch."""
    train, _ = problem(200)
    exits = model()
    training = trainer(exits, 0.3, phase_batches=1)
    rates = rates_of(training, lambda: training.fit(train, train, epochs=2))  # eight batches
    shares = [0.02 + 0.98 * (1 + math.cos(math.pi * batch / 8)) / 2 for batch in range(8)]
    assert rates[training.policy] == pytest.approx([0.3 * share for share in shares[::2]])
    assert rates[exits.heads] == pytest.approx([0.1 * share for share in shares[1::2]])


def test_the_rate_of_the_warm_up_stays():
    train, _ = problem(200)
    exits = model()
    training = trainer(exits, 0.3)
    rates = rates_of(training, lambda: training.warm_up(train, train, epochs=2))
    assert [rates[head] for head in exits.heads] == [[0.1] * 8] * 2


def test_targets_are_weighted_anew_after_every_epoch():
    (train, _), (validation, _) = problem(200), problem(200, seed=1)
    exits = model()
    training = trainer(exits, 0.3, phase_batches=1)
    found, expected = [], []
    step_loss = training.gate_step_loss

    def recorded(batch, weight):
        if len(found) % 2 == 0:  # two turns of the gates in an epoch; the classifiers are as the last one has left them
            with torch.no_grad():
                losses = exit_losses(validation.all_logits(exits), validation.labels)
            expected.extend([positive_weights(gate_targets(losses, training.cost, 0.3)[1], 2)] * 2)
        found.append(weight)
        return step_loss(batch, weight)

    training.gate_step_loss = recorded
    training.fit(train, validation, epochs=3)
    assert [each.tolist() for each in found[:2]] == [[1, 1]] * 2
    assert [each.tolist() for each in found[2:]] == [each.tolist() for each in expected[2:]]
    assert found[2].tolist() != found[4].tolist()


def test_turns():
    """The gates have the first turn, then the classifiers; each leaves the other alone."""
    train, _ = problem(400)
    exits = model()
    training = trainer(exits, 0.3, phase_batches=8)
    heads = [each.clone() for each in exits.heads.parameters()]
    training.fit(train, train, epochs=1)  # eight batches: the gates' turn
    assert all(torch.equal(a, b) for a, b in zip(heads, exits.heads.parameters(), strict=True))
    gates = [each.clone() for each in training.policy.parameters()]
    training.fit(train, train, epochs=2)
    assert not any(torch.equal(a, b) for a, b in zip(heads, exits.heads.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gates, training.policy.parameters(), strict=True))


def test_gates_alone():
    train, _ = problem(400)
    exits = model()
    training = trainer(exits, 0.3, trains_heads=False)
    heads = [each.clone() for each in exits.heads.parameters()]
    gates = [each.clone() for each in training.policy.parameters()]
    training.fit(train, train, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(heads, exits.heads.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gates, training.policy.parameters(), strict=True))


def test_independent_gates_weigh_the_classifiers_by_their_own_probabilities():
    train, _ = problem(50)
    exits = model()
    training = trainer(exits, 0.3, gates_are_independent=True)
    logits = exits.exit_logits(train.features)
    g = torch.sigmoid(training.policy(logits)).detach()
    losses = exit_losses(logits, train.labels)
    expected = torch.autograd.grad(
        im_loss(losses, g * torch.stack([torch.ones(50), 1 - g[:, 0]], 1)), exits.heads[1].weight
    )
    found = torch.autograd.grad(training.head_step_loss(train), exits.heads[1].weight)
    torch.testing.assert_close(found, expected)
    capped = torch.autograd.grad(trainer(exits, 0.3).head_step_loss(train), exits.heads[1].weight)
    assert (capped[0] - found[0]).abs().max() > 1e-4


def test_gradients_stay_on_their_side():
    train, _ = problem(50)
    exits = model()
    training = trainer(exits, 0.3)
    training.gate_step_loss(train, torch.ones(2)).backward()
    assert all(each.grad is None for each in exits.parameters())
    assert all(each.grad is not None for each in training.policy.parameters())
    training.policy.zero_grad()
    training.head_step_loss(train).backward()
    assert all(each.grad is None for each in training.policy.parameters())
    assert all(each.grad is not None for each in exits.heads.parameters())


def test_costs_are_shares():
    exits = model()
    costs = exit_costs(exits, torch.rand(1, 2))
    assert trainer(exits, 0.1).cost.tolist() == [0.25, 0.5, 1.0]
    assert JEIDNNTrainer(exits, 0.1, costs).cost[-1] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: JEIDNNTrainer(model(), 0.1, torch.tensor([1.0, 2.0])), r"\[1.0, 2.0\]"),
        (lambda: JEIDNNTrainer(model(), 0.1, torch.tensor([2.0, 1.0, 3.0])), "rising"),
        (lambda: trainer(model(), -1.0), "lam=-1.0"),
        (lambda: trainer(model(), 1.0, phase_batches=0), "phase_batches=0"),
        (lambda: trainer(model(), 1.0, target="loss"), "'loss'"),
        (lambda: gate_targets(torch.zeros(2, 1), torch.zeros(1), 1.0), r"\[2, 1\]"),
        (lambda: exit_losses([torch.zeros(1, 2)], torch.zeros(1, dtype=torch.long), "hinge"), "'hinge'"),
        (lambda: ExitFeatures((torch.zeros(2, 3),), torch.zeros(2, 3), torch.zeros(3)), r"\[2, 2, 3\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
