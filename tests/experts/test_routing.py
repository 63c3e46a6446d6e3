"""Losses, dispatch, capacity, grouped products and single routers against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.experts import (
    Capacity,
    CosineRouter,
    DenseToSparseRouter,
    FeedForwardExperts,
    HashRouter,
    LinearTemperatureSchedule,
    MixtureOfExperts,
    ModuleExperts,
    RandomRouter,
    Routing,
    RoutingContext,
    SoftmaxRouter,
    TemperatureGate,
    TokenGraphRouter,
    balance_loss,
    dispatch,
    evaluate_densely,
    expert_shares,
    grouped_mm,
    gumbel_noise,
    in_order,
    router_z_loss,
    set_temperature,
)
from tests.modules import check_module


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# -- grouped products -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), rest=st.integers(0, 3), aligned=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_multiplied_by_the_matrix_of_its_group(dtype, sizes, rest, aligned):
    inputs, outputs = (8, 16) if aligned else (5, 3)
    x = torch.randn(sum(sizes) + rest, inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(sizes), inputs, outputs, dtype=dtype, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0)
    found = grouped_mm(x, weight, ends)
    parts = [part @ w for part, w in zip(x[: sum(sizes)].split(sizes), weight, strict=True)]
    expected = torch.cat([*parts, torch.zeros(rest, outputs, dtype=dtype)])
    torch.testing.assert_close(found, expected)
    # an expanded gradient, as a sum has it
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (x, weight), retain_graph=True),
        torch.autograd.grad(expected.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_operator_keeps_torchs_rules():
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    ends = torch.tensor([2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.postern.grouped_mm.default, (x, weight, ends))


def test_products_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the last group of 3 rows ends at 3 or before, got 4"):
        grouped_mm(torch.zeros(3, 4), torch.zeros(2, 4, 6), torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"\[3, 4\], \[2, 5, 6\] and \[2\]"):
        grouped_mm(torch.zeros(3, 4), torch.zeros(2, 5, 6), torch.tensor([1, 3]))


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bank_computes_what_single_blocks_compute(is_gated, bias):
    bank = FeedForwardExperts(3, 4, 6, activation=torch.tanh, is_gated=is_gated, bias=bias).double()
    rows, ends = torch.randn(7, 4, dtype=torch.float64), torch.tensor([2, 2, 5])
    found = bank(rows, ends)
    for row in range(7):
        if row >= 5:
            assert (found[row] == 0).all()
            continue
        expert = 0 if row < 2 else 2
        hidden = rows[row] @ bank.expand[expert] + (bank.expand_bias[expert] if bias else 0)
        hidden = torch.tanh(hidden[:6]) * hidden[6:] if is_gated else torch.tanh(hidden)
        expected = hidden @ bank.contract[expert] + (bank.contract_bias[expert] if bias else 0)
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("kind", ["equal blocks", "modules"])
def test_a_bank_takes_tokens_in_any_order(kind):
    """Every third assignment is nobody's."""
    blocks = FeedForwardExperts(3, 4, 6)
    bank = blocks if kind == "equal blocks" else ModuleExperts(torch.nn.Linear(4, 4) for _ in range(3))
    tokens, chosen = torch.randn(5, 4), torch.randint(3, (5, 3))
    chosen[:, 2] = 3
    order = chosen.flatten().argsort(stable=True)
    ends = torch.searchsorted(chosen.flatten()[order], torch.arange(3), right=True)
    found = bank(tokens, ends, order).view(5, 3, 4)
    for token in range(5):
        assert (found[token, 2] == 0).all()
        for choice in range(2):
            alone = torch.zeros(3, dtype=torch.int64)
            alone[chosen[token, choice] :] = 1
            torch.testing.assert_close(found[token, choice], bank(tokens[token : token + 1], alone)[0])
    assert bank(tokens[:0], ends * 0, order[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match="as many assignments as the others, got 14 for 5 tokens"):
        bank(tokens, ends, order[:14])


def test_a_layer_leaves_all_to_its_bank():
    """A bank that overrides how it works is asked, whatever it is derived from."""

    class Negated(FeedForwardExperts):
        def forward(self, rows, ends, order=None):
            return -super().forward(rows, ends, order)

    layer = MixtureOfExperts(SoftmaxRouter(4, 3, 2), Negated(3, 4, 6)).double()
    tokens = torch.randn(2, 5, 4, dtype=torch.float64)
    output, _ = layer(tokens)
    torch.testing.assert_close(output, evaluate_densely(layer, tokens))
    layer.experts.__class__ = FeedForwardExperts
    torch.testing.assert_close(output, -layer(tokens)[0])


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 400), min_size=3, max_size=3), rest=st.integers(0, 3), is_gated=st.booleans())
def test_inference_in_parts_computes_the_same(sizes, rest, is_gated):
    bank = FeedForwardExperts(3, 4, 8, activation=torch.tanh, is_gated=is_gated)
    rows, ends = torch.randn(sum(sizes) + rest, 4), torch.tensor(sizes).cumsum(0)
    with torch.no_grad():
        found = bank(rows, ends)
    torch.testing.assert_close(found, bank(rows, ends).detach())


