"""Whole sequences in padded batches, and the trainer on them; what an update is made
of: accumulated gradients, penalties, averages, and the weights that are kept."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rlrnn import checkpoint, seeding
from rlrnn.control import Knobs
from rlrnn.data.chunks import Batches, Chunk, Features, Problem, Streams, Symbols
from rlrnn.evaluation import mean_loss
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes, Ctc, Numbers, Objective
from rlrnn.training import Trainer

WIDTH, CLASSES, BATCH, COUNT = 3, 4, 4, 18
KINDS = ["class", "number", "frames", "labels"]
UNCUT = 1000


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences(count: int = COUNT, seed: int = 0) -> list[NDArray[Any]]:
    """Features, 1 to 20 steps of them; the first ones are unlike."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 21, size=count)
    return [rng.normal(size=(length, WIDTH)) for length in lengths]


def targets(kind: str, given: list[NDArray[Any]]) -> list[Any]:
    rng = np.random.default_rng(1)
    match kind:
        case "class":
            return [int(rng.integers(CLASSES)) for _ in given]
        case "number":
            return [float(rng.normal()) for _ in given]
        case "frames":
            return [rng.integers(CLASSES, size=len(s)) for s in given]
        case _:
            return [rng.integers(CLASSES, size=1 + len(s) // 3) for s in given]


def batches(kind: str, seed: int | None = 0, count: int = COUNT) -> Batches:
    """In float64."""
    given = sequences(count)
    made = Batches(given, targets(kind, given), BATCH, seed, ctc=kind == "labels")
    made.x = torch.from_numpy(np.concatenate(given))
    if kind == "number":
        made.y = made.y.double()
    return made


def objective(kind: str) -> Objective:
    if kind == "number":
        return Numbers(1)
    return Ctc(CLASSES) if kind == "labels" else Classes(CLASSES)


def windows(source: Batches, passes: int = 1, first: int = 0) -> Iterator[Chunk]:
    t = first * source.length
    while t < (first + passes) * source.length:
        steps = source.span(t, 7)
        yield source.window(t, steps)
        t += steps


def members(chunk: Chunk) -> list[int]:
    """Which sequences these are."""
    firsts = [torch.from_numpy(s[0]) for s in sequences()]
    return [
        next(i for i, first in enumerate(firsts) if torch.equal(first, column))
        for column in chunk.x[0]
    ]


# --- batches ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [None, 0])
def test_each_sequence_comes_once_in_a_pass_as_it_was(
    kind: str, seed: int | None
) -> None:
    source, given = batches(kind, seed), sequences()
    goals = targets(kind, given)
    for lap in range(3):
        seen = []
        for chunk in windows(source, first=lap):
            assert chunk.starts is not None and chunk.mask is not None
            for b, i in enumerate(members(chunk)):
                seen.append(i)
                end = len(given[i])
                assert torch.equal(chunk.x[:end, b], torch.from_numpy(given[i]))
                starts = torch.zeros(len(chunk.x), dtype=torch.bool)
                starts[0] = True
                starts[end : end + 1] = True  # of the padding, where there is some
                assert torch.equal(chunk.starts[:, b], starts)
                assert (chunk.x[end:, b] == 0).all()
                assert not chunk.mask[end:, b].any()  # padding is never due
                goal = torch.as_tensor(goals[i])
                match kind:
                    case "class" | "number":
                        assert chunk.mask[end - 1, b]
                        assert chunk.mask[:, b].sum() == 1
                        target = chunk.y[end - 1, b]
                        assert torch.equal(target, goal.view_as(target).to(target))
                    case "frames":
                        assert chunk.mask[:end, b].all()
                        assert torch.equal(chunk.y[:end, b], goal)
                    case _:
                        assert chunk.mask[:end, b].all()
                        assert torch.equal(chunk.y[: len(goal), b], goal)
                        assert (chunk.y[len(goal) :, b] == -1).all()
        assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_what_a_batch_asks_for_on_average(kind: str) -> None:
    source = batches(kind)
    goals = targets(kind, sequences())
    asked = [1 if kind in ("class", "number") else len(goal) for goal in goals]
    for lap in range(3):
        chunks = list(windows(source, first=lap))
        assert {chunk.scale for chunk in chunks} == {source.scale}
        for chunk in chunks:
            due = sum(asked[i] for i in members(chunk))
            assert chunk.due * chunk.scale == pytest.approx(due)
        assert source.scale == pytest.approx(sum(asked) / len(chunks))
        assert np.mean([chunk.due for chunk in chunks]) == pytest.approx(1)


def test_passes_are_unlike_and_can_be_made_again() -> None:
    def order(source: Batches, lap: int) -> list[list[int]]:
        return [members(chunk) for chunk in windows(source, first=lap)]

    source = batches("class")
    passes = [order(source, lap) for lap in range(4)]
    assert len({str(one) for one in passes}) == 4
    assert len({str(sorted(map(sorted, one))) for one in passes}) > 1  # drawn anew
    again = batches("class")
    for lap in (2, 0, 3, 1):  # where a resumed run begins
        assert order(again, lap) == passes[lap]
    assert order(batches("class", seed=1), 0) != passes[0]
    same = batches("class", seed=None)
    assert order(same, 0) == order(same, 1)


def test_like_lengths_are_together() -> None:
    drawn = np.random.default_rng(0).integers(5, 99, 400)
    given = [np.zeros(length) for length in drawn]
    for seed in (None, 0):
        source = Batches(given, [0] * len(given), 16, seed)
        padded = sum(chunk.x.numel() for chunk in windows(source))
        assert padded < 1.2 * sum(map(len, given))
        # `typical` is the mean span, of which a pass has a constant sum
        spans = [len(chunk.x) for chunk in windows(source, passes=2)]
        assert source.typical(5) == pytest.approx(np.mean(spans))
        assert sum(spans) == 2 * source.length
    longest = [len(chunk.x) for chunk in windows(Batches(given, [0] * 400, 16))]
    lengths = sorted(map(len, given))  # no longer than the longest of a batch
    assert sorted(longest) == [lengths[i] for i in range(15, 400, 16)]


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_the_beginning_of_a_pass_without_a_seed_is_like_the_whole(share: float) -> None:
    """What a probe reads of it: lengths of all kinds."""
    lengths = np.random.default_rng(0).lognormal(3, 1, 400).astype(int) + 1
    source = Batches([np.zeros(n) for n in lengths], [0] * 400, 16)
    seen = np.concatenate(
        [
            chunk.mask.int().argmax(0).numpy() + 1
            for chunk in list(windows(source))[: int(share * 25)]
            if chunk.mask is not None
        ]
    )
    for level in (0.2, 0.5, 0.8):
        below = (seen <= np.quantile(lengths, level)).mean()
        assert below == pytest.approx(level, abs=0.15)


def test_missing_targets_are_not_due() -> None:
    """A step is due if any of its numbers is there."""
    nan = math.nan
    goals = [np.array([[1.0, nan], [nan, nan], [nan, 2.0]]), np.array([[nan, nan]])]
    given = [np.zeros((3, WIDTH)), np.zeros((1, WIDTH))]
    frames = Batches(given, goals, 2).window(0, 3)
    assert frames.mask is not None
    rows = {tuple(column) for column in frames.mask.t().tolist()}
    assert rows == {(True, False, True), (False, False, False)}
    assert frames.due * frames.scale == 2
    numbers = Batches(given, [nan, 0.5], 2).to(torch.device("cpu")).window(0, 3)
    assert numbers.mask is not None and int(numbers.mask.sum()) == 1
    assert numbers.due * numbers.scale == 1
    out = torch.zeros(3, 2, 1)
    assert float(Numbers(1).total(out, numbers.y, numbers.mask)) == 0.25
    y = torch.tensor([[nan, 1.0], [2.0, nan], [nan, nan]]).unsqueeze(-1)
    chunk = Streams(torch.zeros(3, 2, 1), y, mask=torch.ones(3, 2).bool()).window(0, 3)
    assert chunk.mask is not None and torch.equal(chunk.mask, ~y.isnan().squeeze(-1))
    assert chunk.due * chunk.scale == pytest.approx(2)


def test_whole_numbers_in_vectors_are_features_and_labels() -> None:
    """Piano rolls of integers: only [T] are symbols and classes."""
    rolls: list[NDArray[Any]] = [
        np.eye(WIDTH, dtype=np.int64),
        np.ones((2, WIDTH), int),
    ]
    chunk = Batches(rolls, rolls, 2).window(0, WIDTH)
    assert chunk.x.dtype == chunk.y.dtype == torch.float32


def test_symbols_stay_symbols_and_a_move_keeps_all() -> None:
    source = Batches([np.arange(3), np.arange(5)], [1, 0], 2)
    moved = source.to(torch.device("cpu"))
    assert moved.fingerprint() == source.fingerprint()
    for chunk, other in zip(windows(source), windows(moved), strict=True):
        assert chunk.x.dtype == chunk.y.dtype == torch.int64
        assert torch.equal(chunk.x, other.x) and torch.equal(chunk.y, other.y)
    another = Batches([np.arange(3), np.arange(5)[::-1]], [1, 0], 2)
    assert another.fingerprint() != source.fingerprint()


# --- the trainer on whole sequences -------------------------------------------------


def trainer(
    model: dict[str, Any] | None = None, kind: str = "class", **training: Any
) -> Trainer:
    """On whole sequences, in float64; validated on those that are trained on."""
    train, valid = batches(kind), batches(kind, None)
    other = batches(kind, None, 6)
    problem = Problem(Features(WIDTH), objective(kind), train, other, valid, other)
    config = ModelConfig("lstm", 5, **(model or {}))
    with seeding.initialising(0, "model"):
        net = SequenceModel(problem.inputs, problem.objective.outputs, config)
    usual = {"budget": 4000.0, "optimizer": "sgd", "clip": 1e9, "decisions": 6}
    return Trainer(net.double(), problem, TrainingConfig(**{**usual, **training}))


def stream_trainer(model: dict[str, Any] | None = None, **training: Any) -> Trainer:
    """The same on streams of symbols."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(CLASSES, (700, 3), generator=g)
    y = (x + x.roll(1, 0)) % CLASSES
    train, held = Streams(x[:600], y[:600]), Streams(x[600:], y[600:])
    problem = Problem(Symbols(CLASSES), Classes(CLASSES), train, held, train, held)
    config = ModelConfig("gru", 5, **(model or {}))
    with seeding.initialising(0, "model"):
        net = SequenceModel(problem.inputs, CLASSES, config)
    usual = {"budget": 3000.0, "optimizer": "sgd", "clip": 1e9, "decisions": 6}
    return Trainer(net.double(), problem, TrainingConfig(**{**usual, **training}))


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "whole": trainer,
    "streams": stream_trainer,
}


def knobs(lr: float, truncation: int = 8) -> Knobs:
    rate = np.array([lr])
    return Knobs(rate, rate, np.array([truncation]))


def weights(t: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in t.parameters]


def window(t: Trainer) -> Chunk:
    """The next one; the trainer stays where it is."""
    return t.source.window(t.position, t.source.span(t.position, 8))


def gradient(t: Trainer) -> list[Tensor]:
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in t.parameters]


def close(a: list[Tensor], b: list[Tensor], rtol: float = 1e-8) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-10)


def alone(t: Trainer, kind: str, i: int) -> Tensor:
    """The loss of one sequence, by itself."""
    given = sequences()
    goal = torch.as_tensor(targets(kind, given)[i])
    x = torch.from_numpy(given[i]).unsqueeze(1)
    out, _ = t.model(x, t.model.initial_state(1))
    out = out[:, 0]
    match kind:
        case "class":
            return F.cross_entropy(out[-1], goal)
        case "number":
            return F.mse_loss(out[-1], goal.view(1).float().double())
        case "frames":
            return F.cross_entropy(out, goal, reduction="sum")
        case _:
            lengths = torch.tensor([len(out)]), torch.tensor([len(goal)])
            paths = out.log_softmax(-1).unsqueeze(1)
            return F.ctc_loss(paths, goal[None] + 1, *lengths, reduction="sum")


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean": {"readout": "mean", "layers": 2},
    "both ways": {"bidirectional": True, "layers": 2, "readout": "mean"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", list(MODELS))
def test_the_gradient_of_a_batch_is_that_of_its_unpadded_sequences(
    kind: str, model: str
) -> None:
    t = trainer(MODELS[model], kind)
    for _ in range(len(list(windows(batches(kind))))):
        chunk = window(t)
        t.position += len(chunk.x)
        t.optimizer.zero_grad()
        loss = t._gradient(chunk, UNCUT)
        found = [g.clone() for g in gradient(t)]
        expected = torch.stack([alone(t, kind, i) for i in members(chunk)]).sum()
        expected = expected / batches(kind).scale
        torch.testing.assert_close(loss, expected.detach())
        close(found, list(torch.autograd.grad(expected, t.parameters)))


@pytest.mark.parametrize("truncation", [1, 4, 5, 20, 21, 64])
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_short_truncation_cuts_the_gradient(truncation: int, both_ways: bool) -> None:
    """The loss is due at the last step: inputs before the last cut get none. Backwards
    in time a cut would be a lie; there it is full."""
    t = trainer({"bidirectional": both_ways})
    steps = 20
    mask, starts = (torch.zeros(steps, BATCH, dtype=torch.bool) for _ in "ab")
    mask[-1] = starts[0] = True
    x = torch.randn(steps, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(steps, BATCH, dtype=torch.int64)
    losses = [t._gradient(Chunk(x, y, starts, mask, 1.0), truncation)]
    assert x.grad is not None
    reached = (x.grad != 0).any(-1).all(1)
    cut = 0 if both_ways else (steps - 1) // truncation * truncation
    assert reached.tolist() == [step >= cut for step in range(steps)]
    # what it sees is the same
    losses.append(t._gradient(Chunk(x, y, starts, mask, 1.0), UNCUT))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("truncation", [1, 4, 7])
def test_a_sequence_cut_into_pieces_has_one_dropout_mask(truncation: int) -> None:
    """So a cut changes the gradient, but not what the model says."""
    dropping = {"dropout": 0.4, "input_dropout": 0.3, "weight_drop": 0.3}
    losses = []
    for cut in (truncation, UNCUT):
        t = trainer({"layers": 2, **dropping}, "frames")
        # the second time with other masks
        losses.append([t._gradient(window(t), cut) for _ in "ab"])
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0][0] != losses[0][1]


def test_the_watched_window_has_one_dropout_mask() -> None:
    t, other = (stream_trainer({"dropout": 0.4, "weight_drop": 0.3}) for _ in "ab")
    chunk = t.source.window(0, 12)
    loss, _ = t._watched_gradient(chunk)
    torch.testing.assert_close(loss, other._gradient(chunk, 12))
    close(gradient(t), gradient(other))


def test_the_longest_truncation_cuts_no_sequence() -> None:
    """One may be far longer than usual."""
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(n, WIDTH)) for n in [5] * 40 + [100]]
    source = Batches(given, [1] * 41, 1)
    source.x = source.x.double()
    built = trainer()
    problem = Problem(Features(WIDTH), Classes(CLASSES), source, source, source, source)
    t = Trainer(built.model, problem, built.config)
    longest = int(t.start().truncation_max[0])
    assert longest < 100
    (chunk,) = (chunk for chunk in windows(source) if len(chunk.x) == 100)
    found = []
    for truncation in (longest, UNCUT, longest // 2):
        t.optimizer.zero_grad()
        t._gradient(chunk, truncation)
        found.append([g.clone() for g in gradient(t)])
    close(found[0], found[1])
    assert not all(map(torch.equal, found[0], found[2]))


def test_whole_sequences_meet_their_budget() -> None:
    t = trainer(kind="frames", epochs=30.0)
    assert t.budget == pytest.approx(30 * t.source.length * BATCH / 0.98)
    t.start()
    ends = [t.config.boundary(i) for i in range(7)]
    decisions = 0
    while not t.done:
        signals = t.step(knobs(1e-3, 1024))
        decisions += 1
        off = 20 * BATCH / t.budget  # a batch of the longest
        assert signals.progress[0] == pytest.approx(ends[decisions], abs=off)
        assert signals.whole[0] == 1
    assert decisions == 6
    assert t.position == pytest.approx(30 * t.source.length, rel=0.03)
    assert t.spent == pytest.approx(t.budget, rel=0.01)


def test_epochs_are_passes_over_streams_too() -> None:
    t = stream_trainer(epochs=5.0)
    t.start()
    while not t.done:
        t.step(knobs(1e-3))
    assert t.position == pytest.approx(5 * t.source.length, rel=0.02)


def test_the_truncation_that_cuts_none_can_be_asked_for() -> None:
    t = trainer()
    longest = max(len(chunk.x) for chunk in windows(batches("class")))
    assert t.start().truncation_max[0] >= longest
    assert t.step(knobs(0.1, 1024)).truncation[0] >= longest


def test_batches_without_a_label_are_passed_over() -> None:
    """Recordings in which nobody speaks; the last batch is smaller."""
    given = sequences(5)
    silent = [np.zeros(0, np.int64)] * 4
    source = Batches(given, [*silent, np.array([1])], BATCH, ctc=True)
    source.x = source.x.double()
    problem = Problem(Features(WIDTH), Ctc(CLASSES), source, source, source, source)
    built = trainer(kind="labels")
    t = Trainer(built.model, problem, built.config)
    t.start(range_test=True)
    signals = t.step(knobs(0.01))
    assert math.isfinite(signals.train_loss[0]) and not signals.recovered[0]
    assert t.step(knobs(0.01)).probe_loss[0] < signals.probe_loss[0]


def test_a_loss_of_exactly_zero_is_no_divergence() -> None:
    built = stream_trainer()
    x = torch.zeros(300, 3, dtype=torch.int64)
    zeros = torch.zeros(300, 3, 1, dtype=torch.float64)
    source = Streams(x, zeros)
    problem = Problem(Symbols(CLASSES), Numbers(1), source, source, source, source)
    net = SequenceModel(problem.inputs, 1, built.model.config).double()
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    t = Trainer(net, problem, built.config)
    t.start()
    for _ in range(2):
        signals = t.step(knobs(0.1))
        assert signals.train_loss[0] < 1e-9 and not signals.recovered[0]


# --- what an update is made of ------------------------------------------------------


@pytest.mark.parametrize("data", list(TRAINERS))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulated_windows_are_one_update_with_their_mean_gradient(
    data: str, accumulate: int
) -> None:
    """What is left over at the end of an interval is an update too."""
    rate = 0.3
    t = TRAINERS[data](accumulate=accumulate, budget=20_000.0)
    t.start()
    plain = copy.deepcopy(t)
    plain.config = replace(plain.config, accumulate=1)
    begin = t.position
    signals = t.step(knobs(rate))
    truncation = int(signals.truncation[0])
    norms, count = [], 0
    gathered = [torch.zeros_like(p) for p in plain.parameters]
    while plain.position < t.position:
        steps = plain.source.span(plain.position, truncation)
        chunk = plain.source.window(plain.position, steps)
        plain.position += steps
        count += 1
        plain.optimizer.zero_grad()
        plain._gradient(chunk, truncation)
        for total, one in zip(gathered, gradient(plain), strict=True):
            total += one
        if count % accumulate and plain.position < t.position:
            continue
        with torch.no_grad():
            for p, total in zip(plain.parameters, gathered, strict=True):
                p -= rate * total / accumulate
        flat = torch.cat([total.flatten() for total in gathered]) / accumulate
        norms.append(float(flat.norm()))
        gathered = [torch.zeros_like(p) for p in plain.parameters]
    assert plain.position == t.position > begin and count > accumulate
    close(weights(t), weights(plain))
    assert t.updates == math.ceil(count / accumulate)
    assert signals.grad_norm[0] == pytest.approx(np.exp(np.log(norms).mean()))


@pytest.mark.parametrize("data", list(TRAINERS))
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_cosine_is_that_of_the_last_two_updates(data: str, accumulate: int) -> None:
    """With sgd, of the last two moves of the weights."""
    t = TRAINERS[data](accumulate=accumulate, budget=20_000.0)
    t.start()
    moves: list[Tensor] = []
    update = t._update

    def noted(steps: int) -> Tensor:
        before = weights(t)
        norm = update(steps)
        pairs = zip(before, weights(t), strict=True)
        moves.append(torch.cat([(b - a).flatten() for a, b in pairs]))
        return norm

    t._update = noted  # type: ignore[method-assign]
    t.fast = None
    for _ in range(4):
        signals = t.step(knobs(0.2))
        cosine = F.cosine_similarity(moves[-2], moves[-1], dim=0)
        assert signals.grad_cosine[0] == pytest.approx(float(cosine), abs=1e-6)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("model", [{}, {"layers": 2, "layer_norm": True}])
def test_penalties_are_added_to_the_loss(model: dict[str, Any], watched: bool) -> None:
    t = stream_trainer(model, ar=0.7, tar=0.4)
    chunk = t.source.window(0, 11)
    y, out, _ = t.model.read(chunk.x, t.hidden, chunk.starts)
    loss = F.cross_entropy(out.flatten(0, 1), chunk.y.flatten())
    penalty = 0.7 * (y**2).mean() + 0.4 * ((y[1:] - y[:-1]) ** 2).mean()
    expected = list(torch.autograd.grad(loss + penalty, t.parameters))
    if watched:
        found, _ = t._watched_gradient(chunk)
    else:
        found = t._gradient(chunk, 11)
    close(gradient(t), expected)
    # the loss that is told has no penalty in it
    torch.testing.assert_close(found, loss.detach())


def updates(t: Trainer) -> list[tuple[int, list[Tensor]]]:
    """A whole run: the steps of each update's last window, and the weights after it."""
    begun: list[tuple[int, list[Tensor]]] = []  # weights before each window
    next_chunk = t.next_chunk

    def noted(steps: int) -> Chunk:
        begun.append((steps, weights(t)))
        return next_chunk(steps)

    t.next_chunk = noted  # type: ignore[method-assign]
    t.start()
    while not t.done:
        t.step(knobs(0.2))
    ends = [now for _, now in begun[1:]] + [weights(t)]
    return [
        (steps, after)
        for (steps, before), after in zip(begun, ends, strict=True)
        if not all(map(torch.equal, before, after))
    ]


@pytest.mark.parametrize("data", list(TRAINERS))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_averaged_weights_are_a_moving_average(data: str, accumulate: int) -> None:
    """At first the plain mean of all weights so far, then with the time constant."""
    average = 0.2
    t = TRAINERS[data](average=average, accumulate=accumulate)
    first = weights(t)
    close(t.averaged, first)
    seen = updates(t)
    assert len(seen) == t.updates
    expected, so_far, plain = first, [first], True
    for n, (steps, now) in enumerate(seen, 1):
        share = steps * t.batch * accumulate / (average * t.budget)
        plain = plain and share < 1 / (n + 1)
        share = max(share, 1 / (n + 1))
        expected = [a + share * (b - a) for a, b in zip(expected, now, strict=True)]
        so_far.append(now)
        if plain:
            means = [torch.stack(each).mean(0) for each in zip(*so_far, strict=True)]
            close(expected, means)
    assert not plain
    close(t.averaged, expected)
    with t.kept_weights():
        close(weights(t), expected)
    close(weights(t), seen[-1][1])


def test_a_rolled_back_interval_is_not_averaged() -> None:
    a, b = (stream_trainer(average=0.2) for _ in range(2))
    a.start()
    b.start()
    before = [p.clone() for p in a.averaged]
    assert a.step(knobs(1e6)).recovered[0] == 1
    close(a.averaged, before)
    for name in ("position", "spent", "decision"):
        setattr(b, name, getattr(a, name))
    a.step(knobs(0.1))  # at half the rate
    b.step(knobs(0.05))
    close(a.averaged, b.averaged)


# --- the weights that are kept ------------------------------------------------------


@pytest.mark.parametrize("data", list(TRAINERS))
@pytest.mark.parametrize("average", [0.0, 0.1])
def test_the_weights_of_the_lowest_validation_loss_are_kept(
    data: str, average: float
) -> None:
    t = TRAINERS[data](select="valid", average=average, decisions=8)
    t.start()
    losses, kept = [], []
    for lr in (0.1, 0.3, 0.3, 0.3, -0.1, -0.1, -0.1, -0.1):  # downhill, then uphill
        t.step(knobs(lr))
        candidate = t.averaged if average else weights(t)
        other = copy.deepcopy(t)
        other._load_weights(candidate)
        valid = t.problem.valid
        found = mean_loss(other.model, t.problem.objective, valid, valid.length)
        losses.append(float(found))
        kept.append([p.clone() for p in candidate])
        assert t.valid_loss == losses[-1]
    best = int(np.argmin(losses))
    assert best < len(losses) - 1, "the last would be kept anyway"
    close(t.best, kept[best], rtol=0)
    assert t.best_valid == losses[best]
    last = weights(t)
    unit = t.problem.objective.unit
    assert t.score("valid")[unit] == pytest.approx(losses[best])
    close(weights(t), last, rtol=0)


def test_patience_ends_a_run() -> None:
    t = stream_trainer(select="valid", patience=2, decisions=8)
    t.start()
    done = []
    for _ in range(3):
        t.step(knobs(0.0))  # nothing is learned: the first is as good as any
        done.append(t.done)
    assert done == [False, False, True]
    with pytest.raises(RuntimeError, match="the run is done"):
        t.step(knobs(0.1))


def test_patience_waits_for_whoever_learns() -> None:
    t = stream_trainer(select="valid", patience=1)
    t.start()
    while not t.done:
        t.step(knobs(0.05))
    assert t.decision == 6 and t.waited == 0


# --- resuming -----------------------------------------------------------------------


def bits(tree: Any) -> Any:
    """A tree as plain values that compare bit for bit, NaN with NaN."""
    if isinstance(tree, Tensor):
        return tree.dtype, tuple(tree.shape), tree.detach().numpy().tobytes()
    if isinstance(tree, np.ndarray):
        return tree.dtype, tree.shape, tree.tobytes()
    if isinstance(tree, dict):
        return {k: bits(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [bits(v) for v in tree]
    return repr(tree) if isinstance(tree, float) else tree


@pytest.mark.parametrize("data", list(TRAINERS))
def test_resuming_goes_on_to_the_same_bits(data: str, tmp_path: Path) -> None:
    model = {"layers": 2, "dropout": 0.3, "input_dropout": 0.2, "weight_drop": 0.2}

    def make() -> Trainer:
        return TRAINERS[data](
            model,
            optimizer="adam",
            average=0.2,
            select="valid",
            patience=5,
            accumulate=2,
            ar=0.1,
            tar=0.1,
            clip=0.5,
            budget=2000.0,
        )

    whole, seen = make(), []
    whole.start(range_test=True)
    while True:
        checkpoint.save(tmp_path / f"{whole.decision}.zip", whole.state_dict())
        if whole.done:
            break
        seen.append(bits(vars(whole.step(knobs(0.02, 6)))))
    for begin in (0, 3, whole.decision):
        t = make()
        t.load_state_dict(checkpoint.load(tmp_path / f"{begin}.zip"))
        for expected in seen[begin:]:
            assert bits(vars(t.step(knobs(0.02, 6)))) == expected
        assert t.done
        assert bits(t.state_dict()) == bits(whole.state_dict())
        assert bits(t.score("test")) == bits(whole.score("test"))


def test_dropout_has_the_seed_of_the_run() -> None:
    def run(seed: int) -> Any:
        built = trainer({"dropout": 0.5})
        t = Trainer(built.model, built.problem, built.config, seed)
        t.start()
        t.step(knobs(0.1))
        return bits(weights(t))

    assert run(0) == run(0) != run(1)


# --- errors -------------------------------------------------------------------------


def test_streams_cannot_be_read_backwards() -> None:
    with pytest.raises(ValueError, match=r"^model.bidirectional is true, .* whole .*$"):
        stream_trainer({"bidirectional": True})


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"epochs": 0.0}, "epochs is 0.0, expected a number above 0"),
        ({"accumulate": 0}, "accumulate is 0, expected at least 1"),
        ({"average": 1.0}, "average is 1.0, expected 0 to below 1"),
        ({"ar": -1.0}, "ar is -1.0, expected at least 0"),
        ({"patience": 0, "select": "valid"}, "patience is 0, expected at least 1"),
        ({"patience": 3}, "patience is 3, but select is 'last': expected select valid"),
    ],
)
def test_a_wrong_setting_is_one_line(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(TrainingConfig(), **setting)
    assert str(caught.value) == says


def test_too_few_epochs_are_one_line() -> None:
    with pytest.raises(ValueError) as caught:
        trainer(epochs=0.5)
    words = str(caught.value)
    assert words.startswith("epochs is 0.5, ") and "raise the epochs" in words
    assert "\n" not in words
