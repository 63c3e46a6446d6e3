"""The moments of the prompts, which the theory rests on."""

import pytest
import torch

from postern.dynamics import InContextRegression, autoregressive_covariance


def drawn(task, count=4000, length=9, seed=0):
    return task.sample(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_prompt_is_examples_and_a_query_without_its_label():
    prompts = drawn(InContextRegression(3), 5)
    assert len(prompts) == 5
    assert (prompts.examples.shape, prompts.query.shape, prompts.target.shape) == ((5, 9, 4), (5, 4), (5, 1))
    torch.testing.assert_close(torch.cat([prompts.inputs, prompts.labels], -1), prompts.examples)
    assert torch.equal(prompts.query[:, :3], prompts.query_input)
    assert (prompts.query[:, 3] == 0).all()
    assert (prompts.target != 0).all()


def test_without_noise_labels_and_target_share_one_linear_function():
    prompts = drawn(InContextRegression(3, 0.0), 50)
    coefficients = torch.linalg.lstsq(prompts.inputs, prompts.labels).solution
    torch.testing.assert_close(prompts.inputs @ coefficients, prompts.labels)
    torch.testing.assert_close((prompts.query_input[:, None] @ coefficients)[:, 0], prompts.target)
    assert coefficients.std(0).min() > 0.1, "each prompt has coefficients of its own"


def test_moments():
    prompts = drawn(InContextRegression(5, 0.3), 40_000, 2)
    inputs = prompts.inputs.flatten(0, 1)
    torch.testing.assert_close(inputs.T.cov(), torch.eye(5, dtype=torch.float64), atol=0.03, rtol=0)
    assert prompts.labels.var().item() == pytest.approx(1.3, rel=0.03)
    assert prompts.target.var().item() == pytest.approx(1.3, rel=0.03)


def test_the_targets_noise_can_be_left_out():
    noisy, clean = (drawn(InContextRegression(3, 0.5, is_query_noisy=flag)) for flag in (True, False))
    assert torch.equal(noisy.examples, clean.examples)
    assert (noisy.target - clean.target).var().item() == pytest.approx(0.5, rel=0.1)


def test_inputs_have_the_covariance():
    covariance = autoregressive_covariance(4, 0.5)
    torch.testing.assert_close(covariance[0], torch.tensor([1.0, 0.5, 0.25, 0.125]))
    assert torch.equal(covariance, covariance.T)
    prompts = drawn(InContextRegression(4, covariance=covariance), 20_000, 2)
    for inputs in (prompts.inputs.flatten(0, 1), prompts.query_input):
        torch.testing.assert_close(inputs.T.cov().float(), covariance, atol=0.04, rtol=0)


def test_a_task_depends_on_its_entries_alone():
    task = InContextRegression(6, 0.0, tasks=[range(4), [5, 2]], coefficient_variance=1.0)
    prompts = drawn(task, 3000)
    coefficients = torch.linalg.lstsq(prompts.inputs, prompts.labels).solution
    used = coefficients.abs().amax(0) > 1e-6
    assert used.T.tolist() == [[True] * 4 + [False] * 2, [False, False, True, False, False, True]]
    assert coefficients[:, used].var().item() == pytest.approx(1, rel=0.1)
    assert torch.corrcoef(coefficients[:, 2].T)[0, 1].abs() < 0.06, "tasks are independent where they overlap"
    labels = drawn(InContextRegression(6, 0.2, tasks=[range(4), [5]]), 4000).labels
    torch.testing.assert_close(labels.var((0, 1)).float(), torch.tensor([1.2, 1.2]), atol=0.12, rtol=0)


def test_drawing_again_gives_the_same():
    task = InContextRegression(3)
    assert torch.equal(drawn(task, 4).examples, drawn(task, 4).examples)
    assert not torch.equal(drawn(task, 4).examples, drawn(task, 4, seed=1).examples)
    assert task.sample(2, 3, device="meta").examples.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"noise_variance": -0.1}, "noise_variance .* -0.1"),
        ({"noise_variance": float("nan")}, "noise_variance"),
        ({"coefficient_variance": 0.0}, "coefficient_variance"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": [[0], []]}, "a task is"),
        ({"tasks": [[0, 3]]}, r"0 to 2, got \[0, 3\]"),
        ({"tasks": [[1, 1]]}, "different"),
        ({"covariance": torch.eye(2)}, r"\[3, 3\], got \[2, 2\]"),
        ({"covariance": -torch.eye(3)}, "positive definite"),
        ({"covariance": torch.eye(3) + torch.ones(3, 3).triu(1) / 2}, "symmetric"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        InContextRegression(**{"dim": 3} | arguments)


def test_impossible_sizes():
    with pytest.raises(ValueError, match="4 and 0"):
        InContextRegression(3).sample(4, 0)
    with pytest.raises(ValueError, match="correlation=1"):
        autoregressive_covariance(3, 1)
