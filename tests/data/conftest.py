"""Data sets in the Hub's layout, small enough to be written by a test."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``$POSTERN_DATA``, with empty caches, and a Hub that is switched off."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("POSTERN_DATA", str(folder))
    monkeypatch.setenv("POSTERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """One image [height, width] or [height, width, 3] as the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind)
    return stream.getvalue()


def write_images(path: Path, images: Sequence[bytes], labels: Sequence[int], image: str = "image") -> None:
    """A parquet file of images as the Hub has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = pa.array([{"bytes": content, "path": None} for content in images])
    pq.write_table(pa.table({image: encoded, "label": pa.array(labels, pa.int64())}), path)


@pytest.fixture
def digits_28() -> np.ndarray:
    """Ten different images of 28x28."""
    return np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)


@pytest.fixture
def write_mnist_test(digits_28: np.ndarray) -> Callable[[Path], Path]:
    """Write a test split of MNIST's size below a folder: image k is number k mod 10, and so is its label."""

    def write(folder: Path) -> Path:
        path = folder / "mnist" / "test-00000-of-00001.parquet"
        write_images(path, [encode(image) for image in digits_28] * 1000, list(range(10)) * 1000)
        return path

    return write
