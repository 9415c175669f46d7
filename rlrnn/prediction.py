"""What a trained model says of new data: `rlrnn predict RUN INPUT`.

Text and music are continued, or scored; a table is forecast; recordings and sequences
are labelled or transcribed. Nothing of the training data is needed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlrnn import plots, seeding
from rlrnn.data.chunks import Batches
from rlrnn.data.files import read_bytes
from rlrnn.data.forecasts import forecast
from rlrnn.data.labelled import (
    LabelledOptions,
    decode_label,
    encode_labelled,
    read_labelled,
)
from rlrnn.data.music import Roll, encode_music, write_music
from rlrnn.data.speech import decode_text as decode_speech
from rlrnn.data.speech import encode_speech
from rlrnn.data.text import decode_text, encode_text, read_text
from rlrnn.evaluation import evaluating, outputs
from rlrnn.finished import Finished, load_model
from rlrnn.models import SequenceModel
from rlrnn.objectives import Classes, Ctc

CHUNK = 256  # steps of a long input at a time


# --- text -----------------------------------------------------------------------------


def chosen(
    logits: Tensor,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int,
    generator: torch.Generator,
) -> int:
    """One symbol drawn from logits [C].

    Of the `top_k` likeliest alone, then of the fewest of those that hold the share
    `top_p` of the probability (nucleus sampling, Holtzman et al. 2020). Temperature 0
    takes the likeliest.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double() / temperature
    if top_k is not None and top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    ordered, place = logits.softmax(-1).sort(descending=True)
    # those before which less than top_p was held; the first is always among them
    held = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(held >= top_p, 0.0)
    return int(place[torch.multinomial(ordered, 1, generator=generator)])


@torch.no_grad()
def sample(
    model: SequenceModel,
    prompt: Tensor,
    length: int,
    choose: Callable[[Tensor], int],
) -> Iterator[int]:
    """`length` symbols after a prompt [T], each read by the model before the next one
    is drawn from its logits; the state is carried."""
    state, out = model.initial_state(1), None
    for begin in range(0, len(prompt), CHUNK):
        part = prompt[begin : begin + CHUNK]
        out, state = model(part.unsqueeze(1), state)
    assert out is not None, "a prompt has at least one symbol"
    for _ in range(length):
        symbol = choose(out[-1, 0])
        yield symbol
        read = prompt.new_tensor([[symbol]])
        out, state = model(read, state)


def continue_text(
    finished: Finished,
    prompt: str,
    length: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int = 1.0,
    seed: int = 0,
) -> str:
    """`length` symbols (characters, bytes, words or pieces) that follow a prompt. The
    unknown symbol is never drawn.

    Raises DataError for a prompt that the model cannot read, ValueError for settings
    out of range.
    """
    if length < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"length is {length}, temperature {temperature} and top_p {top_p}: "
            "expected at least 1, at least 0, and above 0 up to 1"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1")
    symbols = torch.from_numpy(encode_text(finished.format, prompt))
    if not len(symbols):
        raise ValueError("the prompt is empty; give at least one character")
    generator = torch.Generator().manual_seed(seeding.derive(seed, "sample"))
    unknown = finished.format["level"] in ("characters", "words")

    def choose(logits: Tensor) -> int:
        if unknown:
            logits = logits.clone()
            logits[0] = -math.inf
        return chosen(logits, temperature, top_k, top_p, generator)

    drawn = list(sample(finished.model, symbols, length, choose))
    return decode_text(finished.format, drawn)


def score_text(finished: Finished, text: str, name: str) -> dict[str, float]:
    """How well a model predicts a text: nats and bits per symbol, perplexity."""
    symbols = torch.from_numpy(encode_text(finished.format, text, name))
    if len(symbols) < 2:
        raise ValueError(f"{name} is too short to score: expected at least 2 symbols")
    state, nats = finished.model.initial_state(1), 0.0
    with evaluating(finished.model):
        for begin in range(0, len(symbols) - 1, CHUNK):
            part = symbols[begin : begin + CHUNK + 1]
            logits, state = finished.model(part[:-1].unsqueeze(1), state)
            nats += float(F.cross_entropy(logits[:, 0], part[1:], reduction="sum"))
    mean = nats / (len(symbols) - 1)
    return {
        "symbols": float(len(symbols)),
        "nats": mean,
        "bits": mean / math.log(2),
        "perplexity": math.exp(min(mean, 700.0)),
    }


# --- music ----------------------------------------------------------------------------


@torch.no_grad()
def continue_roll(
    model: SequenceModel,
    roll: Roll,
    length: int,
    temperature: float | int = 1.0,
    seed: int = 0,
) -> Roll:
    """`length` frames [length, KEYS] that follow a roll. Each key of a frame is drawn
    by itself, from its logit / temperature; at temperature 0 those sound that are more
    likely than not. Raises ValueError for settings out of range."""
    if length < 1 or temperature < 0:
        raise ValueError(
            f"length is {length} and temperature {temperature}: expected at least 1, "
            "and at least 0"
        )
    generator = torch.Generator().manual_seed(seeding.derive(seed, "sample"))
    given = torch.from_numpy(roll).unsqueeze(1)
    out, state = model(given, model.initial_state(1))
    frames = []
    for _ in range(length):
        logits = out[-1:]
        if temperature == 0:
            frame = (logits > 0).float()
        else:
            frame = (logits / temperature).sigmoid().bernoulli(generator=generator)
        frames.append(frame)
        out, state = model(frame, state)
    drawn: Roll = torch.cat(frames)[:, 0].numpy()
    return drawn


