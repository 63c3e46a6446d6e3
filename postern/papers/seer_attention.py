"""A small learnt gate that says which blocks of attention matter."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="seer-attention",
    title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    date=date(2024, 10, 17),
    arxiv="2410.13276",
    authors=8,
    family="attention",
    summary=(
        "Attention maps of trained language models are sparse in blocks, but which blocks depends on head and "
        "input. SeerAttention pools queries and keys by block, scores block pairs with a miniature attention, and "
        "keeps the high ones. The model stays frozen: the gate is distilled from the pooled map that a modified "
        "kernel emits on the way, or trained along in long-context fine-tuning. It speeds up the prefill of long "
        "prompts, and in a later variant decoding."
    ),
    reported=(
        "Llama-3.1-8B-Instruct on PG19 at 32k tokens: perplexity 9.92 dense, 9.92 at half the blocks, 10.04 at a "
        "tenth (authors' model card).",
        "At 128k tokens: 10.03 dense, 10.05 at half, 10.88 at a tenth (authors' model card).",
        "5.67 times faster than FlashAttention-2 at 32k tokens and 90 % sparsity (abstract).",
        "The gates of the 8B model take 500 steps, about 40 A100-hours.",
    ),
    code="microsoft/SeerAttention",
)
