"""Data-parallel training of two processes gives the gradients of one that sees the whole batch."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from postern.attention import SelfAttention
from postern.compare import attention, experts
from postern.compare.heads import ENTRIES
from postern.compare.softmax import NORMALISERS

WORLD = 2
WIDTH, CLASSES = 16, 128
# Their docstrings say why not.
NOT_DISTRIBUTED = {"factored-z-loss"}
DRAWN = {"random", "stochastic"}  # each process draws for itself


class HeadLoss(nn.Module):
    """A head as the module that distributed training sees: hidden vectors and targets in, the loss out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.head = ENTRIES[name].make(WIDTH, torch.arange(1, CLASSES + 1), 1e-2)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.head.loss(hidden, target)  # type: ignore[operator]
        return loss


class NormaliserLoss(nn.Module):
    """Attention with a normaliser, and a mean over its outputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attention = SelfAttention(WIDTH, 2, normalise=NORMALISERS[name])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.attention(x.unflatten(1, (4, WIDTH // 4)).repeat(1, 1, 4)).square().mean()
        return loss


class LayerLoss(nn.Module):
    """An attention layer, and a mean over its outputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.attention = attention.ENTRIES[name].make(0, True)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        tokens = x.unflatten(1, (4, WIDTH // 4)).repeat(1, 1, 4 * attention.WIDTH // WIDTH)
        loss: Tensor = self.attention(tokens).square().mean()
        return loss


class ExpertsLoss(nn.Module):
    """Routers without what they add to the loss, which depends on the batch as a whole, and a mean over the outputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = experts.Routed(name, CLASSES, 4)
        self.model.eval()  # how many experts work, and noise, depend on the batch as well

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        words = (x.unflatten(1, (4, WIDTH // 4)).sum(-1).abs() * 10).long() % CLASSES
        logits: Tensor = self.model.network(words)
        return logits.square().mean()


def modules() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name in ENTRIES:
        if name not in NOT_DISTRIBUTED:
            yield f"head {name}", partial(HeadLoss, name)
    for name in NORMALISERS:
        yield f"normaliser {name}", partial(NormaliserLoss, name)
    for name in attention.ENTRIES:
        yield f"attention {name}", partial(LayerLoss, name)
    for name in experts.ENTRIES:
        if name not in DRAWN:
            yield f"experts {name}", partial(ExpertsLoss, name)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, WIDTH, generator=generator), torch.randint(CLASSES, (8,), generator=generator)


def gradients(module: nn.Module, hidden: Tensor, target: Tensor) -> list[Tensor]:
    torch.autograd.backward([module(hidden, target)])
    return [p.grad for p in module.parameters() if p.grad is not None]


def train_a_half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    try:
        found = {}
        for name, build in modules():
            torch.manual_seed(0)
            module = DistributedDataParallel(build())
            half = (each.chunk(WORLD)[rank] for each in batch())
            found[name] = gradients(module, *half)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(train_a_half, (str(tmp_path),), nprocs=WORLD)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, build in modules():
        torch.manual_seed(0)
        whole = gradients(build(), *batch())
        assert whole, name
        for rank in range(WORLD):
            for one, other in zip(whole, halves[rank][name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
