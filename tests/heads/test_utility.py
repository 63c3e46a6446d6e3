import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from postern.heads import (
    UtilityView,
    class_utility,
    margin_monotonicity,
    ordinal_agreement,
    preference_gradient,
    sample,
    sampled_preference_gradient,
    sequence_lengths,
    sequence_utility,
)
from postern.nets import MLP, LanguageModel
from tests.modules import check_module

CLASSES = 12


def language_model() -> LanguageModel:
    return LanguageModel(5, 8, 1, 2, context=8, initial_std=0.5)


def test_view_is_a_module():
    check_module(lambda: UtilityView(MLP(4, 3, (8,))), torch.randn(6, 4), torch.randint(3, (6,)))
    prompts, y = torch.randint(5, (3, 2)), torch.randint(5, (3, 4))
    check_module(lambda: UtilityView(language_model(), end=0), prompts, y)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_length_counts_up_to_the_first_end(tokens):
    expected = tokens.index(0) + 1 if 0 in tokens else len(tokens)
    assert sequence_lengths(torch.tensor([tokens]), 0).tolist() == [expected]
    assert sequence_lengths(torch.tensor([tokens])).tolist() == [len(tokens)]


def test_utility_of_classes_is_the_log_probability_or_the_logit():
    logits, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(5, (7,))
    torch.testing.assert_close(class_utility(logits, y), -F.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(class_utility(logits, y, is_normalised=False), logits[torch.arange(7), y])


def test_utility_of_sequences_is_the_sum_over_counted_tokens():
    logits, y = torch.randn(4, 6, 5, dtype=torch.float64), torch.randint(1, 5, (4, 6))
    y[0, 2], y[0, 4], y[1, 0] = 0, 0, 0
    for normalised in (True, False):
        values = logits.log_softmax(-1) if normalised else logits
        expected = [sum(values[row, t, y[row, t]] for t in range(length)) for row, length in enumerate((3, 1, 6, 6))]
        found = sequence_utility(logits, y, end=0, is_normalised=normalised)
        torch.testing.assert_close(found, torch.stack(expected))


def test_view_of_a_language_model_is_the_chain_rule():
    model = language_model().double().eval()
    x, y = torch.randint(5, (3, 2)), torch.randint(5, (3, 4))
    expected = torch.zeros(3, dtype=torch.float64)
    for t in range(4):
        log_probabilities = model(torch.cat([x, y[:, :t]], 1))[:, -1].log_softmax(-1)
        expected += log_probabilities.gather(1, y[:, t : t + 1])[:, 0]
    torch.testing.assert_close(UtilityView(model).utility(x, y), expected)
    assert (UtilityView(model, is_normalised=False).utility(x, y) - expected).abs().max() > 0.1


def test_ranking_is_by_margin_and_ties_stay_in_order():
    model = language_model().eval()
    view = UtilityView(model)
    x, candidates = torch.randint(5, (3, 2)), torch.randint(5, (3, 6, 4))
    order = view.rank(x, candidates)
    for better, worse in zip(order.T[:-1], order.T[1:], strict=True):
        rows = torch.arange(3)
        assert (view.pairwise_margin(x, candidates[rows, better], candidates[rows, worse]) >= 0).all()
    same = torch.ones(3, 4, 4, dtype=torch.long)
    assert torch.equal(view.rank(x, same), torch.arange(4).expand(3, -1))
    classifier = MLP(4, 5, (8,))
    inputs = torch.randn(3, 4)
    every = torch.arange(5).expand(3, -1)
    assert torch.equal(UtilityView(classifier).rank(inputs, every), classifier(inputs).argsort(1, descending=True))


def test_view_reads_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    x, y = torch.randint(11, (2, 3)), torch.randint(1, 11, (2, 4))
    both = torch.cat([x, y], 1)
    labels = torch.cat([torch.full_like(x, -100), y], 1)
    for row in range(2):
        loss = model(both[row : row + 1], labels=labels[row : row + 1]).loss
        torch.testing.assert_close(UtilityView(model).utility(x, y)[row], -4 * loss)


def classifier() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return MLP(6, CLASSES, (16,)).double(), torch.randn(9, 6, dtype=torch.float64), torch.randint(CLASSES, (9,))


def test_preference_gradient_is_that_of_the_log_likelihood():
    model, x, y = classifier()
    parameters = dict(model.named_parameters())
    found = preference_gradient(lambda p, x: functional_call(model, p, (x,)), parameters, x, y)
    expected = torch.autograd.grad(-F.cross_entropy(model(x), y), list(parameters.values()))
    assert found.keys() == parameters.keys()
    for gradient, truth in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-14)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters.values())


def test_stationary_where_the_model_is_the_truth():
    # E over y ~ P_w of the preference gradient is zero: averaged over samples it is small, of one class it is not.
    logits = torch.randn(1, 4, dtype=torch.float64)
    probabilities = logits.softmax(-1)[0]
    total = torch.zeros_like(logits)
    for y in range(4):
        step = preference_gradient(lambda p, x: p["u"], {"u": logits}, torch.zeros(1), torch.tensor([y]))["u"]
        assert step.abs().max() > 0.05
        total += probabilities[y] * step
    assert total.abs().max() < 1e-15


