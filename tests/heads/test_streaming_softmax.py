import pytest
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode

from postern.heads import (
    decoupled_softmax_loss,
    multilabel_softmax_loss,
    streaming_decoupled_softmax_loss,
    streaming_multilabel_softmax_loss,
)

WAYS = [
    (streaming_decoupled_softmax_loss, decoupled_softmax_loss),
    (streaming_multilabel_softmax_loss, multilabel_softmax_loss),
]


def problem(queries=5, labels=23, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, dim, generator=generator, dtype=dtype)
    l = torch.randn(labels, dim, generator=generator, dtype=dtype)
    matrix = torch.rand(queries, labels, generator=generator) < 0.2
    matrix[1] = False
    matrix[2] = True
    return q, l, matrix


def gradients(value, *leaves):
    return torch.autograd.grad(value, leaves)


@pytest.mark.parametrize(("streaming", "dense"), WAYS)
@pytest.mark.parametrize("block", [1, 7, 23, 100])
def test_value_and_gradient_are_those_of_the_dense_loss(streaming, dense, block):
    q, l, matrix = problem()
    q.requires_grad_(), l.requires_grad_()
    rows, columns = matrix.nonzero(as_tuple=True)
    weights = torch.rand(len(rows), dtype=torch.float64)
    for reduction in ("mean", "sum"):
        found = streaming(q, l, (rows, columns), tau=0.3, weights=weights, reduction=reduction, block=block)
        expected = dense(q @ l.T / 0.3, (rows, columns), weights=weights, reduction=reduction)
        torch.testing.assert_close(found, expected)
        for a, b in zip(gradients(found, q, l), gradients(expected, q, l), strict=True):
            torch.testing.assert_close(a, b)
    found = streaming(q, l, sparse.csr_matrix(matrix.numpy()), tau=0.3, reduction="none", block=block)
    torch.testing.assert_close(found, dense(q @ l.T / 0.3, matrix, reduction="none"))


@pytest.mark.parametrize(("streaming", "dense"), WAYS)
def test_excluded_pairs_are_neither(streaming, dense):
    q, l, matrix = problem()
    q.requires_grad_(), l.requires_grad_()
    excluded = (torch.rand(5, 23, generator=torch.Generator().manual_seed(1)) < 0.3) & ~matrix
    found = streaming(q, l, matrix.nonzero(as_tuple=True), excluded=excluded.nonzero(as_tuple=True), block=6)
    expected = dense((q @ l.T).masked_fill(excluded, -torch.inf), matrix)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, q, l), gradients(expected, q, l), strict=True):
        torch.testing.assert_close(a, b)


def test_a_query_whose_labels_are_all_positive_has_no_loss_and_no_gradient():
    q, l = torch.randn(1, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = streaming_decoupled_softmax_loss(q, l, (torch.zeros(4, dtype=torch.long), torch.arange(4)), block=3)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(loss, q, l))


def test_far_scores_do_not_overflow():
    q, l = 100 * torch.ones(1, 2), 100 * torch.tensor([[1.0, 1.0], [1.0, 0.999], [-1.0, 0.0]])
    target = torch.tensor([0]), torch.tensor([0])
    torch.testing.assert_close(
        streaming_decoupled_softmax_loss(q, l, target, block=1), decoupled_softmax_loss(q @ l.T, target)
    )


def test_half_precision_embeddings_are_computed_in_float32():
    q, l, matrix = problem(dtype=torch.float32)
    q, l = q.bfloat16().requires_grad_(), l.bfloat16().requires_grad_()
    pairs = matrix.nonzero(as_tuple=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = streaming_decoupled_softmax_loss(q, l, pairs, block=8)
    torch.testing.assert_close(loss, decoupled_softmax_loss(q.float() @ l.float().T, pairs))
    assert [g.dtype for g in gradients(loss, q, l)] == [torch.bfloat16, torch.bfloat16]


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return result


def test_nothing_of_the_size_of_all_scores_is_made():
    q = torch.randn(64, 2, requires_grad=True)
    l = torch.randn(10_000, 2, requires_grad=True)
    pairs = torch.arange(64), torch.randint(10_000, (64,))
    with _Largest() as mode:
        streaming_decoupled_softmax_loss(q, l, pairs, block=100).backward()
    assert mode.most <= 20_000  # the labels' embeddings; all scores are 640 000
    with _Largest() as dense:
        decoupled_softmax_loss(q @ l.T, pairs).backward()
    assert dense.most == 640_000


def test_it_compiles():
    q, l, matrix = problem(dtype=torch.float32)
    pairs = matrix.nonzero(as_tuple=True)
    q.requires_grad_(), l.requires_grad_()

    def loss(q, l, rows, columns):
        return streaming_decoupled_softmax_loss(q, l, (rows, columns), block=10)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, l, *pairs), loss(q, l, *pairs))
    for a, b in zip(gradients(compiled(q, l, *pairs), q, l), gradients(loss(q, l, *pairs), q, l), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments_are_refused():
    q, l, matrix = problem()
    pairs = matrix.nonzero(as_tuple=True)
    with pytest.raises(ValueError, match=r"\[queries, dim\] and \[labels, dim\].*got \[5, 4\] and \[23, 3\]"):
        streaming_decoupled_softmax_loss(q, l[:, :3], pairs)
    with pytest.raises(ValueError, match=r"at least one label, got \[5, 4\] and \[0, 4\]"):
        streaming_decoupled_softmax_loss(q, l[:0], pairs)
    with pytest.raises(ValueError, match="tau and block must be positive, got 0 and 8"):
        streaming_decoupled_softmax_loss(q, l, pairs, tau=0, block=8)
    with pytest.raises(ValueError, match=r"a sparse matrix, got a tensor \[5, 23\]"):
        streaming_decoupled_softmax_loss(q, l, matrix)
    with pytest.raises(ValueError, match="got 'avg'"):
        streaming_decoupled_softmax_loss(q, l, pairs, reduction="avg")
