import math

import pytest
import scipy.stats
import torch

from postern.attention import (
    attention_entropy,
    attention_weights,
    entropy_by_norm,
    linear_attention,
    linear_attention_weights,
    norm_entropy_correlation,
)


def test_entropy_equals_scipys_and_takes_zeros():
    weights = torch.rand(3, 4, 9, dtype=torch.float64)
    weights[..., 2] = 0
    weights /= weights.sum(-1, keepdim=True)
    torch.testing.assert_close(attention_entropy(weights), torch.tensor(scipy.stats.entropy(weights.numpy(), axis=-1)))
    assert attention_entropy(torch.eye(5)).abs().max() == 0
    assert attention_entropy(torch.full((1, 8), 1 / 8)).item() == pytest.approx(math.log(8))


def test_weights_of_linear_attention_are_those_that_it_sums_by():
    query, key = torch.rand(2, 3, 7, 4, dtype=torch.float64)[None].unbind(1)
    value = torch.randn(1, 3, 7, 5, dtype=torch.float64)
    weights = linear_attention_weights(query, key)
    torch.testing.assert_close(weights @ value, linear_attention(query, key, value, eps=0.0))


def test_correlation_is_spearmans_a_direction_at_a_time():
    torch.manual_seed(0)
    entropy, norms = torch.rand(6, 9), torch.rand(9)
    expected = [scipy.stats.spearmanr(row, norms).statistic for row in entropy.numpy()]
    assert norm_entropy_correlation(entropy, norms) == pytest.approx(sum(expected) / 6)
    noise = 1 + 1e-9 * torch.rand(6, 9, dtype=torch.float64)
    assert norm_entropy_correlation(noise, norms) == 0
    with pytest.raises(ValueError, match=r"got \[1\] lengths and entropies \[6, 9\]"):
        norm_entropy_correlation(entropy, norms[:1])


def test_longer_queries_of_softmax_are_sharper():
    torch.manual_seed(0)
    direction, key = torch.randn(5, 1, 8, dtype=torch.float64), torch.randn(5, 20, 8, dtype=torch.float64)
    norms = torch.tensor([0.5, 4.0, 2.0], dtype=torch.float64)

    def weigh(query, key):
        return attention_weights(query[:, None], key[:, None])[:, 0]

    entropy = entropy_by_norm(weigh, direction, key, norms)
    assert entropy.shape == (5, 1, 3)
    assert norm_entropy_correlation(entropy, norms) == pytest.approx(-1)
