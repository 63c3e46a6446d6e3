"""The gated layer, the training of gates, and gates in models of Transformers."""

import copy
import math

import pytest
import torch

from postern.attention import (
    BLOCK_SCORERS,
    BlockSparsity,
    SeerAttention,
    SelfAttention,
    attach_gates,
    block_density,
    block_sparsities,
    distil_gates,
    distilling,
    gate_distillation_loss,
    gate_loss,
    pooled_attention_target,
)
from postern.nets import LanguageModel
from tests.modules import check_module

RULES = [{"density": 0.5}, {"top_k": 2}, {"threshold": 0.2}]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def seer(**options):
    return SeerAttention(24, 6, num_kv_heads=3, rotary_base=100.0, block=4, **{"dense_last": 1} | options)


def language_model(**options):
    return LanguageModel(
        20, 16, 2, context=64, attention=lambda _: SeerAttention(16, 2, block=4, rotary_base=100.0, **options),
        initial_std=None, has_position_embedding=False,
    )  # fmt: skip


def tokens(batch=2, time=32):
    return torch.randint(0, 20, (batch, time))


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_attends_to_the_chosen_blocks_alone(rule):
    layer = seer(**rule).double()
    layer.sparsity.keeps_blocks = True
    x = torch.randn(2, 30, 24, dtype=torch.float64)
    found = layer(x)
    blocks = layer.sparsity.blocks
    assert 0.2 < block_density(blocks) < 0.9
    mask = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :30, :30]
    plain = SelfAttention(24, 6, num_kv_heads=3, rotary_base=100.0, is_causal=True).double()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "sparsity" not in name})
    torch.testing.assert_close(found, plain(x, mask))
    layer.sparsity.is_sparse = False
    torch.testing.assert_close(layer(x), plain(x))
    layer.sparsity.is_sparse = True
    layer.sparsity.set_rule(density=1.0)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("rule", RULES)
def test_padded_sequences_are_as_if_alone(rule):
    """On the left, on the right and in the middle: blocks begin with the first token."""
    layer = seer(**rule).double()
    x = torch.randn(3, 21, 24, dtype=torch.float64)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[0, :6], mask[1, 14:], mask[2, 4:7] = False, False, False
    together = layer(x, mask)
    # rotations know distances alone, which a gap in the middle changes
    for sequence in (0, 1):
        own = mask[sequence]
        torch.testing.assert_close(together[sequence, own], layer(x[sequence, own][None])[0])
    assert torch.isfinite(together).all()


def test_reads_a_prompt_with_blocks_left_out_and_then_attends_to_everything():
    layer = seer(top_k=1).double().eval()
    x = torch.randn(1, 26, 24, dtype=torch.float64)
    cache = layer.new_cache()
    torch.testing.assert_close(layer(x[:, :25], cache=cache), layer(x[:, :25]))
    layer.sparsity.is_sparse = False
    dense = layer(x)
    layer.sparsity.is_sparse = True
    torch.testing.assert_close(layer(x[:, 25:], cache=cache), dense[:, 25:])
    assert (layer(x) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("rule", [{"top_k": 2}, {"threshold": 0.2}])
def test_sparse_as_a_module(rule):
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :3] = False
    # rounding may change the choice of blocks
    check_module(lambda: seer(**rule), torch.randn(2, 19, 24), mask, tolerance=math.inf)


def test_another_scorer_can_choose():
    layer = seer(top_k=2)
    layer.sparsity.keeps_blocks = True
    layer.sparsity.scorer = BLOCK_SCORERS["streaming"]
    layer(torch.randn(1, 32, 24))
    assert layer.sparsity.blocks[0, 0, 5].nonzero().flatten().tolist() == [0, 5]


# -- training gates ---------------------------------------------------------------------------------------------------


def test_the_loss_reaches_gates_alone_and_is_that_of_the_layers_map():
    model = language_model(density=0.5)
    text = tokens()
    with distilling(model, drop_first=0.5):
        model(text)
        torch.autograd.backward([gate_loss(model)])
        own = [layer.loss for layer in block_sparsities(model).values()]
        torch.testing.assert_close(gate_loss(model), own[0] + own[1])
    assert all((parameter.grad is not None) == (".gate." in name) for name, parameter in model.named_parameters())
    layer = model.layers[0].attention
    plain_query, plain_key, _ = layer.heads(model.layers[0].attention_norm(model.embedding(text)))
    target = pooled_attention_target(*layer.place(plain_query, plain_key), 4)
    scores = layer.sparsity.gate(plain_query, plain_key)
    torch.testing.assert_close(own[0], gate_distillation_loss(scores, target, drop_first=0.5))


def test_a_padded_batch_has_the_mean_loss_of_its_rows():
    layer = seer(density=0.5).double()
    layer.sparsity.is_distilling, layer.sparsity.drop_first = True, 0.0
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :8] = False
    layer(x, mask)
    together = layer.sparsity.loss
    layer(x[:1])
    first = layer.sparsity.loss
    layer(x[1:, 8:])
    torch.testing.assert_close(together, (5 * first + 3 * layer.sparsity.loss) / 8)


