"""The pyramid: its sizes against those published, its parts, and what it must survive."""

import pytest
import torch

from postern.attention import FramedSoftmaxAttention, NormAwareLinearAttention
from postern.nets import NALAFORMER_SIZES, NaLaFormer, NaLaFormerBlock, NaLaFormerSize
from tests.modules import check_module

TINY = NaLaFormerSize((4, 4, 8, 8), (1, 1, 1, 1), (1, 1, 2, 1), 2.0)


@pytest.mark.parametrize(("name", "millions"), {"XT": 6.1, "T": 15.9, "S": 26, "B": 52, "L": 95}.items())
def test_sizes_are_those_published(name, millions):
    """The paper says 8 for XT and 15 for T; the widths and depths that it gives make 6.1 and 15.9."""
    with torch.device("meta"):
        model = NaLaFormer(1000, NALAFORMER_SIZES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)


def test_survives():
    check_module(lambda: NaLaFormer(3, TINY).eval(), torch.randn(2, 3, 40, 24), compile=False)


def test_a_block_survives():
    attention = NormAwareLinearAttention
    check_module(
        lambda: NaLaFormerBlock(attention(8, 2, rotary="2d", has_lepe=True), 8, 16, 0.0, 1.0), torch.randn(2, 8, 3, 5)
    )


def test_stages_halve_the_image_and_mix_kinds_of_attention():
    model = NaLaFormer(3, TINY, in_channels=1)
    shapes = [tuple(stage.shape[1:]) for stage in model.pyramid(torch.randn(2, 1, 40, 24))]
    assert shapes == [(4, 10, 6), (4, 5, 3), (8, 3, 2), (8, 2, 1)]
    kinds = [type(stage[-1].attention) for stage in model.stages]
    assert kinds == [NormAwareLinearAttention] * 2 + [FramedSoftmaxAttention] * 2
    everywhere = NaLaFormer(3, TINY, is_linear=(True,) * 4)
    assert all(isinstance(stage[-1].attention, NormAwareLinearAttention) for stage in everywhere.stages)


def test_a_branch_is_left_out_for_some_images_and_kept_in_the_mean():
    torch.manual_seed(0)
    block = NaLaFormerBlock(torch.nn.Identity(), 4, 8, 0.25, 1.0)
    kept = block._dropped(torch.ones(4000, 4, 1, 1))
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 4 / 3]))
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert (block.eval()._dropped(torch.ones(5, 4, 1, 1)) == 1).all()


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="every stage has a width"):
        NaLaFormer(3, TINY, is_linear=(True,))
    with pytest.raises(ValueError, match="num_classes=0"):
        NaLaFormer(0, TINY)
    with pytest.raises(ValueError, match="drop_path lies in"):
        NaLaFormer(3, NaLaFormerSize((4, 4, 8, 8), (1, 1, 1, 1), (1, 1, 2, 1), 2.0, drop_path=1.0))
    with pytest.raises(ValueError, match=r"\[batch, channels, height, width\], got \[3, 8, 8\]"):
        NaLaFormer(3, TINY)(torch.zeros(3, 8, 8))
