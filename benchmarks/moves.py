"""How far the shipped controller may go from the range test's suggestion, and how far
that is from what plain SGD wants, on fresh tasks of meta-training's distribution.

    python benchmarks/moves.py                                # limits of the moves
    python benchmarks/moves.py --factors 1 3 5 8 16 32        # plain SGD
    python benchmarks/moves.py --factors 1 8 16 --cells rnn

Tasks are those of `--config controller_long`, without copying, which is learned or not
and decides about any mean. The first table has the loss below the prior's, by limit
(`Codec.reach`); the second, below that of the learned controller at the first of the
factors (`rangetest.SGD_FACTOR`), on budgets up to 400 k tokens.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlrnn import ledger, seeding
from rlrnn.agents.controller import load_controller
from rlrnn.cli import parse
from rlrnn.comparison import play
from rlrnn.control import Array, Controller, prior
from rlrnn.tasks import Task

TOGETHER = 12  # runs


def drawn(seed: int, count: int, **options: Any) -> list[Task]:
    config, _ = parse("tune", ["--config", "controller_long"])
    tasks = replace(config.tasks, **options)
    rng = np.random.default_rng(seeding.derive(seed, "evaluation tasks"))
    found: list[Task] = []
    while len(found) < count:
        task = tasks.draw(rng)
        if task.data.kind != "copy":
            found.append(task)
    return found


def limited(reach: float) -> Controller:
    controller = load_controller()
    return replace(controller, codec=replace(controller.codec, reach=reach))


def logs(tasks: Sequence[Task], controller: Controller) -> Array:
    """Log validation losses at the end [M]."""
    parts = [tasks[i : i + TOGETHER] for i in range(0, len(tasks), TOGETHER)]
    losses: Array = np.concatenate([play(some, controller).losses for some in parts])
    result: Array = np.log(losses)
    return result


def row(name: str, falls: Array) -> str:
    mean, worst = 1 - math.exp(-falls.mean()), 1 - math.exp(-falls.min())
    return f"| {name} | {mean:.2%} | {(falls > 0).mean():.0%} | {worst:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reaches", nargs="*", type=float, default=[2, 4, 8, 16])
    parser.add_argument("--factors", nargs="*", type=float, help="plain SGD instead")
    parser.add_argument("--cells", nargs="*", default=["lstm", "gru"])
    parser.add_argument("--tasks", type=int, help="default: 46, of plain SGD 24")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| | below | lower in | worst |\n|---|---|---|---|")
    if not options.factors:
        tasks = drawn(777, options.tasks or 46, cells=options.cells)
        base = logs(tasks, prior())
        for reach in [*options.reaches, math.inf]:
            print(row(f"limit {reach:g}", base - logs(tasks, limited(reach))))
        return
    wanted = {"optimizers": ["sgd"], "budget": [60_000, 400_000]}
    tasks = drawn(778, options.tasks or 24, cells=options.cells, **wanted)
    first: list[Array] = []
    for factor in options.factors:
        setattr(ledger, "SGD_FACTOR", factor)  # noqa: B010
        mine = logs(tasks, load_controller())
        first.append(mine)
        for name, losses in (("learned", mine), ("prior", logs(tasks, prior()))):
            print(row(f"{name}, times {factor:g}", first[0] - losses), flush=True)


if __name__ == "__main__":
    main()
