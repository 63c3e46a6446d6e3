"""The Trainer with two passes: its loss is that of a loop of one's own, and it learns."""

import math

import pytest
import torch

from postern.experts import ConsistencyLoss, convert_ffn_to_experts, expert_draws, two_passes

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from postern.experts.thor_trainer import ThorTrainer  # noqa: E402 - needs both


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def causal():
    config = transformers.GPT2Config(vocab_size=12, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    convert_ffn_to_experts(model, 3)
    return model


def translating():
    config = transformers.T5Config(
        vocab_size=12, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    convert_ffn_to_experts(model, 3)
    return model


def examples(count=16):
    rows = torch.arange(6) + torch.arange(count)[:, None]
    tokens = rows % 11 + 1
    labels = tokens.clone()
    labels[::2, 4:] = -100
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def trainer(model, tmp_path, **options):
    settings = {
        "output_dir": str(tmp_path),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 20,
        **options.pop("settings", {}),
    }
    arguments = transformers.TrainingArguments(**settings)
    return ThorTrainer(model, arguments, train_dataset=examples(), eval_dataset=examples(), **options)


def batch():
    rows = examples(4)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("is_concatenated", [True, False])
def test_a_causal_models_loss_counts_the_next_tokens(tmp_path, is_concatenated):
    model = causal().train()
    found = trainer(model, tmp_path, alpha=2.0, label_smoothing=0.1, is_concatenated=is_concatenated)
    inputs = batch()
    torch.manual_seed(5)
    loss = found.compute_loss(model, inputs)
    torch.manual_seed(5)
    first, second = two_passes(model, {"input_ids": inputs["input_ids"]}, is_concatenated=is_concatenated)
    expected = ConsistencyLoss(2.0)(first[:, :-1], second[:, :-1], inputs["labels"][:, 1:])
    torch.testing.assert_close(loss, expected)
    torch.manual_seed(5)
    assert found.compute_loss(model, inputs, num_items_in_batch=40).item() == pytest.approx(
        loss.item() * (inputs["labels"][:, 1:] != -100).sum().item() / 40
    )
    assert set(inputs) == {"input_ids", "labels"}


def test_an_encoder_decoder_is_given_the_labels_one_place_later(tmp_path):
    model = translating().train()
    found = trainer(model, tmp_path, alpha=2.0)
    inputs = batch()
    torch.manual_seed(5)
    loss = found.compute_loss(model, inputs)
    torch.manual_seed(5)
    shifted = torch.cat([torch.zeros(4, 1, dtype=torch.int64), inputs["labels"].clamp_min(0)[:, :-1]], 1)
    first, second = two_passes(model, {"input_ids": inputs["input_ids"], "decoder_input_ids": shifted})
    torch.testing.assert_close(loss, ConsistencyLoss(2.0, label_smoothing=0.0)(first, second, inputs["labels"]))


@pytest.mark.parametrize("is_concatenated", [True, False])
def test_checkpointed_layers_draw_the_same_again(tmp_path, is_concatenated):
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = causal().train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        found = trainer(model, tmp_path, is_concatenated=is_concatenated)
        torch.manual_seed(3)
        found.compute_loss(model, batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_evaluation_is_the_trainers_own(tmp_path):
    model = causal()
    found = trainer(model, tmp_path)
    plain = transformers.Trainer(model, found.args, eval_dataset=examples())
    with expert_draws(model, expert=1):
        loss, expected = (each.evaluate()["eval_loss"] for each in (found, plain))
    assert loss == pytest.approx(expected)


def test_learns_and_sums_over_accumulated_batches(tmp_path):
    model = causal()
    found = trainer(model, tmp_path, settings={"gradient_accumulation_steps": 2, "max_steps": 40})
    before = found.evaluate()["eval_loss"]
    result = found.train()
    assert math.isfinite(result.training_loss)
    assert found.evaluate()["eval_loss"] < before - 0.5


def test_refuses_batches_without_labels(tmp_path):
    model = causal().train()
    with pytest.raises(ValueError, match=r"by their labels, got inputs \['input_ids'\]"):
        trainer(model, tmp_path).compute_loss(model, {"input_ids": batch()["input_ids"]})
