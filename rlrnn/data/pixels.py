"""Images read as sequences, row by row or pixel by pixel, and their classes (sequential
MNIST: Le et al. 2015, "A simple way to initialize recurrent networks of rectified
linear units")."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrnn import seeding
from rlrnn.checks import one_of
from rlrnn.data.chunks import PROBE_BATCH, Batches, Features, Problem
from rlrnn.data.files import DataError, Paths, find, read_bytes
from rlrnn.objectives import Classes

Order = Literal["rows", "pixels", "permuted"]


@dataclass(frozen=True)
class PixelsOptions:
    """How images become sequences.

    Args:
        order: a step is a row of pixels, or one pixel, row after row or in one random
            order for all images.
    """

    order: Order = "rows"

    def __post_init__(self) -> None:
        one_of("data.pixels.order", self.order, Order)


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """The array of bytes in an idx file (of MNIST). Raises DataError, in one line, for
    what is none."""
    raw = read_bytes(path)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not raw[3]:
        raise DataError(f"{path} is no idx file of bytes")
    begin = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:begin], ">u4")
    wanted = begin + int(shape.prod(dtype=np.int64))
    if len(shape) != raw[3] or len(raw) != wanted:
        raise DataError(f"{path} has {len(raw)} bytes, expected {wanted}: is it whole?")
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(shape)


def read_images(path: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [N, rows, columns] and their classes [N], which lie beside them in a file
    with `labels-idx1` in its name where the images' has `images-idx3`."""
    images, labels = [], []
    for file in find(path, ("images-idx3-ubyte",)):
        beside = file.with_name(file.name.replace("images-idx3", "labels-idx1"))
        if beside == file:
            raise DataError(f"{file}: expected images-idx3 in the name")
        found, classes = read_idx(file), read_idx(beside)
        if found.ndim != 3 or classes.shape != found.shape[:1]:
            raise DataError(
                f"{file} has the shape {list(found.shape)} and {beside.name} "
                f"{list(classes.shape)}, expected [N, rows, columns] and [N]"
            )
        images.append(found)
        labels.append(classes)
    shapes = {found.shape[1:] for found in images}
    if len(shapes) > 1:
        raise DataError(f"{path} has images of several sizes: {sorted(shapes)}")
    return np.concatenate(images), np.concatenate(labels)


def pixels_problem(
    paths: Paths,
    split: Sequence[float],
    batch: int,
    seed: int,
    options: PixelsOptions,
) -> Problem:
    """Images and their classes. Parts without files are cut from the training part, in
    an order that is random and the same for every seed; `split`: the shares of
    training, validation and test part. The probe is the last 5 % of training.

    Raises DataError for files that cannot be used, and for one class only.
    """
    train = read_images(paths.train)
    order = np.random.default_rng(0).permutation(len(train[0]))
    train = train[0][order], train[1][order]
    parts = {}
    for name, path, share in (
        ("test", paths.test, split[2]),
        ("valid", paths.valid, split[1]),
        ("probe", None, 0.05),
    ):
        if path is not None:
            parts[name] = read_images(path)
        elif share > 0:
            whole = len(order) if name != "probe" else len(train[0])
            cut = len(train[0]) - max(1, round(share * whole))
            if cut < 1:
                raise DataError(f"{paths.train} has too few images to cut {name} from")
            parts[name] = train[0][cut:], train[1][cut:]
            train = train[0][:cut], train[1][:cut]
    parts.setdefault("test", parts["valid"])
    parts["train"] = train
    classes = int(train[1].max()) + 1
    if len(np.unique(train[1])) < 2:
        raise DataError(f"{paths.train} has one class only, {train[1][0]}")
    format = {
        "kind": "pixels",
        "options": asdict(options),
        "shape": list(train[0].shape[1:]),
    }

    def source(name: str) -> Batches:
        images, labels = parts[name]
        if labels.max() >= classes:
            raise DataError(
                f"the {name} part has class {labels.max()}, which training has not"
            )
        return Batches(
            list(encode_images(images, format)),
            list(labels),
            {"train": batch, "probe": PROBE_BATCH}.get(name, 100),
            seeding.derive(seed, "order") if name == "train" else None,
        )

    inputs = train[0].shape[2] if options.order == "rows" else 1
    return Problem(
        inputs=Features(inputs),
        objective=Classes(classes, tuple(map(str, range(classes)))),
        format=format,
        judge=None,
        bias=None,
        **{name: source(name) for name in ("train", "probe", "valid", "test")},
    )


def encode_images(
    images: NDArray[np.uint8], format: dict[str, Any]
) -> NDArray[np.float32]:
    """The model's inputs [N, T, D], in [0, 1]. Raises DataError for another size."""
    if list(images.shape[1:]) != format["shape"]:
        raise DataError(
            f"the images are {list(images.shape[1:])}, expected {format['shape']}"
        )
    x: NDArray[np.float32] = images.astype(np.float32) / np.float32(255)
    order = format["options"]["order"]
    if order == "rows":
        return x
    x = x.reshape(len(x), -1, 1)
    if order == "permuted":
        x = x[:, np.random.default_rng(0).permutation(x.shape[1])]
    return x
