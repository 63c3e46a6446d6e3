"""Gradient caching: train an encoder against more inputs than its activations have memory for.

All labels are encoded in chunks without a graph; the loss is computed and differentiated with respect to the
embeddings alone; then each chunk is encoded again, with a graph, and the cached gradient of its embeddings goes
backward through it. The result is the gradient of the whole, at the memory of one chunk and a second forward pass.

Paper: "Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636), after "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983). The paper shards labels over GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]


class GradCache:
    """One step of training with all labels as negatives, at the memory of one chunk of them.

    A chunk's second pass sees the random numbers of its first, so that dropout is the same; the generators go on
    as if there had been one pass. Layers that change when they are called (running statistics of batch norm) change
    twice. The gradients are added to ``.grad``, as by ``backward``; the caller zeroes them and steps the optimiser.
    Under mixed precision enter autocast around `step`, and let the loss function scale the loss.

    Args:
        encoder: embeds ``[batch, ...]`` inputs to ``[batch, dim]``, e.g. a `postern.heads.DualEncoder`, or one wrapped
            by DistributedDataParallel.
        chunk: labels that are encoded at once.
        query_chunk: queries that are encoded at once and cached as labels are; None encodes all with a graph, once.

    Raises:
        ValueError: a chunk below 1.
    """

    def __init__(self, encoder: nn.Module, chunk: int, query_chunk: int | None = None) -> None:
        if chunk < 1 or (query_chunk is not None and query_chunk < 1):
            raise ValueError(f"chunks have at least one input, got chunk={chunk} and query_chunk={query_chunk}")
        self.encoder = encoder
        self.chunk = chunk
        self.query_chunk = query_chunk

    def step(self, queries: Any, labels: Any, loss: LossFunction) -> Float[Tensor, ""]:
        """Compute the loss and add its gradient to that of the encoder's parameters.

        Args:
            queries: inputs of the encoder: a tensor, or a mapping or tuple of tensors, the batch first; or a list.
            labels: the same for the labels.
            loss: ``loss(query_embeddings, label_embeddings)``, a scalar. It may have parameters of its own.

        Returns:
            The loss, without a graph.

        Raises:
            ValueError: no queries or no labels, inputs of several lengths, or a loss that is no scalar.
        """
        sides = [_Side(self.encoder, queries, self.query_chunk), _Side(self.encoder, labels, self.chunk)]
        embeddings = [side.embed() for side in sides]
        value = loss(*embeddings)
        if value.numel() != 1:
            raise ValueError(f"the loss must be a scalar, got {list(value.shape)}")
        torch.autograd.backward([value])
        for side, embedded in zip(sides, embeddings, strict=True):
            if side.is_cached and embedded.grad is not None:
                side.backward(embedded.grad)
        return value.detach()


class _Side:
    """Queries or labels: encoded once with a graph, or in chunks that are encoded again."""

    def __init__(self, encoder: nn.Module, inputs: Any, chunk: int | None) -> None:
        self.encoder = encoder
        size = _length(inputs)
        self.is_cached = chunk is not None
        step = size if chunk is None else chunk
        self.chunks = [_rows(inputs, start, start + step) for start in range(0, size, step)]
        self.states: list[_RandomState] = []

    def embed(self) -> Float[Tensor, "batch dim"]:
        if not self.is_cached:
            embedded: Tensor = self.encoder(self.chunks[0])
            return embedded
        parts = []
        with torch.no_grad():
            for chunk in self.chunks:
                self.states.append(_RandomState(self.encoder, chunk))
                parts.append(self.encoder(chunk))
        return torch.cat(parts).requires_grad_()

    def backward(self, gradient: Float[Tensor, "batch dim"]) -> None:
        start = 0
        for chunk, state in zip(self.chunks, self.states, strict=True):
            with state.replayed():
                embedded = self.encoder(chunk)
            part = gradient[start : start + len(embedded)]
            start += len(embedded)
            torch.autograd.backward([embedded], [part.to(embedded.dtype)])


class _RandomState:
    """The states of the random generators of the CPU and of the devices that an encoder and its inputs are on."""

    def __init__(self, encoder: nn.Module, inputs: Any) -> None:
        self.cpu = torch.get_rng_state()
        devices = {tensor.device for tensor in (*encoder.parameters(), *encoder.buffers(), *_tensors(inputs))}
        others = [device for device in devices if device.type not in ("cpu", "meta")]
        self.kind = others[0].type if others else "cuda"
        self.devices = sorted({device.index or 0 for device in others})
        self.on_devices = [torch.get_device_module(self.kind).get_rng_state(index) for index in self.devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers as after this state was kept, and leave the generators as they were."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.cpu)
            for index, state in zip(self.devices, self.on_devices, strict=True):
                torch.get_device_module(self.kind).set_rng_state(state, index)
            yield


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from _tensors(value)
    elif isinstance(inputs, tuple | list):
        for value in inputs:
            yield from _tensors(value)


def _length(inputs: Any) -> int:
    """Number of inputs."""
    if isinstance(inputs, Mapping | tuple):
        parts = inputs.values() if isinstance(inputs, Mapping) else inputs
        lengths = {_length(part) for part in parts}
        if len(lengths) != 1:
            raise ValueError(f"the parts of the inputs must have one length, got {sorted(lengths)}")
        return lengths.pop()
    if not len(inputs):
        raise ValueError("there must be at least one query and one label, got none")
    return len(inputs)


def _rows(inputs: Any, start: int, stop: int) -> Any:
    """The inputs from ``start`` to ``stop``."""
    if isinstance(inputs, Mapping):
        return {name: _rows(value, start, stop) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_rows(value, start, stop) for value in inputs)
    return inputs[start:stop]
