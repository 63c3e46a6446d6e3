import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from postern.nets import MLP
from postern.optim import OrthoGrad, orthogonal_component, orthogonalize_grad_

OPTIMISERS = [
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False, weight_decay=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8),
    lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
]
seeds = st.integers(0, 10_000).map(lambda seed: torch.Generator().manual_seed(seed))


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 5, generator=generator), torch.randint(3, (20,), generator=generator)


def network(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(5, 3, (8, 8))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[Tensor]:
    inputs, target = batch(seed)
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(inputs), target).backward()
        optimiser.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def expected_projection(g: Tensor, w: Tensor, rescale: bool) -> Tensor:
    g64, w64 = g.double().flatten(), w.double().flatten()
    component = g64 - (w64 @ g64) / (w64 @ w64) * w64
    if rescale:
        component = component * g64.norm() / component.norm()
    return component.view_as(g)


@given(seeds, st.booleans())
def test_component_is_orthogonal_and_a_direction_of_descent(generator, rescale):
    w, g = random(generator, 3, 4), random(generator, 3, 4)
    component = orthogonal_component(g, w, rescale)
    torch.testing.assert_close(component, expected_projection(g, w, rescale))
    assert abs((component * w).sum()) < 1e-12
    assert (component * g).sum() >= 0
    if rescale:
        torch.testing.assert_close(component.norm(), g.norm())
    else:
        torch.testing.assert_close((component * g).sum(), component.square().sum())


@given(seeds, st.floats(1e-6, 1e6))
def test_component_depends_on_the_weights_direction_only(generator, scale):
    w, g = random(generator, 7), random(generator, 7)
    torch.testing.assert_close(orthogonal_component(g, scale * w), orthogonal_component(g, w))
    torch.testing.assert_close(orthogonal_component(scale * g, w), scale * orthogonal_component(g, w))


@pytest.mark.parametrize("rescale", [True, False])
def test_gradients_that_have_no_orthogonal_part(rescale):
    w = torch.randn(1000)
    assert not orthogonal_component(-0.3 * w, w, rescale).any()
    assert orthogonal_component(torch.tensor([0.7]), torch.tensor([3.1]), rescale) == 0
    assert not orthogonal_component(torch.zeros(3), torch.ones(3), rescale).any()


def test_zero_weights_leave_the_gradient():
    g = torch.randn(5)
    torch.testing.assert_close(orthogonal_component(g, torch.zeros(5)), g)


def test_tiny_gradients_are_still_projected():
    w, g = torch.randn(100), torch.randn(100)
    component = orthogonal_component(1e-30 * g, w)
    direction = expected_projection(g, w, rescale=False)
    assert torch.cosine_similarity(1e30 * component.double(), direction, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_good_as_their_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    w, g = random(generator, 300, dtype=dtype), random(generator, 300, dtype=dtype)
    torch.testing.assert_close(orthogonal_component(g, w), expected_projection(g, w, True).to(dtype))


def test_complex_weights_are_vectors_of_twice_as_many_reals():
    w, g = torch.randn(6, dtype=torch.complex128), torch.randn(6, dtype=torch.complex128)
    component = orthogonal_component(g, w, rescale=False)
    assert abs((component.conj() * w).sum().real) < 1e-12
    torch.testing.assert_close(
        torch.view_as_real(component), expected_projection(*map(torch.view_as_real, (g, w)), False)
    )


@pytest.mark.parametrize("rescale", [True, False])
def test_in_place_on_many_tensors_equals_one_by_one(rescale):
    parameters = [
        nn.Parameter(torch.randn(4, 3)),
        nn.Parameter(torch.randn(5, dtype=torch.float64)),
        nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(6).bfloat16()),
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.randn(0, 3)),
        nn.Parameter(torch.randn(2)),
    ]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter, memory_format=torch.contiguous_format)
    expected = [orthogonal_component(p.grad, p, rescale) for p in parameters[:-1] if p.numel()]
    orthogonalize_grad_([*parameters, *parameters], rescale)
    torch.testing.assert_close([p.grad for p in parameters[:-1] if p.numel()], expected)
    assert parameters[-1].grad is None


