"""How to train a generator of adversarial suffixes, for testing defences."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="amplegcg-plus",
    title=(
        "AmpleGCG-Plus: A Strong Generative Model of Adversarial Suffixes to Jailbreak LLMs with Higher Success "
        "Rates in Fewer Attempts"
    ),
    date=date(2024, 10, 29),
    arxiv="2410.22143",
    authors=4,
    family="alignment",
    summary=(
        "A search for adversarial suffixes passes many that work and keeps only the one with the lowest loss, "
        "which is a poor guide. A small language model trained on all of them emits hundreds for a query in "
        "seconds. This paper asks which recipe makes that generator best: start from a pre-trained model, use "
        "every filtered suffix, and filter by a stricter judge. It measures how well refusal training, guards and "
        "filters stand up to cheap and varied suffixes."
    ),
    reported=(
        "Llama-2-7B-chat, 50 queries, success within 100 tries: from scratch on samples 78 %, pre-trained on "
        "samples 93 %, pre-trained on everything 96 %, with the stricter filter 99 %.",
        "Against AmpleGCG on 100 test queries by both judges: 81 to 90 % within 100 tries, 93 to 97 % within 400.",
        "Unseen formats of queries, within 100 tries: 79 to 96 %.",
        "Circuit breakers: none of 100 test queries, 10 of 520 overall.",
    ),
    code="OSU-NLP-Group/AmpleGCG",
)
