"""The trainer: exact gradients, budget, recovery, resuming, one look per interval."""

import math
import subprocess
import sys
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

from rlrnn import checkpoint
from rlrnn.control import Knobs, Signals, Steered, prior
from rlrnn.data.chunks import Chunk, Problem, Streams
from rlrnn.evaluation import mean_loss
from rlrnn.ledger import FORWARD_COST, GIVE_UP, TrainingConfig
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes
from rlrnn.optimizers import Optimizer
from rlrnn.rangetest import RANGE_SHARE, SGD_FACTOR, suggest_lambda
from rlrnn.recurrent import Cell, Recurrent
from rlrnn.tasks import DataConfig, Kind, Task, build_trainer
from rlrnn.training import Trainer, _Seen
from shared import Syncs

OPTIMIZERS: list[Optimizer] = ["sgd", "momentum", "adam", "adamw"]
BATCH, SYMBOLS, LENGTH = 3, 4, 16  # of copy's sequences: 4 + 7 + 1 + 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def task(
    kind: Kind = "markov",
    cell: Cell = "lstm",
    optimizer: Optimizer = "adam",
    budget: float = 12_000.0,
    layers: int = 1,
    batch: int = BATCH,
    seed: int = 0,
    size: int = 3000,
    **training: Any,
) -> Task:
    return Task(
        DataConfig(kind, batch=batch, size=size, symbols=SYMBOLS, memory=7),
        ModelConfig(cell, 5, layers, 4),
        TrainingConfig(budget, optimizer=optimizer, **{"decisions": 6, **training}),
        seed,
    )


def trainer(*args: Any, double: bool = False, **kwargs: Any) -> Trainer:
    """A trainer that has not started; `double`: in float64."""
    built = build_trainer(task(*args, **kwargs))
    if not double:
        return built
    return Trainer(built.model.double(), built.problem, built.config)


def train_streams(t: Trainer) -> Streams:
    assert isinstance(t.problem.train, Streams)
    return t.problem.train


def embedding(t: Trainer) -> Tensor:
    assert isinstance(t.model.encoder, nn.Embedding)
    return t.model.encoder.weight


def window(t: Trainer, steps: int, watched: bool = False) -> None:
    """One window of the data: a gradient and an update."""
    t._train(t.next_chunk(steps), steps, _Seen(), 0 if watched else 1)


def knobs(lr: float, truncation: int = 8, lr_end: float | None = None) -> Knobs:
    end = lr if lr_end is None else lr_end
    return Knobs(np.array([lr]), np.array([end]), np.array([truncation]))


