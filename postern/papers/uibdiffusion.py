"""A faint universal pattern as the trigger of a diffusion model."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="uibdiffusion",
    title="UIBDiffusion: Universal Imperceptible Backdoor Attack for Diffusion Models",
    date=date(2024, 12, 16),
    arxiv="2412.11441",
    authors=6,
    family="backdoor",
    summary=(
        "A diffusion model can be trained so that noise plus a trigger always becomes one target picture. Earlier "
        "triggers are plain to see and easy to invert. This attack takes a universal adversarial perturbation, a "
        "faint pattern trained to fool a classifier on any image, and injects it with the usual poisoned loss. It "
        "is the attack under test for two defences that recover triggers by inversion, Elijah and TERD."
    ),
    reported=(
        "100 % attack success on CIFAR-10 with 5 % of the data poisoned (author's page).",
        "Bypasses the defences Elijah and TERD (abstract; rates not available to us).",
        "Works with several families of models and samplers (numbers not available to us).",
    ),
    code="TheLaoLab/UIBDiffusion",
)
