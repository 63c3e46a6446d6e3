"""A paper's record and its claims."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from types import MappingProxyType
from typing import Any

import torch

from postern.claims.criteria import Criterion, Metrics
from postern.claims.run import Measurement, Run, check_metrics, seed_everything

SCALES = ("smoke", "small", "full")
TIME_LIMITS_S: Mapping[str, float] = MappingProxyType({"smoke": 120.0, "small": 900.0, "full": 172_800.0})

Experiment = Callable[[Any, Run], Metrics]
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper that can be true or false, and the experiment that decides it.

    Attributes:
        paper: the paper's slug.
        name: the claim's, from the experiment's function name.
        statement: the sentence.
        reported: what the paper reports.
        holds_when: the criterion.
        scales: one configuration a scale.
        seeds: how many seeds the small and the full scale run; smoke runs one.
        gpu: the scales that need a CUDA device.
        exclusive: whether it measures time and so runs alone on the machine.
        extras: packages that it needs, each also the name of the extra that brings it.
        note: what a reader must know about the result.
        experiment: the function.
    """

    paper: str
    name: str
    statement: str
    reported: str
    holds_when: Criterion
    scales: Mapping[str, Any]
    seeds: int
    gpu: tuple[str, ...]
    exclusive: bool
    extras: tuple[str, ...]
    note: str
    experiment: Experiment

    @property
    def key(self) -> str:
        """``paper/claim``, unique in the catalogue."""
        return f"{self.paper}/{self.name}"

    def seeds_at(self, scale: str) -> int:
        """How many seeds a run at ``scale`` takes."""
        return 1 if scale == "smoke" else self.seeds

    def source(self) -> str:
        """The source text of the module that holds the experiment: a change of it makes old results stale."""
        module = inspect.getmodule(self.experiment)
        return inspect.getsource(module if module is not None else self.experiment)

    def measure(
        self,
        scale: str,
        seed: int,
        *,
        device: torch.device | str = "cpu",
        threads: int = 1,
        on_progress: Callable[[str, int, int | None], None] | None = None,
    ) -> Measurement:
        """Run the experiment once, in this process.

        Args:
            scale: "smoke", "small" or "full".
            seed: any non-negative integer.
            device: where it computes.
            threads: how many threads torch may use.
            on_progress: called with (label, done, total) as the experiment's loops go.

        Raises:
            ValueError: unknown scale, or metrics that are not finite numbers.
            Unavailable: the machine lacks what the experiment needs.
        """
        if scale not in self.scales:
            raise ValueError(f"claim {self.key} has no scale {scale!r}; it has: {', '.join(self.scales)}")
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        seed_everything(seed)
        run = Run(seed=seed, scale=scale, device=torch.device(device), threads=threads, on_progress=on_progress)
        metrics = check_metrics(self.experiment(self.scales[scale], run))
        missing = self.holds_when.metrics() - metrics.keys()
        if missing:
            raise ValueError(
                f"claim {self.key} is judged by {', '.join(sorted(missing))}, which its experiment did not return; "
                f"it returned: {', '.join(sorted(metrics))}"
            )
        return Measurement(metrics, tuple(run.logs), dict(run.figures), dict(run.tables))


@dataclass(frozen=True)
class Paper:
    """One paper of the listing.

    Attributes:
        slug: short name in URLs and commands, lower-case words with hyphens.
        title: as published.
        date: first publication.
        arxiv: arXiv identifier such as "1704.04503", or None.
        authors: number of authors, or None where unknown.
        family: the room of its parts.
        summary: what it is about, in our own words.
        reported: its headline claims with their numbers.
        components: dotted public names of its parts; empty while planned.
        code: official repository as "owner/name", or None.
        details: implementation details that matter.
        differences: where our parts differ from the paper or its code.
        example: a worked example that runs as it is.
        claims: the claims by name; filled by `claim`.
    """

    slug: str
    title: str
    date: date
    arxiv: str | None
    authors: int | None
    family: str
    summary: str
    reported: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    code: str | None = None
    details: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    example: str = ""
    claims: dict[str, Claim] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not _SLUG.fullmatch(self.slug):
            raise ValueError(f"a slug is lower-case words joined by hyphens, got {self.slug!r}")
        if not self.summary.strip():
            raise ValueError(f"paper {self.slug!r} needs a summary")

    @property
    def is_planned(self) -> bool:
        """Whether it has no claims yet."""
        return not self.claims

    def claim(
        self,
        statement: str,
        *,
        reported: str,
        holds_when: Criterion,
        scales: Mapping[str, Any],
        seeds: int,
        gpu: Sequence[str] = ("full",),
        exclusive: bool = False,
        extras: Sequence[str] = (),
        note: str = "",
    ) -> Callable[[Experiment], Experiment]:
        """Register the decorated function as the experiment of a claim.

        The claim's name is the function's, with hyphens. See `Claim` for the arguments.

        Raises:
            ValueError: no seeds, no or unknown scales, or a name that is taken.
        """
        unknown = (set(scales) | set(gpu)) - set(SCALES)
        if unknown:
            raise ValueError(f"paper {self.slug!r}: unknown scale {sorted(unknown)[0]!r}; scales are {SCALES}")
        if "smoke" not in scales or "small" not in scales:
            raise ValueError(f"paper {self.slug!r}: a claim has at least the scales smoke and small, got {set(scales)}")
        if seeds < 2:
            raise ValueError(f"paper {self.slug!r}: an interval needs at least two seeds, got {seeds}")

        def register(experiment: Experiment) -> Experiment:
            name = experiment.__name__.strip("_").replace("_", "-")
            if name in self.claims:
                raise ValueError(f"paper {self.slug!r} has two claims named {name!r}")
            self.claims[name] = Claim(
                paper=self.slug,
                name=name,
                statement=statement,
                reported=reported,
                holds_when=holds_when,
                scales=MappingProxyType(dict(scales)),
                seeds=seeds,
                gpu=tuple(gpu),
                exclusive=exclusive,
                extras=tuple(extras),
                note=note,
                experiment=experiment,
            )
            return experiment

        return register
