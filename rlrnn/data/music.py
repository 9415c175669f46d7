"""Symbolic music as piano rolls: which of 88 keys sound in each frame.

A frame's target is the next one (Boulanger-Lewandowski et al. 2012, "Modeling temporal
dependencies in high-dimensional sequences"). Files have one or more of the parts train,
valid and test:

- `.json`: {part: [piece, ...]}, a piece a list of frames, a frame a list of MIDI
  numbers;
- `.mat`: {traindata, validdata, testdata}, each a cell row of rolls [T, 88] of 0 and 1;
- `.npz`: rolls [T, 88] called train_0, train_1, ..., valid_0, ...
"""

import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlrnn import seeding
from rlrnn.checks import at_least
from rlrnn.data.chunks import PROBE_BATCH, Batches, Features, Problem
from rlrnn.data.files import DataError, Paths, find, read_bytes
from rlrnn.objectives import Labels

KEYS, LOWEST = 88, 21  # of a piano; key 0 is MIDI number 21, A0
PARTS = ("train", "valid", "test")
Roll = NDArray[np.float32]  # [T, KEYS], 0 or 1


@dataclass(frozen=True)
class MusicOptions:
    """How piano rolls are read.

    Args:
        transpose: semitones by which each piece of the training part is also moved, up
            and down.
    """

    transpose: int = 0

    def __post_init__(self) -> None:
        at_least("data.music.transpose", self.transpose, 0)
        if self.transpose > 12:
            raise ValueError(
                f"data.music.transpose is {self.transpose}, expected at most 12"
            )


def read_music(path: str | Path) -> dict[str, list[Roll]]:
    """The pieces of a file, folder or glob, by part; those of a file whose parts have
    no names are train. Raises DataError, in one line, for what cannot be read."""
    found: dict[str, list[Roll]] = {}
    for file in find(path, (".json", ".mat", ".npz")):
        match file.name.removesuffix(".gz").rsplit(".", 1)[-1]:
            case "json":
                parts = _from_json(file)
            case "mat":
                parts = _from_mat(file)
            case "npz":
                parts = _from_npz(file)
            case other:
                raise DataError(f"{file} ends in .{other}, expected json, mat or npz")
        for name, rolls in parts.items():
            found.setdefault(name, []).extend(rolls)
    for name, rolls in found.items():
        for number, roll in enumerate(rolls):
            if len(roll) < 2:
                raise DataError(
                    f"{path}: {name} piece {number} has {len(roll)} frames, expected "
                    "at least 2"
                )
    return found


def _from_json(file: Path) -> dict[str, list[Roll]]:
    try:
        tree = json.loads(read_bytes(file))
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}") from None
    if isinstance(tree, list):
        tree = {"train": tree}
    if not isinstance(tree, dict) or not set(tree) <= set(PARTS):
        raise DataError(f"{file} has no parts, expected {', '.join(PARTS)}")
    for name, pieces in tree.items():
        if not isinstance(pieces, list):
            raise DataError(f"{file}: {name} is {pieces!r}, expected a list of pieces")
    return {
        name: [
            _roll(piece, f"{file}: {name} piece {number}")
            for number, piece in enumerate(pieces)
        ]
        for name, pieces in tree.items()
    }


def _roll(piece: Any, where: str) -> Roll:
    """A roll from its frames, lists of MIDI numbers."""
    if not isinstance(piece, list):
        raise DataError(f"{where} is {piece!r}, expected a list of frames")
    roll = np.zeros((len(piece), KEYS), np.float32)
    for t, frame in enumerate(piece):
        for note in frame if isinstance(frame, list) else [frame]:
            key = note - LOWEST if isinstance(note, int) else -1
            if not 0 <= key < KEYS:
                raise DataError(
                    f"{where}, frame {t}: {note!r} is no key of a piano, expected MIDI "
                    f"numbers {LOWEST} to {LOWEST + KEYS - 1}"
                )
            roll[t, key] = 1
    return roll


def _from_mat(file: Path) -> dict[str, list[Roll]]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(
            "reading .mat files needs scipy: pip install 'rlrnn[music]'"
        ) from None
    try:
        tree = loadmat(io.BytesIO(read_bytes(file)))
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise DataError(f"{file} is no .mat file that scipy reads: {error}") from None
    parts = {name: tree[f"{name}data"] for name in PARTS if f"{name}data" in tree}
    if not parts:
        raise DataError(f"{file} has none of traindata, validdata and testdata")
    return {
        name: [
            _checked(roll, f"{file}: {name} piece {number}")
            for number, roll in enumerate(cells.ravel())
        ]
        for name, cells in parts.items()
    }


