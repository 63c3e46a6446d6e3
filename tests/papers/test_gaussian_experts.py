import math
from dataclasses import replace

import pytest
import torch

from postern.claims import Run, Within
from postern.experts import GaussianMixtureOfExperts, MixtureFit, MixtureParameters, SoftmaxGate
from postern.papers import _gaussian_experts, temperature_gmoe, topk_gating_gmoe
from postern.papers._gaussian_experts import (
    MOST_OUTPUTS,
    SPLIT_OF_TRUTH,
    Errors,
    Fits,
    World,
    _outputs,
    drawn_world,
    replicates,
)

WORLDS = {
    "three": topk_gating_gmoe.THREE_EXPERTS,
    "two": topk_gating_gmoe.TWO_EXPERTS,
    "tempered": temperature_gmoe.SMALL.world("tanh"),
    "drawn": drawn_world(4, 5, 2),
}


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_samples_lie_where_they_should_and_follow_the_truth(world):
    x, y = world.samples(4000, generator(), torch.device("cpu"))
    assert x.abs().max() <= world.half_width
    assert x.abs().max() > 0.99 * world.half_width
    model = world.model()
    assert (y - model.predict_mean(x)).mean().abs() < 5 * y.std() / 4000**0.5
    again = model.sample(x, torch.Generator().manual_seed(1))
    assert abs(model(x, y).mean() - model(x, again).mean()) < 0.1
    torch.testing.assert_close(world.samples(4000, generator(), torch.device("cpu"))[1], y)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_starts_without_noise_are_the_truth(world):
    everyone = tuple(range(world.truth.num_experts))
    start = world.starts(everyone, 1, 0.0, 0.0, generator())[0]
    for found, expected in zip(start, world.truth, strict=True):
        torch.testing.assert_close(found, expected)
    assert world.hellinger(start, world.gate) == 0


@pytest.mark.parametrize(
    ("name", "copies", "kept"),
    [
        ("two", (0, 0, 1), 3),
        ("two", (0, 1, 1), 3),
        ("three", (0, 1, 2, 2), 3),
        ("three", (0, 1, 2, 2, 2), 4),
        ("tempered", (0, 0, 1), None),
        ("tempered", (0, 0, 1, 1, 1), None),
    ],
)
def test_copies_share_the_mass_so_that_the_density_is_the_true_one(name, copies, kept):
    world = WORLDS[name]
    x, y = world.samples(2000, generator(), torch.device("cpu"))
    start = world.starts(copies, 1, 0.0, 0.0, generator())[0]
    assert start.gate_coef[-1] == 0
    assert start.gate_intercept[-1] == 0
    model = GaussianMixtureOfExperts.from_parameters(start, replace(world.gate, top_k=kept))
    torch.testing.assert_close(model.log_prob(x, y), world.model().log_prob(x, y))


def test_copies_with_the_same_k_have_another_density():
    world = WORLDS["two"]
    start = world.starts((0, 0, 1), 1, 0.0, 0.0, generator())[0]
    assert world.hellinger(start, SoftmaxGate(3)) == pytest.approx(0, abs=1e-8)
    assert world.hellinger(start, SoftmaxGate(2)) > 0.1


def test_noise_is_by_how_often_an_expert_is_fitted_and_spares_the_reference():
    world = WORLDS["two"]
    start = world.starts((0, 0, 1), 4000, 0.1, 0.3, generator())
    assert (start.gate_coef[:, -1] == 0).all()
    assert (start.gate_intercept[:, -1] == 0).all()
    assert start.intercept.std(dim=0).tolist() == pytest.approx([0.3, 0.3, 0.1], rel=0.05)
    assert start.variance.log().std(dim=0).tolist() == pytest.approx([0.3, 0.3, 0.1], rel=0.05)


def test_the_distance_is_that_of_shifted_gaussians():
    truth = MixtureParameters([[0.0]], [0.0], [[0.7]], [0.2], [0.25])
    shifted = MixtureParameters([[0.0]], [0.0], [[0.7]], [0.5], [0.25])
    expected = (1 - torch.exp(torch.tensor(-(0.3**2) / (8 * 0.25)))).sqrt().item()
    assert World(truth, SoftmaxGate()).hellinger(shifted, SoftmaxGate()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("shift", "ratio"), [(30.0, 1.0), (0.0, 0.02), (2.0, 0.05), (-40.0, 20.0), (0.1, 30.0)])
