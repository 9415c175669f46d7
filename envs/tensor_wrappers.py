"""Wrappers for environments in tensors; shapes: B copies, n numbers of an observation.

What they wrap is a gymnasium `VectorEnv` with `metadata["tensor"]` (see
`rlrnn.envs.tensor`); nothing here waits for the device.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from jaxtyping import Float32
from torch import Tensor

from rlrnn.envs.tensor import Infos, State, Told
from rlrnn.envs.wrappers import with_previous

Flattener = Callable[[Any], Float32[Tensor, "B n"]]


class TensorPreviousActionReward(VectorWrapper):
    """`rlrnn.envs.wrappers.PreviousActionReward` for B copies in tensors.

    The same numbers: observation, previous action and previous reward, end to end, in
    float32. Where an episode has just ended, `obs` opens the next one, so that action
    and reward are zeros, and `final_obs` holds those that ended it. There is no state
    beside that of `env`, whose other attributes are those of the wrapper, too.
    """

    env: Any
    single_observation_space: Any
    observation_space: Any

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        *,
        action: bool = True,
        reward: bool = True,
    ) -> None:
        if not env.metadata.get("tensor"):
            raise ValueError(
                f'env is {env}: expected a VectorEnv with metadata["tensor"]; wrap the '
                "copies of others in rlrnn.envs.wrappers.PreviousActionReward"
            )
        super().__init__(env)
        seen, done = env.single_observation_space, env.single_action_space
        self.single_observation_space = with_previous(seen, done, action, reward)
        self.observation_space = batch_space(
            self.single_observation_space, env.num_envs
        )
        self._seen = _flattener(seen, self.env.device)
        self._done = _flattener(done, self.env.device) if action else None
        self._reward = reward

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.env, name)

    @property
    def state(self) -> State:
        state: State = self.env.state
        return state

    @state.setter
    def state(self, state: State) -> None:
        self.env.state = state

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32[Tensor, "B n"], Infos]:
        obs, infos = self.env.reset(seed=seed, options=options)
        seen = self._seen(obs)
        width = self.single_observation_space.shape[0]
        return torch.nn.functional.pad(seen, (0, width - seen.shape[1])), infos

    def step(self, actions: Tensor) -> Told:
        return self._told(actions, self.env.step(actions))

    def stepped(self, state: State, actions: Tensor) -> tuple[State, Told]:
        """As `TensorVectorEnv.stepped`."""
        state, told = self.env.stepped(state, actions)
        return state, self._told(actions, told)

    def _told(self, actions: Tensor, told: Told) -> Told:
        obs, rewards, terminated, truncated, infos = told
        past = [] if self._done is None else [self._done(actions)]
        past += [rewards[:, None].float()] if self._reward else []
        last = torch.cat((self._seen(infos["final_obs"]), *past), 1)
        now = last
        if obs is not infos["final_obs"]:  # else no episode has ended
            done = (terminated | truncated)[:, None]
            past = [x.masked_fill(done, 0.0) for x in past]
            now = torch.cat((self._seen(obs), *past), 1)
        return now, rewards, terminated, truncated, {**infos, "final_obs": last}


def _flattener(space: spaces.Space[Any], device: torch.device) -> Flattener:
    """gymnasium's `flatten` for a batch of tensors: numbers as they are, discrete ones
    as one-hot, those of a `Dict` end to end."""
    if isinstance(space, spaces.Dict):
        parts = {key: _flattener(part, device) for key, part in space.items()}
        return lambda x: torch.cat([part(x[key]) for key, part in parts.items()], 1)
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        return lambda x: x.reshape(len(x), -1).float()
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        raise ValueError(
            f"a space is {space}: expected Box, Discrete, MultiDiscrete, MultiBinary "
            "or a Dict of them"
        )
    one = isinstance(space, spaces.Discrete)
    sizes = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
    first = np.broadcast_to(np.ravel(space.start), sizes.shape)
    numbers = [
        start + np.arange(size) for start, size in zip(first, sizes, strict=True)
    ]
    levels = torch.as_tensor(np.concatenate(numbers), device=device)
    # [n], whose number of a `MultiDiscrete` each level is of
    which = torch.as_tensor(np.arange(len(sizes)).repeat(sizes), device=device)

    def flatten(x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1)
        return ((x if one else x.index_select(1, which)) == levels).float()

    return flatten
