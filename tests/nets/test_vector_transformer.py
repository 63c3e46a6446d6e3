import pytest
import torch

from postern.attention import SelfAttention
from postern.nets import VectorTransformer
from postern.softmax import stablemax
from tests.modules import check_module


def test_is_sound() -> None:
    check_module(lambda: VectorTransformer(4, 6, 3, width=16), torch.randn(2, 6, 4))


def test_order_matters_by_position_alone() -> None:
    torch.manual_seed(0)
    model = VectorTransformer(4, 6, 3, width=16).double()
    tokens, order = torch.randn(2, 6, 4).double(), torch.randperm(6)
    assert not torch.allclose(model(tokens), model(tokens[:, order]))
    with torch.no_grad():
        model.position.zero_()
    torch.testing.assert_close(model(tokens), model(tokens[:, order]))


def test_attention_can_be_exchanged() -> None:
    torch.manual_seed(0)
    plain = VectorTransformer(4, 6, 3, width=16)
    other = VectorTransformer(4, 6, 3, width=16, attention=lambda _: SelfAttention(16, 2, normalise=stablemax))
    other.load_state_dict(plain.state_dict())
    tokens = torch.randn(2, 6, 4)
    assert not torch.allclose(plain(tokens), other(tokens))


@pytest.mark.parametrize("wrong", [{"in_features": 0}, {"num_tokens": 0}, {"width": 15}, {"position_std": -1.0}])
def test_misuse(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        VectorTransformer(**{"in_features": 4, "num_tokens": 6, "num_classes": 3, **wrong})


def test_positions_start_as_large_as_asked() -> None:
    torch.manual_seed(0)
    position = VectorTransformer(1, 500, 3, width=16, position_std=2.0).position
    assert position.std().item() == pytest.approx(2, rel=0.05)
