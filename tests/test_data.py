"""Streams and their windows, splits, and synthetic tasks."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrnn.checks import one_of
from rlrnn.data.chunks import (
    PROBE_STREAMS,
    Batches,
    Features,
    Problem,
    Source,
    Streams,
    Symbols,
    next_symbol_streams,
    split_symbols,
    training_part,
)
from rlrnn.data.synthetic import (
    KEYS,
    adding_problem,
    chords_problem,
    copy_problem,
    markov_problem,
    waves_problem,
)
from rlrnn.models import ModelConfig
from rlrnn.objectives import Classes, Numbers
from rlrnn.recurrent import Cell, Recurrent
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


# --- batches ------------------------------------------------------------------------


def ragged(count: int = 37) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, count).tolist()
    return [rng.normal(size=(length, 2)).astype(np.float32) for length in lengths]


@pytest.mark.parametrize("seed", [None, 3])
def test_each_pass_has_each_sequence_once_padded_at_its_end(seed: int | None) -> None:
    given = ragged()
    source = Batches(given, range(len(given)), 5, seed)
    members = []
    for lap in range(3):
        t, seen, due = lap * source.length, [], 0.0
        while t < (lap + 1) * source.length:
            span = source.span(t, 16)
            chunk = source.window(t, span)
            assert chunk.starts is not None and chunk.mask is not None
            t += span
            due += chunk.due * chunk.scale
            for b in range(chunk.x.shape[1]):
                number = int(chunk.y[0, b])
                end = len(given[number])
                assert (chunk.x[:end, b].numpy() == given[number]).all()
                assert (chunk.x[end:, b] == 0).all()
                assert (chunk.y[:, b] == number).all()
                assert chunk.mask[:, b].nonzero().flatten().tolist() == [end - 1]
                begins = {0, end} - {span}
                assert set(chunk.starts[:, b].nonzero().flatten().tolist()) == begins
                seen.append(number)
        assert t == (lap + 1) * source.length and sorted(seen) == list(range(37))
        assert due == pytest.approx(37)
        members.append(seen)
    assert (members[0] == members[1]) == (seed is None)
    again = Batches(given, range(len(given)), 5, seed).to(torch.device("cpu"))
    for t in (0, source.length):
        assert torch.equal(
            again.window(t, again.span(t, 1)).x, source.window(t, source.span(t, 1)).x
        )


def test_padding_of_like_lengths_stays_below_15_percent() -> None:
    given = ragged(400)
    source = Batches(given, range(400), 8, 0)
    assert source.length * 8 < 1.15 * 1.05 * sum(map(len, given))
    one = Batches([np.zeros((7, 1), np.float32)] * 6, range(6), 4, 0)
    assert one.spans.tolist() == [7, 7]


def test_targets_are_of_frames_sequences_or_strings() -> None:
    given = ragged()
    frames = Batches(given, [x * 2 for x in given], 5, 0)
    chunk = frames.window(0, frames.span(0, 1))
    assert chunk.mask is not None
    assert torch.equal(chunk.y[chunk.mask], 2 * chunk.x[chunk.mask])
    assert frames.scale == pytest.approx(sum(map(len, given)) / len(frames.spans))
    numbers = Batches(given, [float(x[0, 0]) for x in given], 5, 0)
    chunk = numbers.window(0, numbers.span(0, 1))
    assert torch.equal(chunk.y[3], chunk.x[0, :, :1])
    strings = [np.arange(len(x) // 8) for x in given]  # some are empty
    ctc = Batches(given, strings, 5, 0, ctc=True)
    chunk = ctc.window(0, ctc.span(0, 1))
    assert chunk.mask is not None
    for b, length in enumerate(chunk.mask.sum(0).tolist()):
        kept = chunk.y[:, b][chunk.y[:, b] >= 0]
        assert kept.tolist() == list(range(length // 8))
    assert chunk.due * ctc.scale == (chunk.y >= 0).sum()


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


def test_chords_are_the_chain_of_markov_with_wrong_keys() -> None:
    symbols, memory, batch = 8, 10, 4
    problem = chords_problem(np.random.default_rng(1), 40_000, batch, symbols, memory)
    for part in (problem.train, problem.probe, problem.valid, problem.test):
        assert isinstance(part, Streams) and part.mask is None
        assert part.x.shape == (part.length, part.batch, KEYS)
        assert torch.equal(part.x[1:], part.y[:-1])
        assert set(part.x.flatten().tolist()) == {0.0, 1.0}
    frames = problem.train.window(0, problem.train.length).x.flatten(0, 1)
    assert frames.sum(1).mean() == pytest.approx(4 * 0.95 + (KEYS - 4) * 0.005, 0.02)
    # chords are sets of keys that sound together: as many as there are symbols
    most = [tuple(row) for row in frames.int().tolist() if sum(row) == 4]
    counts = sorted((most.count(chord) for chord in set(most)), reverse=True)
    assert counts[symbols - 1] > 3 * counts[symbols]


def test_waves_can_be_told_from_what_came_before_and_not_by_chance() -> None:
    width, memory, batch = 6, 5, 4
    problem = waves_problem(np.random.default_rng(0), 40_000, batch, width, memory)
    assert problem.inputs == Features(width)
    assert problem.objective == Numbers(width, "mae")
    for part in (problem.train, problem.probe, problem.valid, problem.test):
        assert isinstance(part, Streams) and part.mask is not None
        assert part.length % memory == 0
        count = part.length // memory

        def cut(x: Tensor, count: int = count) -> Tensor:
            return x.view(count, memory, *x.shape[1:])

        due, starts = cut(part.mask), cut(part.starts)
        assert due[:, -1].all() and not due[:, :-1].any()
        assert starts[:, 0].all() and not starts[:, 1:].any()
        assert not part.x[memory - 1 :: memory, :, -1].any()  # the value subtracted
    part = problem.train
    assert isinstance(part, Streams)
    x = (
        part.x.view(-1, memory, batch, width)
        .transpose(1, 2)
        .reshape(-1, memory * width)
    )
    y = part.y[memory - 1 :: memory].flatten(0, 1)
    half = len(x) // 2
    fit = torch.linalg.lstsq(x[:half, :-1].double(), y[:half].double()).solution
    error = (x[half:, :-1].double() @ fit - y[half:]).abs().mean()
    assert error < 0.85 * y[half:].abs().mean()


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


def test_copy_of_ten_symbols_is_that_of_the_literature() -> None:
    problem = copy_problem(np.random.default_rng(0), 50_000, 2, 8, 200, string=10)
    train = problem.train
    assert isinstance(train, Streams) and train.mask is not None
    assert train.length % 221 == 0
    x, y, mask = (a.reshape(-1, 221, 2) for a in (train.x, train.y, train.mask))
    assert torch.equal(x[:, :10], y[:, -10:]) and (x[:, 10:210] == 0).all()
    assert mask[:, -10:].all() and not mask[:, :-10].any()
    assert set(x[:, :10].flatten().tolist()) == set(range(2, 10))


def test_copy_with_mixed_delays_trains_on_shorter_ones_and_tests_on_the_longest() -> (
    None
):
    problem = copy_problem(np.random.default_rng(0), 60_000, 2, 8, 40, 3, shortest=2)
    train, test = problem.train, problem.test
    assert isinstance(train, Streams) and isinstance(test, Streams)
    assert train.starts is not None and train.mask is not None
    assert 0.84 * 60_000 < train.length * 2 <= 0.85 * 60_000
    assert test.starts is not None
    assert set(test.starts[:, 0].nonzero().flatten().diff().tolist()) == {47}

    begins = train.starts[:, 0].nonzero().flatten().tolist() + [train.length]
    delays = []
    for begin, end in itertools.pairwise(begins):
        x, y, mask = (a[begin:end, 0] for a in (train.x, train.y, train.mask))
        delays.append(len(x) - 7)
        assert x[:3].min() >= 2 and torch.equal(x[:3], y[-3:])
        assert not x[3:-4].any() and x[-4] == 1 and not x[-3:].any()
        assert mask.nonzero().flatten().tolist() == [*range(end - begin - 3, len(x))]
    assert min(delays) == 2 and max(delays) == 40
    # log-uniform: half of them are under the geometric mean of 2 and 41
    share = np.mean(np.array(delays) < np.sqrt(2 * 41))
    assert share == pytest.approx(0.5, abs=0.05)

    short = copy_problem(np.random.default_rng(0), 10, 2, 8, 40, 3, shortest=2).train
    assert short.length > 0  # one sequence, however little was asked for


def test_adding_asks_for_the_sum_of_two_marked_numbers_that_never_come_again() -> None:
    problem = adding_problem(0, 40_000, 4, 50)
    assert problem.inputs == Features(2) and problem.objective == Numbers(1)
    values = []
    for part in (problem.train, problem.probe, problem.valid, problem.test):
        for number in range(3):
            chunk = part.window(50 * number, part.span(50 * number, 7))
            assert chunk.mask is not None and chunk.starts is None
            x, y = chunk.x.numpy(), chunk.y.numpy()
            assert (x[..., 1].sum(0) == 2).all() and set(x[..., 1].flatten()) == {0, 1}
            np.testing.assert_allclose(y[-1, :, 0], (x[..., 0] * x[..., 1]).sum(0))
            assert chunk.mask[-1].all() and not chunk.mask[:-1].any()
            values += x[..., 0].flatten().tolist()
    assert len(set(values)) > 0.99 * len(values)
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)
    # saying 1 has the error 1/6
    tests = [problem.test.window(50 * n, 50).y[-1] for n in range(12)]
    error = float((torch.cat(tests) - 1).square().mean())
    assert error == pytest.approx(1 / 6, abs=0.03)


@pytest.mark.parametrize("cell", ["lstm", "gru", "mingru"])
def test_units_that_reach_back_forget_after_as_many_steps(cell: Cell) -> None:
    """With the input gate shut, a state fades by the share 1 - 1/T that chrono
    initialisation gives its gate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        core = Recurrent(1, 400, 1, cell)
        core.reach(100)
    for name, weight in core.named_parameters():
        if "weight" in name:
            weight.data.zero_()
    state = torch.zeros(core.rows, 1, 400)
    state[-1] = 1  # of an lstm the cell
    _, after = core(torch.zeros(1, 1, 1), state)
    # a fixed point, if the candidate is not zero, is where the state goes to
    _, zero = core(torch.zeros(1, 1, 1), torch.zeros_like(state))
    kept = (after[-1] - zero[-1]).flatten().detach()
    steps = 1 / (1 - kept)
    assert 1.9 < float(steps.min()) and float(steps.max()) <= 100.1
    assert float(steps.mean()) == pytest.approx(51, abs=4)  # uniform


@pytest.mark.parametrize("kind", ["markov", "copy", "adding"])
def test_same_seed_same_data(kind: str) -> None:
    def data(seed: int) -> torch.Tensor:
        config = DataConfig(kind, batch=2, size=900)  # type: ignore[arg-type]
        source = build_problem(Task(config, ModelConfig(), seed=seed)).train
        return source.window(0, source.span(0, 900)).x

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
        (
            lambda: DataConfig(kind="copy", memory=5, shortest=6),
            "data.shortest is 6, expected 1 to data.memory (5)",
        ),
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
