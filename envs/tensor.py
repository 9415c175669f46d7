"""Environments whose B copies are one set of tensors.

Letters in shapes: B copies, n uniform numbers per copy.

A task is three pure functions, `start`, `advance` and `observe`; `TensorVectorEnv`
makes a `gymnasium.vector.VectorEnv` of them and owns what all tasks share: random
numbers, time limit, autoreset, statistics, checks. `SingleEnv` is the same task for
everyone else: one copy, in numpy.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, no_type_check

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Float32, Int64
from numba import njit
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlrnn.device import resolve_device
from rlrnn.seeding import derive

State = dict[str, Tensor]
Infos = dict[str, Tensor]
# observations, rewards, terminated, truncated, infos
Told = tuple[Tensor, Float32[Tensor, "B"], Bool[Tensor, "B"], Bool[Tensor, "B"], Infos]

# ---------------------------------------------------------------- random numbers
# Number j of copy i is mix(stream_i + j·GAMMA): no generator, no order of evaluation,
# so a copy draws the same numbers in any company and on any device. Counter and GAMMA
# as in SplitMix64 (Steele et al. 2014), the mixer is Evensen's moremur (2019). int64
# wraps like uint64, but `>>` copies the sign bit, hence the masks.

GAMMA = 0x9E3779B97F4A7C15 - 2**64
_HALF = torch.tensor(0.5, dtype=torch.float32)


def _mix(x: Int64[Tensor, "*any"]) -> Int64[Tensor, "*any"]:
    """moremur without its last shift, which would leave the top 27 bits alone."""
    x = ((x >> 27) & (2**37 - 1)).bitwise_xor_(x).mul_(0x3C79AC492BA7B653)
    return ((x >> 33) & (2**31 - 1)).bitwise_xor_(x).mul_(0x1C69B3F74AC4AE35)


def streams(
    seed: int, num_envs: int, device: torch.device | str = "cpu"
) -> Int64[Tensor, "B 1"]:
    """The start of copy i's stream: a hash of (seed, i), whatever `num_envs` is."""
    index = torch.arange(1, num_envs + 1, device=device)
    return _mix(index * GAMMA + derive(seed, "envs"))[:, None]


def offsets(n: int, device: torch.device | str = "cpu") -> Int64[Tensor, "n"]:
    """What `uniform` adds to a stream to draw n numbers."""
    return torch.arange(1, n + 1, device=device) * GAMMA


def uniform(
    stream: Int64[Tensor, "B 1"], offsets: Int64[Tensor, "n"]
) -> tuple[Float32[Tensor, "B n"], Int64[Tensor, "B 1"]]:
    """The next n numbers of each stream, uniform in [0, 1), and the stream after them.

    They are multiples of 2^-24. `(u * m).long()` is a fair integer below m for any
    m ≪ 2^24, and never m itself: (1 - 2^-24)·m rounds down in float32.
    """
    return _numbers(stream, offsets.view(1, 1, -1))[0], stream + offsets[-1:]


def _numbers(
    stream: Int64[Tensor, "B 1"], offsets: Int64[Tensor, "T 1 n"]
) -> Float32[Tensor, "T B n"]:
    """Those of T steps; on a CPU compiled, ten times as fast as torch's operations."""
    if stream.device.type != "cpu":
        return _uniform(stream + offsets)
    shape = len(offsets), len(stream), offsets.shape[2]
    u = torch.empty(shape, dtype=torch.float32)
    _compiled_uniform(stream.numpy(), offsets.numpy(), u.numpy())
    return u


def _uniform(counters: Int64[Tensor, "*any"]) -> Float32[Tensor, "*any"]:
    top = _mix(counters) >> 40  # signed: -2^23 ... 2^23 - 1
    return torch.add(_HALF, top, alpha=2**-24)


@no_type_check
@njit(nogil=True, cache=True)
def _compiled_uniform(stream, offsets, u):
    """u[t, i, j] = `_uniform` of stream[i, 0] + offsets[t, 0, j], in one go."""
    for t in range(u.shape[0]):
        for i in range(u.shape[1]):
            for j in range(u.shape[2]):
                x = np.uint64(stream[i, 0] + offsets[t, 0, j])
                x = (x ^ (x >> np.uint64(27))) * np.uint64(0x3C79AC492BA7B653)
                x = (x ^ (x >> np.uint64(33))) * np.uint64(0x1C69B3F74AC4AE35)
                top = np.float32(np.int64(x) >> 40)
                u[t, i, j] = np.float32(0.5) + top * np.float32(2**-24)


