"""Linear attention with decay, gates and a tiled kernel, as a language model."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="transnormer",
    title="Scaling TransNormer to 175 Billion Parameters",
    date=date(2023, 7, 27),
    arxiv="2307.14995",
    authors=12,
    family="attention",
    summary=(
        "Linear attention promises cost proportional to length and a state of constant size, but used to lose to "
        "softmax in quality, was no faster in causal training, and its decay factors overflowed at inference. Here "
        "every part of the decoder is repaired: positions by rotation with exponential decay, gated linear "
        "attention normalised instead of divided, a gated unit without activation, a norm without parameters, a "
        "tiled kernel called Lightning Attention, and a recurrence that stays in range."
    ),
    reported=(
        "385M parameters after 100k updates: loss 2.362 for the Transformer, 2.248 for TransNormerLLM; 1B: 2.061 "
        "and 1.896.",
        "Without the gate 2.263 (379M parameters), with it 2.248 (385M).",
        "Lightning Attention is at least 2 times faster and takes up to 4 times less memory than PyTorch "
        "NormAttention up to length 8192.",
        "Training speed in tokens per second and GPU: 3362 to 4081 (7B), 106 to 137 (175B).",
        "Longest context on 64 A100: 37K to 48K tokens (7B), 10K to 12K (175B).",
    ),
    code="OpenNLPLab/TransnormerLLM",
)
