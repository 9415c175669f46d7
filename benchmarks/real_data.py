"""The shipped controller on real data at real size, beside a hand grid of 12 runs.

    RLRNN_DATA=… python benchmarks/real_data.py              # two hours on one core
    RLRNN_DATA=… python benchmarks/real_data.py --tasks tinyshakespeare

What a careful user would try: on texts four rates by three truncations, each with
warm-up and a cosine; where a window is whole sequences, six rates, constant and with a
cosine. The run with the lowest validation loss is chosen. `learned` and `prior` are one
untuned run each. All have the same budget, the first weights and the order of the data
of one seed.

A run that is in the folder is not repeated; the table is of all that are there.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from rlrnn.cli import parse
from rlrnn.config import FitConfig
from rlrnn.control import Controller
from rlrnn.evaluation import mean_loss
from rlrnn.flows import fit_task, make_controller, run_task
from rlrnn.ledger import GIVE_UP
from rlrnn.search import SCHEDULES, Settings
from rlrnn.training import Trainer

TEXT = "--config text_lstm --data.text.level characters --data.path $RLRNN_DATA/"
DICKENS = "gutenberg_dickens/"
TASKS = {
    "tinyshakespeare": f"{TEXT}tinyshakespeare/input.txt --model.hidden_size 256"
    " --training.budget 2e6",
    "Dickens": f"{TEXT}{DICKENS}train.txt.gz --model.hidden_size 256"
    f" --data.valid $RLRNN_DATA/{DICKENS}valid.txt.gz"
    f" --data.test $RLRNN_DATA/{DICKENS}test.txt.gz --training.budget 2e6",
    "ETTh1": "--config etth1 --training.epochs 3",
    "spoken digits": "--config spoken_digits",
    "JSB chorales": "--config jsb_chorales --training.epochs 8",
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TRUNCATIONS = (16, 64, 128)
MORE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def grid(config: FitConfig) -> list[Settings]:
    if config.data.kind == "text":
        return [Settings(lr, k, "cosine") for k in TRUNCATIONS for lr in RATES]
    k = config.truncation
    return [Settings(lr, k, schedule) for schedule in SCHEDULES for lr in MORE_RATES]


def arms(config: FitConfig) -> dict[str, Controller]:
    named = {name: make_controller(name) for name in ("learned", "prior")}
    for settings in grid(config):
        name = f"{settings.schedule} {settings.lr:g}, K={settings.truncation}"
        named[name] = settings.controller()
    return named


def run(config: FitConfig, controller: Controller) -> dict[str, Any]:
    began = time.perf_counter()
    trainer = run_task(fit_task(config), controller)
    seconds = time.perf_counter() - began
    losses = {split: loss(trainer, split) for split in ("valid", "test")}
    return {**losses, "given_up": trainer.failures >= GIVE_UP, "seconds": seconds}


def loss(trainer: Trainer, split: str) -> float:
    problem = trainer.problem
    part = getattr(problem, split)
    with trainer.kept_weights():
        return float(mean_loss(trainer.model, problem.objective, part, part.length))


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| task | learned | prior | best of 12 | median of 12 | learned / best |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        mine = {r["arm"]: r for r in records if r["task"] == task}
        hand = [r for arm, r in mine.items() if arm not in ("learned", "prior")]
        if len(hand) < 12 or not {"learned", "prior"} <= set(mine):
            continue
        best = min(hand, key=lambda r: r["valid"])
        learned, prior = mine["learned"]["test"], mine["prior"]["test"]
        middle = statistics.median(r["test"] for r in hand)
        lines.append(
            f"| {task} | {learned:.4f} | {prior:.4f} | {best['test']:.4f} "
            f"({best['arm']}) | {middle:.4f} | {learned / best['test']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/real_data"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"seed_{options.seed}.jsonl"
    records = []
    if file.exists():
        records = [json.loads(line) for line in file.read_text().splitlines()]
    done = {(record["task"], record["arm"]) for record in records}
    for task in options.tasks:
        config, _ = parse("fit", [*TASKS[task].split(), "--seed", str(options.seed)])
        for arm, controller in arms(config).items():
            if (task, arm) in done:
                continue
            record = {"task": task, "arm": arm, **run(config, controller)}
            records.append(record)
            with file.open("a") as out:
                out.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
    print(f"\nTest loss of one seed\n{table(records)}")


if __name__ == "__main__":
    main()
