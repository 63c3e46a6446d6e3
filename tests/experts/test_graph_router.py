"""Routers over graphs of tokens against sums over pairs, and against the plain router where they must be it."""

import pytest
import torch

from postern.experts import (
    RoutingContext,
    SoftmaxRouter,
    TokenGraph,
    TokenGraphRouter,
    balance_loss,
    router_z_loss,
    sharpest_head,
    similarity_matrix,
)
from tests.modules import check_module

WIDTH, EXPERTS, TIME = 6, 5, 7


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokens():
    return torch.randn(2, TIME, WIDTH)


@pytest.fixture
def attention():
    return torch.randn(2, 4, TIME, TIME).masked_fill(torch.ones(TIME, TIME).triu(1).bool(), -torch.inf).softmax(-1)


def same_routing(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"top_k": 1, "z": 1e-2}, {"top_k": 3, "bias": True, "temperature": 0.3}])
def test_without_a_graph_it_is_the_plain_router(tokens, settings):
    plain, router = (
        SoftmaxRouter(WIDTH, EXPERTS, **settings),
        TokenGraphRouter(WIDTH, EXPERTS, graph="none", **settings),
    )
    router.load_state_dict(plain.state_dict())
    mask = torch.rand(2, TIME) < 0.7
    same_routing(router(tokens, RoutingContext(mask)), plain(tokens, RoutingContext(mask)))


@pytest.mark.parametrize("similarity", ["cosine", "distance"])
def test_of_a_token_that_is_most_like_itself_a_low_temperature_leaves_the_plain_router(tokens, similarity):
    plain = SoftmaxRouter(WIDTH, EXPERTS)
    router = TokenGraphRouter(WIDTH, EXPERTS, similarity=similarity, tau=1e-4)
    router.load_state_dict(plain.state_dict())
    found, expected = router(tokens), plain(tokens)
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert torch.equal(found.indices, expected.indices)


def test_all_routers_start_from_the_same_weights():
    gates = []
    for graph in ("none", "similarity", "attention", "uniform"):
        torch.manual_seed(3)
        router = TokenGraphRouter(WIDTH, EXPERTS, graph=graph, heads="learned", num_heads=4)
        gates.append((router.gate.weight, torch.rand(1)))
    for weight, following in gates:
        assert torch.equal(weight, gates[0][0])
        assert torch.equal(following, gates[0][1])


@pytest.mark.parametrize("self_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mix", ["probabilities", "logits", "chosen"])
@pytest.mark.parametrize("graph", ["similarity", "attention", "uniform"])
def test_probabilities_are_sums_over_related_tokens(tokens, attention, graph, mix, self_weight):
    found = TokenGraph(WIDTH, graph, mix=mix, self_weight=self_weight, top_k=2)
    logits = torch.randn(2, TIME, EXPERTS)
    if graph == "similarity":
        with torch.no_grad():
            found.weight.normal_()
        weights = similarity_matrix(tokens, "bilinear", weight=found.weight)
    elif graph == "attention":
        weights = attention.mean(1)
    else:
        weights = (torch.ones(TIME, TIME).tril() / torch.arange(1, TIME + 1)[:, None]).expand(2, TIME, TIME)
    preferences = logits.softmax(-1)
    if mix == "chosen":
        least = preferences.topk(2, dim=-1).values[..., -1:]
        preferences = preferences * (preferences >= least)
        preferences = preferences / preferences.sum(-1, keepdim=True)
    elif mix == "logits":
        preferences = logits
    expected = torch.zeros_like(preferences)
    for i in range(TIME):
        for j in range(i + 1):
            expected[:, i] += (1 - self_weight) * weights[:, i, j, None] * preferences[:, j]
        expected[:, i] += self_weight * preferences[:, i]
    expected = expected.softmax(-1) if mix == "logits" else expected
    given = attention if graph == "attention" else None
    torch.testing.assert_close(found(logits, tokens, attention=given), expected)


