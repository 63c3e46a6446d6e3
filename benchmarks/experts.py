"""A layer of experts against a loop over them and against Mixtral's, in tokens a second.

    python -m benchmarks.experts [--tokens 256 2048] [--shapes 256x512 384x1000] [--experts 8 16 32 64] [--top-k K]
        [--passes P] [--seconds S] [--threads N] [--device cuda]

All compute the same: gated feed-forward experts without biases, behind a softmax router; their weights are copied and
their outputs compared before anything is timed. The naive loop looks for each expert's tokens, lets the expert work on
them and adds what comes out; the sorted loop lets the experts work in turn on rows that our dispatch has sorted: only
the products differ from ours. Mixtral's layer is that of Transformers, in its own loop and with its grouped products,
where its version has them. A step is the forward and the backward pass. A shape is the width of a token by that of what
is hidden in an expert. Each case is measured in several passes, with layers made anew, since how fast a step is depends
on where the memory of its gradients happens to lie: fresh pages can take half of the time. A pass gives the best of its
times, and the median of the passes counts, which is what to expect, where the best would be that of the luckier layer.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks._tables import CPU, Row, best_times, device_arguments, place, prepare, record
from postern.experts import FeedForwardExperts, MixtureOfExperts, ModuleExperts, SoftmaxRouter


class Expert(nn.Module):
    """One gated block, with weights of a bank."""

    def __init__(self, expand: Tensor, contract: Tensor) -> None:
        super().__init__()
        self.expand = nn.Parameter(expand.detach().T.clone())
        self.contract = nn.Parameter(contract.detach().T.clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, hidden = F.linear(x, self.expand).chunk(2, -1)
        return F.linear(F.silu(gate) * hidden, self.contract)


class NaiveLoop(nn.Module):
    """The layer as it is written down first."""

    def __init__(self, router: nn.Module, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.router, self.experts = router, nn.ModuleList(experts)

    def forward(self, tokens: Tensor) -> Tensor:
        routing = self.router(tokens)
        rows, indices, weights = tokens.flatten(0, 1), routing.indices.flatten(0, 1), routing.weights.flatten(0, 1)
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen, place = torch.where(indices == number)
            if len(chosen):
                output.index_add_(0, chosen, expert(rows[chosen]) * weights[chosen, place, None])
        return output.view_as(tokens)


def mixtral(layer: MixtureOfExperts, hidden: int, top_k: int, implementation: str) -> nn.Module:
    """Mixtral's layer with the weights of another."""
    config = MixtralConfig(
        hidden_size=layer.width,
        intermediate_size=hidden,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=top_k,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.gate.weight)
        block.experts.gate_up_proj.copy_(layer.experts.expand.transpose(1, 2))
        block.experts.down_proj.copy_(layer.experts.contract.transpose(1, 2))
    return block


def layers(width: int, hidden: int, num_experts: int, top_k: int) -> dict[str, nn.Module]:
    """All that are compared; the first has the weights."""
    bank = FeedForwardExperts(num_experts, width, hidden, activation=F.silu, is_gated=True, bias=False)
    router = SoftmaxRouter(width, num_experts, top_k, renormalises=True, balance=0.0)
    ours = MixtureOfExperts(router, bank)
    naive, behind_ours = (
        [Expert(*weights) for weights in zip(bank.expand, bank.contract, strict=True)] for _ in range(2)
    )
    return {
        "ours": ours,
        "naive": NaiveLoop(router, naive),
        "sorted": MixtureOfExperts(router, ModuleExperts(behind_ours)),
        "mixtral": mixtral(ours, hidden, top_k, "eager"),
        "mixtral_grouped": mixtral(ours, hidden, top_k, "grouped_mm"),
    }


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    output = layer(x)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    layer.zero_grad()
    forward(layer, x).backward(grad)


def shape(text: str) -> tuple[int, int]:
    """Width and hidden width, e.g. of "256x512"."""
    width, hidden = text.split("x")
    return int(width), int(hidden)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(256, 512), (384, 1000)])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each case in a pass at least")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    dtype = torch.float32 if device == CPU else torch.bfloat16
    cases = list(itertools.product(arguments.shapes, arguments.tokens, arguments.experts))
    passes: dict[tuple[object, ...], list[dict[str, float]]] = defaultdict(list)
    for _, case in itertools.product(range(arguments.passes), cases):
        (width, hidden), tokens, num_experts = case
        modules = layers(width, hidden, num_experts, arguments.top_k)
        x = torch.randn(1, tokens, width)
        with torch.no_grad():
            for module in modules.values():
                torch.testing.assert_close(forward(module, x), forward(modules["ours"], x), rtol=1e-4, atol=1e-5)
                module.to(device, dtype)
        x = x.to(device, dtype).requires_grad_()
        names = {"step": step, "forward": forward, "x": x, "grad": torch.randn_like(x)}
        names |= modules
        for title, statement in (("Inference", "forward({}, x)"), ("Training step", "step({}, x, grad)")):
            with torch.set_grad_enabled(title != "Inference"):
                statements = {name: statement.format(name) for name in modules}
                times = best_times(statements, arguments.seconds, names, rounds=1, device=device)
            passes[title, *case].append(times)
    tables: dict[str, list[Row]] = {}
    for title, (width, hidden) in itertools.product(("Inference", "Training step"), arguments.shapes):
        where = f"{str(dtype).removeprefix('torch.')}, {place(device)}"
        name = f"{title}, tokens of {width}, hidden {hidden}, {arguments.top_k} experts a token, {where}"
        tables[name] = []
        for tokens, num_experts in itertools.product(arguments.tokens, arguments.experts):
            found = passes[title, (width, hidden), tokens, num_experts]
            times = {name: statistics.median(times[name] for times in found) for name in found[0]}
            tables[name].append(
                {
                    "tokens": f"{tokens:,}",
                    "experts": str(num_experts),
                    "tokens a second": tokens / times["ours"],
                    "as fast as the naive loop": times["naive"] / times["ours"],
                    "as the sorted loop": times["sorted"] / times["ours"],
                    "as Mixtral's loop": times["mixtral"] / times["ours"],
                    "as Mixtral's grouped products": times["mixtral_grouped"] / times["ours"],
                }
            )
    record("experts", "A layer of experts against loops and Mixtral's", tables, device)


if __name__ == "__main__":
    main()
