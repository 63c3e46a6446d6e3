"""A language model with experts: what it shares with one that has none, and what its loss counts."""

import pytest
import torch

from postern.experts import FeedForwardExperts, HashRouter, MixtureOfExperts, SoftmaxRouter
from postern.nets import ExpertLanguageModel, next_token_loss, train_language_model
from tests.modules import check_module

WIDTH, TOKENS = 16, 11


def mixture(index, *, num_experts=4, balance=0.01):
    router = SoftmaxRouter(WIDTH, num_experts, min(2, num_experts), balance=balance)
    return MixtureOfExperts(router, FeedForwardExperts(num_experts, WIDTH, 24, activation=torch.relu))


def model(experts=mixture, **options):
    torch.manual_seed(0)
    return ExpertLanguageModel(TOKENS, experts, WIDTH, 2, 4, 8, **options)


def tokens(batch=2, time=8):
    return torch.randint(TOKENS, (batch, time), generator=torch.Generator().manual_seed(0))


def test_survives():
    check_module(model, tokens(), tolerance=float("inf"))


def test_does_not_see_the_future():
    network, text = model().eval(), tokens()
    changed = text.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % TOKENS
    torch.testing.assert_close(network(changed)[:, :5], network(text)[:, :5])
    assert (network(changed)[:, 5:] - network(text)[:, 5:]).abs().max() > 1e-4


def test_one_expert_is_an_ordinary_block():
    plain = model(lambda index: None, feedforward_dim=24)
    single = model(lambda index: mixture(index, num_experts=1, balance=0.0))
    state = plain.state_dict()
    for index in range(2):
        experts = single.layers[index].feedforward.experts
        with torch.no_grad():
            for name, weight, bias in (
                ("0", experts.expand, experts.expand_bias),
                ("2", experts.contract, experts.contract_bias),
            ):
                weight[0].copy_(state.pop(f"layers.{index}.feedforward.{name}.weight").T)
                bias[0].copy_(state.pop(f"layers.{index}.feedforward.{name}.bias"))
    missing, unexpected = single.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("feedforward" in name for name in missing)
    torch.testing.assert_close(single(tokens()), plain(tokens()))


def test_some_layers_have_experts_and_are_told_the_tokens():
    def experts(index):
        if index == 0:
            return None
        return MixtureOfExperts(HashRouter(WIDTH, 4, TOKENS), FeedForwardExperts(4, WIDTH, 8))

    network = model(experts)
    _, (routing,) = network.route(tokens())
    assert torch.equal(routing.indices, network.layers[1].feedforward.router.experts[tokens()])


def test_the_loss_counts_what_routers_add():
    network, text = model(), tokens()
    logits, routings = network.route(text[:, :-1])
    assert len(routings) == 2
    expected = next_token_loss(logits, text) + sum(routing.auxiliary_loss for routing in routings)
    torch.testing.assert_close(network.loss(text), expected)


def test_padding_does_not_matter():
    network, text = model().eval(), tokens()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(network(text, mask)[:, :5], network(text[:, :5]))


def test_learns_a_text():
    network = model()
    text = torch.arange(400) % TOKENS
    losses = train_language_model(
        network,
        text,
        context=7,
        steps=60,
        batch_size=8,
        learning_rate=1e-2,
        generator=torch.Generator().manual_seed(0),
        loss=network.loss,
    )
    assert losses[0] > 2
    assert losses[-1] < 0.5


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: ExpertLanguageModel(TOKENS, mixture, 8), "layer 0 must be of width 8, got 16"),
        (lambda: ExpertLanguageModel(0, mixture, WIDTH), "num_tokens=0"),
        (lambda: model()(torch.zeros(1, 9, dtype=torch.int64)), "room for 8 tokens, got 9"),
        (lambda: model()(torch.zeros(1, 3)), "integers"),
    ],
)
def test_refuses_what_does_not_fit(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
