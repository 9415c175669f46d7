"""What the range test suggests, against a grid of rates under the same prior schedule.

    python benchmarks/range_test.py

For each task: the best lambda of a grid of eight, the loss there, the lambda that the
range test suggests (nan: it could not tell, and the default is taken), and the loss of
the prior with it, its own cost included.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from rlrnn.control import prior
from rlrnn.flows import run_task
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.optimizers import Optimizer
from rlrnn.tasks import DataConfig, Task, build_trainer

TEXT = DataConfig(size=600_000, batch=16, half=1)
MARKOV = DataConfig("markov", size=200_000, batch=16, symbols=16, memory=6)
COPY = DataConfig("copy", size=300_000, batch=16, symbols=6, memory=6)


def task(
    data: DataConfig, hidden: int, cell: str, optimizer: Optimizer, budget: float
) -> Task:
    model = ModelConfig(cell, hidden)  # type: ignore[arg-type]
    return Task(data, model, TrainingConfig(budget, optimizer, decisions=24))


TASKS = (
    task(TEXT, 64, "lstm", "adam", 150e3),
    task(replace(TEXT, batch=32), 128, "gru", "adam", 300e3),
    task(MARKOV, 32, "lstm", "adam", 100e3),
    task(MARKOV, 64, "gru", "momentum", 150e3),
    task(TEXT, 64, "lstm", "momentum", 150e3),
    task(TEXT, 64, "rnn", "sgd", 150e3),
    task(COPY, 64, "gru", "adam", 150e3),
)


def loss_at(task: Task, rate: float) -> float:
    """Validation loss of the prior's schedule around a given lambda."""
    trainer = build_trainer(task)
    controller = prior()
    state = controller.init(1)
    signals = trainer.start()
    trainer.range_lr = rate
    signals = replace(signals, range_lr=np.array([rate]))
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)
    return trainer.score("valid")["nats"]


def main() -> None:
    torch.set_num_threads(1)
    print("| task | best lambda | its loss | suggested | prior's loss |")
    print("|---|---|---|---|---|")
    for one in TASKS:
        adaptive = one.training.power < 1
        low, high = (7.5e-5, 2.5e-2) if adaptive else (6e-4, 0.6)
        grid = np.geomspace(low, high, 8)
        losses = [loss_at(one, float(rate)) for rate in grid]
        best = int(np.argmin(losses))
        trainer = run_task(one, prior())
        loss = trainer.score("valid")["nats"]
        told = "nan" if math.isnan(trainer.range_lr) else f"{trainer.range_lr:.2g}"
        name = (
            f"{one.data.kind}, {one.model.cell} {one.model.hidden_size}, "
            f"{one.training.optimizer}"
        )
        print(
            f"| {name} | {grid[best]:.2g} | {losses[best]:.3f} | {told} | {loss:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
