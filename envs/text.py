"""What a player sees, as lines of text, and what the actions mean.

`picture` draws an observation of one copy, `meanings` names the actions. Both know the
tasks of this package, and the names of some of gymnasium's; any other environment is
shown by its numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from rlrnn.envs.bandit import MultiarmedBandit
from rlrnn.envs.cards import Concentration, HigherLower
from rlrnn.envs.cartpole import X_LIMIT, VelocityOnlyCartPole, _Pole
from rlrnn.envs.diagnostics import Adding, Copy, DelayedXor, MemoryChain, TMaze
from rlrnn.envs.grids import Battleship, Minesweeper
from rlrnn.envs.labyrinth import LabyrinthExplore, _Labyrinth
from rlrnn.envs.pendulum import PositionOnlyPendulum
from rlrnn.envs.recall import Autoencode, CountRecall, RepeatFirst, RepeatPrevious
from rlrnn.envs.tensor import SingleEnv
from rlrnn.envs.wrappers import COORDINATES, coordinates

NAMES: dict[int, Sequence[str]] = {  # of cards, by how many kinds there are
    2: ("red", "black"),
    4: ("clubs", "diamonds", "hearts", "spades"),
    13: ("A", *map(str, range(2, 11)), "J", "Q", "K"),
}
SUITS, RANKS = NAMES[4], NAMES[13]
TILES = " ", "#", "S", "G", "?", "#"  # what a labyrinth shows


@dataclass(frozen=True)
class Other:
    """An environment that is no tensor task: its class, and the coordinates shown."""

    kind: str
    names: tuple[str, ...]


def task_of(env: gymnasium.Env[Any, Any]) -> Any:
    """What `picture` and `meanings` go by: a tensor task, or an `Other`."""
    inner = env.unwrapped
    if isinstance(inner, SingleEnv):
        return inner.vector
    return Other(type(inner).__name__, coordinates(env))


# ------------------------------------------------------------------------ observations


@singledispatch
def picture(task: Any, obs: Any) -> list[str]:
    """The observation of one copy in numpy; lines of at most 80 characters."""
    names = task.names if isinstance(task, Other) else ()
    if names and np.shape(obs) == (len(names),):
        return [f"{n}: {x:.3g}" for n, x in zip(names, obs, strict=True)]
    if not isinstance(obs, np.ndarray):
        return [f"observation: {obs}"]
    with np.printoptions(precision=3, suppress=True, linewidth=72, threshold=64):
        return ["observation:", *str(obs).splitlines()[:16]]


@picture.register(RepeatPrevious)
@picture.register(RepeatFirst)
def _suit(task: Any, obs: Any) -> list[str]:
    return [f"card: {SUITS[int(obs)]}"]


@picture.register
def _autoencode(task: Autoencode, obs: Any) -> list[str]:
    watching, suit = map(int, obs)
    if watching:
        return [f"watch: {SUITS[suit]}"]
    return [f"say the cards in reverse (in sight: {SUITS[suit]})"]


@picture.register
def _count_recall(task: CountRecall, obs: Any) -> list[str]:
    names = NAMES[_sizes(task.single_observation_space)[0]]
    shown, asked = (names[int(kind)] for kind in obs)
    return [f"card: {shown}", f"how many so far of: {asked}?"]


@picture.register
def _higher_lower(task: HigherLower, obs: Any) -> list[str]:
    return [f"card: {RANKS[int(obs)]}"]


@picture.register
def _concentration(task: Concentration, obs: Any) -> list[str]:
    """Rows of 13 places; the number is that of the first."""
    down = _sizes(task.single_observation_space)[0] - 1
    marks = [*(name[0] if down == 2 else name for name in NAMES[down]), "."]
    return [
        f"{start:3}  "
        + " ".join(f"{marks[int(k)]:>2}" for k in obs[start : start + 13])
        for start in range(0, len(obs), 13)
    ]


@picture.register
def _bandit(task: MultiarmedBandit, obs: Any) -> list[str]:
    return ["it paid" if obs else "nothing"]


@picture.register
def _cartpole(task: _Pole, obs: Any) -> list[str]:
    """The cart on its track, the pole above it, its lean three times as large."""
    shown: Any = task._shown.tolist()
    values = dict(zip(shown, map(float, obs), strict=True))
    width, height = 61, 4
    middle = width // 2
    cart = middle + round(values[0] / X_LIMIT * middle)
    rows = []
    for level in range(height, 0, -1):
        column = cart + round(3 * level * math.tan(values[2]))
        rows.append(_with(" " * width, column, "|"))
    rows.append(_with("-" * width, cart, "#"))
    names = COORDINATES["CartPoleEnv"]
    rows.append("  ".join(f"{names[i]} {x:+.3f}" for i, x in values.items()))
    return [row.rstrip() for row in rows]


@picture.register
def _velocities(task: VelocityOnlyCartPole, obs: Any) -> list[str]:
    return [f"velocity {obs[0]:+.3f}  angular velocity {obs[1]:+.3f}"]


@picture.register
def _pendulum(task: PositionOnlyPendulum, obs: Any) -> list[str]:
    """Upright is up; a positive torque turns to the left."""
    cos, sin = map(float, obs)
    rows, columns = 7, 15
    grid = [" " * columns] * rows
    for share in (1 / 3, 2 / 3, 1.0):
        row, column = round(3 - 3 * share * cos), round(7 - 7 * share * sin)
        grid[row] = _with(grid[row], column, "*" if share == 1 else ".")
    grid[3] = _with(grid[3], 7, "o")
    return [*(row.rstrip() for row in grid), f"cos {cos:+.3f}  sin {sin:+.3f}"]


@picture.register
def _battleship(task: Battleship, obs: Any) -> list[str]:
    return ["hit" if obs else "water"]


@picture.register
def _minesweeper(task: Minesweeper, obs: Any) -> list[str]:
    return [f"mines on and around the tile: {int(obs)}"]


@picture.register
def _labyrinth(task: _Labyrinth, obs: Any) -> list[str]:
    """The 3 × 3 tiles in sight: # wall, S start, G goal."""
    rows = ["".join(TILES[int(tile)] for tile in obs[i : i + 3]) for i in (0, 3, 6)]
    moves = (*_MOVES, "none")
    return ["+---+", *(f"|{row}|" for row in rows), "+---+"] + [
        f"last move: {moves[int(obs[9])]}"
    ]


