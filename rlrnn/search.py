"""Search over a rate, a truncation and a schedule: what a user with time to spare does.

All select on the probe loss alone, and tell what they cost, in budgets of one run. A
search sees a task through two seams, so that many runs can be played at once:

    outcomes = play(task, [settings, ...])      each run to its end
    run = begin(task, settings)                 a run that stops and goes on
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from rlrnn.baselines import Constant, WarmupCosine
from rlrnn.checks import at_least
from rlrnn.control import LR_BOUNDS, TRUNCATION_BOUNDS, Controller
from rlrnn.evaluation import mean_loss
from rlrnn.population import play_all
from rlrnn.tasks import Task, build_problem, build_trainer
from rlrnn.training import Trainer

Schedule = Literal["constant", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
TRUNCATIONS = (4, 8, 16, 32, 64, 128, 256)
RATES = 13  # of a grid


@dataclass(frozen=True)
class Settings:
    """What is searched over: a rate (its peak, under a cosine), K, and a schedule."""

    lr: float
    truncation: int
    schedule: Schedule = "constant"

    def controller(self) -> Controller:
        kind = WarmupCosine if self.schedule == "cosine" else Constant
        return kind(self.lr, self.truncation)


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `valid_loss` is nothing that a search may look at."""

    settings: Settings
    probe_loss: float
    valid_loss: float
    cost: float  # in budgets


@dataclass(frozen=True)
class Found:
    """The run that a search settles on, what the search cost in budgets of one run, and
    the runs that it played to their end."""

    best: Outcome
    cost: float
    runs: list[Outcome]


class Run(Protocol):
    """A run under way."""

    def advance(self, decisions: int) -> float:
        """Goes on until so many decisions have been made; the probe loss there,
        infinite if the run has failed."""
        ...

    @property
    def cost(self) -> float: ...

    def outcome(self) -> Outcome: ...


class Training:
    """A `Run` of a trainer under fixed settings, which may be changed on the way."""

    def __init__(self, task: Task, settings: Settings, device: str = "cpu") -> None:
        self.settings = settings
        self.trainer = build_trainer(task, device)
        self.signals = self.trainer.start()
        self.tokens = self.trainer.spent

    def advance(self, decisions: int) -> float:
        controller = self.settings.controller()
        before, state = self.trainer.spent, controller.init(1)
        while not self.trainer.done and self.trainer.decision < decisions:
            knobs, state = controller(self.signals, state)
            self.signals = self.trainer.step(knobs)
        self.tokens += self.trainer.spent - before
        return math.inf if self.signals.failed[0] else self.trainer.last_probe

    def take(self, other: "Training") -> None:
        """Goes on from another's weights, optimiser and place in the data."""
        # the trees of two optimisers must not share their tensors
        self.trainer.load_state_dict(copy.deepcopy(other.trainer.state_dict()))
        self.signals, self.settings = other.signals, other.settings

    @property
    def cost(self) -> float:
        """What this run has itself computed."""
        return self.tokens / self.trainer.budget

    def outcome(self) -> Outcome:
        return Outcome(
            self.settings, self.trainer.last_probe, held_out(self.trainer), self.cost
        )


Play = Callable[[Task, Sequence[Settings]], list[Outcome]]
Begin = Callable[[Task, Settings], Run]


def held_out(trainer: Trainer) -> float:
    """The mean loss on the validation part; not charged to the budget."""
    problem = trainer.problem
    with trainer.kept_weights():
        loss = mean_loss(
            trainer.model, problem.objective, problem.valid, problem.valid.length
        )
    return float(loss)


def play_together(task: Task, settings: Sequence[Settings]) -> list[Outcome]:
    """Side by side, where a population can hold them; their data are made once."""
    problem = build_problem(task)
    trainers = [build_trainer(task, problem=problem) for _ in settings]
    play_all(trainers, [each.controller() for each in settings])
    return [
        Outcome(each, t.last_probe, held_out(t), t.spent / t.budget)
        for each, t in zip(settings, trainers, strict=True)
    ]


def rate_range(task: Task) -> tuple[float, float]:
    """The rates between which is searched: four decades around those in use."""
    return (1e-4, 1.0) if task.training.power < 1 else (1e-3, 10.0)


def draw(task: Task, rng: np.random.Generator) -> Settings:
    """The rate log-uniform; K and schedule uniform."""
    low, high = rate_range(task)
    return Settings(
        float(np.exp(rng.uniform(math.log(low), math.log(high)))),
        int(rng.choice(TRUNCATIONS)),
        SCHEDULES[int(rng.integers(len(SCHEDULES)))],
    )


def grid(task: Task) -> list[Settings]:
    """13 rates x 7 truncations x 2 schedules: 182 runs."""
    rates = np.geomspace(*rate_range(task), RATES)
    return [
        Settings(float(lr), truncation, schedule)
        for lr in rates
        for truncation in TRUNCATIONS
        for schedule in SCHEDULES
    ]


def search_all(
    task: Task, settings: Sequence[Settings], play: Play = play_together
) -> Found:
    """The best of these settings."""
    runs = play(task, settings)
    return Found(_best(runs), math.fsum(run.cost for run in runs), runs)


def grid_search(task: Task, play: Play = play_together) -> Found:
    """The best of `grid`."""
    return search_all(task, grid(task), play)


