import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern import _native
from postern.adaptive import DynamicConvBlock, MaskPredictor, count_macs, heatmap_mass_mask
from tests.modules import check_module

KINDS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "dilated": {"kernel_size": (3, 1), "dilation": (2, 1), "padding": (2, 0)},
    "pointwise": {"kernel_size": 1},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
}


@pytest.fixture(params=["torch", *(name for name in _native.instruction_sets() if name != "portable")])
def instructions(request):
    """Gathers filters through PyTorch alone, or with the compiled kernel, if it has those instructions."""
    if not _native.instruction_sets():
        yield request.param
    else:
        with _native.using("portable" if request.param == "torch" else request.param):
            yield request.param


def block(kind="plain", seed=0, **options):
    """A block whose predictor tells inputs apart, and whose normalisation does something."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(6, 6 if kind == "depthwise" else 5, **KINDS[kind])
    bn = nn.BatchNorm2d(conv.out_channels)
    nn.init.normal_(bn.weight, 1, 0.3)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    predictor = MaskPredictor(6, conv.out_channels, has_softmax=False)
    nn.init.normal_(predictor.linear.weight, std=2.0)
    return DynamicConvBlock(conv, bn, nn.ReLU(), predictor, 0.8, **options).eval()


def block_with(keep, rule):
    return DynamicConvBlock(nn.Conv2d(6, 5, 3), None, None, MaskPredictor(6, 5), keep, rule=rule)


def statistics_free():
    bn = nn.BatchNorm2d(5, track_running_stats=False)
    return DynamicConvBlock(nn.Conv2d(6, 5, 3), bn, None, MaskPredictor(6, 5), 0.8).eval()


def inputs(samples=12, seed=1):
    """Inputs of which some channels are off, and which."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(samples, 6, generator=generator) < 0.6
    active[3] = False
    return torch.randn(samples, 6, 7, 8, generator=generator) * active[:, :, None, None], active


# -- the predictor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_predictor_by_hand(pool):
    torch.manual_seed(0)
    predictor = MaskPredictor(3, 4, pool)
    images = torch.randn(2, 3, 5, 5)
    pooled = torch.tensor(
        [[getattr(c, "max" if pool == "max" else "mean")().item() for c in image] for image in images]
    )
    e = pooled.exp() / pooled.exp().sum(1, keepdim=True)
    torch.testing.assert_close(predictor(images), e @ predictor.linear.weight.T + predictor.linear.bias)
    assert predictor.macs == count_macs(lambda: predictor(images[:1])) == 12


def test_a_single_channel_leaves_no_choice():
    predictor = MaskPredictor(1, 4)
    found = predictor(torch.randn(9, 1, 3, 3))
    torch.testing.assert_close(found, found[:1].expand(9, -1))
    assert not torch.allclose(
        MaskPredictor(1, 4, has_softmax=False)(torch.randn(2, 1, 3, 3)).diff(dim=0), torch.zeros(4)
    )


def test_modules():
    check_module(lambda: MaskPredictor(3, 4), torch.randn(2, 3, 5, 5))
    # masks are chosen by comparison, where rounding may change the choice
    check_module(block, inputs()[0], call=lambda module, x: module(x)[:2], tolerance=math.inf)


# -- the block ------------------------------------------------------------------------------------------------------


