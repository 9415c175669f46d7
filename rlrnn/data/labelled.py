"""Labelled sequences: one class, or one number, for each.

From `.ts` files (of the UCR and UEA archives), or CSV in wide form (a row is a sequence
of one channel) or long form (a row is a time step).
"""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrnn import seeding
from rlrnn.checks import at_least, one_of
from rlrnn.data.chunks import PROBE_BATCH, Batches, Features, Problem
from rlrnn.data.files import DataError, Paths, find, read_utf8
from rlrnn.evaluation import tally
from rlrnn.objectives import Classes, Numbers

Task = Literal["classification", "regression"]
Missing = Literal["refuse", "mean", "last"]
Array = NDArray[np.float32]


@dataclass(frozen=True)
class LabelledOptions:
    """How files of labelled sequences are read.

    Args:
        task: classification or regression.
        label: the column of a CSV file that has the label.
        id: the column that tells sequences apart; with it, a row is a time step (long
            form).
        time: the column of the time steps of the long form, which must rise; without
            it, rows are taken in their order.
        missing: what becomes of missing values: they are refused, or taken as the
            training part's mean, or as the last value before.
        segment: time steps that lie side by side in one step of the model.
    """

    task: Task = "classification"
    label: str = "label"
    id: str | None = None
    time: str | None = None
    missing: Missing = "refuse"
    segment: int = 1

    def __post_init__(self) -> None:
        one_of("data.labelled.task", self.task, Task)
        one_of("data.labelled.missing", self.missing, Missing)
        at_least("data.labelled.segment", self.segment, 1)
        if self.time is not None and self.id is None:
            raise ValueError(
                f"data.labelled.time is {self.time!r}, but data.labelled.id is not "
                "given; the long form needs both"
            )


@dataclass(frozen=True)
class Labelled:
    """A sequence as it was read. `where`: file and line, for complaints."""

    values: Array  # [T, channels], NaN where a value is missing
    label: str | None
    where: str


# --- reading ------------------------------------------------------------------------


def read_labelled(
    path: str | Path, options: LabelledOptions, labels: bool = True
) -> list[Labelled]:
    """The sequences of a file, a folder or a glob, all with the same channels.

    `labels`: whether each must have one. Raises DataError, in one line with file and
    line, for what cannot be read.
    """
    found: list[Labelled] = []
    for file in find(path, (".ts", ".csv")):
        text = read_utf8(file)
        if file.name.removesuffix(".gz").endswith(".ts"):
            found += _read_ts(text, file, labels)
        elif options.id is not None:
            found += _read_long(text, file, options, labels)
        else:
            found += _read_wide(text, file, options, labels)
    if not found:
        raise DataError(f"{path} has no sequences")
    channels = found[0].values.shape[1]
    for sequence in found:
        if sequence.values.shape[1] != channels:
            raise DataError(
                f"{sequence.where} has {sequence.values.shape[1]} channels, expected "
                f"{channels} as in {found[0].where}"
            )
    return found


def _numbers(words: Sequence[str], where: str) -> list[float]:
    """Numbers; NaN for what is missing (empty, ? or NaN)."""
    numbers = []
    for word in words:
        word = word.strip()
        try:
            number = math.nan if word in ("", "?") else float(word)
        except ValueError:
            raise DataError(f"{where}: {word!r} is no number") from None
        if math.isinf(number):
            raise DataError(f"{where}: {word!r} is not finite")
        numbers.append(number)
    return numbers


def _read_ts(text: str, file: Path, labels: bool) -> Iterator[Labelled]:
    """The format of aeon and sktime: comments #, header @, then a line for each
    sequence, its channels separated by `:`, values by `,`, and the label last."""
    has_label, inside = True, False
    for number, line in enumerate(text.splitlines(), 1):
        line, where = line.strip(), f"{file} line {number}"
        if not line or line.startswith("#"):
            continue
        if not inside:
            if not line.startswith("@"):
                raise DataError(f"{where} is no header line; is this a .ts file?")
            tag, *words = line.lower().split()
            inside = tag == "@data"
            if tag in ("@classlabel", "@targetlabel"):
                has_label = words[:1] == ["true"]
            if tag == "@timestamps" and words[:1] == ["true"]:
                raise DataError(f"{where}: time stamps are not supported; leave them")
            continue
        parts = line.split(":")
        label = parts.pop().strip() if has_label else None
        if labels and (not label or not parts):
            raise DataError(f"{where} has no label after its values")
        channels = [_numbers(part.split(","), where) for part in parts]
        lengths = sorted({len(channel) for channel in channels})
        if len(lengths) > 1:
            raise DataError(
                f"{where} has channels of {lengths[0]} and {lengths[-1]} values, "
                "expected one length"
            )
        yield Labelled(np.array(channels, np.float32).T, label, where)
    if not inside:
        raise DataError(f"{file} has no @data line; is this a .ts file?")


