"""An encoder-decoder with experts: what it may see, what padding does, and what its loss counts."""

import pytest
import torch
from torch.nn import functional as F

from postern.data import SyntheticLanguages
from postern.experts import FeedForwardExperts, HashRouter, MixtureOfExperts, SoftmaxRouter
from postern.nets import ExpertTranslationModel
from tests.modules import check_module

WIDTH, TOKENS = 16, 11


def mixture(stack, index):
    if index:
        return None
    return MixtureOfExperts(SoftmaxRouter(WIDTH, 3, 1), FeedForwardExperts(3, WIDTH, 24))


def model(experts=mixture, **options):
    torch.manual_seed(0)
    return ExpertTranslationModel(TOKENS, experts, WIDTH, 2, 4, 8, **options)


def tokens(time, batch=2, seed=0):
    return torch.randint(1, TOKENS, (batch, time), generator=torch.Generator().manual_seed(seed))


def test_survives():
    source = tokens(6)
    source[0, 4:] = 0
    check_module(model, source, tokens(5, seed=1), tolerance=float("inf"))


def test_sees_all_of_the_source_and_nothing_of_the_future():
    network, source, target = model().eval(), tokens(6), tokens(5, seed=1)
    before = network(source, target)
    changed = target.clone()
    changed[:, 3:] = changed[:, 3:] % (TOKENS - 1) + 1
    after = network(source, changed)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().max() > 1e-4
    source[:, -1] = source[:, -1] % (TOKENS - 1) + 1
    assert ((network(source, target) - before).abs().amax(-1) > 1e-6).all()


def test_padding_does_not_matter():
    network, source, target = model().eval(), tokens(6), tokens(5, seed=1)
    padded = F.pad(source, (0, 2)), F.pad(target, (0, 3))
    torch.testing.assert_close(network(*padded)[:, :5], network(source, target))
    torch.testing.assert_close(network.loss(*padded), network.loss(source, target), rtol=1e-4, atol=1e-5)


def test_experts_stand_where_they_are_asked_for_and_are_told_the_tokens():
    def experts(stack, index):
        if (stack, index) not in (("encoder", 1), ("decoder", 0)):
            return None
        return MixtureOfExperts(HashRouter(WIDTH, 3, TOKENS), FeedForwardExperts(3, WIDTH, 8))

    network, source, target = model(experts), tokens(6), tokens(5, seed=1)
    _, (first, second) = network.route(source, target)
    assert torch.equal(first.indices, network.encoder[1].feedforward.router.experts[source])
    assert torch.equal(second.indices, network.decoder[0].feedforward.router.experts[target])


def test_the_loss_counts_targets_and_what_routers_add():
    network, source, target = model(), tokens(6), tokens(5, seed=1)
    target[0, 3:] = 0
    logits, routings = network.route(source, target[:, :-1])
    wanted = target[:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    expected = -log_probs[wanted != 0].mean() + sum(routing.auxiliary_loss for routing in routings)
    assert len(routings) == 2
    torch.testing.assert_close(network.loss(source, target), expected)
    assert network.loss(source, target, label_smoothing=0.1) != network.loss(source, target)


def test_learns_to_translate():
    languages = SyntheticLanguages(1)
    pairs = languages.draw(24, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = ExpertTranslationModel(languages.num_tokens, lambda stack, index: None, 32, 2, 4, pad=languages.pad)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = network.loss(pairs.source, pairs.target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5
    assert losses[-1] < 3  # the words alone, without what they translate, have an entropy of about 4


def test_each_translated_token_is_the_likeliest_after_those_before_it():
    network, source = model().eval(), tokens(6, batch=5)
    source[0, 4:] = 0
    free = network.translate(source, 1, TOKENS)  # a token that never comes
    assert free.shape == (5, 9)  # one more than the context has room for
    assert (free[:, 0] == 1).all()
    assert torch.equal(network(source, free[:, :-1]).argmax(-1), free[:, 1:])
    end = int(free[0, 3])
    ended = network.translate(source, 1, end)
    for row, expected in zip(ended, free, strict=True):
        stop = next((place for place in range(1, 9) if expected[place] == end), 8) + 1
        assert torch.equal(row[:stop], expected[:stop])
        assert (row[stop:] == network.pad).all()
    assert ended.shape[1] == max(int((row != network.pad).sum()) for row in ended)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: ExpertTranslationModel(TOKENS, mixture, 8), "encoder layer 0 must be of width 8, got 16"),
        (lambda: ExpertTranslationModel(0, mixture, WIDTH), "num_tokens=0"),
        (lambda: model()(tokens(9), tokens(3)), "room for 8 tokens, got 9"),
        (lambda: model()(tokens(3), torch.zeros(2, 3)), "integers"),
        (lambda: model().translate(tokens(9), 1, 2), "room for 8 tokens, got 9"),
    ],
)
def test_refuses_what_does_not_fit(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
