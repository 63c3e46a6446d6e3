"""Stochastic experts in the place of feed-forward blocks, in models of Transformers and of PyTorch, in one call.

Paper: "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR), arXiv 2110.04260, which has experts in
every second layer of encoder and decoder.

    model = AutoModelForSeq2SeqLM.from_pretrained("t5-small")
    convert_ffn_to_experts(model, num_experts=4, start="perturb")

A later ``load_state_dict`` finds the experts; ``from_pretrained`` knows nothing of them, so convert first and then load
the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.experts.feedforward import FeedForwardExperts
from postern.experts.mixture import MixtureOfExperts
from postern.experts.stochastic_router import DrawLevel, StochasticRouter

ExpertStart = Literal["redraw", "copy", "perturb"]


class StochasticFeedForward(nn.Module):
    """A feed-forward block of stochastic experts: ``x -> expert_e(x)``, from tensor to tensor.

    Args:
        width: features of a token.
        hidden_dim: hidden features of an expert.
        num_experts: how many there are.
        activation: of the hidden features.
        is_gated: see `FeedForwardExperts`.
        bias: whether the experts have biases.
        dropout: share of the hidden features that is zeroed in training.
        level: see `StochasticRouter`.
        is_batch_first: whether the batch is the first dimension, or the second.

    Raises:
        ValueError: see `StochasticRouter` and `FeedForwardExperts`.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int,
        num_experts: int = 2,
        *,
        activation: Callable[[Tensor], Tensor] = F.relu,
        is_gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        level: DrawLevel = "sentence",
        is_batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.is_batch_first = is_batch_first
        router = StochasticRouter(width, num_experts, level=level)
        experts = FeedForwardExperts(
            num_experts, width, hidden_dim, activation=activation, is_gated=is_gated, bias=bias, dropout=dropout
        )
        self.mixture = MixtureOfExperts(router, experts)

    @property
    def bank(self) -> FeedForwardExperts:
        """The experts."""
        experts = self.mixture.experts
        assert isinstance(experts, FeedForwardExperts)
        return experts

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Let the drawn experts work.

        Args:
            x: ``[batch, time, width]``, or ``[rows, width]``, of which each row counts as a sentence of one token.

        Raises:
            ValueError: tokens that do not fit.
        """
        output: Tensor
        if x.dim() == 2:
            output = self.mixture(x[:, None])[0][:, 0]
        elif self.is_batch_first:
            output = self.mixture(x)[0]
        else:
            output = self.mixture(x.transpose(0, 1))[0].transpose(0, 1)
        return output


@dataclass(frozen=True)
class _Block:
    """A feed-forward block of a model, and what takes its place.

    Attributes:
        expand: its first products; two where it is gated, that of the gate first.
        contract: its last product.
        activation: between them.
        dropout: of the hidden features.
        is_batch_first: of the model's tokens.
        place: fits the experts in.
    """

    expand: tuple[nn.Module, ...]
    contract: nn.Module
    activation: Callable[[Tensor], Tensor]
    dropout: float
    is_batch_first: bool
    place: Callable[[nn.Module, StochasticFeedForward], str]


def convert_ffn_to_experts(
    model: nn.Module,
    num_experts: int = 2,
    *,
    every: int = 2,
    start: ExpertStart = "redraw",
    noise: float = 0.1,
    level: DrawLevel = "sentence",
    generator: torch.Generator | None = None,
) -> dict[str, StochasticFeedForward]:
    """Put stochastic experts in the place of a model's feed-forward blocks, in place.

    Blocks are known by their parts: those of `torch.nn.TransformerEncoderLayer` and `torch.nn.TransformerDecoderLayer`,
    and in models of Transformers those of Llama and its kin, T5, BERT, GPT-2, and of BART, OPT, ViT and others that
    call their products ``fc1`` and ``fc2``. OPT flattens its tokens, which then count as sentences of one token each.

    Experts that are copies of one block agree from the start, so that `ConsistencyLoss` has nothing to do but where
    dropout helps it: draw them anew, or perturb them.

    Args:
        model: e.g. ``T5ForConditionalGeneration(config)``, or a `torch.nn.Transformer`.
        num_experts: of a block.
        every: of each stack of layers (encoder, decoder), the first is converted and every so-many-th after it.
        start: "redraw" draws weights from a normal distribution as wide as the block's own, and sets biases to 0;
            "copy" copies the block; "perturb" copies it and adds normal noise to the weights.
        noise: standard deviation of the noise, as a share of that of the weights.
        level: see `StochasticRouter`.
        generator: of weights and noise; on the CPU. Torch's global one if None.

    Returns:
        The new blocks, by their names in the model.

    Raises:
        ValueError: no such blocks, none to convert, sizes below 1, negative noise, or an unknown start.
    """
    if start not in get_args(ExpertStart):
        raise ValueError(f"experts start by one of {', '.join(get_args(ExpertStart))}; got {start!r}")
    if min(num_experts, every) < 1 or not noise >= 0:
        raise ValueError(
            f"there are experts in every layer or more seldom, and noise of 0 or more; got num_experts={num_experts}, "
            f"every={every}, noise={noise}"
        )
    found = {name: block for name, module in model.named_modules() if (block := _block_of(module)) is not None}
    if not found:
        raise ValueError(f"{type(model).__name__} has no feed-forward blocks of a kind that can be converted")
    converted = {}
    before: Counter[str] = Counter()
    for name, block in found.items():
        stack = _stack_of(name)
        before[stack] += 1
        if (before[stack] - 1) % every:
            continue
        experts = _experts(block, num_experts, level)
        _fill(experts.bank, block, start, noise, generator)
        experts.to(_matrix(block.contract)).train(model.training)
        inner = block.place(model.get_submodule(name), experts)
        if not inner:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, experts)
        converted[".".join(part for part in (name, inner) if part)] = experts
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its fast path reads the weights that are gone
    return converted


def _stack_of(name: str) -> str:
    """What comes before the number of the layer."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:first])


