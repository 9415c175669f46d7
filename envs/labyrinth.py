"""Mazes to escape from and to explore, step by step as in POPGym.

Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement Learning", ICLR
2023. A maze has n × n rooms, with walls between and around them; drawn as a grid, its
N = (2n+1)² tiles are numbered row by row, and rooms are those in odd rows and columns.
Letters: B copies, M mazes.
"""

import functools
import itertools
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from jaxtyping import Bool, Float32, Int8, Int64
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

FREE, WALL, START, GOAL, HIDDEN = range(5)  # what a tile may show; HIDDEN never does
MOVES = (0, -1), (0, 1), (-1, 0), (1, 0)  # left, right, up, down
STILL = len(MOVES)  # instead of the last action where there was none
LENGTH = 1024


class _Labyrinth(TensorVectorEnv):
    """The maze, the way through it and the view: what both tasks share.

    `state["gates"]` holds the start and the goal, which both lie in the outer wall.
    """

    start_draws: ClassVar[int] = 2

    def __init__(
        self,
        num_envs: int,
        size: int,
        mazes: int,
        mazes_seed: int,
        device: torch.device | str,
    ) -> None:
        if size < 8 or size % 2:
            raise ValueError(f"size is {size}: choose an even number from 8")
        if mazes < 1:
            raise ValueError(f"mazes is {mazes}: give at least 1")
        kinds = [HIDDEN + 1] * 9 + [STILL + 1]
        super().__init__(
            num_envs,
            MultiDiscrete(kinds),
            Discrete(len(MOVES)),
            max_episode_steps=LENGTH - 1,
            device=device,
        )
        self.size = size
        self.mazes = hunt_and_kill(size // 2, mazes, mazes_seed, self.device)
        self._tiles = self.mazes.shape[1]
        self._gates, self._moves, self._views = (
            torch.as_tensor(table(size // 2), device=self.device)
            for table in (gates, moves, views)
        )
        self._still = torch.full((num_envs,), STILL, device=self.device)

    def start(self, u: Float32[Tensor, "k 2"]) -> State:
        gates = self._gates[(u[:, 1] * len(self._gates)).long()]
        return {
            "maze": (u[:, 0] * len(self.mazes)).long(),
            "gates": gates,
            "here": gates[:, 0],
            "action": self._still[: len(u)],
        }

    def _walk(self, state: State, actions: Int64[Tensor, "B"]) -> State:
        """The state after a move; a wall or the edge of the grid stops it."""
        target = self._moves[actions, state["here"]]
        gate = (state["gates"] == target[:, None]).any(dim=1)
        blocked = self.mazes[state["maze"], target] > gate
        return {
            "maze": state["maze"],
            "gates": state["gates"],
            "here": torch.where(blocked, state["here"], target),
            "action": actions,
        }

    def observe(self, state: State) -> Int64[Tensor, "B 10"]:
        view = self._views[state["here"]]
        start, goal = state["gates"].split_with_sizes([1, 1], dim=1)
        shown = self.mazes[state["maze"][:, None], view].long()
        shown = shown.masked_fill_(view == start, START)
        shown = shown.masked_fill_(view == goal, GOAL)
        return torch.cat([shown, state["action"][:, None]], dim=1)


class LabyrinthEscape(_Labyrinth):
    """Find the way out of a maze of which 3 × 3 tiles are in sight.

    The task of POPGym (Morad et al., ICLR 2023), step by step.

    | level  | size | rooms   | grid    | best   | hand on the wall | chance |
    |--------|------|---------|---------|--------|------------------|--------|
    | easy   | 10   | 5 × 5   | 11 × 11 | 0.979  | 0.951            | -0.42  |
    | medium | 14   | 7 × 7   | 15 × 15 | 0.965  | 0.904            | -0.85  |
    | hard   | 18   | 9 × 9   | 19 × 19 | 0.949  | 0.842            | -0.97  |

    - Observation: `MultiDiscrete([5]*10)`. 9 tiles, row by row: free 0, wall 1, start
      2, goal 3 (4, hidden, is POPGym's and never shown); then the last action, first 4.
      The player is in the middle, but in the top row of the grid in that of the view,
      and in the left column in the left one: POPGym cuts the view off at the edge of
      the grid, and fills it up with walls at the bottom and on the right.
    - Action: `Discrete(4)`: left, right, up, down. Walls and the edge of the grid stop.
    - Reward: -1/1024 for every step, and 1 for the one that reaches the goal.
    - Start: in an outer wall beside a room; the goal so in the opposite one, each room
      there as likely. The mazes are perfect (one way between any two tiles), made by
      hunt and kill.
    - End: terminated at the goal, else truncated after 1023 steps. POPGym reports a
      goal that is reached on the very last step as truncated, too.

    Making mazes takes longer than a step: `mazes` of them are drawn once from
    `mazes_seed`, and an episode takes one at random; other seeds give other mazes, to
    test an agent on. POPGym draws a new one for each episode (with mazelib, which may
    give up before it has reached every room: in none of 8,000).

    Returns (undiscounted): 1 - d/1024 for who goes the d tiles to the goal straight.
    The columns are means, measured over 4,096 episodes; the best knows the maze. Memory
    helps little: as the last action is shown, a policy without memory can keep a hand
    on the wall, and always arrives. So there is no ceiling to call one memoryless.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 10,
        mazes: int = 2**14,
        mazes_seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_envs, size, mazes, mazes_seed, device)
        self._step, self._out = torch.tensor(
            [-1 / LENGTH, 1 - 1 / LENGTH], device=self.device, dtype=torch.float32
        )

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        after = self._walk(state, actions)
        out = after["here"] == after["gates"][:, 1]
        return after, torch.where(out, self._out, self._step), out


class LabyrinthExplore(_Labyrinth):
    """Visit every tile of a maze of which 3 × 3 are in sight.

    The task of POPGym (Morad et al., ICLR 2023), step by step.

    | level  | size | rooms   | tiles F | best   | hand on the wall | chance |
    |--------|------|---------|---------|--------|------------------|--------|
    | easy   | 10   | 5 × 5   | 49      | 0.983  | 0.969            | -0.35  |
    | medium | 14   | 7 × 7   | 97      | 0.957  | 0.925            | -0.61  |
    | hard   | 18   | 9 × 9   | 161     | 0.919  | 0.865            | -0.74  |

    Observation, action, start and mazes are those of `LabyrinthEscape`, but the goal is
    a wall like any other.

    - Reward: 1/F for a step to a tile not visited before, else -1/1024. The maze has F
      free tiles, rooms and doors; the start is one more, visited already.
    - End: terminated when all are visited, else truncated after 1023 steps. POPGym
      reports an end on the very last step as truncated, too.

    Returns (undiscounted): at best 1 - (F-d)/1024, where d is the way to the tile that
    is farthest from the start: all others are passed twice. The columns are means,
    measured over 4,096 episodes; the best knows the maze. Memory helps little: a policy
    without can keep a hand on the wall as there, and visits everything.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        size: int = 10,
        mazes: int = 2**14,
        mazes_seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_envs, size, mazes, mazes_seed, device)
        self._gates[:, 1] = -1  # no tile: here the goal is a wall like any other
        rooms = (size // 2) ** 2
        free = 2 * rooms - 1  # the rooms, and the doors of a tree
        self._left = torch.full((num_envs,), free, device=self.device)
        self._unexplored = torch.zeros(
            num_envs, self._tiles, device=self.device, dtype=torch.bool
        )
        self._step, self._new = torch.tensor(
            [-1 / LENGTH, 1 / free], device=self.device, dtype=torch.float32
        )

    def start(self, u: Float32[Tensor, "k 2"]) -> State:
        state = super().start(u)
        here = state["here"][:, None]
        explored = self._unexplored[: len(u)].scatter(1, here, True)
        return state | {"explored": explored, "left": self._left[: len(u)]}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        after, explored = self._walk(state, actions), state["explored"]
        here = after["here"][:, None]
        old = explored.gather(1, here)[:, 0]
        left = state["left"] - 1 + old
        after |= {"explored": explored.scatter(1, here, True), "left": left}
        return after, torch.where(old, self._step, self._new), left == 0


# ------------------------------------------------------------------------- the mazes


@functools.cache
def hunt_and_kill(
    n: int, count: int, seed: int, device: torch.device
) -> Int8[Tensor, "M N"]:
    """`count` perfect mazes, 1 for a wall, 0 for rooms and doors.

    A walk goes from a random room to random neighbours that have not been visited, and
    opens the doors. Where there are none left, it goes on from a random visited room
    that has some: n² - 1 doors in all, whatever the maze.
    """
    rooms, width = n * n, 2 * n + 1
    # Neighbours of a room; those outside are number `rooms`, as if visited
    padded = torch.full((n + 2, n + 2), rooms, device=device)
    padded[1:-1, 1:-1] = torch.arange(rooms, device=device).view(n, n)
    near = torch.stack(
        [padded[1 + i : n + 1 + i, 1 + j : n + 1 + j].flatten() for i, j in MOVES], 1
    )
    tiles = torch.arange(width**2, device=device).view(width, width)
    tiles = tiles[1::2, 1::2].flatten()  # of the rooms
    walls = torch.ones(count, width**2, device=device, dtype=torch.int8)
    visited = torch.zeros(count, rooms + 1, device=device, dtype=torch.bool)
    visited[:, rooms] = True
    ways = torch.zeros(count, rooms + 1, device=device, dtype=torch.int8)
    ways[:, :rooms] = (near < rooms).sum(dim=1)  # to neighbours not visited
    minus = torch.full((count, 4), -1, device=device, dtype=torch.int8)

    def visit(room: Int64[Tensor, "M 1"]) -> None:
        walls.scatter_(1, tiles[room], FREE)
        visited.scatter_(1, room, True)
        ways.scatter_add_(1, near[room[:, 0]], minus)

    stream = streams(seed, count, device)
    u, stream = uniform(stream, offsets(1, device))
    room = (u * rooms).long()
    visit(room)
    for _ in range(rooms - 1):
        u, stream = uniform(stream, offsets(2, device))
        hunted = choose(visited[:, :rooms] & (ways[:, :rooms] > 0), u[:, :1])
        room = torch.where(ways.gather(1, room) > 0, room, hunted)
        around = near[room[:, 0]]
        following = around.gather(1, choose(~visited.gather(1, around), u[:, 1:]))
        walls.scatter_(1, (tiles[room] + tiles[following]) // 2, FREE)  # the door
        visit(following)
        room = following
    return walls


def gates(n: int) -> list[list[int]]:
    """Start and goal: beside a room each, in opposite outer walls."""
    width = 2 * n + 1
    odd = range(1, width, 2)
    pairs = []
    for i, j in itertools.product(odd, repeat=2):
        north, south = i, (width - 1) * width + j
        west, east = i * width, j * width + width - 1
        pairs += [[north, south], [south, north], [west, east], [east, west]]
    return pairs


def moves(n: int) -> list[list[int]]:
    """For each action and tile the next tile, which at the edge is the same."""
    width = 2 * n + 1

    def clamp(k: int) -> int:
        return min(max(k, 0), width - 1)

    return [
        [
            clamp(i + down) * width + clamp(j + right)
            for i, j in itertools.product(range(width), repeat=2)
        ]
        for down, right in MOVES
    ]


def views(n: int) -> Int64[np.ndarray, "N 9"]:
    """The 9 tiles in sight from each tile, row by row.

    POPGym cuts the window off at the edge and fills it up at the bottom and on the
    right: in the top row and the left column the view is shifted by one. It fills up
    with walls; tile 0, a corner, is one in every maze.
    """
    width = 2 * n + 1
    windows = []
    for i, j in itertools.product(range(width), repeat=2):
        rows = range(max(i - 1, 0), min(i + 2, width))
        columns = range(max(j - 1, 0), min(j + 2, width))
        window = np.zeros((3, 3), np.int64)
        window[: len(rows), : len(columns)] = np.add.outer(
            np.array(rows) * width, np.array(columns)
        )
        windows.append(window.ravel())
    return np.stack(windows)


def labyrinth_escape(**kwargs: Any) -> SingleEnv:
    """`LabyrinthEscape` as an ordinary gymnasium environment."""
    return SingleEnv(LabyrinthEscape(**kwargs))


def labyrinth_explore(**kwargs: Any) -> SingleEnv:
    """`LabyrinthExplore` as an ordinary gymnasium environment."""
    return SingleEnv(LabyrinthExplore(**kwargs))
