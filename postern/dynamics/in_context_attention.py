"""One layer of attention whose query is the prompt's last token: what learns to regress in context.

Paper: "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head
Softmax Attention", arXiv 2503.12734. Heads are as wide as the tokens; there are no positions, no residual connection
and no bias, and the query does not attend to itself.

The two circuits of each head, ``KQ_h = K_h^T Q_h / sqrt(e)`` and ``OV_h = O_h V_h``, are multiplied out first. A step
then costs what products of prompts with a few vectors cost, and no token is projected to queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.dynamics.circuits import Circuits

Weighting = Callable[[Tensor, int], Tensor]
Initialisation = Literal["random", "opposite"]


def linear_sum(logits: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """Weights of linear attention that adds up the examples: the logits themselves. They fit one length only."""
    return logits


def linear_mean(logits: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """Weights of linear attention that averages over the examples: the logits divided by their number."""
    return logits / logits.shape[dim]


def in_context_attention(
    examples: Float[Tensor, "batch length e"],
    query: Float[Tensor, "batch e"],
    key_query: Float[Tensor, "*models heads e e"],
    output_value: Float[Tensor, "*models heads outputs e"],
    *,
    weighting: Weighting = torch.softmax,
) -> Float[Tensor, "*models batch outputs"]:
    """``sum_h OV_h Z w(Z^T KQ_h z_q)``.

    Args:
        examples: ``Z``, the tokens of the prompts as rows.
        query: ``z_q``.
        key_query: ``KQ_h``, which holds the factor ``1 / sqrt(e)``; of one model, or of several, which are all
            evaluated on the same prompts.
        output_value: ``OV_h`` of the same models and heads.
        weighting: ``w``, a function of (logits, dim): `torch.softmax` or another member of that family, or
            `linear_sum` or `linear_mean`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    *models, heads, outputs, width = output_value.shape
    if key_query.shape != (*models, heads, width, width) or examples.shape[-1] != width or examples.dim() != 3:
        raise ValueError(
            f"examples [batch, length, e], key_query [.., heads, e, e] and output_value [.., heads, outputs, e] belong "
            f"together, got {list(examples.shape)}, {list(key_query.shape)} and {list(output_value.shape)}"
        )
    if query.shape != (len(examples), width):
        raise ValueError(f"one query a prompt is [{len(examples)}, {width}], got {list(query.shape)}")
    batch = len(examples)
    # the heads of all models side by side; products in this order are many times as fast as one einsum of three
    directions = (query @ key_query.reshape(-1, width).T).view(batch, -1, width)
    weights = weighting(directions @ examples.transpose(1, 2), -1)
    attended = (weights @ examples).view(batch, -1, heads * width).transpose(0, 1)
    rows = output_value.reshape(-1, heads, outputs, width).transpose(1, 2).flatten(2)  # [models, outputs, heads * e]
    output: Tensor = attended @ rows.transpose(1, 2)
    return output.view(*models, batch, outputs)


class InContextAttention(nn.Module):
    """Multi-head attention on a prompt: ``y_q = sum_h O_h V_h Z w(Z^T K_h^T Q_h z_q / sqrt(e))``, ``e = d + outputs``.

    Several models can be trained at once on the same prompts: each parameter then has a leading axis. The sum of their
    losses gives each the gradient that it would have alone, and Adam treats all entries separately.

    Args:
        dim: entries of an input, ``d``.
        num_heads: number of heads.
        num_outputs: number of outputs.
        init: "random": uniform, as `torch.nn.Linear` draws the four projections. "opposite": ``K_h`` a small multiple
            of the identity, ``Q_h`` the same for half of the heads and its negative for the others, and ``O_h`` turned
            so that the head's own label counts with the sign of ``Q_h``; this starts in the state of paired heads that
            random models must find.
        weighting: see `in_context_attention`.
        num_models: how many models of different initial values; None for one, without that axis.

    Raises:
        ValueError: sizes below 1, an unknown initialisation, or opposite ones of an odd number of heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_outputs: int = 1,
        *,
        init: Initialisation = "random",
        weighting: Weighting = torch.softmax,
        num_models: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_heads": num_heads, "num_outputs": num_outputs}
        sizes |= {} if num_models is None else {"num_models": num_models}
        if min(sizes.values()) < 1:
            raise ValueError(f"sizes must be at least 1, got {sizes}")
        if init not in ("random", "opposite"):
            raise ValueError(f"init must be 'random' or 'opposite', got {init!r}")
        if init == "opposite" and num_heads % 2:
            raise ValueError(f"opposite heads come in pairs, got num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_outputs = num_outputs
        self.init = init
        self.weighting = weighting
        self.num_models = num_models
        width = dim + num_outputs
        shape = (num_heads, width) if num_models is None else (num_models, num_heads, width)
        self.query = nn.Parameter(torch.empty(*shape, width))
        self.key = nn.Parameter(torch.empty(*shape, width))
        self.value = nn.Parameter(torch.empty(*shape, width))
        self.output = nn.Parameter(torch.empty(*shape[:-1], num_outputs, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values."""
        width = self.dim + self.num_outputs
        for projection in (self.query, self.key, self.value):
            projection.uniform_(-(width**-0.5), width**-0.5)
        bound = (self.num_heads * width) ** -0.5
        self.output.uniform_(-bound, bound)
        if self.init == "opposite":
            identity = 1e-6 * torch.eye(width, device=self.query.device, dtype=self.query.dtype)
            signs = torch.ones(self.num_heads, 1, 1, device=self.query.device, dtype=self.query.dtype)
            signs[self.num_heads // 2 :] = -1
            self.key.copy_(identity.expand_as(self.key))
            self.query.copy_((signs * identity).expand_as(self.query))
            # the entry of OV_h that reads an output's own label
            own = (self.output @ self.value)[..., self.dim :].diagonal(dim1=-2, dim2=-1)[..., None]
            self.output.mul_(torch.where(own * signs < 0, -1.0, 1.0))

    def circuits(self) -> Circuits:
        """Return the circuits, through which gradients flow back to the parameters."""
        scale = self.query.shape[-1] ** -0.5
        return Circuits(self.key.transpose(-1, -2) @ self.query * scale, self.output @ self.value)

    def forward(
        self, examples: Float[Tensor, "batch length e"], query: Float[Tensor, "batch e"]
    ) -> Float[Tensor, "*models batch outputs"]:
        """Predict the targets of prompts; see `RegressionPrompts`.

        Raises:
            ValueError: tokens of another width, or another number of queries than of prompts.
        """
        circuits = self.circuits()
        return in_context_attention(
            examples, query, circuits.key_query, circuits.output_value, weighting=self.weighting
        )

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        models = "" if self.num_models is None else f", num_models={self.num_models}"
        return f"dim={self.dim}, num_heads={self.num_heads}, num_outputs={self.num_outputs}{models}"
