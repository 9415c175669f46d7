"""Sequences end to end in streams: the one form in which data reaches a trainer."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """A window of K steps of B streams.

    | field  | shape       | meaning                                              |
    |--------|-------------|------------------------------------------------------|
    | x      | [K, B, ...] | inputs                                               |
    | y      | [K, B, ...] | targets                                              |
    | starts | [K, B] bool | a sequence begins here; None: none begins            |
    | mask   | [K, B] bool | a loss is due here; None: everywhere                 |
    """

    x: Tensor
    y: Tensor
    starts: Tensor | None
    mask: Tensor | None
    due: float = 1.0  # losses due here / losses due on average; known without asking


class Streams:
    """N steps of B streams, read in windows that wrap around the end.

    Args: as in `Chunk`, with N in place of K. Every stream begins a sequence at its
    first step, so `starts=None` means that it begins there and nowhere else.
    """

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
        """The same streams on `device`."""
        mask = None if self.mask is None else self.mask.to(device)
        return Streams(
            self.x.to(device), self.y.to(device), self.starts.to(device), mask
        )

    def window(self, t: int, steps: int) -> Chunk:
        """Steps `t, ..., t + steps - 1`, modulo the length."""
        t %= self.length
        due = self._due_share(t, steps)
        if t + steps <= self.length:
            x, y, starts, mask = self._slice(t, t + steps)
            begins = self._begins[t + steps] > self._begins[t]
        else:
            at = torch.arange(t, t + steps, device=self.x.device) % self.length
            x, y, starts = self.x[at], self.y[at], self.starts[at]
            mask = None if self.mask is None else self.mask[at]
            begins = True
        return Chunk(x, y, starts if begins else None, mask, due)

    def _due_share(self, t: int, steps: int) -> float:
        if self._due is None:
            return 1.0
        rounds, end = divmod(t + steps, self.length)
        due = rounds * self._due[-1] + self._due[end] - self._due[t]
        return float(due / (steps * self.batch * self.density))

    def _slice(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        mask = None if self.mask is None else self.mask[a:b]
        return self.x[a:b], self.y[a:b], self.starts[a:b], mask


@dataclass(frozen=True)
class Problem:
    """A data set, split: what a model is trained and judged on.

    The probe is the last 5 % of the training part: a controller sees it, and so may
    every rival. Validation and test stay untouched by training.
    """

    inputs: int  # symbols
    outputs: int  # classes
    train: Streams
    probe: Streams
    valid: Streams
    test: Streams
    vocabulary: str | None = None  # character i is `vocabulary[i]`; 0 is unknown

    def to(self, device: torch.device) -> "Problem":
        """The same problem, with its streams on `device`."""
        names = ("train", "probe", "valid", "test")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def next_symbol_streams(symbols: np.ndarray, batch: int) -> Streams:
    """`batch` equal stretches of one long sequence of integers, each symbol's target
    the next one."""
    steps = (len(symbols) - 1) // batch
    at = np.arange(steps + 1)[:, None] + steps * np.arange(batch)  # [N + 1, B]
    lines = torch.from_numpy(symbols[at].astype(np.int64))
    return Streams(lines[:-1], lines[1:])


PROBE_STREAMS = 4  # few and long, so that a probe of few tokens has memory to use


def split_symbols(
    symbols: np.ndarray, batch: int, classes: int, vocabulary: str | None = None
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
        inputs=classes,
        outputs=classes,
        train=next_symbol_streams(symbols[:a], batch),
        probe=next_symbol_streams(symbols[a:b], PROBE_STREAMS),
        valid=next_symbol_streams(symbols[b:c], PROBE_STREAMS),
        test=next_symbol_streams(symbols[c:], PROBE_STREAMS),
        vocabulary=vocabulary,
    )


def training_part(length: int) -> tuple[int, int, int]:
    """The ends of training, probe and validation in `length` symbols."""
    b = int(0.90 * length)
    return int(0.95 * b), b, int(0.95 * length)