def _from_npz(file: Path) -> dict[str, list[Roll]]:
    try:
        with np.load(io.BytesIO(read_bytes(file)), allow_pickle=False) as arrays:
            tree = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is no .npz file: {error}") from None
    parts: dict[str, list[Roll]] = {}
    for name in sorted(tree, key=_in_order):
        part = name.rsplit("_", 1)[0]
        part = part if part in PARTS else "train"
        parts.setdefault(part, []).append(_checked(tree[name], f"{file}: {name}"))
    return parts


def _in_order(name: str) -> tuple[str, int]:
    """train_2 comes before train_10."""
    match = re.search(r"\d+$", name)
    return name.rstrip("0123456789"), int(match[0]) if match else -1


def _checked(roll: Any, where: str) -> Roll:
    roll = np.asarray(roll)
    if roll.ndim != 2 or roll.shape[1] != KEYS or not np.isin(roll, (0, 1)).all():
        raise DataError(f"{where} is no roll [T, {KEYS}] of 0 and 1")
    checked: Roll = roll.astype(np.float32)
    return checked


def transposed(roll: Roll, semitones: int) -> Roll | None:
    """The roll moved up; None if a key would leave the piano."""
    moved = np.roll(roll, semitones, axis=1)
    lost = moved[:, :semitones] if semitones > 0 else moved[:, KEYS + semitones :]
    return None if semitones and lost.any() else moved


def music_problem(
    paths: Paths,
    split: Sequence[float],
    batch: int,
    seed: int,
    options: MusicOptions,
) -> Problem:
    """Next-frame prediction of whole pieces; nats are those of a frame, all keys.

    Parts that neither the files nor `paths` have are cut from the training part, whose
    last pieces are the probe; `split`: shares of training, validation and test part.
    Raises DataError for files that cannot be used.
    """
    parts = read_music(paths.train)
    for name, path in (("valid", paths.valid), ("test", paths.test)):
        if path is not None:
            # a file of several parts is asked for its own, another for all it has
            inside = read_music(path)
            parts[name] = inside[name] if name in inside else sum(inside.values(), [])
    train = parts.get("train", [])
    shares = {"test": split[2], "valid": split[1] / (split[0] + split[1])}
    for name, share in (*shares.items(), ("probe", 0.05)):
        if name not in parts and share > 0:
            count = max(1, round(share * len(train)))
            if count >= len(train):
                raise DataError(
                    f"{paths.train} has {len(train)} pieces, too few to cut {name} from"
                )
            train, parts[name] = train[:-count], train[-count:]
    parts.setdefault("test", parts["valid"])
    steps = range(-options.transpose, options.transpose + 1)
    moved = [transposed(roll, step) for roll in train for step in steps]
    parts["train"] = [roll for roll in moved if roll is not None]

    def source(name: str) -> Batches:
        order = seeding.derive(seed, "order") if name == "train" else None
        rolls = parts[name]
        xs, ys = [roll[:-1] for roll in rolls], [roll[1:] for roll in rolls]
        size = {"train": batch, "probe": PROBE_BATCH}.get(name, 32)
        return Batches(xs, ys, size, order)

    targets = np.concatenate([roll[1:] for roll in parts["train"]])
    return Problem(
        inputs=Features(KEYS),
        objective=Labels(KEYS),
        bias=Labels.bias(torch.from_numpy(targets)),
        format={"kind": "music", "options": asdict(options)},
        judge=None,
        **{name: source(name) for name in ("train", "probe", "valid", "test")},
    )


def encode_music(path: str | Path) -> list[Roll]:
    """The pieces of a file, as the model's inputs. Raises DataError for none."""
    rolls: list[Roll] = sum(read_music(path).values(), [])
    if not rolls:
        raise DataError(f"{path} has no pieces")
    return rolls


def decode_frame(out: NDArray[Any]) -> list[int]:
    """MIDI numbers of the keys that sound in a frame [KEYS] of a roll, or that a
    model's output finds more likely than not."""
    return [int(key) + LOWEST for key in np.flatnonzero(out > 0)]


def write_music(path: Path, rolls: Sequence[Roll]) -> None:
    """Pieces as `.json` or `.npz`, as `read_music` reads them. Raises DataError for
    other files, and for what cannot be written."""
    try:
        match path.suffix:
            case ".json":
                pieces = [[decode_frame(frame) for frame in roll] for roll in rolls]
                path.write_text(json.dumps(pieces), encoding="utf-8")
            case ".npz":
                named = {f"train_{i}": roll for i, roll in enumerate(rolls)}
                np.savez_compressed(path, **named)  # type: ignore[arg-type]
            case other:
                raise DataError(
                    f"{path} ends in {other or 'nothing'}, expected .json or .npz"
                )
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
