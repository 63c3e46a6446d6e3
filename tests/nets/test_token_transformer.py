import pytest
import torch

from postern.nets import TokenTransformer
from tests.modules import check_module


def build() -> TokenTransformer:
    return TokenTransformer(7, 5, width=8, num_heads=2, feedforward_dim=16).eval()


def test_module():
    check_module(build, torch.randint(7, (4, 2)))


def test_answers_at_the_last_token_and_reads_the_others():
    model = build()
    tokens = torch.tensor([[1, 2, 3], [2, 1, 3], [1, 2, 4], [1, 5, 3]])
    first, swapped, other_last, other_middle = model(tokens)
    torch.testing.assert_close(first, swapped)
    assert not torch.allclose(first, other_last)
    assert not torch.allclose(first, other_middle)


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_heads=3 and width=8"):
        TokenTransformer(7, 5, width=8, num_heads=3)
    with pytest.raises(ValueError, match="num_tokens=0"):
        TokenTransformer(0, 5)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        TokenTransformer(7, 5, dropout=1.0)
