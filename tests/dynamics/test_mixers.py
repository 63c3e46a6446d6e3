"""S6, SSD, qLSTM and their parts against loops; what every layer must do is in tests/attention/test_layers.py."""

import math

import pytest
import torch
from torch.nn import functional as F

from postern.attention import lightning_attention
from postern.dynamics import (
    QLSTM,
    RecurrentState,
    S6Mixer,
    ShortConvolution,
    SSDMixer,
    decaying_attention,
    reversed_sigmoid,
    selective_scan,
)
from tests.modules import check_module


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def s6_by_loop(u, step, rate, key, query, skip, state):
    outputs = []
    for t in range(u.shape[1]):
        pushed = (step[:, t] * u[:, t])[..., None] * key[:, t, None]
        state = torch.exp(-step[:, t, :, None] * rate) * state + pushed
        outputs.append((state * query[:, t, None]).sum(-1) + skip * u[:, t])
    return torch.stack(outputs, 1), state


def s6_arguments(time):
    return [
        drawn(2, time, 3), F.softplus(drawn(2, time, 3)), drawn(3, 4).exp(), drawn(2, time, 4), drawn(2, time, 4),
        drawn(3), drawn(2, 3, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["sequential", "associative"])
def test_the_selective_scan_is_its_loop(method):
    arguments = [x.requires_grad_() for x in s6_arguments(11)]
    found, expected = selective_scan(*arguments, method=method), s6_by_loop(*arguments)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found[0].square().sum() + found[1].sum(), arguments),
        torch.autograd.grad(expected[0].square().sum() + expected[1].sum(), arguments),
    )


def decaying_by_definition(query, key, value, log_decay, state):
    passed = log_decay.cumsum(-1)
    within = (passed[..., :, None] - passed[..., None, :]).exp().tril()
    outputs = (query @ key.mT * within) @ value
    return outputs + passed.exp()[..., None] * (query @ state)


@pytest.mark.parametrize("time", [1, 7, 16, 37])
@pytest.mark.parametrize("heads", [1, 3])
def test_decaying_attention_is_its_definition(time, heads):
    arguments = [
        drawn(2, heads, time, 4), drawn(2, heads, time, 4), drawn(2, 3, time, 5), -drawn(2, 3, time).exp(),
        drawn(2, 3, 4, 5),
    ]  # fmt: skip
    arguments = [x.requires_grad_() for x in arguments]
    found, last = decaying_attention(*arguments, block=8)
    expected = decaying_by_definition(*arguments)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), arguments, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), arguments),
    )
    again, _ = decaying_attention(*(x[:, :, :1] for x in arguments[:4]), last, block=8)
    doubled = [torch.cat([x, x[:, :, :1]], 2) for x in arguments[:4]]
    torch.testing.assert_close(again, decaying_attention(*doubled, arguments[4])[0][:, :, -1:])


def test_decays_that_do_not_differ_are_lightning_attentions_slopes():
    query, key, value, slopes = drawn(2, 3, 70, 4), drawn(2, 3, 70, 4), drawn(2, 3, 70, 5), torch.tensor([0.0, 0.1, 2])
    found = decaying_attention(query, key, value, -slopes.double()[:, None].expand(2, 3, 70))
    torch.testing.assert_close(found, lightning_attention(query, key, value, slopes))


def test_strong_decays_neither_overflow_nor_give_nan():
    query = drawn(1, 1, 200, 4).float().requires_grad_()
    output, _ = decaying_attention(query, query, query, torch.full((1, 1, 200), -80.0))
    output.sum().backward()
    assert output.isfinite().all()
    assert query.grad.isfinite().all()


def test_decaying_attention_rejects_empty_blocks_and_sequences():
    x = drawn(1, 1, 3, 2)
    with pytest.raises(ValueError, match="got 0 and 3"):
        decaying_attention(x, x, x, x[..., 0], block=0)
    with pytest.raises(ValueError, match="got 64 and 0"):
        decaying_attention(x[:, :, :0], x[:, :, :0], x[:, :, :0], x[:, :, :0, 0])


def test_the_convolution_is_torchs_and_goes_on_from_its_cache():
    module, x = ShortConvolution(5, 4).double(), drawn(2, 9, 5)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), module.weight[:, None], module.bias, groups=5).mT
    torch.testing.assert_close(module(x), expected)
    cache = RecurrentState()
    pieces = [module(piece, cache) for piece in x.split([1, 2, 5, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected)
    assert ShortConvolution(5, 1).double()(x, RecurrentState()).shape == x.shape
    check_module(lambda: ShortConvolution(3), torch.randn(2, 6, 3), compile=False)  # the mixers compile it
    with pytest.raises(ValueError, match="at least 1, got 5 and 0"):
        ShortConvolution(5, 0)


def test_the_reversed_sigmoid_is_what_s6_keeps_of_its_state():
    logits, exponent = 20 * drawn(1000), 3 * torch.rand(1000, dtype=torch.float64)
    torch.testing.assert_close(
        reversed_sigmoid(logits, exponent), torch.sigmoid(-logits) ** exponent, rtol=1e-13, atol=0
    )
    torch.testing.assert_close(
        reversed_sigmoid(logits, exponent), torch.exp(-exponent * torch.logaddexp(logits, torch.zeros(())))
    )


def test_the_gates_of_the_qlstm():
    x = drawn(1, 3, 4)
    plain, reversed_ = QLSTM(4, has_reversed_gate=False).double(), QLSTM(4).double()
    assert plain.exponent is None
    z = plain.input(x)
    forget, enter, leave = plain.gates(z).chunk(3, -1)
    torch.testing.assert_close(plain.gates_of(z), (forget.sigmoid(), enter.sigmoid(), leave.sigmoid()))
    reversed_.load_state_dict(plain.state_dict() | {"exponent": torch.tensor(2.5)})
    torch.testing.assert_close(reversed_.gates_of(z)[0], torch.sigmoid(-forget) ** 2.5)
    reversed_.load_state_dict(plain.state_dict() | {"exponent": torch.tensor(-1.0)})
    assert (reversed_.gates_of(z)[0] == 1).all()


@pytest.mark.parametrize(("layer", "size"), [(S6Mixer(8, 5, inner_dim=6), 30), (SSDMixer(8, 2, 5), 40), (QLSTM(8), 16)])
def test_the_cache_holds_the_state_and_does_not_grow(layer, size):
    cache = layer.new_cache()
    assert layer.state_size == size
    for tokens in (1, 6, 2):
        layer(torch.randn(1, tokens, 8), cache=cache)
        assert cache.state.numel() == size
    assert len(cache) == 9


def test_steps_start_where_mambas_do():
    for steps in (F.softplus(S6Mixer(512, 2).step.bias), F.softplus(SSDMixer(512, 512, 2).step.bias)):
        assert steps.min() > 0.999e-3
        assert steps.max() < 0.1001
        assert abs(steps.log().mean() - math.log(1e-2)) < 0.3
    torch.testing.assert_close(S6Mixer(4, 3).log_rate.exp()[1], torch.tensor([1.0, 2.0, 3.0]))


def test_rejects_impossible_settings():
    with pytest.raises(ValueError, match="positive, got width=4, state_dim=0"):
        S6Mixer(4, 0)
    with pytest.raises(ValueError, match="multiple of num_heads, got 4 and 3"):
        SSDMixer(4, 3)
    with pytest.raises(ValueError, match="width=4, inner_dim=0"):
        QLSTM(4, 0)
    for kind in (S6Mixer, QLSTM):
        with pytest.raises(ValueError, match="got is_causal=False"):
            kind(4, is_causal=False)
