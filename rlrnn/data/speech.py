"""Speech: recordings, each with a class or a text, as log-mel features.

What a recording is, is told by a manifest (a CSV file with a column `path`), by a
pattern of its name, or by the folder that it lies in.
"""

import csv
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rlrnn import seeding
from rlrnn.checks import at_least, one_of
from rlrnn.data.audio import (
    Reader,
    Wave,
    log_mel,
    mel_edges,
    recordings,
    resample,
    with_deltas,
)
from rlrnn.data.augment import Augmented, Changes
from rlrnn.data.chunks import PROBE_BATCH, Batches, Features, Problem
from rlrnn.data.files import DataError, Paths, expand, read_bytes, read_utf8
from rlrnn.evaluation import evaluating, outputs
from rlrnn.objectives import Classes, Ctc, edit_distance

Task = Literal["classification", "transcription"]
Unit = Literal["characters", "words"]


@dataclass(frozen=True)
class SpeechOptions:
    """How recordings are read.

    Args:
        task: classification (one label for a recording) or transcription (CTC).
        pattern: of the names of files, such as {label}_{speaker}_{index}; without one,
            the label is the folder's name. A manifest has columns in its place.
        hold_out: the field (of pattern or manifest) that tells the parts apart, such
            as speaker or split; without one, parts without files are cut at random.
        test: its values in the test part.
        valid: its values in the validation part; without any, it is cut at random from
            what is left.
        unit: of a text that is transcribed: characters or words.
        join: recordings that are joined to one at most, for transcription; how many
            and which is random.
        rate: in Hz; other recordings are resampled.
        mels: bands of the features.
        window: of a frame, in ms.
        hop: from frame to frame, in ms.
        deltas: whether features have their slopes beside them.
        center: whether each recording's mean is taken from its features.
        top_db: features are then relative to the recording's loudest one, and at most
            this many dB below it, which hides loudness and background noise.
        speeds: at which training recordings are heard too (1.1: 10 % faster, and
            higher).
        band_masks: stretches of bands that are silent in a training recording, others
            each time (SpecAugment, Park et al. 2019).
        band_width: of such a stretch, at most; in bands.
        time_masks: the same of time.
        time_width: of such a stretch, at most, and a fifth of the recording; in frames.
        warp: a training recording's frequencies are multiplied by a factor from 1 -
            this to 1 + this, another each time (vocal tract length perturbation).
        noise: a training recording has background noise of another level and spectrum
            each time, from top_db to this many dB below its loudest; null for none.
    """

    task: Task = "classification"
    pattern: str | None = None
    hold_out: str | None = None
    test: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    unit: Unit = "characters"
    join: int = 1
    rate: int = 16_000
    mels: int = 40
    window: float = 25.0
    hop: float = 10.0
    deltas: bool = False
    center: bool = False
    top_db: float | None = None
    speeds: list[float] = field(default_factory=list)
    band_masks: int = 0
    band_width: int = 4
    time_masks: int = 0
    time_width: int = 10
    warp: float = 0.0
    noise: float | None = None

    def __post_init__(self) -> None:
        one_of("data.speech.task", self.task, Task)
        one_of("data.speech.unit", self.unit, Unit)
        for name, least in (("join", 1), ("rate", 1000), ("mels", 1)):
            at_least(f"data.speech.{name}", getattr(self, name), least)
        for name in ("band_masks", "band_width", "time_masks", "time_width"):
            at_least(f"data.speech.{name}", getattr(self, name), 0)
        if self.band_width > self.mels:
            raise ValueError(
                f"data.speech.band_width is {self.band_width}, expected at most "
                f"data.speech.mels, {self.mels}"
            )
        if not 0 <= self.warp <= 0.5:
            raise ValueError(f"data.speech.warp is {self.warp}, expected 0 to 0.5")
        if self.noise is not None and not 0 <= self.noise <= (self.top_db or -1):
            raise ValueError(
                f"data.speech.noise is {self.noise}, expected 0 to data.speech.top_db, "
                f"which is {self.top_db}"
            )
        if self.noise is not None and self.center:
            raise ValueError(
                f"data.speech.noise is {self.noise} and data.speech.center is true: "
                "expected one of them; a centered recording has no loudness"
            )
        for name in ("window", "hop"):
            at_least(f"data.speech.{name}", getattr(self, name), 1)
        if self.top_db is not None:
            at_least("data.speech.top_db", self.top_db, 1)
        if self.join > 1 and self.task == "classification":
            raise ValueError(
                f"data.speech.join is {self.join}, but data.speech.task is "
                "classification: expected transcription"
            )
        if (self.hold_out is None) != (not self.test):
            raise ValueError(
                f"data.speech.hold_out is {self.hold_out!r} and data.speech.test is "
                f"{self.test}: expected both or neither"
            )
        for speed in self.speeds:
            if not 0.5 <= speed <= 2:
                raise ValueError(
                    f"data.speech.speeds has {speed}, expected 0.5 to 2 for each"
                )

    def changes(self) -> Changes:
        """What is drawn for a training recording each time it comes."""
        masks = self.band_masks, self.band_width, self.time_masks, self.time_width
        return Changes(*masks, self.warp, self.noise, self.top_db)


