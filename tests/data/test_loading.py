import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import postern.data.loading as loading
from postern.data import DataUnavailable, InvalidData, fetch, load, locate, verify
from postern.errors import Unavailable
from tests.data.conftest import encode, write_images

Writer = Callable[[Path], Path]
MNIST = "ylecun/mnist"


def put_into_hub_cache(hub: Path, repository: str, revision: str, write: Writer) -> Path:
    """A folder of the Hub's cache as its client leaves it."""
    folder = hub / f"datasets--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)
    return write(folder / "snapshots" / commit)


def write_text_rows(path: Path, rows: list[str], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: rows}), path)


# -- images ---------------------------------------------------------------------------------------------------------


def test_local_images_are_decoded(root: Path, write_mnist_test: Writer, digits_28: np.ndarray) -> None:
    write_mnist_test(root / MNIST)
    loaded = load(MNIST, "test")
    assert loaded.pixels.shape == (10_000, 1, 28, 28)
    assert torch.equal(loaded.pixels[:10, 0], torch.from_numpy(digits_28))
    assert torch.equal(loaded.pixels[-10:], loaded.pixels[:10])
    assert torch.equal(loaded.labels, torch.arange(10_000) % 10)
    assert loaded.class_names == tuple("0123456789")
    assert load(MNIST, "test", limit=3).pixels.shape == (3, 1, 28, 28)


def test_colours_keep_their_order(root: Path) -> None:
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[:, :, 0] = 255
    images = [encode(red), encode(red, "JPEG")] * 5000
    write_images(root / "uoft-cs/cifar10/plain_text/test-00000-of-00001.parquet", images, [0] * 10_000, image="img")
    png, jpeg = load("uoft-cs/cifar10", "test", limit=2).pixels.to(torch.int64)
    assert png.flatten(1).float().mean(1).tolist() == [255, 0, 0]
    assert (png - jpeg).abs().max() < 8, "JPEG is near"


def test_shards_are_read_in_order_and_all_must_be_there(root: Path, digits_28: np.ndarray) -> None:
    encoded = [encode(image) for image in digits_28]
    for shard in range(2):
        write_images(root / MNIST / f"mnist/test-0000{shard}-of-00002.parquet", encoded * 500, [shard] * 5000)
    assert load(MNIST, "test").labels.bincount().tolist() == [5000, 5000]
    assert load(MNIST, "test", limit=5001).labels.tolist() == [0] * 5000 + [1]
    (root / MNIST / "mnist/test-00000-of-00002.parquet").unlink()
    with pytest.raises(DataUnavailable):
        load(MNIST, "test")


@pytest.mark.parametrize("limit", [None, 2])
def test_a_missing_column_is_named(root: Path, limit: int | None) -> None:
    path = root / MNIST / "mnist/test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"picture": ["x"], "label": [0]}), path)
    with pytest.raises(InvalidData) as caught:
        load(MNIST, "test", limit=limit)
    text = str(caught.value)
    assert str(path) in text
    assert "no column 'image', only 'picture', 'label'" in text
    assert f"expected the columns 'image', 'label' of {MNIST}" in text
    assert f"Delete {path.name} and fetch it again: postern data fetch {MNIST}" in text


def test_a_wrong_number_of_rows_is_told_even_with_a_limit(root: Path) -> None:
    image = encode(np.zeros((28, 28), dtype=np.uint8))
    write_images(root / MNIST / "mnist/test-00000-of-00001.parquet", [image] * 3, [0, 1, 2])
    with pytest.raises(InvalidData, match=r"test-00000-of-00001.parquet: 3 rows; expected 10000 rows"):
        load(MNIST, "test", limit=1)


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.999])
def test_a_truncated_file_is_told(root: Path, write_mnist_test: Writer, kept: float) -> None:
    path = write_mnist_test(root / MNIST)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(InvalidData, match="an empty file" if kept == 0 else "not a whole parquet file") as caught:
        load(MNIST, "test")
    assert str(path) in str(caught.value)
    assert "postern data fetch" in str(caught.value)