def test_the_distance_holds_far_from_the_truth_and_for_narrow_and_wide_fits(shift, ratio):
    """``h^2 = 1 - sqrt(2 s t / (s^2 + t^2)) exp(-shift^2 / (4 (s^2 + t^2)))`` of deviations s and t."""
    truth = MixtureParameters([[0.0]], [0.0], [[0.7]], [0.2], [0.25])
    fitted = MixtureParameters([[0.0]], [0.0], [[0.7]], [0.2 + shift], [0.25 * ratio**2])
    total = 0.25 * (1 + ratio**2)
    expected = (1 - (2 * 0.25 * ratio / total) ** 0.5 * math.exp(-(shift**2) / (4 * total))) ** 0.5
    assert World(truth, SoftmaxGate()).hellinger(fitted, SoftmaxGate()) == pytest.approx(expected, rel=1e-9)


def test_outputs_are_bounded_in_number_and_leave_out_experts_without_weight():
    world, x = WORLDS["two"], torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]

    def outputs(bias, intercept, variance):
        fitted = MixtureParameters([[0.0], [0.0]], [bias, 0.0], [[0.0], [0.0]], [intercept, 0.0], [variance, 0.1])
        return _outputs((GaussianMixtureOfExperts.from_parameters(fitted, SoftmaxGate()), world.model()), x)

    assert outputs(-40.0, 1e6, 1e-6).abs().max() < 10
    assert len(outputs(-40.0, 1e6, 1e-6)) < 1000
    assert outputs(0.0, 1e6, 1e-6).max() > 1e6
    assert len(outputs(0.0, 1e6, 1e-6)) == MOST_OUTPUTS
    assert outputs(0.0, 0.0, 1e-4).diff().max() < 0.5 * 1e-2


def test_the_temperature_of_a_start_is_noisy_too():
    config = temperature_gmoe.Study((500, 1000), 1, starts=4000)
    starts = temperature_gmoe._starts(config.world("tanh"), config, generator())
    assert starts.temperature.log().mean().item() == pytest.approx(-0.693, abs=0.02)
    assert starts.temperature.log().std().item() == pytest.approx(0.3, rel=0.05)


def test_the_start_at_the_truth_counts_where_it_ends_higher():
    world, gate = WORLDS["two"], SoftmaxGate(3)
    x, y = world.samples(500, generator(), torch.device("cpu"))
    truth = world.starts((0, 0, 1), 1, 0.0, SPLIT_OF_TRUTH, generator())
    b1, b0, a, b, v, tau = (value.clone() for value in truth)
    stuck = MixtureParameters(0 * b1, 0 * b0, a[:, :1].expand_as(a), b[:, :1].expand_as(b), v[:, :1].expand_as(v), tau)
    fits = Fits()
    found = fits.best(x, y, stuck, truth, gate)  # experts that are all equal stay so
    assert fits.gains[0] > 0.1
    assert fits.metrics() == {"truth_start_share": 1.0, "missed_likelihood": fits.gains[0]}
    again = fits.best(x, y, truth, stuck, gate)
    torch.testing.assert_close(again.log_likelihood, found.log_likelihood)
    assert fits.gains[1] == pytest.approx(-fits.gains[0])
    assert fits.metrics()["truth_start_share"] == 0.5
    fits.best(x, y, truth, truth, gate)
    assert fits.metrics()["truth_start_share"] == pytest.approx(1 / 3)
    likelihood = GaussianMixtureOfExperts.from_parameters(found.parameters, gate)(x, y).mean()
    torch.testing.assert_close(likelihood, found.log_likelihood)


@pytest.mark.parametrize("gain", [-1e-10, 1e-10, 1e-8])
def test_the_likelier_fit_counts_however_small_its_gain(monkeypatch, gain):
    world = WORLDS["two"]
    x, y = world.samples(100, generator(), torch.device("cpu"))
    near, at = (world.starts((0, 1), 1, noise, 0.0, generator()) for noise in (0.1, 0.0))

    def fit(x, y, starts, gate, **settings):
        reached = torch.tensor(gain if starts is at else 0.0, dtype=torch.float64)
        return MixtureFit(starts[0], reached, torch.tensor(1), torch.tensor(True))

    monkeypatch.setattr(_gaussian_experts, "fit_to_the_end", fit)
    fits = Fits()
    assert float(fits.best(x, y, near, at, world.gate).log_likelihood) == max(gain, 0.0)
    assert fits.metrics()["truth_start_share"] == (gain > 1e-9)


