"""The check of modules is itself checked: each fault that it is there to catch, and sound modules that must pass."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.modules import check_module


@dataclasses.dataclass
class Pair:
    value: Tensor
    index: Tensor


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Pair:
        value = self.dropout(self.norm(self.linear(x))) * self.scale
        return Pair(value, value.detach().argmax(-1))

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.forward(x).value, target)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_sound_module_passes(x):
    check_module(lambda: Sound().eval(), x)
    check_module(Sound, x)


def test_other_methods_can_be_checked(x):
    check_module(Sound, x, torch.tensor([0, 1, 2, 0, 1]), call=lambda module, *inputs: module.loss(*inputs))


class OwnSeed(nn.Linear):
    count = itertools.count()

    def __init__(self) -> None:
        super().__init__(4, 3)
        nn.init.constant_(self.weight, next(OwnSeed.count))


class OutsideState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class SharesWithCopies(nn.Linear):
    def __deepcopy__(self, memo: dict) -> "SharesWithCopies":
        copied = SharesWithCopies(4, 3)
        copied.weight = self.weight
        copied.bias = self.bias
        return copied


class ChangesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        x.data.zero_()
        return y


class BreaksGraph(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum().item() > 0 else y * 2


class CompilesToAnother(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if torch.compiler.is_compiling() else 1)


class OverflowsInBfloat16(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y / 0 if y.dtype == torch.bfloat16 else y


class LosesDigitsInBfloat16(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + 1000) - 1000


class OwnDevice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.ones(3, 2)


class OwnDeviceInOutput(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), torch.zeros(())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OwnSeed, "same seed"),
        (OutsideState, "loaded the state"),
        (lambda: SharesWithCopies(4, 3), "shares 'weight'"),
        (ChangesInput, "changed input"),
        (lambda: CompilesToAnother(4, 3), "compiled"),
        (lambda: OverflowsInBfloat16(4, 3), "not finite"),
        (lambda: LosesDigitsInBfloat16(4, 3), "off by"),
        (lambda: OwnDevice(4, 3), "matmul"),
        (lambda: OwnDeviceInOutput(4, 3), "on 'meta' is on cpu"),
    ],
)
def test_faults_are_caught(module, message, x):
    with pytest.raises(AssertionError, match=message):
        check_module(module, x)


def test_graph_break_is_caught(x):
    with pytest.raises(Exception, match=r"(?i)graph|item"):
        check_module(lambda: BreaksGraph(4, 3), x)
    check_module(lambda: BreaksGraph(4, 3), x, compile=False, meta=False)
