"""Which memory learns what: cells on POPGym's tasks and the diagnostics, one recipe.

    python benchmarks/memory_suite.py --jobs 2
    python benchmarks/memory_suite.py --ids Easy TMaze --cells lstm none --seeds 0

`none` is the control: the same networks without recurrence. The recipe is fixed for all
tasks and cells (`RECIPE`; observations that are numbers are normalised, and rewards
then, too). It was chosen with gru and seed 0, which is not among the seeds below, on
eight Easy tasks and up to 400 k steps. As in the POPGym paper (Morad et al. 2023) the
figure is MMER: the highest mean return in training (of the last 100 episodes, after
each rollout), averaged over seeds. The first tenth of the steps does not count: the
first episodes to end are the short ones. Normalised, 0 is the mean return of random
actions (of 256 episodes) and 1 the best that the task's docstring states, or else 1.

A run that is in the folder, with as many steps, is not repeated: stop at any time and
start again. Table and plot are made of all the runs of that length that are there.
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from rlrnn.config import AgentConfig
from rlrnn.envs.tensor import TensorVectorEnv
from rlrnn.flows import make_envs
from rlrnn.play import families, stated
from rlrnn.running import make_agent

CELLS = ("lstm", "gru", "rnn", "mingru", "none")
ENVS = 32
RECIPE = AgentConfig(
    hidden_size=64,
    net_arch=[64],
    learning_rate=2e-3,  # annealed to zero
    n_steps=64,
    batch_size=512,  # 8 whole columns
    n_epochs=4,
    gamma=0.95,
    ent_coef=0.003,
)


class Job(NamedTuple):
    id: str
    cell: str
    seed: int
    steps: int

    @property
    def file(self) -> str:
        return f"{short(self.id)}-{self.cell}-{self.seed}-{self.steps}.json"


def short(id: str) -> str:
    return id.removeprefix("rlrnn/").removesuffix("-v0")


def suite(wanted: list[str]) -> dict[str, float]:
    """The ids that hold one of `wanted` (all without), and the best return of each."""
    found = {}
    for kind, ids in families().items():
        for id in ids:
            if not wanted or any(word in id for word in wanted):
                level = short(id).removeprefix(kind.__name__).lower()
                best = stated(kind, level)[0]
                number = best.replace(".", "", 1).isdigit()
                found[id] = float(best) if number else 1.0
    return found


class Curve(BaseCallback):
    """Mean return of the last 100 training episodes, after each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if episodes := self.model.ep_info_buffer:
            mean = float(np.mean([episode["r"] for episode in episodes]))
            self.rows.append((self.num_timesteps, mean))


def run(job: Job, folder: Path, device: str) -> tuple[Job, dict[str, Any]]:
    torch.set_num_threads(1)
    env = make_envs(job.id, ENVS, device, job.seed)
    numbers = isinstance(env.observation_space, Box)
    recipe = replace(RECIPE, cell=job.cell, normalize=numbers)  # type: ignore[arg-type]
    agent = make_agent(recipe, env, job.seed, device)
    curve, began = Curve(), time.perf_counter()
    agent.learn(job.steps, callback=curve, log_interval=10**9)
    returns = [mean for step, mean in curve.rows if step >= job.steps / 10]
    result = {
        "mmer": max(returns, default=None),  # None: no episode has ended
        "last": returns[-1] if returns else None,
        "seconds": time.perf_counter() - began,
        "curve": curve.rows,
    }
    write(folder / job.file, result)
    return job, result


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole, or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result))
    part.replace(path)


def by_chance(id: str, folder: Path) -> float:
    """The mean return of random actions, over the first episodes of 256 copies."""
    path = folder / f"{short(id)}-random.json"
    if not path.exists():
        env: Any = make_envs(id, 256, "cpu").unwrapped
        vector: TensorVectorEnv = env.env
        vector.reset(seed=0)
        vector.action_space.seed(0)
        returns = torch.full((256,), torch.nan)
        while bool(returns.isnan().any()):
            actions: Tensor = torch.as_tensor(vector.action_space.sample())
            *_, terminated, truncated, infos = vector.step(actions)
            first = (terminated | truncated) & returns.isnan()
            returns = torch.where(first, infos["episode_return"], returns)
        write(path, {"mean": float(returns.mean())})
    return float(json.loads(path.read_text())["mean"])