def test_blocks_tell_copies_from_single_experts_and_leave_out_the_reference():
    truth = WORLDS["three"].truth
    index = torch.tensor([0, 1, 2, 2])
    moved = MixtureParameters(*(value[index].clone() for value in list(truth)[:5]), truth.temperature)
    for value, shift in zip(moved, (0.1, 0.0, 0.2, 0.3, 0.4), strict=False):
        value[:2] += shift
        value[2] += 3 * shift
    errors = Errors((100,))
    errors.add_by_block(100, moved, truth, (0, 1, 2, 2))
    found = errors.last()
    for name, shift in zip(topk_gating_gmoe.BLOCKS, (0.1, 0.2, 0.3, 0.4), strict=True):
        assert found[f"single_{name}_last"] == pytest.approx(shift)
        assert found[f"copies_{name}_last"] == pytest.approx(1.5 * shift)
    errors = Errors((100,))
    world = WORLDS["two"]
    start = world.starts((0, 0, 1), 1, 0.1, 0.3, generator())[0]
    errors.add_by_block(100, start, world.truth, (0, 0, 1))
    assert "single_gate_coef" not in errors.found
    assert "single_coef" in errors.found


def test_errors_have_the_slopes_of_their_medians():
    errors = Errors((100, 1000))
    for size in (100, 1000):
        for factor in (1.0, 1.0, 50.0):
            errors.add("density", size, factor * size**-0.5)
        errors.add("none", size, 0.0)
    assert errors.slopes()["density_slope"] == pytest.approx(-0.5)
    assert errors.last()["density_last"] == pytest.approx(1000**-0.5)
    assert errors.rate("none").slope == pytest.approx(0)
    first, second = errors.rows({"density": -0.5})
    assert first["theorem"] == -0.5
    assert second["theorem"] == "none"


def test_replicates_are_independent_and_repeatable():
    world, run = WORLDS["three"], Run(seed=3, scale="smoke")
    found = [y for _, _, _, y, _ in replicates(run, world, (50, 60), 2)]
    again = [y for _, _, _, y, _ in replicates(run, world, (50, 60), 2)]
    assert [len(y) for y in found] == [50, 60, 50, 60]
    for first, second in zip(found, again, strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.allclose(found[0], found[2])


def test_the_drawn_truth_keeps_its_reference_at_zero():
    truth = WORLDS["drawn"].truth
    assert (truth.gate_coef[-1] == 0).all()
    assert truth.gate_intercept[-1] == 0
    assert isinstance(WORLDS["drawn"].model(), GaussianMixtureOfExperts)


@pytest.mark.parametrize(
    ("name", "error", "kind", "low", "high"),
    [
        ("exact-parametric-rate", "hellinger", "slope", -0.6, -0.4),
        ("exact-parametric-rate", "parameters", "slope", -0.65, -0.35),
        ("sparsity-costs-no-rate", "hellinger", "difference", -0.15, 0.15),
        ("sparsity-costs-no-rate", "parameters", "difference", -0.15, 0.15),
    ],
)
def test_several_mixtures_are_judged_by_both_extremes_and_one_by_itself(name, error, kind, low, high):
    criterion = topk_gating_gmoe.PAPER.claims[name].holds_when
    middle = (low + high) / 2

    def seeds(values):
        return [
            dict.fromkeys(criterion.metrics(), middle) | topk_gating_gmoe._extremes(f"{error}_{kind}", each)
            for each in values
        ]

    for shift in (-0.12, 0.0, 0.12):
        for scale in (0.001, 0.1):
            one = [middle + shift * (high - low) / 0.2 + scale * noise for noise in (-1.0, 0.0, 0.5, 1.0)]
            within = Within("value", low, high).judge([{"value": value} for value in one])
            assert criterion.judge(seeds([[value] for value in one])).verdict == within.verdict
    apart = [[low - 0.01, high + 0.01, middle], [middle, low - 0.02, high + 0.02]]
    assert criterion.judge(seeds(apart * 3)).verdict == "refuted"