def _rows(
    text: str, file: Path, needed: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, list[str]]]]:
    """The columns of a CSV file by name; its rows, each with where it stands."""
    reader = csv.reader(io.StringIO(text))
    header = [name.strip() for name in next(reader, [])]
    columns = {name: i for i, name in enumerate(header)}
    for name in needed:
        if name not in columns:
            raise DataError(f"{file} has no column {name!r}, only {', '.join(header)}")
    rows = []
    for row in reader:
        where = f"{file} line {reader.line_num}"
        if not row:
            continue
        if len(row) != len(header):
            raise DataError(
                f"{where} has {len(row)} cells, expected {len(header)} as in the header"
            )
        rows.append((where, row))
    return {name: columns[name] for name in (*needed, *optional) if name in columns}, (
        rows
    )


def _read_wide(
    text: str, file: Path, options: LabelledOptions, labels: bool
) -> Iterator[Labelled]:
    """A row for each sequence; empty cells at the end are not there."""
    named = [options.label]
    columns, rows = _rows(text, file, named if labels else [], named)
    at = columns.get(options.label)
    for where, row in rows:
        label = None if at is None else row[at].strip()
        if labels and not label:
            raise DataError(f"{where} has no label")
        words = [word for i, word in enumerate(row) if i != at]
        while words and not words[-1].strip():
            words.pop()
        if not words:
            raise DataError(f"{where} has no values")
        values = np.array(_numbers(words, where), np.float32)
        yield Labelled(values[:, None], label, where)


def _read_long(
    text: str, file: Path, options: LabelledOptions, labels: bool
) -> Iterator[Labelled]:
    """A row for each time step; its other columns are the channels."""
    assert options.id is not None
    needed = [options.id] + ([options.time] if options.time is not None else [])
    if labels:
        needed.append(options.label)
    columns, rows = _rows(text, file, needed, [options.label])
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for where, row in rows:
        groups.setdefault(row[columns[options.id]], []).append((where, row))
    for group in groups.values():
        first = group[0][0]
        if options.time is not None:
            _check_rising([(w, row[columns[options.time]]) for w, row in group])
        label = None
        if options.label in columns:
            label = group[0][1][columns[options.label]].strip()
            for where, row in group:
                if row[columns[options.label]].strip() != label:
                    raise DataError(f"{where} has another label than {first}")
        if labels and not label:
            raise DataError(f"{first} has no label")
        rest = [i for i in range(len(group[0][1])) if i not in columns.values()]
        if not rest:
            raise DataError(f"{file} has no column of values")
        values = [_numbers([row[i] for i in rest], where) for where, row in group]
        yield Labelled(np.array(values, np.float32), label, first)


def _check_rising(times: list[tuple[str, str]]) -> None:
    """Raises DataError where a time does not come after the one before: as numbers, or
    as texts (ISO dates) if they are none."""
    try:
        keys: list[Any] = [float(time) for _, time in times]
    except ValueError:
        keys = [time for _, time in times]
    for i in range(1, len(keys)):
        if not keys[i] > keys[i - 1]:
            raise DataError(
                f"{times[i][0]}: time {times[i][1]} does not come after "
                f"{times[i - 1][1]}; sort the rows, and leave out repeated ones"
            )


# --- the problem --------------------------------------------------------------------


def labelled_problem(
    paths: Paths,
    split: Sequence[float],
    batch: int,
    seed: int,
    options: LabelledOptions,
) -> Problem:
    """Sequences and their labels. What has no file of its own is cut from the training
    part: of each class the same share, and at least one. `split`: shares of training,
    validation and test part.

    Raises DataError for files that cannot be used, or too few sequences.
    """
    train = read_labelled(paths.train, options)
    rng = np.random.default_rng(seeding.derive(seed, "parts"))
    parts: dict[str, list[Labelled]] = {}
    for name, path, share in (
        ("test", paths.test, split[2]),
        ("valid", paths.valid, split[1] / (split[0] + split[1])),
    ):
        if path is not None:
            parts[name] = read_labelled(path, options)
        elif share > 0:
            train, parts[name] = cut(train, share, options.task, rng)
    parts.setdefault("test", parts["valid"])
    parts["train"], parts["probe"] = cut(train, 0.05, options.task, rng)
    format = _fitted(parts["train"], options)
    if options.task == "classification" and len(format["labels"]) < 2:
        raise DataError(f"{paths.train} has one class only, {format['labels'][0]!r}")

    def source(name: str) -> Batches:
        xs = [encode_labelled(sequence, format) for sequence in parts[name]]
        ys = [encode_label(sequence, format) for sequence in parts[name]]
        order = seeding.derive(seed, "order") if name == "train" else None
        size = {"train": batch, "probe": PROBE_BATCH}.get(name, 64)
        return Batches(xs, ys, size, order)

    sources = {name: source(name) for name in ("train", "probe", "valid", "test")}
    channels = len(format["mean"])
    regression = options.task == "regression"
    labels = tuple(format["labels"])
    return Problem(
        inputs=Features(channels * options.segment),
        objective=Numbers(1) if regression else Classes(len(labels), labels),
        format=format,
        judge=_judge(sources, format["target_scale"]) if regression else None,
        bias=None,
        **sources,
    )


