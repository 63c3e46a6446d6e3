import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from postern.heads import (
    DecoupledSoftmaxLoss,
    MultiLabelSoftmaxLoss,
    OneVersusAllLoss,
    decoupled_softmax_loss,
    multilabel_softmax_loss,
    ova_bce_loss,
)
from tests.modules import check_module

LOSSES = (decoupled_softmax_loss, multilabel_softmax_loss, ova_bce_loss)
MATRIX = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def scores(seed=0, scale=3.0):
    return scale * torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def forms(matrix):
    """The same targets in every form that is accepted."""
    rows, columns = matrix.nonzero(as_tuple=True)
    return {
        "bool": matrix.bool(),
        "int": matrix,
        "float": matrix.double(),
        "pairs": (rows, columns),
        "pairs, int32": (rows.int(), columns.int()),
        "coo": matrix.to_sparse_coo(),
        "csr": matrix.double().to_sparse_csr(),
        "scipy csr": sparse.csr_matrix(matrix.numpy()),
        "scipy coo": sparse.coo_array(matrix.numpy()),
    }


def by_definition(loss, s, matrix):
    """Sums over positives one at a time, in the form of the paper's equations."""
    losses = []
    for row, targets in zip(s.exp(), matrix.bool(), strict=True):
        positives = targets.nonzero()[:, 0].tolist()
        if loss is ova_bce_loss:
            p = row / (1 + row)
            losses.append(-torch.where(targets, p, 1 - p).log().mean())
        elif not positives:
            losses.append(row.new_zeros(()))
        else:
            negatives = row[~targets].sum()
            denominators = [row.sum() if loss is multilabel_softmax_loss else row[j] + negatives for j in positives]
            losses.append(
                -torch.stack([(row[j] / d).log() for j, d in zip(positives, denominators, strict=True)]).mean()
            )
    return torch.stack(losses)


@pytest.mark.parametrize("build", [DecoupledSoftmaxLoss, MultiLabelSoftmaxLoss, OneVersusAllLoss])
@pytest.mark.parametrize("form", ["bool", "pairs"])
def test_module(build, form):
    check_module(build, scores().float(), forms(MATRIX)[form])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", forms(MATRIX))
def test_loss_is_its_definition_whatever_the_form_of_the_targets(loss, form):
    targets, expected = forms(MATRIX)[form], by_definition(loss, scores(), MATRIX)
    torch.testing.assert_close(loss(scores(), targets, reduction="none"), expected)
    torch.testing.assert_close(loss(scores(), targets, reduction="sum"), expected.sum())
    count = 4 if loss is ova_bce_loss else 3  # the query without positives does not count
    torch.testing.assert_close(loss(scores(), targets), expected.sum() / count)


def test_one_positive_is_cross_entropy():
    s, target = torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
    expected = torch.nn.functional.cross_entropy(s, target)
    for loss in (decoupled_softmax_loss, multilabel_softmax_loss):
        torch.testing.assert_close(loss(s, (torch.arange(6), target)), expected)


def test_bce_is_torchs():
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores(), MATRIX.double())
    torch.testing.assert_close(ova_bce_loss(scores(), MATRIX), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["bool", "pairs"])
def test_gradcheck(loss, form):
    targets = forms(MATRIX)[form]
    assert torch.autograd.gradcheck(lambda s: loss(s, targets), scores().requires_grad_())


@given(st.integers(0, 10**6), st.floats(0.1, 6))
def test_an_easy_positive_is_pushed_down_by_the_coupled_softmax_only(seed, scale):
    s = scores(seed, scale).requires_grad_()
    positives = MATRIX[0].bool()
    (coupled,) = torch.autograd.grad(multilabel_softmax_loss(s[:1], MATRIX[:1]), s)
    (decoupled,) = torch.autograd.grad(decoupled_softmax_loss(s[:1], MATRIX[:1]), s)
    probability = s[0].detach().softmax(0)
    torch.testing.assert_close(coupled[0], probability - positives / 2)
    assert (decoupled[0, positives] < 0).all()
    assert (decoupled[0, ~positives] > 0).all()


def test_gradient_of_decoupled_softmax_is_the_closed_form():
    s = scores().requires_grad_()
    (gradient,) = torch.autograd.grad(decoupled_softmax_loss(s[:1], MATRIX[:1]), s)
    d = torch.logsumexp(s[0, [1, 3, 4]], 0).detach()
    pull = torch.sigmoid(d - s[0, [0, 2]]).detach() / 2
    torch.testing.assert_close(gradient[0, [0, 2]], -pull)
    torch.testing.assert_close(gradient[0, [1, 3, 4]], pull.sum() * s[0, [1, 3, 4]].detach().softmax(0))


