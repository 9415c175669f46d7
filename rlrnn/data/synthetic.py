"""Synthetic sequences whose memory is a dial."""

from bisect import bisect

import numpy as np
import torch
from numpy.typing import NDArray

from rlrnn import seeding
from rlrnn.data.chunks import (
    PROBE_STREAMS,
    Chunk,
    Features,
    Problem,
    Streams,
    Symbols,
    split_symbols,
    training_part,
)
from rlrnn.objectives import Classes, Labels, Numbers


def markov_problem(
    rng: np.random.Generator, size: int, batch: int, symbols: int, memory: int
) -> Problem:
    """A Markov chain that now and then repeats what stood `memory` steps before.

    Of each four symbols about one is, through a fixed permutation, a copy of the one
    `memory` steps back; which one is not told. The others follow a first-order chain
    with sparse rows (Dirichlet, concentration 0.3).
    """
    return split_symbols(_chain(rng, size, symbols, memory), batch, symbols)


def _chain(
    rng: np.random.Generator, size: int, symbols: int, memory: int
) -> NDArray[np.int64]:
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
    return np.asarray(values)


KEYS = 24  # of a chord


def chords_problem(
    rng: np.random.Generator, size: int, batch: int, symbols: int, memory: int
) -> Problem:
    """The next frame of a piano roll: `markov_problem`'s chain, each symbol a chord.

    A chord is 4 of 24 keys. In a frame each of them is missing with probability 0.05,
    and each other key sounds with probability 0.005.
    """
    chords = np.zeros((symbols, KEYS), bool)
    for chord in chords:
        chord[rng.choice(KEYS, 4, replace=False)] = True
    plain = chords[_chain(rng, size, symbols, memory)]  # [size, KEYS]
    wrong = rng.random(plain.shape, np.float32) < np.where(plain, 0.05, 0.005)
    frames = torch.from_numpy((plain ^ wrong).astype(np.float32))

    def streams(begin: int, end: int, batch: int) -> Streams:
        steps = (end - begin - 1) // batch
        x, y = (
            frames[at : at + steps * batch].view(batch, steps, KEYS).transpose(0, 1)
            for at in (begin, begin + 1)
        )
        return Streams(x.contiguous(), y.contiguous())

    a, b, c = training_part(size)
    return Problem(
        inputs=Features(KEYS),
        objective=Labels(KEYS),
        bias=Labels.bias(frames[1:a]),
        train=streams(0, a, batch),
        probe=streams(a, b, PROBE_STREAMS),
        valid=streams(b, c, PROBE_STREAMS),
        test=streams(c, size, PROBE_STREAMS),
    )


SERIES = 8


def waves_problem(
    rng: np.random.Generator, size: int, batch: int, width: int, memory: int
) -> Problem:
    """The next `width` values of a noisy series, from `memory` segments as wide.

    Eight series, each three waves of unlike periods, a random walk and noise, of unit
    variance together. A sequence is `memory` steps of `width` values, its target those
    that follow the last one; the last value is subtracted from both. The loss is the
    mean absolute error. Parts follow each other in time.
    """
    least = (memory + 1) * width
    length = max(40 * least, size * width // SERIES // 4)  # windows overlap
    time = np.arange(length)
    series = np.zeros((SERIES, length), np.float32)
    for row in series:
        for period in width * np.exp(rng.uniform(np.log(0.3), np.log(memory + 2), 3)):
            phase = 2 * np.pi * (time / period + rng.random())
            row += rng.exponential() * np.sin(phase)
        noise = rng.standard_normal(length)
        row += rng.uniform(0.1, 1) * noise + rng.uniform(0, 0.05) * np.cumsum(
            rng.standard_normal(length)
        )
        row -= row.mean()
        row /= row.std()

    def streams(begin: int, end: int, batch: int, tokens: int) -> Streams:
        count = max(1, tokens // (memory * batch))
        at = rng.integers(begin, end - least, count * batch)
        which = rng.integers(SERIES, size=count * batch)
        cut = series[which[:, None], at[:, None] + np.arange(least)]
        cut = cut - cut[:, [memory * width - 1]]
        pieces = cut.reshape(count, batch, memory + 1, width).transpose(0, 2, 1, 3)
        x = torch.from_numpy(np.ascontiguousarray(pieces[:, :-1]))
        y = torch.zeros_like(x)
        y[:, -1] = torch.from_numpy(pieces[:, -1])
        due = torch.zeros(x.shape[:3], dtype=torch.bool)
        due[:, -1] = True
        starts = torch.zeros_like(due)
        starts[:, 0] = True
        return Streams(*(part.flatten(0, 1) for part in (x, y, starts, due)))

    a, b, c = training_part(length)
    return Problem(
        inputs=Features(width),
        objective=Numbers(width, "mae"),
        train=streams(0, a, batch, int(0.85 * size)),
        probe=streams(a, b, PROBE_STREAMS, size // 20),
        valid=streams(b, c, PROBE_STREAMS, size // 20),
        test=streams(c, length, PROBE_STREAMS, size // 20),
    )


def copy_problem(
    rng: np.random.Generator,
    size: int,
    batch: int,
    symbols: int,
    memory: int,
    string: int = 4,
    shortest: int | None = None,
) -> Problem:
    """Recall a string after a delay (Hochreiter & Schmidhuber 1997; Arjovsky 2016).

    A sequence is `string` symbols, `memory` blanks, a cue, then `string` steps at which
    the loss is due on the symbols in their order. 0 is the blank, 1 the cue. With 8
    symbols and a string of 10 it is that of Bai et al. 2018, whose loss is a mean over
    all steps: ours times string / (2 string + memory + 1).

    With `shortest`, the training part mixes delays, log-uniform from it to `memory`, as
    in the mixed curriculum of Zaremba & Sutskever ("Learning to Execute", 2014); the
    other parts have `memory` blanks in any case.
    """

    def streams(tokens: int, batch: int, least: int = memory) -> Streams:
        room = tokens // batch
        most = max(1, room // (2 * string + least + 1))
        if least == memory:
            blanks = np.full(most, memory)
        else:
            low, high = np.log((least, memory + 1))
            blanks = np.exp(rng.uniform(low, high, most)).astype(np.int64)
        lengths = 2 * string + blanks.clip(least, memory) + 1
        ends = lengths.cumsum()
        kept = max(1, int((ends <= room).sum()))
        lengths, ends = lengths[:kept], ends[:kept]
        words = rng.integers(2, symbols + 2, size=(len(ends), string, batch))
        x = np.zeros((ends[-1], batch), np.int64)
        y = np.zeros_like(x)
        due = np.zeros(x.shape, bool)
        starts = np.zeros(x.shape, bool)
        begins = ends - lengths
        steps = np.arange(string)
        x[begins[:, None] + steps] = words
        x[ends - string - 1] = 1
        recall = ends[:, None] - string + steps
        y[recall] = words
        due[recall] = True
        starts[begins] = True
        return Streams(*map(torch.from_numpy, (x, y, starts, due)))

    return Problem(
        inputs=Symbols(symbols + 2),
        objective=Classes(symbols + 2),
        train=streams(int(0.85 * size), batch, shortest or memory),
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
