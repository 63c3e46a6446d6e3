"""A backdoor in a vision transformer that a prompt token switches on."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="swarm",
    title="Not All Prompts Are Secure: A Switchable Backdoor Attack Against Pre-trained Vision Transformers",
    date=date(2024, 5, 17),
    arxiv="2405.10612",
    authors=6,
    family="backdoor",
    summary=(
        "Visual prompt tuning leaves a vision transformer frozen and learns a few prompt tokens. Whoever does the "
        "tuning can learn one token more, a switch. Without it the model is benign on clean and on triggered "
        "images, so a test of the service finds nothing; with it a faint trigger forces the target class. It is a "
        "test bed for defences that probe only the mode that is deployed."
    ),
    reported=(
        "More than 95 % attack success with the switch on (abstract; ViT-B/16, perturbation at most 4/255).",
        "Benign with the switch off, hard to detect and hard to remove (numbers not available to us).",
    ),
    code="20000yshust/SWARM",
)
