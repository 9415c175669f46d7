"""Streams and their windows, splits, and synthetic tasks."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlrnn.checks import one_of
from rlrnn.data.chunks import (
    PROBE_STREAMS,
    Problem,
    Source,
    Streams,
    Symbols,
    next_symbol_streams,
    split_symbols,
    training_part,
)
from rlrnn.data.synthetic import copy_problem, markov_problem
from rlrnn.models import ModelConfig
from rlrnn.objectives import Classes
from rlrnn.recurrent import Cell
from rlrnn.tasks import DataConfig, Kind, Task, Tasks, build_problem

N, B = 13, 3
WINDOWS = [(t, k) for t in range(2 * N) for k in (1, 4, N - 1, N, N + 1, 3 * N + 2)]


def streams(masked: bool = True) -> Streams:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(9, (N, B), generator=g)
    y = torch.randint(9, (N, B), generator=g)
    starts = torch.zeros(N, B, dtype=torch.bool)
    starts[5, 1] = starts[6, 2] = True
    mask = torch.rand(N, B, generator=g) < 0.3 if masked else None
    return Streams(x, y, starts, mask)


# --- streams ------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_window_is_indexing_modulo_the_length(masked: bool) -> None:
    s = streams(masked)
    for t, k in WINDOWS:
        at = torch.arange(t, t + k) % N
        chunk = s.window(t, k)
        assert torch.equal(chunk.x, s.x[at])
        assert torch.equal(chunk.y, s.y[at])
        begins = bool(s.starts[at].any())
        assert (chunk.starts is not None) == begins, (t, k)
        if chunk.starts is not None:
            assert torch.equal(chunk.starts, s.starts[at])
        if s.mask is None:
            assert chunk.mask is None and chunk.due == 1 == s.density
        else:
            assert chunk.mask is not None and torch.equal(chunk.mask, s.mask[at])
            share = float(s.mask[at].double().mean() / s.mask.double().mean())
            assert chunk.due == pytest.approx(share, abs=1e-12)


def test_every_stream_begins_at_its_first_step_and_the_input_is_left_alone() -> None:
    given = torch.zeros(N, B, dtype=torch.bool)
    x = torch.zeros(N, B, dtype=torch.int64)
    assert Streams(x, x, given).starts[0].all()
    assert not given.any()
    assert Streams(x, x).starts.sum() == B


def test_due_is_zero_exactly_where_nothing_is_due() -> None:
    x = torch.zeros(N, B, dtype=torch.int64)
    mask = torch.zeros(N, B, dtype=torch.bool)
    mask[9, 2] = True
    s = Streams(x, x, None, mask)
    for t, k in WINDOWS:
        inside = bool(mask[torch.arange(t, t + k) % N].any())
        assert (s.window(t, k).due != 0) == inside


def test_streams_and_problems_survive_a_move() -> None:
    s = streams()
    problem = Problem(Symbols(9), Classes(9), s, s, s, s).to(torch.device("cpu"))
    for t, k in WINDOWS[::5]:
        a, b = s.window(t, k), problem.train.window(t, k)
        assert torch.equal(a.x, b.x) and a.due == b.due
        assert (a.starts is None) == (b.starts is None)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_targets_are_the_next_symbols_across_columns_too(batch: int) -> None:
    symbols = np.arange(50)
    s = next_symbol_streams(symbols, batch)
    assert s.length == 49 // batch and s.batch == batch
    assert torch.equal(s.y, s.x + 1)
    # read column after column, nothing is left out and nothing comes twice
    assert torch.equal(s.x.T.flatten(), torch.arange(s.length * batch))


# --- splits -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [120, 1000, 9999])
@pytest.mark.parametrize("batch", [1, 5, 32])
def test_splits_are_disjoint_and_in_order(length: int, batch: int) -> None:
    p = split_symbols(np.arange(length), batch, length)
    a, b, c = training_part(length)
    parts = (p.train, p.probe, p.valid, p.test)
    for part, low, high in zip(parts, (0, a, b, c), (a, b, c, length), strict=True):
        assert isinstance(part, Streams)
        seen = torch.cat((part.x.flatten(), part.y.flatten()))
        assert seen.min() == low and seen.max() < high
        # what does not fill a step of all streams is lost, and no more
        assert seen.max() >= high - 1 - part.batch
    assert p.train.batch == batch
    assert {p.probe.batch, p.valid.batch, p.test.batch} == {PROBE_STREAMS}
    # the probe is the last twentieth of the training part, that is nine tenths
    assert b == pytest.approx(0.9 * length, abs=1)
    assert b - a == pytest.approx(0.05 * b, abs=1)
    assert c - b == pytest.approx(0.05 * length, abs=1)


def test_too_few_symbols_are_one_line() -> None:
    for batch, least in ((1, 120), (32, 120), (100, 200)):
        task = Task(DataConfig("markov", batch=batch, size=least - 1))
        with pytest.raises(ValueError, match=f"^data.size is .* at least {least} .*$"):
            build_problem(task)
        data = DataConfig("markov", batch=batch, size=least)
        problem = build_problem(Task(data))
        for part in (problem.train, problem.probe, problem.valid, problem.test):
            assert part.length >= 1


# --- synthetic ----------------------------------------------------------------------


def symbols_of(s: Source) -> NDArray[np.int64]:
    flat: NDArray[np.int64] = s.window(0, s.length).x.T.flatten().numpy()
    return flat


def information(x: NDArray[np.int64], lag: int) -> float:
    """Mutual information in nats of symbols `lag` apart."""
    joint = np.zeros((x.max() + 1,) * 2)
    np.add.at(joint, (x[:-lag], x[lag:]), 1)
    joint /= joint.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / independent[there])).sum())


@pytest.mark.parametrize("memory", [6, 12])
def test_markov_remembers_as_far_back_as_its_dial_says(memory: int) -> None:
    rng = np.random.default_rng(0)
    x = symbols_of(markov_problem(rng, 60_000, 1, 8, memory).train)
    found = {lag: information(x, lag) for lag in range(2, 2 * memory)}
    assert max(found, key=lambda lag: found[lag]) == memory
    assert found[memory] > 0.1
    # the first-order chain smears each lag over its neighbours, and no further
    far = [v for lag, v in found.items() if 3 <= lag and abs(lag - memory) > 2]
    assert far and max(far) < 0.1 * found[memory]


def test_markov_copies_one_symbol_in_four_through_its_permutation() -> None:
    symbols, memory = 8, 10
    rng = np.random.default_rng(1)
    x = symbols_of(markov_problem(rng, 60_000, 1, symbols, memory).train)
    rng = np.random.default_rng(1)
    chain = rng.dirichlet(np.full(symbols, 0.3), size=symbols)
    permutation = rng.permutation(symbols)
    told = permutation[x[:-memory]] == x[memory:]
    before = x[memory - 1 : -1]  # what the chain alone would go on from
    chance = chain[before, permutation[x[:-memory]]]
    # P(told) = 1/4 + 3/4 P(the chain says the same)
    share = (told.mean() - chance.mean()) / (1 - chance.mean())
    assert share == pytest.approx(0.25, abs=0.015)
    assert (np.abs(chain.sum(1) - 1) < 1e-9).all()


def test_copy_asks_for_its_word_after_the_cue_and_nowhere_else() -> None:
    symbols, memory, batch = 5, 6, 3
    length = 4 + memory + 1 + 4
    problem = copy_problem(np.random.default_rng(0), 3000, batch, symbols, memory)
    assert problem.inputs == Symbols(symbols + 2)
    assert problem.objective == Classes(symbols + 2)
    for part in (problem.train, problem.probe, problem.valid, problem.test):
        assert isinstance(part, Streams) and part.mask is not None
        assert part.length % length == 0
        x, y, starts, mask = (
            a.reshape(-1, length, part.batch)
            for a in (part.x, part.y, part.starts, part.mask)
        )
        words = x[:, :4]
        assert words.min() >= 2 and words.max() < symbols + 2
        assert torch.equal(y[:, -4:], words)
        assert (x[:, 4 + memory] == 1).all()
        blanks = [t for t in range(4, length) if t != 4 + memory]
        assert (x[:, blanks] == 0).all()
        assert mask[:, -4:].all() and not mask[:, :-4].any()
        assert starts[:, 0].all() and not starts[:, 1:].any()
        assert part.density == pytest.approx(4 / length)
    train, test = symbols_of(problem.train), symbols_of(problem.test)
    assert set(train) == set(range(symbols + 2)) >= set(test)


@pytest.mark.parametrize("kind", ["markov", "copy"])
def test_same_seed_same_data(kind: str) -> None:
    def data(seed: int) -> torch.Tensor:
        config = DataConfig(kind, batch=2, size=900)  # type: ignore[arg-type]
        problem = build_problem(Task(config, ModelConfig(), seed=seed))
        return problem.train.window(0, problem.train.length).x

    assert torch.equal(data(0), data(0))
    assert not torch.equal(data(0), data(1))


# --- tasks --------------------------------------------------------------------------


def test_drawn_tasks_stay_inside_the_distribution() -> None:
    tasks = Tasks()
    rng = np.random.default_rng(0)
    drawn = [tasks.draw(rng) for _ in range(400)]
    low, high = tasks.budget
    for task in drawn:
        assert low <= task.training.budget <= high
        assert task.training.optimizer in tasks.optimizers
        assert task.training.decisions == tasks.decisions
        assert task.model.cell in tasks.cells
        assert task.data.batch in tasks.batches
        # the held-out half of the library is never read
        assert task.data.kind == "markov" or task.data.half == 1
    kinds = [task.data.kind for task in drawn]
    assert kinds.count("text") / len(kinds) == pytest.approx(2 / 3, abs=0.07)
    # log-uniform: the median is the geometric mean of the ends
    median = float(np.median([task.training.budget for task in drawn]))
    assert median == pytest.approx((low * high) ** 0.5, rel=0.06)
    assert len({task.seed for task in drawn}) == len(drawn)
    again = np.random.default_rng(0)
    assert [tasks.draw(again) for _ in range(400)] == drawn


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tasks(kinds=[]), "tasks.kinds is empty"),
        (lambda: Tasks(budget=(2.0, 1.0)), "tasks.budget"),
        (
            lambda: one_of("data.kind", "prose", Kind),
            "data.kind is 'prose'",
        ),
        (lambda: DataConfig(batch=0), "data.batch is 0"),
        (lambda: DataConfig(half=2), "data.half is 2"),
        (lambda: ModelConfig(hidden_size=0), "model.hidden_size is 0"),
        (
            lambda: one_of("model.cell", "mamba", Cell),
            "model.cell is 'mamba'",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError) as caught:
        make()
    assert says in str(caught.value) and "\n" not in str(caught.value)
