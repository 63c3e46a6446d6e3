"""Layers in the common form and back: outputs are equal in float64, and what has no such form is refused."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from postern.attention import ClippedSoftmaxAttention, LinearAttention, NormalizedAttention, SelfAttention
from postern.dynamics import (
    QLSTM,
    AttentionForm,
    LinearTimeVarying,
    S6Mixer,
    SSDForm,
    SSDMixer,
    TiedRecurrence,
    couple,
    coupling_residuals,
    linear_attention_form,
    linear_vs_ssd_gap,
    tie,
    to_linear_attention,
    to_normalized_attention,
    to_ssd,
    to_state_space,
)

LAYERS = {
    "linear": lambda: LinearAttention(6, 2, key_dim=4, is_causal=True),
    "linear, shared keys": lambda: LinearAttention(6, 3, num_kv_heads=1, is_causal=True, bias=False),
    "linear, rotated": lambda: LinearAttention(6, 1, key_dim=4, is_causal=True, rotary_base=50.0),
    "normalised": lambda: NormalizedAttention(6, 3, key_dim=4, is_causal=True),
    "without normaliser": lambda: NormalizedAttention(6, 1, is_causal=True, normaliser="constant", bias=False),
    "s6": lambda: S6Mixer(6, 3, conv_width=None, bias=True),
    "s6 without gate": lambda: S6Mixer(6, 3, inner_dim=4, conv_width=None, is_gated=False),
    "ssd": lambda: SSDMixer(6, 2, 3, conv_width=None, bias=True),
    "ssd without gate": lambda: SSDMixer(6, 2, 3, inner_dim=8, conv_width=None, is_gated=False),
    "qlstm": lambda: QLSTM(6, 5, conv_width=None),
    "qlstm, sigmoid": lambda: QLSTM(6, 5, conv_width=None, has_reversed_gate=False),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def random_layer(name):
    """With transitions that differ from token to token."""
    layer = LAYERS[name]().double()
    for key, parameter in layer.named_parameters():
        if key == "step.bias" or (parameter.dim() == 2 and key != "log_rate"):
            torch.nn.init.normal_(parameter, std=0.5)
    return layer


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# -- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("realisation", ["output", "transition"])
def test_the_common_form_computes_what_the_layer_does(name, realisation):
    layer, x = random_layer(name), drawn(2, 24, 6)
    system = to_state_space(layer, x, realisation=realisation)
    close(system.run(x), layer(x))
    offset = 0 if system.offset is None else system.offset
    close(torch.einsum("bijow,bjw->bio", system.unroll(), x) + offset, layer(x))
    if not torch.equal(system.A, torch.ones_like(system.A)):
        assert (replace(system, A=system.A.roll(1, 1)).run(x) - layer(x)).abs().max() > 1e-3


def test_gradients_pass_through_the_common_form():
    layer, x = random_layer("s6"), drawn(1, 7, 6)
    parameters = list(layer.parameters())
    close(
        torch.autograd.grad(to_state_space(layer, x).run(x).square().sum(), parameters),
        torch.autograd.grad(layer(x).square().sum(), parameters),
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_truncated_softmax_comes_near_softmax(heads):
    layer = SelfAttention(6, heads, num_kv_heads=1, is_causal=True, has_qk_norm=heads == 1).double()
    x = drawn(2, 12, 6)
    errors = [(to_state_space(layer, x, order=order).run(x) - layer(x)).abs().max().item() for order in (0, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-1] < 1e-2


def test_what_has_no_common_form_is_refused():
    x = drawn(1, 4, 6)
    with pytest.raises(ValueError, match="LinearAttention is not causal"):
        to_state_space(LinearAttention(6, 1).double(), x)
    with pytest.raises(ValueError, match=r"keeps earlier tokens.*S6Mixer with conv_width=None"):
        to_state_space(S6Mixer(6).double(), x)
    with pytest.raises(ValueError, match="got None for SelfAttention"):
        to_state_space(SelfAttention(6, 1, is_causal=True).double(), x)
    with pytest.raises(ValueError, match="got 2 for QLSTM"):
        to_state_space(QLSTM(6).double(), x, order=2)
    with pytest.raises(ValueError, match="without another normaliser"):
        to_state_space(ClippedSoftmaxAttention(6, 1, alpha=1.0, length=8, is_causal=True).double(), x, order=2)
    with pytest.raises(TypeError, match="no common form is known of Linear"):
        to_state_space(torch.nn.Linear(6, 6), x)
    with pytest.raises(ValueError, match=r"\[batch, time, 6\], got \[1, 4, 5\]"):
        to_state_space(QLSTM(6), drawn(1, 4, 5))
    with pytest.raises(ValueError, match="'output' or 'transition', got 'input'"):
        to_state_space(LinearAttention(6, 1, is_causal=True).double(), x, realisation="input")


# -- the form -------------------------------------------------------------------------------------------------------


def test_the_form_is_its_equations():
    time, states, width, out = 5, 4, 3, 2
    system = LinearTimeVarying(
        drawn(time, states),
        drawn(time, states, width),
        drawn(time, out, states),
        drawn(time, out, width),
        drawn(time, out),
    )
    u, h = drawn(time, width), drawn(states)
    start, outputs = h, []
    for i in range(time):
        h = torch.diag(system.A[i]) @ h + system.B[i] @ u[i]
        outputs.append(system.C[i] @ h + system.D[i] @ u[i] + system.offset[i])
    close(system.run(u, start), torch.stack(outputs))
    phi = system.unroll()
    close(phi[4, 1], system.C[4] @ torch.diag(system.A[2] * system.A[3] * system.A[4]) @ system.B[1])
    close(phi[2, 2], system.C[2] @ system.B[2] + system.D[2])
    assert (phi[1, 2:] == 0).all()
    before, behind = drawn(width, 7), drawn(time, 6, out)
    projected = system.project(input=before, output=behind)
    inputs = drawn(time, 7)
    close(projected.run(inputs), (behind @ system.run(inputs @ before.T)[..., None])[..., 0])
    close(LinearTimeVarying.parallel([system, system]).run(u), 2 * system.run(u))
    assert (system.time, system.num_states, system.width, system.out) == (time, states, width, out)


def test_effective_attention():
    query, key, value, eta = drawn(8, 3), drawn(8, 3), drawn(5, 4), drawn(8).exp()
    system = AttentionForm(query, key, value, eta).recurrence("transition").system()
    weights = (query @ key.T).tril() / eta[:, None]
    close(system.effective_attention(value), weights)
    close(system.effective_attention(), weights.abs() * value.norm())
    with pytest.raises(ValueError, match=r"no multiples of the values' matrix: off by"):
        system.effective_attention(drawn(5, 4))
    with pytest.raises(ValueError, match=r"shape \[5, 4\], got \[4, 5\]"):
        system.effective_attention(value.T)


def test_the_form_rejects_shapes_that_do_not_fit():
    A, B, C = drawn(3, 4), drawn(3, 4, 2), drawn(3, 5, 4)
    with pytest.raises(ValueError, match=r"got \[3, 4\], \[3, 3, 2\] and \[3, 5, 4\]"):
        LinearTimeVarying(A, B[:, 1:], C)
    with pytest.raises(ValueError, match=r"D has the shape \[3, 5, 2\], got \[3, 2, 5\]"):
        LinearTimeVarying(A, B, C, drawn(3, 2, 5))
    with pytest.raises(ValueError, match=r"offset has the shape \[3, 5\], got \[5\]"):
        LinearTimeVarying(A, B, C, None, drawn(5))
    with pytest.raises(ValueError, match=r"inputs have the shape \[3, 2\], got \[2, 2\]"):
        LinearTimeVarying(A, B, C).run(drawn(2, 2))
    with pytest.raises(ValueError, match="parallel systems"):
        LinearTimeVarying.parallel([])


# -- and back -------------------------------------------------------------------------------------------------------


def positive_form(time=12, expansion=3):
    return linear_attention_form(F.elu(drawn(time, expansion)) + 1, F.elu(drawn(time, expansion)) + 1, drawn(4, 5))


def outputs(form, u):
    return form.recurrence().system().run(u)


@pytest.mark.parametrize("realisation", ["output", "transition"])
def test_linear_attention_comes_back(realisation):
    form, u = positive_form(), drawn(12, 5)
    found = to_linear_attention(form.recurrence(realisation))
    for name in ("query", "key", "value", "normaliser"):
        close(getattr(found, name), getattr(form, name))
    tied = tie(form.recurrence(realisation).system(), value=form.value)
    close(tied.system().run(u), outputs(form, u))
    if realisation == "transition":  # else the normaliser is in the queries
        free = to_linear_attention(tied, keeps_keys=False)
        close(outputs(free, u), outputs(form, u))
        ratio = free.normaliser / form.normaliser
        close(ratio, ratio[:1].expand(12))
        known = to_linear_attention(tie(form.recurrence(realisation).system(), value=form.value, key=form.key))
        close(known.normaliser, form.normaliser)


def test_normalised_attention_comes_back_and_is_no_linear_attention():
    eta = drawn(12).exp()
    form = AttentionForm(drawn(12, 3), drawn(12, 3), drawn(4, 5), eta)
    close(to_normalized_attention(form.recurrence("transition")).normaliser, eta)
    with pytest.raises(ValueError, match=r"do not sum to 1: the residual is"):
        to_linear_attention(form.recurrence())


def test_ssd_comes_back():
    u = drawn(12, 5)
    form = SSDForm(drawn(12, 3), drawn(12, 3), drawn(4, 5), F.softplus(drawn(12)), 0.7)
    found = to_ssd(form.recurrence())
    close(found.step, form.step)
    assert found.rate == pytest.approx(0.7, rel=1e-12)
    tied = tie(form.recurrence().system())
    assert tied.value.norm() == pytest.approx(1.0)
    free = to_ssd(tied, keeps_keys=False, rate=2.0)
    close(outputs(free, u), outputs(form, u))
    close(free.step[1:], form.step[1:] * 0.7 / 2)
    known = to_ssd(tie(form.recurrence().system(), value=form.value, key=form.key))
    close(known.step, form.step)


def test_keys_that_may_change_make_ssd_of_attention_and_attention_of_ssd():
    u = drawn(12, 5)
    growing = AttentionForm(drawn(12, 3), drawn(12, 3), drawn(4, 5), drawn(12).exp().cumsum(0))
    close(outputs(to_ssd(growing.recurrence("transition"), keeps_keys=False), u), outputs(growing, u))
    ssd = SSDForm(drawn(12, 3), drawn(12, 3), drawn(4, 5), F.softplus(drawn(12)), 0.7)
    close(outputs(to_normalized_attention(ssd.recurrence(), keeps_keys=False), u), outputs(ssd, u))


def test_keys_that_stay_ask_for_the_coupling_equations():
    query, key, value, u = drawn(12, 3), drawn(12, 3), drawn(4, 5), drawn(12, 5)
    eta, step = couple(0.4, 0.9, 12)
    attention, ssd = AttentionForm(query, key, value, eta), SSDForm(query, key, value, step, 0.9)
    close(outputs(attention, u), outputs(ssd, u))
    close(to_ssd(attention.recurrence("transition")).step, step)
    close(to_normalized_attention(ssd.recurrence()).normaliser, eta)
    other = AttentionForm(query, key, value, eta + torch.arange(12) / 12)
    assert (outputs(other, u) - outputs(ssd, u)).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"no rate gives the transitions.*the residual is [\d.e-]+, more than 1e-06"):
        to_ssd(other.recurrence("transition"))
    with pytest.raises(ValueError, match=r"not eta_\{i-1\} / eta_i.*the residual is"):
        to_normalized_attention(replace(ssd, step=step * torch.linspace(1, 1.1, 12)).recurrence())
    with pytest.raises(ValueError, match="between 0 and 1, got"):
        to_ssd(AttentionForm(query, key, value, 1 / eta).recurrence("transition"))
    with pytest.raises(ValueError, match="rate is positive, got 0"):
        to_ssd(ssd.recurrence(), rate=0)


def test_what_is_not_tied_is_refused_with_its_distance():
    tied = positive_form().recurrence("transition").system()
    with pytest.raises(ValueError, match="share no transition: the residual is"):
        tie(replace(tied, A=tied.A * torch.linspace(1, 1.1, 12)))
    with pytest.raises(ValueError, match="not read by the same query"):
        tie(replace(tied, C=tied.C.roll(1, -1)))
    with pytest.raises(ValueError, match="do not come apart"):
        tie(replace(tied, B=drawn(*tied.B.shape)))
    with pytest.raises(ValueError, match="do not come apart"):
        tie(tied, value=drawn(4, 5))
    with pytest.raises(ValueError, match="without the matrix of the values"):
        tie(tied, key=drawn(12, 3))
    with pytest.raises(ValueError, match="reach the output without the state"):
        tie(replace(tied, D=drawn(12, 4, 5)))
    with pytest.raises(ValueError, match="13 states cannot be shared evenly by 4"):
        tie(LinearTimeVarying(drawn(2, 13), drawn(2, 13, 5), drawn(2, 4, 13)))
    with pytest.raises(ValueError, match="positive transitions and scales"):
        to_normalized_attention(replace(positive_form().recurrence("transition"), transition=-torch.ones(12).double()))


def test_an_s6_layer_is_not_tied_and_a_head_of_ssd_is():
    x = drawn(1, 9, 6)
    with pytest.raises(ValueError, match="share no transition"):
        tie(
            replace(to_state_space(S6Mixer(6, 3, conv_width=None, is_gated=False).double(), x), D=None).project(
                output=torch.eye(6).double()
            )
        )
    recurrence = SSDForm(drawn(1, 9, 3), drawn(1, 9, 3), drawn(6, 6), F.softplus(drawn(1, 9)), 1.0).recurrence()
    assert isinstance(tie(recurrence.system()), TiedRecurrence)


# -- coupling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1e-6, 0.3, 5.0])
@pytest.mark.parametrize("rate", [0.1, 1.0, 10.0])
def test_couple_solves_its_equations(first, rate):
    eta, step = couple(first, rate, 30)
    close(step[0], torch.tensor(first, dtype=torch.float64))
    close(torch.exp(-rate / eta[1:]) * eta[1:] / eta[:-1], torch.ones(29).double())
    assert coupling_residuals(eta, step, rate).largest < 1e-9
    assert (eta.diff() > 0).all()


def test_couple_takes_a_batch():
    eta, step = couple(torch.tensor([0.1, 0.7]), 1.5, 4)
    assert eta.shape == step.shape == (2, 4)
    close(eta[1], couple(torch.tensor(0.7).double().float(), 1.5, 4)[0])
    with pytest.raises(ValueError, match=r"positive, got 0\.0, 1\.0 and 3"):
        couple(0.0, 1.0, 3)


def test_the_gap_of_two_layers():
    x = drawn(2, 7, 6)
    attention, mixer = random_layer("normalised"), SSDMixer(6, 3, 4, conv_width=None).double()
    gap = linear_vs_ssd_gap(attention, mixer, x)
    assert len(gap) == 3
    eta, step, rate = attention.project(x)[3][:, 1], mixer.steps(x)[..., 1], mixer.log_rate.exp()[1]
    close(gap[1].scale, step - 1 / eta)
    close(gap[1].transition, torch.exp(-rate * step[:, 1:]) - eta[:, :-1] / eta[:, 1:])
    assert gap[1].largest > 0.1
    assert len(linear_vs_ssd_gap(LinearAttention(6, 3, is_causal=True).double(), mixer, x)) == 3
    with pytest.raises(ValueError, match="got 2 and 3"):
        linear_vs_ssd_gap(LinearAttention(6, 2, is_causal=True).double(), mixer, x)
    with pytest.raises(ValueError, match="the former positive"):
        coupling_residuals(-eta, step, 1.0)
