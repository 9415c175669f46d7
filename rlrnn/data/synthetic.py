"""Synthetic sequences whose memory is a dial."""

from bisect import bisect

import numpy as np
import torch

from rlrnn import seeding
from rlrnn.data.chunks import (
    PROBE_STREAMS,
    Chunk,
    Features,
    Problem,
    Streams,
    Symbols,
    split_symbols,
)
from rlrnn.objectives import Classes, Numbers


def markov_problem(
    rng: np.random.Generator, size: int, batch: int, symbols: int, memory: int
) -> Problem:
    """A Markov chain that now and then repeats what stood `memory` steps before.

    Of each four symbols about one is, through a fixed permutation, a copy of the one
    `memory` steps back; which one is not told. The others follow a first-order chain
    with sparse rows (Dirichlet, concentration 0.3).
    """
    chain = rng.dirichlet(np.full(symbols, 0.3), size=symbols).cumsum(1)
    permutation = rng.permutation(symbols)
    draws = rng.random(size)
    copies = rng.random(size) < 0.25
    rows = [row.tolist() for row in chain]
    last = symbols - 1
    values = [0] * size
    for t in range(1, size):
        if copies[t] and t >= memory:
            values[t] = int(permutation[values[t - memory]])
        else:
            values[t] = min(bisect(rows[values[t - 1]], draws[t]), last)
    return split_symbols(np.asarray(values), batch, symbols)


def copy_problem(
    rng: np.random.Generator,
    size: int,
    batch: int,
    symbols: int,
    memory: int,
    string: int = 4,
) -> Problem:
    """Recall a string after a delay (Hochreiter & Schmidhuber 1997; Arjovsky 2016).

    A sequence is `string` symbols, `memory` blanks, a cue, then `string` steps at which
    the loss is due on the symbols in their order. 0 is the blank, 1 the cue. With 8
    symbols and a string of 10 it is that of Bai et al. 2018, whose loss is a mean over
    all steps: ours times string / (2 string + memory + 1).
    """
    length = string + memory + 1 + string

    def streams(tokens: int, batch: int) -> Streams:
        count = max(1, tokens // (length * batch))
        words = rng.integers(2, symbols + 2, size=(count, string, batch))
        x = np.zeros((count, length, batch), np.int64)
        x[:, :string] = words
        x[:, string + memory] = 1
        y = np.zeros_like(x)
        y[:, -string:] = words
        due = np.zeros(x.shape, bool)
        due[:, -string:] = True
        starts = np.zeros(x.shape, bool)
        starts[:, 0] = True
        lines = (a.reshape(-1, batch) for a in (x, y, starts, due))
        return Streams(*map(torch.from_numpy, lines))

    return Problem(
        inputs=Symbols(symbols + 2),
        objective=Classes(symbols + 2),
        train=streams(int(0.85 * size), batch),
        probe=streams(size // 20, PROBE_STREAMS),
        valid=streams(size // 20, PROBE_STREAMS),
        test=streams(size // 20, PROBE_STREAMS),
    )


class Additions:
    """Whole sequences of the adding problem, made anew for each window."""

    whole = True

    def __init__(
        self,
        seed: int,
        steps: int,
        batch: int,
        count: int,
        device: torch.device | None = None,
    ) -> None:
        self.seed, self.steps, self.batch, self.device = seed, steps, batch, device
        self.count = count  # of batches in a pass
        self.length = count * steps

    def to(self, device: torch.device) -> "Additions":
        return Additions(self.seed, self.steps, self.batch, self.count, device)

    def fingerprint(self) -> int:
        return self.seed

    def span(self, t: int, truncation: int) -> int:
        return self.steps

    def typical(self, truncation: int) -> float:
        return float(self.steps)

    def window(self, t: int, steps: int) -> Chunk:
        number, within = divmod(t, self.steps)
        assert within == 0 and steps == self.steps, "a window is a whole batch"
        rng = np.random.default_rng(seeding.derive(self.seed, number))
        x = np.zeros((steps, self.batch, 2), np.float32)
        x[..., 0] = rng.random((steps, self.batch))
        # two different places in each column
        marked = rng.random((steps, self.batch)).argsort(0)[:2]  # [2, B]
        np.put_along_axis(x[..., 1], marked, 1, 0)
        y = np.zeros((steps, self.batch, 1), np.float32)
        y[-1] = (x[..., :1] * x[..., 1:]).sum(0)
        mask = np.zeros((steps, self.batch), bool)
        mask[-1] = True
        parts = (torch.from_numpy(a).to(self.device) for a in (x, y, mask))
        inputs, targets, due = parts
        return Chunk(inputs, targets, None, due, float(self.batch))


def adding_problem(seed: int, size: int, batch: int, steps: int) -> Problem:
    """The sum of two marked numbers in `steps` (Hochreiter & Schmidhuber 1997): inputs
    are a number in [0, 1) and a mark, the target of the last step is the sum of the two
    that are marked. Saying 1 has the error 1/6.

    Training sequences never come twice; the other parts are a twentieth of `size` time
    steps each.
    """

    def part(name: str, batch: int, size: int) -> Additions:
        count = max(1, size // (steps * batch))
        return Additions(seeding.derive(seed, name), steps, batch, count)

    return Problem(
        inputs=Features(2),
        objective=Numbers(1),
        train=part("train", batch, size),
        probe=part("probe", 32, size // 20),
        valid=part("valid", 32, size // 20),
        test=part("test", 32, size // 20),
    )
