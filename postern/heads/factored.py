"""A linear output layer that a spherical loss trains exactly without computing its scores.

With the weights kept as ``W = V U + 1 omega^T`` (V is D x d, U is d x d), the Gram matrix ``Q = W^T W`` and the column
sums ``w = W^T 1``, a hidden vector h gives the sum of its D scores, ``h . w``, the sum of their squares, ``h . Q h``,
and any one score, at a cost of O(d^2). A loss of these three has a gradient

    G = 1 u^T + W S + (one row for each class that was a target),    S = sum_i beta_i h_i h_i^T,

so that ``W - eta G`` is a change of U by S, of omega by u, and of those rows of V. A step of stochastic gradient
descent on W costs O(d^2) an example whatever D is, and is the step that the dense layer would have made.

Paper: "Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets" (arXiv 1412.7091),
as used by "The Z-loss" (arXiv 1604.08859). What differs: the batch enters through S, which keeps all products of the
size d x d for large batches; the inverse of U is computed anew where that is cheaper than updating it, which also keeps
it from drifting; and U that a step makes singular is folded into V, where the paper only looks at fixed intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from postern.heads.protocol import check_hidden, check_target
from postern.heads.spherical import SphericalLoss
from postern.precision import without_autocast

# How far beyond the range a singular value of U may wander between two looks before U is folded at once: 64 costs
# float32 six of its 24 binary digits.
_SLACK = 64.0
_ROWS_AT_ONCE = 1 << 16  # of V, to spare memory


class ScoreStatistics(NamedTuple):
    """What a spherical loss sees of the scores ``o`` of each example."""

    total: Float[Tensor, "*batch"]
    square_total: Float[Tensor, "*batch"]
    target_score: Float[Tensor, "*target"]


@dataclass
class _Batch:
    """A batch, with what the layer knows of it at the weights of the forward pass."""

    hidden: Tensor  # h, [m, d]
    target: Tensor  # [m, K]
    total: Tensor  # s, [m]
    classes: Tensor  # those that are targets, each once, [n]
    index: Tensor  # of each target among the classes, [m, K]
    rows: Tensor  # of W for the classes, [n, d]


@dataclass
class _Gradient:
    """The derivatives of a loss by the statistics of a batch."""

    batch: _Batch
    alpha: Tensor  # dL/ds, [m]
    beta: Tensor  # 2 dL/dq, [m]
    gamma: Tensor  # dL/do_c, [m, K]
    hidden: Tensor  # dL/dh, [m, d]


class FactoredLinear(nn.Module):
    """A linear layer ``W h + b`` for very many outputs, trained by spherical losses in O(d^2) an example.

    `statistics` gives the sum, the square sum and the target's score, from which a `SphericalLoss` is computed. The
    backward pass through it computes the gradient of the hidden vectors, for the network below, and makes one step of
    plain stochastic gradient descent on the layer itself, equal to that of ``torch.optim.SGD`` on ``W`` and ``b``::

        loss = criterion.from_statistics(*layer.statistics(hidden, target), layer.out_features).mean()
        loss.backward()     # the layer has learned
        optimizer.step()    # of the network below; it knows nothing of this layer

    - There are **no parameters**: all state lies in buffers, which ``state_dict``, ``deepcopy`` and ``to`` carry along,
      and the layer's own step size and weight decay are attributes, to be changed at will (by a schedule, say). Only
      plain gradient descent can be done on factors: no momentum, no Adam, and no clipping of the gradient's norm.
    - **Accumulation**: with ``steps_in_backward=False``, gradients are gathered until `step` is called, also over
      several backward passes. Otherwise each backward is a step.
    - **Evaluation**: in ``eval()`` mode, the backward pass computes the gradient of the hidden vectors and leaves the
      layer alone. Calling the layer gives all scores.
    - **Precision**: it computes in the dtype of its buffers, float32 or float64, also under autocast; hidden vectors of
      another dtype are converted. A gradient scaler would scale its steps too: use bfloat16, which needs none.
    - ``torch.compile`` leaves `statistics` and `step` as they are (they break the graph): compile the network below.
      Calling the layer compiles.
    - **Not for DistributedDataParallel**: every process would make its own step, and buffers that are broadcast from
      the first would throw the others' away. Keep the layer out of the wrapped module, on one process.

    Factors lose digits when U becomes ill-conditioned. Every so many steps its singular values are looked at, and
    those far from 1 brought back if one has left its range, at a cost of O(D d) each; see `stabilize`. In training on
    text this is one pass over V in a few hundred steps. Rounding errors of Q and of the column sums add up slowly, to
    some 1e-6 in thousands of steps in float32; `fold` computes them anew.

    Args:
        in_features: d, width of the hidden vectors.
        out_features: D, number of outputs, at least 2.
        bias: whether there is a ``b``; it is the weight of one more feature, which is always 1.
        learning_rate: step size, non-negative.
        weight_decay: factor lambda of the penalty ``lambda/2 ||W||^2``, non-negative; as in ``torch.optim.SGD``.
        stabilize_every: number of steps from one look at the singular values to the next.
        singular_range: where the singular values of U may be, around 1. Each factor of 8 costs three binary digits.
        steps_in_backward: whether the backward pass makes the step, or `step`.
        device: where to put it.
        dtype: float32 or float64.

    Raises:
        ValueError: sizes below 1 (2 outputs), a negative rate or decay, a range that does not contain 1, or a dtype
            that is neither float32 nor float64.
    """

    factor: Tensor
    mixer: Tensor
    inverse_mixer: Tensor
    shift: Tensor
    gram: Tensor
    column_sum: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        learning_rate: float = 0.1,
        weight_decay: float = 0.0,
        stabilize_every: int = 100,
        singular_range: tuple[float, float] = (0.125, 8.0),
        steps_in_backward: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 2:
            raise ValueError(
                f"the layer needs in_features >= 1 and out_features >= 2, got {in_features} and {out_features}"
            )
        if learning_rate < 0 or weight_decay < 0:
            raise ValueError(
                f"learning rate and weight decay must not be negative, got {learning_rate} and {weight_decay}"
            )
        if stabilize_every < 1:
            raise ValueError(f"stabilize_every is a positive number of steps, got {stabilize_every}")
        if not 0 < singular_range[0] < 1 < singular_range[1]:
            raise ValueError(f"singular_range must contain 1 and be positive, got {singular_range}")
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bias
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.stabilize_every = stabilize_every
        self.singular_range = singular_range
        self.steps_in_backward = steps_in_backward
        self.num_steps = 0
        self._gradients: list[_Gradient] = []
        width = in_features + bias
        options: Any = {"device": device, "dtype": torch.get_default_dtype() if dtype is None else dtype}
        if options["dtype"] not in (torch.float32, torch.float64):
            raise ValueError(f"the factors need float32 or float64, got {options['dtype']}")
        self.register_buffer("factor", torch.empty(out_features, width, **options))  # V
        self.register_buffer("mixer", torch.eye(width, **options))  # U
        self.register_buffer("inverse_mixer", torch.eye(width, **options))  # U^-1
        self.register_buffer("shift", torch.zeros(width, **options))  # omega
        self.register_buffer("gram", torch.empty(width, width, **options))  # Q = W^T W
        self.register_buffer("column_sum", torch.empty(width, **options))  # w = W^T 1
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and bias from U(-1/sqrt(d), 1/sqrt(d)), as `torch.nn.Linear` does."""
        bound = self.in_features**-0.5
        self._restart(self.factor.uniform_(-bound, bound))

    @torch.no_grad()
    def set_weight(
        self, weight: Float[Tensor, "out_features in_features"], bias: Float[Tensor, " out_features"] | None = None
    ) -> None:
        """Start from the weights and bias of a dense layer, at a cost of O(D d^2).

        Raises:
            ValueError: weights of another shape, a bias too many or too few.
        """
        expected = (self.out_features, self.in_features), (self.out_features,) if self.has_bias else None
        found = tuple(weight.shape), None if bias is None else tuple(bias.shape)
        if found != expected:
            raise ValueError(f"the layer has weight and bias of the shapes {expected}, got {found}")
        self._restart(weight if bias is None else torch.cat([weight, bias[:, None]], dim=1))

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a dense layer with the same weights, at a cost of O(D d^2)."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.has_bias, device=self.factor.device, dtype=self.factor.dtype
        )
        linear.weight.copy_(self.weight())
        if self.has_bias:
            linear.bias.copy_(self._dense()[:, -1])
        return linear

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return W, at a cost of O(D d^2)."""
        return self._dense()[:, : self.in_features]

    def forward(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Return all scores ``W h + b``, at the cost of a dense layer; differentiable by the hidden vectors only.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        hidden = self._with_bias(hidden)
        with without_autocast(hidden.device):  # U may cost more digits than 16 bits have
            mixed = nn.functional.linear(hidden, self.mixer)
            return nn.functional.linear(mixed, self.factor) + (hidden @ self.shift)[..., None]

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable takes a second to import
    def statistics(
        self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"] | Int[Tensor, "*batch targets"]
    ) -> ScoreStatistics:
        """Return the sum and the square sum of the scores, and those of the targets, without computing the others.

        The backward pass from a loss of them computes the gradient of the hidden vectors; in training mode it also
        makes a step, or keeps what `step` needs. A loss that is a mean must be one before the backward pass.

        Args:
            hidden: input vectors.
            target: index of one output each, or of several in a last dimension.

        Raises:
            ValueError: hidden vectors of another width, or not floating point; targets of another shape than the batch,
                not integer, or none; a layer that was converted to less than float32.
            IndexError: a target below 0 or beyond the last output.
        """
        check_hidden(hidden, self.in_features)
        check_target(hidden, target[..., 0] if target.dim() == hidden.dim() and target.numel() else target)
        if self.factor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the factors need float32 or float64, got {self.factor.dtype}")
        rows = self._with_bias(hidden).flatten(0, -2) if hidden.dim() > 1 else self._with_bias(hidden)[None]
        targets = target.reshape(len(rows), -1).long()
        learns = self.training and torch.is_grad_enabled()
        # It makes the backward pass come by also where no gradient of the hidden vectors is wanted.
        anchor = torch.zeros((), dtype=rows.dtype, device=rows.device, requires_grad=learns)
        with without_autocast(rows.device):
            total, square_total, target_score = _Statistics.apply(rows, anchor, self, targets)  # type: ignore[no-untyped-call]
        batch = hidden.shape[:-1]
        return ScoreStatistics(total.view(batch), square_total.view(batch), target_score.view(target.shape))

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable takes a second to import
    @torch.no_grad()
    def step(self) -> None:
        """Make one step with the gradients of all backward passes since the last; none, if there were none.

        Raises:
            ValueError: ``learning_rate * weight_decay`` of 1 or more.
        """
        if self._gradients:
            gradient = self._merged()
            self._gradients = []
            with without_autocast(self.factor.device):
                self._descend(gradient)

    def discard_gradients(self) -> None:
        """Forget the gradients of all backward passes since the last step."""
        self._gradients = []

    @torch.no_grad()
    def stabilize(self) -> None:
        """If a singular value of U has left its range, bring it back to 1 with all others far from 1; W stays the same.

        Far are those outside of the roots of the range. With the left singular vectors P of the values s,
        ``V (I + P (s - 1) P^T)`` times ``(I + P (1/s - 1) P^T) U`` is ``V U``: one pass over V for all of them. Where
        they are more than a third of all values, the factors are multiplied out, as `fold` does.
        """
        # In float64, as P in float32 is not orthogonal enough for the two factors to undo each other.
        mixer = self.mixer.to("cpu", torch.float64)
        left, values, _ = torch.linalg.svd(mixer)
        low, high = self.singular_range
        if bool(((values >= low) & (values <= high)).all()):
            self.inverse_mixer.copy_(torch.linalg.inv(mixer))
            return
        is_far = ~((values > low**0.5) & (values < high**0.5))
        if 3 * int(is_far.sum()) > len(values):
            self.fold()
            return
        directions, scale = left[:, is_far], values[is_far]
        mixer.addmm_(directions * (1 / scale - 1), directions.T @ mixer)
        right = directions.T.to(self.factor)
        scaled = (directions * (scale - 1)).to(self.factor)
        for part in torch.split(self.factor, _ROWS_AT_ONCE):
            part.addmm_(part @ scaled, right)
        self.mixer.copy_(mixer)
        self.inverse_mixer.copy_(torch.linalg.inv(mixer))

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the factors out, ``V = W``, ``U = I``, ``omega = 0``, and compute Q and w anew, at O(D d^2)."""
        self._fold()
        self._summarize()

    def get_extra_state(self) -> Tensor:
        """Return the number of steps, on which the next stabilisation depends."""
        return torch.tensor(self.num_steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of steps."""
        self.num_steps = int(state)

    def extra_repr(self) -> str:
        """Return the sizes and the settings of the steps."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, "
            f"learning_rate={self.learning_rate}, weight_decay={self.weight_decay}"
        )

    def _with_bias(self, hidden: Tensor) -> Tensor:
        check_hidden(hidden, self.in_features)
        hidden = hidden.to(self.factor.dtype)
        return nn.functional.pad(hidden, (0, 1), value=1.0) if self.has_bias else hidden

    def _dense(self) -> Tensor:
        return torch.addmm(self.shift, self.factor, self.mixer)

    def _restart(self, weight: Tensor) -> None:
        self.factor.copy_(weight)
        self._identify()
        self._summarize()

    def _fold(self) -> None:
        for part in torch.split(self.factor, _ROWS_AT_ONCE):
            part.copy_(torch.addmm(self.shift, part, self.mixer))
        self._identify()

    def _identify(self) -> None:
        """``U = I`` and ``omega = 0``: V is W."""
        self.mixer.zero_().fill_diagonal_(1)
        self.inverse_mixer.zero_().fill_diagonal_(1)
        self.shift.zero_()

    def _summarize(self) -> None:
        """``Q = V^T V`` and ``w = V^T 1``, where V is W."""
        torch.mm(self.factor.T, self.factor, out=self.gram)
        torch.sum(self.factor, 0, out=self.column_sum)

    def _look_up(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The classes among the targets, where each target is among them, and their rows of W."""
        classes, index = torch.unique(target, return_inverse=True)
        return classes, index, torch.addmm(self.shift, self.factor.index_select(0, classes), self.mixer)

    def _merged(self) -> _Gradient:
        """The gradients of several backward passes, all at the same weights, as that of one batch."""
        if len(self._gradients) == 1:
            return self._gradients[0]

        def joined(part: Callable[[_Gradient], Tensor]) -> Tensor:
            return torch.cat([part(gradient) for gradient in self._gradients])

        target = joined(lambda gradient: gradient.batch.target)
        batch = _Batch(
            joined(lambda gradient: gradient.batch.hidden),
            target,
            joined(lambda gradient: gradient.batch.total),
            *self._look_up(target),
        )
        return _Gradient(
            batch,
            joined(lambda gradient: gradient.alpha),
            joined(lambda gradient: gradient.beta),
            joined(lambda gradient: gradient.gamma),
            joined(lambda gradient: gradient.hidden),
        )

    def _descend(self, gradient: _Gradient) -> None:
        """Make the step ``W <- (1 - eta lambda) W - eta G`` on the factors, on Q and on w."""
        rate = self.learning_rate
        kept = 1 - rate * self.weight_decay
        if not kept > 0:
            raise ValueError(
                f"learning_rate * weight_decay must be below 1, got {self.learning_rate} * {self.weight_decay}"
            )
        batch = gradient.batch
        h = batch.hidden
        weighted = gradient.beta[:, None] * h
        is_wide = len(h) >= h.shape[1]  # as many examples as features: then S is the cheaper way to it
        s = h.T @ weighted if is_wide else None

        def times_s(x: Tensor) -> Tensor:
            return (x @ h.T) @ weighted if s is None else x @ s

        u = gradient.alpha @ h
        ones_g = (self.out_features * gradient.alpha + gradient.beta * batch.total + gradient.gamma.sum(1)) @ h  # 1^T G
        target_part = torch.zeros_like(batch.rows)  # of G's rows for the classes: sum of gamma h
        for index, gamma in zip(batch.index.T, gradient.gamma.T, strict=True):
            target_part.index_add_(0, index, gamma[:, None] * h)
        g_rows = u + times_s(batch.rows) + target_part
        gt_w = h.T @ gradient.hidden  # G^T W, as W^T g_i is the gradient of h_i
        # G^T G = G^T (1 u^T + W S + target part)
        gt_g = torch.outer(ones_g, u) + times_s(gt_w) + g_rows.T @ target_part

        change = rate**2 / 2 * gt_g - kept * rate * gt_w
        self.gram.mul_(kept**2).add_(change).add_(change.T)
        self.column_sum.mul_(kept).sub_(ones_g, alpha=rate)
        self._move(self.shift, kept, u + times_s(self.shift[None])[0])
        if 2 * len(h) < h.shape[1]:  # few examples: the Woodbury identity is cheaper than an inverse
            eta = rate / kept
            system = torch.eye(len(h), dtype=h.dtype, device=h.device) - eta * weighted @ h.T
            solved, _ = torch.linalg.solve_ex(system, weighted @ self.inverse_mixer)
            self._move(self.mixer, kept, times_s(self.mixer))
            self.inverse_mixer.add_(h.T @ solved, alpha=eta).div_(kept)
        else:
            self._move(self.mixer, kept, times_s(self.mixer))
            self.inverse_mixer.copy_(torch.linalg.inv_ex(self.mixer)[0])
        self.num_steps += 1
        if not self._is_well_conditioned():
            self._fold()
        self.factor.index_add_(0, batch.classes, target_part @ self.inverse_mixer, alpha=-rate)
        if self.num_steps % self.stabilize_every == 0:
            self.stabilize()

    def _move(self, state: Tensor, kept: float, gradient: Tensor) -> None:
        state.mul_(kept).sub_(gradient, alpha=self.learning_rate)

    def _is_well_conditioned(self) -> bool:
        """Whether V may be updated by way of the inverse of U."""
        bound = _SLACK + len(self.mixer) ** 0.5 * max(self.singular_range[1], 1 / self.singular_range[0])
        # Comparisons with NaN are false.
        return bool((self.mixer.norm() < bound) & (self.inverse_mixer.norm() < bound))


class FactoredSphericalHead(nn.Module):
    """An output layer for very many classes, trained by a spherical loss at a cost that does not grow with them.

    A `postern.heads.Head` that trains itself: see `FactoredLinear` for what that means next to an optimiser, with
    accumulation, compilation and several processes.

    Args:
        layer: the linear layer; its outputs are the classes.
        criterion: the loss; its mean is taken, whatever its reduction.
    """

    def __init__(self, layer: FactoredLinear, criterion: SphericalLoss) -> None:
        super().__init__()
        self.layer = layer
        self.criterion = criterion

    @property
    def in_features(self) -> int:
        """Width of the hidden vectors."""
        return self.layer.in_features

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.layer.out_features

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the scores, as the loss ranks them, at the cost of a dense layer.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        return self.criterion.logits(self.layer(hidden))

    def forward(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the logits."""
        return self.logits(hidden)

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean loss, whose backward pass makes the layer's step.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_hidden(hidden, self.in_features)
        check_target(hidden, target)
        total, square_total, target_score = self.layer.statistics(hidden, target)
        return self.criterion.from_statistics(total, square_total, target_score, self.num_classes).mean()

    def step(self) -> None:
        """Make the layer's step, where its backward pass does not; see `FactoredLinear.step`."""
        self.layer.step()


class _Statistics(torch.autograd.Function):
    """Statistics of the scores; the backward pass hands the layer its gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, anchor: Tensor, layer: FactoredLinear, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        projected = hidden @ layer.gram
        total = hidden @ layer.column_sum
        square_total = torch.linalg.vecdot(hidden, projected)
        classes, index, rows = layer._look_up(target)
        target_score = torch.linalg.vecdot(hidden[:, None], rows[index])
        ctx.layer, ctx.num_steps = layer, layer.num_steps
        ctx.save_for_backward(hidden, target, total, projected, classes, index, rows)
        return total, square_total, target_score

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_total: Tensor, by_square_total: Tensor, by_target_score: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        layer: FactoredLinear = ctx.layer
        hidden, target, total, projected, classes, index, rows = ctx.saved_tensors
        if layer.num_steps != ctx.num_steps:
            raise RuntimeError(
                f"the layer has made {layer.num_steps - ctx.num_steps} steps since this forward pass; for several "
                "backward passes from one set of weights, use steps_in_backward=False and call step()"
            )
        with without_autocast(hidden.device):
            beta = 2 * by_square_total
            by_hidden = torch.addcmul(torch.outer(by_total, layer.column_sum), beta[:, None], projected)
            for column, gamma in zip(index.T, by_target_score.T, strict=True):
                by_hidden.addcmul_(gamma[:, None], rows[column])
        if ctx.needs_input_grad[1]:
            batch = _Batch(hidden, target, total, classes, index, rows)
            layer._gradients.append(_Gradient(batch, by_total, beta, by_target_score, by_hidden))
            if layer.steps_in_backward:
                layer.step()
        return by_hidden, None, None, None
