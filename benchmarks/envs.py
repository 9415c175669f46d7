"""Environment steps per second: our tensor-native tasks beside POPGym's own.

    python benchmarks/envs.py                            # 1,024 copies, all ids
    python benchmarks/envs.py --ids RepeatPrevious CartPole --rounds 9
    python benchmarks/envs.py --device cuda --copies 8192

Random actions, drawn beforehand. Ours with one torch thread, twice: `in step`, all
copies reset together at first, as they are in training; `spread`, copies taken at
random moments of their episodes, so that few resets fall together. POPGym's classes are
bare, without a wrapper, under gymnasium's SyncVectorEnv with 64 copies (more add
nothing: they are stepped one by one) and under AsyncVectorEnv with 2 and with 8 (a
process each); the fastest of the three is what ours are compared with. Rounds
alternate; cells are medians over the rounds, a ratio is one of medians. A task that is
not in POPGym has no peer, and the labyrinths need `mazelib` for theirs.
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from torch import Tensor

import rlrnn  # noqa: F401  registers the ids
from rlrnn.device import resolve_device

PEERS: tuple[tuple[type[VectorEnv[Any, Any, Any]], int], ...] = (
    (SyncVectorEnv, 64),
    (AsyncVectorEnv, 2),
    (AsyncVectorEnv, 8),
)
SAME_TASK = {"CartPoleHiddenVelocity": "PositionOnlyCartPoleMedium"}
BATCHES = 16  # of actions, played in turn


def task_ids(wanted: Sequence[str]) -> list[str]:
    """Of the tensor-native tasks, those whose id holds one of `wanted`."""
    return [
        id
        for id, spec in gymnasium.registry.items()
        if id.startswith("rlrnn/") and spec.vector_entry_point
        if not wanted or any(word in id for word in wanted)
    ]


def peer_class(name: str) -> type[gymnasium.Env[Any, Any]] | None:
    """POPGym's class of a task; None if there is none, or it lacks a package."""
    name = SAME_TASK.get(name, name).lower()
    folder = importlib.import_module("popgym.envs").__path__[0]
    for file in sorted(os.listdir(folder)):
        module, ending = os.path.splitext(file)
        if ending == ".py" and name.startswith(module.replace("_", "")):
            try:
                found = vars(importlib.import_module(f"popgym.envs.{module}"))
            except ImportError:
                return None
            return next((found[key] for key in found if key.lower() == name), None)
    return None


def drawn(env: VectorEnv[Any, Any, Any]) -> list[Any]:
    env.action_space.seed(0)
    return [env.action_space.sample() for _ in range(BATCHES)]


def spread(env: Any, actions: list[Tensor]) -> None:
    """Puts each copy at a moment of its own: a random one of a whole episode."""
    env.reset(seed=0)
    longest = 0
    while longest < 2 * int(env.state["episode_length"].max()) or longest < 8:
        env.step(actions[longest % BATCHES])  # until no length is the record any more
        longest += 1
    moment = torch.randint(longest, (env.num_envs,), device=env.device)
    mixed = env.state_dict()
    for t in range(longest):
        env.step(actions[t % BATCHES])
        for key, value in mixed.items():
            rows = (moment == t).view(-1, *[1] * (value.ndim - 1))
            mixed[key] = torch.where(rows, env.state[key], value)
    env.load_state_dict(mixed)


def speed(env: Any, actions: list[Any], seconds: float, device: str) -> float:
    """Steps per second, over all copies."""
    wait: Callable[[], object] = (
        torch.cuda.synchronize if device != "cpu" else lambda: None
    )
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for action in actions:
            env.step(action)
        steps += len(actions)
        wait()
    return steps * int(env.num_envs) / (time.perf_counter() - begin)


def measure(id: str, options: argparse.Namespace) -> tuple[float, float, float | None]:
    """Ours in step, ours spread, and the fastest of the peers."""
    players: list[tuple[Any, list[Any], str]] = []
    for mix in (False, True):
        env: Any = gymnasium.make_vec(
            id,
            num_envs=options.copies,
            vectorization_mode="vector_entry_point",
            device=options.device,
        )
        actions = [torch.as_tensor(a, device=env.device) for a in drawn(env)]
        env.reset(seed=0)
        if mix:
            spread(env, actions)
        players.append((env, actions, options.device))
    peer = peer_class(id.removeprefix("rlrnn/").removesuffix("-v0"))
    for vector, copies in PEERS if peer else ():
        env = vector([peer] * copies)  # type: ignore[call-arg]
        env.reset(seed=0)
        players.append((env, drawn(env), "cpu"))
    for env, actions, device in players:
        speed(env, actions, options.seconds / 2, device)  # warm-up
    speeds: list[list[float]] = [[] for _ in players]
    for _ in range(options.rounds):
        for row, (env, actions, device) in zip(speeds, players, strict=True):
            row.append(speed(env, actions, options.seconds, device))
    for env, *_ in players:
        env.close()
    together, apart, *others = (statistics.median(row) for row in speeds)
    return together, apart, max(others, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", nargs="*", default=[], help="parts of ids")
    parser.add_argument("--copies", type=int, default=1024, help="of ours")
    parser.add_argument("--device", default="cpu", help="of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one measurement")
    options = parser.parse_args()
    ids = task_ids(options.ids)
    if not ids:
        parser.error(f"--ids {' '.join(options.ids)}: no task has that in its id")
    try:
        options.device = str(resolve_device(options.device))
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    device = options.device
    if device != "cpu":
        device += f" ({torch.cuda.get_device_name()})"
    print(
        f"{options.copies:,} copies on {device}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, gymnasium {gymnasium.__version__}; load "
        f"{os.getloadavg()[0]:.2f}\n"
    )
    print("| task | in step | spread | POPGym | ratio | ratio, spread |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for id in ids:
        together, apart, peer = measure(id, options)
        cells = [f"{together:,.0f}", f"{apart:,.0f}", "-", "-", "-"]
        if peer is not None:
            ratios.append((together / peer, apart / peer))
            cells[2:] = [f"{peer:,.0f}", *(f"{ratio:.0f}" for ratio in ratios[-1])]
        name = id.removeprefix("rlrnn/").removesuffix("-v0")
        print("|", name, "|", " | ".join(cells), "|", flush=True)
    if ratios:
        medians, worst = np.median(ratios, axis=0), np.min(ratios, axis=0)
        print(
            f"\nmedian ratio over {len(ratios)} tasks: {medians[0]:.0f}, spread "
            f"{medians[1]:.0f}; lowest {worst[0]:.0f}, spread {worst[1]:.0f}; load "
            f"{os.getloadavg()[0]:.2f}"
        )


if __name__ == "__main__":
    main()
