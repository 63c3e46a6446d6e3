"""Unlearning a text trigger of a diffusion model with the model as its own teacher."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="skd-cag",
    title=(
        "Sealing The Backdoor: Unlearning Adversarial Text Triggers In Diffusion Models Using Knowledge Distillation"
    ),
    date=date(2025, 8, 20),
    arxiv="2508.18235",
    authors=5,
    family="backdoor",
    summary=(
        "A text-to-image model was poisoned: a phrase in the prompt adds a patch or changes the style. Without "
        "that phrase it still behaves, so it can teach itself. A frozen copy sees the clean prompt, a trainable "
        "one the prompt with the trigger, and learns to answer as the frozen one does; the attention to the words "
        "of the trigger is pushed to carry nothing. It repairs a small conditional generator without its training "
        "data."
    ),
    reported=(
        "Backdoors that add pixels are removed in 100 % of the cases, those that change the style in 93 % (abstract).",
        "Robustness and the fidelity of images are kept (numbers not available to us).",
    ),
    code="Mystic-Slice/Sealing-The-Backdoor",
)
