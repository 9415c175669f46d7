"""Diagnostics of memory: one thing to remember, and a dial for how long.

Each asks for something shown `delay` or `length` steps before, and for nothing else:
what an agent cannot do here it has no memory for.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: give at least {least}")


class TMaze(TensorVectorEnv):
    """A sign at the start of a corridor says where to turn at its end.

    The task of Bakker ("Reinforcement Learning with Long Short-Term Memory", NIPS
    2001), with his rewards.

    | level  | length N | steps L = 10·N | best | memoryless | chance |
    |--------|----------|----------------|------|------------|--------|
    | easy   | 10       | 100            | 4    | 1.95       | -4.641 |
    | medium | 30       | 300            | 4    | 1.95       | -15.82 |
    | hard   | 70       | 700            | 4    | 1.95       | -36.44 |

    | observation | at                   | Bakker's bits |
    |-------------|----------------------|---------------|
    | 0           | the corridor         | 101           |
    | 1           | the junction         | 010           |
    | 2           | the start: go north  | 011           |
    | 3           | the start: go south  | 110           |

    - Observation: `Discrete(4)`, where he has three bits.
    - Action: `Discrete(4)`: north, east, south, west.
    - Reward: 4 for the right turn at the junction, -0.1 for the wrong one; -0.1 for a
      step against a wall, which leads nowhere; else 0.
    - Start: at the west end, both signs equally likely; the junction is N steps east.
    - End: terminated by a turn at the junction, else truncated after L steps.

    Returns (undiscounted): without memory at most (4 - 0.1) / 2: what is done at the
    junction cannot depend on the sign.
    """

    start_draws: ClassVar[int] = 1
    NORTH, EAST, SOUTH, WEST = range(4)

    def __init__(
        self,
        num_envs: int = 1,
        *,
        length: int = 10,
        max_episode_steps: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least("length", length, 1)
        steps = 10 * length if max_episode_steps is None else max_episode_steps
        at_least("max_episode_steps", steps, 1)
        super().__init__(
            num_envs, Discrete(4), Discrete(4), max_episode_steps=steps, device=device
        )
        self.length = length
        self._start = torch.zeros(num_envs, device=self.device, dtype=torch.int64)
        # By what happened: nothing, a wall, the wrong turn, the right one
        self._rewards = torch.tensor(
            [0.0, -0.1, -0.1, 4.0], device=self.device, dtype=torch.float32
        )
        self._moves = torch.tensor([0, 1, 0, -1], device=self.device)

    def start(self, u: Float32[Tensor, "k 1"]) -> State:
        south = u[:, 0] >= 0.5
        return {"south": south, "place": self._start[: len(u)]}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        before, south = state["place"], state["south"]
        place = (before + self._moves[actions]).clamp_(0, self.length)
        still = place == before
        turned = still & (before == self.length) & (actions != self.EAST)
        right = turned & ((actions == self.SOUTH) == south)
        happened = still.long() + turned + right
        return {"south": south, "place": place}, self._rewards[happened], turned

    def observe(self, state: State) -> Int64[Tensor, "k"]:
        place = state["place"]
        sign = torch.where(place == 0, 2 + state["south"].long(), 0)
        return sign + (place == self.length)


class MemoryChain(TensorVectorEnv):
    """Bits are shown at first: after N steps, say the one that is asked for.

    The task of bsuite's memory_len and memory_size (Osband et al., "Behaviour Suite for
    Reinforcement Learning", ICLR 2020), step by step.

    | level  | length N | bits | steps = N+1 | best | memoryless | chance |
    |--------|----------|------|-------------|------|------------|--------|
    | easy   | 10       | 1    | 11          | 1    | 0          | 0      |
    | medium | 30       | 1    | 31          | 1    | 0          | 0      |
    | hard   | 100      | 1    | 101         | 1    | 0          | 0      |

    | observation       | values  |                                               |
    |-------------------|---------|-----------------------------------------------|
    | time left         | 0 ... 1 | 1, and once more 1, 1 - 1/N, 1 - 2/N ...      |
    | question          | 0 ...   | the bit asked for, in the last step; before 0 |
    | context, `bits` × | -1, 1   | the bits, at time 1; after that 0             |

    - Observation: `Box`, these numbers; bsuite has them in one row.
    - Action: `Discrete(2)`, the bit asked for: 0 if it was -1, 1 if it was 1.
    - Reward: for the last action 1 if right, -1 if wrong; before it 0.
    - Start: bits and question, all equally likely. As in bsuite the first observation
      is seen twice.
    - End: terminated after N+1 steps; never truncated.

    Returns (undiscounted): 0 without memory, if N > 1.
    """

    start_draws: ClassVar[int] = 2

    def __init__(
        self,
        num_envs: int = 1,
        *,
        length: int = 10,
        bits: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least("length", length, 1)
        if not 1 <= bits <= 20:
            raise ValueError(f"bits is {bits}: choose from 1 to 20")
        low = np.array([0.0, 0.0, *[-1.0] * bits], np.float32)
        high = np.array([1.0, max(1, bits - 1), *[1.0] * bits], np.float32)
        space = Box(low, high, dtype=np.float32)
        super().__init__(num_envs, space, Discrete(2), device=device)
        self.length, self.bits = length, bits
        self._bit = torch.arange(bits, device=self.device)
        self._start = torch.full((num_envs,), -1, device=self.device)
        self._choices = torch.tensor(
            [2**bits, bits], device=self.device, dtype=torch.float32
        )
        self._rewards = torch.tensor(
            [0.0, -1.0, 1.0], device=self.device, dtype=torch.float32
        )

    def start(self, u: Float32[Tensor, "k 2"]) -> State:
        context, query = (u * self._choices).long().unbind(1)
        return {"context": context, "query": query, "time": self._start[: len(u)]}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        time = state["time"] + 1
        over = time == self.length
        right = actions == (state["context"] >> state["query"] & 1)
        return state | {"time": time}, self._rewards[over + (over & right).long()], over

    def observe(self, state: State) -> Float32[Tensor, "k numbers"]:
        time = state["time"].clamp(min=0)
        left = (1 - time / self.length)[:, None]
        asked = (state["query"] * (time == self.length - 1))[:, None]
        context = 2 * (state["context"][:, None] >> self._bit & 1) - 1
        shown = context * (time == 0)[:, None]
        return torch.cat([left, asked, shown], dim=1)


class Copy(TensorVectorEnv):
    """A string is shown, symbol by symbol: after a delay, repeat it.

    The copying problem of Hochreiter and Schmidhuber ("Long Short-Term Memory", 1997)
    in the form of Arjovsky et al. ("Unitary Evolution Recurrent Neural Networks",
    2016), answered by actions.

    | level  | length S | delay D | symbols n | steps = 2S+D | memoryless = chance |
    |--------|----------|---------|-----------|--------------|---------------------|
    | easy   | 5        | 10      | 8         | 20           | -0.75               |
    | medium | 10       | 50      | 8         | 70           | -0.75               |
    | hard   | 10       | 200     | 8         | 220          | -0.75               |

    - Observation: `Discrete(n+2)`. The S symbols, 0 ... n-1; then D times n, a blank;
      then S times n+1: answer now.
    - Action: `Discrete(n)`, a symbol.
    - Reward: for each of the S answers, 1/S if right, -1/S if wrong; before that 0.
    - Start: the first symbol. All strings are equally likely.
    - End: terminated after the last answer; never truncated.

    Returns (undiscounted): the best is 1, always wrong is -1. Without memory, and by
    chance, 2/n - 1: all answers are given to one and the same observation.
    """

    start_draws: ClassVar[int] = 1
    step_draws: ClassVar[int] = 1

    def __init__(
        self,
        num_envs: int = 1,
        *,
        length: int = 10,
        delay: int = 50,
        symbols: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least("length", length, 1)
        at_least("delay", delay, 0)
        if not 2 <= symbols <= 64:
            raise ValueError(f"symbols is {symbols}: choose from 2 to 64")
        space = Discrete(symbols + 2)
        super().__init__(num_envs, space, Discrete(symbols), device=device)
        self.length, self.delay, self.symbols = length, delay, symbols
        self._asked_from = length + delay
        self._string = torch.zeros(
            num_envs, length, device=self.device, dtype=torch.int8
        )
        self._start = torch.zeros(num_envs, device=self.device, dtype=torch.int64)
        self._rewards = torch.tensor(
            [0.0, -1 / length, 1 / length], device=self.device, dtype=torch.float32
        )

    def start(self, u: Float32[Tensor, "k 1"]) -> State:
        symbol = (u * self.symbols).to(torch.int8)
        string = torch.cat([symbol, self._string[: len(u), 1:]], dim=1)
        return {"string": string, "time": self._start[: len(u)]}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        """`time` counts the observations before the one in sight."""
        string, time = state["string"], state["time"]
        place = (time - self._asked_from)[:, None]
        asked = string.gather(1, place.clamp(min=0))[:, 0]
        due = place[:, 0] >= 0
        rewards = self._rewards[due + (due & (actions == asked)).long()]

        time = time + 1
        place = time.clamp(max=self.length - 1)[:, None]
        drawn = (u * self.symbols).to(torch.int8)
        written = torch.where(
            time[:, None] < self.length, drawn, string.gather(1, place)
        )
        after = {"string": string.scatter(1, place, written), "time": time}
        return after, rewards, time == self._asked_from + self.length

    def observe(self, state: State) -> Int64[Tensor, "k"]:
        time = state["time"]
        place = time.clamp(max=self.length - 1)[:, None]
        shown = state["string"].gather(1, place)[:, 0].long()
        sign = self.symbols + (time >= self._asked_from).long()
        return torch.where(time < self.length, shown, sign)


class Adding(TensorVectorEnv):
    """Two of T numbers are marked as they are shown: say their sum at the end.

    The adding problem of Hochreiter and Schmidhuber ("Long Short-Term Memory", 1997),
    with numbers and marks as Le et al. ("A Simple Way to Initialize Recurrent Networks
    of Rectified Linear Units", 2015) have them, answered by an action.

    | level  | length T | steps = T | best | memoryless = 1/T | chance |
    |--------|----------|-----------|------|------------------|--------|
    | easy   | 10       | 10        | 1    | 0.1              | -2     |
    | medium | 50       | 50        | 1    | 0.02             | -2     |
    | hard   | 100      | 100       | 1    | 0.01             | -2     |

    - Observation: `Box(0, 1, (2,))`, the number and its mark: 1, or else 0.
    - Action: `Box(0, 2, (1,))`, the sum; what lies outside is clipped.
    - Reward: for the action after the last number 1 - 6·(action - sum)²; before it 0.
    - Start: the first number. Numbers are uniform in [0, 1); one place in the first
      half of the T is marked, and one in the second, all of them equally likely.
    - End: terminated after T steps; never truncated.

    Returns (undiscounted) lie between -23 and 1. To say 1 whatever is shown has the
    mean 0: the variance of the sum is 1/6. Without memory at most 1/T, for who says
    number + 1/2 where the last one is marked.
    """

    start_draws: ClassVar[int] = 3
    step_draws: ClassVar[int] = 1

    def __init__(
        self,
        num_envs: int = 1,
        *,
        length: int = 50,
        device: torch.device | str = "cpu",
    ) -> None:
        if length < 2 or length % 2:
            raise ValueError(f"length is {length}: choose an even number from 2")
        super().__init__(
            num_envs,
            Box(0.0, 1.0, (2,), np.float32),
            Box(0.0, 2.0, (1,), np.float32),
            device=device,
        )
        self.length = length
        self._halves = torch.tensor([0, length // 2], device=self.device)
        self._start = torch.zeros(num_envs, device=self.device, dtype=torch.int64)

    def start(self, u: Float32[Tensor, "k 3"]) -> State:
        places = (u[:, :2] * (self.length // 2)).long() + self._halves
        marked = (places == 0).any(dim=1)
        number = u[:, 2]
        return {
            "places": places,
            "time": self._start[: len(u)],
            "sum": number * marked,
            "seen": torch.stack([number, marked.float()], dim=1),
        }

    def advance(
        self, state: State, actions: Float32[Tensor, "B 1"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        """`time` is the place of the number in sight, `sum` holds it, if marked."""
        time = state["time"] + 1
        over = time == self.length
        error = actions[:, 0].clamp(0.0, 2.0) - state["sum"]
        rewards = (1 - 6 * error.square()) * over
        marked = (state["places"] == time[:, None]).any(dim=1)
        number = u[:, 0]
        after = {
            "places": state["places"],
            "time": time,
            "sum": torch.addcmul(state["sum"], number, marked.float()),
            "seen": torch.stack([number, marked.float()], dim=1),
        }
        return after, rewards, over

    def observe(self, state: State) -> Float32[Tensor, "k 2"]:
        return state["seen"].clone()


class DelayedXor(TensorVectorEnv):
    """Two bits are shown, apart from each other: later, are they different?

    The temporal exclusive or of Elman ("Finding Structure in Time", 1990), with delays
    between the bits and before the answer.

    | level  | delay D | steps = 2D+3 | best | memoryless | chance |
    |--------|---------|--------------|------|------------|--------|
    | easy   | 5       | 13           | 1    | 0          | 0      |
    | medium | 20      | 43           | 1    | 0          | 0      |
    | hard   | 50      | 103          | 1    | 0          | 0      |

    - Observation: `Discrete(4)`. A bit, 0 or 1; D times 2, a blank; a bit; D times 2;
      then 3: answer now.
    - Action: `Discrete(2)`, 1 if the bits are different, 0 if they are equal.
    - Reward: for the last action 1 if right, -1 if wrong; before it 0.
    - Start: the first bit. All four pairs are equally likely.
    - End: terminated after the answer; never truncated.

    Returns (undiscounted): 0 without memory, and also for who remembers one of the bits
    only: it tells nothing about the answer.
    """

    start_draws: ClassVar[int] = 2

    def __init__(
        self,
        num_envs: int = 1,
        *,
        delay: int = 5,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least("delay", delay, 0)
        super().__init__(num_envs, Discrete(4), Discrete(2), device=device)
        self.delay = delay
        self._last = 2 * delay + 2
        self._start = torch.zeros(num_envs, device=self.device, dtype=torch.int64)
        self._rewards = torch.tensor(
            [0.0, -1.0, 1.0], device=self.device, dtype=torch.float32
        )
        # What each step shows: the first bit, the second, a blank, the question
        shows = torch.full((self._last + 2,), 2, device=self.device)
        shows[0], shows[delay + 1], shows[self._last :] = 0, 1, 3
        self._shows = shows

    def start(self, u: Float32[Tensor, "k 2"]) -> State:
        return {"bits": u >= 0.5, "time": self._start[: len(u)]}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        bits, time = state["bits"], state["time"]
        over = time == self._last
        right = actions == (bits[:, 0] ^ bits[:, 1])
        rewards = self._rewards[over + (over & right).long()]
        return {"bits": bits, "time": time + 1}, rewards, over

    def observe(self, state: State) -> Int64[Tensor, "k"]:
        shows = self._shows[state["time"]]
        bit = state["bits"].gather(1, shows.clamp(max=1)[:, None])[:, 0]
        return torch.where(shows < 2, bit, shows)


# --------------------------------------------------------------------- single faces


def t_maze(**kwargs: Any) -> SingleEnv:
    """`TMaze` as an ordinary gymnasium environment."""
    return SingleEnv(TMaze(**kwargs))


def memory_chain(**kwargs: Any) -> SingleEnv:
    """`MemoryChain` as an ordinary gymnasium environment."""
    return SingleEnv(MemoryChain(**kwargs))


def copy(**kwargs: Any) -> SingleEnv:
    """`Copy` as an ordinary gymnasium environment."""
    return SingleEnv(Copy(**kwargs))


def adding(**kwargs: Any) -> SingleEnv:
    """`Adding` as an ordinary gymnasium environment."""
    return SingleEnv(Adding(**kwargs))


def delayed_xor(**kwargs: Any) -> SingleEnv:
    """`DelayedXor` as an ordinary gymnasium environment."""
    return SingleEnv(DelayedXor(**kwargs))
