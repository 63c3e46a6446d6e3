import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.heads import Head, SoftmaxHead, StraightThroughVQHead, VQLogitsHead
from tests.modules import check_module

MAPPING = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 2])
COUNTS = torch.tensor([5, 1, 30, 2, 2, 9, 0, 11, 1])
SHARES = pytest.mark.parametrize("counts", [None, COUNTS])


@SHARES
def test_module(counts):
    def build() -> StraightThroughVQHead:
        return StraightThroughVQHead(6, 9, 3, MAPPING, counts=counts)

    hidden, target = torch.randn(2, 3, 6), torch.randint(9, (2, 3))
    check_module(build, hidden)
    check_module(build, hidden, target, call=lambda head, *inputs: head.loss(*inputs))
    check_module(lambda: StraightThroughVQHead(6, 9, 3, bias=False), hidden)
    assert isinstance(build(), Head)


@SHARES
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_a_straight_through_layer_with_a_logit_a_class(counts, bias):
    head = StraightThroughVQHead(6, 9, 3, MAPPING, counts=counts, bias=bias, commitment=0).double()
    hidden, target = torch.randn(7, 6, dtype=torch.float64, requires_grad=True), torch.randint(9, (7,))
    leaves = [hidden, *head.parameters()]
    ours = head.loss(hidden, target)

    weights = torch.ones(9, dtype=torch.float64) if counts is None else counts + 1.0
    shares = weights / torch.stack([weights[MAPPING[i] == MAPPING].sum() for i in range(9)])
    entropy = torch.stack([-(shares * shares.log())[MAPPING[i] == MAPPING].sum() for i in range(9)])

    def quantized(rows: torch.Tensor) -> torch.Tensor:
        means = torch.stack([(shares[:, None] * rows)[k == MAPPING].sum(0) for k in range(3)])
        return rows + (means[MAPPING] - rows).detach()

    logits = hidden @ quantized(head.table.weight).T + shares.log() + entropy
    if bias:
        logits = logits + quantized(head.table.bias[:, None])[:, 0]
    theirs = F.cross_entropy(logits, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(F.log_softmax(head(hidden), -1), F.log_softmax(logits, -1), rtol=1e-6, atol=1e-6)
    for mine, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-8)


@SHARES
def test_frozen_layer_has_the_same_probabilities(counts):
    for bias in (False, True):
        head = StraightThroughVQHead(6, 9, 3, MAPPING, counts=counts, bias=bias, commitment=0)
        frozen = head.freeze()
        hidden, target = torch.randn(5, 6), torch.randint(9, (5,))
        assert isinstance(frozen, VQLogitsHead)
        torch.testing.assert_close(frozen(hidden).softmax(-1), head(hidden).softmax(-1))
        torch.testing.assert_close(frozen.loss(hidden, target), head.loss(hidden, target))
        frozen.codebook.weight.data.zero_()
        assert head.table.weight.abs().sum() > 0


def test_commitment_is_the_mean_squared_distance_to_the_codes():
    torch.manual_seed(0)
    head, hidden, target = StraightThroughVQHead(6, 9, 3, MAPPING, commitment=2), torch.randn(5, 6), torch.arange(5)
    free = copy.deepcopy(head)
    free.commitment = 0
    rows = torch.cat([head.table.weight, head.table.bias[:, None]], 1)
    means = torch.stack([rows[k == MAPPING].mean(0) for k in range(3)])
    apart = (rows - means[MAPPING]).square().sum(1).mean()
    torch.testing.assert_close(head.loss(hidden, target), free.loss(hidden, target) + 2 * apart)
    whole, without = (torch.autograd.grad(h.loss(hidden, target), h.table.weight)[0] for h in (head, free))
    torch.testing.assert_close(whole - without, (4 / 9) * (rows - means[MAPPING])[:, :6].detach())


def test_it_starts_as_the_kmeans_layer():
    dense = SoftmaxHead(6, 30)
    hidden = torch.randn(4, 6)
    head = StraightThroughVQHead.from_linear(dense.linear, 7, seed=3)
    torch.testing.assert_close(head(hidden), VQLogitsHead.from_linear(dense.linear, 7, seed=3)(hidden))
    assert torch.equal(head.table.weight, dense.linear.weight)
    assert head.remap() == 0


def test_ignored_targets_count_for_nothing():
    head, hidden, target = StraightThroughVQHead(6, 9, 3), torch.randn(4, 6), torch.tensor([3, -100, 8, -100])
    torch.testing.assert_close(head.loss(hidden, target), head.loss(hidden[::2], target[::2]))


def test_a_wrong_mapping_is_unlearned():
    """Classes come in two groups that the context tells apart; the start mixes them, and half the codes are wasted."""
    torch.manual_seed(0)
    contexts = torch.eye(3)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    start = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    learned = StraightThroughVQHead(3, 12, 3, start)
    fixed = VQLogitsHead(3, 12, 3, start)
    for head in (learned, fixed):
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        for step in range(300):
            target = torch.randint(12, (64,))
            optimizer.zero_grad()
            head.loss(contexts[group[target]], target).backward()
            optimizer.step()
            if step % 30 == 29 and isinstance(head, StraightThroughVQHead):
                head.remap()
    target = torch.arange(12)
    best = torch.tensor(4.0).log()
    assert learned.freeze().loss(contexts[group[target]], target) < best + 0.02
    assert fixed.loss(contexts[group[target]], target) > best + 0.5
    assert len({(g, c) for g, c in zip(group.tolist(), learned.mapping.tolist(), strict=True)}) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StraightThroughVQHead(6, 9, 0), "9 and 0"),
        (lambda: StraightThroughVQHead(6, 9, 3, commitment=-1), "got -1"),
        (lambda: StraightThroughVQHead(6, 9, 3, MAPPING + 1), r"0\.\.2, got 1\.\.3"),
        (lambda: StraightThroughVQHead(6, 9, 3, counts=torch.ones(8)), r"\[9\], one a class, got \[8\]"),
        (lambda: StraightThroughVQHead.from_linear(nn.ReLU(), 3), "ReLU"),
        (lambda: StraightThroughVQHead(6, 9, 3).remap(0), "got 0"),
        (lambda: StraightThroughVQHead(6, 9, 3)(torch.zeros(2, 5)), r"6 features"),
        (lambda: StraightThroughVQHead(6, 9, 3).loss(torch.zeros(2, 6), torch.zeros(2)), "float32"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
