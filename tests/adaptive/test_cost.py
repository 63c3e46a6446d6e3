import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.adaptive import count_macs, seconds_per_sample


def test_convolutions_and_products():
    convolution = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    images = torch.rand(5, 6, 8, 8)
    assert count_macs(lambda: convolution(images)) == 5 * 8 * 4 * 4 * 3 * 9
    assert count_macs(lambda: nn.Linear(7, 3)(torch.rand(5, 7))) == 5 * 7 * 3
    assert count_macs(lambda: images @ torch.rand(8, 3)) == 5 * 6 * 8 * 8 * 3
    assert count_macs(lambda: images.relu().sum()) == 0


def test_attention_counts_on_the_cpu_too():
    query, key, value = (torch.rand(2, 3, length, 8) for length in (5, 7, 7))
    macs = count_macs(lambda: F.scaled_dot_product_attention(query, key, value))
    assert macs == 2 * 2 * 3 * 5 * 7 * 8


def test_seconds_a_sample():
    seen = []

    def slow(batch):
        seen.append(len(batch))
        time.sleep(0.002 * len(batch))

    def slower(batch):
        assert torch.is_inference_mode_enabled()
        time.sleep(0.006 * len(batch))

    found = seconds_per_sample({"slow": slow, "slower": slower}, torch.rand(5, 1), batch_size=2, repeats=2)
    assert seen == [2, 2, 1] * 3
    assert 0.002 <= found["slow"] < found["slower"]
    assert found["slower"] >= 0.006


def test_bad_input():
    with pytest.raises(ValueError, match="0 samples"):
        seconds_per_sample({}, torch.rand(0, 1), 4)
    with pytest.raises(ValueError, match="batch_size=0"):
        seconds_per_sample({}, torch.rand(2, 1), 0)
