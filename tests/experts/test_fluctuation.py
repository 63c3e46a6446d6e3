"""Fluctuation counted by hand with Python's sets."""

import pytest
import torch

from postern.experts import RoutingRecorder, routing_fluctuation


def choices(seed, *shape, top_k=2, experts=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, experts, generator=generator).topk(top_k).indices


def by_hand(before, after, measure, mask):
    found = []
    for a, b, counts in zip(before.flatten(0, -2), after.flatten(0, -2), mask.flatten(), strict=True):
        if not counts:
            continue
        a, b = set(a.tolist()), set(b.tolist())
        found.append(float(a != b) if measure == "set" else 1 - len(a & b) / len(a))
    return sum(found) / len(found)


@pytest.mark.parametrize("measure", ["set", "overlap"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equals_sets_compared_one_by_one(measure, top_k):
    before, after = (choices(seed, 3, 20, top_k=top_k) for seed in (0, 1))
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    everything = torch.ones_like(mask)
    assert routing_fluctuation(before, after, measure) == pytest.approx(by_hand(before, after, measure, everything))
    assert routing_fluctuation(before, after, measure, mask) == pytest.approx(by_hand(before, after, measure, mask))


def test_the_order_of_experts_is_no_change():
    before = choices(0, 2, 9)
    assert routing_fluctuation(before, before.flip(-1)) == 0
    assert routing_fluctuation(before, before.flip(-1), "overlap") == 0


def test_a_recorder_compares_checkpoints_with_the_next_and_the_last():
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    recorder = RoutingRecorder(mask)
    kept = {step: [choices(step, 2, 9), choices(step + 50, 2, 9)] for step in (10, 20, 30)}
    for step, layers in kept.items():
        recorder.add(step, layers)
        layers_now = [layer.clone() for layer in layers]
        for layer in layers:
            layer.zero_()
        kept[step] = layers_now

    def mean(a, b, measure):
        return sum(by_hand(x, y, measure, mask) for x, y in zip(kept[a], kept[b], strict=True)) / 2

    assert recorder.steps == [10, 20, 30]
    for measure in ("set", "overlap"):
        assert recorder.successive(measure) == pytest.approx([mean(10, 20, measure), mean(20, 30, measure)])
        assert recorder.until_end(measure) == pytest.approx([mean(10, 30, measure), mean(20, 30, measure)])


def test_impossible_comparisons_are_refused():
    recorder = RoutingRecorder()
    recorder.add(5, [choices(0, 2, 3)])
    with pytest.raises(ValueError, match="got 1"):
        recorder.successive()
    with pytest.raises(ValueError, match="got step 5 after 5"):
        recorder.add(5, [choices(0, 2, 3)])
    with pytest.raises(ValueError, match=r"got \[\[2, 4, 2\]\] after \[\[2, 3, 2\]\]"):
        recorder.add(6, [choices(0, 2, 4)])
    with pytest.raises(ValueError, match=r"got \[\] after some"):
        RoutingRecorder().add(1, [])
    with pytest.raises(ValueError, match="got 'count'"):
        routing_fluctuation(choices(0, 3), choices(0, 3), "count")
    with pytest.raises(ValueError, match=r"got \[3, 2\] and \[4, 2\]"):
        routing_fluctuation(choices(0, 3), choices(0, 4))
    with pytest.raises(ValueError, match="none that counts"):
        routing_fluctuation(choices(0, 3), choices(0, 3), mask=torch.zeros(3, dtype=torch.bool))
