"""What a softmax attention layer learns from prompts of linear regressions."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="in-context-linear-regression",
    title=(
        "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of "
        "Multi-Head Softmax Attention"
    ),
    date=date(2025, 3, 16),
    arxiv="2503.12734",
    authors=4,
    family="dynamics",
    summary=(
        "One layer of softmax attention is trained on prompts drawn from random linear regressions, and its "
        "weights become strikingly simple: each head compares inputs by a multiple of the identity, reads only the "
        "label, and heads pair up with opposite signs. The difference of the two groups is one step of gradient "
        "descent without bias. It beats a single head, comes within a factor of ridge regression, and keeps "
        "working on longer prompts. For interpretability it is a sharp, wholly synthetic test of softmax "
        "attention."
    ),
    reported=(
        "Dimension 5, noise variance 0.1, 40 examples, test error: two heads 0.243, debiased gradient descent "
        "0.243, one head 0.405, ridge 0.115.",
        "With 100 examples: two heads 0.164, one head 0.284, ridge 0.104.",
        "Two, four and eight trained heads are alike and far better than one: final losses about 0.21 to 0.28 "
        "against 0.40.",
    ),
    code="XintianPan/ICL_linear",
)
