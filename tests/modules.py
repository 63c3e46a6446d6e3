"""What every module of postern must survive: copying, saving, compiling, mixed precision, and another device.

`check_module` is for the tests of all families. It compares outputs and gradients, so it catches a module that draws
its parameters from a generator of its own, keeps state outside its ``state_dict``, shares tensors between copies,
changes its inputs, breaks the graph of ``torch.compile``, or makes tensors on a device of its own choice.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

Call = Callable[..., Any]


def check_module(
    build: Callable[[], nn.Module],
    *inputs: Any,
    call: Call | None = None,
    compile: bool = True,
    checkpoint: bool = True,
    bfloat16: bool = True,
    meta: bool = True,
    tolerance: float = 0.1,
) -> None:
    """Assert that a module is reproducible, can be copied, saved, compiled, run in bfloat16 and moved.

    It checks in turn that
    - two builds from the same seed agree, and the inputs are left as they were;
    - a build from another seed gives identical outputs after it has loaded the first one's state, saved and read with
      ``weights_only=True``;
    - a deep copy gives identical outputs, and changing it leaves the original alone;
    - ``torch.compile(fullgraph=True)`` gives the outputs and gradients of the eager module;
    - gradient checkpointing gives the same outputs and gradients;
    - autocast to bfloat16 gives finite outputs and gradients, the outputs near those in float32;
    - nothing is computed on a device of the module's own choice, in the forward and the backward pass.

    Args:
        build: makes the module, on the CPU in float32; called with the global generator seeded. It sets the mode
            (``.eval()``) if training mode is not what is wanted.
        inputs: what the module is called with; tensors are copied before each call.
        call: what to run, ``call(module, *inputs)``; the module's own call if None. For modules with other methods:
            ``call=lambda head, hidden, target: head.loss(hidden, target)``.
        compile: whether to check compilation.
        checkpoint: whether to check gradient checkpointing.
        bfloat16: whether to check autocast.
        meta: whether to check the independence of a device, by running on the "meta" device.
        tolerance: largest accepted ``max|bf16 - float32| / max|float32|`` of an output; infinite for modules that
            choose by comparison, where rounding may change the choice.

    Raises:
        AssertionError: one of these is not so; the text says which, and where.
    """
    run = _call_module if call is None else call
    module = _seeded(build, 0)
    expected = _evaluate(copy.deepcopy(module), inputs, run)
    if not expected:
        raise AssertionError("the module returned no tensor")

    _same(_evaluate(_seeded(build, 0), inputs, run), expected, "a second build from the same seed", exact=True)

    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = _seeded(build, 1)
    loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    _same(_evaluate(loaded, inputs, run), expected, "a build that loaded the state", exact=True)

    copied = copy.deepcopy(module)
    _same(_evaluate(copied, inputs, run), expected, "a deep copy", exact=True)
    with torch.no_grad():
        for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
            tensor.zero_() if tensor.dtype == torch.bool else tensor.add_(1)
            original = module.get_parameter(name) if isinstance(tensor, nn.Parameter) else module.get_buffer(name)
            if tensor.numel() and original.data_ptr() == tensor.data_ptr():
                raise AssertionError(f"a deep copy shares {name!r} with the original")
    _same(_evaluate(copy.deepcopy(module), inputs, run), expected, "the original of a changed copy", exact=True)

    if compile:
        torch.compiler.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        _same(_evaluate(copy.deepcopy(module), inputs, compiled), expected, "the compiled module", exact=False)
    if checkpoint:

        def recomputed(module: nn.Module, *inputs: Any) -> Any:
            return torch_checkpoint(run, module, *inputs, use_reentrant=False)

        _same(_evaluate(copy.deepcopy(module), inputs, recomputed), expected, "the checkpointed module", exact=False)
    if bfloat16:
        with torch.autocast("cpu", torch.bfloat16):
            lower = _evaluate(copy.deepcopy(module), inputs, run)
        _near(lower, expected, tolerance)
    if meta:
        moved_module, moved_inputs = copy.deepcopy(module).to("meta"), _to_meta(inputs)
        with _OneDevice():
            moved = _evaluate(moved_module, moved_inputs, run)
        for path, tensor in moved.items():
            if tensor.device.type != "meta":
                raise AssertionError(f"{path} of a module and inputs on 'meta' is on {tensor.device}")


def _call_module(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = build()
    if not isinstance(module, nn.Module):
        raise AssertionError(f"build must return an nn.Module, got {type(module).__name__}")
    return module


def _evaluate(module: nn.Module, inputs: tuple[Any, ...], run: Call) -> dict[str, Tensor]:
    """Outputs, and gradients of the outputs' sum of squares with respect to inputs and parameters, by path."""
    fresh = copy.deepcopy([_detached(value) for value in inputs])
    leaves = {path: t for path, t in _tensors(fresh, "input") if t.is_floating_point() and t.is_leaf}
    before = {path: tensor.detach().clone() for path, tensor in _tensors(fresh, "input")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    torch.manual_seed(2)
    outputs = dict(_tensors(run(module, *fresh), "output"))
    for path, tensor in _tensors(fresh, "input"):
        if tensor.device.type != "meta" and not torch.equal(tensor, before[path]):
            raise AssertionError(f"the module changed {path}")

    differentiable = [tensor for tensor in outputs.values() if tensor.requires_grad]
    result = {path: tensor.detach() for path, tensor in outputs.items()}
    if differentiable:
        # squares: the gradient of a plain sum is zero for whatever sums to one
        total = torch.stack([tensor.float().square().sum() for tensor in differentiable]).sum()
        torch.autograd.backward([total])
        for path, tensor in [*leaves.items(), *module.named_parameters()]:
            if tensor.grad is not None:
                result[f"gradient of {path}"] = tensor.grad
    return result


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), f"{path}.{field.name}")


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        moved = [_to_meta(item) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _to_meta(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **fields)
    return value


def _same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, *, exact: bool) -> None:
    if found.keys() != expected.keys():
        raise AssertionError(f"{what} differs in {sorted(found.keys() ^ expected.keys())}")
    bounds = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": None, "atol": None}
    for path, tensor in expected.items():
        try:
            torch.testing.assert_close(found[path], tensor, equal_nan=True, **bounds)
        except AssertionError as error:
            raise AssertionError(f"{what}: {path}: {error}") from None


def _near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for path, tensor in expected.items():
        if path not in found:
            raise AssertionError(f"under bfloat16 autocast there is no {path}")
        lower, higher = found[path].float(), tensor.float()
        finite = torch.isfinite(higher)
        if not torch.isfinite(lower[finite]).all():
            raise AssertionError(f"under bfloat16 autocast {path} is not finite where it is in float32")
        if path.startswith("gradient") or not tensor.is_floating_point() or not finite.any():
            continue
        error = ((lower - higher)[finite].abs().max() / higher[finite].abs().max().clamp_min(1e-12)).item()
        if error > tolerance:
            raise AssertionError(f"under bfloat16 autocast {path} is off by {error:.3g} of its largest value")


class _OneDevice(TorchFunctionMode):
    """Rejects operations on tensors of two devices; the meta device itself lets some of them pass."""

    _MOVES = frozenset({Tensor.to, Tensor.copy_, Tensor.type_as, Tensor.__deepcopy__})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._MOVES:
            devices = {tensor.device.type for _, tensor in _tensors((args, kwargs), "") if tensor.dim() > 0}
            if len(devices) > 1:
                name = getattr(func, "__name__", str(func))
                raise AssertionError(
                    f"{name} got tensors on {' and '.join(sorted(devices))}; which module's own choice?"
                )
        return func(*args, **kwargs)
