"""Dual encoders for millions of labels, with a softmax that does not punish easy positives."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="dexml",
    title="Dual-Encoders for Extreme Multi-Label Classification",
    date=date(2023, 10, 16),
    arxiv="2310.10636",
    authors=6,
    family="heads",
    summary=(
        "A dual encoder scores texts against labels with one shared encoder, so its size does not grow with the "
        "number of labels, but it lagged behind classifiers with a vector per label. The cause lies in the softmax "
        "over several positives: an easy one whose probability exceeds its share is pushed down. Leaving the other "
        "positives out of the denominator cures it; a differentiable top-k serves where the budget of answers is "
        "fixed. It suits retrieval, tagging and recommendation."
    ),
    reported=(
        "LF-AmazonTitles-1.3M: P@1 58.40, P@5 45.46; LF-Wikipedia-500K: 85.78 and 50.53 (repository).",
        "Matches or beats the best by up to 2 % P@1 on the largest sets with 66 million parameters, 20 times fewer "
        "(abstract).",
        "Smaller sets: LF-AmazonTitles-131K 42.52 and 20.64, EURLex-4K 86.78 and 60.19 (repository).",
    ),
    code="nilesh2797/DEXML",
)