def test_damage_inside_a_file_is_told(root: Path, write_mnist_test: Writer) -> None:
    path = write_mnist_test(root / MNIST)
    content = bytearray(path.read_bytes())
    content[100:8000] = bytes(7900)
    path.write_bytes(content)
    with pytest.raises(InvalidData, match=re.escape(str(path))):
        load(MNIST, "test")


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (encode(np.zeros((14, 14), dtype=np.uint8)), 0, "row 4242 is a L image of 14x14 pixels; expected L images"),
        (encode(np.zeros((28, 28, 3), dtype=np.uint8)), 0, "row 4242 is a RGB image of 28x28"),
        (b"GIF89a", 0, "row 4242 does not decode"),
        (
            encode(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8))[:400],
            0,
            "row 4242 does not decode",
        ),
        (None, 0, "row 4242 holds no image bytes"),
        (encode(np.zeros((28, 28), dtype=np.uint8)), 10, "row 4242 has the label 10; expected labels from 0 to 9"),
        (encode(np.zeros((28, 28), dtype=np.uint8)), -1, "row 4242 has the label -1"),
    ],
)
def test_a_wrong_row_is_named(root: Path, image: bytes | None, label: int, message: str) -> None:
    images, labels = [encode(np.zeros((28, 28), dtype=np.uint8))] * 10_000, [0] * 10_000
    images[4242], labels[4242] = image, label  # type: ignore[call-overload]
    write_images(root / MNIST / "mnist/test-00000-of-00001.parquet", images, labels)
    with pytest.raises(InvalidData, match=message):
        load(MNIST, "test")
    assert len(load(MNIST, "test", limit=4242)) == 4242, "a limit reads only what it needs"


# -- the cache of decoded images ------------------------------------------------------------------------------------


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*"))


