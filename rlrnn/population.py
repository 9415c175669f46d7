"""Many training runs in one program: what M trainers do, in one batched computation.

    population = Population(trainers)
    signals = population.start()
    while not population.done.all():
        knobs, state = controller(signals, state)
        signals = population.step(knobs)
    population.sync()                       # the trainers are as if each had run alone

Each run keeps its own books (`rlrnn.ledger`): budget, decisions, recovery. Runs of one
form share a `Stack`, whose windows advance side by side for as long as their K is the
same.

Shapes: M runs, N of them in a job; W windows of K steps; B columns; P parameters.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlrnn.control import Array, Controller, Knobs, Signals
from rlrnn.data.chunks import Chunk
from rlrnn.evaluation import WINDOW
from rlrnn.ledger import Interval, Measured, TrainingConfig
from rlrnn.stacked import Form, Stack, Windows
from rlrnn.training import Trainer, fading

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")


class Population:
    """M trainers that advance together.

    Between `step` and `sync` the trainers' books are right, but not their weights,
    optimisers and hidden states. Raises ValueError for a trainer with options that a
    stack has not: anything but cell, sizes, optimiser, clip and weight decay, or whole
    sequences.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = list(trainers)
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, trainer in enumerate(self.trainers):
            _check(trainer)
            device, dtype = trainer.device, trainer.parameters[0].dtype
            objective = trainer.problem.objective
            form = Form.of(trainer.model)
            groups[form, objective, trainer.batch, device, dtype].append(number)
        self.cohorts = [
            _Cohort(members, [self.trainers[number] for number in members])
            for members in groups.values()
        ]
        self._last: list[Signals | None] = [None] * len(self.trainers)

    @property
    def done(self) -> NDArray[np.bool_]:
        """[M]: which runs have ended."""
        return np.array([trainer.done for trainer in self.trainers])

    def start(self, range_test: bool = False) -> Signals:
        """The signals before the first decision, [M] each."""
        for cohort in self.cohorts:
            everyone = list(range(len(cohort.members)))
            probes = cohort.probe(everyone)
            sweeps: list[tuple[Array, Array, int] | None] = [None] * len(everyone)
            if range_test:
                sweeps = list(cohort.sweep(everyone))
            for row, probe, sweep in zip(everyone, probes, sweeps, strict=True):
                signals = cohort.trainers[row].begin(probe, sweep)
                self._last[cohort.members[row]] = signals
        return self._signals()

    def step(self, knobs: Knobs) -> Signals:
        """One decision interval of each run that has not ended, under knobs [M]; as
        `Trainer.step`. Of those that have ended the last signals are told again.

        Raises RuntimeError if all have.
        """
        if self.done.all():
            raise RuntimeError("all runs are done: their budgets are spent")
        for cohort in self.cohorts:
            rows = [r for r, trainer in enumerate(cohort.trainers) if not trainer.done]
            if not rows:
                continue
            before = cohort.snapshot(rows)
            jobs = []
            for row in rows:
                trainer, member = cohort.trainers[row], cohort.members[row]
                plan = trainer.plan(single(knobs, member))
                jobs.append(_Job(row, plan.truncation, plan.rates, trainer, plan))
            played = cohort.play(jobs)
            ratios = cohort.update_ratios(rows, before)
            probes = cohort.probe(rows)
            recovered = []
            for place, job in enumerate(jobs):
                watched = {**played[place].watched, "update_ratio": ratios[place]}
                losses, due = played[place].losses, played[place].due
                measured = Measured(
                    probes[place],
                    losses[due > 0] / due[due > 0],
                    due[due > 0],
                    played[place].norms[due > 0],
                    watched,
                )
                assert job.interval is not None
                signals = job.trainer.settle(job.interval, measured)
                self._last[cohort.members[job.row]] = signals
                if signals.recovered[0]:
                    recovered.append(place)
            cohort.restore(rows, before, recovered)
        return self._signals()

    def sync(self) -> None:
        """Gives the trainers their weights, optimisers and hidden states."""
        for cohort in self.cohorts:
            cohort.sync()

    def _signals(self) -> Signals:
        rows = [signals for signals in self._last if signals is not None]
        assert len(rows) == len(self.trainers), "start() comes before step()"
        return joined(rows)