def score_rolls(model: SequenceModel, rolls: Sequence[Roll]) -> pd.DataFrame:
    """A row for each frame but the first of each piece: the numbers of piece and frame,
    and its negative log-likelihood after the frames before, all keys, in nats."""
    tables = []
    before = [roll[:-1] for roll in rolls]
    for piece, out in enumerate(each_output(model, before)):
        true = torch.from_numpy(rolls[piece][1:])
        nats = F.binary_cross_entropy_with_logits(out, true, reduction="none").sum(-1)
        rows = {"piece": piece, "frame": np.arange(1, len(true) + 1), "nats": nats}
        tables.append(pd.DataFrame(rows))
    return pd.concat(tables, ignore_index=True)


def play_on(
    finished: Finished,
    given: str,
    path: Path,
    length: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes each piece of a file, and what follows it, to `path`."""
    if finished.model.config.bidirectional:
        raise ValueError("the model is bidirectional: it needs the frames to come")
    if top_k is not None or top_p != 1:
        raise ValueError(
            f"top_k is {top_k} and top_p {top_p}, which are for text: leave them out"
        )
    rolls = encode_music(given)
    drawn = [
        continue_roll(finished.model, roll, length, temperature, seed + piece)
        for piece, roll in enumerate(rolls)
    ]
    pairs = zip(rolls, drawn, strict=True)
    write_music(path, [np.concatenate(pair) for pair in pairs])
    notes = sum(float(roll.sum()) for roll in drawn)
    return {
        "pieces": len(rolls),
        "new_frames": length,
        "notes_per_frame": notes / length / len(rolls),
        "file": str(path),
    }


# --- sequences of numbers -------------------------------------------------------------


def each_output(
    model: SequenceModel, sequences: Sequence[NDArray[Any]]
) -> Iterator[Tensor]:
    """The model's outputs [T, C] for each sequence [T, D]."""
    for sequence in sequences:
        source = Batches([sequence], [0], 1)
        with evaluating(model):
            for _, out in outputs(model, source, source.length):
                yield out[:, 0]


def label(finished: Finished, names: list[str], inputs: list[Any]) -> pd.DataFrame:
    """A row for each sequence: its name, and its label with the probability of each
    class, its number, or its transcription."""
    rows: list[dict[str, Any]] = []
    objective, format = finished.objective, finished.format
    for name, out in zip(names, each_output(finished.model, inputs), strict=True):
        row: dict[str, Any] = {"name": name}
        if isinstance(objective, Ctc):
            (labels,) = objective.decode(out.unsqueeze(1), None)
            row["text"] = decode_speech(labels, format)
        elif isinstance(objective, Classes):
            shares = out[-1].softmax(-1).tolist()
            row["label"] = objective.names[int(np.argmax(shares))]
            row |= dict(zip(objective.names, shares, strict=True))
        else:
            row["value"] = decode_label(out[-1].numpy(), format)
        rows.append(row)
    return pd.DataFrame(rows)


# --- the command ----------------------------------------------------------------------


def predict(
    run: str | Path,
    given: str,
    output: str | Path | None = None,
    score: bool = False,
    levels: list[float] | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """What a run's model makes of `given`: a prompt, or with `score` a text file, for
    text; else a file, a folder or a glob of what it was trained on. Tables and music
    are written to `output`, by default beside the model.

    Raises DataError, in one line, for what does not fit.
    """
    finished = load_model(run)
    kind = str(finished.format.get("kind"))
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    if score and kind not in ("text", "music"):
        raise ValueError(
            f"--score is for texts and music, but {run} has learned {kind}"
        )
    if kind == "text":
        level = finished.format["level"]
        if score:
            return score_text(finished, _scored(given, level), given)
        more = continue_text(finished, given, **sampling)
        apart = level == "words" and not (given[-1:].isspace() or more[:1] == "\n")
        return {"text": given + " " * apart + more}
    if kind == "music":
        if not score:
            path = Path(output or folder / "continued.json")
            return play_on(finished, given, path, **sampling)
        frame = score_rolls(finished.model, encode_music(given))
        written = _table(frame, output, folder)["file"]
        return {"nats_per_frame": float(frame["nats"].mean()), "file": written}
    if kind == "series":
        made = forecast(finished.model, finished.format, given, levels or ())
        picture = plots.plot_forecast(made, folder / "forecast.png")
        told = {"series": len(made.names), "horizon": made.values.shape[1]}
        return {**told, **_table(made.frame(), output, folder), "plot": str(picture)}
    if kind == "labelled":
        options = LabelledOptions(**finished.format["options"])
        read = read_labelled(given, options, labels=False)
        inputs = [encode_labelled(one, finished.format) for one in read]
        frame = label(finished, [one.where for one in read], inputs)
    elif kind == "speech":
        found = encode_speech(given, finished.format)
        frame = label(finished, [name for name, _ in found], [x for _, x in found])
    else:
        kind = finished.config["data"]["kind"]
        raise ValueError(
            f"{run} has learned {kind}, of which nothing new can be predicted; "
            "expected a run on text, series, speech, labelled sequences or music"
        )
    return {"sequences": len(frame), **_table(frame, output, folder)}


def _scored(path: str, level: str) -> str:
    """A file's text; for a model of bytes that of any file."""
    if level == "bytes":
        return read_bytes(path).decode("utf-8", "surrogateescape")
    return read_text(path)


def _table(
    frame: pd.DataFrame, output: str | Path | None, folder: Path
) -> dict[str, str]:
    path = Path(output or folder / "predictions.csv")
    try:
        frame.to_csv(path, index=False)
    except OSError as error:  # pandas' own have no strerror
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    return {"first": str(frame.iloc[0, 1]), "file": str(path)}