def normal(u: Float32[Tensor, "*any"]) -> Float32[Tensor, "*any"]:
    """Standard normal numbers, the quantiles at u + 2^-25: so none is infinite."""
    return (2 * u).sub_(1 - 2**-24).erfinv_().mul_(math.sqrt(2))


def choose(
    allowed: Bool[Tensor, "B n"], u: Float32[Tensor, "B 1"]
) -> Int64[Tensor, "B 1"]:
    """The index of one of the True in each row, all equally likely; n if none is."""
    count = allowed.cumsum(dim=1, dtype=torch.int32)
    nth = (u * count[:, -1:]).int()
    return (count <= nth).sum(dim=1, keepdim=True)


# ------------------------------------------------------------------- the two faces


class TensorVectorEnv(VectorEnv[Tensor, Tensor, Tensor], ABC):
    """B copies of a task: gymnasium's `VectorEnv`, with tensors on `device`.

    `step(actions)` gives `obs, rewards, terminated, truncated, infos`. A copy that is
    done is reset in the same step (SAME_STEP): `obs` then opens the next episode.
    `infos` always holds these tensors, for all copies. If none is done, `final_obs` may
    be `obs` itself.

    | key              |          | meaning                                           |
    |------------------|----------|---------------------------------------------------|
    | `final_obs`      | [B, ...] | `obs` as before the autoreset; the same elsewhere |
    | `episode_return` | [B]      | rewards of the episode so far, with this step     |
    | `episode_length` | [B]      | steps of the episode so far, with this step       |

    `truncated` is set after `max_episode_steps` steps, unless the task `terminated`.
    Actions must lie in `single_action_space`. They are checked for shape, dtype and
    device; for their values on a CPU only, where that takes 2 µs (1,024 copies), as
    nothing in `step` waits for an accelerator. There a wrong value goes unseen, or ends
    in an error of the device. Finite numbers beyond the bounds of a `Box` are clipped.

    `reset(seed=s)` gives copy i the episodes of (s, i), the same for every `num_envs`;
    `reset()` starts new episodes further along the same streams. All that changes is
    `state`, tensors that are replaced and never written to; `state_dict` and
    `load_state_dict` resume to the same bits.

    A task is a subclass with `start`, `advance` and `observe`: pure functions, row by
    row, without a Python loop over copies and without waiting for the device. They
    take random numbers as an argument, uniform in [0, 1): `start_draws` and
    `step_draws` say how many.
    """

    metadata: dict[str, Any] = {
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "tensor": True,
        "render_modes": [],
    }
    start_draws: ClassVar[int] = 0
    step_draws: ClassVar[int] = 0

    def __init__(
        self,
        num_envs: int,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        max_episode_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: give at least 1")
        self.num_envs = num_envs
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.max_episode_steps = max_episode_steps
        example = torch.from_numpy(
            np.zeros(action_space.shape or (), action_space.dtype)
        )
        self._action_dtype = example.dtype
        self._action_shape = (num_envs, *example.shape)
        found = resolve_device(str(device))
        self.device = torch.empty(0, device=found).device  # "cuda" is now "cuda:0"
        self.state: State = {}
        self._may_read = self.device.type == "cpu"  # elsewhere it would have to wait
        draws = self.start_draws + self.step_draws
        # Drawn for many steps in one go, which takes hardly longer than for one
        steps = max(1, min(16, 2**20 // (num_envs * max(1, draws))))
        numbers = offsets(steps * draws, self.device).view(steps, 1, draws)
        self._start_offsets = numbers[..., : self.start_draws].contiguous()
        self._step_offsets = numbers[..., self.start_draws :].contiguous()
        self._ends = (offsets(steps, self.device) * draws).view(steps, 1, 1)
        # Of the steps ahead, the next one last: stream, numbers for `start` and for
        # `advance`, stream after them
        self._ahead: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @abstractmethod
    def start(self, u: Float32[Tensor, "k n"]) -> State:
        """The state in which episodes begin, for k of the copies; tensors [k, ...]."""

    @abstractmethod
    def advance(
        self, state: State, actions: Tensor, u: Float32[Tensor, "B n"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        """The next state (the keys of `start`), the rewards, and who terminated.

        `state["episode_length"]` holds the steps before this one.
        """

    @abstractmethod
    def observe(self, state: State) -> Tensor:
        """Observations [k, ...] of k copies; memory of their own, not the state's."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, Infos]:
        if options:
            raise ValueError(f"options is {options}: this task has none, leave it out")
        super().reset(seed=seed)
        if seed is not None or not self.state:
            assert self.np_random_seed is not None  # drawn on first use without a seed
            stream = streams(self.np_random_seed, self.num_envs, self.device)
        else:
            stream = self.state["stream"]
        self.state = self._first_state(stream)
        return self.observe(self.state), {}

    def step(self, actions: Tensor) -> Told:
        if not self.state:
            raise ResetNeeded("step() was called before reset(): call reset() first")
        self._check(actions)
        drawn = self._draw(self.state["stream"])
        self.state, told = self._played(self.state, actions, *drawn)
        return told

    def stepped(self, state: State, actions: Tensor) -> tuple[State, Told]:
        """The state after a `step` from `state`, and what that gives; nothing else
        changes. On a device nothing is looked at, so that a captured graph can hold it
        for as long as the `surroundings` stay as they are."""
        self._check(actions)
        stream = state["stream"]
        u_start = _numbers(stream, self._start_offsets[:1])[0]
        u_step = _numbers(stream, self._step_offsets[:1])[0]
        return self._played(state, actions, u_start, u_step, stream + self._ends[0])

    def surroundings(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        """What `stepped` may depend on beside its arguments: settings, and tensors."""
        rest = {k: v for k, v in vars(self).items() if k not in ("state", "_ahead")}
        plain = (bool, int, float, str)
        settings = tuple((k, v) for k, v in rest.items() if isinstance(v, plain))
        return settings, [x for x in tree_leaves(rest) if isinstance(x, Tensor)]

    def _played(
        self,
        before: State,
        actions: Tensor,
        u_start: Float32[Tensor, "B n"],
        u_step: Float32[Tensor, "B m"],
        stream: Int64[Tensor, "B 1"],
    ) -> tuple[State, Told]:
        after, rewards, terminated = self.advance(before, actions, u_step)
        lengths = before["episode_length"] + 1
        returns = before["episode_return"] + rewards
        if self.max_episode_steps is None:
            truncated, done = torch.zeros_like(terminated), terminated
        else:
            late = lengths >= self.max_episode_steps
            truncated, done = late > terminated, late | terminated  # late and not term.
        final_obs = self.observe(after)
        infos = {
            "final_obs": final_obs,
            "episode_return": returns,
            "episode_length": lengths,
        }
        rows = done.nonzero().view(-1) if self._may_read else None
        obs = final_obs
        if rows is None or len(rows):
            obs, after = self._restart(done, rows, u_start, final_obs, after)
        after = after | {
            "stream": stream,
            "episode_length": lengths.masked_fill(done, 0),
            "episode_return": returns.masked_fill(done, 0.0),
        }
        return after, (obs, rewards, terminated, truncated, infos)

    def _restart(
        self,
        done: Bool[Tensor, "B"],
        rows: Int64[Tensor, "k"] | None,
        u: Float32[Tensor, "B n"],
        final_obs: Tensor,
        after: State,
    ) -> tuple[Tensor, State]:
        """Observation and state, with the first ones where an episode is done.

        Where it costs little to know which `rows` those are, they alone are made.
        """
        fresh = self.start(u if rows is None else u.index_select(0, rows))

        def put(new: Tensor, old: Tensor) -> Tensor:
            if rows is None:
                return torch.where(done.view(-1, *[1] * (new.ndim - 1)), new, old)
            return old.index_copy(0, rows, new)

        state = {key: put(value, after[key]) for key, value in fresh.items()}
        return put(self.observe(fresh), final_obs), state

    def _draw(
        self, stream: Int64[Tensor, "B 1"]
    ) -> tuple[Float32[Tensor, "B n"], Float32[Tensor, "B m"], Int64[Tensor, "B 1"]]:
        """Numbers for `start` and for `advance`, and the stream after them.

        Those of the steps to come are drawn, too, and kept for as long as the stream is
        the one that was left: after a reset, or a resumption, it is another.
        """
        if not self._ahead or self._ahead[-1][0] is not stream:
            after = (stream + self._ends).unbind()
            starts = _numbers(stream, self._start_offsets).unbind()
            steps = _numbers(stream, self._step_offsets).unbind()
            ahead = zip((stream, *after[:-1]), starts, steps, after, strict=True)
            self._ahead = list(ahead)[::-1]
        return self._ahead.pop()[1:]

    def state_dict(self) -> State:
        """A copy of all that a later `load_state_dict` needs; empty before `reset`."""
        return {key: value.clone() for key, value in self.state.items()}

    def load_state_dict(self, state: State) -> None:
        """Continue where `state_dict` was taken; any device, the same task and B."""
        ours = self._first_state(streams(0, self.num_envs, self.device))
        for key in ours.keys() | state.keys():
            given, expected = _form(state.get(key)), _form(ours.get(key))
            if given != expected:
                raise ValueError(
                    f"state[{key!r}] is {given}, expected {expected}: "
                    "load it into the same task with the same num_envs"
                )
        self.state = {key: state[key].to(self.device, copy=True) for key in ours}

    def _first_state(self, stream: Int64[Tensor, "B 1"]) -> State:
        u, _, stream = self._draw(stream)
        zeros = torch.zeros(self.num_envs, device=self.device, dtype=torch.float32)
        return {
            "stream": stream,
            "episode_length": zeros.long(),
            "episode_return": zeros,
            **self.start(u),
        }

    def _check(self, actions: Tensor) -> None:
        if not (
            isinstance(actions, Tensor)
            and actions.shape == self._action_shape
            and actions.dtype == self._action_dtype
            and actions.device == self.device
        ):
            given = _form(actions)
            if isinstance(actions, Tensor):
                given += f" on {actions.device}"
            raise ValueError(
                f"actions are {given}, expected {self._action_dtype} "
                f"{list(self._action_shape)} on {self.device}: convert them"
            )
        if self._may_read and not self._all_allowed(actions):
            allowed = self._allowed(actions)
            row = int((~allowed).view(self.num_envs, -1).any(dim=1).int().argmax())
            raise ValueError(
                f"actions[{row}] is {actions[row].tolist()}, expected a member of "
                f"{self.single_action_space}"
            )

    def _all_allowed(self, actions: Tensor) -> bool:
        """As `_allowed`, of all at once and in few operations."""
        if isinstance(self.single_action_space, Discrete):
            low, high = actions.aminmax()
            return 0 <= int(low) and int(high) < int(self.single_action_space.n)
        if isinstance(self.single_action_space, Box):
            return math.isfinite(actions.sum().item())
        return bool(self._allowed(actions).all())

    def _allowed(self, actions: Tensor) -> Bool[Tensor, "*any"]:
        space = self.single_action_space
        if isinstance(space, Box):
            return actions.isfinite()
        assert isinstance(space, Discrete | MultiDiscrete)
        sizes = torch.as_tensor(space.n if isinstance(space, Discrete) else space.nvec)
        return (actions >= 0) & (actions < sizes)


def _form(value: object) -> str:
    """`torch.int64 [8]`, or `nothing` if missing, for messages."""
    if value is None:
        return "nothing"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)}"


class SingleEnv(gymnasium.Env[Any, Any]):
    """One copy of a tensor task as an ordinary `gymnasium.Env`, in numpy.

    Seeded alike, it plays the episodes of copy 0 of a `TensorVectorEnv`, step by step:
    the task has reset itself when an episode ends, and `reset()` then shows that start.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, vector: TensorVectorEnv) -> None:
        if vector.num_envs != 1:
            raise ValueError(
                f"num_envs is {vector.num_envs}: SingleEnv is for one copy"
            )
        self.vector = vector
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space
        self._next_start: Tensor | None = None  # known when an episode is over

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None and not self.vector.state:
            seed = self.np_random_seed  # so that this seed repeats the run
        if seed is None and self._next_start is not None and not options:
            obs = self._next_start
        else:
            obs, _ = self.vector.reset(seed=seed, options=options)
        self._next_start = None
        return _numpy(obs), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._next_start is not None:
            raise ResetNeeded("step() after the end of an episode: call reset() first")
        if not self.action_space.contains(action):
            raise ValueError(
                f"action is {action!r}, expected a member of {self.action_space}"
            )
        actions = torch.as_tensor(
            np.asarray(action, self.action_space.dtype), device=self.vector.device
        )
        obs, rewards, terminated, truncated, infos = self.vector.step(actions[None])
        ended = bool(terminated), bool(truncated)
        if any(ended):
            self._next_start = obs
        return _numpy(infos["final_obs"]), float(rewards), *ended, {}


def _numpy(batch: Tensor) -> Any:
    """Row 0 as numpy: an array, or a scalar where the space has no axes."""
    return batch[0].cpu().numpy()[()]
