"""Heads of postern as the output layers of Hugging Face language models."""

from __future__ import annotations

from typing import Any

from torch import nn

from postern.heads.protocol import Head


def replace_lm_head(model: nn.Module, head: nn.Module) -> None:
    """Put a head in the place of a Transformers language model's output layer, in place.

    The model goes on as before, with logits for the whole vocabulary: it scores, generates, and computes its own loss.
    For a loss from one logit a code, take the model's hidden vectors:

        head = VQLogitsHead.from_linear(model.get_output_embeddings(), 512)
        replace_lm_head(model, head)
        hidden = model.base_model(tokens).last_hidden_state
        loss = head.loss(hidden[:, :-1], tokens[:, 1:])

    Where the output layer shares its weights with the input embedding, which stays, the head adds parameters instead
    of saving any.

    Args:
        model: with ``get_output_embeddings`` and ``set_output_embeddings``, such as ``OPTForCausalLM``.
        head: follows `postern.heads.Head`.

    Raises:
        ValueError: a model without an output layer of its own or one that must be linear, a module that is no head, or
            other sizes.
    """
    if not isinstance(head, Head) or not isinstance(head, nn.Module):
        raise ValueError(f"a head has logits and loss, see postern.heads.Head; got {type(head).__name__}")
    hugging_face: Any = model
    dense: Any = hugging_face.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(dense, Head) and not hasattr(dense, "weight"):
        raise ValueError(f"{type(model).__name__} has no output layer that could be replaced")
    classes, features = (dense.num_classes, dense.in_features) if isinstance(dense, Head) else dense.weight.shape
    if (head.num_classes, head.in_features) != (classes, features):
        raise ValueError(
            f"the model's output layer turns {features} features into {classes} classes, the head "
            f"{head.in_features} into {head.num_classes}"
        )
    try:
        hugging_face.set_output_embeddings(head)
    except AttributeError as error:
        hugging_face.set_output_embeddings(dense)
        raise ValueError(f"{type(model).__name__} takes only a linear output layer: {error}") from error
    # Otherwise Transformers would tie the head's weights to the embedding when it resizes, or leave them out of files.
    for config in (hugging_face.config, hugging_face.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    hugging_face.all_tied_weights_keys = hugging_face.get_expanded_tied_weights_keys(all_submodels=True)