@dataclass(frozen=True)
class Recording:
    """`fields`: what is known of it beside its sound; label or text among them."""

    name: str
    wave: Wave  # [N]
    fields: dict[str, str]


# --- reading ------------------------------------------------------------------------


def read_recordings(path: str, options: SpeechOptions) -> list[Recording]:
    """The recordings of a manifest, folder, archive or glob, in the order of their
    names. Raises DataError, in one line, for what cannot be read."""
    reader = Reader(options.rate)
    named = _manifest(path) if str(path).endswith(".csv") else _files(path, options)
    found = [Recording(name, reader(name, raw), known) for name, raw, known in named]
    reader.tell()
    for recording in found:
        _wanted(recording, options)
    return found


def _files(
    path: str, options: SpeechOptions
) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    pattern = None if options.pattern is None else _compiled(options.pattern)
    for name, raw in recordings(path):
        place = PurePath(name)
        if pattern is None:
            yield name, raw, {"label": place.parent.name}
            continue
        match = pattern.fullmatch(place.stem)
        if match is None:
            raise DataError(
                f"{name}: its name does not fit the pattern {options.pattern}"
            )
        yield name, raw, match.groupdict()


def _compiled(pattern: str) -> re.Pattern[str]:
    """{label}_{index} as a regular expression; each field is as short as it can be."""
    words = re.split(r"\{(\w+)\}", pattern.removesuffix(".wav").removesuffix(".flac"))
    text = "".join(
        f"(?P<{word}>.+?)" if i % 2 else re.escape(word) for i, word in enumerate(words)
    )
    try:
        return re.compile(text)
    except re.error as error:
        raise DataError(f"data.speech.pattern is {pattern}: {error}") from None


def _manifest(path: str) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """The rows of a CSV file; their paths are relative to it."""
    reader = csv.DictReader(io.StringIO(read_utf8(path)))
    names = list(reader.fieldnames or [])
    if "path" not in names:
        raise DataError(f"{path} has no column path, only {', '.join(names)}")
    for row in reader:
        where = f"{path} line {reader.line_num}"
        if None in row or None in row.values():
            raise DataError(f"{where} has not the {len(names)} cells of the header")
        file = expand(path).parent / row.pop("path")
        try:
            yield str(file), read_bytes(file), row
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _wanted(recording: Recording, options: SpeechOptions) -> str:
    """The label, or the text."""
    wanted = ("text", "label") if options.task == "transcription" else ("label",)
    for name in wanted:
        if recording.fields.get(name):
            return recording.fields[name]
    raise DataError(f"{recording.name} has no {' or '.join(wanted)}")


# --- the problem --------------------------------------------------------------------