def test_experts_start_as_linear_layers_do():
    bank = FeedForwardExperts(2, 100, 400)
    linear = torch.nn.Linear(100, 400)
    assert bank.expand.abs().max().item() == pytest.approx(linear.weight.abs().max().item(), rel=1e-3)
    assert bank.contract.std().item() == pytest.approx(torch.nn.Linear(400, 100).weight.std().item(), rel=0.02)


def test_modules_serve_as_experts():
    modules = [torch.nn.Linear(4, 4) for _ in range(3)]
    layer = MixtureOfExperts(SoftmaxRouter(4, 3), ModuleExperts(modules)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], evaluate_densely(layer, x))
    with pytest.raises(ValueError, match="got none"):
        ModuleExperts([])


@pytest.mark.parametrize("shape", [(1, 0, 8), (0, 3, 8)])
@pytest.mark.parametrize(
    "router", [SoftmaxRouter(8, 4, top_k=2, z=0.1), DenseToSparseRouter(8, 4), TokenGraphRouter(8, 4)]
)
@pytest.mark.parametrize("bank", [FeedForwardExperts(4, 8, 16), ModuleExperts([torch.nn.Linear(8, 8)] * 4)])
def test_no_tokens_are_no_error(shape, router, bank):
    layer = MixtureOfExperts(router, bank)
    found, routing = layer(torch.zeros(shape))
    assert found.shape == shape
    assert routing.auxiliary_loss == 0
    with torch.no_grad():
        assert layer(torch.zeros(shape))[0].shape == shape


# -- dispatch ---------------------------------------------------------------------------------------------------------


def routing_of(indices, weights=None):
    indices = torch.tensor(indices)[None]
    weights = torch.ones(indices.shape) if weights is None else torch.tensor(weights)[None]
    return Routing(weights, indices, torch.zeros(()), torch.zeros(*indices.shape[:2], 3))


def test_assignments_are_sorted_by_expert_and_stay_in_order():
    found = dispatch(routing_of([[2, 0], [0, 1], [2, 1]]), 3)
    assert found.order.tolist() == [1, 2, 3, 5, 0, 4]
    assert found.ends.tolist() == [2, 4, 6]
    assert found.num_dropped == 0


def test_tokens_that_do_not_count_come_last():
    context = RoutingContext(mask=torch.tensor([[True, False, True]]))
    found = dispatch(routing_of([[2, 0], [0, 1], [2, 1]]), 3, context)
    assert found.order.tolist() == [1, 5, 0, 4, 2, 3]
    assert found.ends.tolist() == [1, 2, 4]


@pytest.mark.parametrize(("priority", "kept"), [("order", [0, 1]), ("weight", [2, 1])])
def test_an_expert_takes_the_first_or_the_heaviest(priority, kept):
    routing = routing_of([[0], [0], [0]], [[0.1], [0.2], [0.9]])
    found = dispatch(routing, 3, capacity=Capacity(2.0, priority=priority))
    assert found.order[: found.ends[-1]].tolist() == kept
    assert found.ends.tolist() == [2, 2, 2]
    assert found.num_dropped == 1


