"""Environments as the agent sees them: tensors in, tensors out.

Shapes: B environments. `TensorVecEnv` gives a tensor environment the face that
Stable-Baselines3 expects; a source steps either kind for the training loop.
"""

import time
import traceback
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from jaxtyping import Bool, Float, Int, Shaped
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices
from torch import Tensor

from rlrnn.agents import masking
from rlrnn.agents.observations import Batch, on_each, parts

AnyEnv = GymEnv | VectorEnv[Any, Any, Any]
Episode = dict[str, Any]  # {"r": return, "l": length, "t": seconds}, as Monitor has it


class TensorVecEnv(VecEnv):
    """A tensor environment as a Stable-Baselines3 `VecEnv`, in numpy.

    For evaluation, callbacks and wrappers. The agent trains on `env` itself, so long as
    nothing is wrapped around this. Attributes and methods are those of the whole
    vector: they are read and called once, for all copies; `action_masks()` alone gives
    each copy its row.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not is_tensor_env(env):
            raise ValueError(
                f"env is {env}: expected a gymnasium VectorEnv with "
                'metadata["tensor"]; use stable_baselines3\'s DummyVecEnv for others'
            )
        self.env: Any = env
        self._began = time.monotonic()
        self._actions: Tensor | None = None
        self.mask: Tensor | None = None  # [B, M], what the infos said last
        super().__init__(
            env.num_envs, env.single_observation_space, env.single_action_space
        )
        space = self.action_space
        self._dtype = torch.from_numpy(np.zeros((), space.dtype)).dtype
        self.bounds: list[Tensor] = []
        if isinstance(space, spaces.Box):
            ends = space.low, space.high
            self.bounds = [torch.tensor(end, device=self.env.device) for end in ends]  # type: ignore[attr-defined]

    def taken(self, actions: Tensor, squashed: bool) -> Tensor:
        """A policy's actions as the environment takes them; see `source_of`."""
        if self.bounds:
            low, high = self.bounds
            if squashed:
                actions = low + 0.5 * (actions + 1) * (high - low)
            actions = torch.clamp(actions, low, high)
        return actions.to(self._dtype)

    def reset(self) -> Any:
        obs, infos = self.env.reset(seed=self._seeds[0])  # the vector has one seed
        self.mask = infos.get("action_mask")
        self._reset_seeds()
        return on_each(_numpy, obs)

    def step_async(self, actions: NDArray[Any]) -> None:
        actions = np.asarray(actions, self.action_space.dtype)
        self._actions = torch.tensor(actions, device=self.env.device)

    def step_wait(
        self,
    ) -> tuple[Any, NDArray[Any], NDArray[Any], list[dict[str, Any]]]:
        obs, rewards, terminated, truncated, infos = self.env.step(self._actions)
        self.mask = infos.get("action_mask")
        dones = _numpy(terminated | truncated)
        described = self.describe(dones, truncated & ~terminated, infos)
        return on_each(_numpy, obs), _numpy(rewards), dones, described

    def describe(
        self, dones: NDArray[Any], truncated: Tensor, infos: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """One step's infos as Stable-Baselines3 has them: a dict for each copy."""
        described: list[dict[str, Any]] = [
            {"TimeLimit.truncated": bool(flag)} for flag in _numpy(truncated)
        ]
        if dones.any():
            final = on_each(_numpy, infos["final_obs"])
            returns = _numpy(infos["episode_return"])
            lengths = _numpy(infos["episode_length"])
            for i in np.flatnonzero(dones):
                described[i]["terminal_observation"] = on_each(itemgetter(i), final)
                described[i]["episode"] = self.episode(
                    float(returns[i]), int(lengths[i])
                )
        return described

    def action_masks(self) -> Tensor | None:
        """What is allowed now [B, M]; None if the environment does not say."""
        method = getattr(self.env, masking.METHOD, None)
        return self.mask if method is None else method()

    def episode(self, total: float, length: int) -> Episode:
        seconds = round(time.monotonic() - self._began, 6)
        return {"r": total, "l": length, "t": seconds}

    def close(self) -> None:
        self.env.close()

    def has_attr(self, attr_name: str) -> bool:
        if attr_name == masking.METHOD:
            return hasattr(self.env, attr_name) or self.mask is not None
        return hasattr(self.env, attr_name)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(
        self, attr_name: str, value: Any, indices: VecEnvIndices = None
    ) -> None:
        owner = self.env
        while isinstance(owner, VectorWrapper) and attr_name not in vars(owner):
            owner = owner.env
        setattr(owner, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        chosen = list(self._get_indices(indices))
        if method_name == masking.METHOD:  # each copy has its own
            allowed = self.action_masks()
            assert allowed is not None
            masks = _numpy(allowed)
            return [masks[i] for i in chosen]
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result] * len(chosen)

    def env_is_wrapped(
        self,
        wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]],
        indices: VecEnvIndices = None,
    ) -> list[bool]:
        """True for `Monitor`: the episode statistics it would add are here."""
        monitored = wrapper_class is Monitor
        return [monitored] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        return [None] * self.num_envs


