"""Circuits of models whose pattern is known."""

import pytest
import torch

from postern.dynamics import Circuits, InContextAttention, InContextRegression, gradient_descent_predict
from postern.dynamics.in_context_attention import in_context_attention

OMEGA, MU = (0.2, -0.2, 0.2, 0.001), (1.5, -2.5, 1.0, 0.01)


def ideal(dim=3):
    key_query = torch.zeros(4, dim + 1, dim + 1)
    key_query[:, :dim, :dim] = torch.tensor(OMEGA)[:, None, None] * torch.eye(dim)
    key_query[:, :, dim] = 5.0  # meets the query's zero, so it is to be ignored
    output_value = torch.zeros(4, 1, dim + 1)
    output_value[:, 0, dim] = torch.tensor(MU)
    return key_query, output_value


def test_the_pattern_of_ideal_heads():
    pattern = Circuits(*ideal()).pattern()
    assert pattern.omega == pytest.approx(OMEGA)
    assert pattern.mu == pytest.approx(MU)
    assert pattern.is_active == (True, True, True, False)
    assert pattern.step_size == pytest.approx(1.00001)
    assert pattern.imbalance == pytest.approx(0.01 / 5.01)
    assert (pattern.sign_agreement, pattern.diagonal_share, pattern.label_share) == pytest.approx((1, 1, 1))
    assert (pattern.omega_variation, pattern.diagonal_variance, pattern.label_to_input) == pytest.approx((0, 0, 0))
    assert Circuits(*ideal()).pattern(0.0).is_active == (True,) * 4
    assert Circuits(*ideal()).pattern(0.0).omega_variation > 0.5


def test_each_flaw_shows_in_its_number():
    def flawed(key_query=(), output_value=()):
        changed_kq, changed_ov = ideal()
        for place, value in key_query:
            changed_kq[place] = value
        for place, value in output_value:
            changed_ov[place] = value
        return Circuits(changed_kq, changed_ov).pattern()

    off_diagonal = flawed(key_query=[((0, 0, 1), 0.2)])
    assert off_diagonal.diagonal_share == pytest.approx((2 + (3 / 4) ** 0.5) / 3)
    label = flawed(key_query=[((1, 3, 0), -0.2)])
    assert label.label_to_input == pytest.approx(0.2)
    assert label.diagonal_share == pytest.approx((2 + (3 / 4) ** 0.5) / 3)
    reads_input = flawed(output_value=[((2, 0, 0), -1.0)])
    assert reads_input.label_share == pytest.approx((2 + 1 / 2) / 3)
    uneven = flawed(key_query=[((0, 0, 0), 0.5)])
    assert uneven.diagonal_variance == pytest.approx(0.02 / 3)
    assert uneven.omega_variation == pytest.approx(torch.tensor([0.3, 0.2, 0.2]).std(unbiased=False).item() / 0.7 * 3)
    turned = flawed(output_value=[((1, 0, 3), 2.5)])
    assert turned.sign_agreement == pytest.approx(2 / 3)
    assert turned.imbalance == pytest.approx(1)


def test_circuits_of_a_model_are_products_of_its_weights():
    torch.manual_seed(0)
    model = InContextAttention(3, 2, 2)
    circuits = model.circuits()
    assert circuits.dim == 3
    for head in range(2):
        torch.testing.assert_close(circuits.key_query[head], model.key[head].T @ model.query[head] / 5**0.5)
        torch.testing.assert_close(circuits.output_value[head], model.output[head] @ model.value[head])
        torch.testing.assert_close(circuits.mu[head, 1], circuits.output_value[head, 1, 4])
    circuits.mu.sum().backward()
    assert model.value.grad is not None
    many = InContextAttention(3, 2, num_models=4).circuits()
    assert torch.equal(many[3].omega, many.omega[3])


def test_small_circuits_make_the_debiased_step_of_their_preconditioner():
    torch.manual_seed(0)
    comparison = torch.randn(2, 3, 3, dtype=torch.float64)
    key_query = torch.zeros(2, 4, 4, dtype=torch.float64)
    key_query[:, :3, :3] = 1e-4 * torch.stack([comparison[0], -comparison[0]])
    output_value = torch.zeros(2, 1, 4, dtype=torch.float64)
    output_value[:, 0, 3] = torch.tensor([1e4, -1e4])
    prompts = InContextRegression(3).sample(5, 8, dtype=torch.float64)
    found = in_context_attention(prompts.examples, prompts.query, key_query, output_value)
    preconditioner = Circuits(key_query, output_value).preconditioner()[0]
    torch.testing.assert_close(preconditioner, 2 * comparison[0].T)
    expected = gradient_descent_predict(
        prompts.inputs, prompts.labels, prompts.query_input, preconditioner, is_debiased=True
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_task_mass_tells_which_head_works_for_which_output():
    key_query, output_value = torch.zeros(2, 4, 4), torch.zeros(2, 2, 4)
    key_query[:, :2, :2] = torch.stack([3 * torch.eye(2), -torch.eye(2)])
    output_value[0, 0, 2], output_value[1, 1, 3], output_value[1, 0, 3] = -2.0, 0.5, 9.0
    circuits = Circuits(key_query, output_value)
    torch.testing.assert_close(circuits.task_mass(), 2**0.5 * torch.tensor([[6.0, 0.0], [0.0, 0.5]]))
    assert circuits.active_heads(0.05).tolist() == [True, True]
    assert circuits.active_heads(0.1).tolist() == [True, False]


def test_what_has_no_pattern():
    key_query, output_value = ideal()
    with pytest.raises(ValueError, match="one model with one output"):
        Circuits(key_query[None], output_value[None]).pattern()
    with pytest.raises(ValueError, match="all circuits are zero"):
        Circuits(0 * key_query, output_value).pattern()
    with pytest.raises(ValueError, match="NaN"):
        Circuits(key_query * torch.nan, output_value).pattern()
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        Circuits(key_query, output_value).active_heads(2)
    with pytest.raises(ValueError, match="of one model"):
        Circuits(key_query, output_value)[0]
    with pytest.raises(ValueError, match=r"got \[4, 4, 4\] and \[3, 1, 4\]"):
        Circuits(key_query, output_value[:3])