@settings(deadline=None, max_examples=50)
@given(
    factor=st.floats(0.1, 3.0),
    least=st.integers(0, 3),
    seed=st.integers(0, 99),
    priority=st.sampled_from(["order", "weight"]),
)
def test_no_expert_takes_more_than_its_capacity(factor, least, seed, priority):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(2, 6, 4, generator=generator).topk(2).indices
    mask = torch.rand(2, 6, generator=generator) < 0.8
    routing = Routing(torch.rand(2, 6, 2, generator=generator), indices, torch.zeros(()), torch.zeros(2, 6, 4))
    found = dispatch(routing, 4, RoutingContext(mask=mask), Capacity(factor, least, priority))
    assignments = 2 * int(mask.sum())
    room = max(least, math.ceil(factor * assignments / 4))
    wanted = torch.bincount(indices[mask].flatten(), minlength=4)
    sizes = found.ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    assert sizes.tolist() == wanted.clamp_max(room).tolist()
    assert found.num_dropped == assignments - sizes.sum()
    assert sorted(found.order.tolist()) == list(range(24))
    experts = indices.flatten()[found.order[: found.ends[-1]]]
    assert torch.equal(experts, torch.arange(4).repeat_interleave(sizes))


def test_dropped_assignments_add_nothing():
    layer = MixtureOfExperts(SoftmaxRouter(4, 2, 1), FeedForwardExperts(2, 4, 8), capacity=Capacity(1.0))
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    output, _ = layer(torch.rand(1, 6, 4))
    assert (output[0, :3].abs().sum(-1) > 0).all()
    assert (output[0, 3:] == 0).all()
    with pytest.raises(ValueError, match="no dense form"):
        evaluate_densely(layer, torch.rand(1, 6, 4))


@pytest.mark.parametrize(("arguments", "seen"), [((0.0,), "got 0.0"), ((1.0, -1), "-1"), ((1.0, 1, "luck"), "luck")])
def test_impossible_capacities_are_refused(arguments, seen):
    with pytest.raises(ValueError, match=seen):
        Capacity(*arguments)


def test_router_and_experts_agree_on_their_number():
    with pytest.raises(ValueError, match="knows 3 experts, but there are 2"):
        MixtureOfExperts(SoftmaxRouter(4, 3), FeedForwardExperts(2, 4, 4))


def test_a_bank_that_takes_no_order_is_told_how_to():
    class Doubled(torch.nn.Module):
        num_experts = 3

        def forward(self, rows, ends):
            return 2 * rows

    class InOrder(Doubled):
        def forward(self, rows, ends, order=None):
            return super().forward(rows, ends) if order is None else in_order(super().forward, rows, ends, order)

    with pytest.raises(ValueError, match=r"\(rows, ends, order\), but Doubled takes \(rows, ends\).*in_order"):
        MixtureOfExperts(SoftmaxRouter(4, 3), Doubled())
    layer, x = MixtureOfExperts(SoftmaxRouter(4, 3), InOrder()), torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x)[0], 2 * x)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_the_balance_loss_is_least_for_an_even_load():
    even = torch.full((6, 3), 1 / 3)
    assert balance_loss(even, torch.tensor([[0], [1], [2], [0], [1], [2]])) == pytest.approx(1.0)
    one = torch.tensor([1.0, 0.0, 0.0]).expand(6, 3)
    assert balance_loss(one, torch.zeros(6, 1, dtype=torch.int64)) == pytest.approx(3.0)


def test_losses_count_the_tokens_that_count():
    probabilities, indices = torch.rand(2, 5, 3).softmax(-1), torch.randint(3, (2, 5, 1))
    mask = torch.rand(2, 5) < 0.5
    mask[0, 0] = True
    torch.testing.assert_close(
        balance_loss(probabilities, indices, mask), balance_loss(probabilities[mask], indices[mask])
    )
    logits = torch.randn(2, 5, 3)
    torch.testing.assert_close(router_z_loss(logits, mask), logits[mask].logsumexp(-1).square().mean())
    assert expert_shares(indices, 3, mask).sum() == pytest.approx(1.0)
    assert torch.equal(expert_shares(indices, 3, torch.zeros_like(mask)), torch.zeros(3))