def is_tensor_env(env: object) -> bool:
    return isinstance(env, VectorEnv) and bool(env.metadata.get("tensor"))


class Step(NamedTuple):
    """One step of B environments, which have been reset where they are done.

    `final_obs` holds the observations before the reset, or None if nothing truncated.
    `rewards`, `dones` and `infos` are what callbacks see: as a `VecEnv` has them.
    """

    obs: Batch
    starts: Bool[Tensor, "B"]
    final_obs: Batch | None
    rewards: Any
    dones: Any
    infos: Any


class HostArray(NDArrayOperatorsMixin):
    """A tensor that is a numpy array to callbacks, copied when one looks at it.

    So nothing waits for the device as long as nobody looks. `tensor` is the original.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @cached_property
    def array(self) -> NDArray[Any]:
        return _numpy(self.tensor)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.array, dtype) if copy else np.asarray(self.array, dtype)

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any
    ) -> Any:
        inputs = tuple(x.array if isinstance(x, HostArray) else x for x in inputs)
        return getattr(ufunc, method)(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols that numpy or copy ask for
            raise AttributeError(name)
        return getattr(self.array, name)

    def __getitem__(self, index: Any) -> Any:
        return self.array[index]

    def __len__(self) -> int:
        return len(self.tensor)

    def __repr__(self) -> str:
        return repr(self.array)


class HostInfos(Sequence[dict[str, Any]]):
    """The infos of a tensor environment as a `VecEnv` has them, made on demand.

    `tensors` are the original.
    """

    def __init__(
        self,
        face: TensorVecEnv,
        dones: HostArray,
        ends: tuple[Tensor, Tensor],
        tensors: dict[str, Any],
    ) -> None:
        self.face, self.dones, self.ends = face, dones, ends
        self.tensors = tensors

    @cached_property
    def dicts(self) -> list[dict[str, Any]]:
        terminated, truncated = self.ends
        return self.face.describe(
            self.dones.array, truncated & ~terminated, self.tensors
        )

    def __getitem__(self, index: Any) -> Any:
        return self.dicts[index]

    def __len__(self) -> int:
        return len(self.dones)


# What can be wrong with a step, and is found when the rollout is complete.
FAULTS = {
    1: "saw an observation that is not finite",
    2: "allowed no action",
    4: "gave a reward that is not finite",
    8: "gave an observation that is not finite",
}


# what a `VecEnv` raises where it puts the observations of its copies together
STACKING = AssertionError, KeyError, TypeError, ValueError


def stacking(error: BaseException) -> bool:
    """Whether it was raised there, and not inside an environment."""
    frames = traceback.walk_tb(error.__traceback__)
    names = {frame.f_code.co_name for frame, _ in frames}
    return not names.isdisjoint({"_save_obs", "_stack_obs"})


def brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class Earned(NamedTuple):
    """What T steps of B environments earned, and how episodes ended.

    `faults` are sums of the keys of `FAULTS`, on the host.
    """

    rewards: Float[Tensor, "T B"]
    terminated: Bool[Tensor, "T B"]
    truncated: Bool[Tensor, "T B"]
    episodes: list[Episode]
    successes: list[Any]
    faults: Int[np.ndarray, "T B"]


@runtime_checkable
class Source(Protocol):
    """Steps environments for one rollout and keeps what they give."""

    def step(self, actions: Shaped[Tensor, "B *action"]) -> Step: ...

    def masks(self) -> Bool[Tensor, "B M"] | None:
        """What is allowed now; None if the environment does not say."""
        ...

    def earned(self, faults: Int[Tensor, "T B"]) -> Earned:
        """All since the beginning, on the agent's device; `faults` found so far."""
        ...


def source_of(
    env: VecEnv,
    device: torch.device,
    use_masking: bool = True,
    squashed: bool = False,
) -> Source:
    """`squashed`: actions come in [-1, 1], whatever the bounds of their space."""
    if isinstance(env, TensorVecEnv):
        if env.env.device.type != device.type:
            raise ValueError(
                f"env is on {env.env.device}, the agent on {device}: expected one "
                "device for both; pass the environment's to the agent"
            )
        return TensorSource(env, use_masking, squashed)
    return NumpySource(env, device, use_masking, squashed)


