import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit

from postern.heads import SoftTopKLoss, log_soft_topk, soft_topk, soft_topk_loss, soft_topk_shift
from tests.modules import check_module


def scores(rows=4, labels=30, scale=4.0, seed=0):
    return scale * torch.randn(rows, labels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solved(row, k, alpha):
    """The soft top-k by SciPy's root finder."""
    s = row.numpy()
    bound = abs(s).max() + 50 / alpha
    t = brentq(lambda t: expit(alpha * (s + t)).sum() - k, -bound, bound, xtol=1e-13)
    return torch.from_numpy(expit(alpha * (s + t)))


@pytest.mark.parametrize("k", [3, "num_positives"])
@pytest.mark.parametrize("as_pairs", [False, True])
def test_module(k, as_pairs):
    matrix = scores(4, 30, seed=1) > 4
    targets = matrix.nonzero(as_tuple=True) if as_pairs else matrix
    check_module(lambda: SoftTopKLoss(k), scores().float(), targets)


@given(
    st.integers(0, 10**6),
    st.integers(2, 200),
    st.floats(0.001, 30),
    st.floats(0.02, 0.98),
    st.sampled_from([0.5, 2.0, 10.0]),
)
def test_it_is_the_root_that_scipy_finds(seed, labels, scale, share, alpha):
    s = scores(2, labels, scale, seed)
    k = share * labels
    z = soft_topk(s, k, alpha)
    torch.testing.assert_close(z, torch.stack([solved(row, k, alpha) for row in s]), rtol=0, atol=1e-7)
    torch.testing.assert_close(z.sum(1), torch.full((2,), k, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("labels", [7, 1000, 200_000])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 20.0])
def test_float32_sums_to_k(labels, spread):
    s = 20 + spread * (torch.rand(3, labels, generator=torch.Generator().manual_seed(0)) - 1)
    for k in (1, 5, labels - 1):
        torch.testing.assert_close(soft_topk(s, k).sum(1), torch.full((3,), float(k)), rtol=2e-5, atol=0)


def test_gaps_between_clusters_are_crossed():
    s = torch.cat([torch.full((1, 3), 300.0), torch.zeros(1, 50), torch.full((1, 100), -1e6)], dim=1).double()
    for k in (1, 3, 3.5, 20, 53, 60):
        assert soft_topk(s, k).sum().item() == pytest.approx(k, rel=1e-9)


def test_few_passes_are_enough():
    """Of scores as models give them; 32 bisections would be needed otherwise."""
    for s in (scores(20, 2000, 1.0), scores(20, 2000, 5.0), 20 * torch.rand(20, 2000, dtype=torch.float64)):
        for k in (1, 5, 100):
            torch.testing.assert_close(soft_topk(s, k, n_iter=11), soft_topk(s, k), rtol=1e-6, atol=1e-9)


def test_rows_do_not_disturb_each_other():
    s = torch.cat([scores(1, 100, 0.01), scores(1, 100, 50.0), torch.zeros(1, 100)])
    k = torch.tensor([1.0, 7.0, 50.0])
    together = soft_topk(s, k)
    for row in range(3):
        torch.testing.assert_close(together[row], soft_topk(s[row], k[row].item()))


def test_steep_it_is_the_hard_topk():
    s = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i)) for i in range(4)]).double()
    hard = torch.zeros(4, 30, dtype=torch.float64).scatter_(1, s.topk(5).indices, 1.0)
    torch.testing.assert_close(soft_topk(s, 5, alpha=1e3), hard)


def test_a_constant_changes_nothing_and_order_is_kept():
    s = scores()
    torch.testing.assert_close(soft_topk(s + 123, 5), soft_topk(s, 5))
    order = s.argsort(dim=1)
    assert (soft_topk(s, 5).gather(1, order).diff(dim=1) >= 0).all()


def test_equal_scores_share_k():
    torch.testing.assert_close(soft_topk(torch.full((2, 8), 3.0), 2), torch.full((2, 8), 0.25))


@pytest.mark.parametrize("k", [30, 31, 1000])
def test_k_of_all_labels_or_more_takes_all(k):
    s = scores().requires_grad_()
    z = soft_topk(s, k)
    assert (z == 1).all()
    assert (torch.autograd.grad((z * torch.rand_like(z)).sum(), s)[0] == 0).all()
    assert (log_soft_topk(s, k) == 0).all()


def test_k_a_row():
    s, k = scores(), torch.tensor([1, 0, 30, 5])
    z = soft_topk(s, k)
    torch.testing.assert_close(z.sum(1), k.double())
    torch.testing.assert_close(z[3], soft_topk(s[3], 5))
    batched = soft_topk(s.view(2, 2, 30), k.view(2, 2))
    torch.testing.assert_close(batched.view(4, 30), z)


