import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from postern.heads import (
    FactoredLinear,
    FactoredSphericalHead,
    Head,
    SphericalLoss,
    SphericalSoftmaxLoss,
    SquaredErrorLoss,
    TaylorSoftmaxLoss,
    ZLoss,
)
from tests.modules import check_module

LOSSES = {
    "z": (ZLoss(1.0, 4.0), 1.0),
    "taylor": (TaylorSoftmaxLoss(), 0.5),
    "spherical": (SphericalSoftmaxLoss(0.1), 0.02),
    "squared": (SquaredErrorLoss(), 0.01),
}


class Twins:
    """A factored layer and a dense one with the same weights, and torch's SGD for the latter."""

    def __init__(self, criterion, rate, classes=60, width=12, dtype=torch.float64, bias=True, decay=0.0, **options):
        torch.manual_seed(1)
        self.dense = nn.Linear(width, classes, bias, dtype=dtype)
        self.factored = FactoredLinear(
            width, classes, bias, learning_rate=rate, weight_decay=decay, dtype=dtype, **options
        )
        self.factored.set_weight(self.dense.weight, self.dense.bias)
        self.criterion, self.classes = criterion, classes
        self.optimizer = torch.optim.SGD(self.dense.parameters(), rate, weight_decay=decay)

    def batch(self, size, few_classes=False):
        hidden = torch.randn(size, self.dense.in_features, dtype=self.dense.weight.dtype)
        return hidden, torch.randint(min(4, self.classes) if few_classes else self.classes, (size,))

    def factored_loss(self, hidden, target):
        return self.criterion.from_statistics(*self.factored.statistics(hidden, target), self.classes).mean()

    def train(self, steps, size):
        """Train both on the same batches; return the largest error of the gradients of the hidden vectors."""
        worst = 0.0
        for step in range(steps):
            hidden, target = self.batch(size, few_classes=step % 2 == 0)
            gradients = []
            for loss in (self.criterion(self.dense(hidden.requires_grad_()), target), None):
                self.optimizer.zero_grad()
                hidden.grad = None
                (self.factored_loss(hidden, target) if loss is None else loss).backward()
                gradients.append(hidden.grad)
                if loss is not None:
                    self.optimizer.step()
            worst = max(worst, ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item())
        return worst

    def errors(self):
        """Relative errors of the weights, the Gram matrix and the column sums."""
        with torch.no_grad():
            weight = self.dense.weight
            if self.dense.bias is not None:
                weight = torch.cat([weight, self.dense.bias[:, None]], 1)
            linear = self.factored.to_linear()
            found = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
            pairs = [
                (found, weight),
                (self.factored.gram, weight.T @ weight),
                (self.factored.column_sum, weight.sum(0)),
            ]
            return [((a - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.parametrize("size", [1, 4, 12, 40], ids=lambda size: f"{size} examples")
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_dense_gradient_descent(name, size):
    twins = Twins(*LOSSES[name])
    assert twins.train(60, size) < 1e-9
    assert max(twins.errors()) < 1e-11
    assert twins.factored.num_steps == 60
    moved = nn.Linear(12, 60, dtype=torch.float64)
    torch.manual_seed(1)
    moved.reset_parameters()
    assert (moved.weight - twins.dense.weight).norm() > 1e-3 * moved.weight.norm(), "nothing was learned"


@pytest.mark.parametrize("size", [3, 40])
def test_it_is_dense_gradient_descent_without_bias_and_with_weight_decay(size):
    twins = Twins(ZLoss(0.5, 3.0), 0.7, bias=False, decay=0.02)
    assert twins.train(60, size) < 1e-9
    assert max(twins.errors()) < 1e-11


def test_float32_stays_near():
    twins = Twins(ZLoss(1.0, 4.0), 1.0, dtype=torch.float32)
    assert twins.train(200, 16) < 1e-3
    assert max(twins.errors()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factors_do_not_drift_in_thousands_of_steps(dtype):
    twins = Twins(ZLoss(1.0, 4.0), 0.5, classes=40, width=8, dtype=dtype, stabilize_every=20)
    twins.train(2000, 8)
    # less than if each step's rounding, of half a unit, added to that of the steps before
    assert max(twins.errors()) < 2000 * torch.finfo(dtype).eps / 2
    values = torch.linalg.svdvals(twins.factored.mixer)
    assert values.min() > 0.1
    assert values.max() < 10


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 30), st.integers(1, 9), st.integers(1, 20), st.booleans(), st.floats(0, 0.1), st.integers(0, 10**6)
)
def test_any_size_is_exact(classes, width, size, bias, decay, seed):
    twins = Twins(TaylorSoftmaxLoss(), 0.1, classes, width, bias=bias, decay=decay)
    torch.manual_seed(seed)
    twins.train(4, size)
    assert max(twins.errors()) < 1e-10


def test_scores_are_those_of_the_dense_layer():
    twins = Twins(ZLoss(1.0, 4.0), 1.0)
    twins.train(30, 16)
    hidden = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(twins.factored(hidden), twins.dense(hidden))
    torch.testing.assert_close(twins.factored.weight(), twins.dense.weight.detach())
    scores = twins.dense(hidden)
    target = torch.randint(60, (2, 3))
    statistics = twins.factored.statistics(hidden, target)
    torch.testing.assert_close(statistics.total, scores.sum(-1))
    torch.testing.assert_close(statistics.square_total, scores.square().sum(-1))
    torch.testing.assert_close(statistics.target_score, scores.gather(-1, target[..., None])[..., 0])
    one = twins.factored.statistics(hidden[0, 0], target[0, 0])
    torch.testing.assert_close(one.square_total, statistics.square_total[0, 0])


def test_several_targets_an_example():
    torch.manual_seed(0)
    twins = Twins(SquaredErrorLoss(), 0.02)
    for _ in range(20):
        hidden = torch.randn(9, 12, dtype=torch.float64)
        target = torch.stack([torch.randperm(60)[:3] for _ in range(9)])
        wanted = torch.rand(9, 3, dtype=torch.float64)
        dense = torch.zeros(9, 60, dtype=torch.float64).scatter(1, target, wanted)
        twins.optimizer.zero_grad()
        (twins.dense(hidden) - dense).square().sum(1).mean().backward()
        twins.optimizer.step()
        found = twins.factored.statistics(hidden, target)
        assert found.target_score.shape == (9, 3)
        loss = found.square_total - 2 * (wanted * found.target_score).sum(1) + wanted.square().sum(1)
        loss.mean().backward()
    assert max(twins.errors()) < 1e-12


# -- numerical health ------------------------------------------------------------------------------------------------


def test_stabilising_moves_singular_values_and_not_the_weights():
    twins = Twins(ZLoss(1.0, 4.0), 1.0)
    layer = twins.factored
    before = layer.to_linear()
    left, _, right = torch.linalg.svd(torch.randn(13, 13, dtype=torch.float64))
    values = torch.ones(13, dtype=torch.float64)
    values[:2], values[-2:] = torch.tensor([30.0, 4.0]), torch.tensor([2.0, 0.01])
    mixer = left @ torch.diag(values) @ right
    layer.factor.copy_(layer.factor @ torch.linalg.inv(mixer))
    layer.mixer.copy_(mixer)
    layer.stabilize()
    torch.testing.assert_close(layer.to_linear().weight, before.weight)
    # 30 and 0.01 have left the range of 1/8 to 8, 4 goes with them, 2 is near enough.
    expected = torch.ones(13, dtype=torch.float64)
    expected[0] = 2
    torch.testing.assert_close(torch.linalg.svdvals(layer.mixer), expected)
    torch.testing.assert_close(layer.mixer @ layer.inverse_mixer, torch.eye(13, dtype=torch.float64))


def test_many_values_out_of_range_fold_the_factors():
    twins = Twins(ZLoss(1.0, 4.0), 1.0)
    layer = twins.factored
    twins.train(20, 16)
    before = layer.to_linear()
    layer.mixer.mul_(9)
    layer.factor.div_(9)
    layer.stabilize()
    assert torch.equal(layer.mixer, torch.eye(13, dtype=torch.float64))
    assert torch.equal(layer.inverse_mixer, torch.eye(13, dtype=torch.float64))
    torch.testing.assert_close(layer.to_linear().weight, before.weight)


@pytest.mark.parametrize("size", [1, 30])
def test_a_step_that_makes_the_mixer_singular_is_exact_nevertheless(size):
    # With the squared error and one direction of all hidden vectors, I - eta S has the eigenvalue 1 - 2 eta |h|^2.
    twins = Twins(SquaredErrorLoss(), 0.125, bias=False)
    hidden = torch.zeros(size, 12, dtype=torch.float64)
    hidden[:, 0] = 2.0
    for _ in range(3):
        target = torch.randint(60, (size,))
        twins.optimizer.zero_grad()
        twins.criterion(twins.dense(hidden), target).backward()
        twins.optimizer.step()
        twins.factored_loss(hidden, target).backward()
        assert max(twins.errors()) < 1e-13


def test_the_schedule_of_stabilisation_survives_saving():
    twins = Twins(ZLoss(1.0, 4.0), 1.0, stabilize_every=7)
    twins.train(10, 5)
    restored = FactoredLinear(12, 60, dtype=torch.float64)
    restored.load_state_dict(twins.factored.state_dict())
    assert restored.num_steps == 10


# -- how it lives beside others --------------------------------------------------------------------------------------


def build_head() -> FactoredSphericalHead:
    return FactoredSphericalHead(FactoredLinear(6, 9, learning_rate=0.1), ZLoss(0.7, 2.0))


@pytest.mark.parametrize("training", [True, False])
def test_module(training):
    hidden, target = torch.randn(2, 3, 6), torch.randint(9, (2, 3))
    check_module(lambda: build_head().train(training), hidden)
    # The loss breaks the graph of a compiler, as documented, and looks at the targets' values.
    check_module(
        lambda: build_head().train(training),
        hidden,
        target,
        call=lambda head, *inputs: head.loss(*inputs),
        compile=False,
        meta=False,
    )
    assert isinstance(build_head(), Head)
    assert not list(build_head().parameters())


def test_training_the_network_below_with_any_optimiser():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    twin = copy.deepcopy(trunk)
    head = build_head()
    dense = head.layer.to_linear()
    optimizers = [torch.optim.AdamW(trunk.parameters(), 1e-2), torch.optim.AdamW(twin.parameters(), 1e-2)]
    sgd = torch.optim.SGD(dense.parameters(), 0.1)
    for _ in range(20):
        inputs, target = torch.randn(7, 5), torch.randint(9, (7,))
        for optimizer in [*optimizers, sgd]:
            optimizer.zero_grad()
        head.loss(trunk(inputs), target).backward()
        head.criterion(dense(twin(inputs)), target).backward()
        for optimizer in [*optimizers, sgd]:
            optimizer.step()
    torch.testing.assert_close(trunk[0].weight, twin[0].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head.layer.weight(), dense.weight.detach(), rtol=1e-3, atol=1e-4)


def test_accumulated_gradients_make_one_step():
    one = Twins(ZLoss(1.0, 4.0), 1.0)
    several = Twins(ZLoss(1.0, 4.0), 1.0, steps_in_backward=False)
    for step in range(12):
        hidden, target = one.batch(15, few_classes=step % 2 == 0)
        one.factored_loss(hidden, target).backward()
        parts = list(zip(hidden.split([7, 3, 5]), target.split([7, 3, 5]), strict=True))
        # forward passes may all come before the first backward pass
        for loss in [several.factored_loss(*part) * len(part[0]) / 15 for part in parts]:
            loss.backward()
        assert several.factored.num_steps == step
        several.factored.step()
        several.factored.step()  # nothing is left to do
    torch.testing.assert_close(several.factored.weight(), one.factored.weight())
    torch.testing.assert_close(several.factored.gram, one.factored.gram)


def test_discarded_gradients_are_no_step():
    twins = Twins(ZLoss(1.0, 4.0), 1.0, steps_in_backward=False)
    before = twins.factored.weight()
    twins.factored_loss(*twins.batch(5)).backward()
    twins.factored.discard_gradients()
    twins.factored.step()
    assert torch.equal(twins.factored.weight(), before)
    assert twins.factored.num_steps == 0


def test_it_learns_in_training_mode_only():
    twins = Twins(ZLoss(1.0, 4.0), 1.0)
    state = copy.deepcopy(twins.factored.state_dict())
    hidden, target = twins.batch(5)

    def is_unchanged():
        return all(torch.equal(value, state[name]) for name, value in twins.factored.state_dict().items())

    with torch.no_grad():
        quiet = twins.factored_loss(hidden, target)
    assert not quiet.requires_grad
    with torch.inference_mode():
        twins.factored_loss(hidden, target)
    twins.factored.eval()
    loss = twins.factored_loss(hidden.requires_grad_(), target)
    loss.backward()
    torch.testing.assert_close(quiet, loss.detach())
    (expected,) = torch.autograd.grad(twins.criterion(twins.dense(hidden), target), hidden)
    torch.testing.assert_close(hidden.grad, expected)
    assert is_unchanged()
    twins.factored.train()
    twins.factored_loss(hidden.detach(), target).backward()  # nothing below wants a gradient
    assert not is_unchanged()


def test_a_second_backward_after_the_step_is_refused():
    twins = Twins(ZLoss(1.0, 4.0), 1.0)
    first, second = twins.factored_loss(*twins.batch(5)), twins.factored_loss(*twins.batch(5))
    first.backward()
    with pytest.raises(RuntimeError, match=r"has made 1 steps since this forward pass.*steps_in_backward=False"):
        second.backward()


def test_gradient_checkpointing_makes_one_step():
    plain, checkpointed = (Twins(ZLoss(1.0, 4.0), 1.0) for _ in range(2))
    hidden, target = plain.batch(5)
    plain.factored_loss(hidden.clone().requires_grad_(), target).backward()
    for use_reentrant in (False, True):
        other = copy.deepcopy(checkpointed)
        torch.utils.checkpoint.checkpoint(
            other.factored_loss, hidden.clone().requires_grad_(), target, use_reentrant=use_reentrant
        ).backward()
        assert other.factored.num_steps == 1
        torch.testing.assert_close(other.factored.weight(), plain.factored.weight())


def test_autocast_leaves_the_step_in_full_precision():
    plain, cast = (Twins(ZLoss(1.0, 4.0), 1.0, dtype=torch.float32) for _ in range(2))
    hidden, target = plain.batch(32)
    hidden = hidden.bfloat16()
    plain.factored_loss(hidden.float(), target).backward()
    with torch.autocast("cpu", torch.bfloat16):
        cast.factored_loss(hidden, target).backward()
    assert torch.equal(cast.factored.weight(), plain.factored.weight())
    assert torch.equal(cast.factored.gram, plain.factored.gram)


def test_a_compiled_training_step_is_the_eager_one():
    eager = build_head()
    compiled = copy.deepcopy(eager)
    hidden, target = torch.randn(4, 6), torch.randint(9, (4,))
    torch.compiler.reset()
    run = torch.compile(lambda h, t: compiled.loss(2 * h, t), backend="aot_eager")
    for _ in range(2):
        eager.loss(2 * hidden, target).backward()
        run(hidden, target).backward()
    torch.testing.assert_close(compiled.layer.weight(), eager.layer.weight())
    assert compiled.layer.num_steps == 2


def test_the_rate_may_change_between_steps():
    twins = Twins(ZLoss(1.0, 4.0), 1.0)
    for rate in (1.0, 0.3, 0.0, 2.0):
        twins.factored.learning_rate = twins.optimizer.param_groups[0]["lr"] = rate
        twins.train(3, 10)
    assert max(twins.errors()) < 1e-12


class Own(SphericalLoss):
    def from_statistics(self, total, square_total, target_score, num_classes):
        return square_total.sqrt() - target_score + total / num_classes


def test_a_loss_of_ones_own():
    twins = Twins(Own(), 0.05)
    assert twins.train(30, 10) < 1e-9
    assert max(twins.errors()) < 1e-12


# -- misuse ----------------------------------------------------------------------------------------------------------


def test_initial_weights_are_distributed_as_torchs():
    torch.manual_seed(0)
    layer = FactoredLinear(25, 4000)
    linear = layer.to_linear()
    for values in (linear.weight, linear.bias):
        assert values.abs().max() <= 0.2
        assert values.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)


def integers(*shape):
    return torch.zeros(*shape, dtype=torch.long)


def decayed():
    layer = FactoredLinear(3, 4, learning_rate=2.0, weight_decay=0.5)
    layer.statistics(torch.ones(2, 3), integers(2)).total.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FactoredLinear(0, 4), "got 0 and 4"),
        (lambda: FactoredLinear(3, 1), "got 3 and 1"),
        (lambda: FactoredLinear(3, 4, learning_rate=-1.0), "-1.0"),
        (lambda: FactoredLinear(3, 4, weight_decay=-1.0), "-1.0"),
        (lambda: FactoredLinear(3, 4, stabilize_every=0), "got 0"),
        (lambda: FactoredLinear(3, 4, singular_range=(2.0, 3.0)), r"\(2.0, 3.0\)"),
        (lambda: FactoredLinear(3, 4, dtype=torch.bfloat16), "bfloat16"),
        (lambda: FactoredLinear(3, 4).bfloat16().statistics(torch.ones(2, 3), integers(2)), "bfloat16"),
        (lambda: FactoredLinear(3, 4).set_weight(torch.ones(4, 3)), "None"),
        (lambda: FactoredLinear(3, 4).statistics(torch.ones(2, 5), integers(2)), "3 features"),
        (lambda: FactoredLinear(3, 4).statistics(torch.ones(2, 3), integers(3)), r"\(2,\), got \(3,\)"),
        (lambda: FactoredLinear(3, 4).statistics(torch.ones(2, 3), integers(3, 2)), r"\(2,\), got \(3,\)"),
        (lambda: FactoredLinear(3, 4).statistics(torch.ones(2, 3), torch.ones(2)), "float32"),
        (lambda: FactoredLinear(3, 4).statistics(torch.ones(0, 3), integers(0)), "none"),
        (lambda: FactoredLinear(3, 4)(torch.ones(2, 5)), "3 features"),
        (lambda: build_head().loss(torch.ones(2, 6), integers(2, 1)), r"\(2,\), got \(2, 1\)"),
        (decayed, "2.0 . 0.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("target", [4, -1])
def test_a_class_that_is_not_there_is_refused(target):
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        FactoredLinear(3, 4).statistics(torch.ones(1, 3), torch.tensor([target]))
