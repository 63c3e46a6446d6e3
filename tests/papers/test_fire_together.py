"""What predicted masks are compared with."""

import pytest
import torch

from postern.adaptive import count_macs
from postern.claims import Run
from postern.nets import ConvNet
from postern.papers.fire_together import RandomPredictor, Serving, Setting, Study, serving_networks


@pytest.mark.parametrize("reduction", [0.2, 0.5, 0.8])
def test_static_networks_have_no_fewer_multiply_adds(reduction):
    setting = Setting(side=16, widths=(32, 64, 128, 128))
    images = torch.zeros(2, 3, 16, 16)
    study = Study(setting, Run(0, "smoke"), ConvNet(3, 10, setting.widths), *[images, torch.zeros(2)] * 2)
    widths = study.slim_widths(reduction)
    image = images[:1]
    dense = count_macs(lambda: ConvNet(3, 10, setting.widths).eval()(image)) - 10 * 128
    slim = count_macs(lambda: ConvNet(3, 10, widths).eval()(image)) - 10 * widths[-1]
    assert 1 - reduction <= slim / dense < 1 - reduction + 0.03


def test_random_masks_have_the_density():
    density = torch.tensor([0.0, 0.3, 1.0])
    torch.manual_seed(0)
    masks = RandomPredictor(density)(torch.zeros(5000, 2, 1, 1)) > 0
    torch.testing.assert_close(masks.float().mean(0), density, atol=0.02, rtol=0)
    assert len(masks.unique(dim=0)) == 2


@torch.no_grad()
def test_networks_that_are_timed():
    setting = Serving((16, 24, 24), (1, 2, 1), side=16, images=24)
    networks, images = serving_networks(setting, torch.device("cpu"), torch.Generator().manual_seed(0))
    macs = {name: count_macs(lambda network=network: network(images)) for name, network in networks.items()}
    assert macs["gathered"] / macs["dense"] == pytest.approx(0.4, abs=0.01)
    assert macs["static"] / macs["dense"] == pytest.approx(0.4, abs=0.1)
    masks = networks["gathered"].set_execution("masked").with_reports(images)[1][-1].mask
    assert len(masks.unique(dim=0)) > 12  # each image has its own
