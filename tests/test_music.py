"""Piano rolls: three formats, next frames, transposition."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlrnn.data.chunks import Batches
from rlrnn.data.files import DataError, Paths
from rlrnn.data.music import (
    KEYS,
    LOWEST,
    MusicOptions,
    decode_frame,
    encode_music,
    music_problem,
    read_music,
    transposed,
)
from rlrnn.models import ModelConfig
from rlrnn.objectives import Labels
from rlrnn.tasks import build_model

SPLIT = [0.8, 0.1, 0.1]
PLAIN = MusicOptions()


def frames(roll: NDArray[np.float32]) -> list[list[int]]:
    return [decode_frame(frame - 0.5) for frame in roll]


def pieces(count: int, seed: int = 0) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        [
            sorted(set(rng.integers(40, 80, rng.integers(0, 5)).tolist()))
            for _ in range(rng.integers(2, 9))
        ]
        for _ in range(count)
    ]


def rolls(problem: object, name: str) -> list[NDArray[np.float32]]:
    """The pieces of a part, by its windows: the first frame, then the targets."""
    source = getattr(problem, name)
    assert isinstance(source, Batches)
    found, t = [], 0
    while t < source.length:
        span = source.span(t, 1)
        chunk = source.window(t, span)
        t += span
        assert chunk.mask is not None
        for b, length in enumerate(chunk.mask.sum(0).tolist()):
            x, y = chunk.x[:length, b], chunk.y[:length, b]
            np.testing.assert_array_equal(x[1:], y[:-1])
            found.append(np.concatenate((x[:1], y)))
    return found


def as_set(found: list[NDArray[np.float32]]) -> set[str]:
    return {json.dumps(frames(roll)) for roll in found}


def test_json_mat_and_npz_say_the_same(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io")
    music = {name: pieces(12, i) for i, name in enumerate(("train", "valid", "test"))}
    plain = tmp_path / "a.json.gz"
    plain.write_bytes(gzip.compress(json.dumps(music).encode()))
    read = read_music(plain)
    for name, found in read.items():
        assert [frames(roll) for roll in found] == music[name]
    cells = {}
    for name, found in read.items():
        cells[f"{name}data"] = np.empty((1, len(found)), object)
        for i, roll in enumerate(found):
            cells[f"{name}data"][0, i] = roll.astype(np.uint8)
    io.savemat(tmp_path / "b.mat", cells)
    arrays = {
        f"{n}_{i}": roll for n, found in read.items() for i, roll in enumerate(found)
    }
    np.savez(tmp_path / "c.npz", allow_pickle=False, **arrays)
    for name in ("b.mat", "c.npz"):
        again = read_music(tmp_path / name)
        assert again.keys() == read.keys()
        for part in read:
            for one, other in zip(again[part], read[part], strict=True):
                np.testing.assert_array_equal(one, other)


def test_the_target_is_the_next_frame_and_parts_keep_their_pieces(
    tmp_path: Path,
) -> None:
    music = {name: pieces(20, i) for i, name in enumerate(("train", "valid", "test"))}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(music))
    problem = music_problem(Paths(str(path)), SPLIT, 4, 0, PLAIN)
    assert problem.objective == Labels(KEYS)
    for name in ("valid", "test"):
        assert as_set(rolls(problem, name)) == {json.dumps(p) for p in music[name]}
    # the probe is the last of the training part
    wanted = {json.dumps(p) for p in music["train"]}
    assert as_set(rolls(problem, "probe")) == {json.dumps(music["train"][-1])}
    assert as_set(rolls(problem, "train")) == {
        json.dumps(p) for p in music["train"][:-1]
    }
    assert len(wanted) == 20
    assert [frames(roll) for roll in encode_music(path)][:20] == music["train"]


def test_a_file_without_parts_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(pieces(40)))
    problem = music_problem(Paths(str(path)), SPLIT, 4, 0, PLAIN)
    parts = [as_set(rolls(problem, n)) for n in ("train", "probe", "valid", "test")]
    assert sum(map(len, parts)) == 40 == len(set().union(*parts))
    assert [len(part) for part in parts[2:]] == [4, 4]


def test_transposition_is_of_the_training_part_alone(tmp_path: Path) -> None:
    music = {name: pieces(20, i) for i, name in enumerate(("train", "valid", "test"))}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(music))
    options = MusicOptions(transpose=2)
    problem = music_problem(Paths(str(path)), SPLIT, 4, 0, options)
    wanted = {
        json.dumps([[note + step for note in frame] for frame in piece])
        for piece in music["train"][:-1]
        for step in (-2, -1, 0, 1, 2)
    }
    assert as_set(rolls(problem, "train")) == wanted
    for name in ("valid", "test"):
        assert as_set(rolls(problem, name)) == {json.dumps(p) for p in music[name]}


def test_a_model_begins_with_how_often_each_key_sounds(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    parts = {"train": pieces(40), "valid": pieces(4, 1), "test": pieces(4, 2)}
    file.write_text(json.dumps(parts))
    problem = music_problem(Paths(str(file)), SPLIT, 4, 0, PLAIN)
    assert isinstance(problem.train, Batches) and problem.bias is not None
    windows, t = [], 0
    while t < problem.train.length:
        steps = problem.train.span(t, 1024)
        windows.append(problem.train.window(t, steps))
        t += steps
    y = torch.cat([w.y if w.mask is None else w.y[w.mask] for w in windows])
    y = y.reshape(-1, KEYS)
    # with each key once more there and not there, nothing constant does better
    y = torch.cat([y, torch.zeros(1, KEYS), torch.ones(1, KEYS)])
    bias = problem.bias.clone().requires_grad_()
    loss = problem.objective.total(bias.expand(len(y), -1), y, None)
    loss.backward()  # type: ignore[no-untyped-call]
    assert bias.grad is not None and bias.grad.abs().max() < 1e-3
    model = build_model(problem, ModelConfig("gru", 8), seed=0)
    assert torch.equal(model.head.bias, problem.bias)


def test_transposing_moves_each_note_or_gives_nothing() -> None:
    roll = np.zeros((2, KEYS), np.float32)
    roll[0, 0] = roll[1, 40] = 1
    up = transposed(roll, 3)
    assert up is not None and frames(up) == [[LOWEST + 3], [LOWEST + 43]]
    same = transposed(roll, 0)
    assert same is not None and np.array_equal(same, roll)
    assert transposed(roll, -1) is None
    roll[1, KEYS - 1] = 1
    assert transposed(roll, 1) is None


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.json", b"[[[60", "is no JSON"),
        ("a.json", b'{"part": []}', "has no parts, expected train, valid, test"),
        ("a.json", b"[[[60], [200]]]", "train piece 0, frame 1: 200 is no key"),
        ("a.json", b'[[["C"], [60]]]', "train piece 0, frame 0: 'C' is no key"),
        ("a.json", b"[[[60], [61]], [[60]]]", "piece 1 has 1 frames"),
        ("a.json", b"[[[60], [61]], 7]", "train piece 1 is 7, expected a list"),
        ("a.json", b'{"train": 7}', "train is 7, expected a list of pieces"),
        ("a.npz", b"PK nonsense", "is no .npz file"),
        ("a.mat", b"nonsense" * 40, "is no .mat file"),
        ("a.mid", b"MThd", "ends in .mid, expected json, mat or npz"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, raw: bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_music(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_roll_of_another_shape_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for roll in (np.zeros((4, 12)), np.full((4, KEYS), 0.5)):
        np.savez(path, train_0=roll)
        with pytest.raises(DataError, match=r"train_0 is no roll \[T, 88\] of 0 and 1"):
            read_music(path)


def test_the_chorales() -> None:
    """The standard sizes; both files are the same music."""
    folder = Path(os.environ.get("RLRNN_DATA", ""), "jsb_chorales")
    if not folder.is_dir():
        pytest.skip("RLRNN_DATA names no folder with jsb_chorales")
    pytest.importorskip("scipy")
    a = read_music(folder / "jsb-chorales-quarter.json.gz")
    b = read_music(folder / "JSB_Chorales.mat")
    sizes = {name: (len(found), sum(map(len, found))) for name, found in a.items()}
    for name, found in a.items():
        assert as_set(found) == as_set(b[name])
    assert sizes == {"train": (229, 13807), "valid": (76, 4602), "test": (77, 4725)}
    assert a.keys() == b.keys()
