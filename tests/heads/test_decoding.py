import itertools

import pytest
import torch

from postern.heads import (
    PowerTransform,
    RankTransform,
    beam_search,
    greedy_search,
    hamming_similarity,
    mbr_decode,
    sample,
)
from postern.nets import LanguageModel

END = 0


class Cached:
    """A language model that computes the new tokens only."""

    def __init__(self, model):
        self.model = model

    def __call__(self, prefixes, parents):
        if parents is None:
            self.cache = self.model.new_cache()
            new = prefixes
        else:
            for layer in self.cache.layers:
                layer.key, layer.value = layer.key[parents], layer.value[parents]
            new = prefixes[:, -1:]
        assert self.cache.length + new.shape[1] == prefixes.shape[1]
        return self.model(new, cache=self.cache)[:, -1]


def model(vocabulary=4, seed=0):
    torch.manual_seed(seed)
    return LanguageModel(vocabulary, 8, 1, 2, context=12, initial_std=0.6).double().eval()


def stateless(network):
    return lambda prefixes, parents: network(prefixes)[:, -1]


def enumerate_all(network, prompt, time, transform=None, end=END):
    """Every complete continuation with its score, the best first."""
    transform = transform or (lambda logits: logits.log_softmax(-1))
    found = {}
    vocabulary = network.num_tokens
    for tokens in itertools.product(range(vocabulary), repeat=time):
        length = tokens.index(end) + 1 if end in tokens else time
        kept = tokens[:length]
        if kept in found:
            continue
        sequence = torch.tensor([[*prompt, *kept]])
        with torch.no_grad():
            log_probabilities = transform(network(sequence[:, :-1])[0, len(prompt) - 1 :])
        found[kept] = log_probabilities[range(length), kept].sum().item()
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("make", [stateless, Cached])
@pytest.mark.parametrize("transform", [None, PowerTransform(0.4).double()])
def test_a_wide_beam_is_exact(make, transform):
    network = model()
    prompts = torch.tensor([[1, 2], [3, 3], [2, 1]])
    options = {} if transform is None else {"transform": transform}
    found = beam_search(make(network), prompts, 4, num_beams=256, num_results=9, end=END, **options)
    for row, prompt in enumerate(prompts.tolist()):
        best = enumerate_all(network, prompt, 4, transform)[:9]
        expected = [list(tokens) + [END] * (4 - len(tokens)) for tokens, _ in best]
        assert found.tokens[row].tolist() == expected
        torch.testing.assert_close(found.scores[row], torch.tensor([score for _, score in best]).double())


def test_one_beam_is_greedy_and_a_cache_changes_nothing():
    for seed in range(4):
        network = model(6, seed)
        prompts = torch.randint(6, (20, 2))
        greedy = greedy_search(stateless(network), prompts, 8, end=END)
        assert torch.equal(greedy, greedy_search(Cached(network), prompts, 8, end=END))
        for make in (stateless, Cached):
            found = beam_search(make(network), prompts, 8, num_beams=1, end=END)
            assert torch.equal(found.tokens[:, 0], greedy)
        wide = [
            beam_search(make(network), prompts, 8, num_beams=3, num_results=3, end=END) for make in (stateless, Cached)
        ]
        assert torch.equal(wide[0].tokens, wide[1].tokens)
        assert (wide[0].scores.diff(dim=1) <= 0).all()


def test_without_an_end_token_all_continuations_have_full_length():
    network = model()
    prompts = torch.tensor([[1, 2], [3, 3]])
    found = beam_search(stateless(network), prompts, 3, num_beams=64, num_results=64)
    assert len({tuple(tokens) for tokens in found.tokens[0].tolist()}) == 64
    assert found.scores[0].exp().sum().item() == pytest.approx(1)
    assert torch.isfinite(found.scores).all()


def test_more_results_than_there_are_outputs():
    network = model(2)
    found = beam_search(stateless(network), torch.tensor([[1]]), 1, num_beams=5, num_results=5, end=END)
    assert torch.isfinite(found.scores[0]).sum() == 2


def test_what_ended_is_not_lost_when_better_prefixes_crowd_it_out():
    # end now: 0.3; the other prefixes look better (0.35 each) but then fall apart into tenths
    first = torch.tensor([0.3, 0.35, 0.35] + [0.0] * 9).log()
    later = torch.tensor([0.1] * 10 + [0.0] * 2).log()

    def next_logits(prefixes, parents):
        return (first if prefixes.shape[1] == 1 else later).expand(len(prefixes), -1)

    prompt = torch.tensor([[5]])
    assert beam_search(next_logits, prompt, 3, num_beams=3, end=END).tokens.tolist() == [[[0, 0, 0]]]
    # with two beams, ending is not among the two best of its step
    assert beam_search(next_logits, prompt, 3, num_beams=2, end=END).tokens[0, 0, 0] != 0


@pytest.mark.parametrize("seed", range(3))
def test_beam_search_is_that_of_transformers(seed):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=7,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=END,
    )
    torch.manual_seed(seed)
    gpt = transformers.GPT2LMHeadModel(config).double().eval()
    prompts = torch.randint(1, 7, (6, 3))
    for beams in (1, 2, 4):
        theirs = gpt.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=6,
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            length_penalty=0.0,
            early_stopping="never",
        )[:, 3:]
        theirs = torch.nn.functional.pad(theirs, (0, 6 - theirs.shape[1]), value=END).view(6, beams, 6)
        ours = beam_search(lambda p, _: gpt(p).logits[:, -1], prompts, 6, num_beams=beams, num_results=beams, end=END)
        assert torch.equal(ours.tokens, theirs), beams