# -- routers ----------------------------------------------------------------------------------------------------------


def test_weights_of_the_softmax_router():
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    router = SoftmaxRouter(6, 5, 2, temperature=0.7).double()
    logits = x @ router.gate.weight.T / 0.7
    best = logits.topk(2)
    routing = router(x)
    assert torch.equal(routing.indices, best.indices)
    torch.testing.assert_close(routing.weights, best.values.softmax(-1))
    whole = SoftmaxRouter(6, 5, 2, renormalises=False, temperature=0.7).double()
    whole.load_state_dict(router.state_dict())
    torch.testing.assert_close(whole(x).weights, logits.softmax(-1).topk(2).values)


def test_the_gradient_of_one_expert_comes_from_its_probability():
    router = SoftmaxRouter(6, 5, 1, balance=0.0)
    router(torch.randn(1, 4, 6)).weights.sum().backward()
    assert router.gate.weight.grad.abs().max() > 0


def test_a_cosine_router_sees_directions_alone():
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    router = CosineRouter(6, 5, 2, temperature=0.7, balance=0.1, z=0.2).double()
    with torch.no_grad():
        projected = x @ router.projection.weight.T
        lengths = projected.norm(dim=-1)[..., None] * router.directions.norm(dim=-1)
        logits = projected @ router.directions.T / lengths / 0.7
    best = logits.topk(2)
    routing = router(x)
    assert torch.equal(routing.indices, best.indices)
    torch.testing.assert_close(routing.weights, best.values.softmax(-1))
    torch.testing.assert_close(routing.probabilities, logits.softmax(-1))
    loss = 0.1 * balance_loss(logits.softmax(-1), best.indices) + 0.2 * router_z_loss(logits)
    torch.testing.assert_close(routing.auxiliary_loss, loss)
    with torch.no_grad():
        router.directions *= torch.rand(5, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(router(3 * x).probabilities, routing.probabilities)


def test_half_as_many_dimensions_as_experts():
    assert [CosineRouter(6, experts).directions.shape[1] for experts in (2, 5, 16)] == [2, 2, 8]


def test_hash_experts_are_fixed_even_and_different():
    router = HashRouter(4, 3, 12, 2)
    assert torch.bincount(router.experts[:, 0]).tolist() == [4, 4, 4]
    assert (router.experts[:, 0] != router.experts[:, 1]).all()
    ids = torch.tensor([[0, 5, 0]])
    indices = router(torch.zeros(1, 3, 4), RoutingContext(token_ids=ids)).indices
    assert torch.equal(indices[0, 0], indices[0, 2])
    assert torch.equal(indices, router.experts[ids])
    with pytest.raises(ValueError, match="token_ids"):
        router(torch.zeros(1, 3, 4))


def test_random_experts_are_drawn_evenly():
    indices = RandomRouter(4, 5, 2)(torch.zeros(40, 100, 4)).indices
    shares = expert_shares(indices, 5)
    assert (shares - 0.2).abs().max() < 0.01


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).expand(200_000, 3)
    drawn = torch.bincount((logits + gumbel_noise(logits)).argmax(-1), minlength=3) / len(logits)
    torch.testing.assert_close(drawn, logits[0].softmax(-1).float(), rtol=0, atol=5e-3)


def test_the_temperature_gate_is_what_it_says():
    x = torch.randn(3, 4)
    gate = TemperatureGate(4, 5, temperature=0.5, activation=torch.tanh)
    with torch.no_grad():
        gate.bias.normal_()
    expected = ((torch.tanh(x @ gate.weight.T) + gate.bias) / 0.5).softmax(-1)
    torch.testing.assert_close(gate(x), expected)
    assert TemperatureGate(4, 5, temperature="learned").temperature.requires_grad
    assert not gate.temperature.requires_grad


def test_linear_scores_and_temperature_scale_together():
    x = torch.randn(3, 4)
    gate, other = TemperatureGate(4, 5, temperature=0.5), TemperatureGate(4, 5, temperature=1.5)
    with torch.no_grad():
        other.weight.copy_(3 * gate.weight)
    torch.testing.assert_close(other(x), gate(x))


