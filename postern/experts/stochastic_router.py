"""A router that draws one expert for all: no gate, no capacity, no balance to keep.

Paper: "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR), arXiv 2110.04260. Each layer draws for
itself. Experts that are drawn alike for all inputs learn to agree once two passes of a batch with different draws are
pulled together; see `postern.experts.ConsistencyLoss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.experts.routing import NO_CONTEXT, Routing, RoutingContext, check_sizes, check_tokens, evenly

DrawLevel = Literal["token", "sentence", "ensemble"]


class StochasticRouter(nn.Module):
    """``y = expert_e(x)`` with e uniform over all experts, and a weight of 1.

    In training one draw holds for the whole batch, so that the layer costs what one expert costs; where the batch holds
    several passes one after the other (`expert_draws`), each has a draw of its own, with replacement. In evaluation
    each token or each sequence has a draw, or all experts work on each token and the mean of their outputs is taken.

    Draws come from torch's global generator. With a generator (`expert_draws`) they can be repeated; such draws cannot
    be compiled into one graph.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        level: what has a draw of its own in evaluation: each "token" or each "sentence"; "ensemble" for the mean of all
            experts. Where a model generates token by token, each step draws anew at either level.

    Attributes:
        num_passes: of how many passes a batch consists in training, equally long and one after the other.
        expert: works instead of a drawn one, in training and evaluation; None for draws. See `force`.
        generator: of the draws; None for torch's global one.

    Raises:
        ValueError: sizes below 1, or an unknown level.
    """

    def __init__(self, width: int, num_experts: int, *, level: DrawLevel = "sentence") -> None:
        super().__init__()
        check_sizes(width, num_experts, 1)
        check_level(level)
        self.width = width
        self.num_experts = num_experts
        self.level: DrawLevel = level
        self.num_passes = 1
        self.expert: int | Tensor | None = None
        self.generator: torch.Generator | None = None

    def force(self, expert: int | Int[Tensor, " batch"] | None) -> None:
        """Let one expert work, or one for each sequence of the batch, instead of drawn ones.

        Args:
            expert: None for draws again.

        Raises:
            ValueError: an expert that is not there, or no integers.
        """
        if isinstance(expert, Tensor):
            if expert.dim() != 1 or expert.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"experts are integers [batch], got {expert.dtype} {list(expert.shape)}")
            outside = expert[(expert < 0) | (expert >= self.num_experts)].tolist()
            expert = expert.long()
        else:
            outside = [] if expert is None or 0 <= expert < self.num_experts else [expert]
        if outside:
            raise ValueError(f"experts lie in 0..{self.num_experts - 1}, got {outside[0]}")
        self.expert = expert

    @property
    def draws_in_evaluation(self) -> bool:
        """Whether what works in evaluation is drawn, rather than forced or all experts."""
        return self.expert is None and self.level != "ensemble"

    def sample(
        self, *shape: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*shape"]:
        """Draw experts, uniformly.

        Args:
            shape: how many; none for a single draw.
            device: where they are needed.
            generator: of the draws; the router's own if None.
        """
        generator = self.generator if generator is None else generator
        if generator is None:
            return torch.randint(self.num_experts, shape, device=device)
        drawn = torch.randint(self.num_experts, shape, device=generator.device, generator=generator)
        return drawn.to(device)

    def forward(self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT) -> Routing:
        """See `postern.experts.Router`; it uses nothing of the context.

        Raises:
            ValueError: tokens or a mask that do not fit, a batch that does not consist of so many passes, or another
                number of forced experts than there are sequences.
        """
        check_tokens(self, tokens, context)
        batch, time, _ = tokens.shape
        if self.expert is None and not self.training and self.level == "ensemble":
            chosen = torch.arange(self.num_experts, device=tokens.device).expand(batch, time, -1)
        else:
            chosen = self._choose(batch, time, tokens.device)[..., None].expand(batch, time, 1)
        return evenly(tokens, chosen, self.num_experts)

    def _choose(self, batch: int, time: int, device: torch.device) -> Int[Tensor, "#batch #time"]:
        if isinstance(self.expert, Tensor):
            if len(self.expert) != batch:
                raise ValueError(f"{len(self.expert)} experts are forced on a batch of {batch} sequences")
            return self.expert.to(device)[:, None]
        if self.expert is not None:
            return torch.full((1, 1), self.expert, device=device)
        if self.training:
            if batch % self.num_passes:
                raise ValueError(f"a batch of {batch} sequences cannot hold {self.num_passes} passes of equal length")
            drawn = self.sample(self.num_passes, device=device)
            return drawn.repeat_interleave(batch // self.num_passes, output_size=batch)[:, None]
        if self.level == "sentence":
            return self.sample(batch, 1, device=device)
        return self.sample(batch, time, device=device)

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"num_experts={self.num_experts}, level={self.level}"


def check_level(level: str) -> None:
    """Check what has a draw of its own.

    Raises:
        ValueError: an unknown one.
    """
    if level not in get_args(DrawLevel):
        raise ValueError(f"a level of draws is one of {', '.join(get_args(DrawLevel))}; got {level!r}")


def stochastic_routers(model: nn.Module) -> list[StochasticRouter]:
    """Return the stochastic routers of a model.

    Raises:
        ValueError: there are none.
    """
    routers = [module for module in model.modules() if isinstance(module, StochasticRouter)]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no StochasticRouter")
    return routers


@contextmanager
def expert_draws(
    model: nn.Module,
    *,
    num_passes: int | None = None,
    expert: int | Int[Tensor, " batch"] | None = None,
    level: DrawLevel | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """For a while, let all stochastic routers of a model draw in another way; what is None stays as it is.

        with expert_draws(model, generator=torch.Generator().manual_seed(0)):
            model(tokens)  # the same again and again

    Args:
        model: has `StochasticRouter` layers.
        num_passes: of how many passes a batch in training consists, equally long and one after the other.
        expert: works in every layer; or one for each sequence of the batch.
        level: what has a draw of its own in evaluation.
        generator: of the draws.

    Raises:
        ValueError: no such layers, an expert that is not there, no passes, or an unknown level.
    """
    routers = stochastic_routers(model)
    if num_passes is not None and num_passes < 1:
        raise ValueError(f"a batch holds at least one pass, got {num_passes}")
    if level is not None:
        check_level(level)
    before = [(router.num_passes, router.expert, router.level, router.generator) for router in routers]
    try:
        for router in routers:
            router.num_passes = router.num_passes if num_passes is None else num_passes
            router.level = router.level if level is None else level
            router.generator = router.generator if generator is None else generator
            if expert is not None:
                router.force(expert)
        yield
    finally:
        for router, settings in zip(routers, before, strict=True):
            router.num_passes, router.expert, router.level, router.generator = settings
