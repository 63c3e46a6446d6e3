"""Hugging Face's Trainer with two passes a step: THOR for models with stochastic experts, R-Drop for others.

Paper: "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR), arXiv 2110.04260.

    convert_ffn_to_experts(model, num_experts=2)
    ThorTrainer(model, arguments, train_dataset=..., alpha=5.0).train()

Importing this module needs Transformers; its Trainer needs Accelerate as well: the extra "trainer" brings both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from postern.errors import MissingExtra
from postern.experts.consistency import ConsistencyLoss, two_passes
from postern.experts.stochastic_router import StochasticRouter

try:
    from transformers import Trainer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise MissingExtra("trainer", "THOR with the Trainer of Transformers") from error


class ThorTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose loss in training is `ConsistencyLoss` of two passes of each batch; evaluation is the Trainer's.

    Causal language models predict the label after each token, others the label of each token, or of each sequence.
    Encoder-decoders are given ``decoder_input_ids`` made of the labels where a batch has none.

    Args:
        args: as the Trainer's, which see; not its loss functions.
        alpha: see `ConsistencyLoss`.
        label_smoothing: see `ConsistencyLoss`; by default the arguments' ``label_smoothing_factor``.
        is_concatenated: whether both passes are one call, see `two_passes`.
        kwargs: as the Trainer's.

    Raises:
        ValueError: see `ConsistencyLoss`.
    """

    def __init__(
        self,
        *args: Any,
        alpha: float = 5.0,
        label_smoothing: float | None = None,
        is_concatenated: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        smoothing = self.args.label_smoothing_factor if label_smoothing is None else label_smoothing
        self.consistency = ConsistencyLoss(alpha, label_smoothing=smoothing)
        self.is_concatenated = is_concatenated

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; see the Trainer's method.

        Args:
            model: possibly wrapped.
            inputs: with ``labels``.
            return_outputs: whether the first pass's logits come with the loss.
            num_items_in_batch: labels of all batches whose gradients are accumulated.

        Raises:
            ValueError: inputs without labels.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get("labels") is None:
            raise ValueError(f"two passes are compared by their labels, got inputs {sorted(inputs)}")
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        labels: Tensor = inputs["labels"]
        unwrapped = self.accelerator.unwrap_model(model)
        shifted = getattr(unwrapped, "prepare_decoder_input_ids_from_labels", None)
        if shifted is not None and "decoder_input_ids" not in batch:
            batch["decoder_input_ids"] = shifted(labels=labels)
        for module in unwrapped.modules():
            if isinstance(module, StochasticRouter):
                # for good: with gradient checkpointing layers draw again in the backward pass
                module.num_passes = 2 if self.is_concatenated else 1
        first, second = two_passes(model, batch, is_concatenated=self.is_concatenated)
        logits = first
        if type(unwrapped).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
        loss = self.consistency(first, second, labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
