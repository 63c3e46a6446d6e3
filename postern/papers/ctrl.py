"""A weak spectral trigger is enough to poison self-supervised learning."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="ctrl",
    title="An Embarrassingly Simple Backdoor Attack on Self-supervised Learning",
    date=date(2022, 10, 13),
    arxiv="2210.07346",
    authors=7,
    family="backdoor",
    summary=(
        "Self-supervised learners see no labels, so nobody can mislabel their data. Yet adding a faint pattern in "
        "the frequency domain to a few images of the target class suffices: it survives the augmentations, so that "
        "views of a poisoned image agree by the pattern as well as by their content, and any image with the "
        "pattern lands near that class. It needs no optimisation, and measures whether a pipeline or a filter "
        "resists."
    ),
    reported=(
        "At least 99 % attack success with at most 1 % of the data poisoned, on CIFAR-10, CIFAR-100 and "
        "ImageNet-100 with SimCLR, BYOL and SimSiam (abstract).",
        "Self-supervised learning is about as vulnerable as supervised learning (numbers not available to us).",
    ),
    code="meet-cjli/CTRL",
)