def table(
    bests: dict[str, float],
    chances: dict[str, float],
    results: dict[tuple[str, str], list[float]],
) -> tuple[str, dict[str, dict[str, float]]]:
    """The table, and for each id and cell the mean normalised return."""
    cells = [cell for cell in CELLS if any(key[1] == cell for key in results)]
    lines = [
        f"| task | random | {' | '.join(cells)} | best |",
        f"|---|---|{'---|' * len(cells)}---|",
    ]
    normalised: dict[str, dict[str, float]] = {}
    for id, best in bests.items():
        row = [f"{chances[id]:.3f}"]
        for cell in cells:
            if some := results.get((id, cell)):
                mean, spread = float(np.mean(some)), float(np.std(some))
                row.append(f"{mean:.3f} ± {spread:.3f} ({len(some)})")
                share = (mean - chances[id]) / (best - chances[id])
                normalised.setdefault(id, {})[cell] = share
            else:
                row.append("-")
        lines.append(f"| {short(id)} | {' | '.join(row)} | {best:g} |")
    # Over the tasks that all cells have, so that the means can be compared
    whole = [row for row in normalised.values() if len(row) == len(cells)]
    means = [f"{np.mean([r[c] for r in whole]):.3f}" if whole else "-" for c in cells]
    lines.append(
        f"| mean, normalised, of {len(whole)} tasks | 0 | {' | '.join(means)} | 1 |"
    )
    return "\n".join(lines), normalised


def plot(normalised: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    ids = list(reversed(normalised))
    cells = [cell for cell in CELLS if any(cell in normalised[id] for id in ids)]
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(ids)), layout="constrained")
    axis = figure.subplots()
    for i, cell in enumerate(cells):
        rows = [
            (k, normalised[id][cell])
            for k, id in enumerate(ids)
            if cell in normalised[id]
        ]
        if rows:
            y, x = zip(*rows, strict=True)
            axis.plot(
                x,
                np.array(y) + 0.15 * ((len(cells) - 1) / 2 - i),
                "o",
                ms=4,
                label=cell,
            )
    axis.set_yticks(range(len(ids)), [short(id) for id in ids], fontsize=7)
    axis.axvline(0, color="grey", lw=0.5)
    axis.axvline(1, color="grey", lw=0.5)
    axis.set_xlabel("normalised MMER: 0 random, 1 best")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", nargs="*", default=[], help="parts of ids")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=CELLS)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/memory_suite"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bests = suite(options.ids)
    if not bests:
        parser.error(f"--ids {' '.join(options.ids)}: no task has that in its id")
    jobs = [
        Job(id, cell, seed, options.steps)
        for seed in options.seeds
        for id in bests
        for cell in options.cells
    ]
    due = [job for job in jobs if not (options.out / job.file).exists()]
    print(f"{len(jobs)} runs, {len(jobs) - len(due)} of them done before", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        futures = [pool.submit(run, job, options.out, options.device) for job in due]
        for future in as_completed(futures):
            job, result = future.result()
            mmer = "-" if result["mmer"] is None else f"{result['mmer']:.3f}"
            print(
                f"{short(job.id)}, {job.cell}, seed {job.seed}: MMER {mmer} in "
                f"{result['seconds']:.0f} s",
                flush=True,
            )
    results: dict[tuple[str, str], list[float]] = {}
    for id in bests:
        for cell in CELLS:
            for path in sorted(options.out.glob(f"{short(id)}-{cell}-*.json")):
                if path.stem.endswith(f"-{options.steps}"):
                    mmer = json.loads(path.read_text())["mmer"]
                    if mmer is not None:
                        results.setdefault((id, cell), []).append(mmer)
    chances = {id: by_chance(id, options.out) for id in bests}
    text, normalised = table(bests, chances, results)
    print(f"\nMMER, mean ± standard deviation (seeds), {options.steps:,} steps\n{text}")
    plot(normalised, options.out / "memory_suite.png")
    print(f"plot: {options.out / 'memory_suite.png'}")


if __name__ == "__main__":
    main()
