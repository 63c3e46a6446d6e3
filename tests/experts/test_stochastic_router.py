"""Draws of one expert for all: how they spread, who shares them, and how they are forced and repeated."""

import pytest
import torch
from torch.nn import functional as F

from postern.experts import FeedForwardExperts, MixtureOfExperts, StochasticRouter, expert_draws
from tests.modules import check_module

WIDTH, EXPERTS = 6, 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layer(level="sentence"):
    return MixtureOfExperts(StochasticRouter(WIDTH, EXPERTS, level=level), FeedForwardExperts(EXPERTS, WIDTH, 10))


def chosen(router, batch=6, time=5):
    return router(torch.zeros(batch, time, WIDTH)).indices


def by_itself(found, rows, expert):
    """What one expert makes of rows."""
    experts = found.experts
    hidden = F.gelu(rows @ experts.expand[expert] + experts.expand_bias[expert])
    return hidden @ experts.contract[expert] + experts.contract_bias[expert]


def test_in_training_a_batch_has_one_expert():
    router = StochasticRouter(WIDTH, EXPERTS)
    draws = torch.stack([chosen(router) for _ in range(400)]).flatten(1)
    assert (draws == draws[:, :1]).all()
    # 100 expected of each of four, with a standard deviation of 8.7
    assert (torch.bincount(draws[:, 0], minlength=EXPERTS) - 100).abs().max() < 35


def test_passes_of_one_batch_have_draws_of_their_own_with_replacement():
    router = StochasticRouter(WIDTH, EXPERTS)
    with expert_draws(router, num_passes=2):
        draws = torch.stack([chosen(router) for _ in range(600)])[..., 0]
    first, second = draws[:, :3].flatten(1), draws[:, 3:].flatten(1)
    assert (first == first[:, :1]).all()
    assert (second == second[:, :1]).all()
    # the same in both in one of four, with a standard deviation of 10.6
    assert abs((first[:, 0] == second[:, 0]).sum().item() - 150) < 42
    assert len({*map(tuple, torch.stack([first[:, 0], second[:, 0]], 1).tolist())}) == EXPERTS**2
    assert router.num_passes == 1


def test_in_evaluation_sentences_or_tokens_have_draws():
    sentences = chosen(StochasticRouter(WIDTH, EXPERTS).eval(), 400, 3)[..., 0]
    assert (sentences == sentences[:, :1]).all()
    assert (torch.bincount(sentences[:, 0], minlength=EXPERTS) - 100).abs().max() < 35
    tokens = chosen(StochasticRouter(WIDTH, EXPERTS, level="token").eval(), 40, 10)[..., 0]
    assert (torch.bincount(tokens.flatten(), minlength=EXPERTS) - 100).abs().max() < 35
    assert ((tokens == tokens[:, :1]).all(1)).sum() == 0


def test_a_token_gets_what_its_expert_makes_of_it_unscaled():
    found, x = layer().eval(), torch.randn(3, 5, WIDTH)
    output, routing = found(x)
    for row in range(3):
        expected = by_itself(found, x[row], int(routing.indices[row, 0, 0]))
        torch.testing.assert_close(output[row], expected)


def test_an_ensemble_is_the_mean_of_all():
    found, x = layer("ensemble").eval(), torch.randn(3, 5, WIDTH)
    expected = torch.stack([by_itself(found, x, expert) for expert in range(EXPERTS)]).mean(0)
    torch.testing.assert_close(found(x)[0], expected)
    assert chosen(found.router.train()).unique().numel() == 1


@pytest.mark.parametrize("is_training", [False, True])
def test_forced_experts_work(is_training):
    found, x = layer().train(is_training), torch.randn(3, 5, WIDTH)
    with expert_draws(found, expert=2):
        torch.testing.assert_close(found(x)[0], by_itself(found, x, 2))
    with expert_draws(found, expert=torch.tensor([3, 0, 1])):
        output = found(x)[0]
    for row, expert in enumerate([3, 0, 1]):
        torch.testing.assert_close(output[row], by_itself(found, x[row], expert))
    assert found.router.expert is None


@pytest.mark.parametrize("level", ["sentence", "token"])
def test_a_generator_repeats_draws(level):
    router = StochasticRouter(WIDTH, EXPERTS, level=level).eval()

    def drawn(seed):
        with expert_draws(router, generator=torch.Generator().manual_seed(seed)):
            return torch.stack([chosen(router) for _ in range(5)])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert router.generator is None
    assert torch.equal(
        router.sample(9, generator=torch.Generator().manual_seed(3)),
        torch.randint(EXPERTS, (9,), generator=torch.Generator().manual_seed(3)),
    )


def test_settings_come_back_after_an_error():
    router = StochasticRouter(WIDTH, EXPERTS)
    with (
        pytest.raises(RuntimeError),
        expert_draws(router, num_passes=3, expert=1, level="token", generator=torch.Generator()),
    ):
        raise RuntimeError
    assert (router.num_passes, router.expert, router.level, router.generator) == (1, None, "sentence", None)


def test_layers_draw_for_themselves():
    routers = torch.nn.ModuleList([StochasticRouter(WIDTH, EXPERTS) for _ in range(2)])
    agree = sum(int(chosen(routers[0], 1, 1) == chosen(routers[1], 1, 1)) for _ in range(400))
    assert abs(agree - 100) < 35


@pytest.mark.parametrize("num_passes", [1, 2])
def test_compiles_while_it_draws(num_passes):
    def build():
        found = layer()
        found.router.num_passes = num_passes
        return found

    check_module(build, torch.randn(4, 3, WIDTH))


def test_the_unchosen_have_no_gradient():
    found = layer()
    with expert_draws(found, expert=1):
        found(torch.randn(2, 3, WIDTH))[0].square().sum().backward()
    sizes = found.experts.expand.grad.abs().amax((1, 2))
    assert sizes[1] > 0
    assert sizes.sum() == sizes[1]


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: StochasticRouter(WIDTH, 0), "num_experts=0"),
        (lambda: StochasticRouter(WIDTH, 2, level="batch"), "token, sentence, ensemble; got 'batch'"),
        (lambda: StochasticRouter(WIDTH, 2).force(2), r"0\.\.1, got 2"),
        (lambda: StochasticRouter(WIDTH, 2).force(torch.tensor([0, -1])), r"0\.\.1, got -1"),
        (lambda: StochasticRouter(WIDTH, 2).force(torch.zeros(2)), r"float32 \[2\]"),
    ],
)
def test_refuses_impossible_settings(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"num_passes": 0}, "got 0"),
        ({"num_passes": 4}, "6 sequences cannot hold 4 passes"),
        ({"expert": torch.tensor([0, 1])}, "2 experts are forced on a batch of 6"),
        ({"level": "word"}, "got 'word'"),
    ],
)
def test_refuses_draws_that_do_not_fit(settings, seen):
    router = StochasticRouter(WIDTH, EXPERTS)
    with pytest.raises(ValueError, match=seen), expert_draws(router, **settings):
        chosen(router)


def test_refuses_models_without_draws():
    with pytest.raises(ValueError, match="Linear has no StochasticRouter"), expert_draws(torch.nn.Linear(1, 1)):
        pass
