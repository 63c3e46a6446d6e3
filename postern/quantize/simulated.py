"""Post-training quantisation of a whole network, simulated: every weight and every activation is rounded to a grid.

The network runs as it is, in floating point, while its operations are intercepted: outputs of matrix products,
convolutions, softmaxes, normalisations, activation functions, and of additions and products of two tensors (the
residual stream, gates) are rounded to ``2**bits`` values over a range that was calibrated on sample batches. So it
shows what integer hardware would compute, for any PyTorch network, without being any faster.

Protocol of "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929: one
grid a tensor; weights on a symmetric grid; activations on an asymmetric one, whose range is a running minimum and
maximum. Unlike in the paper's code, ranges are calibrated while activations are not yet rounded, so that they do not
depend on the bits.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from postern.quantize.affine import RunningRange, check_bits, fake_quantize, min_max_weight_grid, mse_weight_grid
from postern.softmax.clipped import clipped_softmax, softmax_off_by_one

WeightRange = Literal["min-max", "mse"]

_LOWEST_ACTIVATION = -1e9  # what lies below is a mask, added to logits


def _spellings(names: str, operators: Mapping[str, str]) -> dict[Callable[..., Any], str]:
    """The functions behind operations' names: ``torch.x``, ``functional.x``, ``Tensor.x`` and Python's operators."""
    found: dict[Callable[..., Any], str] = {}
    for name in names.split():
        for place in (torch, F, torch.Tensor):
            if hasattr(place, name):
                found[getattr(place, name)] = name
    for name, spellings in operators.items():
        for spelling in spellings.split():
            found[getattr(torch.Tensor, spelling)] = name
            if hasattr(operator, spelling):
                found[getattr(operator, spelling)] = name
    return found


_OPERATIONS = _spellings(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm addmm baddbmm einsum "
    "embedding softmax layer_norm rms_norm batch_norm group_norm instance_norm relu leaky_relu elu gelu silu sigmoid "
    "tanh hardswish hardsigmoid avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d",
    {"matmul": "__matmul__ __rmatmul__"},
) | {clipped_softmax: "clipped_softmax", softmax_off_by_one: "softmax_off_by_one"}
# of two tensors; with a number they only shift or stretch the grid
_ARITHMETIC = _spellings(
    "add sub mul div",
    {
        "add": "__add__ __radd__ __iadd__ add_",
        "sub": "__sub__ __rsub__ __isub__ sub_",
        "mul": "__mul__ __rmul__ __imul__ mul_",
        "div": "__truediv__ __rtruediv__ __itruediv__ div_",
    },
)
_OPAQUE = {F.multi_head_attention_forward, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class SimulatedQuantization(nn.Module):
    """A network with weights and activations rounded to grids; made by `simulate_quantization`.

    Calling it calls the network. Activations that are not finite numbers of moderate size, the masks that are added to
    attention logits, pass as they are.

    Attributes:
        model: the network, a copy with rounded weights.
        activation_bits: may be changed at any time; None leaves activations alone.
    """

    def __init__(
        self, model: nn.Module, activation_bits: int | None, momentum: float, percentile: float | None
    ) -> None:
        super().__init__()
        if activation_bits is not None:
            check_bits(activation_bits)
        RunningRange(momentum, percentile)  # refuses impossible settings before the work
        self.model = model
        self.activation_bits = activation_bits
        self.momentum = momentum
        self.percentile = percentile
        self._ranges = nn.ModuleDict()
        self._masks: set[str] = set()
        self._exempt: set[str] = set()
        self._place = _Place()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._place.enter, name))
            module.register_forward_hook(self._place.leave, always_call=True)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest activation of each operation, by the module, the operation and its number there."""
        found = {}
        for key, module in self._ranges.items():
            tensors = cast(RunningRange, module)
            found[_readable(key)] = (tensors.low.item(), tensors.high.item())
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with rounded weights and activations.

        Raises:
            ValueError: an operation that calibration did not meet, or one that hides its activations.
        """
        if self.activation_bits is None:
            return self.model(*args, **kwargs)
        check_bits(self.activation_bits)
        self._place.reset()
        with _Interception(self._quantize, self._place):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def calibrate(self, batch: Any) -> None:
        """Widen the ranges to a batch, given as in `simulate_quantization`.

        Raises:
            ValueError: activations that are not finite, or an operation that hides its activations.
        """
        self._place.reset()
        with _Interception(self._observe, self._place):
            if isinstance(batch, Mapping):
                self.model(**batch)
            elif isinstance(batch, tuple | list):
                self.model(*batch)
            else:
                self.model(batch)

    def _quantize(self, key: str, output: Tensor) -> Tensor:
        if key in self._exempt or key in self._masks:
            return output
        if key not in self._ranges:
            raise ValueError(f"{_readable(key)} was not met in calibration, so its range is unknown")
        bits = self.activation_bits
        assert bits is not None
        quantized: Tensor = self._ranges[key](output, bits)
        return quantized

    def _observe(self, key: str, output: Tensor) -> Tensor:
        if key in self._masks or key in self._exempt:
            return output
        if self._place.is_exempt():
            self._exempt.add(key)
        elif (output < _LOWEST_ACTIVATION).any():
            self._masks.add(key)
            if key in self._ranges:
                del self._ranges[key]
        else:
            if key not in self._ranges:
                self._ranges[key] = RunningRange(self.momentum, self.percentile).to(output.device)
            cast(RunningRange, self._ranges[key]).update(output)
        return output


def simulate_quantization(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    weight_bits: int | None = 8,
    activation_bits: int | None = 8,
    weight_range: WeightRange = "min-max",
    momentum: float = 0.9,
    percentile: float | None = None,
    skip: Sequence[str] = (),
    max_batches: int = 16,
) -> SimulatedQuantization:
    """Round a network's weights and activations to grids, one a tensor, as integer hardware would.

    All parameters are rounded except biases. The network is copied, put in evaluation mode, and left as it was.

    Args:
        model: any network whose activations pass through PyTorch's functions one by one. Fused attention
            (``scaled_dot_product_attention``) is taken apart; `torch.nn.MultiheadAttention` and recurrent layers hide
            their activations and are refused.
        calibration: batches of inputs: a tensor, a tuple of arguments, or a mapping of named arguments each.
        weight_bits: 2 to 16; None leaves weights alone.
        activation_bits: 2 to 16; None leaves activations alone. See `SimulatedQuantization.activation_bits`.
        weight_range: "min-max" reaches the largest weight; "mse" searches the grid with the smallest squared error.
        momentum: of the running range of activations.
        percentile: calibrate activations on this percentile instead of the extremes; the paper takes 99.999 for OPT.
        skip: patterns of names of modules that keep their precision, weights and outputs, such as ``"lm_head"``.
        max_batches: how many calibration batches to use; the paper takes 16 for BERT and 4 for OPT.

    Returns:
        A module that is called like the network.

    Raises:
        ValueError: no batches, settings out of bounds, or a pattern that fits no module.
    """
    if weight_bits is not None:
        check_bits(weight_bits)
    if weight_range not in ("min-max", "mse"):
        raise ValueError(f"weight_range is 'min-max' or 'mse', got {weight_range!r}")
    if max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    skipped = _skipped(model, skip)
    copied = copy.deepcopy(model).eval()
    quantized = SimulatedQuantization(copied, activation_bits, momentum, percentile)
    quantized.eval()
    quantized._place.skipped = skipped
    if weight_bits is not None:
        _round_weights(copied, weight_bits, weight_range, skipped)
    batches = list(itertools.islice(calibration, max_batches))
    if not batches:
        raise ValueError("calibration needs at least one batch, got none")
    for batch in batches:
        quantized.calibrate(batch)
    return quantized


class _Place:
    """Where in the network the computation is, and how often each operation has occurred there."""

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.counts: dict[str, int] = {}
        self.skipped: frozenset[str] = frozenset()

    def reset(self) -> None:
        self.modules.clear()
        self.counts.clear()

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.modules.append(name)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.modules:
            self.modules.pop()

    def key(self, operation: str) -> str:
        """A name for the present occurrence of an operation, fit for a `torch.nn.ModuleDict`."""
        name = f"{self.modules[-1] if self.modules else ''}/{operation}".replace(".", "|")
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        return f"{name}/{number}"

    def is_exempt(self) -> bool:
        return any(name in self.skipped for name in self.modules)


class _Interception(TorchFunctionMode):
    """Hands the output of each operation to ``act(key, output)``, and goes on with what that returns."""

    def __init__(self, act: Callable[[str, Tensor], Tensor], place: _Place) -> None:
        super().__init__()
        self.act = act
        self.place = place

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPAQUE:
            raise ValueError(
                f"{getattr(func, '__name__', func)} hides its activations from quantisation; use a layer made of "
                "matrix products, such as postern.attention.SelfAttention"
            )
        if func is F.scaled_dot_product_attention:
            with self:
                return _explicit_attention(*args, **kwargs)
        output = func(*args, **kwargs)
        operation = _OPERATIONS.get(func)
        if operation is None and _tensor_operands(args, kwargs) == 2:
            operation = _ARITHMETIC.get(func)
        if operation is None or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return self.act(self.place.key(operation), output)


def _tensor_operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return sum(isinstance(operand, Tensor) and operand.dim() > 0 for operand in (*args, *kwargs.values()))


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` in separate operations, with its own reading of the causal order."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.matmul(query, key.transpose(-1, -2)) * scale
    allowed = None
    if is_causal:
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    weights = torch.softmax(logits, -1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)  # a row that may see nothing
    return torch.matmul(F.dropout(weights, dropout_p, training=dropout_p > 0), value)


def _readable(key: str) -> str:
    place, operation, number = key.rsplit("/", 2)
    return f"{place.replace('|', '.') or 'the network'}: {operation} {int(number) + 1}"


def _skipped(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    names = [name for name, _ in model.named_modules()]
    found: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise ValueError(f"{type(model).__name__} has no module whose name fits {pattern!r}")
        found |= fitting
    return frozenset(found)


@torch.no_grad()
def _round_weights(model: nn.Module, bits: int, weight_range: WeightRange, skipped: frozenset[str]) -> None:
    """Round all parameters but biases in place; one that a skipped module shares with others stays whole there."""
    choose = min_max_weight_grid if weight_range == "min-max" else mse_weight_grid
    rounded: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        if any(path == name or path.startswith(f"{name}.") or not name for name in skipped):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias") or not parameter.is_floating_point():
                continue
            if parameter not in rounded:
                value = fake_quantize(parameter.detach(), choose(parameter, bits))
                rounded[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(module, name, rounded[parameter])