@pytest.mark.parametrize("loss", [decoupled_softmax_loss, multilabel_softmax_loss])
def test_weights_multiply_the_terms(loss):
    weights, s, pairs = torch.rand(4, 5, dtype=torch.float64), scores(), MATRIX.nonzero(as_tuple=True)
    negatives = s.masked_fill(MATRIX.bool(), -torch.inf).logsumexp(1, keepdim=True)
    denominator = torch.logaddexp(s, negatives) if loss is decoupled_softmax_loss else s.logsumexp(1, keepdim=True)
    expected = (weights * MATRIX * (denominator - s)).sum(1) / MATRIX.sum(1).clamp_min(1)
    for targets, given_weights in ((MATRIX, weights), (pairs, weights[pairs])):
        torch.testing.assert_close(loss(s, targets, weights=given_weights, reduction="none"), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["bool", "pairs"])
def test_a_score_of_minus_infinity_leaves_a_label_out(loss, form):
    s = torch.cat([scores(), torch.full((4, 2), -torch.inf, dtype=torch.float64)], dim=1).requires_grad_()
    matrix = torch.cat([MATRIX, torch.zeros(4, 2, dtype=torch.int64)], dim=1)
    found = loss(s, forms(matrix)[form], reduction="sum")
    expected = loss(scores(), MATRIX, reduction="sum")
    torch.testing.assert_close(found, expected * 5 / 7 if loss is ova_bce_loss else expected)
    (gradient,) = torch.autograd.grad(found, s)
    assert gradient.isfinite().all()
    assert (gradient[:, 5:] == 0).all()


@pytest.mark.parametrize("form", ["bool", "pairs"])
def test_decoupled_softmax_survives_far_scores(form):
    """Positives that dominate by 1e4, or lie 1e4 below: exp overflows, and a difference of logsumexps cancels."""
    s = torch.tensor([[1e4, 0.0, 1e4, -3.0], [-1e4, 0.0, 0.0, 0.0]], requires_grad=True)
    matrix = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    losses = decoupled_softmax_loss(s, forms(matrix)[form], reduction="none")
    torch.testing.assert_close(losses, torch.tensor([0.0, 1e4 + np.log(3)], dtype=torch.float32))
    (gradient,) = torch.autograd.grad(losses.sum(), s)
    torch.testing.assert_close(gradient[1], torch.tensor([-1, 1 / 3, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_scores_are_computed_in_float32(loss):
    s = scores().to(torch.bfloat16)
    found = loss(s, MATRIX)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(s.double(), MATRIX).float())


def test_no_positives_anywhere_is_no_loss():
    s = scores().requires_grad_()
    nothing = torch.empty(0, dtype=torch.long)
    for targets in (torch.zeros(4, 5), (nothing, nothing)):
        loss = decoupled_softmax_loss(s, targets)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, s)[0] == 0).all()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, 6), r"scores \[4, 5\] need targets of that shape.*got \[4, 6\]"),
        ((torch.tensor([0, 4]), torch.tensor([0, 0])), r"rows of the pairs lie in 0\.\.3, got 0\.\.4"),
        ((torch.tensor([0, 1]), torch.tensor([-1, 0])), r"columns of the pairs lie in 0\.\.4, got -1\.\.0"),
        ((torch.tensor([0.0]), torch.tensor([1])), "two rows of integers"),
        ((torch.tensor([0, 1]), torch.tensor([1])), r"of one length, got torch.int64 \[2\] and torch.int64 \[1\]"),
        (torch.zeros(3, 5).to_sparse_csr(), r"the shape \[4, 5\], got \[3, 5\]"),
        (sparse.csr_matrix((4, 6)), r"the shape \[4, 5\], got \[4, 6\]"),
        ([0, 1], r"pairs \(rows, columns\) of tensors or a sparse matrix, got \[0, 1\]"),
    ],
)
def test_wrong_targets_are_refused(targets, message):
    for loss in LOSSES:
        with pytest.raises(ValueError, match=message):
            loss(scores(), targets)


def test_wrong_scores_reductions_and_weights_are_refused():
    with pytest.raises(ValueError, match=r"scores are floats \[queries, labels\], got torch.float32 \[3\]"):
        decoupled_softmax_loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        decoupled_softmax_loss(MATRIX, MATRIX)
    with pytest.raises(ValueError, match="reduction must be mean, sum or none, got 'avg'"):
        decoupled_softmax_loss(scores(), MATRIX, reduction="avg")
    for build in (DecoupledSoftmaxLoss, MultiLabelSoftmaxLoss, OneVersusAllLoss):
        with pytest.raises(ValueError, match="got 'avg'"):
            build("avg")
    with pytest.raises(ValueError, match=r"weights are one a target, \[4, 5\], got \[4\]"):
        decoupled_softmax_loss(scores(), MATRIX, weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"weights are one a target, \[8\], got \[4, 5\]"):
        decoupled_softmax_loss(scores(), MATRIX.nonzero(as_tuple=True), weights=torch.ones(4, 5))