FREE = (  # the options of a training that a population has
    "budget",
    "epochs",
    "optimizer",
    "weight_decay",
    "clip",
    "decisions",
    "probe_share",
    "range_test_share",
)


def suits(trainer: Trainer) -> bool:
    """Whether a population can hold this run."""
    config = trainer.config
    plain = TrainingConfig(**{name: getattr(config, name) for name in FREE})
    return (
        config == plain
        and config.optimizer in OPTIMIZERS
        and not trainer.source.whole
        and Form.fits(trainer.model)
    )


MOST = 64  # runs side by side, which bounds what their data take


def play_all(
    trainers: Sequence[Trainer], controllers: Sequence[Controller]
) -> list[list[Signals]]:
    """Fresh trainers, each to its end under a controller of its own; those that a
    population can hold side by side, the others one after the other. The signals of
    each run [1], those of `start` first."""
    told: list[list[Signals]] = [[] for _ in trainers]
    for tested in (False, True):
        numbers = [i for i, c in enumerate(controllers) if c.range_test == tested]
        together = [i for i in numbers if suits(trainers[i])]
        for begin in range(0, len(together), MOST):
            some = together[begin : begin + MOST]
            these = [controllers[i] for i in some]
            rows = _together([trainers[i] for i in some], these, tested)
            for number, signals in zip(some, rows, strict=True):
                told[number] = signals
        for number in sorted(set(numbers) - set(together)):
            told[number] = play_alone(trainers[number], controllers[number])
    return told


def _together(
    trainers: Sequence[Trainer], controllers: Sequence[Controller], range_test: bool
) -> list[list[Signals]]:
    population = Population(trainers)
    states = [controller.init(1) for controller in controllers]
    first = population.start(range_test)
    told = [[single(first, i)] for i in range(len(trainers))]
    while not population.done.all():
        chosen = []
        for i, controller in enumerate(controllers):
            knobs, states[i] = controller(told[i][-1], states[i])
            chosen.append(knobs)
        going = ~population.done
        signals = population.step(joined(chosen))
        for i in map(int, np.flatnonzero(going)):
            told[i].append(single(signals, i))
    population.sync()
    return told


def play_alone(trainer: Trainer, controller: Controller) -> list[Signals]:
    """The same of one run, by itself."""
    state, told = controller.init(1), [trainer.start(controller.range_test)]
    while not trainer.done:
        knobs, state = controller(told[-1], state)
        told.append(trainer.step(knobs))
    return told


def _check(trainer: Trainer) -> None:
    if not suits(trainer):
        raise ValueError(
            "a population trains on streams with sgd, momentum, adam or adamw and no "
            f"options but {', '.join(FREE)}; train such a run alone"
        )


Arrays = TypeVar("Arrays", Knobs, Signals)


def joined(rows: Sequence[Arrays]) -> Arrays:
    """The knobs, or the signals, of several runs as one."""
    names = [entry.name for entry in fields(rows[0])]
    columns = {n: np.concatenate([getattr(row, n) for row in rows]) for n in names}
    return type(rows[0])(**columns)


def single(of: Arrays, run: int) -> Arrays:
    """The knobs, or the signals, of one run of several."""
    return type(of)(**{name: value[run : run + 1] for name, value in vars(of).items()})


@dataclass(frozen=True)
class _Job:
    """W windows of K steps of one run, each with its rate; the last one is watched if
    they are those of an interval."""

    row: int
    truncation: int
    rates: Array  # [W]
    trainer: Trainer
    interval: Interval | None = None


@dataclass(frozen=True)
class _Played:
    """What a job's windows gave: losses and norms [W], and the due share [W]."""

    losses: Array
    norms: Array
    due: Array
    watched: dict[str, float]


