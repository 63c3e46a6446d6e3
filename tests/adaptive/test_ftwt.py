import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from postern.adaptive import FTWTTrainer, convert_to_dynamic, mask_loss, milestone_schedule
from postern.data import load
from postern.nets import ConvNet


def digits(samples=300):
    images = load("digits", "train").limit(samples)
    return images.scaled(), images.labels


def network():
    torch.manual_seed(0)
    model = ConvNet(1, 10, widths=(8, 12, 12))
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def trainer(mode="decoupled", keep=0.8, **options):
    model = convert_to_dynamic(network(), keep, mode=mode)
    generator = torch.Generator().manual_seed(0)
    return FTWTTrainer(model, **({"epochs": 2, "batch_size": 50, "generator": generator} | options))


def state(parameters):
    return [each.detach().clone() for each in parameters]


def is_same(before, parameters):
    return all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_loss_by_hand():
    model = convert_to_dynamic(network(), 0.8)
    _, reports = model.with_reports(digits(7)[0])
    expected = 0.0
    for report in reports:
        p = torch.sigmoid(report.logits)
        right = torch.where(report.target, p, 1 - p)
        expected += -right.log().sum().item() / 7 / len(reports)
    assert mask_loss(reports).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="got none"):
        mask_loss(())


@pytest.mark.parametrize(("mode", "is_zero"), [("decoupled", True), ("joint", False)])
def test_gradient_of_the_masks_loss_in_the_backbone(mode, is_zero):
    model = trainer(mode).model
    mask_loss(model.with_reports(digits(20)[0])[1]).backward()
    sizes = [0.0 if each.grad is None else each.grad.abs().sum().item() for each in model.backbone_parameters()]
    assert (sum(sizes) == 0) == is_zero
    assert all(each.grad is not None for each in model.predictors.parameters())


def test_pretraining_touches_the_predictors_alone():
    training, (images, _) = trainer(), digits()
    model = training.model
    backbone = state(model.backbone_parameters())
    statistics = state(block.bn.running_mean for block in model.blocks)
    before = mask_loss(model.set_execution("unpruned").with_reports(images)[1]).item()
    training.pretrain_predictors(images, epochs=5)
    assert is_same(backbone, model.backbone_parameters())
    assert is_same(statistics, (block.bn.running_mean for block in model.blocks))
    assert all(block.execute == "masked" for block in model.blocks)
    after = mask_loss(model.set_execution("unpruned").with_reports(images)[1]).item()
    assert after < 0.9 * before


def test_pretraining_to_keep_everything():
    training, (images, _) = trainer(), digits()
    training.pretrain_predictors(images, epochs=20, target="ones", learning_rate=0.1)
    assert all(report.mask.all() for report in training.model.with_reports(images)[1])


def test_training_lowers_both_losses():
    training, (images, labels) = trainer(keep=-1.0, epochs=6), digits()  # every filter is to be kept
    training.pretrain_predictors(images, epochs=5, learning_rate=0.1)
    history = training.fit(images, labels)
    assert len(history) == 6
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < history[0][1]
    assert not training.model.training


def test_in_the_cooldown_the_predictors_are_left_alone():
    images, labels = digits()
    training = trainer(cooldown=1.0)
    predictors, backbone = state(training.model.predictors.parameters()), state(training.model.backbone_parameters())
    training.fit(images, labels)
    assert is_same(predictors, training.model.predictors.parameters())
    assert not is_same(backbone, training.model.backbone_parameters())
    training = trainer(cooldown=0.0)
    training.fit(images, labels)
    assert not is_same(predictors, training.model.predictors.parameters())


def rates_in_use(optimizer):
    """A list to which every step of an optimiser adds its rate."""
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    return rates


def test_the_rate_falls_at_milestones():
    images, labels = digits(50)
    training = trainer(epochs=10, schedule=partial(milestone_schedule, milestones=(0.3, 0.7)))
    rates, of_predictors = rates_in_use(training.backbone), rates_in_use(training.predictors)
    for _ in range(2):  # each call begins anew
        training.fit(images, labels)
        assert rates == pytest.approx([1e-2] * 3 + [1e-3] * 4 + [1e-4] * 3)
        assert of_predictors == [0.1] * 5
        rates.clear()
        of_predictors.clear()


def test_by_default_the_rate_falls_after_the_official_epochs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule, rates = milestone_schedule(optimizer, 200 * 391), []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in range(391):
            optimizer.step()
            schedule.step()
    assert rates == pytest.approx([1.0] * 81 + [0.1] * 41 + [0.01] * 29 + [0.001] * 49)


def test_any_schedule_of_pytorch_follows_the_steps():
    def cycle(optimizer, steps):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, steps)

    images, labels = digits(60)
    training = trainer(epochs=5, schedule=cycle)  # of two batches
    rates = rates_in_use(training.backbone)
    training.fit(images, labels)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-2, 0.9)
    expected, reference = [], cycle(other, 10)
    for _ in range(10):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        reference.step()
    assert rates == pytest.approx(expected)


def test_divergence_says_what_to_do():
    images, labels = digits(50)
    with pytest.raises(FloatingPointError, match="Lower backbone_lr, which is 1e\\+38, or call pretrain_predictors"):
        trainer(backbone_lr=1e38, epochs=4).fit(images, labels)


def test_augmentation_is_used():
    images, labels = digits(50)
    training = trainer(augment=lambda batch: batch.flip(-1))
    other = trainer()
    training.fit(images.flip(-1), labels)
    other.fit(images, labels)
    assert is_same(state(training.model.parameters()), other.model.parameters())


def test_same_seed_same_network():
    images, labels = digits(100)
    first, second = trainer(), trainer()
    first.fit(images, labels)
    second.fit(images, labels)
    assert is_same(state(first.model.parameters()), second.model.parameters())
    assert copy.deepcopy(first.model)(images).equal(first.model(images))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainer(epochs=0), "epochs=0"),
        (lambda: trainer(cooldown=2), "cooldown=2"),
        (lambda: milestone_schedule(trainer().backbone, 10, (0.5, 1.5)), r"\[0.5, 1.5\]"),
        (lambda: trainer().fit(torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long)), "3 samples and 2 labels"),
        (lambda: trainer().pretrain_predictors(torch.zeros(3, 1, 8, 8), target="all"), "'all'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
