"""A controller against the prior, the policy that never moves, on the same tasks.

Shapes: M tasks, D decisions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rlrnn import seeding
from rlrnn.control import SOLVED, Array, Controller, prior
from rlrnn.population import Population
from rlrnn.search import held_out
from rlrnn.statistics import bootstrap_interval
from rlrnn.tasks import Task, Tasks, build_trainer

FEW = 5  # tasks, below which an interval says nothing


@dataclass(frozen=True)
class Played:
    """What became of tasks under a controller: mean validation losses at the end [M],
    and, over each run, the rate, K and the probe loss [D + 1, M]."""

    losses: Array
    lr: Array
    truncation: Array
    probe_loss: Array


def play(
    tasks: Sequence[Task],
    controller: Controller,
    device: str = "cpu",
    stopped: Callable[[], int] = lambda: 0,
) -> Played:
    """Plays the tasks side by side, to the end or until `stopped` says so."""
    trainers = [build_trainer(task, device) for task in tasks]
    population, state = Population(trainers), controller.init(len(trainers))
    told = [population.start(controller.range_test)]
    while not population.done.all() and not stopped():
        knobs, state = controller(told[-1], state)
        told.append(population.step(knobs))
    population.sync()
    losses = np.array([held_out(trainer) for trainer in trainers])
    traces = ("lr", "truncation", "probe_loss")
    return Played(losses, *(np.stack([vars(s)[name] for s in told]) for name in traces))


def falls_below(mine: Played, its: Played) -> Array:
    """log(prior's loss / controller's) [M]; a loss of a solved task counts as `SOLVED`
    of its first one."""
    floor = SOLVED * its.probe_loss[0]
    falls: Array = np.log(
        np.maximum(its.losses, floor) / np.maximum(mine.losses, floor)
    )
    return falls


def gain(falls: Array) -> dict[str, float]:
    """Of log(prior's loss / controller's) of tasks [M]: by which share of it the loss
    is lower (the geometric mean), its standard error and 95 % interval (bootstrap), and
    how often it is."""
    below, count = 1 - math.exp(-falls.mean()), len(falls)
    told = {"loss_below_prior": below, "share_below_prior": float((falls > 0).mean())}
    if count > 1:
        error = falls.std(ddof=1) / math.sqrt(count)
        told["loss_below_prior_error"] = float((1 - below) * error)
    if count >= FEW:
        low, high = bootstrap_interval(falls[:, None], lambda x: float(x.mean()))
        told["loss_below_prior_low"] = 1 - math.exp(-low)
        told["loss_below_prior_high"] = 1 - math.exp(-high)
    return told


def by_family(tasks: Sequence[Task], falls: Array) -> dict[str, Array]:
    """The falls of each family of tasks."""
    families = np.array([task.family for task in tasks])
    return {str(name): falls[families == name] for name in np.unique(families)}


def compare_with_prior(
    controller: Controller,
    tasks: Tasks,
    count: int,
    seed: int,
    device: str = "cpu",
    progress: bool = False,
    stopped: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Validation losses under `controller` and under the prior, on `count` tasks that
    were drawn for this alone: the `gain`, and that in each family. Nothing once
    `stopped` says so."""
    rng = np.random.default_rng(seeding.derive(seed, "evaluation tasks"))
    drawn = [tasks.draw(rng) for _ in range(count)]
    falls = np.zeros(0)
    hide = None if progress else True  # None: not on a terminal
    with tqdm(total=count, desc="compare with the prior", disable=hide) as bar:
        while len(falls) < count and not stopped():
            some = drawn[len(falls) : len(falls) + 16]
            mine, its = (
                play(some, player, device, stopped) for player in (controller, prior())
            )
            falls = np.concatenate([falls, falls_below(mine, its)])
            bar.update(len(some))
    if not count or stopped():
        return {}
    families = by_family(drawn, falls)
    return {
        "eval_tasks": count,
        **{f"eval_{name}": value for name, value in gain(falls).items()},
        "families": {
            name: {"tasks": len(part), **gain(part)} for name, part in families.items()
        },
    }
