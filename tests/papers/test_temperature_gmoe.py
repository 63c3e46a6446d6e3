"""Gates of trained layers: what is compared between trainings."""

import pytest
import torch

from postern.experts import TemperatureGate, evaluate_densely
from postern.papers.temperature_gmoe import (
    GATINGS,
    LAYERS,
    TEXT_MODELS,
    _Classifier,
    _language_model,
    _stepping,
    matched_cosine,
)

CONFIG = LAYERS["smoke"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rows_are_matched_whatever_their_order_and_length():
    rows = torch.randn(5, 7, generator=generator())
    shuffled = rows[torch.tensor([3, 0, 4, 1, 2])] * torch.arange(1.0, 6.0)[:, None]
    assert matched_cosine([rows, shuffled]) == pytest.approx(1)
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[0.6, 0.8], [0.8, 0.6]])  # both rows are nearest to one or the other: 0.8 and 0.8
    third = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # the second has to take what is left
    assert matched_cosine([first, second]) == pytest.approx(0.8)
    assert matched_cosine([first, third]) == pytest.approx((1 + 0.6) / 2)
    assert matched_cosine([first, second, third]) == pytest.approx((0.8 + 0.8 + (0.8 + 0.96) / 2) / 3)


@pytest.mark.parametrize("name", GATINGS)
def test_rows_hold_all_that_a_gate_sees(name):
    """A linear gate is blind to what its rows share, so that it is taken out; a tanh gate is not."""
    classifier = _Classifier(16, 3, CONFIG, GATINGS[name], generator()).double().eval()
    x = torch.randn(6, 16, generator=generator(1), dtype=torch.float64)
    before, rows = classifier(x), classifier.gate_rows()
    with torch.no_grad():
        classifier.router.gate.weight += torch.linspace(-1, 1, 16)
    is_blind = torch.allclose(classifier(x), before, rtol=0, atol=1e-12)
    assert is_blind == (GATINGS[name].activation is None)
    assert torch.allclose(classifier.gate_rows(), rows) == is_blind


@pytest.mark.parametrize("name", GATINGS)
def test_all_experts_work(name):
    classifier = _Classifier(16, 3, CONFIG, GATINGS[name], generator()).double()
    x = torch.randn(6, 1, 16, generator=generator(1), dtype=torch.float64)
    for mode in (True, False):
        output, routing = classifier.train(mode).experts(x)
        assert routing.indices.sort(-1).values.tolist() == [[list(range(CONFIG.experts))]] * 6
        gate = classifier.router.gate
        expected = ((gate.activation(x @ gate.weight.T) + gate.bias) / gate.temperature).softmax(-1)
        torch.testing.assert_close(routing.probabilities, expected)
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(6, 1, dtype=torch.float64))
        torch.testing.assert_close(output, evaluate_densely(classifier.experts, x))


def test_gates_start_alike_but_for_their_temperature():
    models = {name: _Classifier(16, 3, CONFIG, gating, generator(3)) for name, gating in GATINGS.items()}
    for name, model in models.items():
        for key, value in model.state_dict().items():
            if not key.endswith("log_temperature"):
                assert torch.equal(value, models["fixed"].state_dict()[key]), (name, key)
    starts = {name: model.router.gate.temperature.item() for name, model in models.items()}
    assert all(starts[name] == 1 for name in ("fixed", "scheduled", "linear", "tanh"))
    assert starts["linear_anywhere"] == starts["tanh_anywhere"] != 1
    other = [
        _Classifier(16, 3, CONFIG, GATINGS["tanh_anywhere"], generator(seed)).router.gate.temperature.item()
        for seed in range(40)
    ]
    assert 1 / 3 < min(other) < 0.5 < 2 < max(other) < 3


@pytest.mark.parametrize("name", GATINGS)
def test_temperatures_of_language_models_follow_their_gating(name):
    model = _language_model(TEXT_MODELS["smoke"], GATINGS[name], 11, generator())
    gates = [module for module in model.modules() if isinstance(module, TemperatureGate)]
    assert len(gates) == 2
    start = [gate.temperature.item() for gate in gates]
    assert start[0] == start[1]
    steps, first, second = zip(
        *(
            (step, *(gate.temperature.item() for gate in gates))
            for step in _stepping(model, GATINGS[name], range(100), range(100))
        ),
        strict=True,
    )
    assert steps == tuple(range(100))
    wanted = [2 - 1.7 * step / 100 if name == "scheduled" else start[0] for step in steps]
    assert first == pytest.approx(wanted, rel=1e-6)
    assert second == pytest.approx(wanted, rel=1e-6)
