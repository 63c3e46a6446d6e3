"""The contests: every member learns on every kind of data that it suits, and the shared network is the same."""

from dataclasses import replace

import pytest
import torch

from postern import compare
from postern.claims import Run
from postern.claims.comparison import CannotCompare, Contest, Setting
from postern.compare import adaptive, attention, experts
from postern.compare.problems import digest_of, kind_of, problem_of
from postern.compare.training import shared_rate
from postern.compare.transformer import Transformer
from postern.data import load_own_splits
from postern.experts import MixtureOfExperts, TemperatureGate
from postern.papers import find


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = "the cat sat on the mat . the dog ate the cat ; a bird saw it all , and sang . " * 160
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text(words)
    return str(path)


def setting(contest: Contest, data: str, steps: int = 2) -> Setting:
    splits = load_own_splits(data)
    names = tuple(member.name for member in contest.members)
    return Setting(data, kind_of(splits), digest_of(splits), None, names, steps, (3e-3,))


@pytest.mark.parametrize("family", compare.FAMILIES)
@pytest.mark.parametrize("data", ["wine", "digits", "text"])
def test_every_member_that_suits_trains_and_is_timed(family: str, data: str, text_file: str) -> None:
    contest = compare.find(family)
    chosen = setting(contest, text_file if data == "text" else data)
    if chosen.kind not in contest.task:
        pytest.skip(f"{family} takes no {chosen.kind}, which the command says")
    unsuited = contest.unsuited(chosen)
    names = [name for name in chosen.members if name not in unsuited]
    quality = contest.quality[chosen.kind]
    for name in names:
        metrics = contest.train(name, chosen, Run(seed=0, scale="test"))
        assert {quality.name, "learning_rate"} <= metrics.keys()
        assert 0 <= metrics["accuracy"] <= 1
        if contest.time is not None:  # steps are alike, so that their memory is too
            assert metrics["memory_mib"] > 0
            assert metrics["numbers"] > 100
    assert all(isinstance(why, str) and why for why in unsuited.values())


@pytest.mark.parametrize("family", compare.FAMILIES)
def test_members_are_real(family: str) -> None:
    contest = compare.find(family)
    assert contest.family == family
    assert set(contest.task) == set(contest.quality) <= {"text", "table", "images"}
    for member in contest.members:
        module, _, name = member.part.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name)
        assert not member.paper or member.part in find(member.paper).components


def test_learning_is_not_by_chance() -> None:
    contest = compare.find("heads")
    chosen = setting(contest, "wine", steps=150)
    for name in chosen.members:
        if name in contest.unsuited(chosen):
            continue
        metrics = contest.train(name, chosen, Run(seed=0, scale="test"))
        assert metrics["accuracy"] > 0.8, name


def test_equal_functions_learn_equally() -> None:
    contest = compare.find("softmax")
    chosen = setting(contest, "wine", steps=20)
    found = {
        name: contest.train(name, chosen, Run(seed=0, scale="test"))["cross_entropy"]
        for name in ("softmax", "two-pass", "three-pass", "online", "clipped")
    }
    for name in ("two-pass", "three-pass", "online"):
        assert found[name] == pytest.approx(found["softmax"], rel=1e-3)
    assert found["clipped"] != pytest.approx(found["softmax"], rel=1e-3)


def test_all_are_timed_together() -> None:
    contest = compare.find("heads")
    chosen = setting(contest, "wine")
    names = tuple(name for name in chosen.members if name not in contest.unsuited(chosen))
    assert contest.time is not None
    times = contest.time(replace(chosen, members=names), Run(seed=0, scale="test"))
    assert set(names) == set(times)


