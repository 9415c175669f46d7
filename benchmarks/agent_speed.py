"""Environment steps per second of the full loop, beside sb3-contrib's RecurrentPPO.

    python benchmarks/agent_speed.py                     # the small setting
    python benchmarks/agent_speed.py --setting large --shared
    python benchmarks/agent_speed.py --scaling           # cost per step, T and envs

The same recipe for both: network, environments (SB3's DummyVecEnv over the same
gymnasium environments), rollout, epochs, minibatch; with 1 and with 2 threads each, and
the best of the peer's is what ours are compared with. Rounds alternate; the ratio is
taken in each round. `tensor` is ours on our tensor-native environment, apart.

| setting | envs × steps | units | epochs | minibatch |
|---|---|---|---|---|
| small | 8 × 128 | 128 | 4 | 256 |
| large | 64 × 128 | 256 | 4 | 2048 |
| default | 1 × 128 | 256 | 10 | 128 |
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.env_util import make_vec_env

SETTINGS = {  # envs, steps, units, epochs, minibatch
    "small": (8, 128, 128, 4, 256),
    "large": (64, 128, 256, 4, 2048),
    "default": (1, 128, 256, 10, 128),
}
TENSOR = {
    "cartpole": "rlrnn/CartPoleHiddenVelocity-v0",
    "repeat": "rlrnn/RepeatPreviousEasy-v0",
}


def hidden_cartpole() -> gymnasium.Env[Any, Any]:
    """gymnasium's own cart-pole, without velocities: the same for both agents."""
    full = gymnasium.make("CartPole-v1")
    assert isinstance(full.observation_space, gymnasium.spaces.Box)
    low, high = full.observation_space.low[::2], full.observation_space.high[::2]
    space = gymnasium.spaces.Box(low, high, dtype=np.float32)
    return TransformObservation(full, lambda obs: obs[::2], space)


def repeat_previous() -> gymnasium.Env[Any, Any]:
    """POPGym's own."""
    return gymnasium.make("popgym:popgym-RepeatPreviousEasy-v0")


NUMPY = {"cartpole": hidden_cartpole, "repeat": repeat_previous}


def make(
    agent: str, task: str, setting: tuple[int, int, int, int, int], shared: bool
) -> Any:
    envs, steps, units, epochs, batch = setting
    recipe: dict[str, Any] = {
        "n_steps": steps,
        "batch_size": batch,
        "n_epochs": epochs,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {
            "lstm_hidden_size": units,
            "shared_lstm": shared,
            "enable_critic_lstm": not shared,
        },
    }
    if agent == "sb3-contrib":
        from sb3_contrib import RecurrentPPO as Peer

        return Peer("MlpLstmPolicy", make_vec_env(NUMPY[task], envs), **recipe)
    # not at the top: the peer's memory is not to hold what it does not need
    import rlrnn  # noqa: F401  registers the ids
    from rlrnn.agents import RecurrentPPO

    if agent == "tensor":
        env = gymnasium.make_vec(TENSOR[task], num_envs=envs)
    else:
        env = make_vec_env(NUMPY[task], envs)  # type: ignore[assignment]
    return RecurrentPPO("MlpLstmPolicy", env, **recipe)


def compare(options: argparse.Namespace) -> None:
    """A process for each agent and number of threads; one of them works at a time."""
    runs = [
        (agent, threads)
        for agent in ("sb3-contrib", "rlrnn", "tensor")
        for threads in options.threads
    ]
    workers = {run: Worker(*run, options) for run in runs}
    speeds: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for _ in range(options.rounds):
        for run, worker in workers.items():
            speeds[run].append(float(worker.ask("go")))
    peaks = {run: worker.ask("stop") for run, worker in workers.items()}
    peer = max(
        (run for run in runs if run[0] == "sb3-contrib"),
        key=lambda run: statistics.median(speeds[run]),
    )
    print(f"{options.setting}, {options.task}{', shared' if options.shared else ''}:")
    print(
        "| agent | threads | steps/s, median (min to max) | of sb3-contrib's best |",
        end="",
    )
    print(" peak, MiB |\n|---|---|---|---|---|")
    for run, values in speeds.items():
        ratio = statistics.median(
            a / b for a, b in zip(values, speeds[peer], strict=True)
        )
        print(
            f"| {run[0]} | {run[1]} | {statistics.median(values):,.0f} "
            f"({min(values):,.0f} to {max(values):,.0f}) | {ratio:.2f} | {peaks[run]} |"
        )


class Worker:
    """A process that trains when asked, and says how fast."""

    def __init__(self, agent: str, threads: int, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--alone", agent]
        command += ["--threads", str(threads), "--task", options.task]
        command += ["--setting", options.setting, "--steps", str(options.steps)]
        command += ["--shared"] if options.shared else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask("warm up")

    def ask(self, what: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def alone(options: argparse.Namespace) -> None:
    """The other end of a `Worker`."""
    torch.set_num_threads(options.threads[0])
    setting = SETTINGS[options.setting]
    one = setting[0] * setting[1]
    updates = max(1, options.steps // one)
    agent = make(options.alone, options.task, setting, options.shared)
    for line in sys.stdin:
        if line.strip() == "stop":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
            break
        steps = 2 * one if line.strip() == "warm up" else updates * one
        begin = time.perf_counter()
        agent.learn(steps, reset_num_timesteps=False)
        print(steps / (time.perf_counter() - begin), flush=True)


def scaling(options: argparse.Namespace) -> None:
    """Microseconds per environment step as T and the number of environments grow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.set_num_threads(1)
    lengths = (32, 64, 128, 256, 512, 1024)
    counts = (8, 16, 32, 64, 128, 256, 512)
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2))
    for axis, values, label in (
        (axes[0], lengths, "steps of a rollout, 8 environments"),
        (axes[1], counts, "environments, 128 steps"),
    ):
        costs = []
        for value in values:
            envs, steps = (8, value) if values is lengths else (value, 128)
            # two columns of the rollout in a minibatch, eight from 32 columns on
            columns = max(2, envs // 4)
            setting = (envs, steps, 128, 4, columns * steps)
            agent = make("tensor", options.task, setting, options.shared)
            agent.learn(envs * steps)
            updates = max(1, 16_384 // (envs * steps))
            times = []
            for _ in range(options.rounds):
                begin = time.perf_counter()
                agent.learn(updates * envs * steps, reset_num_timesteps=False)
                times.append((time.perf_counter() - begin) / (updates * envs * steps))
            costs.append(1e6 * statistics.median(times))
            print(f"{envs} environments x {steps}: {costs[-1]:.1f} µs", flush=True)
        axis.plot(values, costs, marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
        axis.set_ylabel("µs per environment step")
        axis.set_ylim(0)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--task", choices=TENSOR, default="cartpole")
    parser.add_argument("--shared", action="store_true", help="one LSTM for both")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8192, help="per round")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--plot", type=Path, default=Path("runs/scaling.png"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options)
    elif options.scaling:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        scaling(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
