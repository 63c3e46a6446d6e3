import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postern.heads import (
    CandidateSetTransform,
    DesmoothTransform,
    PowerTransform,
    RankTransform,
    TopKTransform,
    TopPTransform,
    UtilityTransform,
    mean_log_likelihood,
    repeats,
)
from tests.modules import check_module

TOKEN_LEVEL = [
    PowerTransform(2.3),
    DesmoothTransform(0.07),
    RankTransform(1.7),
    RankTransform(0.6, "geometric"),
    TopPTransform(0.8),
    TopKTransform(3),
]
UTILITIES = st.lists(st.integers(-5, 5), min_size=1, max_size=6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: PowerTransform(2.0),
        lambda: DesmoothTransform(0.1),
        lambda: RankTransform(1.5),
        lambda: RankTransform(0.5, "geometric"),
        lambda: TopPTransform(0.8),
        lambda: TopKTransform(2),
    ],
)
def test_token_level_transforms_are_modules(build):
    # probabilities, as what is below the floor has the logarithm minus infinity
    check_module(build, torch.randn(3, 2, 5) * 2, call=lambda module, u: module(u).exp())


def test_candidate_set_is_a_module():
    lengths = torch.randint(1, 9, (3, 5))
    check_module(lambda: CandidateSetTransform(0.7, 0.5), torch.randn(3, 5), lengths)


def test_power_is_the_power_of_the_probabilities():
    u = torch.randn(4, 7, dtype=torch.float64)
    powers = u.softmax(-1) ** 2.5
    expected = powers / powers.sum(-1, keepdim=True)
    torch.testing.assert_close(PowerTransform(2.5)(u).exp(), expected)
    torch.testing.assert_close(PowerTransform(2.5)(u.log_softmax(-1) + 3).exp(), expected)
    torch.testing.assert_close(PowerTransform(1)(u), u.log_softmax(-1))


def test_desmoothing_takes_uniform_noise_away_exactly():
    clean = torch.tensor([[0.7, 0.3, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    noisy = 0.8 * clean + 0.2 / 4
    found = DesmoothTransform(0.05 - 1e-9)(noisy.log()).exp()
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-6)
    torch.testing.assert_close(DesmoothTransform(0.0)(noisy.log()), noisy.log())


def test_desmoothing_leaves_the_best_where_nothing_is_above_the_floor():
    p = torch.tensor([[0.4, 0.3, 0.3], [0.35, 0.35, 0.3]])
    found = DesmoothTransform(0.5)(p.log()).exp()
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))


def test_desmoothing_keeps_gradients_finite_at_the_floor():
    u = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    transform = DesmoothTransform(0.1).double()
    assert torch.autograd.gradcheck(lambda u: transform(u).exp(), u)
    # a floor that rounding can hardly tell from the probability
    row = torch.tensor([3.0, 0.0, -1.0], requires_grad=True)
    best = row.detach().softmax(-1)[0].item()
    for ulps in range(-6, 7):
        found = DesmoothTransform(best + ulps * 2.0**-25)(row).exp()
        torch.testing.assert_close(found.detach(), torch.tensor([1.0, 0.0, 0.0]))
        (gradient,) = torch.autograd.grad(found.square().sum(), row)
        assert torch.isfinite(gradient).all()


def test_top_p_keeps_no_more_than_reaches_the_mass():
    equal = torch.zeros(4)
    kept = [(TopPTransform(mass)(equal) > -torch.inf).sum().item() for mass in (0.25, 0.26, 0.5, 0.75, 1.0)]
    assert kept == [1, 2, 2, 3, 4]


def test_rank_laws():
    u = torch.tensor([[3.0, -1.0, 3.0, 0.5]], dtype=torch.float64)
    zipf = torch.tensor([[1.0, 4**-2, 1.0, 3**-2]], dtype=torch.float64)
    torch.testing.assert_close(RankTransform(2.0)(u).exp(), zipf / zipf.sum())
    geometric = torch.tensor([[0.0, -3.0, 0.0, -2.0]], dtype=torch.float64).mul(0.5).softmax(-1)
    torch.testing.assert_close(RankTransform(0.5, "geometric")(u).exp(), geometric)


def test_candidate_set_is_a_softmax_of_utilities_by_length():
    u, lengths = torch.randn(2, 5, dtype=torch.float64), torch.randint(1, 9, (2, 5))
    found = CandidateSetTransform(1.5, 0.5)(u, lengths)
    torch.testing.assert_close(found, (1.5 * u / lengths.double().sqrt()).log_softmax(-1))
    torch.testing.assert_close(CandidateSetTransform()(u, lengths), u.log_softmax(-1))


