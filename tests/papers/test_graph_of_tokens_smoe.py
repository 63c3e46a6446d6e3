"""What the experiments on graphs of tokens rest on: equal starts, equal windows, equal entropies, replaced tokens."""

import dataclasses
import math

import pytest
import torch

import postern.papers.graph_of_tokens_smoe as paper
from postern.claims import Run
from postern.experts import CosineRouter, load_entropy, selection_entropy
from postern.papers._corpora import read_corpus

ARMS = ("plain", "similarity", "attention", "uniform")
RUN = Run(seed=3, scale="smoke")
TINY = dataclasses.replace(paper._SMOKE, width=16, context=16, hidden_dim=16, steps=4, windows=4, characters=5000)


@pytest.fixture(scope="module")
def corpus():
    return read_corpus("python-stdlib", 5000, has_test=True)


def test_all_arms_start_from_the_same_weights():
    states = {arm: paper._build(paper._SMALL, arm, 65, 7).state_dict() for arm in ARMS}
    plain = states["plain"]
    for arm, state in states.items():
        assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
        more = {name for name in state if name not in plain}
        assert bool(more) == (arm == "similarity")
    size = sum(tensor.numel() for tensor in plain.values())
    more = sum(tensor.numel() for name, tensor in states["similarity"].items() if name not in plain)
    assert more == 2 * 96**2
    assert more / size < 0.055