@picture.register
def _t_maze(task: TMaze, obs: Any) -> list[str]:
    signs = "corridor", "junction", "sign: go north", "sign: go south"
    return [signs[int(obs)]]


@picture.register
def _memory_chain(task: MemoryChain, obs: Any) -> list[str]:
    left, asked, *context = (float(x) for x in obs)
    lines = [f"time left: {left:.2f}"]
    if any(context):
        bits = " ".join(str(int(x > 0)) for x in context)
        lines.append(f"bits: {bits}")
    if asked or task.bits == 1:
        lines.append(f"asked for: bit {int(asked)}")
    return lines


@picture.register
def _copy(task: Copy, obs: Any) -> list[str]:
    signs = [*(f"symbol {i}" for i in range(task.symbols)), "...", "repeat them"]
    return [signs[int(obs)]]


@picture.register
def _adding(task: Adding, obs: Any) -> list[str]:
    return [f"{obs[0]:.3f}" + (" (add it)" if obs[1] else "")]


@picture.register
def _delayed_xor(task: DelayedXor, obs: Any) -> list[str]:
    return [("bit 0", "bit 1", "...", "different?")[int(obs)]]


def _with(row: str, column: int, mark: str) -> str:
    """`row` with a mark, if it lies inside."""
    inside = 0 <= column < len(row)
    return row[:column] + mark + row[column + 1 :] if inside else row