@pytest.mark.parametrize("graph", ["similarity", "attention", "uniform", "none"])
@pytest.mark.parametrize("heads", ["mean", "sharpest"])
def test_its_matrix_is_what_it_averages_with(tokens, graph, heads):
    found = TokenGraph(WIDTH, graph, heads=heads, self_weight=0.3)
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = False
    context = RoutingContext(mask, query=torch.randn(2, 4, TIME, 3), key=torch.randn(2, 2, TIME, 3))
    logits = torch.randn(2, TIME, EXPERTS)
    matrix = found.matrix(tokens, context)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, TIME))
    assert (matrix.triu(1) == 0).all()
    assert (matrix[0, 3:, 2] == 0).all()
    torch.testing.assert_close(found(logits, tokens, context), matrix @ logits.softmax(-1))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("graph", "heads"), [("similarity", "mean"), ("uniform", "mean"), ("attention", "mean"), ("attention", "sharpest")]
)
def test_documents_of_one_sequence_are_routed_as_if_each_were_alone(tokens, graph, heads, is_causal):
    router = TokenGraphRouter(WIDTH, EXPERTS, graph=graph, heads=heads)
    query, key = torch.randn(2, 4, TIME, 3), torch.randn(2, 2, TIME, 3)
    documents = torch.tensor([0, 0, 0, 5, 5, 5, 5]).expand(2, -1)
    packed = router(
        tokens, RoutingContext(query=query, key=key, is_causal=is_causal, document_ids=documents)
    ).probabilities
    alone = [
        router(
            tokens[:, part], RoutingContext(query=query[:, :, part], key=key[:, :, part], is_causal=is_causal)
        ).probabilities
        for part in (slice(0, 3), slice(3, TIME))
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1))
    together = router(tokens, RoutingContext(query=query, key=key, is_causal=is_causal)).probabilities
    assert not torch.allclose(together[:, 3:], alone[1], atol=1e-4)


def test_the_token_keeps_half_beside_attention_and_nothing_beside_what_holds_itself():
    assert TokenGraph(WIDTH, "attention").self_weight == 0.5
    assert TokenGraph(WIDTH, "similarity").self_weight == TokenGraph(WIDTH, "uniform").self_weight == 0.0


def test_heads_are_averaged_chosen_or_weighted(tokens, attention):
    logits = torch.randn(2, TIME, EXPERTS)
    preferences = logits.softmax(-1)

    def run(**options):
        graph = TokenGraph(WIDTH, "attention", self_weight=0.0, num_heads=4, **options)
        return graph, graph(logits, tokens, attention=attention)

    torch.testing.assert_close(run()[1], attention.mean(1) @ preferences)
    torch.testing.assert_close(run(heads="sharpest")[1], sharpest_head(attention)[:, 0] @ preferences)
    learned, found = run(heads="learned")
    torch.testing.assert_close(found, attention.mean(1) @ preferences)
    with torch.no_grad():
        learned.head_logits.copy_(torch.tensor([-30.0, -30.0, 30.0, -30.0]))
    torch.testing.assert_close(learned(logits, tokens, attention=attention), attention[:, 2] @ preferences)


@pytest.mark.parametrize("heads", ["mean", "sharpest", "learned"])
def test_queries_and_keys_and_their_weights_give_the_same(tokens, heads):
    query, key = torch.randn(2, 4, TIME, 3), torch.randn(2, 2, TIME, 3)
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[1, 4:] = False
    logits = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(2, dim=1)) / 3**0.5
    hidden = torch.ones(TIME, TIME).triu(1).bool() | ~mask[:, None, None, :]
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    router = TokenGraphRouter(WIDTH, EXPERTS, graph="attention", heads=heads, num_heads=4)
    assert router.needs_attention
    fused = router(tokens, RoutingContext(mask, query=query, key=key))
    explicit = router(tokens, RoutingContext(mask), attention)
    torch.testing.assert_close(fused.probabilities[mask], explicit.probabilities[mask])
    torch.testing.assert_close(fused.auxiliary_loss, explicit.auxiliary_loss)


