"""What an output layer of shared vectors costs: in quality, before anything is trained, and in memory and arithmetic.

Paper: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits" (arXiv
2505.10202). The cost in quality is derived here; the paper does not mention it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postern.heads.token_mapping import check_mapping


def tie_log_probs(
    log_probs: Float[Tensor, "*batch classes"],
    mapping: Int[Tensor, " classes"],
    token_bias: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "*batch classes"]:
    """Project a distribution p onto those that a mapping can express: ``log p~(i) = log p(M(i)) + b_i``.

    With ``b_i = -log n_M(i)``, the default, classes of one code are equally likely. Of all such distributions p~ has
    the smallest divergence ``KL(p || p~)``: it keeps the codes' masses.

    Args:
        log_probs: ``log p``.
        mapping: the code of each class.
        token_bias: ``b``, with ``e^b`` summing to one in each code.

    Raises:
        ValueError: a mapping that does not fit.
    """
    num_classes = log_probs.shape[-1]
    codes, num_codes = _checked(mapping, num_classes)
    within = -_sizes(codes, num_codes).to(log_probs.dtype).log()[codes] if token_bias is None else token_bias
    return _code_log_mass(log_probs, codes, num_codes)[..., codes] + within.to(log_probs.dtype)


def projection_bound(
    log_probs: Float[Tensor, "*batch classes"],
    mapping: Int[Tensor, " classes"],
    target: Int[Tensor, "*batch"] | None = None,
    token_bias: Float[Tensor, " classes"] | None = None,
) -> float:
    """Return the nats a position that tying the classes of each code costs a model, before any training.

    Without targets it is the mean ``KL(p || p~)``, see `tie_log_probs`; no layer that ties its classes in this way
    comes nearer to p. With the targets of a text it is the mean of ``log p(y) - log p~(y)``, the logarithm of the
    factor by which its perplexity grows.

    Args:
        log_probs: ``log p``, of the model with its full output layer.
        mapping: the code of each class.
        target: the true classes.
        token_bias: see `tie_log_probs`.

    Raises:
        ValueError: a mapping or targets that do not fit, or no positions.
    """
    if log_probs.dim() == 0 or log_probs.numel() == 0:
        raise ValueError(f"log-probabilities must be [*batch, classes], got {list(log_probs.shape)}")
    tied = tie_log_probs(log_probs, mapping, token_bias)
    if target is None:
        terms = torch.where(log_probs.isfinite(), log_probs.exp() * (log_probs - tied), 0)
        return terms.sum(-1).mean().item()
    if target.shape != log_probs.shape[:-1] or target.is_floating_point():
        raise ValueError(
            f"log-probabilities of shape {list(log_probs.shape)} need integer targets of shape "
            f"{list(log_probs.shape[:-1])}, got {target.dtype} {list(target.shape)}"
        )
    at_target = target.long()[..., None]
    return (log_probs.gather(-1, at_target) - tied.gather(-1, at_target)).mean().item()


def tying_floor(target: Int[Tensor, "*batch"], mapping: Int[Tensor, " classes"]) -> float:
    """Return the mean of ``log n_M(y)``, below which no equally likely classes bring a text's negative log-likelihood.

    Its exponential is the lowest possible perplexity. A lower one that is reported is wrong: evaluated with padding,
    or on other classes.

    Args:
        target: the classes of the text.
        mapping: the code of each class.

    Raises:
        ValueError: no targets, or a mapping that does not fit.
    """
    if target.numel() == 0 or target.is_floating_point():
        raise ValueError(f"targets are integers, at least one, got {target.dtype} {list(target.shape)}")
    codes, num_codes = _checked(mapping, len(mapping))
    return _sizes(codes, num_codes)[codes[target.reshape(-1).long()]].double().log().mean().item()


@dataclass(frozen=True)
class HeadCost:
    """What an output layer needs.

    Attributes:
        parameters: numbers, token biases included.
        mapping_bits: bits of the table from classes to codes.
        bytes: of parameters and table together.
        flops: multiplications and additions a position, without the scatter.
    """

    parameters: int
    mapping_bits: int
    bytes: int
    flops: int


def head_cost(
    in_features: int,
    num_classes: int,
    num_codes: int | None = None,
    *,
    bias: bool = True,
    has_token_bias: bool = False,
    bits: int = 32,
) -> HeadCost:
    """Count what a dense output layer needs, or a codebook with its table of ``ceil(log2 codes)`` bits a class.

    A dense layer that shares its weights with the input embedding needs none of its own: a codebook in its place adds
    parameters.

    Args:
        in_features: width of the hidden vectors.
        num_classes: size of the vocabulary.
        num_codes: number of code vectors; None for the dense layer.
        bias: whether rows or codes have biases.
        has_token_bias: whether each class has a bias besides.
        bits: of a parameter.

    Raises:
        ValueError: sizes that are not positive.
    """
    rows = num_classes if num_codes is None else num_codes
    if min(in_features, num_classes, rows, bits) < 1:
        raise ValueError(f"sizes are positive, got {in_features}, {num_classes}, {num_codes} and {bits} bits")
    parameters = rows * (in_features + bias) + num_classes * has_token_bias
    mapping_bits = 0 if num_codes is None else num_classes * (num_codes - 1).bit_length()
    return HeadCost(parameters, mapping_bits, math.ceil((parameters * bits + mapping_bits) / 8), 2 * rows * in_features)


def _checked(mapping: Tensor, num_classes: int) -> tuple[Tensor, int]:
    num_codes = int(mapping.max()) + 1 if mapping.numel() and not mapping.is_floating_point() else num_classes
    check_mapping(mapping, num_classes, num_codes)
    return mapping.long(), num_codes


def _sizes(codes: Tensor, num_codes: int) -> Tensor:
    return torch.bincount(codes, minlength=num_codes)


def _code_log_mass(log_probs: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """``log sum_{i in code} p_i``."""
    shape = (*log_probs.shape[:-1], num_codes)
    index = codes.expand(log_probs.shape)
    highest = log_probs.new_full(shape, -torch.inf).scatter_reduce(-1, index, log_probs, "amax")
    # A code without mass would give inf - inf.
    highest = torch.where(highest.isfinite(), highest, 0)
    total = log_probs.new_zeros(shape).scatter_add(-1, index, (log_probs - highest.gather(-1, index)).exp())
    return total.log() + highest
