import copy
import math

import pytest
import torch
from torch import nn

from postern.adaptive import (
    DynamicConvBlock,
    convert_to_dynamic,
    count_macs,
    estimate_flops_reduction,
    heatmap_mass_mask,
    largest_filters,
    measure_flops_reduction,
    slim_conv_net,
)
from postern.nets import ConvNet, ResNet
from tests.modules import check_module


class Mobile(nn.Module):
    """Depth-wise and point-wise convolutions with a linear bottleneck, a pooling, and a residual sum."""

    def __init__(self):
        super().__init__()

        def part(before, after, kernel, act, **options):
            conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False, **options)
            return [conv, nn.BatchNorm2d(after), *([nn.ReLU6()] if act else [])]

        self.stem = nn.Sequential(*part(3, 8, 3, True), nn.MaxPool2d(2))
        self.bottleneck = nn.Sequential(*part(8, 8, 1, True), *part(8, 8, 3, True, groups=8), *part(8, 8, 1, False))
        self.last = nn.Sequential(*part(8, 12, 1, True))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.bottleneck(x)
        return self.head(self.last(x).mean((2, 3)))


def trained_looking(network):
    """With statistics and weights as if something had been learnt."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def build(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "conv":
        return trained_looking(ConvNet(3, 5, widths=(6, 8, 8)))
    if kind == "resnet":
        return trained_looking(ResNet((1, 2), num_classes=5, width=6))
    return trained_looking(Mobile())


def dynamic(kind, seed=0, **options):
    """Converted, with predictors that tell inputs apart."""
    model = convert_to_dynamic(build(kind), 0.8, has_softmax=False, **options)
    torch.manual_seed(seed)
    for predictor in model.predictors:
        nn.init.normal_(predictor.linear.weight, std=2.0)
    return model.eval()


IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(3))
CASES = [("conv", {}), ("mobile", {})] + [("resnet", {"residual": each}) for each in ("branch", "sum", "dense")]


@pytest.mark.parametrize(("kind", "options"), CASES)
@torch.no_grad()
def test_unpruned_is_the_network_itself(kind, options):
    model = dynamic(kind, **options).set_execution("unpruned")
    torch.testing.assert_close(model(IMAGES), build(kind)(IMAGES))


@pytest.mark.parametrize(("kind", "options"), CASES)
@torch.no_grad()
def test_gathered_is_masked(kind, options):
    model = dynamic(kind, **options)
    expected = model(IMAGES)
    assert not torch.allclose(expected, build(kind)(IMAGES), atol=1e-3)
    model.set_execution("gathered")
    torch.testing.assert_close(model(IMAGES), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([model(each) for each in IMAGES.split(1)]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "options"), CASES)
@torch.no_grad()
def test_what_is_counted_is_what_runs(kind, options):
    """All convolutions and predictors, as executed; linear layers are the same in both."""
    model = dynamic(kind, **options)
    dense = count_macs(lambda: build(kind)(IMAGES))
    head = count_macs(lambda: model.graph.head(torch.zeros(10, model.graph.head.in_features)))
    saved = measure_flops_reduction(model, IMAGES.split(4), counts_predictors=True)
    model.set_execution("gathered")
    executed = count_macs(lambda: model(IMAGES))
    assert 0.1 < saved < 0.95
    assert (executed - head) / (dense - head) == pytest.approx(1 - saved, rel=1e-6)


def test_what_is_converted():
    assert len(dynamic("conv").blocks) == 3
    assert len(dynamic("conv", include_first=False).blocks) == 2
    assert len(dynamic("mobile").blocks) == 5
    assert [block.is_depthwise for block in dynamic("mobile").blocks] == [False, False, True, False, False]
    # stem, and two in each of three blocks; the shortcut's convolution stays
    assert len(dynamic("resnet").blocks) == 7
    assert len(dynamic("resnet", residual="dense").blocks) == 4
    left = [
        module
        for module in dynamic("resnet").graph.modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    ]
    assert sorted(each.kernel_size for each in left) == [(1, 1), (3, 3)]


@torch.no_grad()
def test_behind_a_sum_all_channels_are_on():
    seen = {}

    def watch(name):
        return lambda module, inputs, output: seen.__setitem__(name, inputs)

    for residual in ("branch", "sum"):
        model = dynamic("resnet", residual=residual)
        for index, block in enumerate(model.blocks):
            block.register_forward_hook(watch(index))
        model.with_reports(IMAGES)
        # the stem's mask reaches the first block's first convolution, and that one's the second
        assert seen[1][1] is not None
        assert seen[2][1] is not None
        assert (seen[3][1] is None) == (residual == "branch")
        for inputs in seen.values():
            if inputs[1] is not None:
                assert not inputs[0][~inputs[1]].any()  # what is off is zero


def test_the_original_is_left_alone():
    network = build("conv")
    state = copy.deepcopy(network.state_dict())
    model = convert_to_dynamic(network, 0.8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert not any(isinstance(module, DynamicConvBlock) for module in network.modules())


def test_parameters_are_divided():
    model = dynamic("conv")
    ids = [id(each) for each in [*model.backbone_parameters(), *model.predictors.parameters()]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


def test_module():
    check_module(lambda: dynamic("resnet"), IMAGES[:4], tolerance=math.inf)


@torch.no_grad()
def test_estimate_by_hand():
    network, model = build("conv"), dynamic("conv")
    found = estimate_flops_reduction(model, IMAGES.split(4), (0.5, 0.9))
    for keep, reduction in found.items():
        spent = dense = 0.0
        hidden, active = IMAGES, torch.full((10,), 3.0)
        for stage, pixels in zip(network.stages, (64, 16, 4), strict=True):
            before = hidden.shape[1]
            hidden = stage(hidden)
            kept = heatmap_mass_mask(hidden, keep).sum(1).float()
            spent += (kept * active).sum().item() * 9 * pixels
            dense += 10 * hidden.shape[1] * before * 9 * pixels
            active = kept
        assert reduction == pytest.approx(1 - spent / dense)
    assert all((block.execute, block.keep) == ("masked", 0.8) for block in model.blocks)
    assert found[0.5] > found[0.9] > 0


def test_reports_need_masks():
    with pytest.raises(ValueError, match="gathered execution makes no reports"), torch.no_grad():
        dynamic("conv").set_execution("gathered").with_reports(IMAGES)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'after'"):
        convert_to_dynamic(build("conv"), 0.5, residual="after")
    with pytest.raises(ValueError, match=r"got 1\.5"):
        convert_to_dynamic(build("conv"), 1.5)
    model = dynamic("conv")
    with pytest.raises(ValueError, match="got nan"):
        model.set_keep(math.nan)
    assert [block.keep for block in model.blocks] == [0.8] * 3
    with pytest.raises(ValueError, match="no convolution"):
        convert_to_dynamic(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="got none"):
        measure_flops_reduction(dynamic("conv"), [])


# -- static pruning -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keeping_all_filters_changes_nothing():
    network = build("conv")
    torch.testing.assert_close(slim_conv_net(network, (6, 8, 8))(IMAGES), network(IMAGES))


@torch.no_grad()
def test_slim_is_the_network_with_filters_silenced():
    network = build("conv")
    slim = slim_conv_net(network, (4, 5, 3))
    silenced = copy.deepcopy(network)
    for stage, width in zip(silenced.stages, (4, 5, 3), strict=True):
        off = torch.ones(stage[0].out_channels, dtype=torch.bool)
        off[largest_filters(stage[0].weight, width)] = False
        stage.register_forward_hook(lambda _, __, output, off=off: output.masked_fill(off[:, None, None], 0))
    torch.testing.assert_close(slim(IMAGES), silenced(IMAGES), atol=1e-5, rtol=1e-4)
    assert [stage[0].out_channels for stage in slim.stages] == [4, 5, 3]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_torch_pruning_makes_the_same_network(seed):
    tp = pytest.importorskip("torch_pruning")
    network, kept = build("conv", seed), (4, 5, 3)

    def pruned(importance):
        other = copy.deepcopy(network)
        shares = {stage[0]: 1 - width / stage[0].out_channels for stage, width in zip(other.stages, kept, strict=True)}
        pruner = tp.pruner.BasePruner(other, IMAGES, importance, pruning_ratio_dict=shares, ignored_layers=[other.head])
        pruner.step()
        return other.state_dict()

    ours = slim_conv_net(network, kept).state_dict()
    by_l1_norm = tp.importance.GroupMagnitudeImportance(p=1, normalizer=None, group_reduction="first")
    torch.testing.assert_close(pruned(by_l1_norm), dict(ours), atol=0, rtol=0)
    default = pruned(tp.importance.GroupMagnitudeImportance())
    assert any(not torch.equal(default[name], value) for name, value in ours.items())


def test_largest_filters():
    weight = torch.tensor([1.0, -5.0, 3.0])[:, None, None, None]
    assert largest_filters(weight, 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="got 4"):
        largest_filters(weight, 4)
    with pytest.raises(ValueError, match="3 stages"):
        slim_conv_net(build("conv"), (4, 4))
