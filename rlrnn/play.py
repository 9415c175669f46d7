"""`rlrnn play`: an environment in the terminal, for a person or a trained agent.

`python -m rlrnn.play` prints the gallery, docs/environments.md.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from rlrnn.envs.tensor import TensorVectorEnv
from rlrnn.envs.text import entered, meanings, picture, task_of
from rlrnn.envs.wrappers import HideCoordinates
from rlrnn.flows import make_env
from rlrnn.running import run_config

Player = Callable[[Any, bool], Any]  # observation, episode begins -> action, None: quit


def play(
    id: str | None,
    agent: str | None = None,
    steps: int = 100,
    seed: int = 0,
) -> list[float]:
    """Shows `steps` steps, and returns the returns of the episodes that ended.

    A run's agent plays if `agent` is given (its own environment without `id`); else a
    person at a terminal; else nobody, and actions are random.
    """
    if steps < 1:
        raise ValueError(f"--steps is {steps}: give at least 1")
    if seed < 0:
        raise ValueError(f"--seed is {seed}: give at least 0")
    if agent is not None:
        job, tree = run_config(agent)
        if job != "train":
            raise ValueError(f"{agent} was made by `rlrnn {job}`: it has no agent")
        id = id or tree["env"]
    if id is None:
        raise ValueError("nothing to play: give an environment's id, or --agent RUN")
    env = make_env(id)
    try:
        return _play(env, id, agent, steps, seed)
    finally:
        env.close()


def _play(
    env: gymnasium.Env[Any, Any],
    id: str,
    agent: str | None,
    steps: int,
    seed: int,
) -> list[float]:
    env.action_space.seed(seed)
    task, told = task_of(env), meanings(task_of(env), env.action_space)
    person = agent is None and sys.stdin.isatty()
    if agent is not None:
        player = _trained(agent, env)
        print(f"{id}, played by {agent}")
    elif person:
        player = _person(env.action_space, told)
        print(f"{id}: q quits, ? helps", *told, sep="\n")
    else:
        player = lambda obs, begins: env.action_space.sample()  # noqa: E731
        print(f"{id}: the input is no terminal, so actions are random")
    obs, _ = env.reset(seed=seed)
    returns, total, begins = [], 0.0, True
    for step in range(steps):
        print("", *picture(task, obs), sep="\n")
        action = player(obs, begins)
        if action is None:
            break
        obs, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        shown = "" if person else f"action {_named(action, told)}, "
        print(f"step {step + 1}: {shown}reward {reward:+.4g}, return {total:.4g}")
        begins = bool(terminated or truncated)
        if begins:
            how = "terminated" if terminated else "truncated"
            print("", *picture(task, obs), f"{how}: return {total:.4g}", sep="\n")
            returns.append(total)
            obs, _ = env.reset()
            total = 0.0
    return returns


def _named(action: Any, told: list[str]) -> str:
    """An action as one would type it, and what it means."""
    for line in told[1:]:
        number, name = line.split(maxsplit=1)
        if number == str(action):
            return f"{number} ({name})"
    values = np.asarray(action).ravel().tolist()
    return " ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in values)


def _person(space: Any, told: list[str]) -> Player:
    def ask(obs: Any, begins: bool) -> Any:
        while True:
            print("> ", end="", flush=True)
            line = sys.stdin.readline()
            words = line.strip()
            if not line or words in ("q", "quit"):
                return None
            if words in ("", "?", "h", "help"):
                print(*told, "q  quit", sep="\n")
                continue
            try:
                return entered(words, space)
            except ValueError:
                print(f"{words!r} is no action. {told[0]}; ? helps, q quits")

    return ask


def _trained(run: str, env: gymnasium.Env[Any, Any]) -> Player:
    from rlrnn.agents import RecurrentPPO

    path = Path(run, "agent.zip")
    if not path.is_file():
        raise ValueError(
            f"{run} has no agent.zip: go on with rlrnn train --resume {run}"
        )
    agent = RecurrentPPO.load(path, device="cpu")
    for name in ("observation_space", "action_space"):
        trained, here = getattr(agent, name), getattr(env, name)
        if trained != here:
            raise ValueError(
                f"{run} was trained with the {name.replace('_', ' ')} {trained}, but "
                f"this environment's is {here}: let it play its own"
            )
    state: Any = None

    def act(obs: Any, begins: bool) -> Any:
        nonlocal state
        if isinstance(obs, dict):
            row: Any = {key: np.asarray(value)[None] for key, value in obs.items()}
        else:
            row = np.asarray(obs)[None]
        starts = np.array([begins])
        actions, state = agent.predict(row, state, starts, deterministic=True)
        return actions[0]

    return act


# ------------------------------------------------------------------------- the gallery

HEAD = """\
# Environments

Tensor-native tasks. `gymnasium.make(id)` gives a numpy environment,
`gymnasium.make_vec(id, num_envs=1024, device="cuda")` that many copies in tensors;
`rlrnn play ID` lets you try one. Each is here with what a player sees in its first
steps, at random, and its contract: the docstring of its class. This page is made by
`python -m rlrnn.play`.