def weights(t: Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(t.model.parameters()).detach().clone()


def bits(tree: Any) -> Any:
    """A tree as plain values that compare bit for bit, NaN with NaN."""
    if isinstance(tree, Tensor):
        return tree.dtype, tree.shape, tree.detach().cpu().numpy().tobytes()
    if isinstance(tree, np.ndarray):
        return tree.dtype, tree.shape, tree.tobytes()
    if isinstance(tree, dict):
        return {k: bits(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [bits(v) for v in tree]
    return repr(float(tree)) if isinstance(tree, float) else tree


# --- back-propagation ---------------------------------------------------------------


def full_gradient(t: Trainer, chunk: Chunk) -> list[Tensor]:
    """One pass of autograd over `chunk` from the present state, with no trainer."""
    logits, _ = t.model(chunk.x, t.hidden.detach(), chunk.starts)
    losses = F.cross_entropy(logits.permute(0, 2, 1), chunk.y, reduction="none")
    if chunk.mask is None:
        mean = losses.mean()
    else:
        mean = losses[chunk.mask].sum() / chunk.y.numel() / train_streams(t).density
    return list(torch.autograd.grad(mean, t.parameters))


@pytest.mark.parametrize("kind", ["markov", "copy"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_truncation_over_a_whole_stream_is_full_backpropagation(
    kind: Kind, cell: Cell
) -> None:
    for watched in (False, True):
        t = trainer(kind, cell, "sgd", layers=2, size=600, clip=1e9, double=True)
        length = t.problem.train.length
        expected = full_gradient(t, t.problem.train.window(0, length))
        window(t, length, watched)
        for p, gradient in zip(t.parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_truncation_of_a_sequence_gives_its_full_gradient_and_less_does_not() -> None:
    def update(truncation: int, lr: float = 1e-6) -> Tensor:
        t = trainer("copy", "lstm", "sgd", clip=1e9, double=True)
        t.start()
        before, position = weights(t), t.position
        t.step(knobs(lr, truncation))
        steps = t.position - position
        assert steps % truncation == 0
        return (before - weights(t)) / lr / steps * truncation

    t = trainer("copy", "lstm", "sgd", double=True)
    count = round(t._room() / LENGTH)
    chunk = t.problem.train.window(0, LENGTH * count)
    # the sequences are apart, so that one pass over all is a pass over each
    vector = nn.utils.parameters_to_vector
    expected = vector(full_gradient(t, chunk))
    torch.testing.assert_close(update(LENGTH), expected, rtol=1e-3, atol=1e-5)
    assert (update(4) - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("truncation", [1, 4])
def test_a_short_truncation_sends_no_gradient_to_earlier_inputs(
    truncation: int,
) -> None:
    """The words of copy are seen in windows in which no loss is due."""

    def moved(truncation: int) -> Tensor:
        t = trainer("copy", "lstm", "sgd", double=True)
        t.start()
        before = embedding(t).detach().clone()
        t.step(knobs(0.1, truncation))
        return (embedding(t) != before).any(1)

    assert moved(LENGTH).all()
    # 0 is the blank of the answer's steps; words begin at 2
    assert moved(truncation).tolist() == [True] + [False] * (SYMBOLS + 1)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("kind", ["markov", "copy"])
def test_windows_carry_the_state(kind: Kind, cell: Cell) -> None:
    """At a rate of zero, all truncations see the losses of one long pass."""
    for truncation in (1, 5, 16):
        t = trainer(kind, cell, "sgd", layers=2, budget=3000.0, double=True)
        t.start()
        for _ in range(3):
            begin = t.position
            state = t.hidden.detach().clone()
            signals = t.step(knobs(0.0, truncation))
            chunk = t.problem.train.window(begin, t.position - begin)
            with torch.no_grad():
                logits, state = t.model(chunk.x, state, chunk.starts)
            losses = F.cross_entropy(logits.permute(0, 2, 1), chunk.y, reduction="none")
            mean = losses.mean() if chunk.mask is None else losses[chunk.mask].mean()
            assert signals.train_loss[0] == pytest.approx(float(mean), rel=1e-9)
            torch.testing.assert_close(t.hidden.detach(), state)


def test_masked_losses_of_windows_sum_to_the_total() -> None:
    t = trainer("copy", double=True)
    train, objective = train_streams(t), t.problem.objective
    assert train.mask is not None
    state = t.model.initial_state(BATCH)
    with torch.no_grad():
        logits, _ = t.model(train.x, state, train.starts)
    losses = F.cross_entropy(logits.permute(0, 2, 1), train.y, reduction="none")
    total = float(losses[train.mask].sum())
    for steps in (4, 7, LENGTH, train.length):
        windows = []
        for begin in range(0, train.length, steps):
            chunk = train.window(begin, min(steps, train.length - begin))
            windows.append(float(t._loss(logits[begin : begin + steps], chunk)))
            # a constant of the data, of which the due ones are a share
            assert chunk.scale == pytest.approx(chunk.y.numel() * train.density)
            due = int(chunk.y.numel() if chunk.mask is None else chunk.mask.sum())
            assert chunk.due * chunk.scale == pytest.approx(due)
            windows[-1] *= chunk.scale
        assert sum(windows) == pytest.approx(total)
    whole = mean_loss(t.model, objective, train, train.length)
    assert float(whole) == pytest.approx(total / int(train.mask.sum()))


def test_mean_loss_is_that_of_one_pass() -> None:
    t = trainer("markov", double=True)
    train, objective = train_streams(t), t.problem.objective
    for steps in (1, 255, 256, 257, train.length):  # it reads 256 at a time
        with torch.no_grad():
            logits, _ = t.model(train.x[:steps], t.model.initial_state(BATCH))
        expected = F.cross_entropy(logits.flatten(0, 1), train.y[:steps].flatten())
        found = mean_loss(t.model, objective, train, steps)
        assert float(found) == pytest.approx(float(expected))


# --- against a plain loop -----------------------------------------------------------


class Plain(nn.Module):
    """What anybody would write."""

    def __init__(self, model: SequenceModel, cell: Cell) -> None:
        super().__init__()
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        assert isinstance(model.encoder, nn.Embedding)
        self.embedding = nn.Embedding(model.encoder.num_embeddings, 4)
        self.rnn = kind(4, 5)
        self.linear = nn.Linear(5, model.head.out_features)
        self.double()
        for mine, its in zip(self.parameters(), model.parameters(), strict=True):
            mine.data.copy_(its.data)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embedding(x), state)
        return self.linear(y), state


def plain_optimizer(name: Optimizer, parameters: Any, decay: float) -> Any:
    match name:
        case "adam":
            return torch.optim.Adam(parameters, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, weight_decay=decay)
        case "momentum":
            return torch.optim.SGD(parameters, momentum=0.9, weight_decay=decay)
        case _:
            return torch.optim.SGD(parameters, weight_decay=decay)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_are_those_of_a_plain_loop(optimizer: Optimizer, cell: Cell) -> None:
    """Rate, clip, optimiser and state: all windows of three decisions, in float64."""
    clip, decay = 0.25, 0.01  # some of the gradients are clipped
    kwargs = {"budget": 4000.0, "clip": clip, "weight_decay": decay}
    t = trainer("markov", cell, optimizer, double=True, **kwargs)
    plain = Plain(t.model, cell)
    theirs = plain_optimizer(optimizer, plain.parameters(), decay)
    t.start()
    state, clipped = None, []
    adam = optimizer.startswith("adam")
    rates = [(0.0, 0.02), (0.02, 0.03), (0.03, 0.001)]
    for (lr, lr_end), k in zip(rates, (8, 5, 12), strict=True):
        if not adam:
            lr, lr_end = 10 * lr, 10 * lr_end
        begin = t.position
        losses, norms = [], []
        signals = t.step(knobs(lr, k, lr_end))
        k = int(signals.truncation[0])
        windows = (t.position - begin) // k
        assert windows >= 4
        for i in range(windows):
            x, y = (
                s[begin + i * k : begin + (i + 1) * k]
                for s in (train_streams(t).x, train_streams(t).y)
            )
            # the middles of equal parts of a straight line
            theirs.param_groups[0]["lr"] = lr + (lr_end - lr) * (i + 0.5) / windows
            theirs.zero_grad()
            logits, state = plain(x, state)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(plain.parameters(), clip)
            theirs.step()
            state = (
                state.detach()
                if isinstance(state, Tensor)
                else tuple(s.detach() for s in state)
            )
            losses.append(float(loss.detach()))
            norms.append(float(norm))
        clipped += [norm > clip for norm in norms]
        assert signals.train_loss[0] == pytest.approx(np.mean(losses))
        noise = np.std(losses) / np.mean(losses)
        assert signals.loss_noise[0] == pytest.approx(noise)
        assert signals.grad_norm[0] == pytest.approx(np.exp(np.log(norms).mean()))
        assert signals.clip_fraction[0] == np.mean(np.array(norms) > clip)
        assert signals.lr[0] == lr_end
        for mine, its in zip(t.parameters, plain.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-9)
    assert 0 < np.mean(clipped) < 1


def test_watching_the_last_window_changes_no_update() -> None:
    a, b = (trainer("copy", double=True) for _ in range(2))
    for _ in range(5):
        window(a, 7)
        window(b, 7, watched=True)
        torch.testing.assert_close(weights(a), weights(b))
        torch.testing.assert_close(a.hidden, b.hidden)


def test_update_ratio_and_gradient_cosine_are_what_they_say() -> None:
    t = trainer("markov", optimizer="sgd", clip=1e9, double=True)
    t.start()
    before = weights(t)
    moments: list[Tensor] = []  # weights before each window
    next_chunk = t.next_chunk

    def noted(steps: int) -> Chunk:
        moments.append(weights(t))
        return next_chunk(steps)

    t.next_chunk = noted  # type: ignore[method-assign]
    signals = t.step(knobs(0.1))
    ratio = (weights(t) - before).norm() / before.norm()
    assert signals.update_ratio[0] == pytest.approx(float(ratio))
    gradients = torch.stack([*moments, weights(t)]).diff(dim=0)  # at a constant rate
    cosine = torch.cosine_similarity(gradients[-2], gradients[-1], 0)
    assert signals.grad_cosine[0] == pytest.approx(float(cosine))


def test_gradient_decay_is_that_of_a_linear_recurrence() -> None:
    """An rnn near zero is linear: with W = w I a gradient fades by w per step."""
    w = 0.8
    t = trainer("copy", "rnn", "sgd", double=True)
    with torch.no_grad():
        for p in t.parameters:
            p.mul_(1e-4)
        core = t.model.cores[0]
        assert isinstance(core, Recurrent)
        core.weights(0)[1].copy_(w * torch.eye(5))
    # no sequence begins and the loss is due at the end
    x = torch.zeros(8, BATCH, dtype=torch.int64)
    mask = torch.zeros(8, BATCH, dtype=torch.bool)
    mask[-1] = True
    t.hidden = torch.full_like(t.hidden, 1e-3)
    _, watched = t._watched_gradient(Chunk(x, x, None, mask, scale=float(BATCH)))
    assert float(watched["grad_decay"]) == pytest.approx(-math.log(w), rel=1e-3)


# --- budget -------------------------------------------------------------------------


def played(t: Trainer, truncation: int, range_test: bool = False) -> list[Signals]:
    signals = [t.start(range_test)]
    while not t.done:
        signals.append(t.step(knobs(1e-3, truncation)))
    return signals


@pytest.mark.parametrize("range_test", [False, True])
@pytest.mark.parametrize(("batch", "decisions"), [(2, 25), (8, 12)])
@pytest.mark.parametrize("truncation", [4, 11, 1024])
def test_all_that_is_done_is_charged_and_the_budget_is_met(
    truncation: int,
    batch: int,
    decisions: int,
    range_test: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = 2000.0 * batch * decisions / 12
    t = trainer(cell="rnn", budget=budget, batch=batch, decisions=decisions)
    t.fast = None  # the model is not asked otherwise
    done = [0.0]
    read = SequenceModel.read

    def counted(self: Any, x: Tensor, state: Tensor, starts: Any = None) -> Any:
        done[0] += x.numel() * (1 if torch.is_grad_enabled() else FORWARD_COST)
        return read(self, x, state, starts)

    monkeypatch.setattr(SequenceModel, "read", counted)
    signals = played(t, truncation, range_test)
    assert done[0] == pytest.approx(t.spent)
    assert t.spent == pytest.approx(budget, rel=0.01)
    assert t.decision == decisions == len(signals) - 1
    assert signals[-1].progress[0] == pytest.approx(1, abs=0.01)
    assert signals[0].progress[0] == 0


@pytest.mark.parametrize("decisions", [6, 13, 24])
def test_a_sixth_of_the_decisions_lie_in_the_first_twentieth(decisions: int) -> None:
    config = TrainingConfig(decisions=decisions)
    ends = [config.boundary(i) for i in range(decisions + 1)]
    assert ends[0] == 0 and ends[-1] == pytest.approx(1)
    assert ends[decisions // 6] == pytest.approx(0.05)
    early, late = np.diff(ends[: decisions // 6 + 1]), np.diff(ends[decisions // 6 :])
    assert np.ptp(early) < 1e-12 and np.ptp(late) < 1e-12
    t = trainer(cell="rnn", budget=1000.0 * decisions, decisions=decisions)
    t.start()
    for i in range(1, decisions + 1):
        signals = t.step(knobs(1e-3))
        # to half a window of the plan: errors do not add up
        window = 8 * BATCH / (t.config.budget - t.origin)
        assert signals.progress[0] == pytest.approx(ends[i], abs=0.51 * window)
        left = (t.config.budget - t.spent) / BATCH / 8
        assert signals.windows_left[0] == pytest.approx(max(0.0, left))
        following = ends[min(i + 1, decisions)]
        assert signals.next_progress[0] == pytest.approx(following)


def test_an_interval_holds_four_windows_whatever_is_asked_for() -> None:
    t = trainer(budget=20_000.0, decisions=12)
    signals = t.start()
    for asked in (1024, 4, 1024, 512, 33, 1, *[1024] * 6):
        longest = int(signals.truncation_max[0])
        begin = t.position
        room = t._room()
        signals = t.step(knobs(1e-3, asked))
        truncation = int(signals.truncation[0])
        assert truncation == min(asked, longest)
        steps = t.position - begin
        assert steps >= 4 * truncation and steps % truncation == 0
        # the longest power of two with room for four, and no longer
        assert longest == 2 ** int(math.log2(longest)) and 4 * longest <= room
        assert 8 * longest > room


def test_probing_takes_its_share() -> None:
    share = 0.1
    t = trainer(budget=8000.0, probe_share=share, decisions=12, size=30_000)
    # the start is probed too
    probes = (t.config.decisions + 1) * t._probe_cost
    assert probes == pytest.approx(share * t.config.budget, rel=0.05)


def test_a_budget_that_is_too_small_is_one_line() -> None:
    for decisions in (6, 24):
        with pytest.raises(ValueError) as caught:
            trainer(budget=10.0, decisions=decisions)
        words = str(caught.value)
        assert "\n" not in words and words.startswith("budget is 10 tokens")
        least = float(words.split("at least ")[1].split()[0])
        with pytest.raises(ValueError, match=f"at least {least:.0f} "):
            trainer(budget=least - 1, decisions=decisions)
        t = trainer(budget=least, decisions=decisions)
        for _ in range(2):
            t.start()
        assert t._longest() >= 4 and t._room() >= 4


def test_a_run_that_is_over_is_over() -> None:
    t = trainer(budget=5000.0)
    played(t, 8)
    before = weights(t)
    with pytest.raises(RuntimeError, match="the run is done"):
        t.step(knobs(0.1))
    assert torch.equal(weights(t), before)


def test_copy_goes_through_windows_in_which_nothing_is_due() -> None:
    for truncation in (4, 8, 11, 16, 64, 3):
        t = trainer("copy", budget=6000.0, optimizer="sgd")
        signals = played(t, truncation)
        assert not any(s.recovered[0] for s in signals)
        for s in signals[1:]:
            assert s.train_loss[0] == pytest.approx(s.probe_loss[0], rel=0.3)


def test_an_interval_in_which_nothing_is_due_only_carries_the_state() -> None:
    x = torch.randint(4, (4000, BATCH), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4000, BATCH, dtype=torch.bool)
    mask[-1] = True
    train = Streams(x, x, None, mask)
    built = trainer("markov", budget=5000.0)
    p = built.problem
    problem = Problem(p.inputs, Classes(SYMBOLS), train, p.probe, p.valid, p.test)
    t = Trainer(built.model, problem, built.config)
    t.start()
    before = weights(t)
    signals = t.step(knobs(0.1))
    assert torch.equal(weights(t), before)
    assert np.isnan(signals.train_loss[0]) and np.isnan(signals.grad_norm[0])
    assert not signals.recovered[0] and np.isfinite(signals.probe_loss[0])
    steps = t.position
    with torch.no_grad():
        _, state = t.model(x[:steps], t.model.initial_state(BATCH))
    torch.testing.assert_close(t.hidden, state)


# --- recovery -----------------------------------------------------------------------

Breaker = Callable[[Trainer, pytest.MonkeyPatch], None]


def _loss_becomes(times: float, window: int) -> Breaker:
    def breaks(t: Trainer, patch: pytest.MonkeyPatch) -> None:
        calls, next_chunk = [0], t.next_chunk

        def changed(steps: int) -> Chunk:
            chunk = next_chunk(steps)
            calls[0] += 1
            if calls[0] == window:
                return replace(chunk, scale=chunk.scale / times)
            return chunk

        patch.setattr(t, "next_chunk", changed)

    return breaks


def _gradient_is_nan(t: Trainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(t, "fast", None, raising=False)  # hooks are autograd's
    hook: Callable[[Tensor], Tensor] = lambda grad: grad * math.nan  # noqa: E731
    t.model.head.weight.register_hook(hook)  # type: ignore[no-untyped-call]


def _probe_is_nan(t: Trainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(t, "_probe", lambda: torch.tensor(math.nan))


BREAKERS: dict[str, Breaker] = {
    "the first loss is NaN": _loss_becomes(math.nan, 1),
    "a loss is infinite": _loss_becomes(1e42, 3),  # in float32
    "losses are far above the usual": _loss_becomes(1e3, 2),
    "a gradient is NaN": _gradient_is_nan,
    "the probe is NaN": _probe_is_nan,
}
NEVER_MEASURED = {"range_lr"}
AFTER_RECOVERY = NEVER_MEASURED | {
    "train_loss",
    "loss_noise",
    "grad_norm",
    "clip_fraction",
    "grad_cosine",
    "update_ratio",
    "carried_grad",
    "grad_decay",
}


def check_flags(signals: Signals, expected_nan: set[str]) -> None:
    row = signals.to_row()
    assert {name for name, value in row.items() if math.isnan(value)} == expected_nan
    assert not any(math.isinf(value) for value in row.values())


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("how", list(BREAKERS))
def test_divergence_is_rolled_back(
    how: str, after: int, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, optimiser and state are as before; data, budget and time go on."""
    t = trainer(optimizer=optimizer, decisions=12)
    t.start()
    for _ in range(after):
        check_flags(t.step(knobs(1e-3)), NEVER_MEASURED)
    before = bits([weights(t), t.optimizer.state_dict()["state"], t.hidden])
    position, probe = t.position, t.last_probe
    BREAKERS[how](t, monkeypatch)
    signals = t.step(knobs(0.5, lr_end=0.4))
    now = bits([weights(t), t.optimizer.state_dict()["state"], t.hidden])
    assert now == before
    check_flags(signals, AFTER_RECOVERY)
    assert signals.recovered[0] == 1 and signals.lr_scale[0] == 0.5
    assert signals.failed[0] == 0 and signals.probe_loss[0] == probe
    assert signals.lr[0] == 0.4
    assert t.decision == after + 1 and t.position != position
    share = t.config.boundary(t.decision)
    if how != "the probe is NaN":  # which was not charged either
        assert signals.progress[0] == pytest.approx(share, abs=0.01)


def test_a_recovery_holds_the_rates_down_for_two_decisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t = trainer(decisions=12, optimizer="sgd")
    t.start()
    with monkeypatch.context() as patch:
        BREAKERS["a loss is infinite"](t, patch)
        t.step(knobs(0.08))
    used: list[float] = []
    set_lr = t._set_lr

    def noted(lr: float) -> None:
        used.append(lr)
        set_lr(lr)

    monkeypatch.setattr(t, "_set_lr", noted)
    for expected, asked in ((0.04, 1.0), (0.04, 1.0), (0.5, 1.0), (0.01, 0.02)):
        used.clear()
        signals = t.step(knobs(asked))
        assert set(used) == {expected} and signals.lr[0] == expected
        assert signals.lr_scale[0] == 0.5
        assert signals.recovered[0] == 0
    # a lower rate than the ceiling is only halved
    with monkeypatch.context() as patch:
        patch.setattr(t, "_set_lr", set_lr)
        BREAKERS["a loss is infinite"](t, patch)
        t.step(knobs(0.08))
    assert t.step(knobs(0.02)).lr[0] == 0.25 * 0.02


def test_three_recoveries_in_a_row_are_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t = trainer(decisions=12)
    t.start()

    def step(breaks: bool) -> Signals:
        with monkeypatch.context() as patch:
            if breaks:
                BREAKERS["a loss is infinite"](t, patch)
            return t.step(knobs(1e-3))

    for breaks in (True, True, False, True, True):
        assert step(breaks).failed[0] == 0 and not t.done
    signals = step(True)
    assert signals.failed[0] == 1 and t.done and t.decision == 6
    assert signals.lr_scale[0] == 0.5**5
    assert GIVE_UP == 3 and torch.isfinite(weights(t)).all()
    check_flags(signals, AFTER_RECOVERY)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_huge_rate_is_survived(cell: Cell) -> None:
    t = trainer(cell=cell, optimizer="sgd", clip=1e9, budget=30_000.0, decisions=24)
    first = t.start().probe_loss[0]
    signals = []
    while not t.done:
        signals.append(t.step(knobs(1000.0)))
        assert torch.isfinite(weights(t)).all() and torch.isfinite(t.hidden).all()
        assert not any(math.isinf(v) for v in signals[-1].to_row().values())
    assert sum(s.recovered[0] for s in signals) >= 3
    # nothing that made things much worse was kept
    assert signals[-1].probe_loss[0] < 2 * first


def test_only_the_rate_that_was_in_force_is_remembered() -> None:
    """A recovery forgets nothing: what follows is what a run at the halved rate, from
    the same weights at the same place of the data, does."""
    a, b = (trainer(optimizer="momentum", decisions=12) for _ in range(2))
    for t in (a, b):
        t.start()
        t.step(knobs(1e-2))
    with pytest.MonkeyPatch.context() as patch:
        BREAKERS["a gradient is NaN"](a, patch)
        hook = a.model.head.weight._backward_hooks
        a.step(knobs(1e-2))
        assert hook is not None
        hook.clear()
    for name in ("position", "spent", "decision"):
        setattr(b, name, getattr(a, name))
    a.step(knobs(4e-3))
    b.step(knobs(2e-3))
    assert torch.equal(weights(a), weights(b))


# --- resuming, seeds ----------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    ("optimizer", "kind"), [("adam", "markov"), ("momentum", "copy")]
)
def test_resuming_at_any_decision_goes_on_to_the_same_bits(
    kind: Kind, optimizer: Optimizer, cell: Cell, tmp_path: Path
) -> None:
    def step(t: Trainer) -> Signals:
        with pytest.MonkeyPatch.context() as patch:
            if t.decision == 2:  # the ceiling and the halved rate are resumed too
                BREAKERS["a loss is infinite"](t, patch)
            return t.step(knobs(0.02, 7 + t.decision, lr_end=0.01))

    whole = trainer(kind, cell, optimizer, budget=4000.0, decisions=7)
    whole.start(range_test=True)
    seen, files = [], []
    while True:
        path = tmp_path / f"{whole.decision}.zip"
        checkpoint.save(path, whole.state_dict())
        files.append(path)
        if whole.done:
            break
        seen.append(bits(vars(step(whole))))
    assert len(files) == 8
    for begin, path in enumerate(files):
        t = trainer(kind, cell, optimizer, budget=4000.0, decisions=7)
        t.load_state_dict(checkpoint.load(path))
        assert t.decision == begin
        for expected in seen[begin:]:
            assert bits(vars(step(t))) == expected
        assert t.done
        assert bits(t.state_dict()) == bits(whole.state_dict())


def test_same_seed_same_bits_and_another_seed_other_bits() -> None:
    def run(seed: int) -> Any:
        t = trainer(seed=seed, budget=5000.0)
        return bits([list(map(vars, played(t, 8))), weights(t)])

    assert run(0) == run(0) != run(1)


def test_no_global_random_state_is_read_or_written() -> None:
    # In a process of its own: the checks of shapes in tests draw random numbers.
    code = """
import random, numpy, torch
from rlrnn.envs.tuning import TuningEnv
from rlrnn.control import prior
from rlrnn.models import ModelConfig
from rlrnn.tasks import DataConfig, Task, build_trainer
from rlrnn.ledger import TrainingConfig
torch.set_num_threads(1)
def states():
    torchs = torch.get_rng_state().tolist()
    return str((torchs, numpy.random.get_state(), random.getstate()))
def run():
    data = DataConfig("copy", batch=2, size=2000)
    task = Task(data, ModelConfig("gru", 4), TrainingConfig(2000.0, decisions=6))
    trainer = build_trainer(task)
    signals, state = trainer.start(range_test=True), prior().init(1)
    while not trainer.done:
        knobs, state = prior()(signals, state)
        signals = trainer.step(knobs)
    env = TuningEnv(task)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    return trainer.model.head.weight
before = states()
first = run()
assert states() == before
torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
assert torch.equal(run(), first)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the device is read once per interval -------------------------------------------


METHODS = ["item", "cpu", "tolist", "numpy", "nonzero"]
METHODS += ["__bool__", "__float__", "__int__", "__index__", "__array__"]


def reads_of(t: Trainer, k: Knobs, patch: pytest.MonkeyPatch) -> list[str]:
    """What one step asks of the device."""
    reads = Syncs()
    with patch.context() as inner, reads:
        inner.setattr(t, "fast", None, raising=False)  # which is a CPU's
        for name in METHODS:
            original = getattr(Tensor, name)

            def noted(
                self: Tensor,
                *args: Any,
                _name: str = name,
                _original: Any = original,
                **kwargs: Any,
            ) -> Any:
                reads.found.append(_name)
                return _original(self, *args, **kwargs)

            inner.setattr(Tensor, name, noted)
        t.step(k)
    return reads.found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["markov", "copy"])
def test_an_interval_reads_the_device_once(
    kind: Kind, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what an accelerator would run
    monkeypatch.setattr("rlrnn.recurrent.compiles", lambda x: False)
    for truncation in (5, 64):
        t = trainer(kind, optimizer=optimizer, budget=7000.0)
        t.start()
        for _ in range(2):
            begin = t.position
            found = reads_of(t, knobs(1e-3, truncation), monkeypatch)
            # one copy, which is then looked at on the host
            assert found == ["cpu", "numpy"], (truncation, found)
            chunk = t.problem.train.window(begin, 64)
            assert (chunk.starts is not None) == (kind == "copy" or begin == 0)


def test_the_count_of_reads_sees_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer()
    t.start()
    gradient = t._gradient

    def peeking(chunk: Chunk, truncation: int) -> Tensor:
        loss = gradient(chunk, truncation)
        assert loss > 0
        return loss

    monkeypatch.setattr(t, "_gradient", peeking)
    assert len(reads_of(t, knobs(1e-3), monkeypatch)) > 4


# --- the range test -----------------------------------------------------------------


def test_a_range_test_leaves_nothing_but_its_finding() -> None:
    a, b = (trainer(budget=30_000.0) for _ in range(2))
    a.start(range_test=False)
    signals = b.start(range_test=True)
    assert torch.equal(weights(a), weights(b))
    assert torch.equal(a.hidden, b.hidden)
    assert not b.optimizer.state_dict()["state"]
    assert b.spent > a.spent and b.position > a.position == 0
    assert b.origin == b.spent and signals.progress[0] == 0
    # what it took is what it may take, to a window
    taken = b.spent - a.spent
    share = b.config.range_test_share * b.config.budget
    assert taken == pytest.approx(share, abs=16 * BATCH)
    assert np.isnan(a._signals(truncation=4).range_lr[0])


def sweep(best: float, floor: float = 0.5) -> tuple[NDArray[np.float64], Any]:
    """Losses that fall from 1 to `floor` at the rate `best`, then blow up."""
    rates = np.geomspace(1e-4, 1.0, 81)
    far = np.log(rates / best)
    falls = 1 - (1 - floor) * np.exp(-(np.minimum(far, 0) ** 2) / 4)
    return rates, np.where(far > 0, floor * np.exp(far**2 * 3), falls)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("truncation", [4, 16])
def test_suggestion_is_where_most_of_the_fall_is_done(
    truncation: int, power: float
) -> None:
    for best in (1e-3, 1e-2, 0.1):
        rates, losses = sweep(best)
        found = suggest_lambda(rates, losses, truncation, power)
        level = losses[:3].mean()
        fallen = (level - losses) / (level - losses.min())
        expected = rates[np.argmax(fallen >= RANGE_SHARE)] / truncation**power
        # to two steps of the sweep: it is smoothed over five
        assert found == pytest.approx(expected, rel=0.3)
        assert found < best / truncation**power


def test_plain_sgd_gets_more_than_the_sweep_suggests() -> None:
    rates, losses = sweep(1e-2)
    found = {}
    for optimizer in ("momentum", "sgd"):
        t = trainer(optimizer=optimizer)
        t.begin(2.0, (rates, losses, 4))
        found[optimizer] = t.range_lr
    assert found["momentum"] == suggest_lambda(rates, losses, 4, 1.0)
    assert found["sgd"] == SGD_FACTOR * found["momentum"]


def test_suggestion_does_not_see_what_comes_after_the_explosion() -> None:
    rates, losses = sweep(1e-2)
    end = int(np.argmax(losses > 2))
    expected = suggest_lambda(rates, losses, 4, 0.5)
    for after in (np.nan, np.inf, 1e-3, 5.0):
        changed = losses.copy()
        changed[end + 1 :] = after
        assert suggest_lambda(rates, changed, 4, 0.5) == expected


def test_suggestion_is_free_of_the_scale_and_turns_with_the_rates() -> None:
    rates, losses = sweep(1e-2)
    expected = suggest_lambda(rates, losses, 4, 0.5)
    assert suggest_lambda(rates, 8 * losses, 4, 0.5) == expected
    assert suggest_lambda(3 * rates, losses, 4, 0.5) == pytest.approx(3 * expected)
    noise = np.random.default_rng(0).normal(1, 0.01, len(losses))
    noisy = suggest_lambda(rates, losses * noise, 4, 0.5)
    assert noisy == pytest.approx(expected, rel=0.3)


def test_no_suggestion_where_the_sweep_cannot_tell() -> None:
    rates = np.geomspace(1e-4, 1.0, 40)
    ones = np.ones(40)
    never = (
        ones,
        np.linspace(1, 1.5, 40),
        np.linspace(1, 0.985, 40),
        np.full(40, np.nan),
        np.full(40, np.inf),
        np.where(np.arange(40) < 1, 1.0, np.inf),
    )
    for losses in never:
        assert math.isnan(suggest_lambda(rates, losses, 4, 0.5))
    assert math.isnan(suggest_lambda(rates[:4], ones[:4] / rates[:4], 4, 0.5))
    assert math.isfinite(suggest_lambda(rates, np.linspace(1, 0.9, 40), 4, 0.5))


def test_windows_without_a_loss_do_not_matter() -> None:
    rates, losses = sweep(1e-2)
    holes = losses.copy()
    holes[1::2] = np.nan
    expected = suggest_lambda(rates[::2], losses[::2], 4, 0.5)
    assert suggest_lambda(rates, holes, 4, 0.5) == expected


def test_the_prior_learns() -> None:
    """The whole chain: range test, warm-up, cosine."""
    t = trainer(budget=40_000.0, decisions=12)
    controller: Steered = prior()
    state = controller.init(1)
    signals = t.start(controller.range_test)
    first = signals.probe_loss[0]
    while not t.done:
        k, state = controller(signals, state)
        signals = t.step(k)
    assert signals.probe_loss[0] < 0.9 * first


def test_half_precision_learns_the_same() -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        t = trainer(budget=40_000.0, precision=precision)
        assert (t.fast is None) == (precision == "bfloat16")
        signals = t.start()
        first = signals.probe_loss[0]
        while not t.done:
            signals = t.step(knobs(1e-2))
        assert t.hidden.dtype == weights(t).dtype == torch.float32
        losses.append(signals.probe_loss[0])
    assert losses[0] < 0.9 * first
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            {"precision": "float16"},
            "precision is 'float16', expected one of float32, bfloat16",
        ),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": math.nan}, "budget is nan"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"decisions": 5}, "decisions is 5"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"probe_share": 0.5}, "probe_share is 0.5"),
        ({"range_test_share": 0.0}, "range_test_share is 0.0"),
    ],
)
def test_a_wrong_setting_is_one_line(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        # as a config file would: types are not checked
        made = object.__new__(TrainingConfig)
        made.__dict__.update({**vars(TrainingConfig()), **setting})
        made.__post_init__()
    assert says in str(caught.value) and "\n" not in str(caught.value)