@dataclass(frozen=True)
class _Snapshot:
    tensors: list[Tensor]  # of the rows: weights, moments, counts, hidden state


class _Cohort:
    """Runs of one form: their stack and their hidden states [N, S, B, H]."""

    def __init__(self, members: list[int], trainers: list[Trainer]) -> None:
        self.members, self.trainers = members, trainers
        configs = [trainer.config for trainer in trainers]
        self.stack = Stack(
            [trainer.model for trainer in trainers],
            trainers[0].problem.objective,
            [config.optimizer for config in configs],
            [config.weight_decay for config in configs],
        )
        self.hidden = torch.stack([trainer.hidden.detach() for trainer in trainers])
        self.device = self.hidden.device
        clips = [config.clip for config in configs]
        self.clip = torch.tensor(clips, dtype=torch.float64, device=self.device)
        for row, trainer in enumerate(trainers):
            self._take_optimizer(row, trainer)

    def _kept(self) -> list[Tensor]:
        stack = self.stack
        return [stack.weights, stack.first, stack.second, stack.updates, self.hidden]

    def _rows(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, device=self.device)

    def snapshot(self, rows: list[int]) -> _Snapshot:
        at = self._rows(rows)
        return _Snapshot([kept[at] for kept in self._kept()])

    def restore(self, rows: list[int], before: _Snapshot, places: list[int]) -> None:
        """Puts back those of `rows` whose places are given."""
        if places:
            at, of = self._rows([rows[p] for p in places]), self._rows(places)
            for kept, old in zip(self._kept(), before.tensors, strict=True):
                kept[at] = old[of]

    def update_ratios(self, rows: list[int], before: _Snapshot) -> list[float]:
        old = before.tensors[0]
        change = (self.stack.weights[self._rows(rows)] - old).norm(dim=1)
        ratios: list[float] = (change / old.norm(dim=1)).double().tolist()
        return ratios

    # --- windows --------------------------------------------------------------------

    def play(self, jobs: list[_Job]) -> list[_Played]:
        """Those of one K side by side, the longest first, so that the runs which are
        still going are always the first ones."""
        played: dict[int, _Played] = {}
        for truncation in sorted({job.truncation for job in jobs}):
            same = [job for job in jobs if job.truncation == truncation]
            same.sort(key=lambda job: -len(job.rates))
            for job, result in zip(same, self._side_by_side(same), strict=True):
                played[job.row] = result
        return [played[job.row] for job in jobs]

    def _side_by_side(self, jobs: list[_Job]) -> list[_Played]:
        k, count = jobs[0].truncation, len(jobs)
        lengths = np.array([len(job.rates) for job in jobs])
        most = int(lengths[0])
        chunks = [job.trainer.next_chunk(k * len(job.rates)) for job in jobs]
        due = self._due(chunks, lengths, k)
        x, y = (
            _laid([c.x for c in chunks], most * k),
            _laid([c.y for c in chunks], most * k),
        )
        starts = _flags([c.starts for c in chunks], x, False)
        mask = _flags([c.mask for c in chunks], x, True)
        scale = torch.tensor(
            [c.scale / n for c, n in zip(chunks, lengths, strict=True)],
            dtype=torch.float64,
            device=self.device,
        )
        rates = np.zeros((count, most))
        for place, job in enumerate(jobs):
            rates[place, : lengths[place]] = job.rates
        lr = torch.from_numpy(rates).to(self.device)
        active = torch.from_numpy(due > 0).to(self.device)
        rows = self._rows([job.row for job in jobs])
        figures = self.hidden.new_full((2, count, most), math.nan)
        watch = _Watch(self, jobs, due)
        for w in range(most):
            n = int((lengths > w).sum())
            at, steps = rows[:n], slice(w * k, (w + 1) * k)
            windows = Windows(
                x[:n, steps],
                y[:n, steps],
                None if starts is None else starts[:n, steps],
                None if mask is None else mask[:n, steps],
                scale[:n],
            )
            state = self.hidden[at]
            done = self.stack.window(
                windows,
                state,
                lr[:n, w],
                self.clip[at],
                at,
                None if mask is None else active[:n, w],
                watch=watch.cuts(w),
                keep=watch.keeps(w),
            )
            self.hidden[at] = done.state
            figures[0, :n, w], figures[1, :n, w] = done.loss, done.norm
            watch.look(w, done.far, done.near, state, done.loss)
        losses, norms = figures.double().cpu().numpy()
        watched = watch.read()
        return [
            _Played(losses[p, :n], norms[p, :n], due[p, :n], watched[p])
            for p, n in enumerate(lengths)
        ]

    def _due(self, chunks: list[Chunk], lengths: NDArray[np.int64], k: int) -> Array:
        """[N, W]: the due share of each window; 0 after a run's last."""
        due = np.zeros((len(chunks), int(lengths[0])))
        for place, (chunk, n) in enumerate(zip(chunks, lengths, strict=True)):
            if chunk.mask is None:
                due[place, :n] = 1.0
            else:
                counts = chunk.mask.view(n, -1).sum(1).cpu().numpy()
                due[place, :n] = counts / (chunk.scale / n)
        return due

    def probe(self, rows: list[int]) -> list[float]:
        """The probe losses of these runs, charged to them; as `mean_loss`."""
        found: dict[int, float] = {}
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row in rows:
            trainer = self.trainers[row]
            trainer.charge_probe()
            groups[trainer.probe_steps, trainer.problem.probe.batch].append(row)
        for (steps, columns), same in groups.items():
            at = self._rows(same)
            state = self.stack.initial_state(columns)[: len(same)]
            total, due = state.new_zeros(len(same)), np.zeros(len(same))
            for begin in range(0, steps, WINDOW):
                span = min(WINDOW, steps - begin)
                chunks = [
                    self.trainers[row].problem.probe.window(begin, span) for row in same
                ]
                scale = [chunk.scale for chunk in chunks]
                x = _laid([c.x for c in chunks], span)
                windows = Windows(
                    x,
                    _laid([c.y for c in chunks], span),
                    _flags([c.starts for c in chunks], x, False),
                    _flags([c.mask for c in chunks], x, True),
                    torch.tensor(scale, dtype=torch.float64, device=self.device),
                )
                loss, state = self.stack.evaluate(windows, state, at)
                total = total + loss * windows.scale.to(loss)
                due += [c.due * c.scale for c in chunks]
            means = total.double().cpu().numpy() / due
            found |= dict(zip(same, map(float, means), strict=True))
        return [found[row] for row in rows]

    def sweep(self, rows: list[int]) -> list[tuple[Array, Array, int]]:
        """A range test of each run: rates, losses and K; then all is as before."""
        before = self.snapshot(rows)
        jobs = []
        for row in rows:
            rates, truncation = self.trainers[row].range_plan()
            jobs.append(_Job(row, truncation, rates, self.trainers[row]))
        sweeps = []
        for job, played in zip(jobs, self.play(jobs), strict=True):
            due = np.where(played.due > 0, played.due, np.nan)
            sweeps.append((job.rates, played.losses / due, job.truncation))
        self.restore(rows, before, list(range(len(rows))))
        return sweeps

    # --- trainers -------------------------------------------------------------------

    def _take_optimizer(self, row: int, trainer: Trainer) -> None:
        """The moments of a trainer that has already learned."""
        states = [trainer.optimizer.state.get(p, {}) for p in trainer.parameters]
        first = [state.get("exp_avg", state.get("momentum_buffer")) for state in states]
        if any(moment is None for moment in first):
            return
        self.stack.first[row] = torch.cat([moment.flatten() for moment in first])
        if "exp_avg_sq" in states[0]:
            second = [state["exp_avg_sq"].flatten() for state in states]
            self.stack.second[row] = torch.cat(second)
            self.stack.updates[row] = float(states[0]["step"])

    def sync(self) -> None:
        stack = self.stack
        stack.write([trainer.model for trainer in self.trainers])
        first, second = stack.parameters(stack.first), stack.parameters(stack.second)
        updates = stack.updates.float()
        for row, trainer in enumerate(self.trainers):
            trainer.hidden = self.hidden[row].clone()
            trainer.optimizer.zero_grad(set_to_none=True)
            if not float(updates[row]):
                continue
            for parameter, m, v in zip(trainer.parameters, first, second, strict=True):
                state = trainer.optimizer.state[parameter]
                if trainer.config.power < 1:
                    state["step"] = updates[row].clone()
                    state["exp_avg"] = m[row].clone()
                    state["exp_avg_sq"] = v[row].clone()
                elif trainer.config.optimizer == "momentum":
                    state["momentum_buffer"] = m[row].clone()


