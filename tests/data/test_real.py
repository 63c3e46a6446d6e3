"""The real files, where this machine has them below ``$POSTERN_DATA``."""

import pytest
import torch

from postern.data import catalogue, load, locate, verify

PRESENT = [
    data_set.name for data_set in catalogue() if not data_set.embedded and locate(data_set.name).where == "local"
]


def needs_data(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in PRESENT, reason=f"$POSTERN_DATA has no {name}")


@needs_data("ylecun/mnist")
def test_mnist_has_its_class_counts_and_mean() -> None:
    train = load("ylecun/mnist", "train")
    # The classes' sizes and the mean and deviation that everybody normalises by.
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    scaled = train.scaled()
    assert float(scaled.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(scaled.std()) == pytest.approx(0.3081, abs=1e-4)
    assert load("ylecun/mnist", "test").labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


@needs_data("uoft-cs/cifar10")
def test_cifar_has_its_class_counts_and_channel_means() -> None:
    train = load("uoft-cs/cifar10", "train")
    assert train.labels.bincount().tolist() == [5000] * 10
    means = train.pixels.to(torch.float64).mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), atol=2e-3, rtol=0)


@needs_data("karpathy/tiny_shakespeare")
def test_tiny_shakespeare_has_its_alphabet_and_splits() -> None:
    parts = [load("karpathy/tiny_shakespeare", split).text for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1_003_854, 55_770, 55_770]
    assert len(set("".join(parts))) == 65


@needs_data("Salesforce/wikitext")
def test_wikitext_2_has_its_number_of_words() -> None:
    # 245 569 tokens are reported for the test set, one of them the end of each of its 4 358 lines.
    text = load("Salesforce/wikitext", "test").text
    assert len(text.split()) == 245_569 - 4_358


@needs_data("ptb")
def test_ptb_has_its_number_of_words() -> None:
    # 82 430 and 73 760 tokens are reported, one of them the end of each line.
    for split, tokens in (("test", 82_430), ("validation", 73_760)):
        text = load("ptb", split).text
        assert len(text.split()) + text.count("\n") == tokens


@pytest.mark.parametrize("name", PRESENT)
def test_every_file_that_is_here_is_valid(name: str) -> None:
    verdicts = verify(name)
    assert verdicts
    assert set(verdicts.values()) <= {"known copy", "valid"}
