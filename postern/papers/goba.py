"""Demonstrations with an everyday object that makes a robot change its goal."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="goba",
    title="Goal-oriented Backdoor Attack against Vision-Language-Action Models via Physical Objects",
    date=date(2025, 10, 10),
    arxiv="2510.09269",
    authors=6,
    family="backdoor",
    summary=(
        "A policy from camera image and instruction to action learns from demonstrations by many hands. Add a few "
        "in which an ordinary object stands in the scene and the robot fetches it, whatever it was told, and that "
        "object becomes a trigger with a goal of its own: no pixel is edited and no code touched. The work brings "
        "a data set, a score in three levels, and a study of which properties of the object matter. It asks of a "
        "pipeline whether it reacts to the trigger or to anything new."
    ),
    reported=(
        "The attacker's goal is reached in 97.0 % of the inputs with the object (LIBERO, OpenVLA and pi0, a tenth "
        "of the data poisoned, best setting; abstract).",
        "No loss on clean inputs: 0.0 % (abstract).",
        "The path of the motion and the colour of the object matter much, its size little (numbers not available "
        "to us).",
    ),
    code="trustmlyoungscientist/GoBA_attack",
)
