"""The tasks: what is asked can be answered, and all arms get the same."""

import pytest
import torch

from postern.attention import FramedSoftmaxAttention
from postern.claims import Run
from postern.papers import nalaformer as paper


def test_every_question_names_one_of_the_pairs_and_wants_its_value():
    config = paper.Recall(1)
    tokens, wanted = paper._recall_batch(config, 200, torch.Generator().manual_seed(0))
    names, values = tokens.unbind(1)
    assert tokens.shape == (200, 2, 32)
    held, asked = names[:, :8], names[:, 8:]
    matches = held[:, None] == asked[..., None]
    assert (matches.sum(-1) == 1).all()
    assert torch.equal(values[:, :8].gather(1, matches.int().argmax(-1)), wanted)
    assert (values[:, 8:] == 0).all()


def test_questions_are_answered_without_a_look_at_their_values():
    config = paper.Recall(1)
    torch.manual_seed(0)
    network = paper._RecallNetwork(config, "norm-aware")
    tokens, _ = paper._recall_batch(config, 4, torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 1, 8:] = 5
    assert torch.equal(network(tokens), network(changed))
    changed[:, 1, :8] = 5
    assert not torch.equal(network(tokens), network(changed))


def test_arms_start_from_the_same_weights():
    states = []
    for arm in paper.LABELS:
        torch.manual_seed(0)
        states.append(paper.attention(arm, 8, 2).state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    assert isinstance(paper.attention("softmax", 8, 2), FramedSoftmaxAttention)


def test_pixels_are_split_without_overlap_and_come_in_the_same_order():
    config = paper.Pixels((), 2, images=300)
    task = paper._pixels(config, Run(seed=0, scale="smoke"))
    batches = list(task.batches())
    assert len(batches) == task.steps == 2 * (153 // 64)
    assert (len(task.validation[1]), len(task.test[1])) == (27, 120)
    again = list(task.batches())
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, again, strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])
    held_out = {tuple(image.flatten().tolist()) for image in torch.cat([task.validation[0], task.test[0]])}
    trained = {tuple(image.flatten().tolist()) for inputs, _ in batches for image in inputs}
    assert len(held_out & trained) <= 1  # images that the set has twice
    assert float(batches[0][0].max()) == 1


def test_what_is_kept_for_the_backward_pass_grows_with_the_length():
    layer = paper.attention("norm-aware", 8, 2)
    kept = [paper._kept_bytes(layer, torch.randn(1, length, 8, requires_grad=True)) for length in (512, 1024)]
    assert kept[1] / kept[0] == pytest.approx(2, rel=0.05)
    told = paper._crossover({256: {"softmax": 1.0, "norm-aware": 2.0}, 512: {"softmax": 3.0, "norm-aware": 2.0}})
    assert told == "Norm-aware attention is faster from 512 tokens on."
