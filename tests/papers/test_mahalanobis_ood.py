import numpy as np
import pytest
import torch

from postern.claims import Run
from postern.papers import mahalanobis_ood as paper


def test_base_against_new_is_the_accuracy_at_every_constant():
    rng = np.random.default_rng(0)
    scores, target = rng.normal(size=(60, 5)), rng.integers(5, size=60)
    scores[np.arange(60), target] += 1
    is_new = np.array([False, True, False, False, True])
    base, new = paper.base_against_new(scores, target, is_new)
    of_new = is_new[target]
    gaps = np.sort(np.where(is_new, -np.inf, scores).max(1) - np.where(is_new, scores, -np.inf).max(1))
    for index, constant in enumerate([gaps[0] - 1, *((gaps[:-1] + gaps[1:]) / 2), gaps[-1] + 1]):
        right = (scores + constant * is_new).argmax(axis=1) == target
        assert base[index] == pytest.approx(right[~of_new].mean())
        assert new[index] == pytest.approx(right[of_new].mean())


def test_shuffled_images_have_the_same_quadrants_in_another_order():
    images = torch.arange(3 * 16.0).view(3, 1, 4, 4).repeat(20, 1, 1, 1)
    shuffled = paper._shuffled(images, torch.Generator().manual_seed(0))

    def quadrants(image):
        return {tuple(image[0, r : r + 2, c : c + 2].flatten().tolist()) for r in (0, 2) for c in (0, 2)}

    for before, after in zip(images, shuffled, strict=True):
        assert quadrants(before) == quadrants(after)
        assert not torch.equal(before, after)
    assert len({tuple(image.flatten().tolist()) for image in shuffled[::3]}) > 5


def test_selected_images_are_right_clean_and_noisy_and_wrong_after_the_attack():
    class Threshold(torch.nn.Module):
        def forward(self, images):
            bright = images.mean(dim=(1, 2, 3)) - 0.5
            return torch.stack([-bright, bright], dim=1)

    generator = torch.Generator().manual_seed(0)
    brightness = torch.tensor([0.2, 0.6]).repeat(100).view(-1, 1, 1, 1)
    images = brightness + 0.2 * torch.rand(200, 1, 8, 8, generator=generator)
    labels = torch.tensor([0, 1]).repeat(100)
    labels[:10] = 1 - labels[:10]  # misclassified from the start
    attacked = images.clone()
    attacked[::2] += 0.3  # half of the attacks succeed
    study = paper.Study(Threshold(), *[images, labels] * 3, 1.0, torch.device("cpu"))
    normal, abnormal, success = paper._selected(study, images, labels, attacked, Run(seed=0, scale="small"))
    assert len(abnormal) == 95
    assert success == pytest.approx(95 / 190)
    torch.testing.assert_close(abnormal, attacked[10::2])
    clean, noisy = normal[:95], normal[95:]
    torch.testing.assert_close(clean, images[10::2])
    sizes = [(x - clean).flatten(1).norm(dim=1) for x in (noisy, abnormal)]
    torch.testing.assert_close(*sizes, rtol=0.02, atol=0)


def test_noise_has_the_size_asked_for_also_on_black_images():
    sizes = torch.tensor([0.0, 0.5, 2.0])
    noisy = paper._noisy(torch.zeros(3, 1, 14, 14), sizes, torch.Generator().manual_seed(0))
    assert noisy.min() >= 0
    torch.testing.assert_close(noisy.flatten(1).norm(dim=1), sizes, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(("channels", "side"), [(1, 7), (3, 14), (3, 40)])
def test_fitted_images_keep_their_brightness(channels, side):
    pixels = torch.rand(5, 3, 28, 28)
    fitted = paper._fitted(pixels, channels, side)
    assert fitted.shape == (5, channels, side, side)
    torch.testing.assert_close(fitted.mean(dim=(1, 2, 3)), pixels.mean(dim=(1, 2, 3)), rtol=0.02, atol=0)
