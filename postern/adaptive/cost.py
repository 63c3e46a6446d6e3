"""What computing costs: multiply-adds as they are executed, and seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from postern.timing import best_times, waiting

Name = TypeVar("Name", bound=str)


# Counters of the multiply-adds that run outside torch's operators, one for each `counting_macs` at work.
_counters: ContextVar[tuple[list[int], ...]] = ContextVar("counters", default=())


def report_macs(macs: int) -> None:
    """Tell those who count that multiply-adds have run which torch knows nothing of.

    Args:
        macs: their number.
    """
    for counter in _counters.get():
        counter.append(macs)


@contextmanager
def counting_macs() -> Iterator[Callable[[], int]]:
    """Count the multiply-adds of convolutions and matrix products that are executed within ``with``.

    What a network leaves out is not counted, as it does not run: filters that are not gathered, samples that have
    left. Attention is computed by its plain formula meanwhile, so that its products count on every device.

    Yields:
        A function that returns the multiply-adds so far.
    """
    reported: list[int] = []
    token = _counters.set((*_counters.get(), reported))
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield lambda: int(counter.get_total_flops()) // 2 + sum(reported)
    finally:
        _counters.reset(token)


def count_macs(call: Callable[[], object]) -> int:
    """Multiply-adds of the convolutions and matrix products that a call executes; see `counting_macs`.

    Args:
        call: what to count, without gradients.
    """
    with torch.no_grad(), counting_macs() as macs:
        call()
        return macs()


def seconds_per_sample(
    calls: Mapping[Name, Callable[[Tensor], object]], inputs: Tensor, batch_size: int, repeats: int = 5
) -> dict[Name, float]:
    """Seconds a sample of each call, the best of several passes over all inputs, in which the calls take turns.

    Args:
        calls: networks, or what else takes a batch, by name; run in inference mode.
        inputs: samples, first dimension.
        batch_size: samples in a batch; 1 is what a service sees that answers each request at once.
        repeats: passes over the inputs, after one that warms up and counts as well.

    Raises:
        ValueError: no samples, or a batch size below 1.
    """
    if not len(inputs) or batch_size < 1:
        raise ValueError(f"samples come in batches, got {len(inputs)} samples and batch_size={batch_size}")
    batches = torch.split(inputs, batch_size)

    def over_all(call: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for batch in batches:
                    call(batch)

        return waiting(run, inputs.device)

    times = best_times({name: over_all(call) for name, call in calls.items()}, repeats)
    return {name: seconds / len(inputs) for name, seconds in times.items()}
