"""Decision rules for a network that gives next-token logits: those that use its order, and those that use its mass.

Utility-compatible rules look for what is preferred most: `greedy_search`, `beam_search`, its k best. Probability-
compatible rules take the probabilities at their word: `sample` and, by it, `mbr_decode`. All but the last take a
``transform`` of the logits of each token, such as those of `postern.heads.utility_transforms`.

Increasing maps of the logits of one token leave `greedy_search` alone. They do change `beam_search` with more than one
beam, which adds log-probabilities over tokens: order alone settles single decisions and complete outputs, not sums.

Paper: "Utility-Probability Duality of Neural Networks" (arXiv 2305.14859) for the distinction; which rules fall on
which side is a reconstruction. For models of Transformers use ``generate`` and
`postern.heads.utility_logits_processor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postern.heads.utility import check_tokens

NextLogits = Callable[[Tensor, Tensor | None], Tensor]
"""``(prefixes [rows, time], parents [rows]) -> logits [rows, vocabulary]`` of the next token.

In the first call the prefixes are the prompts and ``parents`` is None. After it, row ``i`` is row ``parents[i]`` of the
call before with one more token, which is all that a cache of keys and values needs to know; without a cache,
``lambda prefixes, parents: model(prefixes)[:, -1]`` does.
"""
Transform = Callable[[Tensor], Tensor]
Similarity = Callable[[Tensor, Tensor], Tensor]


def log_softmax(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
    """``log P_w``: the standard reading of the logits, the transform that transforms nothing."""
    return torch.log_softmax(logits, -1)


@dataclass(frozen=True)
class Hypotheses:
    """What a beam search found for each prompt, the best first.

    Attributes:
        tokens: continuations, filled up with the end token.
        scores: sums of transformed log-probabilities; minus infinity where there are fewer hypotheses than asked for.
    """

    tokens: Int[Tensor, "batch results time"]
    scores: Float[Tensor, "batch results"]


def greedy_search(
    next_logits: NextLogits,
    prompts: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    *,
    transform: Transform = log_softmax,
    end: int | None = None,
) -> Int[Tensor, "batch time"]:
    """Take the most preferred token, one after the other.

    Args:
        next_logits: see `NextLogits`.
        prompts: at least one token each.
        max_new_tokens: length of the continuations.
        transform: of the logits of each token; an increasing one changes nothing.
        end: the token that ends a continuation and fills it up; None where none does.

    Raises:
        ValueError: prompts that are no tokens or empty, a length below 1, or logits of another shape.
    """
    _check(prompts, max_new_tokens)
    return _roll_out(next_logits, prompts, max_new_tokens, 1, end, lambda logits: transform(logits).argmax(-1))[0]


def sample(
    next_logits: NextLogits,
    prompts: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    transform: Transform = log_softmax,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "samples batch time"]:
    """Draw continuations token by token (ancestral sampling) from the transformed probabilities.

    Args:
        next_logits: see `NextLogits`; prompts are looked at once, however many samples are drawn.
        prompts: at least one token each.
        max_new_tokens: length of the continuations.
        num_samples: how many for each prompt.
        transform: logits of a token to its log-probabilities.
        end: the token that ends a continuation and fills it up; None where none does.
        generator: draws, on the logits' device; torch's global one if None.

    Raises:
        ValueError: prompts that are no tokens or empty, a length or number of samples below 1, or logits of another
            shape.
    """
    _check(prompts, max_new_tokens)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial(transform(logits).exp(), 1, generator=generator)[:, 0]

    return _roll_out(next_logits, prompts, max_new_tokens, num_samples, end, draw)


def beam_search(
    next_logits: NextLogits,
    prompts: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    *,
    num_beams: int,
    num_results: int = 1,
    transform: Transform = log_softmax,
    end: int | None = None,
) -> Hypotheses:
    """Look for the continuations of the highest total log-probability, without any correction for their length.

    At each step the ``num_beams`` best unended hypotheses are kept. One that ends counts if it is among the
    ``num_beams`` best of its step, and is never lost again. With one beam it is `greedy_search`; with at least as many
    beams as there are prefixes it is exact.

    Args:
        next_logits: see `NextLogits`.
        prompts: at least one token each.
        max_new_tokens: length of the continuations. Those that have not ended by then count as they are.
        num_beams: hypotheses that are followed for each prompt.
        num_results: how many of the best to return (k-best), at most ``num_beams``.
        transform: logits of a token to its log-probabilities.
        end: the token that ends a continuation and fills it up; None where none does.

    Raises:
        ValueError: prompts that are no tokens or empty, a number or length below 1, more results than beams, or logits
            of another shape.
    """
    _check(prompts, max_new_tokens)
    if not 1 <= num_results <= num_beams:
        raise ValueError(f"num_results lies between 1 and num_beams, got {num_results} and {num_beams}")
    with torch.no_grad():
        return _search(next_logits, prompts, max_new_tokens, num_beams, num_results, transform, end)


def _search(
    next_logits: NextLogits,
    prompts: Tensor,
    max_new_tokens: int,
    num_beams: int,
    num_results: int,
    transform: Transform,
    end: int | None,
) -> Hypotheses:
    batch, start = prompts.shape
    device = prompts.device
    log_probabilities = transform(_look(next_logits, prompts, None))
    prefixes = prompts[:, None]  # [batch, beams, time]
    running = log_probabilities.new_zeros(batch, 1)
    fill = 0 if end is None else end
    done = Hypotheses(
        torch.full((batch, num_results, max_new_tokens), fill, device=device, dtype=prompts.dtype),
        running.new_full((batch, num_results), -torch.inf),
    )
    for step in range(max_new_tokens):
        beams, vocabulary = running.shape[1], log_probabilities.shape[-1]
        totals = running[..., None] + log_probabilities.view(batch, beams, vocabulary)
        # twice as many, as each hypothesis can end in one way only
        scores, chosen = totals.flatten(1).topk(min(2 * num_beams, beams * vocabulary), sorted=True)
        parents, tokens = chosen // vocabulary, chosen % vocabulary
        longer = torch.cat([_rows(prefixes, parents), tokens[..., None]], dim=-1)
        if end is not None:
            ended = tokens == end
            counts = ended & (torch.arange(ended.shape[1], device=device) < num_beams)
            done = _merge(done, longer[..., start:], scores.masked_fill(~counts, -torch.inf), fill)
            scores = scores.masked_fill(ended, -torch.inf)
        kept = scores.argsort(dim=-1, descending=True, stable=True)[:, :num_beams]
        running, parents, prefixes = scores.gather(1, kept), parents.gather(1, kept), _rows(longer, kept)
        if step + 1 == max_new_tokens:
            break
        # what runs can only lose: stop where it is behind already
        if end is not None and bool((running[:, 0] <= done.scores[:, -1]).all()):
            return done
        previous = (parents + beams * torch.arange(batch, device=device)[:, None]).flatten()
        log_probabilities = transform(_look(next_logits, prefixes.flatten(0, 1), previous))
    return _merge(done, prefixes[..., start:], running, fill)


def _merge(done: Hypotheses, tokens: Tensor, scores: Tensor, fill: int) -> Hypotheses:
    """Keep the best of what is done and of new hypotheses, filled up to full length."""
    padding = done.tokens.new_full((*tokens.shape[:2], done.tokens.shape[-1] - tokens.shape[-1]), fill)
    every = torch.cat([done.tokens, torch.cat([tokens, padding], dim=-1)], dim=1)
    best, kept = torch.cat([done.scores, scores], dim=1).topk(done.scores.shape[1], sorted=True)
    return Hypotheses(_rows(every, kept), best)


def _rows(sequences: Tensor, indices: Tensor) -> Tensor:
    """Sequences ``[batch, chosen, time]`` of ``[batch, n, time]`` at ``[batch, chosen]``."""
    return sequences.gather(1, indices[..., None].expand(-1, -1, sequences.shape[-1]))


@torch.no_grad()
def _roll_out(
    next_logits: NextLogits,
    prompts: Tensor,
    max_new_tokens: int,
    copies: int,
    end: int | None,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    """Lengthen copies of the prompts by the token that is chosen; return the new tokens [copies, batch, time]."""
    batch = len(prompts)
    parents = torch.arange(batch, device=prompts.device).repeat(copies)
    logits = _look(next_logits, prompts, None)[parents]
    prefixes = prompts[parents]
    produced = prompts.new_full((copies * batch, max_new_tokens), 0 if end is None else end)
    is_done = torch.zeros(copies * batch, dtype=torch.bool, device=prompts.device)
    for step in range(max_new_tokens):
        tokens = choose(logits).to(prompts.dtype)
        if end is not None:
            tokens = torch.where(is_done, end, tokens)
            is_done = is_done | (tokens == end)
        produced[:, step] = tokens
        if step + 1 == max_new_tokens or bool(is_done.all()):
            break
        prefixes = torch.cat([prefixes, tokens[:, None]], dim=1)
        logits = _look(next_logits, prefixes, parents)
        parents = torch.arange(copies * batch, device=prompts.device)
    return produced.view(copies, batch, max_new_tokens)


def _look(next_logits: NextLogits, prefixes: Tensor, parents: Tensor | None) -> Tensor:
    """Return the logits of the next token, checked."""
    logits = next_logits(prefixes, parents)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(prefixes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"next_logits gives [{len(prefixes)}, vocabulary], the last position's logits; got {got}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    return logits


def hamming_similarity(
    first: Int[Tensor, "*batch time"], second: Int[Tensor, "*batch time"]
) -> Float[Tensor, "*batch"]:
    """Share of the positions at which two sequences agree."""
    return (first == second).float().mean(-1)


def mbr_decode(
    samples: Int[Tensor, "samples batch time"],
    similarity: Similarity = hamming_similarity,
    log_weights: Float[Tensor, "samples batch"] | None = None,
) -> Int[Tensor, "batch time"]:
    """Return the sample that is most like the others: ``argmax_y E_{y' ~ P} similarity(y, y')`` (minimum Bayes risk).

    Candidates and the expectation are both taken from the samples. It takes ``samples^2 batch`` similarities,
    ``samples batch`` of them at a time.

    Args:
        samples: continuations of the same prompts, as `sample` draws them.
        similarity: ``(candidates [..., time], references [..., time]) -> [...]``.
        log_weights: logarithms of the references' weights, such as the log-probabilities of
            `CandidateSetTransform`; need not be normalised. Equal by default, which is right for independent samples.

    Returns:
        One of the samples for each prompt; of equals, the first.

    Raises:
        ValueError: no samples, or weights or similarities of another shape.
    """
    check_tokens("samples", samples)
    if samples.dim() != 3 or 0 in samples.shape:
        raise ValueError(f"samples are [samples, batch, time] and not empty, got {list(samples.shape)}")
    if log_weights is not None and log_weights.shape != samples.shape[:2]:
        raise ValueError(
            f"samples {list(samples.shape)} need weights {list(samples.shape[:2])}, got {list(log_weights.shape)}"
        )
    weights = None if log_weights is None else log_weights.softmax(0)
    expected = []
    for candidate in samples:
        likeness = similarity(candidate.expand_as(samples), samples)
        if likeness.shape != samples.shape[:2]:
            raise ValueError(f"similarities must be {list(samples.shape[:2])}, got {list(likeness.shape)}")
        expected.append(likeness.mean(0) if weights is None else (weights * likeness).sum(0))
    best = torch.stack(expected).argmax(0)
    return samples[best, torch.arange(samples.shape[1], device=samples.device)]


def _check(prompts: Tensor, max_new_tokens: int) -> None:
    check_tokens("prompts", prompts)
    if prompts.dim() != 2 or 0 in prompts.shape:
        raise ValueError(f"prompts are [batch, prompt] with at least one token each, got {list(prompts.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
