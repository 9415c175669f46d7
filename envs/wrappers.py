"""Wrappers that make a memory task of any gymnasium environment.

What is random in them has a generator of its own, spawned from the environment's
`np_random`: a seed repeats it, and the environment's own course stays as it is without
the wrapper.
"""

import copy
import difflib
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Space, flatten, flatten_space
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

# What the coordinates of an observation are called, by the class of the environment
COORDINATES = {
    "CartPoleEnv": ("position", "velocity", "angle", "angular velocity"),
    "PendulumEnv": ("cos", "sin", "angular velocity"),
    "MountainCarEnv": ("position", "velocity"),
    "Continuous_MountainCarEnv": ("position", "velocity"),
    "AcrobotEnv": (
        *("cos 1", "sin 1", "cos 2", "sin 2"),
        *("angular velocity 1", "angular velocity 2"),
    ),
    "LunarLander": (
        *("x", "y", "velocity x", "velocity y"),
        *("angle", "angular velocity", "left leg", "right leg"),
    ),
}


class HideCoordinates(
    gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs
):
    """Show some coordinates of the observation only, in their order.

    `env` has a `Box` observation with one axis. Give those to `keep` or those to
    `hide`, by index or, for the environments in `COORDINATES`, by name: hiding
    velocities turns a control task into a memory task.

    So are registered, with gymnasium's own start, rewards and ends:

    | `rlrnn/...HiddenVelocity-v0` | observation                  | action     | steps |
    |------------------------------|------------------------------|------------|-------|
    | Pendulum                     | cos, sin: ±1                 | Box(-2, 2) | 200   |
    | MountainCarContinuous        | position: -1.2 ... 0.6       | Box(-1, 1) | 999   |
    | Acrobot                      | cos, sin of two angles: ±1   | Discrete 3 | 500   |
    | LunarLander                  | x, y, angle, legs: see there | Discrete 4 | 1000  |

    | task                         | best      | memoryless | chance |
    |------------------------------|-----------|------------|--------|
    | Pendulum                     | -140      | -1050      | -1227  |
    | MountainCarContinuous        | > 92      | not known  | -33    |
    | Acrobot                      | not known | not known  | -500   |
    | LunarLander                  | not known | not known  | -182   |

    - Reward: Pendulum's is minus the cost that `PositionOnlyPendulum` describes, whose
      easy level is the same task: its figures are those here. MountainCarContinuous has
      100 at the goal, less 0.1·action² for every step (an LSTM agent has reached 92);
      Acrobot -1 for every step, but 0 for the one that reaches the height.
    - Start: Pendulum's angle in ±π, speed in ±1; the car in -0.6 ... -0.4, at rest;
      Acrobot's angles and speeds in ±0.1; the lander at the top, pushed at random.
    - End: truncated after that many steps; terminated at the goal, at the height, and
      when the lander has crashed, flown off or come to rest; Pendulum never is.
    - Sources: gymnasium (Towers et al. 2024); the car, Moore ("Efficient Memory-based
      Learning for Robot Control", 1990); Acrobot, Sutton ("Generalization in
      Reinforcement Learning", NIPS 1996).
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        *,
        keep: Sequence[int | str] | None = None,
        hide: Sequence[int | str] | None = None,
    ) -> None:
        RecordConstructorArgs.__init__(self, keep=keep, hide=hide)
        super().__init__(env)
        space = _flat_box(env)
        size = space.shape[0]
        given = keep if keep is not None else hide
        if given is None or (keep is not None and hide is not None):
            raise ValueError(f"keep={keep}, hide={hide}: give one of the two")
        named = [_index(env, x, size) if isinstance(x, str) else x for x in given]
        wrong = [index for index in named if not 0 <= index < size]
        if wrong:
            raise ValueError(
                f"no coordinates {wrong}: the observation has 0 to {size - 1}"
            )
        shown = [i for i in range(size) if (i in named) == (keep is not None)]
        if not shown:
            raise ValueError(f"keep={keep}, hide={hide} leaves nothing to observe")
        self.shown = np.array(shown)
        self.observation_space = Box(
            space.low[shown], space.high[shown], dtype=space.dtype.type
        )

    def observation(self, observation: Any) -> Any:
        return observation[self.shown]


class ObservationNoise(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Add normal noise to every observation, the first included.

    `env` has a `Box` observation of floating point numbers; `sigma` is the standard
    deviation, one for all or one for each coordinate. What lies beyond the bounds is
    clipped to them, so that the space stays as it is.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], *, sigma: float | Sequence[float]
    ) -> None:
        RecordConstructorArgs.__init__(self, sigma=sigma)
        super().__init__(env)
        space = _box(env)
        if not np.issubdtype(space.dtype, np.floating):
            raise ValueError(
                f"the observation is {space}, expected floating point numbers"
            )
        self.sigma = np.asarray(sigma, np.float64)
        if self.sigma.shape not in ((), space.shape) or not np.all(self.sigma >= 0):
            raise ValueError(
                f"sigma is {sigma}, expected a number from 0, or one for each of the "
                f"coordinates {space.shape}"
            )
        self._space = space
        self._rng: np.random.Generator | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._rng = _generator(self, self._rng, seed)
        return self._noisy(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, over, cut, info = self.env.step(action)
        return self._noisy(obs), reward, over, cut, info

    def _noisy(self, obs: NDArray[Any]) -> NDArray[Any]:
        assert self._rng is not None
        noisy = obs + self.sigma * self._rng.standard_normal(obs.shape)
        noisy = np.clip(noisy, self._space.low, self._space.high)
        return noisy.astype(self._space.dtype)


class Flicker(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Drop each observation with probability `p`.

    `env` has a `Box` observation. In place of one that is dropped there are zeros, also
    at the start of an episode: the flickering of Hausknecht and Stone ("Deep Recurrent
    Q-Learning for Partially Observable MDPs", 2015); the bounds are widened to hold 0.
    With `hold` it is the one seen last, as when frames are lost, and the first of an
    episode is never dropped.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], *, p: float = 0.5, hold: bool = False
    ) -> None:
        RecordConstructorArgs.__init__(self, p=p, hold=hold)
        super().__init__(env)
        space = _box(env)
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}, expected 0 to 1")
        self.p, self.hold = p, hold
        if not hold:
            low, high = np.minimum(space.low, 0), np.maximum(space.high, 0)
            self.observation_space = Box(low, high, dtype=space.dtype.type)
        self._rng: np.random.Generator | None = None
        self._last: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._rng = _generator(self, self._rng, seed)
        self._last = obs.copy() if self.hold else np.zeros_like(obs)
        return self._seen(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, over, cut, info = self.env.step(action)
        return self._seen(obs), reward, over, cut, info

    def _seen(self, obs: Any) -> Any:
        assert self._rng is not None
        if self._rng.random() < self.p:
            return self._last.copy()
        if self.hold:
            self._last = obs.copy()
        return obs


class Delay(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Show every observation `steps` steps late.

    Until then an episode shows its first one. Rewards and ends come at once. For any
    observation.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], *, steps: int = 1) -> None:
        RecordConstructorArgs.__init__(self, steps=steps)
        super().__init__(env)
        if steps < 0:
            raise ValueError(f"steps is {steps}: give at least 0")
        self.steps = steps
        self._late: deque[Any] = deque(maxlen=steps + 1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._late.extend(copy.deepcopy(obs) for _ in range(self.steps + 1))
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, over, cut, info = self.env.step(action)
        self._late.append(copy.deepcopy(obs))  # the oldest drops out
        return self._late[0], reward, over, cut, info


class PreviousActionReward(
    gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs
):
    """Append the previous action and the previous reward to the observation.

    What an agent needs that learns within an episode (Wang et al., "Learning to
    reinforcement learn", 2016; Duan et al., "RL²", 2016). The result is one float32
    vector: observation and action as gymnasium's `flatten` has them, a `Discrete` as
    one-hot, then the reward. At the start of an episode action and reward are zeros.
    Leave one out by `action=False` or `reward=False`. For environments in tensors:
    `rlrnn.envs.tensor_wrappers`.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        *,
        action: bool = True,
        reward: bool = True,
    ) -> None:
        RecordConstructorArgs.__init__(self, action=action, reward=reward)
        super().__init__(env)
        self._parts = env.observation_space, env.action_space
        self._action, self._reward = action, reward
        self.observation_space = with_previous(*self._parts, action, reward)
        self._no_action = np.zeros(
            flatten_space(env.action_space).shape or (), np.float32
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._joined(obs, self._no_action, 0.0), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, over, cut, info = self.env.step(action)
        done = flatten(self._parts[1], action)
        joined = self._joined(obs, done, float(reward))
        return joined, reward, over, cut, info

    def _joined(self, obs: Any, action: Any, reward: float) -> NDArray[np.float32]:
        parts: list[Any] = [flatten(self._parts[0], obs)]
        parts += [action] if self._action else []
        parts += [[reward]] if self._reward else []
        return np.concatenate(parts).astype(np.float32)


def with_previous(
    observation: Space[Any], action: Space[Any], has_action: bool, has_reward: bool
) -> Box:
    """The space of observation, previous action and previous reward, end to end."""
    seen, done = flatten_space(observation), flatten_space(action)
    if not (isinstance(seen, Box) and isinstance(done, Box)):
        raise ValueError(
            f"observation and action are {observation} and {action}, expected spaces "
            "that gymnasium can flatten to a Box"
        )
    low: list[Any] = [seen.low]
    high: list[Any] = [seen.high]
    if has_action:  # zeros at the start, whatever the bounds
        low.append(np.minimum(done.low, 0))
        high.append(np.maximum(done.high, 0))
    if has_reward:
        low.append([-np.inf])
        high.append([np.inf])
    return Box(
        np.concatenate(low).astype(np.float32),
        np.concatenate(high).astype(np.float32),
        dtype=np.float32,
    )


class Checked(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Raise one clear error for a wrong action, and for a step after the end.

    An action must be a member of the space; of a `Box` finite numbers beyond the bounds
    are let through, as gymnasium's own tasks clip them.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self._ended = False
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._ended:
            raise ResetNeeded("step() after the end of an episode: call reset() first")
        if not self._allowed(action):
            raise ValueError(
                f"action is {action!r}, expected a member of {self.action_space}"
            )
        obs, reward, over, cut, info = self.env.step(action)
        self._ended = over or cut
        return obs, reward, over, cut, info

    def _allowed(self, action: Any) -> bool:
        space = self.action_space
        if not isinstance(space, Box):
            return bool(space.contains(action))
        try:
            numbers = np.asarray(action, np.float64)
        except (TypeError, ValueError):
            return False
        return numbers.shape == space.shape and bool(np.isfinite(numbers).all())


def _box(env: gymnasium.Env[Any, Any]) -> Box:
    space = env.observation_space
    if not isinstance(space, Box):
        raise ValueError(f"the observation is {space}, expected a Box")
    return space


def _flat_box(env: gymnasium.Env[Any, Any]) -> Box:
    space = env.observation_space
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ValueError(
            f"the observation is {space}, expected a Box with one axis: "
            "flatten it first (gymnasium.wrappers.FlattenObservation)"
        )
    return space


def coordinates(env: gymnasium.Env[Any, Any]) -> tuple[str, ...]:
    """The names of what is not hidden, those in `COORDINATES`; else none."""
    if not isinstance(env, gymnasium.Wrapper):
        return COORDINATES.get(type(env).__name__, ())
    names = coordinates(env.env)
    if isinstance(env, HideCoordinates) and names:
        return tuple(names[i] for i in env.shown)
    return names


def _index(env: gymnasium.Env[Any, Any], name: str, size: int) -> int:
    """Where the coordinate of that name is, of `size` ones."""
    kind, names = type(env.unwrapped).__name__, coordinates(env)
    if len(names) != size:  # unknown, or a wrapper has put others in their place
        raise ValueError(
            f"the coordinates of {kind} have no names here, {name!r} neither: give "
            f"indices; names are known for {', '.join(COORDINATES)}"
        )
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, 0.5)
        raise ValueError(
            f"no coordinate {name!r}: {kind} has {', '.join(names)}"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    return names.index(name)


def _generator(
    env: gymnasium.Env[Any, Any], now: np.random.Generator | None, seed: int | None
) -> np.random.Generator:
    """A wrapper's own, after a reset: a new one with a new seed, else the old one."""
    if now is None or seed is not None:
        return env.np_random.spawn(1)[0]
    return now
