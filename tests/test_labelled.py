"""Labelled sequences: files as they are, parts, normalisation, and complaints."""

import gzip
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlrnn.data.chunks import Batches
from rlrnn.data.files import DataError, Paths
from rlrnn.data.labelled import (
    Labelled,
    LabelledOptions,
    cut,
    decode_label,
    encode_label,
    encode_labelled,
    labelled_problem,
    read_labelled,
)
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.objectives import Classes, Numbers
from rlrnn.tasks import DataConfig, Task, build_trainer

SPLIT = [0.8, 0.1, 0.1]
WIDE = LabelledOptions()
LONG = LabelledOptions(id="id", time="t", label="y")


def sequences(problem: object, name: str) -> list[tuple[NDArray[np.float32], int]]:
    """What a part holds, by its windows."""
    source = getattr(problem, name)
    assert isinstance(source, Batches)
    found, t = [], 0
    while t < source.length:
        span = source.span(t, 1)
        chunk = source.window(t, span)
        t += span
        assert chunk.mask is not None
        ends = chunk.mask.int().argmax(0)
        for b, end in enumerate(ends.tolist()):
            found.append((chunk.x[: end + 1, b].numpy(), int(chunk.y[0, b])))
    return found


def write(path: Path, text: str) -> str:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, "utf-8")
    return str(path)


def ts(rng: np.random.Generator, count: int = 40, channels: int = 2) -> str:
    """A .ts file, ragged, whose classes differ by their means."""
    lines = ["# made up", "@problemName some", "@classLabel true up down", "@data"]
    for i in range(count):
        length = rng.integers(2, 9)
        parts = rng.normal(3 if i % 2 else -3, 1, (channels, length))
        values = ":".join(",".join(f"{v:.5f}" for v in part) for part in parts)
        lines.append(f"{values}:{'up' if i % 2 else 'down'}")
    return "\n".join(lines) + "\n"


# --- reading ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["some.ts", "some.ts.gz"])
def test_three_forms_say_the_same(tmp_path: Path, name: str) -> None:
    header = "@timeStamps false\n@classLabel true a b\n@data\n"
    one = write(tmp_path / name, header + "1,2,3:a\n4,?:b\n")
    wide = write(tmp_path / "w.csv", "v1,label,v2,v3\n1,a,2,3\n4,b,nan,\n")
    rows = "id,t,v,y\nq,1,1,a\np,1,4,b\nq,2,2,a\nq,3,3,a\np,2,,b\n"
    long = write(tmp_path / "l.csv", rows)
    reads = [
        read_labelled(path, options)
        for path, options in ((one, WIDE), (wide, WIDE), (long, LONG))
    ]
    for read in reads:
        assert [sequence.label for sequence in read] == ["a", "b"]
        assert read[0].values.tolist() == [[1], [2], [3]]
        np.testing.assert_array_equal(read[1].values, [[4], [np.nan]])


def test_channels_of_ts_are_columns_of_the_long_form(tmp_path: Path) -> None:
    one = write(tmp_path / "a.ts", "@classLabel true x\n@data\n1,2:3,4:5,6:x\n")
    rows = "c1,c2,c3,y,t,id\n1,3,5,x,2001-01-01,s\n2,4,6,x,2001-01-02,s\n"
    long = write(tmp_path / "b.csv", rows)
    a, b = read_labelled(one, WIDE)[0], read_labelled(long, LONG)[0]
    np.testing.assert_array_equal(a.values, [[1, 3, 5], [2, 4, 6]])
    np.testing.assert_array_equal(a.values, b.values)


