"""What predicted masks are compared with."""

import itertools
from dataclasses import replace

import pytest
import torch

from postern.adaptive import convert_to_dynamic, count_macs
from postern.claims import Run
from postern.nets import ConvNet
from postern.papers.fire_together import (
    FULL,
    SMOKE,
    RandomPredictor,
    Serving,
    Setting,
    Study,
    balanced_accuracy,
    best_constant_mask,
    is_more_accurate_than_static_pruning,
    predictors_see_the_input,
    serving_networks,
)


@pytest.mark.parametrize("reduction", [0.2, 0.5, 0.8])
def test_static_networks_have_no_fewer_multiply_adds(reduction):
    setting = Setting(side=16, widths=(32, 64, 128, 128))
    images = torch.zeros(2, 3, 16, 16)
    study = Study(setting, Run(0, "smoke"), ConvNet(3, 10, setting.widths), *[images, torch.zeros(2)] * 2)
    widths = study.slim_widths(reduction)
    image = images[:1]
    dense = count_macs(lambda: ConvNet(3, 10, setting.widths).eval()(image)) - 10 * 128
    slim = count_macs(lambda: ConvNet(3, 10, widths).eval()(image)) - 10 * widths[-1]
    assert 1 - reduction <= slim / dense < 1 - reduction + 0.03


def test_random_masks_have_the_density():
    density = torch.tensor([0.0, 0.3, 1.0])
    torch.manual_seed(0)
    masks = RandomPredictor(density)(torch.zeros(5000, 2, 1, 1)) > 0
    torch.testing.assert_close(masks.float().mean(0), density, atol=0.02, rtol=0)
    assert len(masks.unique(dim=0)) == 2


@pytest.mark.parametrize("milestones", [(0.5, 0.75), ()])
def test_all_arms_have_one_schedule(monkeypatch, milestones):
    seen = []
    step = torch.optim.SGD.step

    def watched(self, *args, **options):
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["momentum"]))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    setting = Setting(side=8, batch=5, epochs=4, milestones=milestones, predictor_lr=0.0)
    images, labels = torch.randn(10, 3, 8, 8), torch.zeros(10, dtype=torch.int64)
    study = Study(setting, Run(0, "smoke"), ConvNet(3, 10, (4,)), *[images, labels] * 2)
    study.train(study.network, 4, setting.backbone_lr)
    fine_tuned = seen.copy()
    seen.clear()
    study.trainer(convert_to_dynamic(study.network, 0.8)).fit(images, labels)
    dynamic = [each for each in seen if each[0]]  # the predictors' own rate is 0 here
    assert dynamic == fine_tuned
    rates = [rate for rate, _ in dynamic]
    if milestones:
        assert rates == pytest.approx([0.01] * 4 + [0.001] * 2 + [0.0001] * 2)
    else:
        assert 0.009 < max(rates) <= 0.01
        assert rates[0] == pytest.approx(0.01 / 25)


def test_the_full_network_costs_what_vgg_16_does():
    blocks = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]
    layers = []
    for block in blocks:
        layers += [torch.nn.Conv2d(*channels, 3, padding=1, bias=False) for channels in itertools.pairwise(block)]
        layers.append(torch.nn.MaxPool2d(2))
    vgg = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(512, 10))
    ours = ConvNet(3, 10, FULL.widths, FULL.strides).eval()
    image = torch.zeros(1, 3, 32, 32)
    assert count_macs(lambda: ours(image)) == count_macs(lambda: vgg(image))


def test_static_and_random_networks_are_measured_at_equal_multiply_adds():
    run = Run(0, "smoke")
    torch.manual_seed(0)
    setting = replace(SMOKE, training=200, test=100, dense_epochs=1, epochs=1, pretraining_epochs=1)
    found = is_more_accurate_than_static_pruning(setting, run)
    (table,) = run.tables.values()
    assert [row["share of the mass"] for row in table] == [0.95, 0.85, 0.7]
    assert {"static_95", "narrow_85", "narrow_70"} <= found.keys()
    assert not {"narrow_95", "joint_95"} & found.keys()
    for share in (95, 85, 70):
        assert found[f"random_reduction_{share}"] == pytest.approx(found[f"reduction_{share}"], abs=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_no_constant_mask_is_better_balanced(seed):
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(7, generator=generator) ** (0.3 if seed % 2 else 2.0)  # most kept, or most dropped
    target = torch.rand(50, 7, generator=generator) < rates
    target[0, 0] = True
    masks = [torch.tensor(mask) for mask in itertools.product([False, True], repeat=7)]
    best = max(balanced_accuracy(mask.expand_as(target), target) for mask in masks)
    found = best_constant_mask(target)
    assert balanced_accuracy(found.expand_as(target), target) == pytest.approx(best, abs=1e-12)


def test_the_majority_mask_is_not_the_best_balanced_one():
    target = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [1, 1, 1]]).bool()
    assert best_constant_mask(target).tolist() == [True, False, False]  # kept at rates of 1, 3/4 and 3/4
    assert best_constant_mask(torch.ones(2, 3).bool()).all()


@pytest.mark.parametrize(("sees", "share"), [(True, 1.0), (False, 0.0)])
def test_predictors_that_see_the_input_beat_constant_masks(monkeypatch, sees, share):
    def dynamic(study, keep):
        model = convert_to_dynamic(study.network, keep)
        report = type(model).with_reports

        def reported(images):
            output, reports = report(model, images)
            masks = [each.target if sees else torch.ones_like(each.target) for each in reports]
            return output, [each._replace(mask=mask) for each, mask in zip(reports, masks, strict=True)]

        model.with_reports = reported
        return model

    monkeypatch.setattr(Study, "dynamic", dynamic)
    torch.manual_seed(0)
    run = Run(0, "smoke")
    found = predictors_see_the_input(replace(SMOKE, training=200, test=100, dense_epochs=1, keeps=(0.9,)), run)
    assert found["share_of_layers"] == share
    (table,) = run.tables.values()
    for row in table:
        assert row["accuracy gain"] == row["accuracy"] - row["majority mask's"]
        assert row["accuracy gain"] == found[f"accuracy_gain_{row['layer']}"]
        assert row["balanced"] == (1.0 if sees else 0.5)


def test_joint_training_is_shown_where_the_setting_says():
    run = Run(0, "smoke")
    torch.manual_seed(0)
    setting = replace(
        SMOKE,
        training=200,
        test=100,
        keeps=(0.85,),
        dense_epochs=1,
        epochs=1,
        pretraining_epochs=0,
        trains_jointly=True,
    )
    found = is_more_accurate_than_static_pruning(setting, run)
    (table,) = run.tables.values()
    assert table[0]["joint"] == found["joint_85"]
    assert table[0]["saved by joint training"] == found["joint_reduction_85"]
    study = Study.of(setting, run)
    assert all(block.mode == "joint" for block in study.dynamic(0.85, "joint").blocks)
    assert FULL.trains_jointly


@torch.no_grad()
def test_networks_that_are_timed():
    setting = Serving((16, 24, 24), (1, 2, 1), side=16, images=24)
    networks, images = serving_networks(setting, torch.device("cpu"), torch.Generator().manual_seed(0))
    macs = {name: count_macs(lambda network=network: network(images)) for name, network in networks.items()}
    assert macs["gathered"] / macs["dense"] == pytest.approx(0.4, abs=0.01)
    assert macs["static"] / macs["dense"] == pytest.approx(0.4, abs=0.1)
    masks = networks["gathered"].set_execution("masked").with_reports(images)[1][-1].mask
    assert len(masks.unique(dim=0)) > 12  # each image has its own
