"""A budget in minutes, turned into tokens by a table of costs.

How many tokens a second this machine trains a model on is measured once, and kept in
a file of the cache folder. A run is then a function of its config and that number: its
own config has the tokens, so that it ends at the same token when it is resumed,
repeated, or played by another controller.
"""

import dataclasses
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrnn import __version__
from rlrnn.control import LR_BOUNDS, make_knobs
from rlrnn.data.chunks import Problem
from rlrnn.data.files import cache_folder
from rlrnn.device import resolve_device
from rlrnn.ledger import TrainingConfig
from rlrnn.tasks import Task, build_trainer
from rlrnn.training import Trainer

TRUNCATION = 16  # the prior's; shorter windows are slower, longer ones faster
WINDOWS = 16  # in an interval that is timed
SECONDS = 2.0  # of timing

log = logging.getLogger(__name__)


def in_tokens(
    training: TrainingConfig, tokens_per_second: float | int
) -> TrainingConfig:
    """The same training, its minutes as a budget in tokens."""
    assert training.minutes is not None
    budget = float(round(60 * training.minutes * tokens_per_second))
    return dataclasses.replace(training, budget=budget, minutes=None)


def tokens_per_second(task: Task, device: str, problem: Problem) -> float:
    """How fast this machine trains the task's model at K = 16, from the table. What is
    not there is measured, in some seconds, by a trainer of its own, and added."""
    table = cache_folder() / "speeds.json"
    known = _read(table)
    key = _key(task, device, problem)
    if key not in known:
        known[key] = float(f"{_measured(task, device, problem):.3g}")
        _write(table, known)
    return float(known[key])


def _key(task: Task, device: str, problem: Problem) -> str:
    """All that the speed depends on."""
    place = resolve_device(device)
    training = dataclasses.asdict(_timed(task.training))
    for name in ("budget", "clip", "weight_decay", "decisions"):
        del training[name]
    described = {
        "machine": _name(place),
        "threads": torch.get_num_threads() if place.type == "cpu" else None,
        "data": task.data.kind,
        "batch": problem.train.batch,
        "inputs": dataclasses.asdict(problem.inputs),
        "outputs": problem.objective.outputs,
        "model": dataclasses.asdict(task.model),
        "training": training,
        "K": TRUNCATION,
        "rlrnn": __version__,
    }
    return json.dumps(described)


def _name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor() or platform.machine()


def _timed(training: TrainingConfig) -> TrainingConfig:
    """Without what is outside the budget, or has nothing to do with it."""
    return dataclasses.replace(
        training, epochs=None, minutes=None, select="last", patience=None
    )


def _measured(task: Task, device: str, problem: Problem) -> float:
    """Tokens per second of decision intervals as `fit` plays them, with all that they
    do besides; weights and data are those of a trainer of its own."""
    trainer = _scratch(task, device, problem)
    rate = np.full(1, LR_BOUNDS[0])
    knobs = make_knobs(rate, rate, TRUNCATION)
    trainer.start()
    trainer.step(knobs)  # what is made once, compiled code above all, is not timed
    began, spent = time.perf_counter(), trainer.spent
    while not trainer.done and time.perf_counter() - began < SECONDS:
        trainer.step(knobs)
    return (trainer.spent - spent) / (time.perf_counter() - began)


def _scratch(task: Task, device: str, problem: Problem) -> Trainer:
    training = _timed(task.training)
    window = problem.train.typical(TRUNCATION) * problem.train.batch
    # beside the windows, an interval has its probe
    budget = 2 * WINDOWS * window / training.boundary(1)
    training = dataclasses.replace(training, budget=budget)
    timed = dataclasses.replace(task, training=training)
    return build_trainer(timed, device, problem=problem)


def _read(table: Path) -> dict[str, Any]:
    """Nothing where there is no table, or one that cannot be read."""
    try:
        found = json.loads(table.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(table: Path, known: dict[str, Any]) -> None:
    """A run goes on without a table: its config has the number of tokens."""
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        new = table.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        os.replace(new, table)
    except OSError as error:
        log.warning("cannot keep the speed in %s (%s)", table, error.strerror)
