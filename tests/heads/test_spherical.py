import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from postern.heads import (
    Head,
    SphericalHead,
    SphericalLoss,
    SphericalSoftmaxHead,
    SphericalSoftmaxLoss,
    SquaredErrorLoss,
    TaylorSoftmaxHead,
    TaylorSoftmaxLoss,
    ZLoss,
    ZLossHead,
    log_taylor_softmax,
    z_loss,
)
from tests.modules import check_module

LOSSES = [ZLoss(0.7, 2.0), TaylorSoftmaxLoss(), SphericalSoftmaxLoss(0.1), SquaredErrorLoss()]
HEADS = [
    lambda: ZLossHead(6, 9, a=0.7, b=2.0),
    lambda: TaylorSoftmaxHead(6, 9),
    lambda: SphericalSoftmaxHead(6, 9, epsilon=0.1),
    lambda: SphericalHead(6, 9, SquaredErrorLoss(), bias=False),
]
by_name = {"ids": lambda value: type(value).__name__}


def rows(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return scores, torch.randint(shape[-1], shape[:-1], generator=generator)


@pytest.mark.parametrize("build", HEADS)
def test_heads_are_modules_like_others(build):
    hidden, target = torch.randn(2, 3, 6), torch.randint(9, (2, 3))
    check_module(build, hidden)
    check_module(build, hidden, target, call=lambda head, *inputs: head.loss(*inputs))
    assert isinstance(build(), Head)


@pytest.mark.parametrize("criterion", LOSSES, **by_name)
def test_statistics_say_all_that_the_loss_sees(criterion):
    scores, target = rows(4, 5, 9)
    picked = scores.gather(-1, target[..., None])[..., 0]
    expected = criterion.from_statistics(scores.sum(-1), scores.square().sum(-1), picked, 9)
    torch.testing.assert_close(criterion.losses(scores, target), expected)
    for reduction, reduced in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        criterion.reduction = reduction
        torch.testing.assert_close(criterion(scores, target), reduced)


@pytest.mark.parametrize("criterion", LOSSES, **by_name)
def test_gradients_are_those_of_finite_differences(criterion):
    scores, target = rows(3, 7)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: criterion.losses(s, target), scores)
    assert torch.autograd.gradgradcheck(lambda s: criterion.losses(s, target), scores)


@pytest.mark.parametrize("build", HEADS)
def test_a_heads_loss_is_that_of_its_scores_whatever_the_reduction(build):
    head = build().double()
    hidden, target = torch.randn(5, 6, dtype=torch.float64), torch.randint(9, (5,))
    head.criterion.reduction = "sum"
    torch.testing.assert_close(head.loss(hidden, target), head.criterion.losses(head.linear(hidden), target).mean())


# -- the Z-loss ------------------------------------------------------------------------------------------------------


def test_z_loss_is_the_closed_form():
    scores, target = rows(8, 11)
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    z_target = z[torch.arange(8), target]
    for a, b in ((1.0, 0.0), (0.3, 2.0), (5.0, -1.0)):
        expected = torch.log1p(torch.exp(a * (b - z_target))) / a
        torch.testing.assert_close(z_loss(scores, target, a, b, reduction="none"), expected)


def test_z_loss_has_the_papers_gradient():
    scores, target = rows(8, 11)
    scores.requires_grad_()
    a, b = 0.8, 1.5
    (gradient,) = torch.autograd.grad(z_loss(scores, target, a, b, reduction="sum"), scores)
    mean, deviation = scores.mean(1, keepdim=True), scores.std(1, correction=0, keepdim=True)
    z_target = ((scores - mean) / deviation)[torch.arange(8), target][:, None]
    one_hot = nn.functional.one_hot(target, 11)
    by_z = -torch.sigmoid(a * (b - z_target))
    expected = by_z / deviation * (one_hot - 1 / 11 - z_target * (scores - mean) / (11 * deviation))
    torch.testing.assert_close(gradient, expected.detach())
    torch.testing.assert_close(gradient.sum(1), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close((gradient * scores).sum(1), torch.zeros(8, dtype=torch.float64))


@given(
    st.lists(st.integers(-50, 50), min_size=3, max_size=12).filter(lambda row: len(set(row)) > 1),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
)
def test_z_loss_sees_neither_shift_nor_scale(row, scale, shift):
    scores = torch.tensor([row], dtype=torch.float64)
    for c in range(len(row)):
        target = torch.tensor([c])
        torch.testing.assert_close(
            z_loss(scale * scores + shift, target, 0.5, 1.0), z_loss(scores, target, 0.5, 1.0), rtol=1e-6, atol=1e-9
        )


def test_z_scores_end_at_the_root_of_the_number_of_classes():
    scores, target = torch.zeros(1, 101), torch.tensor([7])
    scores[0, 7] = 3.0
    # a is large enough for the softplus to be max(0, b - z)
    assert z_loss(scores, target, a=100.0, b=15.0).item() == pytest.approx(15 - 100**0.5, abs=1e-4)


def test_a_large_mean_costs_float32_no_digits():
    scores, target = rows(50, 1000)
    exact = z_loss(scores, target, 1.0, 3.0)
    # quarters next to 4096 are exact in float32, their squares are not
    shifted = (scores * 4).round().div(4).float() + 4096
    near = z_loss(shifted, target, 1.0, 3.0)
    assert abs(near.item() - z_loss((scores * 4).round().div(4), target, 1.0, 3.0).item()) < 1e-5
    assert exact.item() == pytest.approx(near.item(), rel=0.05)


def test_equal_scores_have_a_finite_gradient():
    scores = torch.ones(2, 5, requires_grad=True)
    loss = z_loss(scores, torch.tensor([0, 3]), 1.0, 2.0)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(2.0)).item())
    assert torch.isfinite(gradient).all()


