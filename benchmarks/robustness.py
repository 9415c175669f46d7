"""How often a run under the shipped controller goes wrong, on tasks of all sorts.

    python benchmarks/robustness.py                    # 200 runs, some minutes
    python benchmarks/robustness.py --runs 1000 --controller prior

Tasks are drawn from a wider distribution than that of meta-training: plain SGD and
AdamW, plain RNNs, 16 to 128 units, 8 to 64 streams, 100 k to 600 k tokens. A run has
*given up* when the safety net has rolled it back three times in a row; it has
*diverged* when its last probe loss is above its first one, or no number. *Worse at the
end* are runs that lost a tenth of what they had won, if that is more than 2 % of the
first loss. All are counted after the safety net has done what it can: *rolled back*
says in how many runs it did.
"""

import argparse
import time

import numpy as np
import torch

from rlrnn.flows import make_controller
from rlrnn.population import play_all
from rlrnn.tasks import Task, Tasks, build_trainer

WIDE = Tasks(
    kinds=["text", "text", "markov", "copy"],
    cells=["lstm", "gru", "rnn"],
    hidden_sizes=[16, 32, 64, 128],
    optimizers=["sgd", "momentum", "adam", "adamw"],
    batches=[8, 16, 32, 64],
    budget=(100_000, 600_000),
)
TOGETHER = 40  # runs
WRONG = ("rolled back", "given up", "diverged", "worse at the end")


def described(task: Task) -> str:
    training, model = task.training, task.model
    return (
        f"{task.data.kind}, {model.cell} of {model.hidden_size}, {training.optimizer}, "
        f"{task.data.batch} streams, {training.budget:,.0f} tokens, seed {task.seed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--controller", default="learned", help="as of rlrnn fit")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    tasks = [WIDE.draw(rng) for _ in range(options.runs)]
    counts = dict.fromkeys(WRONG, 0)
    began = time.perf_counter()
    for first in range(0, len(tasks), TOGETHER):
        some = tasks[first : first + TOGETHER]
        trainers = [build_trainer(task) for task in some]
        controllers = [make_controller(options.controller) for _ in some]
        for task, told in zip(some, play_all(trainers, controllers), strict=True):
            probes = np.array([signals.probe_loss[0] for signals in told])
            won = probes[0] - probes.min()
            wrong = {
                "rolled back": any(signals.recovered[0] for signals in told),
                "given up": bool(told[-1].failed[0]),
                "diverged": not probes[-1] <= probes[0],
                "worse at the end": not probes[-1] - probes.min()
                <= max(won / 10, 0.02 * probes[0]),
            }
            for name, is_so in wrong.items():
                counts[name] += is_so
                if is_so and name != "rolled back":
                    print(f"{name}: {described(task)}", np.round(probes, 3), flush=True)
    print(
        f"{len(tasks)} runs under {options.controller}: "
        + ", ".join(f"{count} {name}" for name, count in counts.items())
        + f" ({time.perf_counter() - began:.0f} s)"
    )


if __name__ == "__main__":
    main()
