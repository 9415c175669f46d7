"""What a controller costs beside the training that it steers: `fit` from within.

    python benchmarks/overhead.py

Three runs of the same windows at the same rates, one after another in turns: *learned*,
under the shipped controller; *replayed*, its knobs read from a list; *bare*, without
signals, snapshots for recovery or a controller: windows, updates and the probe, and
one read of the losses per interval. The range test, probes and rolled-back intervals
are charged to the budget of any run and lie outside of the clock or in all three.
Medians of the seconds, and of their ratios within a turn.
"""

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from rlrnn.control import Controller, Knobs, Signals
from rlrnn.flows import make_controller
from rlrnn.ledger import Measured, TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.recurrent import Cell
from rlrnn.tasks import DataConfig, Task, build_trainer
from rlrnn.training import Trainer

SIZES: tuple[tuple[Cell, int, float], ...] = (
    ("lstm", 64, 600_000),
    ("gru", 128, 600_000),
    ("lstm", 256, 600_000),
)


def task(cell: Cell, hidden: int, budget: float) -> Task:
    data = DataConfig(size=1_000_000, batch=16)
    return Task(data, ModelConfig(cell, hidden), TrainingConfig(budget))


def steered(trainer: Trainer, controller: Controller) -> tuple[list[Knobs], float]:
    """The knobs of a run, and its seconds after the first signals."""
    signals, state = trainer.start(controller.range_test), controller.init(1)
    chosen = []
    began = time.perf_counter()
    while not trainer.done:
        knobs, state = controller(signals, state)
        chosen.append(knobs)
        signals = trainer.step(knobs)
    return chosen, time.perf_counter() - began


def replayed(trainer: Trainer, knobs: list[Knobs]) -> float:
    trainer.start(range_test=True)
    began = time.perf_counter()
    for chosen in knobs:
        trainer.step(chosen)
    return time.perf_counter() - began


def bare(trainer: Trainer, knobs: list[Knobs]) -> float:
    trainer.start(range_test=True)
    began = time.perf_counter()
    for chosen in knobs:
        _bare_step(trainer, chosen)
    return time.perf_counter() - began


def _bare_step(trainer: Trainer, knobs: Knobs) -> Signals:
    interval = trainer.plan(knobs)
    losses = []
    for steps, rate in zip(interval.spans, interval.rates, strict=True):
        chunk = trainer.next_chunk(steps)
        if trainer.fast is None:
            trainer.optimizer.param_groups[0]["lr"] = float(rate)
            trainer.optimizer.zero_grad(set_to_none=True)
            losses.append(trainer._gradient(chunk, interval.truncation))
            trainer._update(steps)
        else:
            given = chunk, trainer.hidden, float(rate), trainer.config.clip
            done = trainer.fast.window(*given, watch=False, keep=False)
            trainer.hidden = done.state[0]
            losses.append(done.loss[0])
    read = torch.stack([trainer._probe(), *losses]).double().cpu().numpy()
    due = np.ones(len(losses))
    return trainer.settle(interval, Measured(read[0], read[1:], due, due, {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | tokens | bare, s | replayed / bare | learned / bare | range |")
    print("|---|---|---|---|---|---|")
    for cell, hidden, budget in SIZES:
        one = task(cell, hidden, budget)
        rows = []
        for turn in range(options.turns + 1):
            now = replace(one, seed=turn)
            knobs, learned = steered(build_trainer(now), make_controller("learned"))
            again = replayed(build_trainer(now), knobs)
            least = bare(build_trainer(now), knobs)
            if turn:  # the first one compiles
                rows.append((least, again / least, learned / least))
        seconds, second, third = (statistics.median(c) for c in zip(*rows, strict=True))
        ratios = [row[2] for row in rows]
        print(
            f"| {cell} {hidden} | {budget:,.0f} | {seconds:.2f} | {second:.3f} "
            f"| {third:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
