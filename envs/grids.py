"""Battleship and Minesweeper on a board that is never shown, step by step as in POPGym.

Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement Learning", ICLR
2023. Letters: B copies, N tiles of a board, row by row.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from rlrnn.envs.tensor import (
    SingleEnv,
    State,
    TensorVectorEnv,
    choose,
    offsets,
    streams,
    uniform,
)


def tile(actions: Int64[Tensor, "B 2"], size: int) -> Int64[Tensor, "B"]:
    """(row, column) as a number of 0 ... N-1."""
    return torch.add(actions[:, 1], actions[:, 0], alpha=size)


# ---------------------------------------------------------------------- Battleship


class Battleship(TensorVectorEnv):
    """Sink four ships on a board that is not shown: where did I shoot, and hit?

    The task of POPGym (Morad et al., ICLR 2023), step by step.

    | level  | size | steps = N | density | sweep  | memoryless | chance |
    |--------|------|-----------|---------|--------|------------|--------|
    | easy   | 8    | 64        | 0.56    | 0.166  | -0.44      | -0.45  |
    | medium | 10   | 100       | 0.60    | 0.173  | -0.40      | -0.42  |
    | hard   | 12   | 144       | 0.61    | 0.178  | -0.39      | -0.40  |

    - Observation: `Discrete(2)`, 1 if the last shot was a hit, else 0. A ship's tile
      counts once: shooting there again is a miss.
    - Action: `MultiDiscrete([size, size])`, row and column to shoot at.
    - Reward: 1/12 for a hit, -1/(N-12) for a miss; the ships (2, 3, 3, 4) cover 12.
    - Start: the ships lie anywhere they fit, across or down, next to each other too:
      each in turn, all its free places equally likely. Observation 0.
    - End: terminated with the last hit, else truncated after N steps. POPGym reports an
      end by a hit on the very last step as truncated, too.

    Laying ships takes longer than a step: `fleets` boards are drawn once, by that law
    from `fleets_seed`, and an episode takes one of them at random.

    Returns (undiscounted): 1 is the best, by who knows the board; never a hit gives
    -N/(N-12). The other columns are measured means. Density, with memory, shoots
    where most places of ships are left, one with h hits counted 5^h times: the best
    player known here, not an optimum. Sweep takes row by row. Memoryless is the best
    found by gradient ascent over all policies that see the observation only, an
    estimate, with -0.35 as the ceiling to call a policy memoryless. Who is shown the
    last action too, as by POPGym's wrapper, can sweep without memory.
    """

    start_draws: ClassVar[int] = 1

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 8,
        ships: Sequence[int] = (2, 3, 3, 4),
        fleets: int = 2**14,
        fleets_seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        tiles, needed = size**2, sum(ships)
        if not all(2 <= ship <= size for ship in ships) or 2 * needed > tiles:
            raise ValueError(
                f"ships is {ships} with size={size}: choose lengths of 2 to {size} "
                f"that cover at most half of the {tiles} tiles"
            )
        if fleets < 1:
            raise ValueError(f"fleets is {fleets}: give at least 1")
        super().__init__(
            num_envs,
            Discrete(2),
            MultiDiscrete([size, size]),
            max_episode_steps=tiles,
            device=device,
        )
        self.size = size
        self.needed = needed
        self.fleets = draw_fleets(size, tuple(ships), fleets, fleets_seed, self.device)
        self._hit = torch.tensor(1 / needed, device=self.device, dtype=torch.float32)
        self._miss = torch.tensor(
            -1 / (tiles - needed), device=self.device, dtype=torch.float32
        )
        self._unhit = torch.zeros(num_envs, device=self.device, dtype=torch.int64)
        self._unguessed = torch.zeros(
            num_envs, tiles, device=self.device, dtype=torch.bool
        )

    def start(self, u: Float32[Tensor, "k 1"]) -> State:
        return {
            "fleet": (u[:, 0] * len(self.fleets)).long(),
            "guessed": self._unguessed[: len(u)],
            "hits": self._unhit[: len(u)],
            "hit": self._unhit[: len(u)],
        }

    def advance(
        self, state: State, actions: Int64[Tensor, "B 2"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        target, guessed = tile(actions, self.size), state["guessed"]
        ship = self.fleets[state["fleet"], target]
        hit = ship > guessed.gather(1, target[:, None])[:, 0]  # a ship, and new
        hits = state["hits"] + hit
        after = {
            "fleet": state["fleet"],
            "guessed": guessed.scatter(1, target[:, None], True),
            "hits": hits,
            "hit": hit.long(),
        }
        return after, torch.where(hit, self._hit, self._miss), hits == self.needed

    def observe(self, state: State) -> Int64[Tensor, "B"]:
        return state["hit"].clone()


@functools.cache
def draw_fleets(
    size: int, ships: tuple[int, ...], count: int, seed: int, device: torch.device
) -> Bool[Tensor, "count N"]:
    """`count` boards with the ships on them: each ship anywhere it fits, in turn."""
    taken = torch.zeros(count, size**2, device=device, dtype=torch.float32)
    stream = streams(seed, count, device)
    for ship in ships:
        u, stream = uniform(stream, offsets(1, device))
        places = placements(size, ship, device)
        place = choose(taken @ places.T == 0, u)[:, 0]
        taken = taken + places[place]
    return taken.bool()


def placements(
    size: int, ship: int, device: torch.device | str = "cpu"
) -> Float32[Tensor, "P N"]:
    """The tiles of a ship in each place that it can have, across and down."""
    tiles = torch.arange(size**2, device=device).view(size, size)
    across = tiles.unfold(1, ship, 1).reshape(-1, ship)
    down = tiles.unfold(0, ship, 1).reshape(-1, ship)
    lines = torch.cat([across, down])
    board = torch.zeros(len(lines), size**2, device=device, dtype=torch.float32)
    return board.scatter_(1, lines, 1.0)


# --------------------------------------------------------------------- Minesweeper


class Minesweeper(TensorVectorEnv):
    """View all tiles without mines; the numbers seen must be kept in mind.

    The task of POPGym (Morad et al., ICLR 2023), step by step.

    | level  | size | mines | steps | best    | memoryless | chance |
    |--------|------|-------|-------|---------|------------|--------|
    | easy   | 4    | 2     | 14    | 0.7661  | -0.18      | -0.23  |
    | medium | 6    | 6     | 30    | > 0.29  | -0.39      | -0.40  |
    | hard   | 8    | 10    | 54    | > 0.32  | -0.43      | -0.43  |

    - Observation: `Discrete(min(mines, 9) + 1)`, the mines on the last tile viewed and
      the eight around it. Which tile that was is not shown.
    - Action: `MultiDiscrete([size, size])`, row and column of the tile to view.
    - Reward: with L = size² - mines, 1/L for a tile without a mine, -1/(2(L-2)) if it
      was viewed before, -1/2 - 1/L for a mine.
    - Start: all sets of that many mines are equally likely. Observation 0.
    - End: terminated by a mine, or when all L tiles without one are viewed; else
      truncated after L steps, which is too late for who viewed any tile twice.

    Returns (undiscounted): 1 at best, -1 at worst. The best mean is exact for the easy
    level (dynamic programming over all that can be known; viewing a tile again passes
    the time where a mine is likely). For the others it is not known, and stands above
    the measured mean of a player that makes the deductions from one number at a time.
    Memoryless and chance are measured means: the best found by gradient ascent over all
    policies that see the observation only, an estimate, with -0.15, -0.37 and -0.41 as
    the ceilings to call a policy memoryless.
    """

    start_draws: ClassVar[int] = 5

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 4,
        mines: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        tiles = size**2
        if size not in (4, 6, 8):
            raise ValueError(f"size is {size}: choose 4, 6 or 8")
        if not 1 <= mines <= tiles - 3:
            raise ValueError(
                f"mines is {mines} with size={size}: choose from 1 to {tiles - 3}"
            )
        clear = tiles - mines
        super().__init__(
            num_envs,
            Discrete(min(mines + 1, 10)),
            MultiDiscrete([size, size]),
            max_episode_steps=clear,
            device=device,
        )
        self.size = size
        self.mines = mines
        one = torch.ones((), device=self.device, dtype=torch.int64)
        self._bit = one << torch.arange(tiles, device=self.device)
        self._full = self._bit.sum()
        self._near, self._around = neighbourhoods(size, self.device)
        self._shares = _shares(tiles // 4, mines, self.device)
        self._quarters = torch.arange(0, tiles, tiles // 4, device=self.device)
        self._rewards = torch.tensor(
            [1 / clear, -0.5 / (clear - 2), -0.5 - 1 / clear],
            device=self.device,
            dtype=torch.float32,
        )
        self._none = torch.zeros(num_envs, device=self.device, dtype=torch.int64)

    def start(self, u: Float32[Tensor, "k 5"]) -> State:
        below, shares, first, number, patterns = self._shares
        share = shares[torch.searchsorted(below, u[:, 0].contiguous(), right=True)]
        nth = (u[:, 1:] * number[share]).long()
        mines = (patterns[first[share] + nth] << self._quarters).sum(dim=1)
        none = self._none[: len(u)]
        return {"mines": mines, "viewed": none, "count": none}

    def advance(
        self, state: State, actions: Int64[Tensor, "B 2"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        view, mines = tile(actions, self.size), state["mines"]
        bit = self._bit[view]
        mine = mines & bit != 0
        again = state["viewed"] & bit != 0
        viewed = state["viewed"] | bit
        near = (mines & self._near[view])[:, None] >> self._around[view] & 1
        after = {"mines": mines, "viewed": viewed, "count": near.sum(dim=1)}
        rewards = self._rewards[torch.where(mine, 2, again.long())]
        return after, rewards, mine | (viewed | mines == self._full)

    def observe(self, state: State) -> Int64[Tensor, "B"]:
        return state["count"].clone()


def neighbourhoods(
    size: int, device: torch.device | str = "cpu"
) -> tuple[Int64[Tensor, "N"], Int64[Tensor, "N 9"]]:
    """The 3 × 3 tiles around each tile: as bits, and as numbers.

    Where a tile at the border has fewer, the numbers are filled up with one outside.
    """
    bits, numbers = [], []
    for row, column in itertools.product(range(size), repeat=2):
        inside = [
            size * i + j
            for i in range(max(row - 1, 0), min(row + 2, size))
            for j in range(max(column - 1, 0), min(column + 2, size))
        ]
        outside = min(set(range(size**2)) - set(inside))
        bits.append(_signed(sum(1 << number for number in inside)))
        numbers.append(inside + [outside] * (9 - len(inside)))
    return torch.tensor(bits, device=device), torch.tensor(numbers, device=device)


def _signed(word: int) -> int:
    """64 bits as an int64 has them."""
    return word - (word >> 63 << 64)


def _shares(quarter: int, mines: int, device: torch.device) -> tuple[Tensor, ...]:
    """What `Minesweeper.start` needs to draw a board in one go, all boards alike.

    The board is cut into four quarters. First their shares of the mines are drawn,
    as likely as they have boards, then for each quarter one of the patterns of its
    tiles with that many mines.
    """
    shares = [
        share
        for share in itertools.product(range(min(mines, quarter) + 1), repeat=4)
        if sum(share) == mines
    ]
    boards = [math.prod(math.comb(quarter, k) for k in share) for share in shares]
    below = [sum_ / sum(boards) for sum_ in itertools.accumulate(boards)]
    number = [math.comb(quarter, k) for k in range(quarter + 1)]
    first = [0, *itertools.accumulate(number)][:-1]
    patterns = sorted(range(2**quarter), key=int.bit_count)
    return (
        torch.tensor(below, device=device, dtype=torch.float32),
        torch.tensor(shares, device=device),
        torch.tensor(first, device=device),
        torch.tensor(number, device=device),
        torch.tensor(patterns, device=device),
    )


# --------------------------------------------------------------------- single faces


def battleship(**kwargs: Any) -> SingleEnv:
    """`Battleship` as an ordinary gymnasium environment."""
    return SingleEnv(Battleship(**kwargs))


def minesweeper(**kwargs: Any) -> SingleEnv:
    """`Minesweeper` as an ordinary gymnasium environment."""
    return SingleEnv(Minesweeper(**kwargs))