def test_labels_may_be_left_out_where_they_are_not_asked_for(tmp_path: Path) -> None:
    one = write(tmp_path / "a.ts", "@classLabel false\n@data\n1,2\n")
    wide = write(tmp_path / "b.csv", "v1,v2\n1,2\n")
    for path in (one, wide):
        (sequence,) = read_labelled(path, WIDE, labels=False)
        assert sequence.label is None and sequence.values.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("name", "text", "options", "says"),
    [
        (
            "a.ts",
            "@classLabel true a\n@data\n1,x:a\n",
            WIDE,
            "line 3: 'x' is no number",
        ),
        ("a.ts", "@classLabel true a\n@data\n1,inf:a\n", WIDE, "line 3: 'inf' is not"),
        ("a.ts", "@data\n1,2:3:a\n", WIDE, "line 2 has channels of 1 and 2 values"),
        ("a.ts", "@data\n1,2:a\n1:2:a\n", WIDE, "line 3 has 2 channels, expected 1"),
        ("a.ts", "@data\n1,2\n", WIDE, "line 2 has no label"),
        ("a.ts", "1,2:a\n", WIDE, "line 1 is no header line"),
        ("a.ts", "@classLabel true a\n", WIDE, "has no @data line"),
        ("a.ts", "@timeStamps true\n@data\n", WIDE, "line 1: time stamps are not"),
        ("a.ts", "@data\n", WIDE, "has no sequences"),
        ("a.csv", "", WIDE, "has no column 'label'"),
        ("a.csv", "v,label\n1,a\n1\n", WIDE, "line 3 has 1 cells, expected 2"),
        ("a.csv", "v,label\n1,\n", WIDE, "line 2 has no label"),
        ("a.csv", "v,label\n,a\n", WIDE, "line 2 has no values"),
        ("a.csv", "id,t,v,y\nq,2,1,a\nq,1,1,a\n", LONG, "line 3: time 1 does not"),
        ("a.csv", "id,t,v,y\nq,1,1,a\nq,1,1,a\n", LONG, "line 3: time 1 does not"),
        ("a.csv", "id,t,v,y\nq,1,1,a\nq,2,1,b\n", LONG, "line 3 has another label"),
        ("a.csv", "id,t,y\nq,1,a\n", LONG, "has no column of values"),
        ("a.csv", "id,v,y\nq,1,a\n", LONG, "has no column 't', only id, v, y"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, text: str, options: LabelledOptions, says: str
) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        read_labelled(path, options)
    assert says in str(caught.value) and path in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the problem --------------------------------------------------------------------


def test_parts_hold_each_sequence_once_and_each_class(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ts", ts(np.random.default_rng(0)))
    read = read_labelled(path, WIDE)
    problem = labelled_problem(Paths(path), SPLIT, 4, 0, WIDE)
    assert problem.objective == Classes(2, ("down", "up"))
    mean, scale = problem.format["mean"], problem.format["scale"]
    found = []
    for name in ("train", "probe", "valid", "test"):
        part = sequences(problem, name)
        assert {label for _, label in part} == {0, 1}
        found += [(x * scale + mean, label) for x, label in part]
    assert len(found) == len(read)
    key = [tuple(np.round(x.flatten(), 3)) for x, _ in found]
    wanted = [tuple(np.round(s.values.flatten(), 3)) for s in read]
    assert Counter(len(k) for k in key) == Counter(len(k) for k in wanted)
    for sequence in read:
        near = [
            label
            for x, label in found
            if x.shape == sequence.values.shape
            and np.allclose(x, sequence.values, atol=1e-4)
        ]
        assert near == [("down", "up").index(str(sequence.label))]


def test_normalisation_is_fitted_on_the_training_part_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ts", ts(np.random.default_rng(0)))
    other = write(tmp_path / "b.ts", ts(np.random.default_rng(1)).replace("3.", "9."))
    a = labelled_problem(Paths(path), SPLIT, 4, 0, WIDE)
    train = np.concatenate([x for x, _ in sequences(a, "train")])
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-4)
    b = labelled_problem(Paths(path, test=other), [0.9, 0.1, 0.0], 4, 0, WIDE)
    c = labelled_problem(Paths(path, test=path), [0.9, 0.1, 0.0], 4, 0, WIDE)
    np.testing.assert_array_equal(b.format["mean"], c.format["mean"])


def test_a_cut_is_stratified_and_never_takes_all() -> None:
    def some(label: str, count: int) -> list[Labelled]:
        return [Labelled(np.zeros((1, 1), np.float32), label, "f line 1")] * count

    rng = np.random.default_rng(0)
    given = some("a", 100) + some("b", 20) + some("c", 2) + some("d", 1)
    left, taken = cut(given, 0.1, "classification", rng)
    assert Counter(s.label for s in taken) == {"a": 10, "b": 2, "c": 1}
    assert Counter(s.label for s in left) == {"a": 90, "b": 18, "c": 1, "d": 1}
    with pytest.raises(DataError, match="too few sequences"):
        cut(some("a", 1) + some("b", 1), 0.1, "classification", rng)


def test_missing_values_are_refused_or_filled() -> None:
    values = np.array([[np.nan], [2], [np.nan], [4]], np.float32)
    sequence = Labelled(values, "a", "f line 7")
    format = {
        "mean": np.array([1], np.float32),
        "scale": np.array([2], np.float32),
    }
    for missing, wanted in (("mean", [1, 2, 1, 4]), ("last", [1, 2, 2, 4])):
        x = encode_labelled(sequence, {**format, "options": {"missing": missing}})
        np.testing.assert_allclose(x[:, 0] * 2 + 1, wanted)
    with pytest.raises(DataError, match="^f line 7 has missing values; give .*$"):
        encode_labelled(sequence, {**format, "options": {}})


def test_a_segment_is_steps_side_by_side() -> None:
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    still = {"mean": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}
    format = {**still, "options": {"segment": 2}}
    x = encode_labelled(Labelled(values, "a", "f"), format)
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]


