"""The one form in which data reaches a trainer: windows of streams, `Chunk`.

A `Source` gives them, for one split of one data set. There are two kinds:

- streams (`whole` is False): sequences lie end to end in B streams, `starts` says where
  one begins; a window is any K steps, and the hidden state is carried on;
- batches (`whole` is True): a window is B whole sequences, padded at their end, one
  update each; K is the interval at which the state is detached inside.

K, T: time steps. B: streams or sequences. Time comes first.
"""

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrnn import seeding
from rlrnn.objectives import Classes, Objective


@dataclass(frozen=True)
class Chunk:
    """A window of K steps of B streams.

    | field  | shape       | meaning                                              |
    |--------|-------------|------------------------------------------------------|
    | x      | [K, B, ...] | inputs: symbols (int) or features (float)            |
    | y      | [K, B, ...] | targets; for CTC [S, B] labels, -1 after the last    |
    | starts | [K, B] bool | a sequence begins here; None: none begins            |
    | mask   | [K, B] bool | a loss is due here; None: everywhere                 |

    `scale` is what the sum of the losses is divided by: a constant of the data set and
    of K, so that a window with few due positions does not weigh as much as one with
    many. `due` is how many losses are due here, as a share of `scale`; both are known
    without asking the device.
    """

    x: Tensor
    y: Tensor
    starts: Tensor | None
    mask: Tensor | None
    scale: float
    due: float = 1.0


@runtime_checkable
class Source(Protocol):
    """Windows of one split. `t` grows without bound: a pass takes `length` steps."""

    batch: int  # streams, or sequences of a full batch
    length: int  # time steps of one pass
    whole: bool  # whether a window is whole sequences

    def span(self, t: int, truncation: int) -> int:
        """The time steps of the window that begins at `t`."""
        ...

    def typical(self, truncation: int) -> float:
        """The time steps of an average window."""
        ...

    def window(self, t: int, steps: int) -> Chunk:
        """The steps `t, ..., t + steps - 1`; `steps` is what `span` said."""
        ...

    def to(self, device: torch.device) -> "Source":
        """The same source, giving chunks on `device`."""
        ...

    def fingerprint(self) -> int:
        """Tells these data from others."""
        ...


