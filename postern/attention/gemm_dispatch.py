"""Which matrix product is fastest for how many rows: a table of two thresholds a shape of the weights, tuned once.

Paper: "FlashDecoding++: Faster Large Language Model Inference on GPUs", arXiv 2311.01282, section 5. A decoder has four
shapes of weights alone, and its rows are the sequences that are decoded at once; so a table is small, and it is right
for one machine, number of threads, version of torch and dtype.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from postern import _native
from postern.attention.flat_linear import flat_linear, linear_by_rows, pack_weight
from postern.machine import cache_folder, processor
from postern.timing import copies_beyond_cache, replayed, times_by_turns

GemmKernel = Literal["gemv", "flat", "vendor"]
Shape = tuple[int, int]
Seconds = Mapping[int, Mapping[GemmKernel, float]]

KERNELS: tuple[GemmKernel, ...] = get_args(GemmKernel)
ROWS = (1, 2, 4, 8, 16, 32, 64)
_FORMAT = 1  # changes when the same file means something else


class GemmDispatcher:
    """Picks a matrix product by the shape of the weights and the number of rows, from what was measured.

    The kernels are "gemv", a product of the matrix with one row after the other; "flat",
    `postern.attention.flat_linear`; and "vendor", `torch.nn.functional.linear`. A shape has two thresholds: below
    the first "gemv" runs, below the second "flat", and from there on "vendor". Shapes that were not measured, and more
    rows than were, go to the vendor's.

    Args:
        seconds: by the shape of the weights (outputs, inputs), by rows, by kernel.
        machine: where that was measured; by default this machine, as it is now, for float32.

    Raises:
        ValueError: a shape without measurements, sizes below 1, a kernel that is missing or unknown, or times that are
            not positive.
    """

    def __init__(self, seconds: Mapping[Shape, Seconds], machine: Mapping[str, str | int] | None = None) -> None:
        for shape, table in seconds.items():
            if len(shape) != 2 or min(shape) < 1 or not table:
                raise ValueError(f"a shape is (outputs, inputs) with measurements, got {shape} with {len(table)}")
            for rows, times in table.items():
                if rows < 1 or set(times) != set(KERNELS) or not all(0 < t < math.inf for t in times.values()):
                    raise ValueError(
                        f"measurements are positive seconds of {', '.join(KERNELS)} for at least one row, "
                        f"got {dict(times)} for {rows} at {shape}"
                    )
        self.seconds: dict[Shape, dict[int, dict[GemmKernel, float]]] = {
            shape: {rows: dict(table[rows]) for rows in sorted(table)} for shape, table in seconds.items()
        }
        self.machine = dict(machine_of(torch.float32) if machine is None else machine)
        self._thresholds = {shape: _thresholds(table) for shape, table in self.seconds.items()}

    @classmethod
    def profile(
        cls,
        shapes: Iterable[Shape],
        rows: Sequence[int] = ROWS,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        repeats: int = 15,
    ) -> Self:
        """Measure the kernels on this machine.

        Args:
            shapes: of the weights, (outputs, inputs).
            rows: numbers of rows.
            dtype: of weights and inputs.
            device: where.
            repeats: calls of each, of which the best counts.

        Raises:
            ValueError: sizes or repeats below 1, or no rows.
        """
        if not rows or min(rows) < 1 or repeats < 1:
            raise ValueError(f"rows and repeats are at least 1, got {list(rows)} and {repeats}")
        seconds = {}
        for outputs, inputs in shapes:
            if min(outputs, inputs) < 1:
                raise ValueError(f"a shape is (outputs, inputs), at least 1 each; got ({outputs}, {inputs})")
            weight = _normal(outputs, inputs, dtype=dtype, device=device)
            packed = pack_weight(weight) if weight.device.type == "cpu" else None
            weights = copies_of(weight)
            seconds[outputs, inputs] = {
                count: {
                    name: min(times)
                    for name, times in times_by_turns(
                        gemm_calls(_normal(count, inputs, dtype=dtype, device=device), weights, packed),
                        repeats,
                        each=len(weights),
                    ).items()
                }
                for count in rows
            }
        return cls(seconds, machine_of(dtype, device))

    @classmethod
    def tuned(
        cls,
        shapes: Iterable[Shape],
        rows: Sequence[int] = ROWS,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        path: Path | str | None = None,
        repeats: int = 15,
    ) -> Self:
        """Return this machine's table from its file; measure what the file lacks, and keep it there.

        Args:
            shapes: of the weights, (outputs, inputs).
            rows: numbers of rows.
            dtype: of weights and inputs.
            device: where.
            path: the file; by default one for this machine, number of threads, version of torch and dtype, in the
                user's folder for caches. The default file is measured anew where it is broken.
            repeats: see `profile`.

        Raises:
            ValueError: a file that was named and is broken or of another machine; sizes below 1.
            OSError: the file that was named cannot be written.
        """
        machine = machine_of(dtype, device)
        file = default_path(machine) if path is None else Path(path)
        known: dict[Shape, dict[int, dict[GemmKernel, float]]] = {}
        if file.exists():
            try:
                known = cls.load(file, dtype=dtype, device=device).seconds
            except (ValueError, OSError):
                if path is not None:
                    raise
        wanted = list(shapes)
        missing = [shape for shape in wanted if not known.get(shape, {}).keys() >= set(rows)]
        if not missing:
            return cls({shape: known[shape] for shape in wanted}, machine)
        measured = cls.profile(missing, rows, dtype=dtype, device=device, repeats=repeats)
        known |= measured.seconds
        try:
            cls(known, machine).save(file)
        except OSError:
            if path is not None:
                raise  # else a folder that cannot be written costs time at the next start, nothing else
        return cls({shape: known[shape] for shape in wanted}, machine)

    def thresholds(self, outputs: int, inputs: int) -> tuple[float, float]:
        """Rows from which "flat" and "vendor" take over, the paper's M1 and M2; infinite where none was measured.

        Args:
            outputs: of the weights.
            inputs: of the weights.

        Raises:
            ValueError: a shape that was not measured.
        """
        if (outputs, inputs) not in self._thresholds:
            known = ", ".join(map(str, self._thresholds)) or "none"
            raise ValueError(f"weights ({outputs}, {inputs}) were not measured; there are: {known}")
        return self._thresholds[outputs, inputs]

    def choose(self, rows: int, outputs: int, inputs: int) -> GemmKernel:
        """Return the kernel for so many rows and weights of this shape.

        Args:
            rows: of the inputs.
            outputs: of the weights.
            inputs: of the weights.
        """
        table = self.seconds.get((outputs, inputs))
        if table is None or rows > max(table):
            return "vendor"
        first, second = self._thresholds[outputs, inputs]
        return "gemv" if rows < first else "flat" if rows < second else "vendor"

    def __call__(
        self,
        x: Float[Tensor, "*batch inputs"],
        weight: Float[Tensor, "outputs inputs"],
        bias: Float[Tensor, " outputs"] | None = None,
        *,
        packed: Float[Tensor, "panels inputs 32"] | None = None,
    ) -> Float[Tensor, "*batch outputs"]:
        """``x W^T + b`` by the kernel that `choose` names; for inference, without gradients.

        Args:
            x: inputs.
            weight: as of `torch.nn.Linear`.
            bias: added.
            packed: the same weights from `postern.attention.pack_weight`, for "flat" on the CPU.

        Raises:
            ValueError: see `postern.attention.flat_linear`.
        """
        kernel = self.choose(x.numel() // max(1, x.shape[-1]), *weight.shape)
        if kernel == "gemv":
            return linear_by_rows(x, weight, bias)
        if kernel == "flat":
            return flat_linear(x, weight, bias, packed=packed)
        return F.linear(x, weight, bias)

    def save(self, path: Path | str) -> None:
        """Write the table as JSON; the file appears whole or not at all.

        Args:
            path: the file; its folder is made.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        body = {
            "format": _FORMAT,
            "machine": self.machine,
            "seconds": [
                {"outputs": outputs, "inputs": inputs, "rows": rows, **times}
                for (outputs, inputs), table in self.seconds.items()
                for rows, times in table.items()
            ],
        }
        text = json.dumps(body | {"checksum": _checksum(body)}, indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Self:
        """Read a table that was measured on this machine, with as many threads, this torch and this dtype.

        Args:
            path: the file.
            dtype: of weights and inputs.
            device: where they are.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no table, was changed or cut off, or was measured elsewhere; the text says which.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            checksum = document.pop("checksum")
            if document["format"] != _FORMAT or checksum != _checksum(document):
                raise ValueError("its format or its checksum is another")
            measured_on = document["machine"]
            seconds: dict[Shape, dict[int, dict[GemmKernel, float]]] = {}
            for row in document["seconds"]:
                table = seconds.setdefault((int(row["outputs"]), int(row["inputs"])), {})
                table[int(row["rows"])] = {name: float(row[name]) for name in KERNELS}
            found = cls(seconds, measured_on)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no table of matrix products, or a broken one; delete it ({error})") from None
        machine = machine_of(dtype, device)
        if found.machine != machine:
            differences = "; ".join(
                f"{key}: {found.machine.get(key)!r} there, {machine.get(key)!r} here"
                for key in sorted(found.machine.keys() | machine.keys())
                if found.machine.get(key) != machine.get(key)
            )
            raise ValueError(f"{path} was measured elsewhere and says nothing of this machine ({differences})")
        return found


def machine_of(dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, str | int]:
    """What a table depends on: processor, threads, version of torch, instructions and dtype.

    Args:
        dtype: of weights and inputs.
        device: where they are.
    """
    device = torch.device(device)
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": str(_native.status().instruction_set) if device.type == "cpu" else device.type,
        "dtype": str(dtype),
    }


def default_path(machine: Mapping[str, str | int]) -> Path:
    """Where a machine's table is kept.

    Args:
        machine: see `machine_of`.
    """
    return cache_folder() / "matrix-products" / f"{_checksum(machine)[:16]}.json"


def gemm_calls(
    x: Float[Tensor, "rows inputs"], weights: Sequence[Float[Tensor, "outputs inputs"]], packed: Tensor | None
) -> dict[GemmKernel, Callable[[], None]]:
    """The kernels on these tensors, to be timed: each goes through all weights; see `postern.timing.replayed`.

    Args:
        x: inputs.
        weights: each as of `torch.nn.Linear`; copies, where a single one would stay in the cache, see
            `postern.timing.copies_beyond_cache`.
        packed: the only one from `postern.attention.pack_weight`, on the CPU.
    """
    kernels: dict[GemmKernel, Callable[[Tensor], Tensor]] = {
        "gemv": lambda weight: linear_by_rows(x, weight, None),
        "flat": lambda weight: flat_linear(x, weight, packed=packed),
        "vendor": lambda weight: F.linear(x, weight),
    }
    return {
        name: replayed([partial(kernel, weight) for weight in weights], x.device) for name, kernel in kernels.items()
    }


def copies_of(weight: Tensor) -> list[Tensor]:
    """The weights as often as `gemm_calls` needs them.

    Args:
        weight: the first of them.
    """
    others = copies_beyond_cache(weight.numel() * weight.element_size(), weight.device) - 1
    return [weight, *(weight.clone() for _ in range(others))]


def _normal(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _thresholds(table: Seconds) -> tuple[float, float]:
    """The thresholds with the least sum of logarithms of seconds over the rows that were measured.

    The paper goes up until the next kernel is faster, which one noisy time leads astray; where each kernel is best in
    one stretch, both give the same.
    """
    rows = sorted(table)
    edges: list[float] = [*rows, math.inf]

    def cost(first: float, second: float) -> float:
        kernels: list[GemmKernel] = ["gemv" if m < first else "flat" if m < second else "vendor" for m in rows]
        return sum(math.log(table[m][kernel]) for m, kernel in zip(rows, kernels, strict=True))

    pairs = [(first, second) for first in edges for second in edges if first <= second]
    return min(pairs, key=lambda pair: (cost(*pair), pair))