def speech_problem(
    paths: Paths,
    split: Sequence[float],
    batch: int,
    seed: int,
    options: SpeechOptions,
    device: torch.device | None = None,
) -> Problem:
    """Recordings and their labels or texts. `split`: shares of training, validation and
    test part, where nothing else tells them apart; `device`: of the features' making.

    Raises DataError for recordings that cannot be used.
    """
    parts = _parts(paths, split, seed, options)
    if options.join > 1:
        for name, part in parts.items():
            rng = np.random.default_rng(seeding.derive(seed, "join", name))
            parts[name] = joined(part, options.join, rng)
    heard = list(parts["train"])
    for speed in options.speeds:
        parts["train"] += [_faster(recording, speed) for recording in heard]
    features = {
        name: [_features(recording.wave, options, device) for recording in part]
        for name, part in parts.items()
    }
    frames = np.concatenate(features["train"])
    scale = frames.std(0, dtype=np.float64)
    tokens = [_tokens(_wanted(recording, options), options) for recording in heard]
    labels = sorted({token for string in tokens for token in string})
    if options.task == "classification" and len(labels) < 2:
        raise DataError(f"{paths.train} has one class only, {labels[0]!r}")
    format: dict[str, Any] = {
        "kind": "speech",
        "options": asdict(options),
        "labels": labels,
        "mean": frames.mean(0, dtype=np.float64).astype(np.float32),
        # a band that is silent throughout has none
        "scale": np.where(scale > 1e-3, scale, 1).astype(np.float32),
    }
    ctc = options.task == "transcription"
    if ctc:
        _tell_short(heard, features["train"], tokens)

    def source(name: str) -> Batches | Augmented:
        xs = [(x - format["mean"]) / format["scale"] for x in features[name]]
        ys = [encode_text(recording, format) for recording in parts[name]]
        order = seeding.derive(seed, "order") if name == "train" else None
        targets = ys if ctc else [y[0] for y in ys]
        size = {"train": batch, "probe": PROBE_BATCH}.get(name, 64)
        batches = Batches(xs, targets, size, order, ctc)
        changes = options.changes()
        if name != "train" or not changes:
            return batches
        centers = mel_edges(options.mels, options.rate)[1:-1].float()
        mean, scale = (
            torch.from_numpy(format["mean"]),
            torch.from_numpy(format["scale"]),
        )
        drawn = seeding.derive(seed, "changes")
        return Augmented(batches, changes, centers, mean, scale, drawn)

    sources = {name: source(name) for name in ("train", "probe", "valid", "test")}
    make = Ctc if ctc else Classes
    return Problem(
        inputs=Features(frames.shape[1]),
        objective=make(len(labels), tuple(labels)),
        format=format,
        judge=_judge(sources, format) if ctc else None,
        bias=None,
        **sources,
    )


def _tell_short(
    recordings: list[Recording],
    features: list[NDArray[np.float32]],
    tokens: list[list[str]],
) -> None:
    """Warns of recordings that have no alignment: CTC needs a frame for each label, and
    a blank between two that are the same."""
    short = [
        recording.name
        for recording, x, string in zip(recordings, features, tokens, strict=False)
        if len(x) < len(string) + sum(map(str.__eq__, string, string[1:]))
    ]
    if short:
        warnings.warn(
            f"{len(short)} of {len(recordings)} training recordings have fewer frames "
            f"than their text needs, and teach nothing; the first is {short[0]}; lower "
            "data.speech.hop",
            stacklevel=2,
        )


def _parts(
    paths: Paths, split: Sequence[float], seed: int, options: SpeechOptions
) -> dict[str, list[Recording]]:
    train = read_recordings(paths.train, options)
    parts: dict[str, list[Recording]] = {}
    for name, path in (("test", paths.test), ("valid", paths.valid)):
        values = getattr(options, name)
        if path is not None:
            parts[name] = read_recordings(path, options)
        elif values:
            train, parts[name] = _held_out(train, str(options.hold_out), values)
    rng = np.random.default_rng(seeding.derive(seed, "parts"))
    shares = {
        "test": split[2],
        "valid": split[1] / (split[0] + split[1]),
        "probe": 0.05,
    }
    for name, share in shares.items():
        if name not in parts and share > 0:
            train, parts[name] = _cut(train, share, rng)
    parts.setdefault("test", parts["valid"])
    return {**parts, "train": train}


def _held_out(
    recordings: list[Recording], name: str, values: list[str]
) -> tuple[list[Recording], list[Recording]]:
    """What is left, and the recordings whose field `name` has one of `values`."""
    for recording in recordings:
        if name not in recording.fields:
            raise DataError(
                f"{recording.name} has no {name}, only {', '.join(recording.fields)}"
            )
    taken = [r for r in recordings if r.fields[name] in values]
    left = [r for r in recordings if r.fields[name] not in values]
    missing = set(values) - {r.fields[name] for r in taken}
    if missing or not left:
        there = sorted({r.fields[name] for r in recordings})
        what = f"no {name} {sorted(missing)[0]}" if missing else f"no other {name}"
        raise DataError(f"the recordings have {what}; there is {', '.join(there)}")
    return left, taken