def test_what_training_has_not_seen_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ts", ts(np.random.default_rng(0)))
    other = write(tmp_path / "b.ts", "@data\n1,2:1,2:sideways\n")
    with pytest.raises(DataError, match=r"b.ts line 2 has the label 'sideways', .*up"):
        labelled_problem(Paths(path, test=other), SPLIT, 4, 0, WIDE)
    narrow = write(tmp_path / "c.ts", "@data\n1,2:up\n")
    with pytest.raises(DataError, match="line 2 has 1 channels, expected 2"):
        labelled_problem(Paths(path, test=narrow), SPLIT, 4, 0, WIDE)
    alone = write(tmp_path / "d.ts", "@data\n" + "1,2:up\n" * 9)
    with pytest.raises(DataError, match="has one class only, 'up'"):
        labelled_problem(Paths(alone), SPLIT, 4, 0, WIDE)


def test_regression_is_judged_in_the_targets_own_units(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"{v},{v},{1000 + 50 * v}" for v in rng.normal(size=60)]
    path = write(tmp_path / "a.csv", "a,b,label\n" + "\n".join(lines) + "\n")
    data = DataConfig(
        "labelled",
        path,
        split=SPLIT,
        batch=4,
        labelled=LabelledOptions("regression"),
    )
    training = TrainingConfig(2_000.0, decisions=6)
    trainer = build_trainer(Task(data, ModelConfig(hidden_size=4), training))
    problem = trainer.problem
    assert problem.objective == Numbers(1)
    format = problem.format
    (first, *_) = read_labelled(path, data.labelled)
    decoded = decode_label(np.array([encode_label(first, format)]), format)
    assert decoded == pytest.approx(float(str(first.label)))
    with torch.no_grad():
        for parameter in trainer.model.head.parameters():
            parameter.zero_()
    figures = trainer.score("test")  # of saying the mean
    targets = [s[0] for s in _targets(problem.test)]
    spread = float(np.sqrt(np.mean(np.square(targets)))) * format["target_scale"]
    assert figures["rmse"] == pytest.approx(spread, rel=1e-4)
    assert figures["mse"] == pytest.approx(spread**2, rel=1e-4)


def _targets(source: object) -> list[list[float]]:
    assert isinstance(source, Batches)
    found: list[list[float]] = source.y.tolist()
    return found


@pytest.mark.parametrize(
    ("set_", "sizes", "channels", "classes"),
    [
        ("GunPoint", (50, 150), 1, 2),
        ("ArrowHead", (36, 175), 1, 3),
        ("ItalyPowerDemand", (67, 1029), 1, 2),
        ("BasicMotions", (40, 40), 6, 4),
        ("JapaneseVowels", (270, 370), 12, 9),
    ],
)
def test_the_archives_files(
    set_: str, sizes: tuple[int, int], channels: int, classes: int
) -> None:
    folder = Path(os.environ.get("RLRNN_DATA", ""), "ucr_uea", set_)
    if not folder.is_dir():
        pytest.skip(f"RLRNN_DATA names no folder with ucr_uea/{set_}")
    for part, size in zip(("TRAIN", "TEST"), sizes, strict=True):
        read = read_labelled(folder / f"{set_}_{part}.ts.gz", WIDE)
        assert len(read) == size
        assert {s.values.shape[1] for s in read} == {channels}
        assert len({s.label for s in read}) == classes