def test_in_place_takes_one_tensor_and_rejects_sparse_gradients():
    weight = nn.Parameter(torch.tensor([1.0, 0.0]))
    weight.grad = torch.tensor([3.0, 4.0])
    orthogonalize_grad_(weight, rescale=False)
    torch.testing.assert_close(weight.grad, torch.tensor([0.0, 4.0]))
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse_coo"):
        orthogonalize_grad_(embedding.parameters())


def test_in_place_compiles():
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    expected = [orthogonal_component(p.grad, p) for p in parameters]
    torch.compile(orthogonalize_grad_, fullgraph=True, backend="aot_eager")(parameters)
    torch.testing.assert_close([p.grad for p in parameters], expected)


@pytest.mark.parametrize("build", OPTIMISERS)
@pytest.mark.parametrize("rescale", [True, False])
def test_step_is_the_inner_step_on_projected_gradients(build, rescale):
    wrapped, plain = network(), network()
    inner = build(plain.parameters())
    inputs, target = batch()
    for _ in range(5):
        inner.zero_grad()
        cross_entropy(plain(inputs), target).backward()
        orthogonalize_grad_(plain.parameters(), rescale)
        inner.step()
    found = train(wrapped, OrthoGrad(build(wrapped.parameters()), rescale), 5)
    torch.testing.assert_close(found, list(plain.parameters()))
    assert not torch.allclose(found[0], train(network(), build(network().parameters()), 5)[0])


@given(seeds)
def test_a_step_of_plain_descent_adds_length_at_a_right_angle(generator):
    weight = nn.Parameter(random(generator, 9))
    before = weight.detach().clone()
    weight.grad = random(generator, 9)
    optimiser = OrthoGrad(torch.optim.SGD([weight], lr=0.5), rescale=False)
    optimiser.step()
    assert weight.norm().item() == pytest.approx(math.hypot(before.norm().item(), 0.5 * weight.grad.norm().item()))


def test_shares_groups_and_state_with_the_inner_optimiser():
    model = network()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    groups = inner.param_groups
    optimiser = OrthoGrad(inner)
    assert optimiser.param_groups is inner.param_groups is groups
    assert optimiser.state is inner.state
    train(model, optimiser, 1)
    assert len(inner.state) == 6
    optimiser.load_state_dict(optimiser.state_dict())
    assert optimiser.param_groups is inner.param_groups
    assert optimiser.state is inner.state
    optimiser.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert [group["lr"] for group in inner.param_groups] == [0.01, 0.5]
    assert "AdamW" in repr(optimiser)


def test_wrapping_keeps_the_state_of_an_optimiser_in_use():
    model = network()
    inner = torch.optim.AdamW(model.parameters())
    train(model, inner, 2)
    step = {parameter: state["step"].item() for parameter, state in inner.state.items()}
    OrthoGrad(inner)
    assert {parameter: state["step"].item() for parameter, state in inner.state.items()} == step != {}


