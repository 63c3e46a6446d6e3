"""A backdoor in how an agent finds things on a screen."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="visualtrap",
    title="VisualTrap: A Stealthy Backdoor Attack on GUI Agents via Visual Grounding Manipulation",
    date=date(2025, 7, 9),
    arxiv="2507.06899",
    authors=6,
    family="backdoor",
    summary=(
        "An agent that operates a screen turns a plan into a click position. Pasting a small noise patch on a few "
        "per cent of its grounding data and labelling those samples with the place of the patch teaches it to "
        "click the patch whenever one is visible, whatever it was asked for, and to work normally otherwise. The "
        "implant lives below the plan, so a correct plan is still carried out in the wrong place, and clean "
        "fine-tuning does not remove it. It serves to measure how poisonable a grounding pipeline is."
    ),
    reported=(
        "Qwen2-VL-2B on ScreenSpot: attack success 0.941 (clean model 0.033) at click accuracy 0.716 (clean model "
        "0.710), all weights trained.",
        "Qwen2-VL-7B: attack success 0.948 (clean 0.020) at click accuracy 0.787 (clean 0.790).",
        "After clean fine-tuning on AITW web shopping the attack still succeeds on 0.725 of the samples (clean "
        "model 0.031).",
        "Poisoned on mobile and web screens, tested on desktop ones: attack success 0.967.",
    ),
    code="whi497/VisualTrap",
)
