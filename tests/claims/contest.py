"""A contest whose members' qualities are known, for the tests of comparisons."""

from matplotlib.figure import Figure

from postern.claims import Metrics, Run
from postern.claims.comparison import Contest, Curves, Member, Quantity, Setting

# Accuracy of seed 0, 1, 2, ...: a leader, one that wins and loses against it, one that always loses, one that fails.
ACCURACY = {
    "leader": (0.90, 0.91, 0.92, 0.90),
    "rival": (0.91, 0.90, 0.93, 0.88),
    "loser": (0.80, 0.82, 0.82, 0.81),
}
STEP_MS = {"leader": 2.0, "rival": 3.0, "loser": 1.0, "broken": 5.0}
PLAYING_MS = {"leader": 4.0, "loser": 12.0}


def train(member: str, setting: Setting, run: Run) -> Metrics:
    if member == "broken":
        raise ArithmeticError("diverged")
    quality = ACCURACY[member][run.seed]
    others = {"loss": 1 - quality} if member != "loser" else {}
    return {"accuracy": quality, "learning_rate": setting.learning_rates[0], "memory_mib": 4.0 + run.seed, **others}


def time(setting: Setting, run: Run) -> Metrics:
    pace = 1 + run.seed / 10
    run.figure("memory-by-length", drawing(), "What the toys keep of their past, by its length.")
    run.table("What the toys keep", [{"toy": member, "KiB": 2.5} for member in setting.members])
    playing = {f"playing {member}": ms for member, ms in PLAYING_MS.items() if member in setting.members}
    return {member: STEP_MS[member] * pace for member in setting.members} | playing


def drawing() -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([1, 2], [3, 4])
    return figure


def unsuited(setting: Setting) -> dict[str, str]:
    return {"broken": "needs luck"} if setting.steps < 10 else {}


CONTEST = Contest(
    family="toys",
    module=__name__,
    members=(
        Member("leader", "wins", "torch.softmax"),
        Member("rival", "wins at times", "torch.softmax"),
        Member("loser", "loses", "torch.softmax", paper="soft-nms"),
        Member("broken", "fails", "torch.softmax"),
    ),
    task={"table": "A toy is trained.", "text": "A toy reads."},
    quality={
        "table": Quantity("accuracy", "test accuracy, %", higher_is_better=True, scale=100.0),
        "text": Quantity("loss", "test loss, nats"),
    },
    costs=(Quantity("memory_mib", "memory, MiB"),),
    train=train,
    time=time,
    unsuited=unsuited,
    shown={"table": (Quantity("loss", "test loss, nats"),)},
    paces={"playing": "time of a game", "sleeping": "time of a nap"},
    curves={
        "accuracy-by-memory": Curves(
            "Few toys and many",
            "memory, KiB",
            "test accuracy, %",
            (("learning_rate", "accuracy"), ("memory_mib", "accuracy")),
            (1024.0, 100.0),
        ),
        "accuracy-by-loss": Curves("Toys", "loss", "accuracy", (("loss", "accuracy"),)),
    },
)


def setting(*members: str, kind: str = "table", steps: int = 100) -> Setting:
    return Setting(
        data="wine",
        kind=kind,
        digest="0123",
        label=None,
        members=members or ("leader", "rival", "loser"),
        steps=steps,
        learning_rates=(1e-3, 3e-3),
    )
