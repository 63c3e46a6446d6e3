"""Recovering the trigger of a backdoored classifier from one image."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="smoothinv",
    title="Single Image Backdoor Inversion via Robust Smoothed Classifiers",
    date=date(2023, 2, 28),
    arxiv="2303.00215",
    authors=2,
    family="backdoor",
    summary=(
        "Someone hands you a classifier that may hide a backdoor, and you want to see its trigger. Earlier methods "
        "need a set of clean images and several regularisers. SmoothInv needs one image: it averages the "
        "classifier over Gaussian noise, with or without a denoising step, and climbs towards a class within a "
        "small ball. Gradients of a smoothed classifier are aligned with perception, so what appears is the "
        "trigger rather than adversarial noise. It is for auditors of models."
    ),
    reported=(
        "Recovers a working trigger from a single image in five backdoored ImageNet and TrojAI classifiers "
        "(success of the recovered triggers not available to us).",
        "True triggers of those models succeed on 99.29, 79.73, 100, 100 and 54 % of the images: Blind-P, Blind-S, "
        "Blind-G, TrojAI, HTBA (repository).",
        "Better than inversion in the manner of Neural Cleanse when one image is all there is (numbers not "
        "available to us).",
    ),
    code="locuslab/smoothinv",
)
