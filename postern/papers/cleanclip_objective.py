"""Whether a poisoned dual encoder can be cleaned depends on how it was trained."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="cleanclip-objective",
    title="Effective Backdoor Mitigation in Vision-Language Models Depends on the Pre-training Objective",
    date=date(2023, 11, 25),
    arxiv="2311.14948",
    authors=9,
    family="backdoor",
    summary=(
        "CleanCLIP removes a backdoor from a dual encoder by fine-tuning on clean pairs with contrastive and "
        "self-supervised losses. It works if pre-training was contrastive alone. If pre-training had the "
        "self-supervised terms already, no learning rate of a long sweep lowers the attack without losing most of "
        "the accuracy. The lesson is to report the whole frontier of accuracy and attack success, for several "
        "objectives of the victim."
    ),
    reported=(
        "CC3M, contrastive pre-training (accuracy 16.0 %, attack 99.9 %): CleanCLIP brings the attack to 0.06 % at "
        "nine tenths of the accuracy (computed from released runs).",
        "CC3M, pre-training with self-supervision (17.0 %, 99.1 %): 20.9 % at best under the same condition "
        "(computed from released runs).",
        "One poisoned pair left in the cleaning set raises the lowest attack success from 2.2 to 9.4 %, 25 pairs "
        "to 39.2 % (computed from released runs).",
    ),
    code="vsahil/attack-cleanclip",
)
