"""Gated units against their formula."""

import pytest
import torch
from torch.nn import functional as F

from postern.attention import SGLU
from tests.modules import check_module


@pytest.mark.parametrize(("activation", "function"), [(None, lambda x: x), (F.silu, F.silu)])
def test_equals_its_formula(activation, function):
    unit = SGLU(6, activation=activation).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    value, gate = unit.expand.weight.chunk(2)
    assert value.shape == (12, 6)
    torch.testing.assert_close(unit(x), ((x @ value.T) * function(x @ gate.T)) @ unit.contract.weight.T)


def test_without_an_activation_it_is_a_square_form():
    unit = SGLU(6, 9).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(unit(-3 * x), 9 * unit(x))


def test_survives_what_modules_must():
    check_module(lambda: SGLU(6, 9, bias=True), torch.randn(2, 3, 6))


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="width=6, hidden_dim=0"):
        SGLU(6, 0)