def _experts(block: _Block, num_experts: int, level: DrawLevel) -> StochasticFeedForward:
    width, hidden_dim = _matrix(block.expand[0]).shape
    return StochasticFeedForward(
        width,
        hidden_dim,
        num_experts,
        activation=block.activation,
        is_gated=len(block.expand) == 2,
        bias=block.contract.bias is not None,
        dropout=block.dropout,
        level=level,
        is_batch_first=block.is_batch_first,
    )


@torch.no_grad()
def _fill(
    experts: FeedForwardExperts, block: _Block, start: ExpertStart, noise: float, generator: torch.Generator | None
) -> None:
    """Give experts their first weights and biases."""
    pairs = (
        (experts.expand, experts.expand_bias, block.expand),
        (experts.contract, experts.contract_bias, (block.contract,)),
    )
    for weight, bias, products in pairs:
        own = torch.cat([_matrix(product) for product in products], dim=1).to(weight)
        drawn = torch.randn(weight.shape, generator=generator) * own.std()
        weight.copy_(drawn if start == "redraw" else own + (noise * drawn if start == "perturb" else 0.0))
        if bias is not None:
            biases: list[Any] = [product.bias for product in products]
            bias.copy_(torch.zeros_like(bias) if start == "redraw" else torch.cat(biases).to(bias).expand_as(bias))


def _matrix(product: nn.Module) -> Tensor:
    """The weights ``[inputs, outputs]`` of a linear layer, or of GPT-2's own kind of it."""
    weight: Any = product.weight
    matrix: Tensor = weight.detach()
    return matrix.T if isinstance(product, nn.Linear) else matrix


def _is_product(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _get(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
    return module


# Blocks whose parts lie in a layer among others: the experts come in the place of the first product, and nothing in
# that of the rest.
_IN_A_LAYER = (
    ("linear1", "activation", "linear2"),
    ("fc1", "activation_fn", "fc2"),
    ("c_fc", "act", "c_proj"),
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
)
# Blocks that are modules of their own.
_WHOLE = (
    (("gate_proj", "up_proj"), "act_fn", "down_proj"),
    (("wi_0", "wi_1"), "act", "wo"),
    (("wi",), "act", "wo"),
)


def _block_of(module: nn.Module) -> _Block | None:
    for first, between, last in _IN_A_LAYER:
        parts = [_get(module, first), _get(module, last)]
        if all(map(_is_product, parts)):
            return _Block(
                (parts[0],),
                parts[1],
                _get(module, between),
                _hidden_dropout(module),
                getattr(_get(module, "self_attn"), "batch_first", True),
                _Placing(first, between, last),
            )
    for expand, between, last in _WHOLE:
        parts = [_get(module, name) for name in (*expand, last)]
        if all(map(_is_product, parts)):
            dropout = getattr(getattr(module, "dropout", None), "p", 0.0)
            return _Block(tuple(parts[:-1]), parts[-1], _get(module, between), dropout, True, lambda *_: "")
    return None


def _hidden_dropout(layer: nn.Module) -> float:
    """That between the products: a module in PyTorch's layers, a number in BART's."""
    if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return layer.dropout.p
    return float(getattr(layer, "activation_dropout", 0.0))


@dataclass(frozen=True)
class _Placing:
    """Puts experts in the place of a layer's first product."""

    first: str
    between: str
    last: str

    def __call__(self, layer: nn.Module, experts: StochasticFeedForward) -> str:
        for path, module in ((self.first, experts), (self.between, nn.Identity()), (self.last, nn.Identity())):
            parent, _, child = path.rpartition(".")
            setattr(layer.get_submodule(parent), child, module)
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            layer.dropout = nn.Identity()  # type: ignore[assignment]
            layer.activation_relu_or_gelu = 0  # no fast path, which reads the weights that are gone
        elif hasattr(layer, "activation_dropout"):
            layer.activation_dropout = 0.0  # type: ignore[assignment]
        return self.first