class TensorSource:
    """Nothing here waits for the device before `earned`."""

    def __init__(
        self, env: TensorVecEnv, use_masking: bool = True, squashed: bool = False
    ) -> None:
        self.face = env
        self.squashed = squashed
        self.masked = use_masking and env.has_attr(masking.METHOD)
        self.groups = masking.choices(env.action_space) if self.masked else []
        self.truncates = env.env.metadata.get("truncates") is not False
        self.steps: list[tuple[Tensor, ...]] = []
        self.forms = {
            key: (
                torch.Size([env.num_envs, *(part.shape or ())]),
                torch.from_numpy(np.zeros((), part.dtype)).dtype,
            )
            for key, part in parts(env.observation_space)
        }
        self.rows = torch.Size([env.num_envs])

    def step(self, actions: Shaped[Tensor, "B *action"]) -> Step:
        return self.book(*self.face.env.step(self.face.taken(actions, self.squashed)))

    def book(
        self,
        obs: Any,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        infos: dict[str, Any],
    ) -> Step:
        """Keeps what a step of the environment gave."""
        for key, x in parts(obs):
            shape, dtype = self.forms[key]
            if x.shape != shape or x.dtype != dtype:
                named = f"{key} {x.dtype}".strip()
                raise ValueError(
                    f"the environment gave an observation {named} {list(x.shape)} at "
                    f"step {len(self.steps)} of the rollout: expected {dtype} "
                    f"{list(shape)}; repair it, or its observation space"
                )
        if rewards.shape != self.rows or terminated.shape != self.rows:
            raise ValueError(
                f"the environment gave rewards {list(rewards.shape)} and terminated "
                f"{list(terminated.shape)}: expected {list(self.rows)}, one for each "
                "copy; repair it"
            )
        dones = terminated | truncated
        totals = infos["episode_return"], infos["episode_length"]
        self.steps.append((rewards, terminated, truncated, *totals))
        self.face.mask = infos.get("action_mask")
        final_obs = infos["final_obs"] if self._may_truncate(truncated) else None
        seen = HostArray(dones)
        described = HostInfos(self.face, seen, (terminated, truncated), infos)
        return Step(obs, dones, final_obs, HostArray(rewards), seen, described)

    def masks(self) -> Bool[Tensor, "B M"] | None:
        if not self.masked:
            return None
        masks = self.face.action_masks()
        expected = self.face.num_envs, sum(self.groups)
        if masks is None or masks.shape != expected:
            given = "none" if masks is None else list(masks.shape)
            raise ValueError(
                f"the environment's action masks are {given}: expected booleans "
                f"{list(expected)} for {self.face.action_space}, at each step"
            )
        return masks.bool()

    def _may_truncate(self, truncated: Tensor) -> bool:
        """On a CPU the answer is free; elsewhere asking costs more than valuing all."""
        if self.truncates and truncated.device.type == "cpu":
            return bool(truncated.any())
        return self.truncates

    def earned(self, faults: Int[Tensor, "T B"]) -> Earned:
        rewards, terminated, truncated, returns, lengths = (
            torch.stack(x) for x in zip(*self.steps, strict=True)
        )
        ended = terminated | truncated
        faults = faults + 4 * ~rewards.isfinite()
        table = torch.stack([x.double() for x in (ended, returns, lengths, faults)])
        ended_, returns_, lengths_, faults_ = table.cpu().numpy()
        chosen = ended_.astype(bool)
        pairs = zip(returns_[chosen], lengths_[chosen], strict=True)
        episodes = [self.face.episode(float(r), int(n)) for r, n in pairs]
        wrong = faults_.astype(int)
        return Earned(rewards, terminated, truncated, episodes, [], wrong)