@pytest.mark.parametrize(
    ("transform", "warper"),
    [(TopPTransform(p), f"TopPLogitsWarper:{p}") for p in (0.3, 0.8, 0.95)]
    + [(TopKTransform(k), f"TopKLogitsWarper:{k}") for k in (1, 3, 50)],
    ids=str,
)
def test_truncations_are_those_of_transformers(transform, warper):
    transformers = pytest.importorskip("transformers")
    name, setting = warper.split(":")
    scores = torch.randn(50, 11, generator=torch.Generator().manual_seed(0))
    theirs = getattr(transformers, name)(float(setting) if "." in setting else int(setting))(None, scores)
    torch.testing.assert_close(transform(scores), theirs.log_softmax(-1))


@pytest.mark.parametrize("transform", TOKEN_LEVEL, ids=repr)
@given(UTILITIES, st.floats(-50, 50))
def test_order_stays_mass_is_one_and_shifts_do_not_matter(transform, row, shift):
    u = torch.tensor([row], dtype=torch.float64)
    log_probabilities = transform(u)
    assert log_probabilities.exp().sum().item() == pytest.approx(1)
    above, equal = u[0][:, None] > u[0], u[0][:, None] == u[0]
    difference = log_probabilities[0].exp()[:, None] - log_probabilities[0].exp()
    assert (difference[above] >= 0).all()
    if not isinstance(transform, TopPTransform):
        torch.testing.assert_close(difference[equal], torch.zeros_like(difference[equal]))
    if isinstance(transform, PowerTransform | RankTransform):
        assert (difference[above] > 0).all()
    torch.testing.assert_close(transform(u + shift).exp(), log_probabilities.exp())


@given(st.permutations(range(6)))
def test_ranks_are_all_that_the_rank_transform_sees(order):
    u = torch.tensor(order, dtype=torch.float64)
    for g in (torch.exp, lambda v: v**3, lambda v: 0.001 * v):
        assert torch.equal(RankTransform(1.3)(g(u)), RankTransform(1.3)(u))


@pytest.mark.parametrize("transform", TOKEN_LEVEL, ids=repr)
def test_excluded_outcomes_stay_excluded(transform):
    u = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]])
    found = transform(u)
    assert (found[0, [1, 3]] == -torch.inf).all()
    torch.testing.assert_close(found[:, [0, 2]], transform(u[:, [0, 2]]))
    assert not found.isnan().any()


def test_half_precision_stays_half_precision():
    u = torch.randn(3, 5).bfloat16()
    for transform in TOKEN_LEVEL:
        assert transform(u).dtype == torch.bfloat16


def test_repeats_are_later_copies():
    candidates = torch.tensor([[[1, 2], [1, 3], [1, 2], [1, 2]], [[0, 0], [0, 0], [1, 1], [0, 1]]])
    assert repeats(candidates).tolist() == [[False, False, True, True], [False, True, False, False]]


# -- fitting --------------------------------------------------------------------------------------------------------


def test_likelihood_is_minus_cross_entropy():
    u, target = torch.randn(5, 3, 4), torch.randint(4, (5, 3))
    expected = -torch.nn.functional.cross_entropy(u.flatten(0, 1), target.flatten()).item()
    assert mean_log_likelihood(PowerTransform(), (u, target)) == pytest.approx(expected)


def test_power_finds_the_temperature_that_the_data_was_made_with():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(20_000, 6, generator=generator)
    target = torch.multinomial((1.7 * u).softmax(-1), 1, generator=generator)[:, 0]
    transform = PowerTransform().fit((u, target))
    assert transform.value == pytest.approx(1.7, abs=0.05)
    # the likelihood is concave in beta: its derivative, E[u_y] - E_P[u], is zero at the fit
    slope = u.gather(1, target[:, None])[:, 0].mean() - (transform(u).exp() * u).sum(-1).mean()
    assert abs(slope.item()) < 1e-3


def test_desmoothing_finds_the_noise():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(20_000, 6, generator=generator).mul(2).softmax(-1)
    target = torch.multinomial(clean, 1, generator=generator)[:, 0]
    noisy = 0.7 * clean + 0.3 / 6
    transform = DesmoothTransform().fit((noisy.log(), target), grid=[0.0, 0.02, 0.03, 0.04, 0.045, 0.0499, 0.06])
    assert transform.value == pytest.approx(0.05, abs=0.002)


