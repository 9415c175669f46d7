"""Synthetic sequences whose memory is a dial."""

from bisect import bisect

import numpy as np
import torch

from rlrnn.data.chunks import PROBE_STREAMS, Problem, Streams, Symbols, split_symbols
from rlrnn.objectives import Classes


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
    rng: np.random.Generator, size: int, batch: int, symbols: int, memory: int
) -> Problem:
    """Recall a string after a delay (Hochreiter & Schmidhuber 1997; Arjovsky 2016).

    A sequence is 4 symbols, `memory` blanks, a cue, then 4 steps at which the loss is
    due on the symbols in their order. 0 is the blank, 1 the cue.
    """
    length = 4 + memory + 1 + 4

    def streams(tokens: int, batch: int) -> Streams:
        count = max(1, tokens // (length * batch))
        words = rng.integers(2, symbols + 2, size=(count, 4, batch))
        x = np.zeros((count, length, batch), np.int64)
        x[:, :4] = words
        x[:, 4 + memory] = 1
        y = np.zeros_like(x)
        y[:, -4:] = words
        due = np.zeros(x.shape, bool)
        due[:, -4:] = True
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
