"""Predictors against loops, scikit-learn, and each other's limits."""

import pytest
import torch
from sklearn.linear_model import Ridge

from postern.dynamics import (
    InContextAttention,
    InContextRegression,
    gradient_descent_predict,
    linear_mean,
    reduced_attention,
    ridge_predict,
)


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    return InContextRegression(4, tasks=[range(4), [0, 3]]).sample(7, 9, generator=generator, dtype=torch.float64)


def parts(prompts):
    return prompts.inputs, prompts.labels, prompts.query_input


def test_reduced_attention_equals_its_definition(prompts):
    omega, mu = torch.tensor([0.4, -0.7, 0.1]), torch.tensor([2.0, -1.0, 0.5])
    found = reduced_attention(*parts(prompts), omega, mu)
    for row, (inputs, labels, query) in enumerate(zip(*parts(prompts), strict=True)):
        expected = sum(m * torch.softmax(w * inputs @ query, 0) @ labels for w, m in zip(omega, mu, strict=True))
        torch.testing.assert_close(found[row], expected)
    linear = reduced_attention(*parts(prompts), omega, mu, weighting=linear_mean)
    torch.testing.assert_close(linear, gradient_descent_predict(*parts(prompts), (omega * mu).sum().item()))


def test_reduced_attention_is_attention_with_the_pattern(prompts):
    model = InContextAttention(4, 2, 2).double()
    omega, mu = torch.tensor([0.3, -0.3]), torch.tensor([2.0, -2.5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for head in range(2):
            model.query[head, :4, :4] = omega[head] * 6**0.5 * torch.eye(4)
            model.key[head] = model.value[head] = torch.eye(6)
            model.output[head, :, 4:] = mu[head] * torch.eye(2)
        found = model(prompts.examples, prompts.query)
    torch.testing.assert_close(found, reduced_attention(*parts(prompts), omega, mu))


def test_opposite_heads_tend_to_the_debiased_step(prompts):
    expected = gradient_descent_predict(*parts(prompts), 0.8, is_debiased=True)
    errors = []
    for omega in (0.1, 0.05):
        heads, counts = torch.tensor([omega, -omega]).double(), torch.tensor([0.4 / omega, -0.4 / omega]).double()
        errors.append((reduced_attention(*parts(prompts), heads, counts) - expected).abs().max().item())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2), "even orders cancel"


def test_a_gradient_step_is_one(prompts):
    inputs, labels, query = parts(prompts)
    coefficients = torch.zeros(7, 4, 2, dtype=torch.float64, requires_grad=True)
    (0.5 * (inputs @ coefficients - labels).square().mean(1).sum()).backward()
    step = -0.7 * coefficients.grad
    expected = torch.einsum("bi,bio->bo", query, step)
    torch.testing.assert_close(gradient_descent_predict(inputs, labels, query, 0.7), expected)
    matrix = torch.randn(4, 4, dtype=torch.float64)
    preconditioned = torch.einsum("bi,ij,bjo->bo", query, matrix, step / 0.7)
    torch.testing.assert_close(gradient_descent_predict(inputs, labels, query, matrix), preconditioned)


def test_the_debiased_step_does_not_see_a_constant_in_labels_or_inputs(prompts):
    inputs, labels, query = parts(prompts)
    found = gradient_descent_predict(inputs, labels, query, 0.7, is_debiased=True)
    torch.testing.assert_close(gradient_descent_predict(inputs + 3, labels + 5, query, 0.7, is_debiased=True), found)
    assert not torch.allclose(gradient_descent_predict(inputs, labels, query, 0.7), found)


def test_ridge_is_scikit_learns(prompts):
    for variances, penalty in (((0.3,), 1.2), ((0.3, 0.6), 0.5)):
        found = ridge_predict(*parts(prompts), *variances)
        for row, (inputs, labels, query) in enumerate(zip(*parts(prompts), strict=True)):
            model = Ridge(alpha=penalty, fit_intercept=False).fit(inputs.numpy(), labels.numpy())
            torch.testing.assert_close(found[row], torch.from_numpy(model.predict(query[None].numpy())[0]))


def test_no_predictor_beats_ridge():
    prompts = InContextRegression(4, 0.2).sample(20_000, 12, generator=torch.Generator().manual_seed(0))
    errors = [
        (found - prompts.target).square().mean().item()
        for found in (
            ridge_predict(*parts(prompts), 0.2),
            ridge_predict(*parts(prompts), 0.1),
            ridge_predict(*parts(prompts), 0.5),
            gradient_descent_predict(*parts(prompts), 0.7),
        )
    ]
    assert errors[0] == min(errors)


def test_shapes_that_do_not_fit(prompts):
    inputs, labels, query = parts(prompts)
    with pytest.raises(ValueError, match="labels"):
        ridge_predict(inputs, labels[:, :5], query, 0.1)
    with pytest.raises(ValueError, match="queries"):
        gradient_descent_predict(inputs, labels, query[:, :3], 0.1)
    with pytest.raises(ValueError, match="step size"):
        gradient_descent_predict(inputs, labels, query, torch.eye(3))
    with pytest.raises(ValueError, match="one entry a head"):
        reduced_attention(inputs, labels, query, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="positive, got 0"):
        ridge_predict(inputs, labels, query, 0)
