"""Supervised training as an environment: one episode is one run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from rlrnn import seeding
from rlrnn.control import (
    ACTIONS,
    FEATURES,
    SOLVED,
    Ablation,
    Codec,
    Knobs,
    Signals,
)
from rlrnn.tasks import Task, Tasks, build_trainer
from rlrnn.training import Trainer

PLAIN = 8  # one drawn task in so many has the signals of a plain loop only


def log_loss(signals: Signals, first: float) -> float:
    """The logarithm of the probe loss of one run; it bends towards a floor, 2 % of the
    `first` loss."""
    return float(np.log(signals.probe_loss[0] + SOLVED * first))


class TuningEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.int64]]):
    """Set the learning rate and the truncation of a training run while it goes on.

    An episode trains one model on one task, until its budget of tokens is spent.

    - Observation: `Box(-5, 5, (28,))`, the `rlrnn.control.FEATURES`, free of scale.
    - Action: `MultiDiscrete([7, 3])`, a factor on the rate and one on the truncation.
    - Reward: the fall of the log probe loss in the interval (`log_loss`). Undiscounted,
      an episode's return is log(first loss / last loss), until the task is solved.
    - Start: fresh weights, their probe loss, and a range test.
    - Terminated: the budget is spent (the agent sees it coming), or training failed,
      by three recoveries from divergence in a row. Truncated: never.

    Action (3, 1) leaves the prior alone, warm-up and cosine at the rate of the range
    test. `info` has `episode_index`, `decision`, the `knobs` and the `signals`.

    Args:
        tasks: a distribution to draw each episode's task from, or one task for all.
        task_seed: environments with the same one play the same tasks in the same
            order, whatever they are seeded with; None: drawn from the reset's seed.
        device: of the training.
        ablation: what is taken from the agent (`rlrnn.control.Ablation`).
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        tasks: Tasks | Task | None = None,
        task_seed: int | None = None,
        device: str = "cpu",
        ablation: Ablation = "none",
    ) -> None:
        self.tasks = Tasks() if tasks is None else tasks
        self.task_seed = task_seed
        self.device = device
        self.codec = Codec(ablation=ablation)
        self.observation_space = spaces.Box(-5.0, 5.0, (len(FEATURES),), np.float32)
        self.action_space = spaces.MultiDiscrete(list(ACTIONS))
        self.episode_index = -1
        self.task: Task | None = None
        self.build: Callable[[Task, str], Trainer] = build_trainer

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self.draw(seed)
        return self.begin(self.trainer.start(self.codec.range_test))

    def draw(self, seed: int | None = None) -> None:
        """The first half of `reset`: a task, and a trainer that has not started."""
        super().reset(seed=seed)
        self.episode_index = 0 if seed is not None else self.episode_index + 1
        if isinstance(self.tasks, Task):
            self.task = self.tasks
        else:
            if self.task_seed is None:
                rng = self.np_random
            else:
                words = (self.task_seed, "task", self.episode_index)
                rng = np.random.default_rng(seeding.derive(*words))
            self.task = self.tasks.draw(rng)
        self.trainer = self.build(self.task, self.device)

    def begin(self, signals: Signals) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """The second half: what the started trainer told."""
        self.signals, self.reward_sum = self._heard(signals), 0.0
        self.first = float(signals.probe_loss[0])
        observation, self.codec_state = self.codec.observe(
            self.signals, self.codec.init(1)
        )
        return observation[0], self._info()

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self.task is None:
            raise RuntimeError("step before the first reset: call reset()")
        if not self.action_space.contains(np.asarray(action)):
            raise ValueError(
                f"action is {action!r}, expected a member of {self.action_space}"
            )
        knobs = self.choose(action)
        return self.settle(knobs, self.trainer.step(knobs))

    def choose(self, action: NDArray[np.int64]) -> Knobs:
        """The first half of `step`: the knobs that an action stands for."""
        actions = np.asarray(action)[None]
        knobs, state = self.codec.act(actions, self.signals, self.codec_state)
        self.codec_state = state
        return knobs

    def settle(
        self, knobs: Knobs, signals: Signals
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """The second half: what the trainer told after an interval under `knobs`."""
        reward = log_loss(self.signals, self.first) - log_loss(signals, self.first)
        self.signals = self._heard(signals)
        observation, self.codec_state = self.codec.observe(
            self.signals, self.codec_state
        )
        self.reward_sum += reward
        terminated = self.trainer.done
        info = self._info(knobs)
        if terminated:
            length = self.trainer.decision
            info["episode"] = {"r": self.reward_sum, "l": length, "t": 0.0}
        return observation[0], reward, terminated, False, info

    def _heard(self, signals: Signals) -> Signals:
        """Some tasks lack what a plain loop lacks (`rlrnn.agents.loop`), so that the
        agent learns to do without."""
        if isinstance(self.tasks, Task) or self.task is None or self.task.seed % PLAIN:
            return signals
        missing = np.full(1, np.nan)
        return dataclasses.replace(signals, carried_grad=missing, grad_decay=missing)

    def _info(self, knobs: Knobs | None = None) -> dict[str, Any]:
        assert self.task is not None
        info: dict[str, Any] = {
            "episode_index": self.episode_index,
            "family": self.task.family,
            "decision": self.trainer.decision,
            "signals": {k: v for k, v in self.signals.to_row().items() if v == v},
        }
        if knobs is not None:
            info["knobs"] = {
                name: value[0].item() for name, value in vars(knobs).items()
            }
        return info

    # --- resuming -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A tree with which the same environment goes on to the same bits."""
        tree: dict[str, Any] = {
            "episode_index": self.episode_index,
            "rng": self.np_random.bit_generator.state,
            "started": self.task is not None,
        }
        if self.task is not None:
            tree["task"] = task_to_tree(self.task)
            tree["trainer"] = self.trainer.state_dict()
            tree["signals"] = vars(self.signals)
            tree["codec"] = self.codec_state
            tree["reward_sum"], tree["first"] = self.reward_sum, self.first
        return tree

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self.episode_index = tree["episode_index"]
        self.np_random.bit_generator.state = tree["rng"]
        if tree["started"]:
            self.task = task_from_tree(tree["task"])
            self.trainer = self.build(self.task, self.device)
            self.trainer.load_state_dict(tree["trainer"])
            self.signals = Signals(**tree["signals"])
            self.codec_state = tree["codec"]
            self.reward_sum, self.first = tree["reward_sum"], tree["first"]


FIRST_SCALE = 0.05  # of centred returns, before any have been seen


class Ranges(VecEnvWrapper):
    """Keeps the least and the greatest observation [D] that was given, `low` and
    `high`: what a controller knows its way about in."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        width = venv.observation_space.shape
        assert width is not None
        self.low = np.full(width, np.inf, np.float32)
        self.high = np.full(width, -np.inf, np.float32)

    def reset(self) -> Any:
        return self._see(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        return self._see(obs), rewards, dones, infos

    def _see(self, obs: Any) -> Any:
        self.low = np.minimum(self.low, obs.min(0))
        self.high = np.maximum(self.high, obs.max(0))
        return obs


class GroupBaseline(VecEnvWrapper):
    """Takes the group's mean reward from each reward, and the family's scale.

    The environments of a group (`size` neighbours) play the same tasks, from the same
    weights, over the same data. What they have in common is not the agent's doing, and
    with equal lengths and gamma = 1 this makes the return "return - group mean". Where
    a member has failed and is an episode ahead, it is compared with nobody.

    What a controller can win differs by orders between families of tasks (a text's loss
    falls by some per cent more, copying is learned or not): the centred rewards of a
    family are divided by the root mean square of its centred returns so far.
    """

    def __init__(self, venv: VecEnv, size: int) -> None:
        super().__init__(venv)
        if size < 2 or venv.num_envs % size:
            raise ValueError(
                f"group is {size}, expected at least 2 and a divisor of the "
                f"{venv.num_envs} environments"
            )
        self.size = size
        self.returns = np.zeros(venv.num_envs)  # centred, of the episodes under way
        self.squares: dict[str, float] = {}  # by family: the mean of squared returns
        self.counts: dict[str, int] = {}

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        place = np.array([(i["episode_index"], i["decision"]) for i in infos])
        raw = np.asarray(rewards, np.float64)
        groups = np.arange(len(raw)) // self.size
        same = (place[:, None] == place[None]).all(2)
        same &= groups[:, None] == groups[None]
        centred = raw - (same @ raw) / same.sum(1)
        names = [info["family"] for info in infos]
        scale = [self.squares.get(name, FIRST_SCALE**2) for name in names]
        self.returns += centred
        for ended in map(int, np.flatnonzero(dones)):
            self._note(names[ended], self.returns[ended] ** 2)
            self.returns[ended] = 0.0
        return obs, (centred / np.sqrt(scale)).astype(np.float32), dones, infos

    def _note(self, family: str, square: float) -> None:
        """A running mean over the last few hundred, from a first guess on."""
        count = min(self.counts.get(family, 8) + 1, 500)
        old = self.squares.get(family, FIRST_SCALE**2)
        self.squares[family] = old + (square - old) / count
        self.counts[family] = count

    def state_dict(self) -> dict[str, Any]:
        return {
            "returns": self.returns,
            "squares": dict(self.squares),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self.returns = tree["returns"].copy()
        self.squares, self.counts = dict(tree["squares"]), dict(tree["counts"])


def task_to_tree(task: Task) -> dict[str, Any]:
    return dataclasses.asdict(task)


def task_from_tree(tree: dict[str, Any]) -> Task:
    task: Task = _from_tree(Task, tree)
    return task


def _from_tree(kind: type[Any], tree: dict[str, Any]) -> Any:
    """The dataclass `kind` that `dataclasses.asdict` took apart."""
    values = {}
    for entry in dataclasses.fields(kind):
        value = tree[entry.name]
        if isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            value = _from_tree(entry.type, value)
        values[entry.name] = value
    return kind(**values)
