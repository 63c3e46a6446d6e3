"""Routers that let related tokens agree on their experts."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="graph-of-tokens-smoe",
    title="Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
    date=date(2025, 5, 1),
    arxiv="2505.00792",
    authors=4,
    family="experts",
    summary=(
        "A token of a sparse mixture of experts picks its experts alone, and late in training the pick for the "
        "same token keeps flipping between checkpoints. This work lets each token first choose a related token, by "
        "similarity of their representations or by the attention weights of the layer before, and take over its "
        "preference. The router then averages expert probabilities over related tokens: a drop-in change for "
        "anyone who trains such transformers."
    ),
    reported=(
        "Lower perplexity than a plain sparse mixture and XMoE on WikiText-103, clean and under attack (numbers "
        "not available to us).",
        "Better ImageNet accuracy and robustness for a 60M-parameter V-MoE (numbers not available to us).",
        "Fewer routing changes late in training and lower entropy of the choice of experts (numbers not available "
        "to us).",
    ),
)