def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The limits of the calls that decode, from now on."""
    calls: list[int | None] = []
    original = loading.read_images

    def counted(data_set, files, paths, limit):  # type: ignore[no-untyped-def]
        calls.append(limit)
        return original(data_set, files, paths, limit)

    monkeypatch.setattr(loading, "read_images", counted)
    return calls


def test_the_second_load_does_not_decode(
    root: Path, tmp_path: Path, write_mnist_test: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist_test(root / MNIST)
    calls = decodes(monkeypatch)
    assert len(load(MNIST, "test", limit=2)) == 2
    assert cached(tmp_path) == []
    first, second, limited = load(MNIST, "test"), load(MNIST, "test"), load(MNIST, "test", limit=5)
    assert calls == [2, None]
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(limited.pixels, first.pixels[:5])
    assert len(cached(tmp_path)) == 1


def test_a_changed_file_is_decoded_again_and_its_old_copy_dropped(
    root: Path, tmp_path: Path, write_mnist_test: Writer, digits_28: np.ndarray
) -> None:
    write_mnist_test(root / MNIST)
    load(MNIST, "test")
    (before,) = cached(tmp_path)
    digits_28[:] = 255 - digits_28
    write_mnist_test(root / MNIST)
    assert torch.equal(load(MNIST, "test").pixels[:10, 0], torch.from_numpy(digits_28))
    (after,) = cached(tmp_path)
    assert before != after


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "garbage"])
def test_a_damaged_cache_is_replaced(root: Path, tmp_path: Path, write_mnist_test: Writer, damage: str) -> None:
    write_mnist_test(root / MNIST)
    good = load(MNIST, "test")
    pixels, labels = good.pixels.clone(), good.labels.clone()
    (path,) = cached(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    path.write_bytes(
        {"truncated": whole[:1000], "empty": b"", "flipped": bytes(flipped), "garbage": b"x" * 999}[damage]
    )
    again = load(MNIST, "test")
    assert torch.equal(again.pixels, pixels)
    assert torch.equal(again.labels, labels)
    assert cached(tmp_path) == [path]
    assert path.read_bytes() == whole


def test_what_a_killed_process_began_is_dropped_and_what_a_living_one_writes_is_not(
    root: Path, tmp_path: Path, write_mnist_test: Writer
) -> None:
    write_mnist_test(root / MNIST)
    load(MNIST, "test")
    (path,) = cached(tmp_path)
    path.unlink()
    abandoned, begun = path.with_name(f"{path.stem}aa.part"), path.with_name(f"{path.stem}bb.part")
    for part in (abandoned, begun):
        part.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    load(MNIST, "test")
    assert cached(tmp_path) == sorted([path, begun])


def test_changing_what_was_loaded_does_not_change_the_cache(root: Path, write_mnist_test: Writer) -> None:
    write_mnist_test(root / MNIST)
    load(MNIST, "test")
    load(MNIST, "test").pixels.zero_()
    assert load(MNIST, "test").pixels.any()


def test_without_a_place_for_the_cache_it_still_loads(
    root: Path, tmp_path: Path, write_mnist_test: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist_test(root / MNIST)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POSTERN_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load(MNIST, "test")) == 10_000


# -- texts ----------------------------------------------------------------------------------------------------------


def test_a_text_by_lines_is_the_same_from_either_layout(root: Path, tmp_path: Path) -> None:
    rows = [f"line {number} of <unk> text" for number in range(3761)]
    write_text_rows(tmp_path / "converted/penn_treebank/test/0000.parquet", rows, column="sentence")
    (root / "ptb").mkdir()
    (root / "ptb/ptb.test.txt").write_text("".join(f" {row} \n" for row in rows))
    from_lines = load("ptb", "test").text
    (root / "ptb/ptb.test.txt").unlink()
    (tmp_path / "converted/penn_treebank").rename(root / "ptb/penn_treebank")
    assert load("ptb", "test").text == from_lines == "".join(f"{row}\n" for row in rows)


@pytest.mark.parametrize("count", [4357, 4358])
def test_wikitext_drops_blank_edges_and_keeps_blank_lines(root: Path, count: int) -> None:
    rows = ["\ufeff \n", " = Title = \n", " \n", *[" A sentence . \n"] * 4354, ""][:count]
    write_text_rows(root / "Salesforce/wikitext/wikitext-2-v1/test-00000-of-00001.parquet", rows)
    text = load("Salesforce/wikitext", "test").text
    assert text == "= Title =\n\n" + "A sentence .\n" * 4354
    assert load("Salesforce/wikitext", "test", limit=9).text == "= Title ="


def test_a_configuration_is_a_name_of_its_own(root: Path) -> None:
    folder = root / "Salesforce/wikitext/wikitext-103-raw-v1"
    write_text_rows(folder / "test-00000-of-00001.parquet", ["row"] * 4358)
    assert load("Salesforce/wikitext/wikitext-103-raw-v1", "test").text == "row\n" * 4358
    assert locate("Salesforce/wikitext").where == "missing"


def test_tiny_shakespeare_is_parted_nine_to_half_to_half(root: Path) -> None:
    whole = "".join(f"verse {number % 7}\n" for number in range(40_000))
    (root / "karpathy/tiny_shakespeare").mkdir(parents=True)
    (root / "karpathy/tiny_shakespeare/input.txt").write_text(whole)
    parts = [load("karpathy/tiny_shakespeare", split).text for split in ("train", "validation", "test")]
    assert "".join(parts) == whole
    assert [round(len(part) / len(whole), 4) for part in parts] == [0.9, 0.05, 0.05]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"one line\n", "1 lines; expected 3761 lines in this split of ptb"),
        (b"\xff\xfe" * 3761, "not UTF-8 text"),
    ],
)
def test_a_wrong_text_file_is_told(root: Path, content: bytes, message: str) -> None:
    (root / "ptb").mkdir()
    (root / "ptb/ptb.test.txt").write_bytes(content)
    with pytest.raises(InvalidData, match=message) as caught:
        load("ptb", "test")
    assert str(root / "ptb/ptb.test.txt") in str(caught.value)


def test_a_text_column_of_numbers_is_told(root: Path) -> None:
    path = root / "Salesforce/wikitext/wikitext-2-v1/test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": list(range(4358))}), path)
    with pytest.raises(InvalidData, match="column 'text' holds int64; expected strings"):
        load("Salesforce/wikitext", "test")


# -- where it is looked for -----------------------------------------------------------------------------------------


def test_local_goes_before_the_hub(root: Path, tmp_path: Path, write_mnist_test: Writer, digits_28: np.ndarray) -> None:
    put_into_hub_cache(tmp_path / "hub", MNIST, "main", write_mnist_test)
    from_hub = load(MNIST, "test", limit=10).pixels
    assert torch.equal(from_hub[:, 0], torch.from_numpy(digits_28))
    place = locate(MNIST)
    assert (place.where, place.missing) == ("hub cache", ("train",))
    digits_28[:] = 255 - digits_28
    write_mnist_test(root / MNIST)
    assert torch.equal(load(MNIST, "test", limit=10).pixels, 255 - from_hub)
    place = locate(MNIST)
    assert (place.where, place.path, place.splits["train"]) == ("local", root / MNIST, "missing")
    assert "postern data fetch ylecun/mnist" in place.remedy


def test_the_hubs_own_conversion_is_found_in_its_cache(root: Path, tmp_path: Path) -> None:
    def write(folder: Path) -> Path:
        write_text_rows(folder / "penn_treebank/test/0000.parquet", ["a b c"] * 3761, column="sentence")
        return folder

    put_into_hub_cache(tmp_path / "hub", "ptb-text-only/ptb_text_only", "refs/convert/parquet", write)
    assert load("ptb", "test", limit=6).text == "a b c\n"
    assert locate("ptb").splits == {"train": "missing", "validation": "missing", "test": "hub cache"}


def test_an_embedded_set_does_not_look_at_files(root: Path) -> None:
    (root / "digits").mkdir()
    (root / "digits" / "train.parquet").write_bytes(b"")
    assert len(load("digits", "train")) == 1437


def test_what_is_nowhere_says_all_three_places_and_the_remedy(root: Path) -> None:
    with pytest.raises(DataUnavailable) as caught:
        load("uoft-cs/cifar10", "train")
    text = str(caught.value)
    assert isinstance(caught.value, Unavailable)
    assert "the split 'train' of 'uoft-cs/cifar10' is not available" in text
    assert "(1) the embedded sets: it is not one of them" in text
    assert f"(2) local files: {root / 'uoft-cs/cifar10'} has no plain_text/train-*.parquet" in text
    assert "(3) the Hub, https://huggingface.co/datasets/uoft-cs/cifar10: OfflineModeIsEnabled" in text
    assert "With a network: postern data fetch uoft-cs/cifar10." in text
    assert "$POSTERN_DATA/uoft-cs/cifar10/." in text
    assert "embedded 'digits'" in text


@pytest.mark.parametrize("value", [None, ""])
def test_without_postern_data_it_says_so(root: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("POSTERN_DATA")
    else:
        monkeypatch.setenv("POSTERN_DATA", value)
    with pytest.raises(DataUnavailable, match="POSTERN_DATA is not set"):
        load("karpathy/tiny_shakespeare", "train")


def test_a_missing_split_does_not_hide_the_others(root: Path, write_mnist_test: Writer) -> None:
    write_mnist_test(root / MNIST)
    with pytest.raises(DataUnavailable, match="the split 'train' of 'ylecun/mnist'"):
        load(MNIST, "train")
    assert len(load(MNIST, "test")) == 10_000


def test_a_damaged_local_file_is_told_rather_than_replaced_by_the_hubs(
    root: Path, tmp_path: Path, write_mnist_test: Writer
) -> None:
    put_into_hub_cache(tmp_path / "hub", MNIST, "main", write_mnist_test)
    write_mnist_test(root / MNIST).write_bytes(b"PAR1")
    with pytest.raises(InvalidData, match=re.escape(str(root))):
        load(MNIST, "test")


def test_fetch_without_a_network_says_so_and_loses_nothing(root: Path, write_mnist_test: Writer) -> None:
    path = write_mnist_test(root / MNIST)
    content = path.read_bytes()
    assert fetch(MNIST, "test") == root / MNIST
    with pytest.raises(DataUnavailable, match="OfflineModeIsEnabled"):
        fetch(MNIST)
    assert path.read_bytes() == content
    assert list((root / MNIST).rglob("*.parquet")) == [path]


def test_verify_reads_everything(root: Path, write_mnist_test: Writer) -> None:
    with pytest.raises(DataUnavailable, match="'ylecun/mnist' is not available"):
        verify(MNIST)
    path = write_mnist_test(root / MNIST)
    assert verify(MNIST) == {path: "valid"}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidData):
        verify(MNIST)
    assert verify("iris") == {}
