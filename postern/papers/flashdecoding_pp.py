"""Decoding without waiting for the running maximum of the softmax."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="flashdecoding-pp",
    title="FlashDecoding++: Faster Large Language Model Inference on GPUs",
    date=date(2023, 11, 2),
    arxiv="2311.01282",
    authors=9,
    family="attention",
    summary=(
        "Generating one token at a time is slow for three reasons: chunks of the key-value cache wait for each "
        "other's maximum to rescale a softmax, matrix products with a few rows are padded to many, and the kernel "
        "is fixed although the best one depends on the batch. The paper replaces the local maxima by one constant, "
        "with a recomputation where a logit leaves the safe range, pads to 8 rows only, and picks the kernel by an "
        "offline profile. It is for those who serve language models."
    ),
    reported=(
        "Rescaling takes 18.8 % of the time of attention (Llama2-7B, A100, 1024 tokens).",
        "The softmax without synchronisation makes attention 1.18 times (prefill) and 1.14 times (decode) faster; "
        "0.45 % of the softmaxes are recomputed.",
        "Flat matrix products: 7 % (A100) and 17 % (RTX 3090) faster than cuBLAS on average, at most 52 %.",
        "Decoding end to end: up to 4.86 times (NVIDIA) and 2.18 times (AMD) faster than Hugging Face, 1.37 times "
        "faster than FlashDecoding on A100.",
    ),
)
