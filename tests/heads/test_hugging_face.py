"""Codebooks as the output layers of Transformers' models that are built from a configuration."""

import pytest
import torch
from torch import nn

from postern.heads import VQLogitsHead, replace_lm_head

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def opt(tied: bool) -> nn.Module:
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16, dropout=0.0, tie_word_embeddings=tied
    )
    return transformers.OPTForCausalLM(config)


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=32, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2(tied: bool) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("build", [opt, llama, gpt2])
def test_a_language_model_goes_on_with_a_codebook(build, tied):
    torch.manual_seed(0)
    model = build(tied).eval()
    dense = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight.clone()
    tokens = torch.randint(40, (2, 7))
    before = model(tokens).logits

    replace_lm_head(model, VQLogitsHead.from_linear(dense, 40))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)

    head = VQLogitsHead.from_linear(dense, 5)
    replace_lm_head(model, head)
    assert model.get_output_embeddings() is head
    outputs = model(tokens, labels=tokens)
    hidden = model.base_model(tokens).last_hidden_state
    torch.testing.assert_close(outputs.logits, head(hidden))
    torch.testing.assert_close(outputs.loss, head.loss(hidden[:, :-1], tokens[:, 1:]))
    options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 1, "do_sample": False}
    assert model.generate(tokens, min_new_tokens=3, max_new_tokens=3, **options).shape == (2, 10)

    model.tie_weights()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert [name for name, _ in head.named_parameters()] == ["codebook.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_saved_with_its_codebook(tied, tmp_path):
    model = opt(tied).eval()
    dense = model.get_output_embeddings()
    replace_lm_head(model, VQLogitsHead.from_linear(dense, 5))
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    other = opt(tied).eval()
    replace_lm_head(other, VQLogitsHead(16, 40, 5, bias=False))
    other.load_state_dict(saved)
    tokens = torch.randint(40, (2, 7))
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_bad_input():
    model = opt(False)
    with pytest.raises(ValueError, match=r"16 features into 40 classes, the head 16 into 39"):
        replace_lm_head(model, VQLogitsHead(16, 39, 5))
    with pytest.raises(ValueError, match="Linear"):
        replace_lm_head(model, nn.Linear(16, 40))
    with pytest.raises(ValueError, match="OPTModel has no output layer"):
        replace_lm_head(model.model, VQLogitsHead(16, 40, 5))
    with pytest.raises(ValueError, match="ReLU has no output layer"):
        replace_lm_head(nn.ReLU(), VQLogitsHead(16, 40, 5))


def test_a_model_that_ties_the_bias_as_well_is_refused_and_left_alone():
    config = transformers.BertConfig(**SMALL, intermediate_size=32)
    model = transformers.BertForMaskedLM(config)
    dense = model.get_output_embeddings()
    with pytest.raises(ValueError, match="BertForMaskedLM takes only a linear output layer"):
        replace_lm_head(model, VQLogitsHead.from_linear(dense, 5))
    assert model.get_output_embeddings() is dense
    assert model.config.tie_word_embeddings