class NumpySource:
    """Any `VecEnv`. What the policy does not need stays on the host."""

    def __init__(
        self,
        env: VecEnv,
        device: torch.device,
        use_masking: bool = True,
        squashed: bool = False,
    ) -> None:
        self.env = env
        self.squashed = squashed
        self.masked = use_masking and masking.is_masking_supported(env)
        if self.masked:
            masking.choices(env.action_space)  # says which spaces have masks
        self.device = device
        self.rewards: list[NDArray[Any]] = []
        self.dones: list[NDArray[Any]] = []
        self.truncated: list[NDArray[Any]] = []
        self.episodes: list[Episode] = []
        self.successes: list[Any] = []
        self.none = np.zeros(env.num_envs, bool)
        self.space = env.action_space
        self.shapes = {
            key: (env.num_envs, *(part.shape or ()))
            for key, part in parts(env.observation_space)
        }
        self.normalize = unwrap_vec_normalize(env)
        self.first: tuple[int, int, int] | None = None  # fault, its step, its copy
        if "old_obs" in vars(self.normalize or self):  # not before its first reset
            self._look(False)

    def step(self, actions: Shaped[Tensor, "B *action"]) -> Step:
        played = actions.cpu().numpy()
        if isinstance(self.space, spaces.Box):
            low, high = self.space.low, self.space.high
            if self.squashed:
                played = low + 0.5 * (played + 1) * (high - low)
            played = np.clip(played, low, high)
        try:
            obs, rewards, dones, infos = self.env.step(
                played.astype(self.space.dtype, copy=False)
            )
        except STACKING as error:
            if not stacking(error):
                raise
            raise self._misfit(f"does not fit ({brief(error)})") from error
        for key, x in parts(obs):
            if x.shape != self.shapes.get(key) or x.dtype.kind not in "biuf":
                raise self._misfit(f"{key or 'is'} {x.dtype} {list(x.shape)}")
        truncated, final_obs = self.none, None
        if dones.any():
            try:
                truncated, final_obs = self._ended(obs, dones, infos)
            except STACKING as error:  # the last one of an episode
                raise self._misfit(f"does not fit ({brief(error)})") from error
        self._look()
        self.rewards.append(rewards.copy())
        self.dones.append(dones.copy())
        self.truncated.append(truncated)
        # copies: a VecEnv may write into its arrays again
        seen = on_each(lambda x: torch.from_numpy(x.copy()).to(self.device), obs)
        starts = torch.from_numpy(self.dones[-1]).to(self.device)
        # these very rewards are learned from: a callback may change them in place
        return Step(seen, starts, final_obs, self.rewards[-1], dones, infos)

    def masks(self) -> Bool[Tensor, "B M"] | None:
        if not self.masked:
            return None
        masks = masking.get_action_masks(self.env)
        masks = masking.as_masks(self.space, masks, self.env.num_envs)
        return torch.from_numpy(masks).to(self.device)

    def _look(self, stepped: bool = True) -> None:
        """For what is not finite before a `VecNormalize`, which passes it on to all
        copies."""
        normalize = self.normalize
        if normalize is None or self.first is not None:
            return
        t = len(self.rewards)
        if stepped and not (fine := np.isfinite(normalize.old_reward)).all():
            self.first = 4, t, int(np.argmin(fine))
            return
        for _, x in parts(normalize.old_obs):
            if x.dtype.kind == "f" and not (fine := np.isfinite(x)).all():
                self.first = 1, t + stepped, int(np.argwhere(~fine)[0, 0])

    def _misfit(self, what: str) -> ValueError:
        return ValueError(
            f"an observation {what} at step {len(self.rewards)} of the rollout: "
            f"expected {self.env.num_envs} of {self.env.observation_space}; repair the "
            "environment, or its observation space"
        )

    def _ended(
        self, obs: Any, dones: NDArray[Any], infos: Sequence[dict[str, Any]]
    ) -> tuple[NDArray[Any], Batch | None]:
        """Who was truncated, and the observations before their resets."""
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        truncated &= dones
        for done, info in zip(dones, infos, strict=True):
            if "episode" in info:
                self.episodes.append(info["episode"])
            if done and "is_success" in info:
                self.successes.append(info["is_success"])
        if not truncated.any():
            return truncated, None
        ended = np.flatnonzero(truncated)

        def final(now: NDArray[Any], *last: Any) -> Tensor:
            now = now.copy()
            now[ended] = last
            return torch.from_numpy(now).to(self.device)

        lasts = [infos[int(i)]["terminal_observation"] for i in ended]
        return truncated, on_each(final, obs, *lasts)

    def earned(self, faults: Int[Tensor, "T B"]) -> Earned:
        dones, truncated = np.stack(self.dones), np.stack(self.truncated)
        rewards = np.stack(self.rewards).astype(np.float32)
        wrong = faults.cpu().numpy() + 4 * ~np.isfinite(rewards)
        if self.first is not None:
            fault, t, copy = self.first
            last = t == len(wrong)
            wrong[:] = 0
            wrong[t - last, copy] = 8 if last else fault
        return Earned(
            torch.from_numpy(rewards).to(self.device),
            torch.from_numpy(dones & ~truncated).to(self.device),
            torch.from_numpy(truncated).to(self.device),
            self.episodes,
            self.successes,
            wrong,
        )


def _numpy(x: Tensor) -> NDArray[Any]:
    return x.cpu().numpy().copy()
