import copy
import math

import pytest
import torch
from torch import nn

from postern.claims import Run
from postern.heads import FactoredLinear, SoftmaxHead
from postern.papers import _output_layers as layers
from postern.papers import z_loss as paper


def test_zipf_classes_have_the_odds_that_sampling_divides_by():
    classes, count = 50, 400_000
    drawn = layers.zipf_classes(count, classes, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=classes) / count
    sampled = layers.SampledSoftmax(4, classes, 0.1, 1)
    expected = sampled._log_expected(torch.arange(classes)).exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    assert (found - expected).abs().max() < 0.003
    assert found[0] / found[9] == pytest.approx(math.log(2) / math.log(11 / 10), rel=0.1)


def test_the_two_level_softmax_is_a_distribution():
    torch.manual_seed(0)
    layer = layers.HierarchicalSoftmax(6, 16, 0.1)  # 4 groups of 4: no slot is empty
    hidden = torch.randn(1, 6).expand(16, 6)
    losses = torch.stack([layer.loss(hidden[:1], torch.tensor([c])) for c in range(16)])
    assert torch.exp(-losses).sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(layer.loss(hidden, torch.arange(16).flip(0)), losses.mean())


def test_the_two_level_softmax_makes_a_step_of_gradient_descent():
    torch.manual_seed(0)
    layer = layers.HierarchicalSoftmax(6, 14, 0.3)
    hidden, target = torch.randn(9, 6), torch.tensor([0, 0, 1, 5, 13, 12, 7, 7, 7])
    twin = copy.deepcopy(layer)
    layer.loss(hidden, target).backward()
    layer.step()
    # The same with all members as parameters, example by example.
    rows = twin.members.rows.clone().requires_grad_()
    total = nn.functional.cross_entropy(twin.groups.logits(hidden), target // 4, reduction="sum")
    for h, c in zip(hidden, target.tolist(), strict=True):
        block = rows[c // 4].view(7, 4)
        total = total - torch.log_softmax(h @ block[:-1] + block[-1], 0)[c % 4]
    (total / 9).backward()
    torch.testing.assert_close(layer.members.rows, (rows - 0.3 * rows.grad).detach())
    weight = twin.groups.linear.weight
    torch.testing.assert_close(layer.groups.linear.weight, weight - 0.3 * weight.grad)
    assert (layer.members.rows[2] == twin.members.rows[2]).all(), "a group that is no target does not move"


def test_sampled_softmax_with_many_samples_is_log_softmax():
    torch.manual_seed(0)
    layer = layers.SampledSoftmax(6, 20, 0.2, 200_000)
    full = SoftmaxHead(6, 20)
    with torch.no_grad():
        full.linear.weight.copy_(layer.table.rows[:, :-1])
        full.linear.bias.copy_(layer.table.rows[:, -1])
    hidden, target = torch.randn(8, 6), torch.randint(20, (8,))
    loss, expected = layer.loss(hidden, target), full.loss(hidden, target)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    loss.backward()
    expected.backward()
    layer.step()
    moved = full.linear.weight - 0.2 * full.linear.weight.grad
    assert (layer.table.rows[:, :-1] - moved).abs().max() < 0.05 * (0.2 * full.linear.weight.grad).abs().max()


@pytest.mark.parametrize("kind", [layers.FullSoftmax, layers.AdaptiveSoftmax, layers.HierarchicalSoftmax])
def test_every_layer_learns(kind):
    torch.manual_seed(0)
    layer = kind(64, 400, 0.5)
    centres = torch.randn(400, 64)
    target = layers.zipf_classes(64, 400, torch.Generator().manual_seed(0))
    hidden = centres[target].requires_grad_()
    first = layer.loss(hidden, target).item()
    for _ in range(60):
        hidden.grad = None
        layer.loss(hidden, target).backward()
        layer.step()
    assert hidden.grad.abs().sum() > 0
    assert layer.loss(hidden, target).item() < 0.7 * first


def test_restoring_moves_a_sixth_of_the_singular_values_each_time():
    layer = FactoredLinear(12, 30, bias=False)
    restore = layers.restoring(layer)
    norms = []
    for _ in range(4):
        restore()
        torch.testing.assert_close(layer.mixer, torch.eye(12))
        norms.append(layer.factor[:, :2].norm().item())
    assert norms[0] == pytest.approx(16 * norms[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)


def test_words_are_counted_and_unknown_ones_replaced():
    words = paper.read_words("a b a c\na b d\n")
    assert words == ["a", "b", "a", "c", "<eos>", "a", "b", "d", "<eos>"]
    vocabulary = paper.vocabulary_of(words, 4)
    assert vocabulary == {"a": 0, "b": 1, "<eos>": 2, "<unk>": 3}
    windows = paper.as_windows(words, vocabulary, 2)
    assert windows.context.tolist()[:2] == [[0, 1], [1, 0]]
    assert windows.target.tolist() == [0, 3, 2, 0, 1, 3, 2]


def test_top_k_error_counts_the_words_beyond_rank_k_and_ties_against_the_model():
    class Fixed(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.scores = logits

        def forward(self, context):
            return context

        def logits(self, hidden):
            return self.scores[: len(hidden)]

    ranks = [1, 5, 6, 60, 101]
    scores = -torch.arange(200.0).repeat(5, 1)
    target = torch.tensor(ranks) - 1
    words = paper.Words(torch.zeros(5, 1), target)
    model = Fixed(scores)
    errors = paper.top_k_errors(model, model, words, at_once=5)
    assert errors == {1: 80.0, 5: 60.0, 10: 40.0, 20: 40.0, 50: 40.0, 100: 20.0}
    model.scores = torch.zeros(5, 200)
    assert set(paper.top_k_errors(model, model, words, at_once=5).values()) == {100.0}


def test_choosing_and_judging_use_different_words():
    config = paper.RANKING["smoke"]
    run = Run(seed=3, scale="smoke")
    corpus = paper._load_corpus(config, run)
    assert len(corpus.validation.target) == config.validation_words
    assert len(corpus.test.target) == config.test_words
    # Positions are told apart by their windows; the text repeats itself, but not half of it.
    windows = [
        {tuple(row) for row in torch.cat([words.context, words.target[:, None]], 1).tolist()}
        for words in (corpus.validation, corpus.test)
    ]
    assert len(windows[0] & windows[1]) < 0.5 * len(windows[0])
