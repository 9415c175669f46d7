"""Images as sequences."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlrnn.data.chunks import Batches, Features
from rlrnn.data.files import DataError, Paths
from rlrnn.data.pixels import PixelsOptions, pixels_problem, read_idx, read_images
from rlrnn.objectives import Classes

SPLIT = [0.8, 0.1, 0.1]


def idx(array: NDArray[np.uint8]) -> bytes:
    head = bytes([0, 0, 8, array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(folder: Path, count: int = 50) -> str:
    """Each image is its own: its first pixel is its number, its class that modulo 3."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (count, 4, 5), dtype=np.uint8)
    pixels[:, 0, 0] = np.arange(count)
    labels = (np.arange(count) % 3).astype(np.uint8)
    path = folder / "some-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(pixels)))
    beside = folder / "some-labels-idx1-ubyte.gz"
    beside.write_bytes(gzip.compress(idx(labels)))
    return str(path)


@pytest.mark.parametrize("order", ["rows", "pixels", "permuted"])
def test_each_image_is_in_one_part_whatever_the_seed(
    tmp_path: Path, order: str
) -> None:
    path = images(tmp_path)
    given, classes = read_images(path)
    parts = []
    for seed in (0, 1):
        options = PixelsOptions(order)  # type: ignore[arg-type]
        problem = pixels_problem(Paths(path), SPLIT, 8, seed, options)
        assert problem.objective == Classes(3, ("0", "1", "2"))
        assert problem.inputs == Features(5 if order == "rows" else 1)
        members = []
        for name, count in (("train", 38), ("probe", 2), ("valid", 5), ("test", 5)):
            source = getattr(problem, name)
            assert isinstance(source, Batches) and len(source.lengths) == count
            x = (source.x.view(count, -1) * 255).round().to(torch.int64)
            if order == "permuted":  # pixels of all images, in one order
                numbers = [
                    int(
                        (np.sort(given.reshape(50, -1)) == np.sort(row)).all(1).argmax()
                    )
                    for row in x.numpy()
                ]
            else:
                numbers = x[:, 0].tolist()
                assert (x.numpy() == given[numbers].reshape(count, -1)).all()
            assert source.y.tolist() == classes[numbers].tolist()
            members.append(sorted(numbers))
        assert sorted(sum(members, [])) == list(range(50))
        parts.append(members)
    assert parts[0] == parts[1]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is no idx file"),
        (b"\x89PNG" * 9, "is no idx file"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "has 17 bytes, expected 18"),
    ],
)
def test_what_is_no_idx_file_is_one_line(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "some-images-idx3-ubyte"
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_idx(path)
    assert str(caught.value).startswith(f"{path} {says}")


def test_images_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    path = images(tmp_path)
    labels = tmp_path / "some-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(49, np.uint8))))
    with pytest.raises(DataError, match=r"has the shape \[50, 4, 5\] and .* \[49\]"):
        read_images(path)
    labels.write_bytes(gzip.compress(idx(np.zeros(50, np.uint8))))
    with pytest.raises(DataError, match="has one class only, 0"):
        pixels_problem(Paths(path), SPLIT, 8, 0, PixelsOptions())
    labels.unlink()
    with pytest.raises(DataError, match="^no such file: .*labels-idx1"):
        read_images(path)


def test_mnist() -> None:
    folder = Path(os.environ.get("RLRNN_DATA", ""), "mnist_10k")
    if not folder.is_dir():
        pytest.skip("RLRNN_DATA names no folder with mnist_10k")
    found, labels = read_images(str(folder / "t10k-images-idx3-ubyte.gz"))
    assert found.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009
    ]  # fmt: skip
