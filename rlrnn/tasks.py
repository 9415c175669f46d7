"""A supervised task, from its description to a trainer; and tasks drawn at random."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from rlrnn import seeding
from rlrnn.checks import at_least, one_of
from rlrnn.data.chunks import Problem
from rlrnn.data.files import Paths
from rlrnn.data.labelled import LabelledOptions, labelled_problem
from rlrnn.data.music import MusicOptions, music_problem
from rlrnn.data.pixels import PixelsOptions, pixels_problem
from rlrnn.data.series import SeriesOptions, series_problem
from rlrnn.data.speech import SpeechOptions, speech_problem
from rlrnn.data.synthetic import (
    adding_problem,
    chords_problem,
    copy_problem,
    markov_problem,
    waves_problem,
)
from rlrnn.data.text import (
    Text,
    TextOptions,
    divide,
    open_text,
    standard_library,
    text_problem,
)
from rlrnn.device import resolve_device
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.optimizers import Optimizer
from rlrnn.recurrent import Cell
from rlrnn.training import Trainer

SIZE = 3_000_000  # symbols, where data.size does not say how many
Kind = Literal[
    "text",
    "series",
    "speech",
    "labelled",
    "music",
    "pixels",
    "markov",
    "chords",
    "waves",
    "copy",
    "adding",
]


@dataclass(frozen=True)
class DataConfig:
    """What is learned.

    Args:
        kind: text, series (forecasts), speech, labelled (sequences, each with a class
            or a number), music, pixels (images), or synthetic: markov, chords, waves,
            copy, adding.
        path: a file, a folder or a glob (`$RLRNN_DATA/...` is under that folder);
            without one, the text is the sources of the standard library.
        valid: the validation part, if it is not cut from path.
        test: the same, of the test part.
        split: shares of path that are training, validation and test part, in this
            order; without a test part, the validation part is tested on.
        batch: streams that are read side by side.
        text: what a symbol of a text is.
        size: symbols of a synthetic kind, characters that are read of a text; without
            it, all of path, and 3 million otherwise.
        skip: characters of a text to leave out before.
        series: what is forecast from what, in files of time series.
        half: of the standard library's modules, 0 or 1 (meta-training reads 1).
        symbols: of the synthetic kinds; of waves, the values of a step.
        memory: how many steps back a synthetic sequence reaches; of adding and waves,
            its steps.
        string: symbols that copy has to recall.
        shortest: the shortest memory that copy is trained on: delays are drawn between
            it and memory, short ones more often; without it, all are memory.
        labelled: how files of labelled sequences are read.
        speech: how recordings are read.
        music: how piano rolls are read.
        pixels: how images become sequences.
    """

    kind: Kind = "text"
    path: str | None = None
    valid: str | None = None
    test: str | None = None
    split: list[float] = field(default_factory=lambda: [0.9, 0.05, 0.05])
    batch: int = 32
    text: TextOptions = field(default_factory=TextOptions)
    size: int | None = None
    skip: int = 0
    series: SeriesOptions = field(default_factory=SeriesOptions)
    half: int = 0
    symbols: int = 16
    memory: int = 8
    string: int = 4
    shortest: int | None = None
    labelled: LabelledOptions = field(default_factory=LabelledOptions)
    speech: SpeechOptions = field(default_factory=SpeechOptions)
    music: MusicOptions = field(default_factory=MusicOptions)
    pixels: PixelsOptions = field(default_factory=PixelsOptions)

    def __post_init__(self) -> None:
        one_of("data.kind", self.kind, Kind)
        at_least("data.batch", self.batch, 1)
        if self.size is not None:
            at_least("data.size", self.size, 1)
        at_least("data.skip", self.skip, 0)
        at_least("data.symbols", self.symbols, 2)
        at_least("data.memory", self.memory, 2 if self.kind == "adding" else 1)
        at_least("data.string", self.string, 1)
        if self.shortest is not None and not 1 <= self.shortest <= self.memory:
            raise ValueError(
                f"data.shortest is {self.shortest}, expected 1 to data.memory "
                f"({self.memory})"
            )
        if self.half not in (0, 1):
            raise ValueError(f"data.half is {self.half}, expected 0 or 1")
        *needed, test = [float(share) for share in self.split] or [0.0]
        if (
            len(needed) != 2
            or min(needed) <= 0
            or test < 0
            or abs(sum(self.split) - 1) > 1e-6
        ):
            raise ValueError(
                f"data.split is {self.split}, expected the shares of training, "
                "validation and test part, which sum to 1 (that of the test part may "
                "be 0)"
            )
        if self.path is None and (self.valid or self.test):
            raise ValueError(
                "data.path is not set, but data.valid or data.test is; set data.path "
                "to the training part"
            )

    @property
    def paths(self) -> Paths:
        """Where the data lie. Raises ValueError without a path."""
        if self.path is None:
            raise ValueError(
                f"data.path is not set, expected the files of data.kind {self.kind}"
            )
        return Paths(self.path, self.valid, self.test)


@dataclass(frozen=True)
class Task:
    """One supervised run: data, model, training, and the seed of its weights."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 0

    @property
    def family(self) -> str:
        """Kind of data, cell and family of the optimiser, as `text-lstm-adam`."""
        optimizer = "adam" if self.training.power < 1 else "sgd"
        return f"{self.data.kind}-{self.model.cell}-{optimizer}"


