"""Differentially private fine-tuning whose clipping and noise are steered by an agent."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="rldp",
    title="Efficient Differentially Private Fine-Tuning of LLMs via Reinforcement Learning",
    date=date(2025, 7, 30),
    arxiv="2507.22565",
    authors=5,
    family="privacy",
    summary=(
        "Private training clips every example's gradient at a fixed norm and adds noise to match. RLDP hands these "
        "knobs to a small agent: at intervals it sees statistics of the training and of the privacy spent, and "
        "sets a clipping norm for each adapter and the level of the noise. A soft actor-critic policy is learnt "
        "during that same run, rewarded for utility gained against budget spent. It is for those who fine-tune "
        "language models on sensitive text."
    ),
    reported=(
        "Perplexity at equal privacy is 1.3 % to 30.5 % lower, 5.4 % on average (GPT2-small, Llama-1B, Llama-3B, "
        "Mistral-7B; more than 1600 runs; abstract).",
        "Downstream utility 5.6 % higher on average (abstract).",
        "Reaches the final utility of the baselines after 13 to 43 % of their updates, a mean speed-up of 71 % "
        "(abstract).",
    ),
    code="akhadangi/RLDP",
)
