"""Bigram-Backcopy: a Markov chain in which a few tokens make the next one repeat what came before them.

A model needs attention after those tokens alone; everywhere else the last token says all there is to know, so that the
head that copies has nothing to add. The task is that of "Active-Dormant Attention Heads: Mechanistically Demystifying
Extreme-Token Phenomena in LLMs" (arXiv 2410.13835), with a random chain in the place of that of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class BigramBackcopy:
    """A chain over the tokens 0 to ``num_tokens - 1``, and the tokens that trigger a copy.

    Sequences begin with the token ``start``, which never occurs again, and one that is no trigger. After a trigger
    comes the token before it; after any other token t the next is drawn from ``transitions[t]``. So no two triggers
    follow each other.

    Attributes:
        transitions: probabilities of the next token, one row a token; rows of triggers are not used.
        is_trigger: whether a token triggers a copy.
    """

    transitions: Float[Tensor, "num_tokens num_tokens"]
    is_trigger: Bool[Tensor, " num_tokens"]

    @classmethod
    def draw(
        cls, num_tokens: int, num_triggers: int, generator: torch.Generator, *, spread: float = 2.0
    ) -> BigramBackcopy:
        """Draw a chain: ``softmax(spread * normal numbers)``, and its triggers.

        Args:
            num_tokens: tokens besides the start.
            num_triggers: how many of them trigger a copy, at least 1 and not all.
            generator: draws both.
            spread: how unequal the transitions are; at 2, 32 tokens have about 1.9 nats.

        Raises:
            ValueError: no triggers, no other tokens, or a negative spread.
        """
        if not 1 <= num_triggers < num_tokens or not spread >= 0:
            raise ValueError(
                f"a chain needs triggers, other tokens, and a spread of at least 0; got {num_triggers} triggers among "
                f"{num_tokens} tokens and spread={spread}"
            )
        transitions = torch.softmax(spread * torch.randn(num_tokens, num_tokens, generator=generator), dim=-1)
        is_trigger = torch.zeros(num_tokens, dtype=torch.bool)
        is_trigger[torch.randperm(num_tokens, generator=generator)[:num_triggers]] = True
        return cls(transitions, is_trigger)

    @property
    def num_tokens(self) -> int:
        """Tokens besides the start."""
        return len(self.is_trigger)

    @property
    def start(self) -> int:
        """The token that begins each sequence."""
        return self.num_tokens

    def sample(self, count: int, length: int, generator: torch.Generator) -> Int[Tensor, "count length"]:
        """Draw sequences, the start included.

        Args:
            count: how many.
            length: tokens each, at least 2.
            generator: draws them.

        Raises:
            ValueError: sizes too small.
        """
        if count < 1 or length < 2:
            raise ValueError(f"sequences have at least 2 tokens, and there is at least 1; got {length} and {count}")
        tokens = torch.full((count, length), self.start)
        first = (~self.is_trigger).float()
        tokens[:, 1] = torch.multinomial(first, count, replacement=True, generator=generator)
        for position in range(2, length):
            last = tokens[:, position - 1]
            drawn = torch.multinomial(self.transitions[last], 1, generator=generator)[:, 0]
            tokens[:, position] = torch.where(self.is_trigger[last], tokens[:, position - 2], drawn)
        return tokens

    def follows_trigger(self, tokens: Int[Tensor, "count length"]) -> Bool[Tensor, "count length"]:
        """Whether each token of some sequences is a copy."""
        padded = torch.cat([self.is_trigger, torch.zeros(1, dtype=torch.bool)])
        follows = torch.zeros_like(tokens, dtype=torch.bool)
        follows[:, 1:] = padded[tokens[:, :-1]]
        return follows

    def least_loss(self, tokens: Int[Tensor, "count length"]) -> float:
        """Mean cross-entropy, in nats, of each token but the first, under what it was drawn from."""
        loss = torch.zeros(tokens[:, 1:].shape)
        loss[:, 0] = (~self.is_trigger).sum().float().log()
        drawn = ~self.follows_trigger(tokens)[:, 2:]
        last, following = tokens[:, 1:-1][drawn], tokens[:, 2:][drawn]
        loss[:, 1:][drawn] = -self.transitions[last, following].log()
        return loss.mean().item()
