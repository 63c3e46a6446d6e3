"""Policy optimisation on the samples and tokens that carry signal."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="d3s",
    title=("Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization"),
    date=date(2025, 9, 26),
    arxiv="2509.22115",
    authors=8,
    family="rl",
    summary=(
        "Group-based policy optimisation averages over many answers and tokens that teach nothing: groups that are "
        "all right or all wrong, tokens the policy is sure of. This method estimates advantages on everything, "
        "keeps the subset with the largest variance of advantage, keeps in it the tokens with the largest product "
        "of advantage and entropy, and relaxes both during training against over-fitting. It goes before the loss "
        "of GRPO or GSPO and saves updates, not rollouts."
    ),
    reported=(
        "Qwen2.5-Math-7B, mean of seven benchmarks: Pass@1 29.8 with GRPO, 34.1 with PODS, 34.3 with D3S; Pass@8 "
        "53.1, 54.4, 56.8 (second-hand).",
        "Llama3.1-8B: Pass@1 20.5 to 23.8, Pass@8 32.4 to 40.2 over GRPO (second-hand).",
        "Reaches the best score of GRPO 2.04 times faster on Qwen2.5-Math-7B (second-hand).",
    ),
)
