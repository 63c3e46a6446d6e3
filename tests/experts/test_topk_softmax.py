import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from postern.experts import topk_indices, topk_mask, topk_softmax_gate

SCORES = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(-3, 3).map(float))


@given(SCORES, st.data())
def test_the_mask_is_that_of_a_stable_sort(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, order, True, axis=1)
    np.testing.assert_array_equal(topk_mask(torch.from_numpy(scores), k).numpy(), expected)
    np.testing.assert_array_equal(topk_mask(torch.from_numpy(scores.T.copy()), k, dim=0).numpy(), expected.T)
    np.testing.assert_array_equal(topk_indices(torch.from_numpy(scores), k).numpy(), order)
    np.testing.assert_array_equal(topk_indices(torch.from_numpy(scores.T.copy()), k, dim=0).numpy(), order.T)


def naive_gate(scores, bias, k, select_on):
    weights = []
    for v in scores:
        by = v if select_on == "score" else v + bias
        kept = sorted(range(len(v)), key=lambda i: -by[i])[:k]
        terms = {i: np.exp(v[i] + bias[i]) for i in kept}
        weights.append([terms.get(i, 0.0) / sum(terms.values()) for i in range(len(v))])
    return np.array(weights)


@pytest.mark.parametrize("select_on", ["score", "score+bias"])
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_weights_are_a_softmax_over_what_is_kept(select_on, k):
    rng = np.random.default_rng(k)
    scores, bias = rng.normal(size=(40, 5)), rng.normal(size=5)
    weights, mask = topk_softmax_gate(torch.from_numpy(scores), torch.from_numpy(bias), k, select_on)
    expected = naive_gate(scores, bias, k, select_on)
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-14)
    np.testing.assert_array_equal(mask.numpy(), expected > 0)


def test_the_bias_selects_only_where_it_is_asked_to():
    scores, bias = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 5.0])
    assert topk_softmax_gate(scores, bias, 2)[1].tolist() == [[True, True, False]]
    assert topk_softmax_gate(scores, bias, 2, "score+bias")[1].tolist() == [[True, False, True]]


@given(st.integers(1, 6), st.floats(-50, 50))
def test_a_common_shift_changes_nothing(k, shift):
    scores = torch.linspace(-2, 3, 6, dtype=torch.float64).flip(0).view(1, 6)
    bias = torch.arange(6, dtype=torch.float64) / 7
    shifted, _ = topk_softmax_gate(scores + shift, bias - shift, k)
    torch.testing.assert_close(shifted, topk_softmax_gate(scores, bias, k)[0])


def test_gradients_go_through_what_is_kept():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.9]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.1, 0.4, -0.3, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, u: topk_softmax_gate(v, u, 2)[0], (scores, bias))
    weights, mask = topk_softmax_gate(scores, bias, 2)
    gradient = torch.autograd.grad(weights[0, 2], scores)[0]
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()


def test_it_compiles_without_a_break():
    scores, bias = torch.randn(7, 5), torch.randn(5)
    compiled = torch.compile(topk_softmax_gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, bias, 3), topk_softmax_gate(scores, bias, 3))


def test_bad_arguments_are_told():
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="of 3 experts between 1 and 3 can be kept, got k_active=4"):
        topk_softmax_gate(scores, None, 4)
    with pytest.raises(ValueError, match="got k_active=0"):
        topk_mask(scores, 0)
    with pytest.raises(ValueError, match="got k_active=4"):
        topk_indices(scores, 4)
    with pytest.raises(ValueError, match="select_on must be"):
        topk_softmax_gate(scores, None, 1, "bias")
    with pytest.raises(ValueError, match="one bias for each of 3 experts"):
        topk_softmax_gate(scores, torch.zeros(2), 1)