class Streams:
    """N steps of B streams, read in windows that wrap around the end.

    Args: as in `Chunk`, with N in place of K. Every stream begins a sequence at its
    first step, so `starts=None` means that it begins there and nowhere else. Where all
    targets are missing (NaN) nothing is due.
    """

    whole = False

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        starts: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if starts is None:
            starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        starts = starts.clone()
        starts[0] = True
        missing = _missing(y, 2)
        if missing is not None:
            mask = ~missing if mask is None else mask & ~missing
        self.x, self.y, self.starts, self.mask = x, y, starts, mask
        self.length, self.batch = x.shape[:2]
        # The share of positions at which a loss is due: a constant of the data set.
        self.density = 1.0 if mask is None else float(mask.double().mean())
        due = None if mask is None else mask.sum(1).cpu().numpy()
        self._due = None if due is None else np.concatenate(([0], np.cumsum(due)))
        # How many of the first t steps begin a sequence in any stream: kept on the
        # host, so that cutting a window never asks the device.
        begins = starts.any(1).cpu().numpy()
        self._begins = np.concatenate(([0], np.cumsum(begins)))

    def to(self, device: torch.device) -> "Streams":
        mask = None if self.mask is None else self.mask.to(device)
        return Streams(
            self.x.to(device), self.y.to(device), self.starts.to(device), mask
        )

    def fingerprint(self) -> int:
        return zlib.crc32(self.x.cpu().numpy().tobytes())

    def span(self, t: int, truncation: int) -> int:
        return truncation

    def typical(self, truncation: int) -> float:
        return float(truncation)

    def window(self, t: int, steps: int) -> Chunk:
        t %= self.length
        if t + steps <= self.length:
            x, y, starts, mask = self._slice(t, t + steps)
            begins = self._begins[t + steps] > self._begins[t]
        else:
            at = torch.arange(t, t + steps, device=self.x.device) % self.length
            x, y, starts = self.x[at], self.y[at], self.starts[at]
            mask = None if self.mask is None else self.mask[at]
            begins = True
        scale = steps * self.batch * self.density
        due = self._due_share(t, steps)
        return Chunk(x, y, starts if begins else None, mask, scale, due)

    def _due_share(self, t: int, steps: int) -> float:
        if self._due is None:
            return 1.0
        rounds, end = divmod(t + steps, self.length)
        due = rounds * self._due[-1] + self._due[end] - self._due[t]
        return float(due / (steps * self.batch * self.density))

    def _slice(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        mask = None if self.mask is None else self.mask[a:b]
        return self.x[a:b], self.y[a:b], self.starts[a:b], mask


PROBE_BATCH = 16  # small, so that a probe of few tokens has several lengths


class Batches:
    """Whole sequences of any length, those of like length in one padded batch.

    Each pass draws its batches anew, from `seed` and its number. Like means within
    15 %: batches of one length alone would often be of one class or one speaker. Seed
    None: always the same ones, by length, in an order of which any beginning has
    lengths of all kinds, so that a probe may read a part. Padding begins with a start,
    so that a pass backwards in time finds where each sequence ends. The data lie end to
    end on the device, unpadded.

    Args:
        sequences: features [T, D] or symbols [T] (int), each with its own T.
        targets: for each sequence a class, or a number (y is then [T, B, 1]), or its
            frames' targets [T, ...], or, with `ctc`, its labels [S]. Where all are
            missing (NaN) nothing is due.
        batch: sequences in a batch.
        ctc: targets are shorter than sequences, and not aligned with them.
    """

    whole = True

    def __init__(
        self,
        sequences: Sequence[NDArray[Any]],
        targets: Sequence[NDArray[Any] | float | int | np.generic],
        batch: int,
        seed: int | None = None,
        ctc: bool = False,
    ) -> None:
        assert len(sequences) == len(targets) > 0
        batch = min(batch, len(sequences))
        goals = [np.asarray(target) for target in targets]
        self.batch, self.seed, self.ctc = batch, seed, ctc
        self.one = goals[0].ndim == 0  # target for a whole sequence
        if self.one:
            shape = (1, 1) if goals[0].dtype.kind == "f" else (1,)
            goals = [goal.reshape(shape) for goal in goals]
        self.x = _end_to_end([np.asarray(sequence) for sequence in sequences])
        self.y = _end_to_end(goals)
        self.lengths = np.array([len(sequence) for sequence in sequences])
        sizes = np.array([len(goal) for goal in goals])
        self.x_begins = np.cumsum(self.lengths) - self.lengths
        self.y_begins = np.cumsum(sizes) - sizes
        self.missing = _missing(self.y, 1)
        self.dues = sizes  # losses that each asks for
        if self.missing is not None:
            absent = self.missing.numpy().astype(np.int64)
            self.dues = sizes - np.add.reduceat(absent, self.y_begins)
        self.rank = self.lengths if seed is None else _rounded_up(self.lengths)
        cuts = range(batch, len(self.rank) + batch, batch)
        # The time steps of each batch: the same ones in each pass.
        self.spans = np.array([np.sort(self.rank)[:cut][-1] for cut in cuts])
        self.length = int(self.spans.sum())
        self.scale = float(self.dues.sum() / len(self.spans))
        self._pass: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def to(self, device: torch.device) -> "Batches":
        moved = copy.copy(self)
        moved.x, moved.y = self.x.to(device), self.y.to(device)
        moved.missing = None if self.missing is None else self.missing.to(device)
        return moved

    def fingerprint(self) -> int:
        return zlib.crc32(self.x.cpu().numpy().tobytes())

    def _at(self, t: int) -> tuple[NDArray[np.int64], int]:
        """The sequences of the batch that begins at `t`, and its length."""
        lap, within = divmod(t, self.length)
        if self._pass is None or self._pass[0] != lap:
            self._pass = lap, *self._draw(lap)
        _, sequences, numbers = self._pass
        begins = np.cumsum(self.spans[numbers]) - self.spans[numbers]
        place = int(np.searchsorted(begins, within))
        assert begins[place] == within, "a window begins where a batch does"
        first = int(numbers[place]) * self.batch
        return sequences[first : first + self.batch], int(self.spans[numbers[place]])

    def _draw(self, lap: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A pass: sequences, those of a batch side by side; the order of batches."""
        order, numbers = np.arange(len(self.rank)), _spread(len(self.spans))
        if self.seed is not None:
            rng = np.random.default_rng(seeding.derive(self.seed, "pass", lap))
            order, numbers = rng.permutation(order), rng.permutation(numbers)
        return order[np.argsort(self.rank[order], kind="stable")], numbers

    def span(self, t: int, truncation: int) -> int:
        return self._at(t)[1]

    def typical(self, truncation: int) -> float:
        return self.length / len(self.spans)

    def window(self, t: int, steps: int) -> Chunk:
        members, length = self._at(t)
        assert steps == length, "a window is a whole batch"
        ends = self._there(self.lengths[members])
        step = torch.arange(length, device=self.x.device).unsqueeze(1)  # [T, 1]
        inside = step < ends  # [T, B]
        at = torch.where(inside, step + self._there(self.x_begins[members]), 0)
        x = self.x[at]
        x = x.masked_fill(~inside.view(*inside.shape, *[1] * (x.dim() - 2)), 0)
        starts = (step == 0) | (step == ends)
        first = self._there(self.y_begins[members])
        if self.ctc:
            most = max(1, int(self.dues[members].max()))
            label = torch.arange(most, device=self.x.device).unsqueeze(1)  # [S, 1]
            there = label < self._there(self.dues[members])
            y = torch.where(there, self.y[torch.where(there, label + first, 0)], -1)
        elif self.one:
            y = self.y[first].expand(length, *self.y[first].shape)
        else:
            y = self.y[at]
        mask = step == ends - 1 if self.one else inside
        if self.missing is not None:
            mask = mask & ~self.missing[first if self.one else at]
        due = float(self.dues[members].sum() / self.scale)
        return Chunk(x, y, starts, mask, self.scale, due)

    def _there(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(self.x.device)


def _end_to_end(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """One after the other, [N] of whole numbers as int64, all others as float32."""
    whole = arrays[0].dtype.kind in "iub" and arrays[0].ndim == 1
    joined = np.concatenate(arrays).astype(np.int64 if whole else np.float32)
    return torch.from_numpy(joined)


def _missing(y: Tensor, leading: int) -> Tensor | None:
    """Where no target is there, in y of so many leading dimensions; None: nowhere."""
    if not y.is_floating_point():
        return None
    missing = y.isnan().flatten(leading).all(-1) if y.dim() > leading else y.isnan()
    return missing if missing.any() else None


def _spread(count: int) -> NDArray[np.int64]:
    """0 to count - 1, in an order of which any beginning lies evenly among them: that
    of the multiples of the golden ratio, without their whole part."""
    golden = (1 + math.sqrt(5)) / 2
    return np.argsort(np.argsort((0.5 + golden * np.arange(count)) % 1))


def _rounded_up(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The longest of the lengths that are alike, for each."""
    group = (np.log(np.maximum(lengths, 1)) / math.log(1.15)).astype(np.int64)
    longest = np.zeros(group.max() + 1, np.int64)
    np.maximum.at(longest, group, lengths)
    return longest[group]


@dataclass(frozen=True)
class Symbols:
    """Inputs are integers below `count`; they are embedded."""

    count: int


@dataclass(frozen=True)
class Features:
    """Inputs are vectors of `width` numbers."""

    width: int


@dataclass(frozen=True)
class Problem:
    """A data set, split: what a model is trained and judged on.

    The probe is the last 5 % of the training part: a controller sees it, and so may
    every rival. Validation and test stay untouched by training. `format` is what a
    prediction needs beside the model, as plain values and arrays: its "kind", and the
    vocabulary, scalers or labels. `judge(model, split)`, where a kind of data has one,
    gives metrics beside the objective's. `bias` [C] is what the head's bias begins at,
    where outputs without inputs are known, such as base rates: learning them first
    would drown all else in a range test.
    """

    inputs: Symbols | Features
    objective: Objective
    train: Source
    probe: Source
    valid: Source
    test: Source
    format: dict[str, Any] = field(default_factory=dict)
    judge: Callable[[Any, str], dict[str, float]] | None = None
    bias: Tensor | None = None

    def to(self, device: torch.device) -> "Problem":
        """The same problem, with its chunks on `device`."""
        names = ("train", "probe", "valid", "test")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def next_symbol_streams(symbols: NDArray[Any], batch: int) -> Streams:
    """`batch` equal stretches of one long sequence of integers, each symbol's target
    the next one."""
    steps = (len(symbols) - 1) // batch
    at = np.arange(steps + 1)[:, None] + steps * np.arange(batch)  # [N + 1, B]
    lines = torch.from_numpy(symbols[at].astype(np.int64))
    return Streams(lines[:-1], lines[1:])


PROBE_STREAMS = 4  # few and long, so that a probe of few tokens has memory to use


def split_symbols(
    symbols: NDArray[Any],
    batch: int,
    classes: int,
    format: dict[str, Any] | None = None,
) -> Problem:
    """90 % for training (its last 5 % the probe), 5 % validation, 5 % test.

    Raises ValueError if a part would have less than one step of its streams.
    """
    least = max(120, 2 * batch)
    if len(symbols) < least:
        raise ValueError(
            f"data.size is {len(symbols)}, expected at least {least} for {batch} "
            "streams"
        )
    a, b, c = training_part(len(symbols))
    return Problem(
        inputs=Symbols(classes),
        objective=Classes(classes),
        train=next_symbol_streams(symbols[:a], batch),
        probe=next_symbol_streams(symbols[a:b], PROBE_STREAMS),
        valid=next_symbol_streams(symbols[b:c], PROBE_STREAMS),
        test=next_symbol_streams(symbols[c:], PROBE_STREAMS),
        format=format or {},
    )


def training_part(length: int) -> tuple[int, int, int]:
    """The ends of training, probe and validation in `length` symbols."""
    b = int(0.90 * length)
    return int(0.95 * b), b, int(0.95 * length)