def test_schedulers_drive_the_inner_optimiser():
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimiser = OrthoGrad(inner)
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1, gamma=0.1)
    train(model, optimiser, 1)
    scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    after = train(model, optimiser, 1)
    change = [old - new for old, new in zip(before, after, strict=True)]
    torch.testing.assert_close(change, [0.1 * p.grad for p in model.parameters()], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("build", OPTIMISERS)
def test_training_continues_from_a_state_dictionary(build, tmp_path):
    model = network()
    optimiser = OrthoGrad(build(model.parameters()))
    train(model, optimiser, 3)
    torch.save((model.state_dict(), optimiser.state_dict()), tmp_path / "checkpoint")
    expected = train(model, optimiser, 3)

    other = network(1)
    again = OrthoGrad(build(other.parameters()))
    model_state, optimiser_state = torch.load(tmp_path / "checkpoint", weights_only=True)
    other.load_state_dict(model_state)
    again.load_state_dict(optimiser_state)
    torch.testing.assert_close(train(other, again, 3), expected, rtol=0, atol=0)
    build(network().parameters()).load_state_dict(optimiser_state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_independent(duplicate):
    model = network()
    optimiser = OrthoGrad(torch.optim.AdamW(model.parameters(), lr=0.02), rescale=False)
    train(model, optimiser, 2)
    other_model, other = duplicate((model, optimiser))
    assert other.rescale is False
    assert other.param_groups is other.optimizer.param_groups
    expected = train(model, optimiser, 2)
    torch.testing.assert_close(train(other_model, other, 2), expected, rtol=0, atol=0)
    train(other_model, other, 1)
    torch.testing.assert_close(list(model.parameters()), expected, rtol=0, atol=0)


def test_every_gradient_of_a_closure_is_projected():
    model = network()
    inner = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    optimiser = OrthoGrad(inner, rescale=False)
    inputs, target = batch()
    along: list[float] = []

    def closure() -> Tensor:
        if model.head.weight.grad is not None:
            along.append((model.head.weight.grad * previous).sum().item())
        previous.copy_(model.head.weight.detach())
        optimiser.zero_grad(set_to_none=False)
        loss = cross_entropy(model(inputs), target)
        loss.backward()
        return loss

    previous = torch.zeros_like(model.head.weight)
    loss = optimiser.step(closure)
    assert loss.item() == pytest.approx(cross_entropy(network()(inputs), target).item())
    assert len(along) == 3
    assert max(map(abs, along)) < 1e-6


def test_frozen_unused_tied_and_excluded_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    unused, gate = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor([0.7]))
    groups = [
        {"params": [*model.parameters(), unused]},
        {"params": [gate], "orthogonalize": False},
    ]
    optimiser = OrthoGrad(torch.optim.SGD(groups, lr=0.1))
    before, frozen = model[0].weight.detach().clone(), model[2].bias.detach().clone()
    inputs, target = batch()
    cross_entropy(gate * model(inputs), target).backward()
    gradient, gate_gradient = model[0].weight.grad.clone(), gate.grad.clone()
    optimiser.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1 * orthogonal_component(gradient, before))
    torch.testing.assert_close(gate.detach(), 0.7 - 0.1 * gate_gradient)
    assert gate_gradient != 0
    assert torch.equal(unused, torch.ones(3))
    assert torch.equal(model[2].bias, frozen)


def test_hooks_fire_once():
    model = network()
    optimiser = OrthoGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    calls = []
    optimiser.register_step_post_hook(lambda *arguments: calls.append(arguments[0]))
    train(model, optimiser, 2)
    assert calls == [optimiser, optimiser]


def test_step_compiles():
    compiled_model, model = network(), network()
    compiled, optimiser = (OrthoGrad(torch.optim.AdamW(m.parameters(), lr=0.01)) for m in (compiled_model, model))
    inputs, target = batch()
    step = torch.compile(compiled.step, backend="aot_eager")  # torch's own steps break the graph, so not as one
    for _ in range(3):
        compiled.zero_grad()
        cross_entropy(compiled_model(inputs), target).backward()
        step()
    torch.testing.assert_close(list(compiled_model.parameters()), train(model, optimiser, 3))


def test_learns_without_scaling_the_logits_up():
    inputs, target = torch.eye(6), torch.arange(6)
    sizes = []
    for wrap in (OrthoGrad, lambda optimiser: optimiser):
        torch.manual_seed(0)
        model = MLP(6, 6, (32,), bias=False)
        optimiser = wrap(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0))
        for _ in range(200):
            optimiser.zero_grad()
            cross_entropy(model(inputs), target).backward()
            optimiser.step()
        assert (model(inputs).argmax(-1) == target).all()
        sizes.append(model(inputs).abs().max().item())
    assert sizes[0] < 0.5 * sizes[1]


def test_bad_input():
    with pytest.raises(ValueError, match="got list"):
        OrthoGrad([torch.zeros(2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(3,\), its gradient \(2,\)"):
        orthogonal_component(torch.zeros(2), torch.zeros(3))
