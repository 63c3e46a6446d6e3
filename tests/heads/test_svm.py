import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_iris
from sklearn.svm import LinearSVC

from postern.heads import Head, L2SVMLoss, SVMHead, one_vs_rest_hinge, svm_predict
from tests.modules import check_module


def build() -> SVMHead:
    return SVMHead(6, 4, penalty=2.0)


def signs(target: torch.Tensor, classes: int) -> torch.Tensor:
    return 2 * torch.nn.functional.one_hot(target.long(), classes).double() - 1


def test_module():
    hidden, target = torch.randn(2, 3, 6), torch.randint(4, (2, 3))
    check_module(build, hidden)
    check_module(build, hidden, target, call=lambda head, *inputs: head.loss(*inputs))
    assert isinstance(build(), Head)


@pytest.mark.parametrize("power", [1, 2])
def test_hinge_is_the_closed_form(power):
    scores, target = torch.randn(7, 4, dtype=torch.float64), torch.randint(4, (7,))
    margins = torch.clamp(1.5 - signs(target, 4) * scores, min=0) ** power
    mean = one_vs_rest_hinge(scores, target, power=power, margin=1.5)
    torch.testing.assert_close(mean, margins.sum() / 28)
    torch.testing.assert_close(
        one_vs_rest_hinge(scores, target, power=power, margin=1.5, reduction="sum"), margins.sum()
    )


def test_gradient_is_minus_two_t_times_what_the_margin_lacks():
    scores = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4, (7,))
    (gradient,) = torch.autograd.grad(one_vs_rest_hinge(scores, target), scores)
    t = signs(target, 4)
    torch.testing.assert_close(gradient, -2 * t * (1 - t * scores.detach()).clamp_min(0) / 28)
    assert torch.autograd.gradcheck(lambda s: one_vs_rest_hinge(s, target), scores)


def test_loss_is_zero_exactly_when_every_margin_is_kept():
    target = torch.tensor([0, 2])
    kept = signs(target, 3)
    assert one_vs_rest_hinge(kept, target).item() == 0
    broken = kept.clone()
    broken[1, 1] += 0.01
    assert one_vs_rest_hinge(broken, target).item() > 0


def test_indicator_targets_equal_class_indices_and_stay_as_they_were():
    scores, target = torch.randn(5, 4), torch.randint(4, (5,))
    indicator = torch.nn.functional.one_hot(target, 4)
    before = indicator.clone()
    torch.testing.assert_close(one_vs_rest_hinge(scores, indicator), one_vs_rest_hinge(scores, target))
    torch.testing.assert_close(one_vs_rest_hinge(scores, indicator.bool()), one_vs_rest_hinge(scores, target))
    assert torch.equal(indicator, before)
    several = torch.tensor([[1, 1, 0, 0]])
    torch.testing.assert_close(one_vs_rest_hinge(torch.zeros(1, 4), several), torch.tensor(1.0))


def test_head_adds_the_regularizer_of_its_reduction():
    hidden, target = torch.randn(5, 6), torch.randint(4, (5,))
    for reduction in ("mean", "sum"):
        head = SVMHead(6, 4, penalty=3.0, reduction=reduction)
        weight = head.linear.weight
        regularizer = weight.square().mean() if reduction == "mean" else weight.square().sum() / 2
        hinge = one_vs_rest_hinge(head.logits(hidden), target, reduction=reduction)
        torch.testing.assert_close(head.loss(hidden, target), regularizer + 3 * hinge)
        torch.testing.assert_close(L2SVMLoss(3.0, reduction=reduction)(head.logits(hidden), target), 3 * hinge)


def test_optimum_is_that_of_scikit_learns_linear_svc():
    features, target = load_iris(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    penalty = 0.1
    # liblinear regularises the bias, so the constant is a feature here and the head has no bias
    features = np.hstack([features, np.ones((len(features), 1))])
    reference = LinearSVC(
        C=penalty, loss="squared_hinge", dual=False, fit_intercept=False, tol=1e-8, max_iter=10_000
    ).fit(features, target)
    x, y = torch.from_numpy(features), torch.from_numpy(target)
    head = SVMHead(5, 3, bias=False, penalty=penalty, reduction="sum").double()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = head.loss(x, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    ours = head.loss(x, y).item()
    with torch.no_grad():
        head.linear.weight.copy_(torch.from_numpy(reference.coef_))
    theirs = head.loss(x, y).item()
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert (svm_predict(head.logits(x)).numpy() == reference.predict(features)).all()


def test_a_class_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="out of bounds"):
        one_vs_rest_hinge(torch.zeros(2, 3), torch.tensor([0, 3]))


@given(st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=6))
def test_sign_rule_takes_the_first_positive_score(rows):
    scores = torch.tensor(rows, dtype=torch.float32)
    expected = []
    for row in rows:
        order = [index for index, score in enumerate(row) if score > 0]
        order += [index for index, score in enumerate(row) if score == 0]
        expected.append([*order, 0][0])
    assert svm_predict(scores, "sign_argmax").tolist() == expected
    assert torch.equal(svm_predict(scores), scores.argmax(-1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_vs_rest_hinge(torch.zeros(3), torch.zeros(3, dtype=torch.long)), r"\(3,\)"),
        (lambda: one_vs_rest_hinge(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)), r"\(2,\)"),
        (lambda: one_vs_rest_hinge(torch.zeros(3, 2), torch.zeros(3)), "float32"),
        (lambda: one_vs_rest_hinge(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)), "empty"),
        (lambda: L2SVMLoss(penalty=0), "positive, got 1.0 and 0"),
        (lambda: L2SVMLoss(power=3), "got 3"),
        (lambda: SVMHead(2, 2, reduction="none"), "none"),
        (lambda: svm_predict(torch.zeros(2, 2), "sign"), "sign"),
        (lambda: svm_predict(torch.zeros(2, 0)), "class"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