def test_labels_of_minus_infinity_are_out():
    s = torch.cat([scores(), torch.full((4, 3), -torch.inf, dtype=torch.float64)], dim=1).requires_grad_()
    z = soft_topk(s, 5)
    torch.testing.assert_close(z[:, :30], soft_topk(scores(), 5))
    assert (z[:, 30:] == 0).all()
    (gradient,) = torch.autograd.grad((z * torch.rand_like(z)).sum(), s)
    assert gradient.isfinite().all()
    assert (soft_topk(s, 30)[:, :30] == 1).all(), "30 are left"


@pytest.mark.parametrize("function", [soft_topk, log_soft_topk])
def test_gradcheck_twice(function):
    s = scores(2, 6, 1.0).requires_grad_()
    k = torch.tensor([2, 4])
    assert torch.autograd.gradcheck(lambda s: function(s, k), s)
    assert torch.autograd.gradgradcheck(lambda s: function(s, k), s)


def test_gradient_is_the_closed_form():
    s, g = scores().requires_grad_(), scores(seed=1)
    z = soft_topk(s, 5)
    (gradient,) = torch.autograd.grad((z * g).sum(), s)
    z = z.detach()
    v = 2 * z * (1 - z)
    torch.testing.assert_close(gradient, g * v - v * (g * v).sum(1, keepdim=True) / v.sum(1, keepdim=True))
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((log_soft_topk(s, 5) * g).sum(), s)
    u = 2 * (1 - z)
    torch.testing.assert_close(gradient, g * u - v * (g * u).sum(1, keepdim=True) / v.sum(1, keepdim=True))


def test_logarithm_is_exact_where_the_value_underflows():
    s = torch.tensor([[0.0, -500.0, 3.0, 1.0]])
    assert soft_topk(s, 1)[0, 1] == 0
    shift = soft_topk_shift(s, 1)
    torch.testing.assert_close(log_soft_topk(s, 1)[0, 1], 2 * (-500 + shift[0]))


def test_half_precision_is_computed_in_float32():
    s = scores().to(torch.bfloat16)
    assert soft_topk(s, 5).dtype == torch.float32
    torch.testing.assert_close(soft_topk(s, 5), soft_topk(s.float(), 5))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(soft_topk(s.float(), 5), soft_topk(s.float(), 5))


def test_loss_is_minus_the_mean_log_of_the_positives():
    s, matrix = scores(), scores(seed=1) > 4
    counts = matrix.sum(1)
    for k in (5, torch.tensor([1, 2, 3, 4]), "num_positives"):
        log_z = log_soft_topk(s, counts if isinstance(k, str) else k)
        expected = -(log_z * matrix).sum(1) / counts
        for targets in (matrix, matrix.nonzero(as_tuple=True)):
            torch.testing.assert_close(soft_topk_loss(s, targets, k, reduction="none"), expected)
            torch.testing.assert_close(soft_topk_loss(s, targets, k), expected.mean())
    weights = torch.rand_like(s)
    torch.testing.assert_close(
        soft_topk_loss(s, matrix, 5, weights=weights),
        (-(weights * log_soft_topk(s, 5) * matrix).sum(1) / counts).mean(),
    )


def test_loss_gradcheck_with_a_query_without_positives():
    s, matrix = scores(3, 8, 1.0).requires_grad_(), torch.zeros(3, 8)
    matrix[0, :3] = matrix[2, 5] = 1
    assert torch.autograd.gradcheck(lambda s: soft_topk_loss(s, matrix, "num_positives"), s)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), 0), "k must be a positive number, got 0"),
        ((torch.zeros(2, 3), float("inf")), "k must be a positive number, got inf"),
        ((torch.zeros(2, 3), 1, 0.0), r"alpha must be a positive number, got 0\.0"),
        ((torch.zeros(2, 3), 1, 2.0, 0), "n_iter must be at least 1, got 0"),
        ((torch.zeros(2, 0), 1), r"at least one label, got \[2, 0\]"),
        ((torch.tensor(1.0), 1), r"at least one label, got \[\]"),
        ((torch.zeros(2, 3), torch.ones(3)), r"one a row \[2\], got \[3\]"),
        ((torch.zeros(2, 3), torch.tensor([1.0, -1.0])), r"got -1\.0 to 1\.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_topk(*arguments)


def test_wrong_arguments_of_the_loss_are_refused():
    with pytest.raises(ValueError, match="'num_positives', got 'all'"):
        soft_topk_loss(scores(), scores() > 4, "all")
    for arguments in ((0,), ("all",), (5, -1.0), (5, 2.0, 0), (5, 2.0, 32, "avg")):
        with pytest.raises(ValueError, match="got"):
            SoftTopKLoss(*arguments)