def random_search(
    task: Task, n: int, rng: np.random.Generator, play: Play = play_together
) -> Found:
    """The best of n random settings (Bergstra & Bengio 2012). Raises ValueError if n is
    below 1."""
    at_least("n", n, 1)
    return search_all(task, [draw(task, rng) for _ in range(n)], play)


def asha(
    task: Task,
    max_cost: float,
    rng: np.random.Generator,
    eta: int = 4,
    least: float = 1 / 16,
    begin: Begin = Training,
) -> Found:
    """Successive halving, asynchronous (Li et al. 2020, "A system for massively
    parallel hyperparameter tuning", algorithm 2), with one worker.

    Random settings run until the first decision behind a share `least` of their
    budget, the lowest rung; each rung lies at `eta` times the share of the one below.
    Whenever a run is among the best 1/eta of its rung it goes on to the next; else a
    new one begins. Ends before the next job would cost more than is left of `max_cost`
    (in budgets of one run; as planned: an interval ends at a whole window), and takes
    the best run of the highest rung.

    Raises ValueError if `max_cost` does not pay for one run that gets to the end.
    """
    rungs = _rungs(task, eta, least)
    shares = [0.0, *(share for share, _ in rungs)]
    steps = np.diff(shares)
    needed = sum(step * eta**i for i, step in enumerate(steps[::-1]))
    if max_cost < needed:
        raise ValueError(
            f"max_cost is {max_cost:g} budgets, expected at least {needed:.3g}: so "
            "much does halving down to one run cost"
        )
    runs: list[Run] = []
    reached: list[dict[int, float]] = [{} for _ in rungs]  # probe losses by run
    gone_on: list[set[int]] = [set() for _ in rungs]
    while True:
        job = _promotable(reached, gone_on, eta)
        rung = 0 if job is None else job[0] + 1
        spent = math.fsum(run.cost for run in runs)
        if spent + steps[rung] > max_cost:
            break
        if job is None:
            runs.append(begin(task, draw(task, rng)))
            index = len(runs) - 1
        else:
            index = job[1]
            gone_on[job[0]].add(index)
        reached[rung][index] = runs[index].advance(rungs[rung][1])
    highest = max(rung for rung, losses in enumerate(reached) if losses)
    last = reached[highest]
    best = runs[min(last, key=lambda index: last[index])].outcome()
    ended = [runs[index].outcome() for index in reached[-1]]
    return Found(best, math.fsum(run.cost for run in runs), ended)


def _rungs(task: Task, eta: int, least: float) -> list[tuple[float, int]]:
    """The share of the budget and the decision of each rung, from below."""
    config, rungs, share = task.training, [], 1.0
    while share >= least * (1 - 1e-9):
        decision = next(
            i
            for i in range(1, config.decisions + 1)
            if config.boundary(i) >= share * (1 - 1e-9)
        )
        rungs.append((config.boundary(decision), decision))
        share /= eta
    return sorted(set(rungs))


def _promotable(
    reached: Sequence[dict[int, float]], gone_on: Sequence[set[int]], eta: int
) -> tuple[int, int] | None:
    """A rung, from the top, and a run there that may go on."""
    for rung in reversed(range(len(reached) - 1)):
        losses = reached[rung]
        order = sorted(losses, key=lambda index: losses[index])
        for index in order[: len(order) // eta]:
            if index not in gone_on[rung] and losses[index] < math.inf:
                return rung, index
    return None


def pbt(
    task: Task,
    rng: np.random.Generator,
    population: int = 8,
    every: int = 3,
    begin: Callable[[Task, Settings], Training] = Training,
) -> Found:
    """Population based training (Jaderberg et al. 2017) with truncation selection.

    After each `every` decisions a member of the worst fifth takes over weights,
    optimiser and settings of one of the best fifth, and perturbs these: the rate by
    0.8 or 1.25, K by 1/2, 1 or 2. Rates are constant between; the schedule is what
    selection makes of them. Raises ValueError for a population below 2.
    """
    at_least("population", population, 2)
    starts = [replace(draw(task, rng), schedule="constant") for _ in range(population)]
    members = [begin(task, settings) for settings in starts]
    decisions, fifth = task.training.decisions, max(1, round(population / 5))
    for decision in [*range(every, decisions, every), decisions]:
        losses = [member.advance(decision) for member in members]
        order = np.argsort(losses, kind="stable")
        if decision == decisions:
            break
        for worse in order[-fifth:]:
            better = order[rng.integers(fifth)]
            members[worse].take(members[better])
            members[worse].settings = perturbed(members[worse].settings, rng)
    outcomes = [member.outcome() for member in members]
    cost = math.fsum(outcome.cost for outcome in outcomes)
    return Found(outcomes[int(order[0])], cost, outcomes)


def perturbed(settings: Settings, rng: np.random.Generator) -> Settings:
    """PBT's exploration."""
    lr = settings.lr * float(rng.choice([0.8, 1.25]))
    truncation = settings.truncation * float(rng.choice([0.5, 1.0, 2.0]))
    low, high = TRUNCATION_BOUNDS
    return replace(
        settings,
        lr=min(max(lr, LR_BOUNDS[0]), LR_BOUNDS[1]),
        truncation=int(min(max(truncation, low), high)),
    )


def _best(runs: Sequence[Outcome]) -> Outcome:
    return min(runs, key=lambda run: run.probe_loss)