def _cut(
    recordings: list[Recording], share: float, rng: np.random.Generator
) -> tuple[list[Recording], list[Recording]]:
    """What is left, and a random share."""
    count = max(1, round(share * len(recordings)))
    if count >= len(recordings):
        raise DataError(
            f"{len(recordings)} recordings are too few to cut parts from; record more"
        )
    taken = set(rng.permutation(len(recordings))[:count].tolist())
    left = [r for i, r in enumerate(recordings) if i not in taken]
    return left, [recordings[i] for i in sorted(taken)]


def joined(
    recordings: list[Recording], most: int, rng: np.random.Generator
) -> list[Recording]:
    """As many strings as there are recordings, each of 1 to `most` of them."""
    strings = []
    for _ in recordings:
        chosen = rng.integers(len(recordings), size=rng.integers(1, most + 1))
        clips = [recordings[i] for i in chosen]
        words = [clip.fields.get("text") or clip.fields["label"] for clip in clips]
        wave = np.concatenate([clip.wave for clip in clips])
        name = "+".join(clip.name for clip in clips)
        strings.append(Recording(name, wave, {"text": " ".join(words)}))
    return strings


def _faster(recording: Recording, speed: float) -> Recording:
    length = max(1, round(len(recording.wave) / speed))
    wave = resample(recording.wave, len(recording.wave), length)
    return Recording(recording.name, wave, recording.fields)


def _features(
    wave: Wave, options: SpeechOptions, device: torch.device | None
) -> NDArray[np.float32]:
    """[T, mels], twice as wide with deltas; not yet normalised."""
    there = torch.from_numpy(wave).to(device)
    x = log_mel(there, options.rate, options.mels, options.window, options.hop)
    if options.top_db is not None:
        lowest = -options.top_db * math.log(10) / 10
        x = (x - x.max()).clamp_min(lowest)
    if options.center:
        x = x - x.mean(0)
    return (with_deltas(x) if options.deltas else x).cpu().numpy()


# --- encoding and decoding ----------------------------------------------------------


def _tokens(text: str, options: SpeechOptions) -> list[str]:
    if options.task == "classification":
        return [text]
    return text.split() if options.unit == "words" else list(text)


def encode_text(recording: Recording, format: dict[str, Any]) -> NDArray[np.int64]:
    """The numbers of its labels [S]. Raises DataError for one that training had not."""
    options = SpeechOptions(**format["options"])
    numbers = {label: i for i, label in enumerate(format["labels"])}
    tokens = _tokens(_wanted(recording, options), options)
    for token in tokens:
        if token not in numbers:
            raise DataError(
                f"{recording.name} has the label {token!r}, which the training part "
                f"has not ({', '.join(format['labels'])})"
            )
    return np.array([numbers[token] for token in tokens], np.int64)


def encode_speech(
    path: str, format: dict[str, Any], device: torch.device | None = None
) -> list[tuple[str, NDArray[np.float32]]]:
    """The name and the model's inputs [T, D] of each recording of a file, a folder, a
    glob, an archive or a manifest."""
    options = SpeechOptions(**format["options"])
    reader = Reader(options.rate)
    given = (
        ((name, raw) for name, raw, _ in _manifest(path))
        if str(path).endswith(".csv")
        else recordings(path)
    )
    found = []
    for name, raw in given:
        x = _features(reader(name, raw), options, device)
        found.append((name, (x - format["mean"]) / format["scale"]))
    reader.tell()
    return found


def decode_text(numbers: Sequence[int], format: dict[str, Any]) -> str:
    """The text of these labels."""
    between = " " if format["options"]["unit"] == "words" else ""
    return between.join(format["labels"][number] for number in numbers)


def _judge(
    sources: dict[str, Batches | Augmented], format: dict[str, Any]
) -> Callable[[Any, str], dict[str, float]]:
    """The word error rate: edits of words, over the words that were said."""
    objective = Ctc(len(format["labels"]))

    def judge(model: Any, split: str) -> dict[str, float]:
        source = sources[split].to(next(model.parameters()).device)
        edits = words = 0
        with evaluating(model):
            for chunk, out in outputs(model, source, source.length):
                guesses = objective.decode(out, chunk.mask)
                for guess, true in zip(guesses, chunk.y.t().tolist(), strict=True):
                    said = decode_text([n for n in true if n >= 0], format).split()
                    heard = decode_text(guess, format).split()
                    ids = {word: i for i, word in enumerate({*said, *heard})}
                    edits += edit_distance(
                        [ids[word] for word in heard], [ids[word] for word in said]
                    )
                    words += len(said)
        return {"word_error_rate": edits / max(1, words)}

    return judge