def test_euclidean_scores_are_distances_to_centres():
    x = torch.randn(3, 7, 4)
    gate = TemperatureGate(4, 5, temperature=0.5, score="euclidean")
    with torch.no_grad():
        gate.bias.normal_()
    distance = (x[..., None, :] - gate.weight).square().sum(-1).sqrt()
    torch.testing.assert_close(gate(x), ((gate.bias - distance) / 0.5).softmax(-1))
    gate.double()
    centred = torch.cat([gate.weight[:2], torch.randn(3, 4, dtype=torch.float64)]).detach().requires_grad_()
    gate.scores(centred).sum().backward()
    assert centred.grad.isfinite().all()  # also where a token is a centre


@pytest.mark.parametrize(("score", "lost"), [("linear", 2 + 1 + 1), ("euclidean", 1)])
def test_euclidean_scores_tell_the_temperature_and_linear_ones_do_not(score, lost):
    """The Fisher information of the gate: translations of slopes and biases are lost, and the scale of a linear one."""
    gate = TemperatureGate(2, 4, temperature="learned", score=score).double()
    x = 2 * torch.randn(400, 2, dtype=torch.float64)
    names, values = zip(*gate.named_parameters(), strict=True)

    def log_weights(*values):
        return torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (x,)).log()

    jacobian = torch.autograd.functional.jacobian(log_weights, values)
    scores = torch.cat([each.reshape(400, 4, -1) for each in jacobian], dim=-1)
    information = torch.einsum("ne,nei,nej->ij", gate(x).detach(), scores, scores) / 400
    eigenvalues, vectors = torch.linalg.eigh(information)
    null = eigenvalues < 1e-12 * eigenvalues[-1]
    assert int(null.sum()) == lost
    assert eigenvalues[~null].min() > 1e-5 * eigenvalues[-1]
    of_temperature = vectors[sum(value.numel() for value in values[: names.index("log_temperature")])][null].norm()
    assert (of_temperature > 0.1) == (score == "linear")


@pytest.mark.parametrize("score", ["linear", "euclidean"])
def test_the_temperature_gate_takes_tokens_of_any_shape(score):
    gate = TemperatureGate(3, 2, score=score)
    tokens = torch.randn(2, 4, 5, 3)
    expected = gate(tokens.flatten(0, 2))
    torch.testing.assert_close(gate(tokens), expected.reshape(2, 4, 5, 2))
    torch.testing.assert_close(gate(tokens[0, 0, 0]), expected[0])
    assert gate(tokens[:0]).shape == (0, 4, 5, 2)


@pytest.mark.parametrize("score", ["linear", "euclidean"])
def test_the_temperature_gate_survives_what_modules_must(score):
    check_module(lambda: TemperatureGate(8, 5, temperature="learned", score=score), torch.randn(2, 6, 8))


@pytest.mark.parametrize(
    "sigmoid",
    [
        "sigmoid",
        torch.sigmoid,
        torch.nn.functional.sigmoid,
        torch.Tensor.sigmoid,
        torch.special.expit,
        torch.nn.Sigmoid(),
    ],
)
def test_a_learnt_temperature_starts_low_under_a_sigmoid_whatever_its_name(sigmoid):
    assert TemperatureGate(4, 3, temperature="learned", activation=sigmoid).temperature.item() == pytest.approx(0.3)


def test_a_learnt_temperature_starts_at_one_elsewhere_and_can_be_set():
    assert TemperatureGate(4, 3, temperature="learned", activation="tanh").temperature.item() == pytest.approx(1.0)
    router = DenseToSparseRouter(4, 3, temperature="learned", activation=torch.sigmoid)
    assert router.gate.temperature.item() == pytest.approx(0.3)
    set_temperature(router, 0.1)
    assert router.gate.temperature.item() == pytest.approx(0.1)
    assert router.gate.temperature.requires_grad


