"""Algorithmic tasks, generated: arithmetic modulo a prime, and the parity of a few bits among many.

Small, exact, and hard to generalise from: a network can fit half of a table of sums long before, or without ever,
predicting the other half. The set-ups are those of "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697)
and of the studies that it follows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int, Num
from torch import Tensor

Operation = Literal["add", "subtract", "multiply"]
Encoding = Literal["one-hot", "token", "binary"]
_OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
}


@dataclass(frozen=True)
class AlgorithmicSplit:
    """A task whose samples are divided into those to learn from and those to predict.

    Attributes:
        train_inputs: float32 vectors, or int64 tokens for the token encoding.
        train_target: class indices.
        test_inputs: as ``train_inputs``, none of them among those.
        test_target: class indices.
        num_classes: number of classes.
    """

    train_inputs: Num[Tensor, "train features"]
    train_target: Int[Tensor, " train"]
    test_inputs: Num[Tensor, "test features"]
    test_target: Int[Tensor, " test"]
    num_classes: int

    def to(self, device: torch.device | str) -> AlgorithmicSplit:
        """Return a copy whose tensors are on a device."""
        return AlgorithmicSplit(
            self.train_inputs.to(device),
            self.train_target.to(device),
            self.test_inputs.to(device),
            self.test_target.to(device),
            self.num_classes,
        )


def modular_arithmetic(
    modulus: int,
    operation: Operation,
    train_fraction: float,
    *,
    encoding: Encoding = "one-hot",
    generator: torch.Generator | None = None,
) -> AlgorithmicSplit:
    """Return all pairs ``(a, b)`` of residues with the class ``(a o b) mod p``, split at random.

    Args:
        modulus: ``p``, at least 2; the classes are the residues 0 to p - 1.
        operation: "add", "subtract" or "multiply".
        train_fraction: share of the pairs to learn from, rounded down.
        encoding: "one-hot": two one-hot codes side by side, ``2 p`` features. "token": two integers below ``p``.
            "binary": two binary codes side by side, ``2 ceil(log2 p)`` features (14 for p = 113), where each residue
            has a code of its own, drawn at random.
        generator: draws the split and the codes; torch's global one if None. The split depends on no other argument
            than the number of pairs and ``train_fraction``.

    Returns:
        The split.

    Raises:
        ValueError: a modulus below 2, an unknown operation or encoding, or a fraction that leaves a side empty.
    """
    if modulus < 2:
        raise ValueError(f"the modulus must be at least 2, got {modulus}")
    if operation not in _OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(_OPERATIONS)}, got {operation!r}")
    residues = torch.arange(modulus)
    pairs = torch.cartesian_prod(residues, residues)
    target = _OPERATIONS[operation](pairs[:, 0], pairs[:, 1]) % modulus
    order = _random_order(len(pairs), train_fraction, generator)
    if encoding == "one-hot":
        inputs = torch.eye(modulus)[pairs].flatten(1)
    elif encoding == "token":
        inputs = pairs
    elif encoding == "binary":
        num_bits = (modulus - 1).bit_length()
        codes = torch.randperm(2**num_bits, generator=generator)[:modulus]
        bits = (codes[:, None] >> torch.arange(num_bits)) & 1
        inputs = bits.float()[pairs].flatten(1)
    else:
        raise ValueError(f"encoding must be 'one-hot', 'token' or 'binary', got {encoding!r}")
    return _split(inputs, target, order, modulus)


def sparse_parity(
    num_bits: int,
    num_parity_bits: int,
    num_samples: int,
    train_fraction: float = 0.5,
    *,
    generator: torch.Generator | None = None,
) -> AlgorithmicSplit:
    """Return random bit strings with the class "the sum of the first few bits is odd", split at random.

    Args:
        num_bits: bits in all; those beyond the first ``num_parity_bits`` are noise.
        num_parity_bits: how many bits the class depends on.
        num_samples: how many strings, all different.
        train_fraction: share of the strings to learn from, rounded down.
        generator: draws the strings and the split; torch's global one if None.

    Returns:
        The split; inputs are zeros and ones, the classes 0 (even) and 1 (odd).

    Raises:
        ValueError: more parity bits than bits, more samples than strings, more than 62 bits, or a fraction that
            leaves a side empty.
    """
    if not 1 <= num_parity_bits <= num_bits <= 62:
        raise ValueError(
            "bits must satisfy 1 <= num_parity_bits <= num_bits <= 62, "
            f"got num_parity_bits={num_parity_bits} and num_bits={num_bits}"
        )
    if num_samples > 2**num_bits:
        raise ValueError(f"there are {2**num_bits} strings of {num_bits} bits, got num_samples={num_samples}")
    order = _random_order(num_samples, train_fraction, generator)
    codes = _distinct(2**num_bits, num_samples, generator)
    bits = (codes[:, None] >> torch.arange(num_bits)) & 1
    target = bits[:, :num_parity_bits].sum(1) % 2
    return _split(bits.float(), target, order, 2)


def _distinct(end: int, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` different integers from 0 to ``end`` - 1, uniform, in random order."""
    if end <= 2 * count:
        return torch.randperm(end, generator=generator)[:count]
    found = torch.empty(0, dtype=torch.long)
    while len(found) < count:
        drawn = torch.randint(end, (2 * count,), generator=generator)
        found = torch.unique(torch.cat([found, drawn]))
    return found[torch.randperm(len(found), generator=generator)[:count]]


def _random_order(count: int, train_fraction: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    num_train = int(count * train_fraction) if 0 < train_fraction < 1 else 0
    if not 0 < num_train < count:
        raise ValueError(
            f"train_fraction must leave samples on both sides, got {train_fraction} of {count} samples, "
            f"which is {num_train} to learn from"
        )
    order = torch.randperm(count, generator=generator)
    return order[:num_train], order[num_train:]


def _split(inputs: Tensor, target: Tensor, order: tuple[Tensor, Tensor], num_classes: int) -> AlgorithmicSplit:
    train, test = order
    return AlgorithmicSplit(inputs[train], target[train], inputs[test], target[test], num_classes)
