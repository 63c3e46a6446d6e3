"""Models whose feed-forward blocks became experts: copies change nothing, and others start as they should."""

import copy

import pytest
import torch
from torch import nn

from postern.experts import StochasticFeedForward, convert_ffn_to_experts, expert_agreement, expert_draws, two_passes
from tests.modules import check_module

WIDTH = 16


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Sequences(nn.Module):
    """A `torch.nn.Transformer` on sequences, the second a part of the first."""

    def __init__(self, *, batch_first, norm_first):
        super().__init__()
        self.stacks = nn.Transformer(
            WIDTH, 4, 2, 2, 24, dropout=0.1, batch_first=batch_first, norm_first=norm_first, activation="gelu"
        )

    def forward(self, x):
        return self.stacks(x, x[:, :3] if self.stacks.batch_first else x[:3])


def encoder(dropout=0.0):
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


def hidden(batch=4, time=5):
    return torch.randn(batch, time, WIDTH)


def token_ids(batch=4, time=5):
    return torch.randint(3, 30, (batch, time), generator=torch.Generator().manual_seed(0))


TRANSFORMERS = {
    "t5": ("T5", "T5Model", {"d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}, 2),
    "t5-gated": (
        "T5",
        "T5Model",
        {"d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
        2,
    ),
    "bart": (
        "Bart",
        "BartModel",
        {
            "d_model": WIDTH,
            **{f"{stack}_layers": 2 for stack in ("encoder", "decoder")},
            **{f"{stack}_ffn_dim": 24 for stack in ("encoder", "decoder")},
            **{f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")},
            "activation_dropout": 0.3,
            "pad_token_id": 1,
        },
        2,
    ),
    "llama": (
        "Llama",
        "LlamaModel",
        {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
        2,
    ),
    "bert": (
        "Bert",
        "BertModel",
        {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
        2,
    ),
    "gpt2": ("GPT2", "GPT2Model", {"n_embd": WIDTH, "n_layer": 3, "n_head": 4}, 2),
    "opt": (
        "OPT",
        "OPTModel",
        {
            "hidden_size": WIDTH,
            "ffn_dim": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "word_embed_proj_dim": WIDTH,
        },
        2,
    ),
}


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    family, model, sizes, _ = TRANSFORMERS[name]
    config = getattr(transformers, f"{family}Config")(vocab_size=40, **sizes)
    return getattr(transformers, model)(config)


def batch_for(name):
    extra = {"decoder_input_ids": token_ids(time=3)} if name in ("t5", "t5-gated", "bart") else {}
    return {"input_ids": token_ids(), **extra}


def shake(model):
    """Biases that are not 0, so that a lost one shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_copies_leave_a_model_of_transformers_as_it_was(name):
    model = of_transformers(name).eval()
    shake(model)
    expected = model(**batch_for(name)).last_hidden_state
    converted = convert_ffn_to_experts(model, 3, start="copy")
    assert len(converted) == TRANSFORMERS[name][3]
    assert all(model.get_submodule(path) is block for path, block in converted.items())
    torch.testing.assert_close(model(**batch_for(name)).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    for block in converted.values():
        with torch.no_grad():
            block.bank.contract[1].add_(0.1 * torch.randn_like(block.bank.contract[1]))
    with expert_draws(model, expert=2):
        torch.testing.assert_close(model(**batch_for(name)).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    with expert_draws(model, expert=1):
        assert (model(**batch_for(name)).last_hidden_state - expected).abs().max() > 1e-3


def test_copies_leave_a_vision_model_as_it_was():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
    )
    model, images = transformers.ViTModel(config).eval(), torch.randn(2, 3, 8, 8)
    expected = model(images).last_hidden_state
    assert len(convert_ffn_to_experts(model, 2, start="copy")) == 2
    torch.testing.assert_close(model(images).last_hidden_state, expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_copies_leave_pytorchs_transformer_as_it_was(batch_first, norm_first):
    model, x = Sequences(batch_first=batch_first, norm_first=norm_first).eval(), hidden()
    expected = model(x)
    converted = convert_ffn_to_experts(model, 3, start="copy")
    assert sorted(converted) == ["stacks.decoder.layers.0.linear1", "stacks.encoder.layers.0.linear1"]
    torch.testing.assert_close(model(x), expected)
    assert all(block.bank.dropout.p == 0.1 for block in converted.values())


def test_padding_and_no_gradients_take_no_fast_path():
    model, x = encoder().eval(), hidden()
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[0, 3:] = True
    expected = model(x, src_key_padding_mask=padding)
    convert_ffn_to_experts(model, 3, start="copy")
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_sentences_are_told_apart_where_the_batch_comes_second():
    model = Sequences(batch_first=False, norm_first=True).eval()
    convert_ffn_to_experts(model, 3)
    x = hidden(5, 2)
    chosen = torch.tensor([2, 0])
    with expert_draws(model, expert=chosen):
        found = model(x)
    for row, expert in enumerate(chosen.tolist()):
        with expert_draws(model, expert=expert):
            torch.testing.assert_close(found[:, row], model(x[:, row : row + 1])[:, 0])


def test_hidden_dropout_moves_into_the_experts():
    model = of_transformers("bart")
    converted = convert_ffn_to_experts(model)
    assert all(block.bank.dropout.p == 0.3 for block in converted.values())
    assert [layer.activation_dropout for layer in model.encoder.layers] == [0.0, 0.3]


# -- how experts start ------------------------------------------------------------------------------------------------


def first_block(start, **options):
    model = nn.TransformerEncoderLayer(64, 4, 256)
    nn.init.normal_(model.linear1.weight, std=0.3)
    own = model.linear1.weight.detach().T.clone()
    return convert_ffn_to_experts(model, 4, start=start, **options)["linear1"].bank, own


def test_drawn_experts_are_as_wide_as_the_block_and_differ():
    bank, own = first_block("redraw")
    for expert in bank.expand:
        assert expert.std().item() == pytest.approx(own.std().item(), rel=0.03)
        assert abs(torch.corrcoef(torch.stack([expert.flatten(), own.flatten()]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(bank.expand.flatten(1))[0, 1]) < 0.05
    assert (bank.expand_bias == 0).all()


def test_perturbed_experts_are_near_the_block_and_differ():
    bank, own = first_block("perturb", noise=0.2)
    for expert in bank.expand:
        assert (expert - own).std().item() == pytest.approx(0.2 * own.std().item(), rel=0.03)
    assert abs(torch.corrcoef((bank.expand - own).flatten(1))[0, 1]) < 0.05
    exact, _ = first_block("perturb", noise=0.0)
    assert (exact.expand == exact.expand[0]).all()


def test_a_generator_repeats_the_start():
    banks = [
        convert_ffn_to_experts(encoder(), 2, generator=torch.Generator().manual_seed(seed))["layers.0.linear1"].bank
        for seed in (1, 1, 2)
    ]
    assert not torch.equal(banks[0].expand, banks[2].expand)
    layer = encoder()
    one, other = copy.deepcopy(layer), copy.deepcopy(layer)
    for model in (one, other):
        convert_ffn_to_experts(model, 2, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_agree_and_others_do_not():
    agreement = {}
    for start in ("copy", "perturb", "redraw"):
        torch.manual_seed(0)
        model = encoder(dropout=0.1)
        convert_ffn_to_experts(model, 3, start=start)
        agreement[start] = expert_agreement(model, (hidden(),))
    assert agreement["copy"] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < agreement["perturb"] < agreement["redraw"]


# -- which blocks, and use --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_every_so_many_th_is_converted(every, layers):
    converted = convert_ffn_to_experts(encoder(), every=every)
    assert list(converted) == [f"layers.{layer}.linear1" for layer in layers]


def test_both_passes_of_a_converted_model_have_gradients():
    model = encoder()
    converted = convert_ffn_to_experts(model, 2, every=1)
    with expert_draws(model, expert=torch.tensor([0, 0, 1, 1])):
        first, second = two_passes(model, (hidden(2),))
    (first - second).square().sum().backward()
    for block in converted.values():
        assert (block.bank.contract.grad.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("is_batch_first", [True, False])
def test_a_block_survives(is_batch_first):
    check_module(lambda: StochasticFeedForward(WIDTH, 24, 3, dropout=0.1, is_batch_first=is_batch_first), hidden(2, 4))


def test_a_converted_layer_survives():
    def build():
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True)
        convert_ffn_to_experts(layer, 3)
        return layer

    check_module(build, hidden(2, 4))


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: convert_ffn_to_experts(nn.Linear(2, 2)), "Linear has no feed-forward blocks"),
        (lambda: convert_ffn_to_experts(encoder(), 0), "num_experts=0"),
        (lambda: convert_ffn_to_experts(encoder(), every=0), "every=0"),
        (lambda: convert_ffn_to_experts(encoder(), noise=-1.0), r"noise=-1\.0"),
        (lambda: convert_ffn_to_experts(encoder(), start="zero"), "got 'zero'"),
    ],
)
def test_refuses_what_cannot_be(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