def test_weights_and_balance_of_the_average_or_of_the_token(tokens):
    options = {"graph": "uniform", "balance": 0.5, "z": 0.1}
    mixed = TokenGraphRouter(WIDTH, EXPERTS, **options)
    own = TokenGraphRouter(WIDTH, EXPERTS, weights="own", balances="own", **options)
    own.load_state_dict(mixed.state_dict())
    found, other = mixed(tokens), own(tokens)
    plain = mixed.logits(tokens).softmax(-1)
    z = 0.1 * router_z_loss(mixed.logits(tokens))
    best = found.probabilities.topk(2, dim=-1)
    assert torch.equal(found.indices, best.indices)
    torch.testing.assert_close(found.weights, best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(found.auxiliary_loss, 0.5 * balance_loss(found.probabilities, best.indices) + z)
    assert torch.equal(other.indices.sort(-1).values, found.indices.sort(-1).values)
    kept = plain.gather(-1, other.indices)
    torch.testing.assert_close(other.weights, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(other.auxiliary_loss, 0.5 * balance_loss(plain, plain.topk(2, dim=-1).indices) + z)
    assert not torch.equal(found.weights, other.weights)


@pytest.mark.parametrize("graph", ["similarity", "attention"])
def test_gradients_stop_at_the_graph_where_they_shall(tokens, graph):
    for has_gradient in (True, False):
        found = TokenGraph(WIDTH, graph, similarity="dot", has_graph_gradient=has_gradient)
        x = tokens.clone().requires_grad_()
        query, key = torch.randn(2, 4, TIME, 3, requires_grad=True), torch.randn(2, 4, TIME, 3, requires_grad=True)
        logits = torch.randn(2, TIME, EXPERTS, requires_grad=True)
        found(logits, x, RoutingContext(query=query, key=key)).square().sum().backward()
        assert logits.grad is not None
        for leaf in (x,) if graph == "similarity" else (query, key):
            assert (leaf.grad is not None) == has_gradient


def test_padding_on_the_left_is_never_averaged_over(tokens):
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[:, :3] = False
    for graph in ("similarity", "uniform", "attention"):
        router = TokenGraphRouter(WIDTH, EXPERTS, graph=graph)
        query, key = torch.randn(2, 4, TIME, 3), torch.randn(2, 2, TIME, 3)
        padded = router(tokens, RoutingContext(mask, query=query, key=key))
        alone = router(tokens[:, 3:], RoutingContext(query=query[:, :, 3:], key=key[:, :, 3:]))
        torch.testing.assert_close(padded.probabilities[:, 3:], alone.probabilities)
        torch.testing.assert_close(padded.probabilities.sum(-1), torch.ones(2, TIME))
        torch.testing.assert_close(padded.auxiliary_loss, alone.auxiliary_loss)


def test_with_all_tokens_in_view_the_last_one_matters_to_the_first(tokens):
    router = TokenGraphRouter(WIDTH, EXPERTS, graph="uniform")
    changed = torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], dim=1)
    context = RoutingContext(is_causal=False)
    before, after = router(tokens, context).probabilities, router(changed, context).probabilities
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("graph", ["similarity", "uniform", "none"])
def test_a_graph_alone_is_a_module(tokens, graph):
    check_module(lambda: TokenGraph(WIDTH, graph), torch.randn(2, TIME, EXPERTS), tokens)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: TokenGraphRouter(4, 3, graph="cycle"), "got 'cycle'"),
        (lambda: TokenGraphRouter(4, 3, mix="votes"), "got 'votes'"),
        (lambda: TokenGraphRouter(4, 3, weights="none"), "weights is one of mixed, own; got 'none'"),
        (lambda: TokenGraphRouter(4, 3, balances="none"), "got 'none'"),
        (lambda: TokenGraphRouter(4, 3, 4), "top_k=4"),
        (lambda: TokenGraphRouter(4, 3, tau=-1.0), "got -1.0"),
        (lambda: TokenGraphRouter(4, 3, self_weight=1.5), "got 1.5"),
        (lambda: TokenGraphRouter(4, 3, graph="attention", heads="learned"), "got None"),
        (lambda: TokenGraph(4, "attention").matrix(torch.zeros(1, 2, 4)), "needs the attention layer"),
        (lambda: TokenGraphRouter(4, 3, graph="attention")(torch.zeros(1, 2, 4)), "needs the attention layer"),
        (
            lambda: TokenGraphRouter(4, 3, graph="attention")(
                torch.zeros(1, 2, 4), RoutingContext(query=torch.zeros(1, 2, 3, 4), key=torch.zeros(1, 2, 3, 4))
            ),
            r"query begins with \[1, heads, 2\], got \[1, 2, 3, 4\]",
        ),
        (
            lambda: TokenGraphRouter(4, 3, graph="attention", heads="learned", num_heads=3)(
                torch.zeros(1, 2, 4), attention=torch.zeros(1, 2, 2, 2)
            ),
            r"attention begins with \[1, 3, 2\], got \[1, 2, 2, 2\]",
        ),
    ],
)
def test_impossible_settings_are_refused(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
