"""Poison against contrastive learning, learnt by simulating the victim."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="blto",
    title="Backdoor Contrastive Learning via Bi-level Trigger Optimization",
    date=date(2024, 4, 11),
    arxiv="2404.07863",
    authors=7,
    family="backdoor",
    summary=(
        "A fixed trigger is weak against contrastive learning: augmentations distort it and the loss pushes "
        "triggered images apart. BLTO learns a generator of triggers against a simulated victim. An inner loop "
        "trains a surrogate on data poisoned by the present generator, an outer one moves the generator until "
        "triggered images stay near the target class in the surrogate's space. It is the strong attack against "
        "which defences of self-supervised learning are measured."
    ),
    reported=(
        "99 % attack success on ImageNet-100 with 1 % of the data poisoned (abstract).",
        "Beats fixed triggers on CIFAR-10, CIFAR-100 and ImageNet-100 with SimCLR, BYOL and SimSiam victims "
        "(numbers not available to us).",
    ),
    code="SWY666/SSL-backdoor-BLTO",
)