@pytest.mark.parametrize("is_normalised", [True, False])
def test_sampled_preference_gradient_tends_to_the_exact_one(is_normalised):
    torch.manual_seed(0)
    model = language_model().double().eval()
    # plain logits of one token are a proper utility as well; those of several are not normalised by the same sum
    time = 3 if is_normalised else 1
    view = UtilityView(model, is_normalised=is_normalised)
    parameters = dict(view.named_parameters())
    x, y = torch.randint(5, (2, 2)), torch.randint(5, (2, time))
    rivals = sample(lambda prefix, _: model(prefix)[:, -1], x, time, num_samples=600)
    found = sampled_preference_gradient(lambda p, x, y: functional_call(view, p, (x, y)), parameters, x, y, rivals)
    loss = -UtilityView(model).utility(x, y).mean()
    expected = torch.autograd.grad(-loss, list(parameters.values()))
    scale = torch.cat([truth.flatten() for truth in expected]).norm()
    error = torch.cat([(a - b).flatten() for a, b in zip(found.values(), expected, strict=True)]).norm()
    assert error < 0.15 * scale


def test_free_logits_gain_on_every_rival_and_by_the_closed_form():
    torch.manual_seed(0)
    table = nn.Embedding(8, CLASSES).double()
    x, y = torch.arange(8), torch.randint(CLASSES, (8,))
    for learning_rate in (1e-3, 1.0, 30.0):
        assert margin_monotonicity(table, x, y, learning_rate) == 1.0
    before = table.weight.detach().clone()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.7)
    F.cross_entropy(table(x), y, reduction="sum").backward()
    optimizer.step()
    p, chosen = before.softmax(1), F.one_hot(y, CLASSES)
    torch.testing.assert_close(table.weight.detach() - before, 0.7 * (chosen - p))


def test_a_margin_that_falls_is_counted():
    # One shared row of logits and two inputs that choose differently: the step raises u_0 and u_1 equally.
    shared = nn.Linear(1, 3, bias=False).double()
    nn.init.zeros_(shared.weight)
    x, y = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0, 1])
    assert margin_monotonicity(shared, x, y, 0.1) == 0.5
    # three against one: u_0 gains on u_1, so that the one loses on 0 but gains on 2
    x, y = torch.ones(4, 1, dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    assert margin_monotonicity(shared, x, y, 0.1) == 7 / 8


def test_margin_monotonicity_is_that_of_a_real_step_and_leaves_the_model_alone():
    model, x, y = classifier()
    model = nn.Sequential(model, nn.Dropout(0.5), nn.BatchNorm1d(CLASSES).double()).train()
    before = copy.deepcopy(model)
    found = margin_monotonicity(model, x, y, 0.5)
    assert model.training
    assert model[1].training
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(parameter.grad is None for parameter in model.parameters())
    stepped = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(stepped.parameters(), lr=0.5)

    def margins() -> torch.Tensor:
        logits = stepped(x).detach()
        return logits.gather(1, y[:, None]) - logits

    first = margins()
    F.cross_entropy(stepped(x), y).backward()
    optimizer.step()
    rises = (margins() > first)[F.one_hot(y, CLASSES) == 0]
    assert found == rises.double().mean().item()
    assert 0 < found < 1


def test_ordinal_agreement_is_kendalls_tau():
    quality = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    assert ordinal_agreement(torch.tensor([[0.1, 0.2, 5.0, 9.0], [4.0, 3.0, 2.0, 1.0]]), quality) == pytest.approx(1)
    # one swap of six pairs: tau = 1 - 2/6; the constant row has none
    swapped = torch.tensor([[1.0, 3.0, 2.0, 4.0], [7.0, 7.0, 7.0, 7.0]])
    assert ordinal_agreement(swapped, quality) == pytest.approx(1 - 2 / 6)


@given(st.lists(st.integers(-4, 4), min_size=5, max_size=5, unique=True), st.permutations(range(5)))
def test_ordinal_agreement_ignores_increasing_maps(utilities, quality):
    u, q = torch.tensor([utilities], dtype=torch.float64), torch.tensor([quality])
    expected = ordinal_agreement(u, q)
    for g in (lambda v: v**3 + v, torch.exp, lambda v: 0.01 * v - 7):
        assert ordinal_agreement(g(u), q) == pytest.approx(expected, abs=1e-12)
        assert ordinal_agreement(u, g(q.double())) == pytest.approx(expected, abs=1e-12)
    assert ordinal_agreement(-u, q) == pytest.approx(-expected, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_lengths(torch.zeros(2, 0, dtype=torch.long)), r"\[2, 0\]"),
        (lambda: sequence_lengths(torch.zeros(2, 3)), "float32"),
        (lambda: class_utility(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), r"\[3\]"),
        (lambda: class_utility(torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool)), "bool"),
        (lambda: UtilityView(MLP(4, 3)).utility(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long)), r"\[3\]"),
        (lambda: UtilityView(MLP(4, 3)).utility(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.long)), "logits"),
        (
            lambda: UtilityView(language_model()).utility(
                torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)
            ),
            "at least one token",
        ),
        (
            lambda: UtilityView(language_model()).utility(
                torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
            ),
            r"logits \[batch, classes\]",
        ),
        (lambda: UtilityView(MLP(4, 3)).rank(torch.zeros(2, 4), torch.zeros(2, 0, dtype=torch.long)), r"\[2, 0\]"),
        (lambda: margin_monotonicity(MLP(4, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), 0.0), "got 0.0"),
        (lambda: ordinal_agreement(torch.zeros(2, 1), torch.zeros(2, 1)), r"\[2, 1\]"),
        (lambda: ordinal_agreement(torch.zeros(2, 3), torch.zeros(2, 3)), "no row"),
        (lambda: ordinal_agreement(torch.full((1, 2), torch.nan), torch.zeros(1, 2)), "NaN"),
        (
            lambda: sampled_preference_gradient(
                lambda p, x, y: p["u"], {}, torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(0, 2, 3)
            ),
            r"\[0, 2, 3\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