def test_half_precision_scores_are_computed_with_in_float32():
    scores, target = rows(4, 300)
    half = scores.to(torch.bfloat16)
    for criterion in LOSSES:
        low = criterion.losses(half, target)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, criterion.losses(half.double(), target).float())


# -- the others ------------------------------------------------------------------------------------------------------


def test_taylor_softmax_is_the_closed_form_and_sums_to_one():
    scores, target = rows(6, 5)
    terms = 1 + scores + scores**2 / 2
    torch.testing.assert_close(log_taylor_softmax(scores, 0).exp(), terms / terms.sum(0))
    log_probabilities = log_taylor_softmax(scores)
    torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(TaylorSoftmaxLoss()(scores, target), nn.functional.nll_loss(log_probabilities, target))
    torch.testing.assert_close(torch.log_softmax(TaylorSoftmaxLoss().logits(scores), 1), log_probabilities)
    assert log_taylor_softmax(scores.bfloat16()).dtype == torch.bfloat16


def test_spherical_softmax_is_the_closed_form():
    scores, target = rows(6, 5)
    squares = scores**2 + 0.1
    expected = nn.functional.nll_loss((squares / squares.sum(1, keepdim=True)).log(), target)
    criterion = SphericalSoftmaxLoss(0.1)
    torch.testing.assert_close(criterion(scores, target), expected)
    torch.testing.assert_close(nn.functional.cross_entropy(criterion.logits(scores), target), expected)


def test_squared_error_is_torchs_sum():
    scores, target = rows(6, 5)
    one_hot = nn.functional.one_hot(target, 5).double()
    torch.testing.assert_close(SquaredErrorLoss()(scores, target), (scores - one_hot).square().sum(1).mean())


def test_a_strongly_negative_score_is_the_prediction_where_the_loss_takes_it_for_probable():
    hidden = torch.eye(2)[:1]
    for head in (TaylorSoftmaxHead(2, 3), SphericalSoftmaxHead(2, 3)):
        with torch.no_grad():
            head.linear.weight.copy_(torch.tensor([[-9.0, 0], [1.0, 0], [2.0, 0]]))
            head.linear.bias.zero_()
        assert head.logits(hidden).argmax().item() == 0
        torch.testing.assert_close(
            nn.functional.cross_entropy(head.logits(hidden), torch.tensor([0])), head.loss(hidden, torch.tensor([0]))
        )


# -- misuse ----------------------------------------------------------------------------------------------------------


class Nothing(SphericalLoss):
    pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: z_loss(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)), r"two classes.*\(2, 1\)"),
        (lambda: z_loss(torch.tensor(0.0), torch.tensor(0)), "two classes"),
        (lambda: z_loss(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long)), "int64"),
        (lambda: z_loss(torch.zeros(2, 3), torch.zeros(2)), "float32"),
        (lambda: z_loss(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), r"\(2,\), got \(3,\)"),
        (lambda: z_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), "none"),
        (lambda: ZLoss(a=0), "a=0"),
        (lambda: ZLoss(b=float("nan")), "b=nan"),
        (lambda: ZLoss(epsilon=0), "epsilon.*0"),
        (lambda: ZLoss(reduction="max"), "max"),
        (lambda: SphericalSoftmaxLoss(0), "epsilon.*0"),
        (lambda: log_taylor_softmax(torch.zeros(3, dtype=torch.long)), "int64"),
        (lambda: TaylorSoftmaxHead(3, 1), "1"),
        (lambda: TaylorSoftmaxHead(3, 4).loss(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)), "3 features"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_class_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="out of bounds"):
        z_loss(torch.rand(2, 3), torch.tensor([0, -100]))


def test_a_loss_without_its_function_is_none():
    with pytest.raises(NotImplementedError):
        Nothing()(torch.rand(2, 3), torch.tensor([0, 1]))