def test_evaluation_shares_by_the_temperature_of_training_or_by_its_own():
    x = torch.randn(2, 5, 8)
    router = DenseToSparseRouter(8, 6, 2, temperature=0.3).eval()
    scores = router.gate.scores(x).topk(2).values
    torch.testing.assert_close(router(x).weights, (scores / 0.3).softmax(-1))
    as_published = DenseToSparseRouter(8, 6, 2, temperature=0.3, evaluation_temperature=1.0, has_noise=False)
    as_published.load_state_dict(router.state_dict())
    torch.testing.assert_close(as_published.eval()(x).weights, scores.softmax(-1))
    torch.testing.assert_close(as_published.train()(x).probabilities, router(x).probabilities)


def test_falling_temperatures_leave_fewer_experts():
    router = DenseToSparseRouter(16, 8, 2, has_noise=False)
    x = torch.randn(4, 10, 16)
    schedule = LinearTemperatureSchedule(10)
    assert [schedule(step) for step in (0, 5, 10, 20)] == pytest.approx([2.0, 1.15, 0.3, 0.3])
    found = []
    for step in (0, 10):
        set_temperature(router, schedule(step))
        found.append(router(x).indices.shape[-1])
    set_temperature(router, 0.02)
    found.append(router(x).indices.shape[-1])
    assert found[0] == 8
    assert found == sorted(found, reverse=True)
    assert found[-1] == 2
    assert router.eval()(x).indices.shape[-1] == 2


def test_how_many_work_is_the_mean_number_above_the_threshold():
    router = DenseToSparseRouter(4, 6, 1, temperature=1.0, threshold=0.2, has_noise=False)
    x = torch.randn(2, 9, 4)
    routing = router(x)
    active = int((routing.probabilities > 0.2).sum(-1).double().mean())
    assert routing.indices.shape[-1] == max(1, active)
    torch.testing.assert_close(routing.weights, routing.probabilities.topk(max(1, active)).values)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: SoftmaxRouter(4, 3, 4), "top_k=4"),
        (lambda: SoftmaxRouter(4, 3, balance=-1.0), "balance=-1.0"),
        (lambda: SoftmaxRouter(4, 3, temperature=0.0), "got 0.0"),
        (lambda: CosineRouter(4, 3, dimensions=1), "got 1"),
        (lambda: CosineRouter(4, 3, temperature=0.0), "temperature=0.0"),
        (lambda: CosineRouter(4, 3, temperature=1000.0), r"in \[0.01, 100\], got temperature=1000.0"),
        (lambda: CosineRouter(4, 3, z=-1.0), "z=-1.0"),
        (lambda: DenseToSparseRouter(4, 3, threshold=1.0), "got 1.0"),
        (lambda: HashRouter(4, 3, 0), "got 0"),
        (lambda: RandomRouter(4, 0), "num_experts=0"),
        (lambda: TemperatureGate(4, 3, temperature=-1.0), "temperature=-1.0"),
        (lambda: TemperatureGate(4, 3, temperature=1000.0), r"in \[0.01, 100\], got temperature=1000.0"),
        (lambda: TemperatureGate(4, 3).set_temperature(float("nan")), "temperature=nan"),
        (lambda: set_temperature(TemperatureGate(4, 3), 1000.0), r"in \[0.01, 100\], got temperature=1000.0"),
        (lambda: set_temperature(TemperatureGate(4, 3), 0.001), "temperature=0.001"),
        (lambda: TemperatureGate(4, 3, score="cosine"), "got 'cosine'"),
        (lambda: DenseToSparseRouter(4, 3, evaluation_temperature=0.0), "evaluation_temperature=0.0"),
        (lambda: DenseToSparseRouter(4, 3, evaluation_temperature=1000.0), "got evaluation_temperature=1000.0"),
        (lambda: DenseToSparseRouter(4, 3, temperature=1000.0), "got temperature=1000.0"),
        (lambda: set_temperature(torch.nn.Linear(1, 1), 1.0), "Linear has no TemperatureGate"),
        (lambda: LinearTemperatureSchedule(0), "got 0"),
        (lambda: LinearTemperatureSchedule(3, start=1000.0), "start=1000.0"),
        (lambda: LinearTemperatureSchedule(3, end=0.0), "end=0.0"),
        (lambda: FeedForwardExperts(2, 0, 4), "width=0"),
    ],
)
def test_impossible_settings_are_refused(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
