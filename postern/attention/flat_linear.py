"""Linear layers for a few rows, as in decoding: the weights are read once, and rows are filled up to 8 and not to 64.

Paper: "FlashDecoding++: Faster Large Language Model Inference on GPUs", arXiv 2311.01282, section 4. On a GPU a Triton
kernel reads the weights as they are, loading one tile while it multiplies another. On the CPU the weights are packed
into panels of 32 outputs, which stream from memory once for up to 8 rows whose sums stay in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention import _decoding_kernels, _triton_kernels
from postern.attention._decoding_kernels import PANEL
from postern.errors import Unavailable
from postern.precision import without_autocast

if TYPE_CHECKING:
    from postern.attention.gemm_dispatch import GemmDispatcher

FlatBackend = Literal["auto", "torch", "native", "triton"]

# Rows that share one pass over the weights.
FLAT_ROWS = 8


def pack_weight(weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "panels inputs 32"]:
    """Cut weights into panels of 32 outputs, each ``[inputs, 32]``; the last one is filled up with zeros.

    Args:
        weight: as of `torch.nn.Linear`.

    Raises:
        ValueError: weights that are no matrix.
    """
    if weight.dim() != 2:
        raise ValueError(f"weights are [outputs, inputs], got {list(weight.shape)}")
    filled = F.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return filled.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def unpack_weight(packed: Float[Tensor, "panels inputs 32"], out_features: int) -> Float[Tensor, "outputs inputs"]:
    """Undo `pack_weight`.

    Args:
        packed: the panels.
        out_features: rows of the weights.

    Raises:
        ValueError: another number of outputs than fits the panels.
    """
    _check_packed(packed, out_features, packed.shape[1])
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:out_features].contiguous()


def flat_linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
    *,
    packed: Float[Tensor, "panels inputs 32"] | None = None,
    backend: FlatBackend = "auto",
) -> Float[Tensor, "*batch outputs"]:
    """``x W^T + b`` for few rows; for inference, without gradients.

    Any number of rows is right. Products are summed in float32 at least.

    Args:
        x: inputs.
        weight: as of `torch.nn.Linear`.
        bias: added.
        packed: the same weights from `pack_weight`, which the compiled kernel needs.
        backend: "native" for the compiled kernel, "triton", or "torch" for `torch.nn.functional.linear` on rows filled
            up to a multiple of 8; "auto" for the fastest that this machine has for these tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a gradient that would be lost, an unknown
            backend, or the native one without packed weights.
        Unavailable: a backend that was asked for and is not there.
    """
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x ends with the inputs of weights [outputs, inputs], got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.device != weight.device or not x.is_floating_point():
        raise ValueError(
            f"x and weights have one floating-point dtype and one device, got {x.dtype} on {x.device} and "
            f"{weight.dtype} on {weight.device}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"a bias has {len(weight)} elements of {x.dtype}, got {list(bias.shape)} of {bias.dtype}")
    if packed is not None:
        _check_packed(packed, *weight.shape)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise ValueError("flat products have no gradient: use them under torch.no_grad(), or torch's linear")
    arguments = (x, weight, bias, packed, _choose(backend, x, packed))
    return _operator(*arguments) if torch.compiler.is_compiling() else _run(*arguments)


def _check_packed(packed: Tensor, outputs: int, inputs: int) -> None:
    expected = (-(-outputs // PANEL), inputs, PANEL)
    if packed.shape != expected:
        raise ValueError(f"weights [{outputs}, {inputs}] are packed as {list(expected)}, got {list(packed.shape)}")


def _choose(backend: FlatBackend, x: Tensor, packed: Tensor | None) -> str:
    if backend not in get_args(FlatBackend):
        raise ValueError(f"backend is one of {', '.join(get_args(FlatBackend))}; got {backend!r}")
    if backend == "native":
        if not _decoding_kernels.STATUS.available:
            raise Unavailable(_decoding_kernels.STATUS.reason)
        if packed is None or not _decoding_kernels.can_run(x, packed):
            raise ValueError(
                "the compiled kernel takes packed weights in float32, bfloat16 or float16 on the CPU; got "
                f"{'none' if packed is None else packed.dtype} and x in {x.dtype} on {x.device}"
            )
    if backend == "triton":
        _triton_kernels.require(x)
    if backend != "auto":
        return backend
    if x.device.type == "cuda" and _triton_kernels.IS_AVAILABLE and x.dtype != torch.float64:
        return "triton"
    if packed is not None and _decoding_kernels.IS_FAST and _decoding_kernels.can_run(x, packed):
        return "native"
    return "torch"


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, backend: str) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if backend == "native" and rows.numel():
        assert packed is not None, "chosen with packed weights alone"
        wide_bias = None if bias is None else bias.float()
        out = _decoding_kernels.multiply(rows.float(), packed, len(weight), wide_bias).to(x.dtype)
    elif backend == "triton" and rows.numel():
        out = _triton_kernels.multiply(rows, weight, bias)
    else:
        with without_autocast(x.device):
            filled = F.pad(rows, (0, 0, 0, -len(rows) % FLAT_ROWS))
            out = F.linear(filled, weight, bias)[: len(rows)]
    return out.reshape(*x.shape[:-1], len(weight))


_LIBRARY = torch.library.Library("postern", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "flat_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, str backend) -> Tensor"
)
_LIBRARY.impl("flat_linear", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_operator = torch.ops.postern.flat_linear.default


def _shape_of_result(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.register_fake("postern::flat_linear", _shape_of_result, lib=_LIBRARY)


class FlatLinear(nn.Linear):
    """A linear layer whose inference on few rows is a flat product.

    It has the parameters and the state of `torch.nn.Linear` and trains as one. In evaluation mode, without gradients
    and without autocast, it picks the kernel by the number of rows: by a dispatcher's table, or without one the flat
    product for up to 8 rows. For the compiled kernel it keeps a packed copy of the weights, which takes as much memory
    as they do; it is made at the first use, and anew when the weights have changed. A compiled model uses the copy that
    was there when it was compiled, so run it once before, and compile anew after changing weights.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: whether one is added.
        dispatcher: picks the kernel; see `postern.attention.GemmDispatcher`.
        device: where the parameters are.
        dtype: of the parameters.
    """

    packed: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dispatcher: GemmDispatcher | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.dispatcher = dispatcher
        self.register_buffer("packed", None, persistent=False)
        self._packed_from: tuple[int, int] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, dispatcher: GemmDispatcher | None = None) -> Self:
        """Return a flat layer with the same parameters and in the same mode.

        Args:
            linear: the layer; its parameters are shared.
            dispatcher: picks the kernel.
        """
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, dispatcher=dispatcher, device="meta"
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """``x W^T + b``."""
        is_tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *self.parameters()))
        if self.training or is_tracked or x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        rows = x.numel() // max(1, self.in_features)
        if self.dispatcher is not None:
            kernel = self.dispatcher.choose(rows, self.out_features, self.in_features)
        else:
            kernel = "flat" if rows <= FLAT_ROWS else "vendor"
        if kernel == "vendor":
            return super().forward(x)
        if kernel == "gemv":
            return linear_by_rows(x, self.weight, self.bias)
        if not torch.compiler.is_compiling():
            self._pack()
        return flat_linear(x, self.weight, self.bias, packed=self.packed)

    def _pack(self) -> None:
        """Bring the packed copy up to date, where the compiled kernel can use one."""
        if not (_decoding_kernels.IS_FAST and _decoding_kernels.can_run(self.weight)):
            self.packed = self._packed_from = None
            return
        # Tensors made in inference mode count no versions, and are not meant to change.
        state = (self.weight.data_ptr(), -1 if self.weight.is_inference() else self.weight._version)
        if self.packed is None or state != self._packed_from:
            self.packed, self._packed_from = pack_weight(self.weight.detach()), state

    def __getstate__(self) -> dict[str, Any]:
        """A copy packs its own weights."""
        state = self.__dict__.copy()
        state["_buffers"] = self._buffers | {"packed": None}
        state["_packed_from"] = None
        return state


def linear_by_rows(
    x: Float[Tensor, "*batch inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "*batch outputs"]:
    """``x W^T + b``, a product of the matrix with one row after the other.

    Args:
        x: inputs.
        weight: as of `torch.nn.Linear`.
        bias: added.
    """
    rows = x.reshape(-1, x.shape[-1])
    products = [torch.mv(weight, row) for row in rows]
    out = torch.stack(products) if products else rows.new_empty(0, len(weight))
    if bias is not None:
        out = out + bias
    return out.reshape(*x.shape[:-1], len(weight))