def test_xmoe_differs_in_its_routers_alone():
    plain, other = (paper._build(paper._SMALL, arm, 65, 7) for arm in ("plain", "xmoe"))
    assert sum(isinstance(module, CosineRouter) for module in other.modules()) == paper._SMALL.layers
    states = [
        {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
        for model in (plain, other)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_options_are_arms_of_their_own():
    run = Run(seed=3, scale="smoke")
    found = paper.gains_by_some_option(dataclasses.replace(TINY, rates=(1e-2,)), run)
    losses = [found[f"loss_{arm}"] for arm in ("plain_first", *paper._OPTIONS)]
    assert len(set(losses)) == len(losses)
    (rows,) = run.tables.values()
    plain, others = rows[:9], rows[9:]
    assert len(plain) == len(others) == len(paper._OPTIONS)
    assert all(row["router"].startswith("plain") for row in plain)
    assert len({row["test loss"] for row in plain}) == 9
    for name, tries in (("plain", plain), ("best", others)):
        assert found[f"loss_{name}"] == min(tries, key=lambda row: row["validation loss"])["test loss"]


def test_the_first_start_is_that_of_all_arms_and_the_others_are_no_other_runs(corpus):
    first = paper._build(TINY, "plain", corpus.num_tokens, RUN.seed).state_dict()
    untrained = dataclasses.replace(TINY, steps=1, rates=(1e-12,))
    starts = [paper._train(untrained, "plain", corpus, RUN, start=start).model for start in (0, 1, 2)]
    weights = [model.state_dict()["embedding.weight"] for model in starts]
    torch.testing.assert_close(weights[0], first["embedding.weight"])
    assert not torch.allclose(weights[1], weights[0], atol=1e-3)
    assert not torch.allclose(weights[2], weights[1], atol=1e-3)
    other = paper._train(untrained, "plain", corpus, Run(seed=4, scale="smoke")).model.state_dict()
    assert not any(torch.allclose(each, other["embedding.weight"], atol=1e-3) for each in weights)


def test_the_rate_that_is_best_on_validation_text_counts(corpus):
    config = dataclasses.replace(TINY, steps=20, windows=16)
    losses = {}
    windows = paper._windows(config, corpus.validation)
    for rate in (1e-4, 1e-2):
        alone = paper._train(dataclasses.replace(config, rates=(rate,)), "plain", corpus, RUN)
        assert alone.rate == rate
        losses[rate] = paper._evaluate(config, alone.model, windows).loss
    assert losses[1e-2] < losses[1e-4]
    for rates in ((1e-4, 1e-2), (1e-2, 1e-4)):
        chosen = paper._train(dataclasses.replace(config, rates=rates), "plain", corpus, RUN)
        assert chosen.rate == 1e-2
        assert paper._evaluate(config, chosen.model, windows).loss == losses[1e-2]


def test_choices_are_compared_at_the_rate_of_the_plain_router(monkeypatch):
    train_at, tried = paper._train_at, []

    def spy(rate, config, arm, *others):
        tried.append((arm, rate))
        return train_at(rate, config, arm, *others)

    monkeypatch.setattr(paper, "_train_at", spy)
    run = Run(seed=3, scale="smoke")
    paper.routes_more_stably(dataclasses.replace(TINY, steps=20, windows=16, rates=(1e-2, 1e-4)), run)
    others = ["similarity", "matched_similarity", "attention", "matched_attention"]
    assert tried == [("plain", 1e-2), ("plain", 1e-4), *((arm, 1e-2) for arm in others)]


def test_xmoe_is_shown_beside_graphs_of_which_the_better_one_on_validation_text_is_compared():
    run = Run(seed=3, scale="smoke")
    found = paper.lowers_the_loss(dataclasses.replace(TINY, rates=(1e-2,)), run)
    (rows,) = run.tables.values()
    by_router = {row["router"]: row for row in rows}
    assert found["loss_xmoe"] == by_router["XMoE"]["test loss"] != found["loss_plain"]
    better = min(("similarity-aware", "attention-aware"), key=lambda name: by_router[name]["validation loss"])
    assert found["loss_graph"] == by_router[better]["test loss"]
    assert found["is_attention"] == (better == "attention-aware")


def test_arms_see_the_same_windows(corpus):
    seen = []
    for arm in ARMS:
        windows = []
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args, windows=windows: (
                windows.append(args[0].clone()) if isinstance(module, torch.nn.Embedding) else None
            )
        )
        paper._train(TINY, arm, corpus, RUN)
        hook.remove()
        seen.append(torch.stack([window for window in windows if window.shape == (8, 16)]))
    assert len(seen[0]) == 4
    assert all(torch.equal(each, seen[0]) for each in seen)


def test_checkpoints_are_kept_with_the_model_as_it_is_then(corpus):
    config = dataclasses.replace(TINY, steps=6, rates=(1e-2,), checkpoints=(0.5, 1.0))
    windows = torch.stack([corpus.validation[:17], corpus.validation[20:37]])
    trained = paper._train(config, "similarity", corpus, RUN, windows)
    half = paper._train(dataclasses.replace(config, steps=3), "similarity", corpus, RUN).model
    assert trained.recorder.steps == [3, 6]
    for model, kept in ((half, trained.recorder._choices[0]), (trained.model, trained.recorder._choices[1])):
        routings = paper._evaluate(config, model, windows).routings
        assert all(torch.equal(a.indices, b.long()) for a, b in zip(routings, kept, strict=True))


def test_the_control_becomes_as_flat_as_its_target(corpus):
    config = dataclasses.replace(TINY, steps=60, rates=(1e-2,), warm_up_steps=5)
    plain = paper._train(config, "plain", corpus, RUN)
    target = [
        [entropy - 0.2 * min(1.0, step / 30) for entropy in layers] for step, layers in enumerate(plain.entropies)
    ]
    matched = paper._train(config, "matched_similarity", corpus, RUN, target=target)
    for layer in range(2):
        missed = sum(matched.entropies[step][layer] - target[step][layer] for step in range(50, 60)) / 10
        assert abs(missed) < 0.05
    assert all(router.temperature < 0.9 for router in paper._routers(matched.model))
    assert all(router.temperature == 1.0 for router in paper._routers(plain.model))


def test_evaluation_is_of_the_whole_set(corpus):
    config = dataclasses.replace(TINY, batch_size=3)
    model = paper._build(config, "attention", corpus.num_tokens, 0)
    windows = torch.stack([corpus.validation[start : start + 17] for start in range(0, 70, 10)])
    found = paper._evaluate(config, model, windows)
    logits, routings = model.eval().route(windows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    entropies = [selection_entropy(routing.probabilities).item() for routing in routings]
    assert found.entropy == pytest.approx(sum(entropies) / 2, rel=1e-5)
    loads = [load_entropy(routing.probabilities).item() for routing in routings]
    assert found.load_entropy == pytest.approx(sum(loads) / 2, rel=1e-5)
    other = paper._evaluate(config, model, windows, windows[:, :-1].flip(0))
    assert other.loss != found.loss


@pytest.mark.parametrize("arm", ARMS)
def test_the_entropy_of_a_models_averages_lies_within_its_bounds(corpus, arm):
    model = paper._build(TINY, arm, corpus.num_tokens, 0)
    with torch.no_grad():
        for router in paper._routers(model):
            router.gate.weight.normal_(std=1.0)
    windows = torch.stack([corpus.validation[start : start + 17] for start in range(0, 50, 10)])
    own, least, most = paper._entropies_before(TINY, model, windows)
    found = paper._evaluate(TINY, model, windows).entropy
    assert least - 1e-5 <= found <= most + 1e-5
    if arm == "plain":
        assert own == pytest.approx(found, rel=1e-5)
    else:
        assert own != pytest.approx(found, rel=1e-3)


def test_replaced_tokens_are_others_and_as_many_as_they_should_be():
    tokens = torch.randint(0, 5, (100, 200))
    inputs, is_replaced = paper.replace_tokens(tokens, 0.1, 5, torch.Generator().manual_seed(0))
    assert torch.equal(inputs != tokens, is_replaced)
    assert is_replaced.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert set(inputs[is_replaced].tolist()) == set(range(5))


def test_the_full_recipe_runs_in_small():
    pytest.importorskip("tokenizers")
    config = dataclasses.replace(
        paper._FULL,
        corpus="python-stdlib",
        characters=60_000,
        vocabulary=300,
        width=16,
        heads=2,
        layers=2,
        context=16,
        hidden_dim=16,
        batch_size=8,
        steps=3,
        warm_up_steps=1,
        windows=8,
    )
    corpus, _, test = paper._read(config)
    target = None
    for arm in (*ARMS, "matched_attention"):
        trained = paper._train(config, arm, corpus, RUN, test, target)
        target = trained.entropies
        assert len(target) == 6  # of each part of a batch
        assert paper._evaluate(config, trained.model, test).loss == pytest.approx(math.log(300), rel=0.1)
