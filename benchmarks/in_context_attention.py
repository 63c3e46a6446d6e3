"""A training step of in-context attention by its circuits, against projections of every token.

    python -m benchmarks.in_context_attention [--seconds S] [--batch B] [--length L] [--threads N]
        [--device cuda]

A step is the forward and the backward pass. The peer computes the same model as the paper's code does: queries, keys
and values by linear layers of full width a head, then attention. That both agree is checked before anything is timed.
The order of the products matters as much: the two circuits in one einsum of three factors are timed as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.dynamics import InContextAttention, InContextRegression, RegressionPrompts


class ProjectedAttention(nn.Module):
    """The same model by four linear layers."""

    def __init__(self, model: InContextAttention) -> None:
        super().__init__()
        self.num_heads, self.width = model.num_heads, model.dim + model.num_outputs
        for name in ("query", "key", "value"):
            layer = nn.Linear(self.width, self.num_heads * self.width, bias=False)
            layer.weight.data.copy_(getattr(model, name).detach().flatten(0, 1))
            setattr(self, f"{name}_layer", layer)
        self.output_layer = nn.Linear(self.num_heads * self.width, model.num_outputs, bias=False)
        self.output_layer.weight.data.copy_(model.output.detach().transpose(0, 1).flatten(1))

    def forward(self, examples: Tensor, query: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, self.width)).transpose(1, 2)
            for layer, x in (
                (self.query_layer, query[:, None]),
                (self.key_layer, examples),
                (self.value_layer, examples),
            )
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / self.width**0.5, -1)
        heads: Tensor = (weights @ v).transpose(1, 2).flatten(2)
        return self.output_layer(heads)[:, 0]


class OneEinsum(nn.Module):
    """The circuits, contracted with the prompts in one expression each."""

    def __init__(self, model: InContextAttention) -> None:
        super().__init__()
        self.model = model

    def forward(self, examples: Tensor, query: Tensor) -> Tensor:
        circuits = self.model.circuits()
        weights = torch.softmax(torch.einsum("bli,hij,bj->bhl", examples, circuits.key_query, query), -1)
        return torch.einsum("hoi,bli,bhl->bo", circuits.output_value, examples, weights)


def step(module: nn.Module, prompts: RegressionPrompts) -> None:
    module.zero_grad()
    (module(prompts.examples, prompts.query) - prompts.target).square().mean().backward()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each setting at least")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    rows: list[Row] = []
    for dim in (5, 20):
        for heads in (1, 4, 8):
            torch.manual_seed(0)
            drawn = InContextRegression(dim).sample(arguments.batch, arguments.length)
            prompts = RegressionPrompts(*(x.to(device) for x in (drawn.examples, drawn.query, drawn.target)))
            model = InContextAttention(dim, heads).to(device)
            modules: dict[str, nn.Module] = {
                "circuits": model,
                "projections": ProjectedAttention(model),
                "one einsum": OneEinsum(model),
            }
            for other in modules.values():
                other.to(device)
                torch.testing.assert_close(
                    other(prompts.examples, prompts.query), model(prompts.examples, prompts.query), atol=1e-5, rtol=1e-4
                )
            names = {"step": step, "prompts": prompts, "modules": modules}
            times = best_times(
                {name: f"step(modules[{name!r}], prompts)" for name in modules}, arguments.seconds, names, device=device
            )
            rows.append(
                {
                    "dimension": str(dim),
                    "heads": str(heads),
                    "milliseconds a step": 1e3 * times["circuits"],
                    "projections / circuits": times["projections"] / times["circuits"],
                    "one einsum / circuits": times["one einsum"] / times["circuits"],
                }
            )
    title = f"{arguments.batch} prompts of {arguments.length} examples, {place(device)}"
    record("in_context_attention", "In-context attention: circuits against projections", {title: rows}, device)


if __name__ == "__main__":
    main()
