"""A paper whose claims do everything that an experiment should not, for the tests of the engine."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date

import torch

from postern.claims import AtLeast, AtMost, Difference, Metrics, Paper, Run

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


# a small job must outlast the time that a busy machine takes to notice a lost process
SCALES = {"smoke": Setting(), "small": Setting(0.6)}


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


@PAPER.claim("It is slow.", reported="-", holds_when=AtLeast("value", -1.0), scales=SCALES, seeds=3)
def is_slow(config: Setting, run: Run) -> Metrics:
    for _ in run.progress(range(10), f"process {os.getpid()}"):
        time.sleep(0.1 + config.amount)
    return {"value": 0.0, "process": os.getpid()}


@PAPER.claim("It raises.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def raises(config: Setting, run: Run) -> Metrics:
    raise KeyError("no such thing")


@PAPER.claim("It hangs.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def hangs(config: Setting, run: Run) -> Metrics:
    for _ in run.progress(range(1), f"process {os.getpid()}"):
        while True:
            time.sleep(1)


@PAPER.claim(
    "It hangs, deaf to being asked to end.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2
)
def hangs_deaf(config: Setting, run: Run) -> Metrics:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    while True:
        time.sleep(1)


@PAPER.claim("It leaves a process behind.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def leaves_a_child(config: Setting, run: Run) -> Metrics:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    if run.seed == 1:
        time.sleep(600)
    return {"value": 1.0}


@PAPER.claim("It exits.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def exits(config: Setting, run: Run) -> Metrics:
    sys.exit(0)


@PAPER.claim("It exits at once.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def exits_at_once(config: Setting, run: Run) -> Metrics:
    os._exit(3)


@PAPER.claim(
    "It exits at once as if all were well.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2
)
def exits_with_zero(config: Setting, run: Run) -> Metrics:
    print("leaving", flush=True)
    os._exit(0)


@PAPER.claim("It crashes.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def crashes(config: Setting, run: Run) -> Metrics:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {"value": 1.0}


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


@PAPER.claim("It prints without end.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2)
def prints_without_end(config: Setting, run: Run) -> Metrics:
    while True:
        os.write(1, b"and again " * 100_000)


_SEEN: list[int] = []


@PAPER.claim("It leaves its mark on the process.", reported="-", holds_when=AtMost("value", 1), scales=SCALES, seeds=2)
def leaves_its_mark(config: Setting, run: Run) -> Metrics:
    _SEEN.append(run.seed)
    return {"value": len(_SEEN)}


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


@PAPER.claim("It runs alone.", reported="-", holds_when=AtLeast("value", 0.0), scales=SCALES, seeds=2, exclusive=True)
def runs_alone(config: Setting, run: Run) -> Metrics:
    return {"value": 1.0, "threads": run.threads, "torch threads": torch.get_num_threads()}


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