Beside them are registered, with the [velocities hidden](#hidecoordinates), four of
gymnasium's: `rlrnn/PendulumHiddenVelocity-v0`,
`rlrnn/MountainCarContinuousHiddenVelocity-v0`, `rlrnn/AcrobotHiddenVelocity-v0` and
`rlrnn/LunarLanderHiddenVelocity-v0` (which needs `gymnasium[box2d]`); and
`rlrnn/Tuning-v0`, in which an episode is a training run.
`rlrnn.envs.wrappers` makes memory tasks of others: it hides coordinates, adds noise,
drops or delays observations, and shows the previous action and reward; the last also in
tensors (`rlrnn.envs.tensor_wrappers`, and `rlrnn train --previous true`).
"""


def families() -> dict[type[TensorVectorEnv], list[str]]:
    """The ids of each class of tensor tasks, as they are registered."""
    found: dict[type[TensorVectorEnv], list[str]] = {}
    for id, spec in gymnasium.registry.items():
        if id.startswith("rlrnn/") and isinstance(spec.vector_entry_point, str):
            module, name = spec.vector_entry_point.split(":")
            kind = getattr(__import__(module, fromlist=[name]), name)
            found.setdefault(kind, []).append(id)
    return found


def gallery() -> str:
    """docs/environments.md."""
    parts = [HEAD, *_overview(), ""]
    hidden = [id for id, spec in gymnasium.registry.items() if _hides(spec)]
    sections: list[tuple[type[Any], list[str]]] = [*families().items()]
    sections.append((HideCoordinates, hidden))
    for kind, ids in sections:
        doc = inspect.cleandoc(kind.__doc__ or "")
        first, _, rest = doc.partition("\n")
        parts += [
            f"## {kind.__name__}",
            *(f"`{id}`" + ("," if id != ids[-1] else "") for id in ids),
            "",
            first,
            "",
            "```text",
            *_first_steps(ids[0]),
            "```",
            rest,
            "",
        ]
    return "\n".join(parts).rstrip() + "\n"


def _hides(spec: EnvSpec) -> bool:
    names = [wrapper.name for wrapper in spec.additional_wrappers]
    return spec.id.startswith("rlrnn/") and HideCoordinates.__name__ in names


def _overview() -> Iterator[str]:
    yield "| task | observation | action | best return | without memory |"
    yield "|---|---|---|---|---|"
    for kind, ids in families().items():
        for id in ids:
            env = gymnasium.make_vec(id, num_envs=1)
            name = id.removeprefix("rlrnn/").removesuffix("-v0")
            cells = [
                f"[{name}](#{kind.__name__.lower()})",
                _space(env.single_observation_space),
                _space(env.single_action_space),
                *stated(kind, name.removeprefix(kind.__name__).lower()),
            ]
            yield f"| {' | '.join(cells)} |"


def _space(space: Any) -> str:
    """Short: `Box(2)`, `Discrete(4)`, `4 × Discrete(2)`."""
    if isinstance(space, gymnasium.spaces.Box):
        return f"Box({', '.join(map(str, space.shape))})"
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        sizes = space.nvec.tolist()
        if len(sizes) > 2 and len(set(sizes)) == 1:
            return f"{len(sizes)} × Discrete({sizes[0]})"
        return (
            f"MultiDiscrete({sizes})"
            if len(sizes) < 4
            else f"MultiDiscrete[{len(sizes)}]"
        )
    return str(space)


def stated(kind: type[TensorVectorEnv], level: str) -> tuple[str, str]:
    """Best return and memoryless ceiling of a level, as the docstring has them."""
    doc = inspect.cleandoc(kind.__doc__ or "")
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in doc.splitlines()]
    head: list[str] = next((r for r in rows if r and r[0] == "level"), [])
    row: list[str] = next((r for r in rows if r and r[0] == level), [])
    found = []
    prose = {
        "best": r"the best is (\d+)",
        "memoryless": r"Without memory\s+about (\d+)",
    }
    for word, sentence in prose.items():
        cells = [c for h, c in zip(head, row, strict=False) if h.startswith(word)]
        match = re.search(sentence, doc)
        found.append(cells[0] if cells else match[1] if match else "see there")
    return found[0], found[1]


def _first_steps(id: str, steps: int = 3) -> Iterator[str]:
    """A player at random: pictures, and the actions between them."""
    env = gymnasium.make(id)
    env.action_space.seed(0)
    told = meanings(task_of(env), env.action_space)
    obs, _ = env.reset(seed=0)
    yield from picture(task_of(env), obs)
    for _ in range(steps):
        action = env.action_space.sample()
        obs, *_ = env.step(action)
        yield f"> {_named(action, told)}"
        yield from picture(task_of(env), obs)


if __name__ == "__main__":
    print(gallery(), end="")
