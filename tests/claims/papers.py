"""A paper whose claims do everything that an experiment should not, for the tests of the engine."""

import os
import sys
import time
from dataclasses import dataclass
from datetime import date

import torch

from postern.claims import AtLeast, Difference, Metrics, Paper, Run

PAPER = Paper(
    slug="hostile",
    title="Experiments That Misbehave",
    date=date(2020, 1, 1),
    arxiv=None,
    authors=1,
    family="softmax",
    summary="Raises, hangs, exits, eats memory, prints and returns what is no number.",
)


@dataclass(frozen=True)
class Setting:
    """How long or how much."""

    amount: float = 0.0


SCALES = {"smoke": Setting(), "small": Setting(0.2)}


@PAPER.claim(
    "A random number is above minus ten.",
    reported="-",
    holds_when=AtLeast("value", -10.0),
    scales=SCALES,
    seeds=3,
)
def behaves(config: Setting, run: Run) -> Metrics:
    for step in run.progress(range(4), "steps"):
        time.sleep(config.amount / 4)
        run.log(step, value=step / 4)
    return {"value": torch.randn((), generator=run.generator()).item(), "threads": torch.get_num_threads()}


@PAPER.claim("It is slow.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=3)
def is_slow(config: Setting, run: Run) -> Metrics:
    for _ in run.progress(range(20), "sleeping"):
        time.sleep(0.1)
    return {"value": float(run.seed)}


@PAPER.claim("It raises.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def raises(config: Setting, run: Run) -> Metrics:
    raise KeyError("no such thing")


@PAPER.claim("It hangs.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def hangs(config: Setting, run: Run) -> Metrics:
    while True:
        time.sleep(1)


@PAPER.claim("It exits.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def exits(config: Setting, run: Run) -> Metrics:
    sys.exit(0)


@PAPER.claim("It exits at once.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def exits_at_once(config: Setting, run: Run) -> Metrics:
    os._exit(3)


@PAPER.claim("It eats memory.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def eats_memory(config: Setting, run: Run) -> Metrics:
    hoard = []
    while True:
        hoard.append(torch.ones(2**22))
        time.sleep(0.005)


@PAPER.claim("It prints.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def prints(config: Setting, run: Run) -> Metrics:
    print("from Python")
    os.write(1, b"from C\n")
    print("to standard error", file=sys.stderr)
    return {"value": 1.0}


@PAPER.claim("It returns NaN.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def returns_nan(config: Setting, run: Run) -> Metrics:
    return {"value": float("nan")}


@PAPER.claim("It returns text.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def returns_text(config: Setting, run: Run) -> Metrics:
    return {"value": "high"}  # type: ignore[dict-item]


@PAPER.claim("It forgets a metric.", reported="-", holds_when=Difference("a", "b", at_least=0), scales=SCALES, seeds=2)
def forgets(config: Setting, run: Run) -> Metrics:
    return {"a": 1.0}


@PAPER.claim("It lacks a thing.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def lacks(config: Setting, run: Run) -> Metrics:
    run.require(False, "needs a thing that nobody has")
    return {"value": 1.0}


@PAPER.claim(
    "It runs alone.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2, exclusive=True
)
def runs_alone(config: Setting, run: Run) -> Metrics:
    return {"value": 1.0, "threads": run.threads}


@PAPER.claim(
    "It needs what is not installed.",
    reported="-",
    holds_when=AtLeast("value", 0.0),
    scales=SCALES,
    seeds=2,
    extras=("no_such_package",),
)
def needs_extra(config: Setting, run: Run) -> Metrics:
    return {"value": 1.0}


@PAPER.claim(
    "It needs a device.",
    reported="-",
    holds_when=AtLeast("value", 0.0),
    scales=SCALES | {"full": Setting()},
    seeds=2,
)
def needs_device(config: Setting, run: Run) -> Metrics:
    return {"value": 1.0}
