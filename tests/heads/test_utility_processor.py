"""Transformed probabilities in ``generate``, on models that are built from a configuration."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

from postern.heads import DesmoothTransform, PowerTransform, RankTransform, utility_logits_processor

transformers = pytest.importorskip("transformers")
PROMPTS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=13,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return build(transformers.GPT2LMHeadModel, config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return build(transformers.LlamaForCausalLM, config)


def build(model, config):
    torch.manual_seed(0)
    return model(config).eval()


def generate(model, transform, prompts=PROMPTS, **options):
    torch.manual_seed(1)
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        logits_processor=[utility_logits_processor(transform)] if transform is not None else [],
        **{"do_sample": True, "top_k": 0, "max_new_tokens": 4} | options,
    )


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_power_transform_is_a_temperature(make):
    model = make()
    prompts = PROMPTS.repeat(20, 1)
    sharpened = generate(model, PowerTransform(2.0), prompts)
    assert torch.equal(sharpened, generate(model, None, prompts, temperature=0.5))
    assert not torch.equal(sharpened, generate(model, None, prompts))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_scores_are_the_transformed_log_probabilities(make):
    model = make()
    for transform in (PowerTransform(1.7), DesmoothTransform(0.05), RankTransform(2.0)):
        done = generate(model, transform, return_dict_in_generate=True, output_scores=True)
        with torch.no_grad():
            logits = model(done.sequences).logits
        for step, scores in enumerate(done.scores):
            torch.testing.assert_close(scores, transform(logits[:, 2 + step]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", [PowerTransform(3.0), RankTransform(1.0), DesmoothTransform(0.05)], ids=repr)
def test_greedy_decoding_does_not_change(transform):
    model = llama()
    assert torch.equal(generate(model, transform, do_sample=False), generate(model, None, do_sample=False))


def test_first_tokens_come_as_often_as_they_should():
    model, transform = gpt2(), RankTransform(1.5)
    prompts = PROMPTS[:1].expand(4000, -1)
    drawn = generate(model, transform, prompts, max_new_tokens=1)[:, -1]
    with torch.no_grad():
        p = transform(model(PROMPTS[:1]).logits[0, -1]).exp()
    shares = torch.bincount(drawn, minlength=13) / 4000
    assert ((shares - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_beams_and_other_processors_go_together():
    model = llama()
    done = generate(
        model, PowerTransform(2.0), do_sample=False, num_beams=3, num_return_sequences=3, suppress_tokens=[5, 6, 7]
    )
    assert done.shape[0] == 6
    assert not torch.isin(done[:, 3:], torch.tensor([5, 6, 7])).any()


def test_it_is_a_logits_processor_that_can_be_copied():
    processor = utility_logits_processor(PowerTransform(2.0))
    assert isinstance(processor, transformers.LogitsProcessor)
    scores = torch.randn(2, 5)
    for copied in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert torch.equal(copied(PROMPTS, scores), processor(PROMPTS, scores))


def test_what_is_no_transform_is_refused():
    with pytest.raises(ValueError, match=r"got 2\.0"):
        utility_logits_processor(2.0)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        utility_logits_processor(lambda scores: scores[:, :1])(PROMPTS, torch.zeros(2, 5))


def test_importing_heads_does_not_need_transformers():
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "from postern.errors import MissingExtra\n"
        "from postern.heads import PowerTransform, utility_logits_processor\n"
        "try: utility_logits_processor(PowerTransform())\n"
        "except MissingExtra as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "postern[transformers]" in done.stdout
