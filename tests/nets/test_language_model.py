"""The language model against a loop of its own, Transformers' OPT, and what it can learn."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.attention import SGLU, ClippedSoftmaxAttention, PerHeadGatedAttention, SelfAttention
from postern.nets import (
    LanguageModel,
    consecutive_windows,
    language_model_loss,
    next_token_loss,
    random_windows,
    train_language_model,
)
from postern.nets.language_model import rate_at
from tests.modules import check_module

SMALL = {"num_tokens": 30, "width": 16, "num_layers": 2, "num_heads": 2, "context": 12}
ATTENTIONS = {
    "softmax": None,
    "clipped": lambda _: ClippedSoftmaxAttention(16, 2, alpha=0.5, length=12, is_causal=True),
    "gated": lambda _: PerHeadGatedAttention(16, 2, is_causal=True),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_with_other_blocks_it_equals_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        tie_word_embeddings=True,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    model = LanguageModel(
        **SMALL,
        attention=lambda _: SelfAttention(16, 2, is_causal=True, bias=False, rotary_base=10_000.0),
        feedforward=lambda width: SGLU(width, 20, activation=F.silu),
        norm=partial(nn.RMSNorm, eps=1e-5),
        has_position_embedding=False,
    )
    with torch.no_grad():
        model.embedding.weight.copy_(llama.model.embed_tokens.weight)
        model.norm.weight.copy_(llama.model.norm.weight)
        for ours, theirs in zip(model.layers, llama.model.layers, strict=True):
            ours.attention_norm.weight.copy_(theirs.input_layernorm.weight)
            ours.feedforward_norm.weight.copy_(theirs.post_attention_layernorm.weight)
            for one, other in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
                getattr(ours.attention, one).weight.copy_(getattr(theirs.self_attn, other).weight)
            ours.feedforward.expand.weight.copy_(torch.cat([theirs.mlp.up_proj.weight, theirs.mlp.gate_proj.weight]))
            ours.feedforward.contract.weight.copy_(theirs.mlp.down_proj.weight)
    tokens = torch.randint(30, (2, 12))
    torch.testing.assert_close(model(tokens), llama(tokens).logits)


def test_equals_opt():
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        ffn_dim=64,
        word_embed_proj_dim=16,
    )
    opt = transformers.OPTForCausalLM(config).eval()
    model = LanguageModel(**SMALL, initial_std=0.2)
    renamed = {
        "self_attn_layer_norm": "attention_norm",
        "final_layer_norm": "feedforward_norm",
        "self_attn": "attention",
    }
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    renamed |= projections | {"fc1": "expand", "fc2": "contract"}
    state = model.state_dict()
    theirs = {}
    for name in opt.state_dict():
        parts = name.removeprefix("model.decoder.").split(".")
        if parts[0] == "layers":
            theirs[name] = state[".".join(renamed.get(part, part) for part in parts)]
        elif parts[0] == "final_layer_norm":
            theirs[name] = state[f"norm.{parts[1]}"]
        elif parts[0] == "embed_positions":
            theirs[name] = torch.cat([torch.zeros(2, 16), state["position.weight"]])  # OPT's offset of 2
        else:
            theirs[name] = state["embedding.weight"]
    opt.load_state_dict(theirs)
    tokens = torch.randint(0, 30, (3, 9))
    torch.testing.assert_close(model(tokens), opt(tokens).logits)
    torch.testing.assert_close(model.loss(tokens), opt(tokens, labels=tokens).loss)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_decoding_with_a_cache_equals_the_whole(attention):
    model = LanguageModel(**SMALL, attention=attention, initial_std=0.2).double()
    tokens = torch.randint(0, 30, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    cache, pieces, seen = model.new_cache(), [], 0
    for piece in tokens.split([5, 1, 1, 3, 2], dim=1):
        seen += piece.shape[1]
        pieces.append(model(piece, mask[:, :seen], cache))
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens, mask))


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_survives(attention):
    check_module(partial(LanguageModel, **SMALL, attention=attention, initial_std=0.2), torch.randint(0, 30, (2, 7)))


def test_padding_on_the_right_changes_nothing():
    model = LanguageModel(**SMALL)
    tokens = torch.randint(0, 30, (1, 8))
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(model(tokens, mask)[:, :5], model(tokens[:, :5]))


def test_starts_as_asked():
    model = LanguageModel(300, width=64, num_layers=2, initial_std=0.006, dropout=0.5)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert len(weights) == 3 + 2 * 6
    assert all(0.0055 < weight.std() < 0.0065 for weight in weights)
    assert all((value == 0).all() for name, value in model.named_parameters() if name.endswith("bias"))
    gated = LanguageModel(**SMALL, attention=ATTENTIONS["gated"])
    torch.testing.assert_close(gated.layers[0].attention.gate.bias, torch.full((2,), -math.log(3)))
    assert not torch.equal(model(torch.zeros(1, 4).long()), model(torch.zeros(1, 4).long()))


def test_learns_a_periodic_text():
    text = torch.arange(600) % 7
    model = LanguageModel(7, width=16, num_layers=1, num_heads=2, context=8)
    losses = train_language_model(
        model, text, context=8, steps=60, batch_size=8, learning_rate=1e-2, generator=torch.Generator().manual_seed(0)
    )
    assert losses[0] == pytest.approx(math.log(7), rel=0.1)
    assert losses[-1] < 0.1
    assert language_model_loss(model, consecutive_windows(text, 9, 10)) < 0.1
    assert model.training


def test_accumulation_changes_nothing_but_memory():
    text = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(0))
    found = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        model = LanguageModel(**SMALL)
        generator = torch.Generator().manual_seed(0)
        options = {"context": 12, "steps": 4, "batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.1}
        losses = train_language_model(model, text, **options, generator=generator, accumulation=accumulation)
        found.append((losses, model(text[None, :12])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_trains_in_16_bits():
    model = LanguageModel(**SMALL)
    text = torch.arange(300) % 5
    options = {"context": 12, "steps": 40, "batch_size": 8, "learning_rate": 1e-2, "warm_up_steps": 5}
    generator = torch.Generator().manual_seed(0)
    losses = train_language_model(model, text, **options, generator=generator, autocast=torch.bfloat16)
    assert losses[-1] < 0.5 * losses[0]


def test_everything_but_biases_decays():
    model = LanguageModel(**SMALL)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    text = torch.zeros(50, dtype=torch.long)
    options = {"context": 12, "steps": 1, "batch_size": 1, "clip_norm": 1e-12}
    generator = torch.Generator().manual_seed(0)
    train_language_model(model, text, **options, learning_rate=1e-2, weight_decay=10.0, generator=generator)
    # Adam moves an entry by at most the learning rate in its first step; here its gradient is below Adam's epsilon
    torch.testing.assert_close(model.norm.weight, 0.9 * before["norm.weight"], atol=1e-3, rtol=0)
    torch.testing.assert_close(model.norm.bias, before["norm.bias"], atol=1e-3, rtol=0)


def test_the_learning_rate_warms_up_and_decays():
    rates = [rate_at(step, 10, 4, 0.1) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 6)
    assert rate_at(0, 10) == 1.0


def test_windows():
    text = torch.arange(100, dtype=torch.uint8)
    drawn = random_windows(text, 5, 500, torch.Generator().manual_seed(0))
    assert (drawn.diff(dim=1) == 1).all()
    assert (drawn.min(), drawn.max()) == (0, 99)
    row = consecutive_windows(text, 12, 100)
    assert row.shape == (9, 12)
    assert (row[1:, 0] == row[:-1, -1]).all()
    assert torch.equal(consecutive_windows(text, 12, 3), row[:3])


def test_the_loss_of_windows_is_the_mean_over_tokens():
    model = LanguageModel(**SMALL, dropout=0.5)
    windows = torch.randint(0, 30, (7, 13))
    found = language_model_loss(model, windows, batch_size=3)
    model.eval()
    expected = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LanguageModel(0), "num_tokens=0"),
        (lambda: LanguageModel(9, initial_std=0.0), "must be positive, got 0.0"),
        (lambda: LanguageModel(9, 16, attention=lambda _: SelfAttention(8, 2, is_causal=True)), "width 16.*width=8"),
        (lambda: LanguageModel(9, 16, attention=lambda _: SelfAttention(16, 2)), "is_causal=False"),
        (lambda: LanguageModel(**SMALL)(torch.zeros(1, 13).long()), "room for 12 tokens, got 13"),
        (lambda: LanguageModel(**SMALL)(torch.zeros(1, 3)), r"got torch\.float32 \[1, 3\]"),
        (lambda: next_token_loss(torch.zeros(1, 3, 9), torch.zeros(1, 3).long()), r"\[1, 3\] tokens need"),
        (lambda: random_windows(torch.zeros(4).long(), 5, 1, torch.Generator()), "5 tokens, the text only 4"),
        (lambda: consecutive_windows(torch.zeros(4, 2).long(), 2, 1), "a row of integer tokens"),
        (lambda: language_model_loss(nn.Linear(1, 1), torch.zeros(0, 4).long()), "needs windows"),
        (
            lambda: train_language_model(
                LanguageModel(**SMALL),
                torch.zeros(50).long(),
                context=8,
                steps=1,
                batch_size=3,
                learning_rate=1e-3,
                generator=torch.Generator(),
                accumulation=2,
            ),
            "divides the batch, got 8, 1, 3, 2",
        ),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_positions_and_the_shared_embedding_can_be_left_out():
    def rotary(_):
        return SelfAttention(16, 2, is_causal=True, rotary_base=100.0)

    model = LanguageModel(**SMALL, attention=rotary, has_position_embedding=False, initial_std=None)
    assert model.position is None
    assert model.head.weight is model.embedding.weight
    tokens = torch.randint(0, 30, (2, 12))
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[:, :5] = False
    torch.testing.assert_close(model(tokens, padding)[:, 5:], model(tokens[:, 5:]), atol=1e-5, rtol=1e-4)
    apart = LanguageModel(**SMALL, shares_embedding=False, initial_std=None)
    assert apart.head.weight is not apart.embedding.weight
    assert 0.8 < apart.embedding.weight.std() < 1.2
    assert apart.head.weight.abs().max() <= 16**-0.5