def build_problem(task: Task, device: torch.device | None = None) -> Problem:
    """The task's data, on the CPU; what is computed from them, on `device`. Raises
    DataError if a file cannot be used."""
    data = task.data
    if data.kind == "text":
        return text_problem(_texts(data), data.batch, data.text)
    size, batch = data.size or SIZE, data.batch
    data_seed = seeding.derive(task.seed, "data")
    match data.kind:
        case "markov":
            rng = np.random.default_rng(data_seed)
            return markov_problem(rng, size, batch, data.symbols, data.memory)
        case "chords":
            rng = np.random.default_rng(data_seed)
            return chords_problem(rng, size, batch, data.symbols, data.memory)
        case "waves":
            rng = np.random.default_rng(data_seed)
            return waves_problem(rng, size, batch, data.symbols, data.memory)
        case "copy":
            rng = np.random.default_rng(data_seed)
            string = data.symbols, data.memory, data.string
            return copy_problem(rng, size, batch, *string, data.shortest)
        case "adding":
            return adding_problem(data_seed, size, batch, data.memory)
    common = data.paths, data.split, data.batch, task.seed
    match data.kind:
        case "series":
            return series_problem(*common, data.series)
        case "speech":
            return speech_problem(*common, data.speech, device)
        case "music":
            return music_problem(*common, data.music)
        case "pixels":
            return pixels_problem(*common, data.pixels)
        case _:
            return labelled_problem(*common, data.labelled)


def _texts(data: DataConfig) -> tuple[Text, Text, Text]:
    """Training, validation and test part."""
    level = data.text.level
    if data.path is None:
        library = standard_library(data.half)
        library = library[data.skip : data.skip + (data.size or SIZE)]
        text = Text.of(library, "the standard library", level)
        return divide(text, None, None, data.split)
    valid = None if data.valid is None else open_text(data.valid, level)
    test = None if data.test is None else open_text(data.test, level)
    text = open_text(data.path, level, data.skip, data.size)
    return divide(text, valid, test, data.split)


def build_trainer(
    task: Task,
    device: str = "cpu",
    prepare: Callable[[SequenceModel, Problem], object] = lambda model, problem: None,
    problem: Problem | None = None,
) -> Trainer:
    """A trainer that has not started, with everything on `device`. `prepare` sees the
    fresh model before; `problem` is the task's own, where it has been built already."""
    place = resolve_device(device)
    problem = (problem or build_problem(task, place)).to(place)
    network = build_model(problem, task.model, task.seed)
    prepare(network, problem)
    seed = seeding.derive(task.seed, "dropout")
    return Trainer(network.to(place), problem, task.training, seed)


def build_model(problem: Problem, config: ModelConfig, seed: int) -> SequenceModel:
    """A model with fresh weights, on the CPU."""
    with seeding.initialising(seed, "model"):
        model = SequenceModel(problem.inputs, problem.objective.outputs, config)
    if problem.bias is not None:
        with torch.no_grad():
            model.head.bias.copy_(problem.bias)
    return model


@dataclass(frozen=True)
class Tasks:
    """A distribution of small tasks, for a controller to learn on.

    Each list is drawn from uniformly; budgets log-uniformly between their ends.

    Args:
        kinds: of data.
        cells: of models.
        hidden_sizes: of models.
        optimizers: of trainings.
        batches: numbers of streams.
        budget: the least and the greatest, in tokens.
        decisions: of a run.
    """

    kinds: list[Kind] = field(default_factory=lambda: ["text", "text", "markov"])
    cells: list[Cell] = field(default_factory=lambda: ["lstm", "gru"])
    hidden_sizes: list[int] = field(default_factory=lambda: [32, 64, 128])
    optimizers: list[Optimizer] = field(
        default_factory=lambda: ["adam", "adam", "momentum"]
    )
    batches: list[int] = field(default_factory=lambda: [16, 32])
    budget: tuple[float, float] = (60_000.0, 200_000.0)
    decisions: int = 24

    def __post_init__(self) -> None:
        for name in ("kinds", "cells", "hidden_sizes", "optimizers", "batches"):
            if not getattr(self, name):
                raise ValueError(f"tasks.{name} is empty, expected at least one")
        low, high = self.budget
        if not 1 <= low <= high:
            raise ValueError(
                f"tasks.budget is {list(self.budget)}, expected [least, greatest]"
            )

    def draw(self, rng: np.random.Generator) -> Task:
        """One task."""

        def pick(name: str) -> int:
            return int(rng.integers(len(getattr(self, name))))

        kind = self.kinds[pick("kinds")]
        batch = self.batches[pick("batches")]
        low, high = self.budget
        budget = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        # Long enough that no run reads much of it twice
        if kind == "text":
            size = max(300_000, int(budget))
            skip = int(rng.integers(2_000_000))
            data = DataConfig(batch=batch, half=1, size=size, skip=skip)
        else:
            # what is forecast, or played, is mostly little, and read several times
            passes = 4 if kind in ("chords", "waves") else 1
            data = DataConfig(
                kind,
                batch=batch,
                size=max(150_000 // passes, int(budget) // passes),
                symbols=int(rng.integers(6, 25)),
                # longer strings are not learned in such budgets
                memory=int(2 ** rng.uniform(1, 3.3 if kind == "copy" else 4.5)),
            )
        return Task(
            data,
            ModelConfig(
                self.cells[pick("cells")], self.hidden_sizes[pick("hidden_sizes")]
            ),
            TrainingConfig(
                budget,
                optimizer=self.optimizers[pick("optimizers")],
                decisions=self.decisions,
            ),
            seed=int(rng.integers(2**31)),
        )
