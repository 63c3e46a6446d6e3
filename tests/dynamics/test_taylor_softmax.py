"""Features whose products are the truncated exponential, and bounds that hold."""

import math

import pytest
import torch

from postern.dynamics import (
    required_taylor_order,
    taylor_exp,
    taylor_exp_error_bound,
    taylor_feature_count,
    taylor_softmax_error_bound,
    taylor_softmax_features,
)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("order", [0, 1, 2, 5])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_products_of_features_are_the_truncated_exponential(order, is_symmetric):
    query, key = drawn(2, 5, 3), drawn(2, 7, 3)
    features = [taylor_softmax_features(x, order, is_symmetric=is_symmetric) for x in (query, key)]
    assert features[0].shape[-1] == taylor_feature_count(3, order, is_symmetric=is_symmetric)
    torch.testing.assert_close(features[0] @ features[1].mT, taylor_exp(query @ key.mT, order))


def test_the_truncated_exponential():
    logits = drawn(50)
    expected = sum(logits**degree / math.factorial(degree) for degree in range(5))
    torch.testing.assert_close(taylor_exp(logits, 4), expected)
    assert taylor_feature_count(4, 10) == 1001
    assert taylor_feature_count(4, 2, is_symmetric=False) == 21
    assert taylor_exp(torch.linspace(-50, 50, 1001), 6).min() > 0


@pytest.mark.parametrize("order", [0, 1, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_errors_stay_below_the_bounds(order, scale):
    logits = scale * drawn(40, 16)
    error = (taylor_exp(logits, order) - logits.exp()).abs()
    assert (error <= taylor_exp_error_bound(logits, order) + 1e-13 * logits.abs().exp()).all()
    logits[0, 9:] = -math.inf
    weights = torch.where(logits == -math.inf, 0.0, taylor_exp(logits.clamp_min(-100), order))
    shares = weights / weights.sum(-1, keepdim=True)
    error = (shares - logits.softmax(-1)).abs().sum(-1)
    assert (error <= taylor_softmax_error_bound(logits, order) + 1e-13).all()


def test_the_bound_of_a_row_is_no_empty_promise():
    logits = 0.3 * drawn(10, 8)
    weights = taylor_exp(logits, 4)
    error = (weights / weights.sum(-1, keepdim=True) - logits.softmax(-1)).abs().sum(-1)
    bound = taylor_softmax_error_bound(logits, 4)
    assert (bound < 1e-2).all()
    assert (bound > error).all()
    assert taylor_exp_error_bound(torch.zeros(1), 3) == 0
    assert taylor_softmax_error_bound(torch.full((1, 3), 30.0), 2).isinf().all()


@pytest.mark.parametrize("magnitude", [0.0, 0.5, 4.0])
def test_the_required_order_is_enough(magnitude):
    order = required_taylor_order(magnitude, 0.01)
    logits = torch.linspace(-magnitude, magnitude, 101, dtype=torch.float64)
    assert ((taylor_exp(logits, order) / logits.exp() - 1).abs() <= 0.01).all()
    assert required_taylor_order(2 * magnitude, 0.01) >= order
    assert order % 2 == 0


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="got 3 and -1"):
        taylor_softmax_features(drawn(2, 3), -1)
    with pytest.raises(ValueError, match="order 20 of 64 dimensions has"):
        taylor_softmax_features(drawn(2, 64), 20)
    with pytest.raises(ValueError, match=r"got -1 and 0\.1"):
        required_taylor_order(-1, 0.1)
