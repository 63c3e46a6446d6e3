"""Experts chosen at random, and trained to agree."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="thor",
    title="Taming Sparsely Activated Transformer with Stochastic Experts",
    date=date(2021, 10, 8),
    arxiv="2110.04260",
    authors=8,
    family="experts",
    summary=(
        "Learnt gates of sparse transformers turn out no better than random routing and use their parameters "
        "poorly. THOR drops the gate: experts are drawn at random in training and at inference. To make every "
        "expert good at every input, each batch passes twice with independent draws and the two output "
        "distributions are pulled together. It gives the capacity of a mixture without router, balancing loss or "
        "capacity factor, and a strong baseline for every router."
    ),
    reported=(
        "2 BLEU better than the Switch Transformer in multilingual translation (abstract).",
        "As good as a mixture of experts 18 times larger in multilingual translation (abstract).",
        "Gating is about as good as random routing (abstract; numbers not available to us).",
    ),
    code="microsoft/Stochastic-Mixture-of-Experts",
)
