"""What agents learn: return after a number of steps, and steps to a threshold.

    python benchmarks/agent_learning.py --agents rlrnn memoryless
    python benchmarks/agent_learning.py --agents sb3-contrib --seeds 0 1

`rlrnn` is the shipped recipe of the task, and once more on the environment that others
play, where ours is tensor-native; `memoryless` the same recipe without recurrence;
`sb3-contrib` its RecurrentPPO on the same environment with one recipe for all tasks: 8
environments × 128 steps, 128 units, 4 epochs, minibatches of 256. One thread each. A
run that is in the folder is not repeated; table and curves are made of all that are.

Return: of 50 episodes after training, likeliest actions. Steps: until the mean of the
last 100 training episodes reaches the threshold; its seconds are the run's own.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

import rlrnn  # noqa: F401  registers the ids
from rlrnn.cli import load_config
from rlrnn.config import TrainConfig
from rlrnn.flows import make_envs
from rlrnn.running import make_agent
from rlrnn.statistics import bootstrap_interval, interquartile_mean


@dataclass(frozen=True)
class Task:
    """`config` is shipped; `peer` is the environment that others play."""

    config: str
    peer: str
    threshold: float


TASKS = {
    "CartPole, hidden velocities": Task(
        "cartpole_hidden_velocity", "rlrnn/CartPoleHiddenVelocity-v0", 400
    ),
    "Pendulum, hidden velocity": Task(
        "pendulum_hidden_velocity", "rlrnn/PendulumHiddenVelocity-v0", -200
    ),
    "MountainCarContinuous, hidden velocity": Task(
        "mountain_car_hidden_velocity",
        "rlrnn/MountainCarContinuousHiddenVelocity-v0",
        90,
    ),
    "RepeatPreviousEasy": Task(
        "repeat_previous_easy", "popgym:popgym-RepeatPreviousEasy-v0", 0.9
    ),
    "RepeatFirstEasy": Task(
        "repeat_first_easy", "popgym:popgym-RepeatFirstEasy-v0", 0.9
    ),
    "AutoencodeEasy": Task("autoencode_easy", "popgym:popgym-AutoencodeEasy-v0", 0.0),
}
AGENTS = ("rlrnn", "rlrnn, their environment", "memoryless", "sb3-contrib")


class Curve(BaseCallback):
    """Mean return of the last 100 training episodes, after each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, float, float]] = []  # steps, return, seconds
        self.began = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer
        if episodes:
            mean = float(np.mean([e["r"] for e in episodes]))
            seconds = time.perf_counter() - self.began
            self.rows.append((self.num_timesteps, mean, seconds))


def train(agent: str, task: Task, seed: int) -> dict[str, Any]:
    config: TrainConfig = load_config("train", task.config)
    if agent == "sb3-contrib":
        from sb3_contrib import RecurrentPPO as Peer

        model: Any = Peer(
            "MlpLstmPolicy",
            peer_envs(task, 8, seed),
            n_steps=128,
            batch_size=256,
            n_epochs=4,
            seed=seed,
            device="cpu",
            policy_kwargs={"lstm_hidden_size": 128},
        )
    else:
        if agent == "rlrnn, their environment":
            env = peer_envs(task, config.envs, seed)
        else:
            env = make_envs(config.env, config.envs, "cpu", seed)
        settings = config.agent
        if agent == "memoryless":
            settings = replace(settings, cell="none")
        model = make_agent(settings, env, seed, "cpu")
    curve = Curve()
    model.learn(config.steps, callback=curve, log_interval=10**9)
    seconds = time.perf_counter() - curve.began
    returns = evaluate(model, model.get_env())
    return {
        "steps": model.num_timesteps,
        "seconds": seconds,
        "return": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "curve": curve.rows,
    }


def peer_envs(task: Task, count: int, seed: int) -> VecEnv:
    """Numpy environments as both agents can take them."""
    spec = gymnasium.make(task.peer)
    flat = isinstance(spec.observation_space, gymnasium.spaces.Tuple)
    wrapper = gymnasium.wrappers.FlattenObservation if flat else None
    return make_vec_env(task.peer, count, seed=seed, wrapper_class=wrapper)


def evaluate(model: Any, env: VecEnv) -> list[float]:
    if isinstance(env, VecNormalize):
        env.training, env.norm_reward = False, False
    env.seed(123_456)
    returns, _ = evaluate_policy(model, env, 50, True, return_episode_rewards=True)
    return [float(r) for r in returns]  # type: ignore[union-attr]


def reached(run: dict[str, Any], threshold: float) -> tuple[int, float] | None:
    """Steps and seconds until the training return was there."""
    for steps, mean, seconds in run["curve"]:
        if mean >= threshold and steps >= 5_000:
            return steps, seconds
    return None


def table(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    lines = [
        "| task | agent | seeds | steps | return, IQM [95 %] (min) | steps to threshold"
        " | seconds to it | steps/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, agent), some in runs.items():
        finals = [run["return"] for run in some]
        scores = np.array(finals)[:, None]
        low, high = bootstrap_interval(scores)
        hits = [reached(run, TASKS[name].threshold) for run in some]
        there = [hit for hit in hits if hit is not None]
        steps = seconds = "-"
        if len(there) * 2 > len(hits):  # the median seed got there
            cells: list[Callable[[Any], float]] = [lambda h: h[0], lambda h: h[1]]
            medians = [float(np.median([cell(h) for h in there])) for cell in cells]
            steps = f"{medians[0]:,.0f} ({len(there)} of {len(hits)})"
            seconds = f"{medians[1]:.1f}"
        speed = np.median([run["steps"] / run["seconds"] for run in some])
        lines.append(
            f"| {name} (≥ {TASKS[name].threshold:g}) | {agent} | {len(some)} "
            f"| {some[0]['steps']:,} | {interquartile_mean(scores):.4g} "
            f"[{low:.4g}, {high:.4g}] ({min(finals):.4g}) | {steps} | {seconds} "
            f"| {speed:,.0f} |"
        )
    return "\n".join(lines)


def plot(runs: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in runs))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.2))
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for color, agent in enumerate(AGENTS):
            for i, run in enumerate(runs.get((name, agent), [])):
                steps, means, _ = zip(*run["curve"], strict=True)
                label = agent if i == 0 else None
                axis.plot(steps, means, color=f"C{color}", lw=0.9, label=label)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("steps")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--agents", nargs="*", default=["rlrnn"], choices=AGENTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--out", type=Path, default=Path("runs/agent_learning"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        for agent in options.agents:
            for seed in options.seeds:
                path = options.out / f"{TASKS[name].config}-{agent}-{seed}.json"
                if path.exists():
                    continue
                run = train(agent, TASKS[name], seed)
                path.write_text(json.dumps(run))
                print(
                    f"{name}, {agent}, seed {seed}: return {run['return']:.4g} "
                    f"in {run['seconds']:.0f} s",
                    flush=True,
                )
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, task in TASKS.items():
        for agent in AGENTS:
            paths = sorted(options.out.glob(f"{task.config}-{agent}-*.json"))
            if some := [json.loads(path.read_text()) for path in paths]:
                runs[name, agent] = some
    if runs:
        print(table(runs))
        plot(runs, options.out / "curves.png")
        print(f"curves: {options.out / 'curves.png'}")


if __name__ == "__main__":
    main()
