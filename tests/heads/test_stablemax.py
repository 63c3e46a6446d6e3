import pytest
import torch
from torch import Tensor, nn

from postern.heads import Head, StableMaxHead, StableMaxLoss, stablemax_cross_entropy
from tests.modules import check_module


def truth(logits: Tensor, target: Tensor) -> Tensor:
    """Losses by the definition, in float64, classes last."""
    z = logits.double()
    s = torch.where(z >= 0, z + 1, 1 / (1 - z))
    return (s.sum(-1) / s.gather(-1, target[..., None])[..., 0]).log()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 5 * torch.randn(8, 6, generator=generator), torch.randint(6, (8,), generator=generator)


def test_reductions(batch):
    logits, target = batch
    losses = truth(logits, target).float()
    torch.testing.assert_close(stablemax_cross_entropy(logits, target, "none"), losses)
    torch.testing.assert_close(stablemax_cross_entropy(logits, target, "sum"), losses.sum())
    torch.testing.assert_close(StableMaxLoss()(logits, target), losses.mean())
    torch.testing.assert_close(stablemax_cross_entropy(logits[0], target[0]), losses[0])


def test_classes_are_in_dimension_1_as_in_torch():
    logits, target = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    expected = truth(logits.permute(0, 2, 3, 1), target).float()
    torch.testing.assert_close(stablemax_cross_entropy(logits, target, "none"), expected)


def test_ignored_samples_do_not_count(batch):
    logits, target = batch
    ignoring = target.clone()
    ignoring[3:] = -100
    torch.testing.assert_close(
        stablemax_cross_entropy(logits, ignoring), stablemax_cross_entropy(logits[:3], target[:3])
    )


def test_float32_is_as_good_as_the_float64_of_the_papers_code():
    logits = torch.logspace(-3, 6, 40)[:, None] * torch.randn(40, 100)
    target = torch.randint(100, (40,))
    exact = truth(logits, target)
    torch.testing.assert_close(stablemax_cross_entropy(logits, target, "none").double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stablemax_cross_entropy(logits, target, "none", torch.float64), exact, rtol=1e-12, atol=1e-12
    )
    assert stablemax_cross_entropy(logits.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize("gap", [1.0, 20.0, 1e3, 1e6])
def test_the_true_class_keeps_its_gradient(gap):
    logits = (gap * nn.functional.one_hot(torch.tensor([2]), 113)).float().requires_grad_()
    stablemax_cross_entropy(logits, torch.tensor([2])).backward()
    assert logits.grad[0, 2] < 0
    assert (logits.grad[0, [0, 1, 3]] > 0).all()


def test_modules():
    hidden, target = torch.randn(2, 3, 6), torch.randint(4, (2, 3))
    check_module(lambda: StableMaxHead(6, 4), hidden)
    check_module(lambda: StableMaxHead(6, 4), hidden, target, call=lambda head, *inputs: head.loss(*inputs))
    check_module(lambda: StableMaxLoss("none"), torch.randn(5, 4), torch.randint(4, (5,)))


def test_head():
    head = StableMaxHead(6, 4, bias=False, dtype=torch.float64)
    assert isinstance(head, Head)
    hidden, target = torch.randn(2, 3, 6), torch.randint(4, (2, 3), dtype=torch.int32)
    expected = truth(hidden @ head.linear.weight.T, target.long()).mean()
    torch.testing.assert_close(head.loss(hidden, target), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(head(hidden), head.logits(hidden))


def test_bad_input(batch):
    logits, target = batch
    with pytest.raises(ValueError, match="average"):
        StableMaxLoss("average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="average"):
        stablemax_cross_entropy(logits, target, "average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"targets of shape \(8,\), got \(7,\)"):
        stablemax_cross_entropy(logits, target[1:])
    with pytest.raises(ValueError, match="float32"):
        stablemax_cross_entropy(logits, target.float())
    with pytest.raises(ValueError, match="scalar"):
        stablemax_cross_entropy(torch.tensor(1.0), target)
    with pytest.raises(ValueError, match="6 features"):
        StableMaxHead(6, 4).loss(torch.zeros(1, 5), torch.tensor([0]))
