import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.heads import VQLogitsHead, head_cost, projection_bound, tie_log_probs, tying_floor, unigram_bias

MAPPING = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 2])


def log_probs(seed: int = 0, positions: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.log_softmax(2 * torch.randn(positions, 9, generator=generator, dtype=torch.float64), -1)


def brute_force_tied(log_p: torch.Tensor) -> torch.Tensor:
    tied = torch.empty_like(log_p)
    for row, p in enumerate(log_p.exp()):
        for i in range(9):
            members = [j for j in range(9) if MAPPING[j] == MAPPING[i]]
            tied[row, i] = math.log(sum(p[j] for j in members) / len(members))
    return tied


def test_tied_distribution_is_the_brute_force_one():
    log_p = log_probs()
    tied = tie_log_probs(log_p, MAPPING)
    torch.testing.assert_close(tied, brute_force_tied(log_p))
    torch.testing.assert_close(tied.exp().sum(-1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(tie_log_probs(log_p, torch.arange(9)), log_p)


def test_bound_is_the_brute_force_one():
    log_p, target = log_probs(), torch.randint(9, (40,))
    tied = brute_force_tied(log_p)
    kl = sum((p.exp() * (p - q)).sum() for p, q in zip(log_p, tied, strict=True)) / 40
    assert projection_bound(log_p, MAPPING) == pytest.approx(kl.item(), abs=1e-12)
    on_text = sum(log_p[t, y] - tied[t, y] for t, y in enumerate(target)) / 40
    assert projection_bound(log_p, MAPPING, target) == pytest.approx(on_text.item(), abs=1e-12)
    assert projection_bound(log_p.reshape(4, 10, 9), MAPPING, target.reshape(4, 10)) == pytest.approx(on_text.item())


def test_no_tied_layer_comes_nearer():
    """The best logits that gradient descent finds for each position end at the bound, from above."""
    log_p = log_probs(positions=5)
    bound = projection_bound(log_p, MAPPING)
    code_logits = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([code_logits], max_iter=100, line_search_fn="strong_wolfe")

    def divergence() -> torch.Tensor:
        tied = F.log_softmax(code_logits[:, MAPPING], -1)
        return (log_p.exp() * (log_p - tied)).sum(-1).mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = divergence()
        loss.backward()
        return loss

    assert divergence().item() > bound + 0.1
    optimizer.step(closure)
    assert divergence().item() == pytest.approx(bound, abs=1e-6)


def test_singletons_cost_nothing_and_impossible_classes_no_nan():
    log_p = log_probs()
    assert projection_bound(log_p, torch.arange(9)) == pytest.approx(0, abs=1e-15)
    impossible = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    assert projection_bound(impossible, torch.tensor([0, 0, 1, 1])) == pytest.approx(0)
    assert torch.equal(tie_log_probs(impossible, torch.tensor([0, 0, 1, 1])), impossible)
    assert projection_bound(impossible, torch.tensor([0, 1, 0, 1])) == pytest.approx(math.log(2))


def test_the_bound_with_biases_is_what_the_unigram_layer_would_lose():
    counts = torch.tensor([5, 1, 30, 2, 2, 9, 0, 11, 1])
    bias = unigram_bias(counts, MAPPING)
    probabilities = (counts + 1.0) / (counts + 1).sum()
    assert projection_bound(probabilities.log()[None], MAPPING, token_bias=bias) == pytest.approx(0, abs=1e-6)
    assert projection_bound(probabilities.log()[None], MAPPING) > 0.1


def test_no_layer_gets_below_the_floor():
    target = torch.randint(9, (200,))
    floor = tying_floor(target, MAPPING)
    sizes = torch.tensor([3, 2, 4])
    assert floor == pytest.approx(sizes[MAPPING[target]].double().log().mean().item())
    head = VQLogitsHead(200, 9, 3, MAPPING).double()
    nn.init.zeros_(head.codebook.bias)
    with torch.no_grad():  # one hidden vector a position: the layer knows every code for certain
        head.codebook.weight.copy_(50 * F.one_hot(MAPPING[target], 3).T)
    loss = head.loss(torch.eye(200, dtype=torch.float64), target).item()
    assert floor <= loss < floor + 1e-9


def test_costs_are_those_of_the_papers_arithmetic():
    dense = head_cost(768, 50_257, bias=False)
    for codes, cut in ((512, 0.990), (1024, 0.980), (4096, 0.919)):
        small = head_cost(768, 50_257, codes, bias=False)
        assert 1 - small.parameters / dense.parameters == pytest.approx(cut, abs=6e-4)
        assert small.mapping_bits == 50_257 * math.log2(codes)
        assert small.bytes == small.parameters * 4 + math.ceil(small.mapping_bits / 8)
    assert dense.flops == 2 * 768 * 50_257


@pytest.mark.parametrize("token_bias", [False, True])
def test_costs_count_the_modules_parameters(token_bias):
    bias = torch.zeros(9) if token_bias else None
    head = VQLogitsHead(6, 9, 3, MAPPING, token_bias=bias)
    counted = sum(p.numel() for p in head.parameters()) + (9 if token_bias else 0)
    assert head_cost(6, 9, 3, has_token_bias=token_bias).parameters == counted
    assert head_cost(6, 9).parameters == nn.Linear(6, 9).weight.numel() + 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: projection_bound(log_probs(), MAPPING[:8]), r"\[9\], got torch.int64 \[8\]"),
        (lambda: projection_bound(log_probs()[:0], MAPPING), r"got \[0, 9\]"),
        (lambda: projection_bound(log_probs(), MAPPING, torch.zeros(3, dtype=torch.long)), r"\[40\], got .*\[3\]"),
        (lambda: tie_log_probs(log_probs(), MAPPING.float()), "float32"),
        (lambda: tie_log_probs(log_probs(), MAPPING - 1), r"got -1\.\.1"),
        (lambda: tying_floor(torch.zeros(0, dtype=torch.long), MAPPING), "at least one"),
        (lambda: head_cost(0, 9), "got 0, 9"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