def test_distilled_gates_foretell_the_map_and_the_model_stays_as_it_is():
    model = language_model(density=0.4)
    before = copy.deepcopy(model.state_dict())
    text = tokens(8)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses = distil_gates(model, lambda: text, steps=60, learning_rate=1e-2, warm_up_steps=5)
    assert losses[-1] < 0.3 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".gate." not in name), name
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all(layer.loss is None and not layer.is_distilling for layer in block_sparsities(model).values())


def test_fine_tuning_together():
    """The model's own loss reaches the model through the chosen blocks; the gates' reaches the gates."""
    model = language_model(density=0.4, dense_last=0)
    text = tokens()
    with distilling(model, is_sparse=True):
        task = model.loss(text)
        sparse = torch.autograd.grad(task, model.embedding.weight, retain_graph=True)[0]
        torch.autograd.backward([task + gate_loss(model)])
    torch.testing.assert_close(model.embedding.weight.grad, sparse)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if ".gate." in name)
    torch.testing.assert_close(task, model.loss(text))


# -- models of Transformers -------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SCALED = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def transformers_model(kind="Llama", **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=64, **options
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


MODELS = {
    "llama": lambda: transformers_model(),
    "llama-scaled": lambda: transformers_model(rope_parameters=SCALED),
    "qwen3": lambda: transformers_model("Qwen3", head_dim=6),
    "mistral": lambda: transformers_model("Mistral", sliding_window=None),
}
GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return request.param()


def test_a_model_with_everything_kept_is_as_it_was(model):
    text = tokens(2, 19)
    padding = torch.ones_like(text)
    padding[0, :5] = 0
    real = padding.bool()
    options = {"attention_mask": padding, "position_ids": (padding.cumsum(1) - 1).clamp_min(0)}
    own, generated = model(text, **options).logits, model.generate(text, attention_mask=padding, **GENERATE)
    attached = attach_gates(model, block=4, density=1.0)
    assert list(attached) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(isinstance(sparsity, BlockSparsity) for sparsity in attached.values())
    torch.testing.assert_close(model(text, **options).logits[real], own[real])
    assert torch.equal(model.generate(text, attention_mask=padding, **GENERATE), generated)
    for sparsity in attached.values():
        sparsity.set_rule(top_k=1, dense_last=0)
    assert (model(text, **options).logits - own)[real].abs().max() > 1e-3


def test_the_gates_rotate_as_the_model_does(model):
    for gate_dim in (None, 8):
        attached = attach_gates(copy.deepcopy(model), block=4, density=0.5, gate_dim=gate_dim)
        frequencies = next(iter(attached.values())).gate.keys.frequencies
        inverse = model.model.rotary_emb.inv_freq
        if gate_dim is None:
            assert torch.equal(frequencies, inverse)
        else:
            assert frequencies.shape == (4,)
            assert frequencies[0] == inverse[0]


def test_gates_of_a_transformers_model_are_trained_and_saved(model):
    attach_gates(model, block=4, density=0.4)
    text = tokens(4)
    losses = distil_gates(model, lambda: {"input_ids": text}, steps=40, learning_rate=1e-2, warm_up_steps=5)
    assert losses[-1] < 0.7 * losses[0]
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(text).logits, model(text).logits)
    assert any("block_sparsity.gate" in name for name in model.state_dict())


def test_gates_see_what_comes_before_the_rotation(model):
    attached = attach_gates(model, block=4, density=0.5)
    seen = []
    for sparsity in attached.values():
        sparsity.gate.register_forward_pre_hook(lambda gate, arguments: seen.append(arguments[:2]))
    text = torch.full((1, 12), 3)
    model(text)
    for query, key in seen[:1]:  # equal tokens, so that only rotations could tell them apart
        torch.testing.assert_close(query, query[:, :, :1].expand_as(query))
        torch.testing.assert_close(key, key[:, :, :1].expand_as(key))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seer(density=0.5, is_causal=False), "is_causal=False"),
        (lambda: seer(density=0.5, dropout=0.1), r"dropout=0\.1"),
        (lambda: seer(), "one of threshold, density and top_k, got none"),
        (lambda: seer(density=0.5).sparsity.set_rule(top_k=2, dense_last=-1), "got -1"),
        (lambda: gate_loss(language_model(top_k=2)), r"'layers\.0\.attention\.sparsity' has no loss"),
        (lambda: block_sparsities(LanguageModel(5, 8, 1, 2)), "LanguageModel has no gated attention layers"),
        (lambda: distil_gates(language_model(top_k=2), tokens, steps=0), "got 0 and 0.001"),
        (lambda: attach_gates(LanguageModel(5, 8, 1, 2), density=0.5), "has no self-attention layers with q_proj"),
        (lambda: attach_gates(transformers_model("Mistral", sliding_window=8), density=0.5), "window of 8 tokens"),
        (lambda: attach_gates(transformers_model(), density=2.0), r"got 2\.0"),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rejects_a_second_gate_and_static_caches():
    model = transformers_model()
    attach_gates(model, block=4, density=0.5)
    with pytest.raises(ValueError, match="has a gate already"):
        attach_gates(model, density=0.5)
    with pytest.raises(ValueError, match="a cache that grows with its tokens"):
        model.generate(tokens(1, 8), **GENERATE, cache_implementation="static")
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        model.train()(tokens())
