"""Several policies, none dominated, and a bandit that picks among them."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="non-dominated-policies",
    title="Beyond Worst-case Attacks: Robust RL with Adaptive Defense via Non-dominated Policies",
    date=date(2024, 2, 20),
    arxiv="2402.12673",
    authors=5,
    family="rl",
    summary=(
        "Robust control is usually trained for the worst attacker on the observations and then plays badly when "
        "the attack is weak or absent. Here a small set of policies is trained, none of which is dominated by the "
        "others across attackers, and at test time the policy for each episode is chosen by an adversarial bandit "
        "on the returns. It gets a good policy for whatever attack is present without knowing it. It is for those "
        "who deploy control under corrupted observations."
    ),
    reported=(
        "Higher natural and robust returns than single-policy baselines on Hopper, Walker2d, HalfCheetah and Ant, "
        "under no attack, random, RS, SA-RL and PA-AD attacks (numbers not available to us).",
        "Adapts to attacks that switch periodically or at random (curves; numbers not available to us).",
        "At most seven policies suffice (numbers not available to us).",
    ),
    code="umd-huang-lab/PROTECTED",
)