class _Watch:
    """The last window of each interval, cut in the middle, and the cosine of the last
    two gradients: as `Trainer` has them."""

    def __init__(self, cohort: _Cohort, jobs: list[_Job], due: Array) -> None:
        self.cohort, self.jobs = cohort, jobs
        self.last: dict[int, list[int]] = defaultdict(list)  # by window: places
        self.before: dict[int, list[int]] = defaultdict(list)
        for place, job in enumerate(jobs):
            end = len(job.rates) - 1
            known = np.flatnonzero(due[place, : end + 1])
            if job.interval is not None and len(known) and known[-1] == end:
                self.last[end].append(place)
                if len(known) > 1:
                    self.before[int(known[-2])].append(place)
        self.wide = jobs[0].truncation > 1
        self.grads: dict[int, Tensor] = {}
        self.seen: list[tuple[list[int], list[str], Tensor]] = []

    def cuts(self, window: int) -> bool:
        return self.wide and bool(self.last.get(window))

    def keeps(self, window: int) -> bool:
        return bool(self.last.get(window) or self.before.get(window))

    def look(
        self, window: int, far: Tensor, near: Tensor, state: Tensor, loss: Tensor
    ) -> None:
        """After a window; `state` is the one before it."""
        grads = self.cohort.stack.grads
        places = self.last.get(window, [])
        if places:
            figures: dict[str, Tensor] = {}
            if self.wide:
                at = torch.tensor(places, device=state.device)
                carried = state[at].flatten(1).norm(dim=1)
                steps = self.jobs[0].truncation
                figures = fading(far[at], near[at], carried, loss[at], steps)
            if figures:
                values = torch.stack(list(figures.values()))
                self.seen.append((places, list(figures), values))
            compared = [place for place in places if place in self.grads]
            if compared:
                rows = [self.jobs[place].row for place in compared]
                now = grads[self.cohort._rows(rows)]
                old = torch.stack([self.grads[place] for place in compared])
                size = (now.norm(dim=1) * old.norm(dim=1)).clamp_min(1e-12)
                cosine = (now * old).sum(1) / size
                self.seen.append((compared, ["grad_cosine"], cosine.unsqueeze(0)))
        for place in self.before.get(window, []):
            self.grads[place] = grads[self.jobs[place].row].clone()

    def read(self) -> list[dict[str, float]]:
        watched: list[dict[str, float]] = [{} for _ in self.jobs]
        for places, names, values in self.seen:
            for name, row in zip(names, values.double().tolist(), strict=True):
                for place, value in zip(places, row, strict=True):
                    watched[place][name] = value
        return watched


def _laid(parts: list[Tensor], steps: int) -> Tensor:
    """Parts [T, B, ...] of T up to `steps` as [N, steps, B, ...]; zeros after them."""
    first = parts[0]
    laid = first.new_zeros(len(parts), steps, *first.shape[1:])
    for place, part in enumerate(parts):
        laid[place, : len(part)] = part
    return laid


def _flags(parts: list[Tensor | None], x: Tensor, absent: bool) -> Tensor | None:
    """The same of starts or masks; `absent` where a run has none, None if all have."""
    if all(part is None for part in parts):
        return None
    laid = torch.full(x.shape[:3], absent, dtype=torch.bool, device=x.device)
    for place, part in enumerate(parts):
        if part is not None:
            laid[place, : len(part)] = part
    return laid
