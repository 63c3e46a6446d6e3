"""The ways to compute a softmax that the tests hold to the same truth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from postern import _native
from postern.softmax import _rows, online_softmax, three_pass_softmax, two_pass_softmax


def _blocked(logits: Tensor, dim: int = -1, *, backend: str, block: int = 4096, out: Tensor | None = None) -> Tensor:
    """What the automatic choice runs on rows of middle length; it has no name of its own for users."""
    return _rows.run(logits, dim, "blocked", False, backend, block, out)


BACKENDS = ("torch", *_native.INSTRUCTION_SETS)
ALGORITHMS: dict[str, Callable[..., Tensor]] = {
    "two_pass": two_pass_softmax,
    "recompute": lambda *arguments, **named: three_pass_softmax(*arguments, variant="recompute", **named),
    "reload": lambda *arguments, **named: three_pass_softmax(*arguments, variant="reload", **named),
    "online": online_softmax,
    "blocked": _blocked,
}


@contextmanager
def backend(name: str) -> Iterator[str]:
    """What to pass as ``backend=`` to compute in plain tensor operations or with a given instruction set."""
    if name != "torch" and name not in _native.instruction_sets():
        pytest.skip(f"this machine has no compiled kernels for {name}")
    with nullcontext() if name == "torch" else _native.using(name):
        yield "torch" if name == "torch" else "native"


def uniform(*shape: int, scale: float = 10.0, seed: int = 0) -> Tensor:
    """Uniform in +-scale, float32."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * scale


def relative_error(result: Tensor, logits: Tensor, above: float = 1e-30) -> float:
    """Largest relative error of the probabilities above a threshold, against float64."""
    truth = torch.softmax(logits.double(), -1)
    counted = truth > above
    return float((((result.double() - truth).abs() / truth)[counted]).max())
