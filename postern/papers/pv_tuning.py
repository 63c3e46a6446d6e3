"""Fine-tuning one- and two-bit weights beyond straight-through gradients."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="pv-tuning",
    title="PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression",
    date=date(2024, 5, 23),
    arxiv="2405.14852",
    authors=8,
    family="quantize",
    summary=(
        "Weights of one or two bits are discrete codes times continuous codebooks. Tuning the codebooks is easy; "
        "codes are usually tuned by pretending that rounding has a gradient. PV-Tuning minimises the true "
        "objective in turns: values with codes fixed, then codes with values fixed, by a linearised step in a "
        "small subspace of weights where the step may be large enough to change a code. It serves "
        "quantisation-aware training of vector-quantised models."
    ),
    reported=(
        "Llama-2 7B at about 2 bits: WikiText-2 perplexity 5.92 before and 5.68 after PV-Tuning (AQLM 1x16 groups "
        "of 8; repository).",
        "Llama-2 13B 5.22 to 5.05, 70B 3.83 to 3.78, Mistral-7B 5.40 to 5.22 (repository).",
        "Llama-2 7B at about 1 bit: 8.28, against 9.73 for OneBit (second-hand).",
        "Two bits are Pareto-optimal for the Llama-2 family (abstract).",
    ),
    code="Vahe1994/AQLM",
)
