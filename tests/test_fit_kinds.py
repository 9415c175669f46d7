"""`fit` under the shipped controller: any kind of data, cell, optimiser and size."""

import gzip
import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from rlrnn.config import FitConfig, RunConfig
from rlrnn.data.series import SeriesOptions
from rlrnn.data.speech import SpeechOptions
from rlrnn.explain import explain
from rlrnn.flows import fit
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.optimizers import Optimizer
from rlrnn.recurrent import Cell
from rlrnn.tasks import DataConfig, Kind
from rlrnn.tracking import read_metrics

CELLS: list[Cell] = ["rnn", "gru", "lstm", "mingru"]
OPTIMIZERS: list[Optimizer] = ["sgd", "momentum", "adam", "adamw"]
RNG = np.random.default_rng(0)


def text(folder: Path) -> DataConfig:
    words = RNG.choice(["eins", "zwei", "drei", "vier"], 2000)
    (folder / "a.txt").write_text(" ".join(words), "utf-8")
    return DataConfig(path=str(folder / "a.txt"), batch=4)


def series(folder: Path) -> DataConfig:
    t = np.arange(600)
    values = 50 + 5 * np.sin(t * 2 * np.pi / 24) + RNG.normal(size=600)
    hours = np.datetime64("2020-01-01T00") + t.astype("timedelta64[h]")
    lines = [f"{h},{v:.3f}" for h, v in zip(hours, values, strict=True)]
    (folder / "a.csv").write_text("\n".join(["date,v", *lines]) + "\n", "utf-8")
    options = SeriesOptions(lookback=8, horizon=4, patch=2)
    return DataConfig("series", path=str(folder / "a.csv"), batch=8, series=options)


def density(folder: Path) -> DataConfig:
    """Its loss may be negative."""
    data = series(folder)
    return replace(data, series=replace(data.series, loss="normal"))


def labelled(folder: Path) -> DataConfig:
    rows = ["id,v,label"]
    for i in range(60):
        values = RNG.normal(3 if i % 2 else -3, 1, RNG.integers(6, 12))
        rows += [f"s{i},{v:.3f},{'ab'[i % 2]}" for v in values]
    (folder / "a.csv").write_text("\n".join(rows) + "\n", "utf-8")
    data = DataConfig("labelled", path=str(folder / "a.csv"), batch=8)
    return replace(data, labelled=replace(data.labelled, id="id"))


def music(folder: Path) -> DataConfig:
    def pieces(count: int) -> list[list[list[int]]]:
        """Chords of three keys that go up."""
        begins = RNG.integers(40, 60, count)
        return [[[int(b + t + k) for k in (0, 4, 7)] for t in range(9)] for b in begins]

    parts = {"train": pieces(40), "valid": pieces(8), "test": pieces(8)}
    (folder / "a.json").write_text(json.dumps(parts), "utf-8")
    return DataConfig("music", path=str(folder / "a.json"), batch=4)


def pixels(folder: Path) -> DataConfig:
    labels = (np.arange(60) % 3).astype(np.uint8)
    images = RNG.integers(0, 50, (60, 4, 5), dtype=np.uint8)
    images += (60 * labels)[:, None, None]
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim])
        raw = head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        (folder / f"some-{name}-ubyte.gz").write_bytes(gzip.compress(raw))
    path = str(folder / "some-images-idx3-ubyte.gz")
    return DataConfig("pixels", path=path, batch=8)


def speech(folder: Path) -> DataConfig:
    soundfile = pytest.importorskip("soundfile")
    for index in range(30):
        label = index % 2
        t = np.arange(800) / 8000
        wave = 0.5 * np.sin(2 * np.pi * (500 + 1000 * label + 10 * index) * t)
        file = io.BytesIO()
        soundfile.write(file, wave.astype(np.float32), 8000, format="WAV")
        (folder / f"{label}_ann_{index}.wav").write_bytes(file.getvalue())
    options = SpeechOptions(pattern="{label}_{speaker}_{index}", rate=8000)
    return DataConfig("speech", path=str(folder), batch=4, speech=options)


def synthetic(kind: Kind) -> Callable[[Path], DataConfig]:
    return lambda folder: DataConfig(
        kind, batch=4, size=20_000, symbols=4, memory=6, string=2
    )


DATA: dict[str, Callable[[Path], DataConfig]] = {
    "text": text,
    "markov": synthetic("markov"),
    "chords": synthetic("chords"),
    "waves": synthetic("waves"),
    "copy": synthetic("copy"),
    "adding": synthetic("adding"),
    "series": series,
    "density": density,
    "labelled": labelled,
    "music": music,
    "pixels": pixels,
    "speech": speech,
}
# All pairs of a cell and an optimiser, the kinds of data in turn.
PAIRS = list(product(CELLS, OPTIMIZERS))
CASES = [(list(DATA)[i % len(DATA)], *pair) for i, pair in enumerate(PAIRS)]


def test_all_of_them_are_here() -> None:
    assert set(CELLS) == set(get_args(Cell))
    rivals = {"schedulefree", "prodigy"}
    assert set(OPTIMIZERS) | rivals == set(get_args(Optimizer))
    assert {*DATA} - {"density"} == set(get_args(Kind))


@pytest.mark.filterwarnings("error::RuntimeWarning")  # log 0, above all
@pytest.mark.parametrize(("name", "cell", "optimizer"), CASES)
def test_any_of_them(
    tmp_path: Path, name: str, cell: Cell, optimizer: Optimizer
) -> None:
    (tmp_path / "data").mkdir()
    data = DATA[name](tmp_path / "data")
    layers = 1 + CELLS.index(cell) % 2
    config = FitConfig(
        data=data,
        model=ModelConfig(cell, 8 * layers, layers),
        training=TrainingConfig(7_000.0, optimizer, decisions=6),
        run=RunConfig(folder=str(tmp_path / "run"), track="disabled"),
    )
    assert config.controller == "learned"
    found = fit(config, progress=False)
    first, *rows = read_metrics(tmp_path / "run")
    assert not found["failed"] and [row["decision"] for row in rows] == [*range(1, 7)]
    assert found["tokens"] == pytest.approx(7_000, rel=0.1)
    for row in rows:
        for key in ("fit/probe_loss", "decision/lr", "decision/reward"):
            assert math.isfinite(float(row[key] or 0)), key
    last: Any = rows[-1]["fit/probe_loss"]
    begun: Any = first["fit/probe_loss"]
    assert last < begun
    assert explain(tmp_path / "run").is_file()