def test_ranks_and_candidate_sets_find_their_laws():
    generator = torch.Generator().manual_seed(0)
    u, lengths = torch.randn(20_000, 5, generator=generator), torch.randint(1, 9, (20_000, 5), generator=generator)
    for truth, inputs in (
        (RankTransform(1.3), (u,)),
        (RankTransform(0.8, "geometric"), (u,)),
        (CandidateSetTransform(2.5, 0.5), (u, lengths)),
    ):
        target = torch.multinomial(truth(*inputs).exp(), 1, generator=generator)[:, 0]
        start = RankTransform(1.0, truth.law) if isinstance(truth, RankTransform) else CandidateSetTransform()
        fitted = start.fit((*inputs, target))
        assert fitted.value == pytest.approx(truth.value, rel=0.05)
        if isinstance(fitted, CandidateSetTransform):
            assert fitted.length_power.item() == 0.5


def test_a_metric_chooses_from_the_grid_and_the_gentlest_of_equals():
    seen = []

    def metric(transform: UtilityTransform, validation: str) -> float:
        seen.append((validation, transform.value))
        return -abs(transform.value - 2.1)

    assert PowerTransform().fit("data", metric, grid=[1.0, 2.0, 3.0]).value == 2.0
    assert seen == [("data", 1.0), ("data", 2.0), ("data", 3.0)]
    seen.clear()
    refined = PowerTransform().fit("data", metric, grid=[1.0, 2.0, 3.0], refinements=25)
    assert len(seen) == 3 + 25
    assert refined.value == pytest.approx(2.1, abs=1e-3)
    assert PowerTransform().fit(None, lambda *_: 0.0, grid=[1.0, 2.0]).value == 1.0
    minus = DesmoothTransform().fit(None, lambda t, _: t.value if t.value < 0.5 else -math.inf, grid=[0.1, 0.4, 0.6])
    assert minus.value == pytest.approx(0.4)


def test_the_fitted_number_is_saved_and_shown():
    fitted = CandidateSetTransform(2.0, 0.5)
    loaded = CandidateSetTransform()
    loaded.load_state_dict(fitted.state_dict())
    assert (loaded.value, loaded.length_power.item()) == (2.0, 0.5)
    assert repr(RankTransform(2.0, "geometric")) == "RankTransform(exponent=2, law='geometric')"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PowerTransform(0.0), "got 0.0"),
        (lambda: PowerTransform(math.inf), "inf"),
        (lambda: PowerTransform().set_value(-1), "got -1"),
        (lambda: DesmoothTransform(1.0), r"\[0, 1\), got 1.0"),
        (lambda: RankTransform(-0.1), "got -0.1"),
        (lambda: RankTransform(math.nan), "nan"),
        (lambda: RankTransform(law="linear"), "'linear'"),
        (lambda: TopPTransform(0.0), "got 0.0"),
        (lambda: TopPTransform(1.1), "got 1.1"),
        (lambda: TopKTransform(0), "got 0"),
        (lambda: TopKTransform(1.5), "got 1.5"),
        (lambda: CandidateSetTransform(1.0, -1.0), "got -1.0"),
        (lambda: CandidateSetTransform()(torch.zeros(2, 3), torch.ones(3)), r"\[3\]"),
        (lambda: PowerTransform()(torch.tensor(1.0)), r"\[\]"),
        (lambda: DesmoothTransform()(torch.zeros(2, 0)), r"\[2, 0\]"),
        (lambda: RankTransform()(torch.zeros(2, 3, dtype=torch.long)), "int64"),
        (lambda: repeats(torch.zeros(3, dtype=torch.long)), r"\[3\]"),
        (lambda: PowerTransform().fit((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), grid=[]), r"\[\]"),
        (lambda: PowerTransform().fit(None, lambda *_: 0.0, grid=[2.0, 1.0]), "ascends"),
        (lambda: PowerTransform().fit(None, lambda *_: 0.0, grid=[0.0, 1.0]), "got 0.0"),
        (lambda: PowerTransform().fit(None, lambda *_: math.nan), "NaN at 0.5"),
        (lambda: PowerTransform().fit(None, lambda *_: -math.inf), "minus infinity"),
        (lambda: PowerTransform().fit((torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))), r"\[3\]"),
        (lambda: CandidateSetTransform().fit(None, length_powers=()), "none"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