def _sizes(space: Any) -> list[int]:
    return [int(n) for n in space.nvec]


# ----------------------------------------------------------------------------- actions

_MOVES = "left", "right", "up", "down"
MEANINGS: dict[type[Any], Sequence[str]] = {
    RepeatPrevious: SUITS,
    RepeatFirst: SUITS,
    Autoencode: SUITS,
    HigherLower: ("higher", "lower"),
    _Pole: ("push left", "push right"),
    _Labyrinth: _MOVES,
    TMaze: ("north", "east", "south", "west"),
    MemoryChain: ("the bit is 0", "the bit is 1"),
    DelayedXor: ("equal", "different"),
}
OTHERS: dict[str, Sequence[str]] = {  # by the class of gymnasium's environment
    "CartPoleEnv": ("push left", "push right"),
    "MountainCarEnv": ("push left", "nothing", "push right"),
    "AcrobotEnv": ("torque -1", "nothing", "torque +1"),
    "LunarLander": ("nothing", "left engine", "main engine", "right engine"),
}
HINTS: dict[type[Any], str] = {
    RepeatPrevious: "name the suit of the k-th latest card",
    RepeatFirst: "name the suit of the first card",
    CountRecall: "the count; the card in sight counts",
    Concentration: "the place of the card to turn",
    MultiarmedBandit: "the arm to pull",
    Battleship: "row and column to shoot at",
    Minesweeper: "row and column of the tile to view",
    LabyrinthExplore: "visit every tile",
    PositionOnlyPendulum: "the torque",
    Copy: "a symbol, once asked for",
    Adding: "the sum, after the last number",
}


def meanings(task: Any, space: Any) -> list[str]:
    """What to enter as an action: a line, then one for each that has a name."""
    hints = [HINTS[kind] for kind in type(task).__mro__ if kind in HINTS]
    names = [MEANINGS[kind] for kind in type(task).__mro__ if kind in MEANINGS]
    if isinstance(task, Other) and task.kind in OTHERS:
        names = [OTHERS[task.kind]]
    text = f": {hints[0]}" if hints else ""
    if isinstance(space, Discrete):
        first, last = int(space.start), int(space.start + space.n) - 1
        lines = [f"action, {first} to {last}{text}"]
        if names:
            lines += [f"  {first + i}  {name}" for i, name in enumerate(names[0])]
        return lines
    if isinstance(space, MultiDiscrete) and space.nvec.ndim == 1:
        ranges = ", ".join(f"0 to {n - 1}" for n in _sizes(space))
        return [f"action, {len(space.nvec)} numbers ({ranges}){text}"]
    if isinstance(space, MultiBinary):
        return [f"action, {space.n} numbers, each 0 or 1{text}"]
    if isinstance(space, Box):
        low, high = float(space.low.min()), float(space.high.max())
        count = math.prod(space.shape)
        numbers = "a number" if count == 1 else f"{count} numbers"
        return [f"action, {numbers} from {low:g} to {high:g}{text}"]
    return [f"action, a member of {space}, which cannot be typed"]


def entered(words: str, space: Any) -> Any:
    """The action that a player has typed. Raises ValueError if it is none."""
    numbers = [float(word) for word in words.replace(",", " ").split()]
    if not isinstance(space, Discrete | MultiDiscrete | MultiBinary | Box):
        raise ValueError(f"a member of {space} cannot be typed")
    shape = space.shape or ()
    action = np.array(numbers, np.float64)
    if action.size != math.prod(shape):
        raise ValueError(f"{len(numbers)} numbers, expected {math.prod(shape)}")
    if not (isinstance(space, Box) or np.array_equal(action, np.trunc(action))):
        raise ValueError(f"{words.strip()} is no whole number")
    result = action.astype(space.dtype).reshape(shape)[()]
    if not space.contains(result):
        raise ValueError(f"{words.strip()} is not in {space}")
    return result