def test_masked_output_by_hand():
    module, (x, _) = block(), inputs()
    output = F.relu(module.bn(module.conv(x)))
    mask = torch.sigmoid(module.predictor(x)) > 0.5
    assert 0.2 < mask.float().mean() < 0.8
    found, found_mask, report = module(x)
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found, output * mask[:, :, None, None])
    assert torch.equal(report.target, heatmap_mass_mask(output, 0.8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("knows_active", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@torch.no_grad()
def test_gathered_is_masked(instructions, kind, knows_active, has_residual):
    module, (x, active) = block(kind), inputs()
    active = active if knows_active else None
    residual = torch.randn_like(module.conv(x)) if has_residual else None
    expected, mask, _ = module(x, active, residual)
    module.set_execution("gathered")
    for rows in (slice(None), slice(0, 1), slice(3, 4)):
        part = [None if each is None else each[rows] for each in (active, residual)]
        found, found_mask, report = module(x[rows], *part)
        torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=1e-4)
        assert torch.equal(found_mask, mask[rows])
        assert report is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("knows_active", [True, False])
@torch.no_grad()
def test_what_is_counted_is_what_runs(instructions, kind, knows_active):
    module, (x, active) = block(kind), inputs()
    active = active if knows_active else None
    report = module(x, active)[2]
    rows, columns = module.conv(x).shape[2:]
    area = module.conv.kernel_size[0] * module.conv.kernel_size[1] * rows * columns
    for sample in range(len(x)):
        on = torch.ones(6, dtype=torch.bool) if active is None else active[sample]
        mask = report.mask[sample]
        pairs = (mask & on).sum() if kind == "depthwise" else mask.sum() * on.sum()
        assert report.macs[sample] == pairs * area
    assert report.dense_macs == count_macs(lambda: module.conv(x[:1]))
    module.set_execution("gathered")
    assert count_macs(lambda: module(x, active)) == report.macs.sum() + len(x) * module.predictor.macs


@torch.no_grad()
def test_nothing_on(instructions):
    module, (x, _) = block(), inputs()
    module.predictor.linear.weight.zero_()
    module.predictor.linear.bias.fill_(-1)
    expected = module(x)[0]
    assert not expected.any()
    assert torch.equal(module.set_execution("gathered") or module(x)[0], expected)


@torch.no_grad()
def test_unpruned_leaves_the_output_and_counts_the_targets():
    module, (x, active) = block(), inputs()
    module.set_execution("unpruned")
    found, mask, report = module(x, active)
    torch.testing.assert_close(found, F.relu(module.bn(module.conv(x))))
    assert torch.equal(mask, report.target)
    assert torch.equal(report.macs, (mask.sum(1) * active.sum(1) * 9 * 7 * 8).float())


@torch.no_grad()
def test_without_normalisation_or_activation(instructions):
    torch.manual_seed(0)
    predictor = MaskPredictor(6, 5, has_softmax=False)
    module = DynamicConvBlock(nn.Conv2d(6, 5, 3), None, None, predictor, 0.5, rule="uniform").eval()
    x, active = inputs()
    expected, mask, report = module(x, active)
    torch.testing.assert_close(expected, module.conv(x) * mask[:, :, None, None])
    assert set(report.target.sum(1).tolist()) == {3}
    module.set_execution("gathered")
    torch.testing.assert_close(module(x, active)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_gradient_of_the_predictors_loss(mode):
    module, (x, _) = block(mode=mode), inputs()
    x.requires_grad_()
    report = module(x)[2]
    F.binary_cross_entropy_with_logits(report.logits, report.target.float()).backward()
    assert module.predictor.linear.weight.grad.abs().sum() > 0
    assert module.conv.weight.grad is None  # targets carry no gradient
    assert (x.grad is None) == (mode == "decoupled")


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_the_mask_carries_no_gradient_to_the_predictor(mode):
    module, (x, _) = block(mode=mode), inputs()
    module(x)[0].sum().backward()
    assert module.predictor.linear.weight.grad is None
    assert module.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DynamicConvBlock(nn.Conv2d(4, 4, 3, groups=2), None, None, nn.Identity(), 0.5), "groups=2"),
        (lambda: DynamicConvBlock(nn.Conv2d(4, 4, 3, padding="same"), None, None, nn.Identity(), 0.5), "padding=same"),
        (lambda: block(mode="both"), "'both'"),
        (lambda: block(rule="top"), "'top'"),
        (lambda: block().set_execution("fast"), "'fast'"),
        *(
            (lambda rule=rule, keep=keep: block_with(keep, rule), f"by the {rule} rule keep is .*got {keep}: ")
            for rule, keep in (("mass", 1.5), ("mass", math.nan), ("uniform", -0.1), ("uniform", 1.1))
        ),
        (lambda: statistics_free().set_execution("gathered"), "track_running_stats=True.*set_execution"),
        (lambda: MaskPredictor(0, 1), "0 and 1"),
        (lambda: MaskPredictor(1, 1, "min"), "'min'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gathered_needs_evaluation_mode():
    module = block()
    module.set_execution("gathered")
    with pytest.raises(ValueError, match="evaluation mode"):
        module.train()(inputs()[0])
