"""A budget in minutes: measured once, frozen, and then a budget in tokens."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rlrnn.cli import main, stored_config
from rlrnn.config import FitConfig, RunConfig
from rlrnn.control import Knobs, Signals
from rlrnn.costs import in_tokens, tokens_per_second
from rlrnn.data.chunks import Problem
from rlrnn.data.synthetic import markov_problem
from rlrnn.flows import fit, fit_task
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.tasks import DataConfig, Task, build_problem, build_trainer
from rlrnn.tracking import read_metrics
from rlrnn.training import Trainer

SPEED = 8_000.0  # tokens a second, of the clock here


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlrnn" / "speeds.json"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Time goes by as tokens are spent; the number of steps that were taken."""
    now, steps = [0.0], [0]
    step = Trainer.step

    def timed(self: Trainer, knobs: Knobs) -> Signals:
        before = self.spent
        signals = step(self, knobs)
        now[0] += (self.spent - before) / SPEED
        steps[0] += 1
        return signals

    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr("rlrnn.costs.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("rlrnn.costs.SECONDS", 0.5)
    return steps


def config(folder: Path, **training: Any) -> FitConfig:
    return FitConfig(
        data=DataConfig("markov", batch=4, size=20_000),
        model=ModelConfig("gru", hidden_size=8),
        training=TrainingConfig(decisions=6, **training),
        controller="prior",
        run=RunConfig(folder=str(folder), track="disabled"),
    )


@lru_cache
def problem(batch: int) -> Problem:
    return markov_problem(np.random.default_rng(0), 20_000, batch, 16, 8)


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rlrnn.tasks.markov_problem", lambda rng, size, batch, *rest: problem(batch)
    )


def speed(task: Task) -> float:
    return tokens_per_second(task, "cpu", build_problem(task))


def test_tokens_are_spent_in_the_time_that_was_measured(clock: list[int]) -> None:
    assert speed(fit_task(config(Path()))) == pytest.approx(SPEED, rel=1e-2)
    assert clock[0] >= 2  # what is compiled in the first is not timed


def test_a_speed_is_measured_once(clock: list[int], table: Path) -> None:
    task = fit_task(config(Path()))
    first, taken = speed(task), clock[0]
    assert speed(task) == first and clock[0] == taken
    # what the speed does not depend on
    assert speed(replace(task, seed=1)) == first and clock[0] == taken
    other = replace(task.training, budget=5.0, minutes=2.0, select="valid")
    assert speed(replace(task, training=other)) == first and clock[0] == taken
    (key,) = json.loads(table.read_text("utf-8"))
    assert json.loads(key)["model"]["hidden_size"] == 8


@pytest.mark.parametrize("change", ["model", "data", "training", "threads"])
def test_another_speed_is_measured_anew(change: str, table: Path) -> None:
    task = fit_task(config(Path()))
    speed(task)
    if change == "threads":
        torch.set_num_threads(2)
    others = {
        "model": replace(task, model=ModelConfig("gru", hidden_size=9)),
        "data": replace(task, data=replace(task.data, batch=5)),
        "training": replace(task, training=TrainingConfig(optimizer="sgd")),
    }
    try:
        speed(others.get(change, task))
    finally:
        torch.set_num_threads(1)
    assert len(json.loads(table.read_text("utf-8"))) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_table_is_made_anew(table: Path, content: str) -> None:
    table.parent.mkdir(parents=True)
    table.write_bytes(content.encode("utf-8", "surrogateescape"))
    speed(fit_task(config(Path())))
    assert len(json.loads(table.read_text("utf-8"))) == 1


def test_a_run_goes_on_where_no_table_can_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert speed(fit_task(config(Path()))) > 0
    assert "cannot keep the speed" in caplog.text


def test_minutes_are_tokens_in_the_run(
    tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(tmp_path / "run", minutes=0.04)
    fit(asked, progress=False)
    (measured,) = json.loads(table.read_text("utf-8")).values()
    budget = in_tokens(asked.training, measured).budget
    assert budget == round(60 * 0.04 * measured)
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text("utf-8"))
    assert stored["training"]["budget"] == budget
    assert stored["training"]["minutes"] is None
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["minutes"] == 0.04 and rows[0]["tokens_per_second"] == measured
    assert float(rows[-1]["tokens"] or 0) == pytest.approx(budget, rel=0.02)
    assert "0.04 minutes at " in capsys.readouterr().err
    # the same from the table, and in tokens from the run's own config
    fit(replace(asked, run=replace(asked.run, folder=str(tmp_path / "again"))))
    own = stored_config(str(tmp_path / "run"))
    place = RunConfig(folder=str(tmp_path / "own"), track="disabled")
    fit(replace(own, run=place), progress=False)
    metrics = [
        (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        for name in ("run", "again", "own")
    ]
    assert metrics[0] == metrics[1] and metrics[0][1:] == metrics[2][1:]


class Cut(Exception):
    """The power went."""


def test_a_resumed_run_keeps_its_tokens(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path / "run", minutes=0.04)
    whole = fit(replace(asked, run=replace(asked.run, folder=str(tmp_path / "whole"))))
    step = Trainer.step

    def cut(self: Trainer, knobs: Knobs) -> Signals:
        if self.decision == 3:
            raise Cut
        return step(self, knobs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", cut)
        with pytest.raises(Cut):
            fit(asked, progress=False)
    faster = {key: 2 * SPEED for key in json.loads(table.read_text("utf-8"))}
    table.write_text(json.dumps(faster), "utf-8")
    assert fit(asked, resume=tmp_path / "run")["tokens"] == whole["tokens"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--training.minutes=5", "--training.epochs=2"],
            "training.minutes is 5 and epochs is 2, expected one of them",
        ),
        (["--training.minutes=0"], "training.minutes is 0.0, expected a number above"),
    ],
)
def test_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["fit", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_trainer_takes_tokens() -> None:
    task = fit_task(config(Path(), minutes=1.0))
    with pytest.raises(ValueError, match="minutes is 1, expected a budget in tokens"):
        build_trainer(task)