def cut(
    sequences: list[Labelled], share: float, task: Task, rng: np.random.Generator
) -> tuple[list[Labelled], list[Labelled]]:
    """What is left, and a random share of each class: at least one, and never all."""
    groups: dict[str | None, list[int]] = {}
    for i, sequence in enumerate(sequences):
        of = sequence.label if task == "classification" else None
        groups.setdefault(of, []).append(i)
    taken: set[int] = set()
    for group in groups.values():
        count = min(max(1, round(share * len(group))), len(group) - 1)
        taken.update(rng.permutation(group)[:count].tolist())
    if not taken:
        raise DataError(
            f"{sequences[0].where}: too few sequences for training and validation, "
            "expected at least two of a class"
        )
    left = [s for i, s in enumerate(sequences) if i not in taken]
    return left, [sequences[i] for i in sorted(taken)]


def _fitted(train: list[Labelled], options: LabelledOptions) -> dict[str, Any]:
    """What the training part alone says: classes, and mean and scale of each channel
    and of the target."""
    values = np.concatenate([sequence.values for sequence in train])
    there = ~np.isnan(values)
    count = np.maximum(there.sum(0), 1)
    mean = np.where(there, values, 0).sum(0, dtype=np.float64) / count
    square = np.where(there, values - mean, 0) ** 2
    scale = np.sqrt(square.sum(0) / count)
    format: dict[str, Any] = {
        "kind": "labelled",
        "options": asdict(options),
        "mean": mean.astype(np.float32),
        "scale": np.where(scale > 0, scale, 1).astype(np.float32),
        "labels": [],
        "target_mean": 0.0,
        "target_scale": 1.0,
    }
    if options.task == "classification":
        format["labels"] = sorted({str(sequence.label) for sequence in train})
    else:
        targets = [_number(sequence) for sequence in train]
        format["target_mean"] = float(np.mean(targets))
        format["target_scale"] = float(np.std(targets)) or 1.0
    return format


def _number(sequence: Labelled) -> float:
    (number,) = _numbers([str(sequence.label)], sequence.where)
    if math.isnan(number):
        raise DataError(f"{sequence.where} has no number as its target")
    return number


def encode_labelled(sequence: Labelled, format: dict[str, Any]) -> Array:
    """The model's inputs [T, channels * segment], normalised; a last segment that is
    not full is filled with the mean. Raises DataError for what does not fit."""
    options = LabelledOptions(**format["options"])
    values, channels = sequence.values, len(format["mean"])
    if values.shape[1] != channels:
        raise DataError(
            f"{sequence.where} has {values.shape[1]} channels, expected {channels}"
        )
    there = ~np.isnan(values)
    if not there.all():
        if options.missing == "refuse":
            raise DataError(
                f"{sequence.where} has missing values; give data.labelled.missing "
                "mean or last"
            )
        values = _filled(values, there, options.missing, format["mean"])
    x = (values - format["mean"]) / format["scale"]
    steps = -(-len(x) // options.segment)
    padding = steps * options.segment - len(x)
    x = np.concatenate((x, np.zeros((padding, channels), x.dtype)))
    return x.reshape(steps, -1).astype(np.float32)


def _filled(
    values: Array, there: NDArray[np.bool_], missing: Missing, mean: Array
) -> Array:
    if missing == "mean":
        return np.where(there, values, mean)
    step = np.arange(len(values))[:, None]
    last = np.maximum.accumulate(np.where(there, step, -1), axis=0)
    held = np.take_along_axis(values, np.maximum(last, 0), axis=0)
    return np.where(last >= 0, held, mean)


def encode_label(sequence: Labelled, format: dict[str, Any]) -> int | float:
    """The number of its class, or the normalised target. Raises DataError for a class
    that training did not have."""
    if format["options"]["task"] == "regression":
        mean, scale = format["target_mean"], format["target_scale"]
        return float((_number(sequence) - mean) / scale)
    try:
        return int(format["labels"].index(sequence.label))
    except ValueError:
        raise DataError(
            f"{sequence.where} has the label {sequence.label!r}, which the training "
            f"part has not ({', '.join(format['labels'])})"
        ) from None


def decode_label(out: NDArray[Any], format: dict[str, Any]) -> str | float:
    """The label that the model's last output [C] stands for."""
    if format["options"]["task"] == "regression":
        return float(out[0] * format["target_scale"] + format["target_mean"])
    return str(format["labels"][int(out.argmax())])


def _judge(
    sources: dict[str, Batches], scale: float
) -> Callable[[Any, str], dict[str, float]]:
    """Errors in the target's own units."""

    def judge(model: Any, split: str) -> dict[str, float]:
        source = sources[split].to(next(model.parameters()).device)
        objective = Numbers(1)
        figures = objective.report(*tally(model, objective, source))
        figures["mse"] *= scale**2
        return figures | {name: figures[name] * scale for name in ("rmse", "mae")}

    return judge
