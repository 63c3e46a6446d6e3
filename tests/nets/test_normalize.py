import pytest
import torch

from postern.nets import Normalize
from tests.modules import check_module


def test_module():
    check_module(lambda: Normalize((0.5, 0.4), (0.2, 0.3)), torch.rand(2, 2, 3, 3))


def test_each_channel_has_its_own_mean_and_deviation():
    pixels = torch.rand(4, 2, 3, 3)
    expected = torch.stack([(pixels[:, 0] - 0.5) / 0.2, (pixels[:, 1] - 0.4) / 0.3], dim=1)
    torch.testing.assert_close(Normalize((0.5, 0.4), (0.2, 0.3))(pixels), expected)


def test_bad_statistics():
    with pytest.raises(ValueError, match="1 and 2"):
        Normalize((0.5,), (0.2, 0.3))
    with pytest.raises(ValueError, match="positive"):
        Normalize((0.5,), (0.0,))