def test_attention_is_examined_and_timed_by_length(text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = compare.find("attention")
    monkeypatch.setattr("postern.compare.attention.LENGTHS", (64, 256))
    chosen = replace(setting(contest, text_file), members=("softmax", "linear"))
    run = Run(seed=0, scale="test")
    assert contest.time is not None
    times = contest.time(chosen, run)
    assert set(times) == {"softmax", "linear", "decoding softmax", "decoding linear"}
    assert min(times.values()) > 0
    assert list(run.figures) == ["memory-by-length"]
    rows = {(row["attention"], row["words before"]): row for row in run.tables["by length"]}
    kept = "cache of a layer, KiB"
    assert rows["softmax", 64][kept] == 2 * 64 * 64 * 4 / 1024
    assert rows["softmax", 256][kept] == 4 * rows["softmax", 64][kept]
    assert rows["linear", 256][kept] == rows["linear", 64][kept] == (4 * 16 * 16 + 4 * 16) * 4 / 1024
    for row in run.tables["words a second here"]:
        assert row["in training"] == pytest.approx(16 * 128 / (times[row["attention"]] / 1e3))
        assert row["decoded after 256"] == pytest.approx(1e3 / times[f"decoding {row['attention']}"])
    softmax, linear = (contest.train(name, chosen, run) for name in chosen.members)
    assert 0 < softmax["first_token_attention"] < 1
    assert "first_token_attention" not in linear
    for metrics in (softmax, linear):
        assert metrics["largest_activation"] > 0
        assert metrics["kurtosis"] > 1


def test_attention_on_the_first_token_is_found_out(text_file: str) -> None:
    problem = attention.prepare(problem_of(setting(compare.find("attention"), text_file)))
    learner = Transformer(attention.network("softmax", problem))
    queries = [layer.attention.query for layer in learner.network.layers]
    with torch.no_grad():
        for query in queries:
            query.weight.zero_()
    uniform = attention.examine(learner, problem)["first_token_attention"]
    assert uniform == pytest.approx(sum(1 / (k + 1) for k in range(8, 128)) / 120, rel=1e-4)
    with torch.no_grad():
        learner.network.position.weight[0, 0] = 100.0
        for layer in learner.network.layers:
            layer.attention.key.weight.zero_()
            layer.attention.key.weight[:, 0] = 1.0
            layer.attention.query.bias.fill_(2.0)
    assert attention.examine(learner, problem)["first_token_attention"] > 0.99


def test_data_that_changed_is_not_taken_for_what_was_planned(text_file: str) -> None:
    contest = compare.find("softmax")
    chosen = setting(contest, text_file)
    other = replace(chosen, digest="0")
    with pytest.raises(CannotCompare, match="has changed since the comparison was planned"):
        contest.train("softmax", other, Run(seed=0, scale="test"))


def test_families_without_a_comparison_say_so() -> None:
    with pytest.raises(CannotCompare, match="no comparison of 'sofmax'; did you mean softmax"):
        compare.find("sofmax")
    with pytest.raises(CannotCompare, match="there are: softmax, heads, attention"):
        compare.find("boxes")
    assert [contest.family for contest in compare.contests()] == list(compare.FAMILIES)


def test_routers_are_examined_and_their_temperature_falls(text_file: str) -> None:
    contest = compare.find("experts")
    chosen = setting(contest, text_file, steps=4)
    run = Run(seed=0, scale="test")
    found = {name: contest.train(name, chosen, run) for name in ("dense", "softmax", "switch", "random")}
    assert "load_entropy" not in found["dense"]
    for name, active in (("softmax", 2), ("switch", 1), ("random", 2)):
        assert found[name]["active_experts"] == found[name]["active_experts_in_training"] == active
        assert 0 < found[name]["load_entropy"] <= 1.0001
    assert found["random"]["load_entropy"] > 0.99
    falling = contest.train("dense-to-sparse", chosen, run)
    assert falling["active_experts"] == 2 < falling["active_experts_in_training"] < experts.EXPERTS
    learner = experts.build("dense-to-sparse", experts.prepare(problem_of(chosen)), 1e-3)
    gates = [gate for gate in learner.modules() if isinstance(gate, TemperatureGate)]
    assert len(gates) == experts.LAYERS
    for share, temperature in ((0.0, 2.0), (0.5, 1.15), (1.0, 0.3)):
        learner.set_progress(share)
        assert all(gate.temperature.item() == pytest.approx(temperature) for gate in gates)


def test_experts_at_work_are_counted_in_training_alone(text_file: str) -> None:
    problem = experts.prepare(problem_of(setting(compare.find("experts"), text_file)))
    inputs, target = problem.batches("test")[0]
    learner = experts.build("dense-to-sparse", problem, 1e-3)
    routers = [layer.router for layer in learner.modules() if isinstance(layer, MixtureOfExperts)]
    assert learner.active_in_training == 0
    for sizes in ((8, 4), (2, 2)):
        for router, size in zip(routers, sizes, strict=True):
            router.top_k, router.threshold = size, 0.999
        learner.loss(inputs, target)
    assert learner.active_in_training == 4
    learner.eval()
    learner.loss(inputs, target)
    assert learner.active_in_training == 4


def test_auxiliary_losses_count_in_training_alone(text_file: str) -> None:
    problem = experts.prepare(problem_of(setting(compare.find("experts"), text_file)))
    learner = experts.build("softmax", problem, 1e-3)
    inputs, target = problem.batches("test")[0]
    logits, routings = learner.network.route(inputs)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    expected = plain + sum(routing.auxiliary_loss for routing in routings)
    torch.testing.assert_close(learner.loss(inputs, target), expected)
    torch.testing.assert_close(learner.scores(inputs), logits)


def test_methods_that_compute_less_are_read_at_equal_cost() -> None:
    contest = compare.find("adaptive")
    chosen = setting(contest, "digits", steps=60)
    problem = problem_of(chosen)
    for name in ("narrow", "thresholds", "ftwt"):
        run = Run(seed=0, scale="test")
        torch.manual_seed(0)
        reached = adaptive.Reached.by(adaptive.METHODS[name], adaptive.Workshop(problem, 60, 3e-3, run))
        guess, full = reached.validation[0], reached.validation[1 if name != "narrow" else -1]
        assert guess.macs == 0
        assert full.macs == reached.full_macs
        assert full.accuracy > guess.accuracy + 0.3, name
        metrics = reached.measured()
        for budget in adaptive.BUDGETS:
            place = adaptive.percent(budget)
            assert metrics[f"macs_{place}"] == pytest.approx(budget, abs=0.08), name  # test samples are others
            assert 0 <= metrics[f"accuracy_{place}"] <= 1
            assert metrics[f"time_1_{place}"] > 0
            assert metrics[f"time_64_{place}"] > 0
        assert metrics["accuracy"] == pytest.approx(sum(metrics[f"accuracy_{place}"] for place in (30, 50, 70)) / 3)
        assert metrics["accuracy"] > 0.4, name


def test_what_is_added_to_a_trained_network_is_trained_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(setting(compare.find("adaptive"), "digits"))
    shop = adaptive.Workshop(problem, 60, 3e-3, Run(seed=0, scale="test"))
    rates: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *args: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(adaptive, "PRICES", adaptive.PRICES[:1])
    monkeypatch.setattr(adaptive, "KEEPS", adaptive.KEEPS[:1])
    monkeypatch.setattr(adaptive, "PREDICTOR_RATE", 0.0)
    seen = {}
    for name in ("thresholds", "patience", "jei-dnn", "ftwt"):
        rates.clear()
        torch.manual_seed(0)
        adaptive.METHODS[name](shop)
        seen[name] = [rate for rate in rates if rate]
    assert seen["thresholds"] == seen["patience"] == seen["jei-dnn"]
    assert min(seen["jei-dnn"]) < 0.1 * max(seen["jei-dnn"])
    highest, steps = adaptive.DESCENT_RATE * shop.rate, len(seen["ftwt"])
    assert seen["ftwt"] == pytest.approx([highest * shared_rate(done, steps) for done in range(steps)])


def test_smaller_networks_cost_what_they_may() -> None:
    problem = problem_of(setting(compare.find("adaptive"), "digits"))
    shop = adaptive.Workshop(problem, 1, 1e-3, Run(seed=0, scale="test"))
    full = shop.macs(shop.network())
    for budget in adaptive.SMALLER:
        share = shop.width_for(budget)
        assert shop.macs(shop.network(share)) <= budget * full < shop.macs(shop.network(share + 0.06))


def test_what_chooses_filters_takes_images_alone() -> None:
    contest = compare.find("adaptive")
    assert set(contest.unsuited(setting(contest, "wine"))) == {"pruned", "ftwt"}
    assert contest.unsuited(setting(contest, "digits")) == {}


def test_samples_of_a_sorted_part_are_of_all_classes() -> None:
    problem = problem_of(setting(compare.find("adaptive"), "digits"))
    inputs, target = problem.parts["test"]
    order = target.argsort()
    problem = replace(problem, parts={**problem.parts, "test": (inputs[order], target[order])})
    shops = [adaptive.Workshop(problem, 1, 1e-3, Run(seed=seed, scale="test")) for seed in (0, 1)]
    seen = [shop.evaluated("test")[1] for shop in shops]
    assert len(seen[0][: adaptive.TIMED[1]].unique()) == problem.num_classes
    assert torch.equal(*seen)
