"""The compiled bank of experts, with every set of instructions, against its definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from postern import _native
from postern.errors import Unavailable
from postern.experts import (
    Capacity,
    FeedForwardExperts,
    MixtureOfExperts,
    SoftmaxRouter,
    _expert_kernels,
    evaluate_densely,
)
from postern.experts._expert_kernels import can_infer, feed_forward
from postern.experts._gate_kernels import can_gate, gate

VECTORS = [name for name in _native.instruction_sets() if name != "portable"]
pytestmark = pytest.mark.skipif(not VECTORS, reason="no compiled kernels, or no vectors for them")
ACTIVATIONS = [F.relu, F.silu, F.gelu]


@pytest.fixture(params=VECTORS)
def instructions(request):
    with _native.using(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def case(num_experts, width, hidden, is_gated, bias, tokens, top_k, dropped=0, seed=0):
    """A bank, tokens, and whom they are assigned to, but for some whom no expert takes."""
    torch.manual_seed(seed)
    bank = FeedForwardExperts(num_experts, width, hidden, is_gated=is_gated, bias=bias).requires_grad_(False)
    expert = torch.randint(num_experts, (tokens * top_k,))
    expert[torch.randperm(len(expert))[:dropped]] = num_experts
    order = expert.argsort(stable=True)
    ends = torch.searchsorted(expert[order], torch.arange(num_experts), right=True)
    return bank, torch.randn(tokens, width), order, ends, expert


def expected(bank, activation, tokens, expert):
    """Assignment by assignment, in float64."""
    rows = tokens.double().repeat_interleave(len(expert) // max(len(tokens), 1), 0)
    output = torch.zeros_like(rows)
    for number in range(bank.num_experts):
        chosen = expert == number
        hidden = rows[chosen] @ bank.expand[number].double()
        hidden = hidden if bank.expand_bias is None else hidden + bank.expand_bias[number].double()
        if bank.is_gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        output[chosen] = hidden @ bank.contract[number].double()
        if bank.contract_bias is not None:
            output[chosen] += bank.contract_bias[number].double()
    return output.float()


def run(bank, activation, tokens, order, ends):
    assert can_infer(tokens, activation, bank.expand)
    return feed_forward(
        tokens, order, ends, bank.expand, bank.contract, bank.expand_bias, bank.contract_bias, activation
    )


@settings(deadline=None, max_examples=60)
@given(
    num_experts=st.integers(1, 5),
    width=st.integers(1, 90),
    hidden=st.integers(1, 90),
    is_gated=st.booleans(),
    bias=st.booleans(),
    tokens=st.integers(0, 120),
    top_k=st.integers(1, 3),
    activation=st.sampled_from(ACTIVATIONS),
    dropped=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("instructions", VECTORS)
def test_each_assignment_is_worked_on_by_its_expert(
    instructions, num_experts, width, hidden, is_gated, bias, tokens, top_k, activation, dropped, seed
):
    bank, x, order, ends, expert = case(num_experts, width, hidden, is_gated, bias, tokens, top_k, dropped, seed)
    with _native.using(instructions):
        found = run(bank, activation, x, order, ends)
    torch.testing.assert_close(found, expected(bank, activation, x, expert), atol=2e-5, rtol=1e-4)


# Rows in place and packed, of several chunks of features, of whole and of broken panels, and of strips that do not end
# with the columns.
@pytest.mark.parametrize("tokens", [1, 7, 40, 700])
@pytest.mark.parametrize("width", [256, 300])
@pytest.mark.parametrize("hidden", [512, 777])
@pytest.mark.parametrize("is_gated", [False, True])
def test_sizes_of_models(instructions, threads, tokens, width, hidden, is_gated):
    bank, x, order, ends, expert = case(3, width, hidden, is_gated, True, tokens, 2)
    found = run(bank, F.silu, x, order, ends)
    torch.testing.assert_close(found, expected(bank, F.silu, x, expert), atol=2e-5, rtol=1e-4)


def test_a_token_gets_the_same_in_any_company(instructions, threads):
    bank, x, order, ends, expert = case(2, 300, 530, True, True, 900, 1)
    together = run(bank, F.silu, x, order, ends)
    for token in (0, 1, 899):
        own = torch.tensor([expert[token] <= number for number in range(2)]).long()
        assert torch.equal(run(bank, F.silu, x[token, None], torch.tensor([0]), own)[0], together[token])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.ReLU(), nn.SiLU(), nn.GELU()])
def test_activations_are_exact_at_any_size(instructions, activation):
    inputs = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30])])
    expand, contract = torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    order, ends = torch.arange(len(inputs)), torch.tensor([len(inputs)])
    found = feed_forward(inputs[:, None], order, ends, expand, contract, None, None, activation)[:, 0]
    torch.testing.assert_close(found, activation(inputs.double()).float(), atol=1e-6, rtol=3e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_no_finite_number_stays_none(instructions, activation):
    inputs = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [1.0]])
    order, ends = torch.arange(4), torch.tensor([4])
    ones = torch.ones(1, 1, 1)
    found = feed_forward(inputs, order, ends, ones, ones, None, None, activation)[:, 0]
    assert found[0].isnan()
    assert found[1:3].tolist() == [torch.inf, 0]
    assert found[3].isfinite()


def test_layers_infer_as_they_train(instructions, threads, monkeypatch):
    torch.manual_seed(0)
    calls = []

    def counted(*operands):
        calls.append(len(operands[1]))
        return feed_forward(*operands)

    monkeypatch.setattr(_expert_kernels, "feed_forward", counted)
    for is_gated in (False, True):
        bank = FeedForwardExperts(4, 48, 96, is_gated=is_gated)
        layer = MixtureOfExperts(SoftmaxRouter(48, 4, top_k=2), bank, capacity=Capacity(0.8))
        x = torch.randn(2, 30, 48)
        with torch.no_grad():
            found = layer(x)[0]
        assert can_infer(x, bank.activation)
        assert not can_infer(x, bank.activation, bank.expand)
        torch.testing.assert_close(found, layer(x)[0].detach(), atol=1e-6, rtol=1e-4)
        layer.capacity = None
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], evaluate_densely(layer, x), atol=1e-6, rtol=1e-4)
    # each layer infers twice, and each expert sees all tokens for the definition; training does without
    assert calls == 2 * [120, 120, 60, 60, 60, 60]


def test_inference_with_dropout_in_training_drops():
    torch.manual_seed(0)
    bank = FeedForwardExperts(2, 8, 16, dropout=0.5)
    rows, ends = torch.randn(6, 8), torch.tensor([3, 6])
    with torch.no_grad():
        assert not torch.equal(bank(rows, ends), bank(rows, ends))
        bank.eval()
        assert torch.equal(bank(rows, ends), bank(rows, ends))


def test_what_the_kernel_does_not_take():
    x = torch.zeros(1, 4)
    weight = torch.zeros(1, 4, 4, requires_grad=True)
    assert can_infer(x, F.silu, weight.detach())
    assert not can_infer(x, F.silu, weight)
    assert not can_infer(x, torch.tanh)
    assert not can_infer(x, nn.GELU("tanh"))
    assert not can_infer(x.double(), F.silu)
    assert not can_infer(x, F.silu, weight.detach().double())
    with torch.no_grad():
        assert can_infer(x, F.silu, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_infer(x, F.silu)
    with _native.using("portable"):
        assert not can_infer(x, F.silu)


def test_bad_operands_are_refused():
    bank, x, order, ends, _ = case(3, 4, 6, False, True, 5, 2)
    for wrong in (
        {"tokens": torch.zeros(5, 3)},
        {"order": order[:-1]},
        {"ends": ends[:-1]},
        {"expand": bank.expand[..., :-1]},
        {"contract_bias": None},
    ):
        given = {
            "tokens": x, "order": order, "ends": ends, "expand": bank.expand, "contract": bank.contract,
            "expand_bias": bank.expand_bias, "contract_bias": bank.contract_bias, **wrong,
        }  # fmt: skip
        with pytest.raises(ValueError, match="do not fit each other"):
            feed_forward(*given.values(), F.relu)
    for wrong_order, wrong_ends in ((order + 1, ends), (order - 1, ends), (order, ends + 1), (order, ends.flip(0))):
        with pytest.raises(ValueError, match="of 10 assignments, got numbers from"):
            run(bank, F.relu, x, wrong_order, wrong_ends)
    with _native.using("portable"), pytest.raises(Unavailable):
        feed_forward(x, order, ends, bank.expand, bank.contract, bank.expand_bias, bank.contract_bias, F.relu)
    with pytest.raises(ValueError, match="ReLU, SiLU or GELU"):
        feed_forward(x, order, ends, bank.expand, bank.contract, bank.expand_bias, bank.contract_bias, torch.tanh)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (5, 37), (300, 96)])
def test_gates_and_their_gradients(instructions, threads, activation, rows, columns):
    torch.manual_seed(0)
    hidden = (4 * torch.randn(rows, 2 * columns)).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    assert can_gate(hidden, activation)
    found, expected = gate(hidden, activation), activation(exact[:, :columns]) * exact[:, columns:]
    torch.testing.assert_close(found, expected.float(), atol=3e-6, rtol=1e-5)
    grad = torch.randn(rows, columns)
    found.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(hidden.grad, exact.grad.float(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_gates_at_any_size(instructions, activation):
    gates = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e9, -200.0, -90.0, -0.0, 0.0, 90.0, 1e9])])
    hidden = torch.stack([gates, torch.ones(len(gates))], 1).requires_grad_()
    gate(hidden, activation).sum().backward()
    exact = gates.double().requires_grad_()
    activation(exact).sum().backward()
    torch.testing.assert_close(hidden.grad[:, 0], exact.grad.float(), atol=1e-6, rtol=1e-5)


def test_the_operators_keep_torchs_rules(instructions):
    hidden = torch.randn(6, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.postern.gate.default, (hidden, 2))


def test_bad_gates_are_refused():
    for hidden, activation in ((torch.zeros(2, 3), F.silu), (torch.zeros(4), F.silu), (torch.zeros(2, 4), torch.tanh)):
        with pytest.raises(ValueError, match=r"gates and values are \[rows, 2 columns\]"):
            gate(hidden, activation)