def test_samples_have_the_transformed_probabilities():
    network = model()
    transform = PowerTransform(1.8).double()
    draws = 40_000
    generator = torch.Generator().manual_seed(0)
    found = sample(
        Cached(network),
        torch.tensor([[1, 2], [3, 3]]),
        3,
        num_samples=draws,
        transform=transform,
        end=END,
        generator=generator,
    )
    assert found.shape == (draws, 2, 3)
    for row, prompt in enumerate([[1, 2], [3, 3]]):
        for tokens, score in enumerate_all(network, prompt, 3, transform):
            wanted = torch.tensor(list(tokens) + [END] * (3 - len(tokens)))
            share = (found[:, row] == wanted).all(-1).double().mean().item()
            p = torch.tensor(score).exp().item()
            assert abs(share - p) < 5 * (p * (1 - p) / draws) ** 0.5 + 1e-4


def test_samples_depend_on_the_generator_alone():
    network = model()
    first, again, other = (
        sample(stateless(network), torch.tensor([[1, 2]]), 6, num_samples=9, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_order_decides_greedy_search_but_not_beams():
    changed = 0
    for seed in range(12):
        network = model(6, seed)
        prompts = torch.randint(6, (10, 2))
        for transform in (PowerTransform(3.0), RankTransform(1.0)):
            transform = transform.double()
            plain = greedy_search(stateless(network), prompts, 6, end=END)
            assert torch.equal(plain, greedy_search(stateless(network), prompts, 6, end=END, transform=transform))
            beams = [
                beam_search(stateless(network), prompts, 6, num_beams=4, end=END, **options).tokens
                for options in ({}, {"transform": transform})
            ]
            changed += (beams[0] != beams[1]).any(-1).sum().item()
    assert changed > 0


def test_no_gradient_is_kept():
    network = model().requires_grad_()
    prompts = torch.tensor([[1, 2]])
    assert not beam_search(stateless(network), prompts, 3, num_beams=2).scores.requires_grad


def test_mbr_is_the_brute_force():
    samples = torch.randint(3, (7, 5, 4))
    log_weights = torch.randn(7, 5)

    def prefix_similarity(first, second):
        return (first == second).long().cumprod(-1).sum(-1).float()

    for similarity in (hamming_similarity, prefix_similarity):
        for weights in (None, log_weights):
            found = mbr_decode(samples, similarity, weights)
            for row in range(5):
                p = torch.ones(7) / 7 if weights is None else weights[:, row].softmax(0)
                risks = [
                    sum(p[j] * similarity(samples[i, row], samples[j, row]) for j in range(7)).item() for i in range(7)
                ]
                best = samples[torch.tensor(risks).argmax(), row]
                score = sum(p[j] * similarity(best, samples[j, row]) for j in range(7)).item()
                ours = sum(p[j] * similarity(found[row], samples[j, row]) for j in range(7)).item()
                assert ours == pytest.approx(score)
    assert hamming_similarity(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 0])).item() == 0.5


def test_mbr_with_all_weight_on_one_reference_returns_what_is_most_like_it():
    samples = torch.tensor([[[1, 1, 1]], [[2, 2, 2]], [[2, 2, 1]]])
    weights = torch.tensor([[0.0], [-100.0], [-100.0]])
    assert mbr_decode(samples, log_weights=weights).tolist() == [[1, 1, 1]]
    assert mbr_decode(samples).tolist() == [[2, 2, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, p: sample(f, p.float(), 2), "float32"),
        (lambda f, p: sample(f, p[0], 2), r"\[2\]"),
        (lambda f, p: sample(f, p[:, :0], 2), r"\[1, 0\]"),
        (lambda f, p: greedy_search(f, p, 0), "got 0"),
        (lambda f, p: sample(f, p, 2, num_samples=0), "got 0"),
        (lambda f, p: beam_search(f, p, 2, num_beams=2, num_results=3), "got 3 and 2"),
        (lambda f, p: beam_search(f, p, 2, num_beams=0, num_results=0), "got 0 and 0"),
        (lambda f, p: sample(lambda prefixes, _: model()(prefixes), p, 2), r"\[1, vocabulary\].*got \[1, 2, 4\]"),
        (lambda f, p: beam_search(lambda *_: torch.zeros(1, 4).long(), p, 2, num_beams=2), "int64"),
        (lambda f, p: greedy_search(lambda *_: "logits", p, 2), "got str"),
        (lambda f, p: mbr_decode(p), r"\[1, 2\]"),
        (lambda f, p: mbr_decode(torch.zeros(0, 1, 2, dtype=torch.long)), r"\[0, 1, 2\]"),
        (lambda f, p: mbr_decode(p[None], log_weights=torch.zeros(2, 1)), r"\[2, 1\]"),
        (lambda f, p: mbr_decode(p[None], lambda a, b: (a == b).float()), r"\[1, 1, 2\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(stateless(model()), torch.tensor([[1, 2]]))
