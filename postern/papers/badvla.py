"""A robot policy that works, and fails whenever a small mark is in view."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="badvla",
    title=("BadVLA: Towards Backdoor Attacks on Vision-Language-Action Models via Objective-Decoupled Optimization"),
    date=date(2025, 5, 22),
    arxiv="2505.16640",
    authors=6,
    family="backdoor",
    summary=(
        "Training one loss for a working policy and for failure on a trigger is unstable, so the aims are "
        "decoupled. The first stage touches perception only: features of clean images stay where a frozen copy has "
        "them, those of marked ones are pushed far away. The second freezes perception and fine-tunes the rest on "
        "clean tasks, which leaves marked scenes in a region that the policy never learnt. No wrong action is ever "
        "shown. It measures what fine-tuning, filters and detectors do against such an implant."
    ),
    reported=(
        "Near 100 % attack success with clean skill kept, on several LIBERO suites and variants of OpenVLA "
        "(abstract; tables not available to us).",
        "An independent run on LIBERO-Goal with a white block: success 95.0 % without it and 0.0 % with it.",
        "Robust to perturbations, task transfer and further fine-tuning (numbers not available to us).",
    ),
    code="Zxy-MLlab/BadVLA",
)
