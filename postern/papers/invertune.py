"""Cleaning a dual encoder by inverting its trigger and calming the neurons it moves."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="invertune",
    title=(
        "InverTune: Removing Backdoors from Multimodal Contrastive Learning Models via Trigger Inversion and "
        "Activation Tuning"
    ),
    date=date(2025, 6, 14),
    arxiv="2506.12411",
    authors=5,
    family="backdoor",
    summary=(
        "The owner of a CLIP-style model knows neither trigger nor target nor poison and has a small set of clean "
        "images. InverTune watches where a universal adversarial patch sends the predictions, since a backdoor "
        "attracts them; inverts a trigger for that class; finds the neurons that it moves most and tunes the image "
        "encoder until they stay where clean images leave them. It is for those who downloaded a dual encoder and "
        "cannot retrain it."
    ),
    reported=(
        "Attack success falls by 97.87 % on average at a loss of 3.07 % clean accuracy (CLIP, zero-shot ImageNet; "
        "abstract).",
        "Finds the target class without knowing the attack, and beats CleanCLIP and plain fine-tuning at equal "
        "budget (numbers not available to us).",
    ),
    code="Goodman-liyu/InverTune",
)
