"""A sigmoid gate on the output of attention, and no more attention sinks."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="gated-attention",
    title="Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
    date=date(2025, 5, 10),
    arxiv="2505.06708",
    authors=13,
    family="attention",
    summary=(
        "A softmax head with nothing to add still has to spend its whole probability somewhere, and parks it on "
        "the first token. Multiplying the output of attention by a sigmoid of the layer's input, per head or per "
        "dimension, gives each query a way to say nothing and puts a non-linearity between the value and output "
        "projections. Loss falls at equal parameters, larger learning rates stay stable, and sinks and massive "
        "activations vanish. It is of use to those who train from scratch; adding it in continued training does "
        "not help."
    ),
    reported=(
        "15A2B mixture of experts, 400B tokens: average perplexity 6.026 to 5.761, MMLU 58.79 to 60.82 with the "
        "element-wise gate.",
        "Gates elsewhere help less: after the value projection 5.820, after the dense output 6.017 in perplexity.",
        "Attention to the first token falls from 0.467 to 0.048 and the largest activation from 1053 to 94.",
        "Dense model with 48 layers at learning rate 8e-3: perplexity 9.195 without the gate, 7.325 with it.",
        "RULER at 128k tokens after extension by YaRN: 31.65 to 58.82.",
    ),
    code="qiuzh20/gated_attention",
)
