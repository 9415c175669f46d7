"""Many tuning environments as one: their trainings are a population."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    VecEnvIndices,
    VecEnvStepReturn,
)

from rlrnn.data.chunks import Problem
from rlrnn.envs.tuning import TuningEnv
from rlrnn.population import Population, joined, single
from rlrnn.tasks import Task, build_problem, build_trainer
from rlrnn.training import Trainer


class TuningVecEnv(VecEnv):
    """`TuningEnv`s whose training runs advance together, in this process.

    To an agent it is a `DummyVecEnv` of the same environments, up to rounding: an
    episode that ends is followed by the first observation of the next one, and its last
    observation is in `info["terminal_observation"]`.
    """

    def __init__(self, envs: Sequence[TuningEnv]) -> None:
        self.envs = list(envs)
        first = self.envs[0]
        super().__init__(len(envs), first.observation_space, first.action_space)
        self.problems: dict[str, Problem] = {}
        for env in self.envs:
            env.build = self._build
        self.population: Population | None = None
        self.actions: NDArray[np.int64] | None = None

    def _build(self, task: Task, device: str) -> Trainer:
        """A group plays one task: its data are made once."""
        key = repr((task.data, task.seed))
        if key not in self.problems:
            if len(self.problems) >= len(self.envs):
                self.problems.clear()
            self.problems[key] = build_problem(task)
        return build_trainer(task, device, problem=self.problems[key])

    def reset(self) -> NDArray[np.float32]:
        """New episodes, of the same number in all: those of a group play one task
        again, even if a run that failed was an episode ahead."""
        latest = max(env.episode_index for env in self.envs)
        for env in self.envs:
            env.episode_index = latest
        observations = self._begin(list(range(self.num_envs)), self._seeds)
        self._reset_seeds()
        return observations

    def _begin(
        self, places: list[int], seeds: Sequence[int | None] | None = None
    ) -> NDArray[np.float32]:
        """New episodes at these places; their observations [n, D]."""
        if self.population is not None:
            self.population.sync()
        for place in places:
            self.envs[place].draw(None if seeds is None else seeds[place])
        new = Population([self.envs[place].trainer for place in places])
        told = new.start(self.envs[0].codec.range_test)
        new.sync()
        self.population = None
        observations = []
        for row, place in enumerate(places):
            observation, info = self.envs[place].begin(single(told, row))
            self.reset_infos[place] = info
            observations.append(observation)
        return np.stack(observations)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        assert self.actions is not None, "step_async comes before step_wait"
        if self.population is None:
            self.population = Population([env.trainer for env in self.envs])
        chosen = [
            env.choose(action)
            for env, action in zip(self.envs, self.actions, strict=True)
        ]
        told = self.population.step(joined(chosen))
        steps = [
            env.settle(knobs, single(told, row))
            for row, (env, knobs) in enumerate(zip(self.envs, chosen, strict=True))
        ]
        observations = np.stack([observation for observation, *_ in steps])
        rewards = np.array([reward for _, reward, *_ in steps], np.float32)
        dones = np.array([done for _, _, done, *_ in steps])
        # a `DummyVecEnv` says whether a step was cut off by time: never
        infos = [{**info, "TimeLimit.truncated": False} for *_, info in steps]
        ended = [int(place) for place in np.flatnonzero(dones)]
        for place in ended:
            infos[place]["terminal_observation"] = observations[place]
        if ended:
            observations = observations.copy()
            observations[ended] = self._begin(ended)
        return observations, rewards, dones, infos

    def close(self) -> None:
        pass

    # --- one environment at a time --------------------------------------------------

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.envs[i], attr_name) for i in self._get_indices(indices)]

    def set_attr(
        self, attr_name: str, value: Any, indices: VecEnvIndices = None
    ) -> None:
        for i in self._get_indices(indices):
            setattr(self.envs[i], attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        if self.population is not None:  # the trainers are as they would be alone
            self.population.sync()
            self.population = None
        return [
            getattr(self.envs[i], method_name)(*method_args, **method_kwargs)
            for i in self._get_indices(indices)
        ]

    def env_is_wrapped(
        self, wrapper_class: type[Any], indices: VecEnvIndices = None
    ) -> list[bool]:
        return [False for _ in self._get_indices(indices)]
