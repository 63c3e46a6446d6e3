"""What the experiments on gated attention rest on: equal parameters, the start token, uniform attention."""

import dataclasses
import math

import pytest
import torch

import postern.papers.gated_attention as paper
from postern.attention import AttentionGate
from postern.claims import Run
from postern.nets import LanguageModel
from postern.papers._corpora import Corpus, read_corpus

ARMS = ("softmax", "gated", "value", "key", "query", "output")
RUN = Run(seed=0, scale="small")


@pytest.mark.parametrize("width", [64, 768])
def test_all_arms_have_equally_many_parameters(width):
    counts = []
    for arm in ARMS:
        with torch.device("meta"):
            model = LanguageModel(
                66,
                width,
                4,
                attention=lambda _, arm=arm: paper._attention(arm, width, 4),
                feedforward_dim=paper._feedforward_dim(arm, width, 4),
            )
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        gate = model.layers[0].attention.gate
        assert (gate is None) == (arm == "softmax")
        assert paper._feedforward_dim(arm, width, 4) == 4 * width - (0 if gate is None else width // 2)
    assert max(counts) / min(counts) < 1.002


def test_the_start_token_stands_before_all_others():
    torch.manual_seed(0)
    inner = LanguageModel(6, 8, 1, 1, 6, initial_std=0.3)
    tokens = torch.randint(0, 5, (2, 5))
    logits = paper._Started(inner)(tokens)
    assert logits.shape == (2, 5, 6)
    whole = inner(torch.cat([torch.full((2, 1), 5), tokens], dim=1))
    torch.testing.assert_close(logits, whole[:, 1:])


def test_a_diverged_model_counts_as_guessing():
    class Broken(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(factor))

        def forward(self, tokens):
            return self.factor * torch.nn.functional.one_hot(tokens, 8).float()

    tokens = torch.arange(400) % 7
    config = dataclasses.replace(paper._SMOKE, context=8, windows=4)
    for factor in (math.nan, 1e4):
        assert paper._judge(config, Broken(factor), tokens, 8) == math.log(8)
    assert paper._judge(config, Broken(-1.0), tokens, 8) < math.log(8)


def test_the_largest_key_that_differs():
    first, second = {1.0: 0.0, 2.0: 0.3, 3.0: 0.0}, {1.0: 1.0, 2.0: 0.0, 3.0: 0.04}
    assert paper.largest_difference(first, second, 0.05) == 2.0
    assert paper.largest_difference(first, first, 0.05) is None


@pytest.mark.parametrize("gated", [False, True])
def test_uniform_attention_is_the_mean(gated):
    torch.manual_seed(0)
    gate = AttentionGate(6, 1, 2) if gated else None
    layer = paper.uniform_attention(6, 2, gate)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(layer.weights(x), torch.full((3, 1, 5, 5), 0.2))
    heads = layer.value(x).mean(1, keepdim=True).expand(3, 5, 2)
    if gate is not None:
        heads = heads * torch.sigmoid(gate.projection(x))
    torch.testing.assert_close(layer(x), layer.output(heads))
    assert all(not p.requires_grad for p in [*layer.query.parameters(), *layer.key.parameters()])


def test_least_squares_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator)

    def data(noise):
        tokens = torch.randn(500, 2, 4, generator=generator)
        return tokens, tokens.mean(1, keepdim=True) @ weight + 2 + noise * torch.randn(500, 1, 3, generator=generator)

    assert paper._least_squares_error([data(0.0)], data(0.0)) < 1e-10
    assert paper._least_squares_error([data(1.0)] * 4, data(1.0)) == pytest.approx(1.0, rel=0.1)


def test_a_linear_head_learns_no_more_than_least_squares():
    config = dataclasses.replace(paper.UniformAttention(150), test=1024, rates=(3e-2,))
    metrics = paper.makes_the_value_path_nonlinear(config, Run(seed=0, scale="smoke"))
    assert metrics["error_best_linear"] < metrics["error_linear"] < 1.2 * metrics["error_best_linear"]
    assert metrics["error_gated"] < metrics["error_best_linear"]


def test_the_full_recipe_runs_in_small():
    pytest.importorskip("tokenizers")
    config = dataclasses.replace(
        paper._FULL,
        corpus="python-stdlib",
        characters=60_000,
        vocabulary=300,
        width=16,
        layers=2,
        heads=2,
        context=16,
        batch_size=8,
        accumulation=4,
        steps=3,
        windows=8,
    )
    corpus, test = paper._read(config)
    assert isinstance(corpus, Corpus)
    for arm in ARMS:
        model = paper._train(config, arm, 1e-3, corpus, RUN)
        assert paper._judge(config, model, test, corpus.num_tokens) == pytest.approx(math.log(300), rel=0.1)


def test_arms_see_the_same_windows():
    """The generator of the windows does not depend on the arm."""
    corpus = read_corpus("python-stdlib", 5000)
    seen = []
    for arm in ("softmax", "gated"):
        config = dataclasses.replace(paper._SMOKE, steps=2)
        windows = []
        run = Run(seed=3, scale="smoke")
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args, windows=windows: (
                windows.append(args[0].clone()) if isinstance(module, paper._Started) else None
            )
        )
        paper._train(config, arm, 1e-3, corpus, run)
        hook.remove()
        seen.append(torch.stack(windows))
    assert torch.equal(*seen)
