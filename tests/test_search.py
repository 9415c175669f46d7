"""Search: who is tried, who goes on, and what is charged."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlrnn import search
from rlrnn.control import LR_BOUNDS, TRUNCATION_BOUNDS
from rlrnn.flows import run_task
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.optimizers import Optimizer
from rlrnn.search import (
    RATES,
    SCHEDULES,
    TRUNCATIONS,
    Outcome,
    Settings,
    Training,
    asha,
    draw,
    grid,
    grid_search,
    pbt,
    perturbed,
    random_search,
    rate_range,
)
from rlrnn.tasks import DataConfig, Task

torch.set_num_threads(1)


def task(optimizer: Optimizer = "adam", decisions: int = 6) -> Task:
    return Task(
        DataConfig("markov", batch=2, size=3000, symbols=4, memory=3),
        ModelConfig("gru", 4),
        TrainingConfig(3000.0, optimizer, decisions=decisions),
        seed=1,
    )


def weights(run: Training) -> torch.Tensor:
    return nn.utils.parameters_to_vector(run.trainer.model.parameters()).detach()


class Fake:
    """A run that falls from 10 to `settings.lr`, but a coarse order shows at once."""

    made: list["Fake"] = []

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.settings, self.decision = task, settings, 0
        Fake.made.append(self)

    def advance(self, decisions: int) -> float:
        assert decisions > self.decision, "nobody is asked to go back"
        self.decision = decisions
        return 10 + (self.settings.lr - 10) * self.cost

    @property
    def cost(self) -> float:
        return self.task.training.boundary(self.decision)

    def outcome(self) -> Outcome:
        loss = 10 + (self.settings.lr - 10) * self.cost
        return Outcome(self.settings, loss, loss + 1, self.cost)


# --- what is tried ------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_grid_has_all_combinations(optimizer: Optimizer) -> None:
    settings = grid(task(optimizer))
    assert len(set(settings)) == 182 == RATES * len(TRUNCATIONS) * len(SCHEDULES)
    rates = sorted({s.lr for s in settings})
    low, high = rate_range(task(optimizer))
    assert rates[0] == pytest.approx(low) and rates[-1] == pytest.approx(high)
    assert np.allclose(np.diff(np.log(rates)), math.log(high / low) / 12)
    assert {s.truncation for s in settings} == set(TRUNCATIONS)


def test_draws_are_log_uniform_over_the_grid() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(task(), rng) for _ in range(4000)]
    low, high = rate_range(task())
    logs = [math.log(s.lr / low) / math.log(high / low) for s in drawn]
    assert 0 <= min(logs) and max(logs) <= 1
    counts, _ = np.histogram(logs, 10, (0, 1))
    assert np.abs(counts / 400 - 1).max() < 0.2
    for name, values in (("truncation", TRUNCATIONS), ("schedule", SCHEDULES)):
        shares = [sum(getattr(s, name) == v for s in drawn) / 4000 for v in values]
        assert np.abs(np.array(shares) * len(values) - 1).max() < 0.2


def test_perturbing_is_around_the_old_and_inside_the_bounds() -> None:
    rng = np.random.default_rng(0)
    some = [perturbed(Settings(0.1, 16), rng) for _ in range(60)]
    assert {round(s.lr, 6) for s in some} == {0.08, 0.125}
    assert {s.truncation for s in some} == {8, 16, 32}
    for edge in (0, 1):
        at = Settings(LR_BOUNDS[edge], TRUNCATION_BOUNDS[edge])
        for _ in range(20):
            new = perturbed(at, rng)
            assert LR_BOUNDS[0] <= new.lr <= LR_BOUNDS[1]
            assert TRUNCATION_BOUNDS[0] <= new.truncation <= TRUNCATION_BOUNDS[1]


# --- grid and random search ---------------------------------------------------------


def test_a_search_takes_the_lowest_probe_loss_whatever_the_validation_says() -> None:
    seen: list[Settings] = []

    def play(task: Task, settings: Sequence[Settings]) -> list[Outcome]:
        seen.extend(settings)
        losses = [(3.0, 1.0), (1.0, 9.0), (2.0, 0.5)] * len(settings)
        return [
            Outcome(s, probe, valid, 1.01)
            for s, (probe, valid) in zip(settings, losses, strict=False)
        ]

    found = random_search(task(), 3, np.random.default_rng(0), play)
    assert found.best == found.runs[1] and found.best.valid_loss == 9.0
    assert found.cost == pytest.approx(3.03)
    assert seen == [r.settings for r in found.runs] and len(set(seen)) == 3
    again = random_search(task(), 3, np.random.default_rng(0), play)
    assert again == found
    seen.clear()
    assert len(grid_search(task(), play).runs) == 182 and seen == grid(task())
    with pytest.raises(ValueError, match="^n is 0, expected at least 1"):
        random_search(task(), 0, np.random.default_rng(0), play)


def test_a_run_is_that_of_fit_and_costs_what_it_spent() -> None:
    found = random_search(task(), 2, np.random.default_rng(3))
    total = 0.0
    for run in found.runs:
        trainer = run_task(task(), run.settings.controller())
        assert run.probe_loss == pytest.approx(trainer.last_probe, rel=1e-5)
        assert run.cost == trainer.spent / trainer.budget
        nats = trainer.score("valid")["nats"]
        assert run.valid_loss == pytest.approx(nats, rel=1e-5)
        total += run.cost
    assert found.cost == pytest.approx(total) and 1.9 < total < 2.1


def test_a_run_in_parts_is_the_run_in_one() -> None:
    whole, parts = (Training(task(), Settings(0.02, 8, "cosine")) for _ in range(2))
    whole.advance(6)
    costs = []
    for decision in (1, 2, 5, 6):
        parts.advance(decision)
        costs.append(parts.cost)
    assert torch.equal(weights(whole), weights(parts))
    assert whole.outcome() == parts.outcome()
    assert costs == sorted(set(costs)) and costs[-1] == pytest.approx(1, rel=0.05)


# --- successive halving -------------------------------------------------------------


def test_rungs_lie_at_decisions() -> None:
    some = task(decisions=24)
    rungs = search._rungs(some, 4, 1 / 16)
    assert rungs[-1] == (1.0, 24) and len(rungs) == 3
    for (share, decision), wanted in zip(rungs, (1 / 16, 1 / 4, 1), strict=True):
        assert share == some.training.boundary(decision) >= wanted
        assert some.training.boundary(decision - 1) < wanted


@pytest.mark.parametrize("eta", [2, 4])
@pytest.mark.parametrize("max_cost", [4.0, 16.0])
def test_asha_promotes_the_best_and_keeps_to_its_means(
    eta: int, max_cost: float
) -> None:
    Fake.made = []
    some = task(decisions=24)
    rng = np.random.default_rng(0)
    begin: Any = Fake
    found = asha(some, max_cost, rng, eta, begin=begin)
    rungs = search._rungs(some, eta, 1 / 16)
    # cost is exact, and nearly all that was allowed
    assert found.cost == pytest.approx(sum(run.cost for run in Fake.made))
    assert max_cost - 1 < found.cost <= max_cost
    # all that went on are better than most of those that did not
    for (_, decision), (_, following) in zip(rungs, rungs[1:], strict=False):
        here = [run for run in Fake.made if run.decision >= decision]
        on = [run for run in here if run.decision >= following]
        assert 1 <= len(on) <= len(here) / eta + len(here) ** 0.5
        ranks = sorted(run.settings.lr for run in here)
        best = ranks[: max(1, len(here) // eta)]
        assert sum(run.settings.lr in best for run in on) >= len(best) - 1
    ended = [run for run in Fake.made if run.decision == 24]
    assert len(ended) == len(found.runs)
    assert found.best.settings.lr == min(run.settings.lr for run in ended)
    # the best of all is never left behind
    assert found.best.settings.lr == min(run.settings.lr for run in Fake.made)


def test_asha_on_trainings_charges_what_was_computed() -> None:
    made: list[Training] = []

    def begin(task: Task, settings: Settings) -> Training:
        made.append(Training(task, settings))
        return made[-1]

    found = asha(task(decisions=6), 3.5, np.random.default_rng(0), 2, 1 / 4, begin)
    spent = sum(run.trainer.spent / run.trainer.budget for run in made)
    assert found.cost == pytest.approx(spent) and 2.5 < spent < 3.6
    assert any(not run.trainer.done for run in made), "some are stopped early"
    whole = Training(task(decisions=6), found.best.settings)
    whole.advance(6)
    assert found.best.probe_loss == whole.outcome().probe_loss


def test_asha_needs_the_means_for_one_run() -> None:
    begin: Any = Fake
    with pytest.raises(ValueError, match="^max_cost is 1 budgets, expected at least 3"):
        asha(task(decisions=24), 1.0, np.random.default_rng(0), begin=begin)


# --- population based training ------------------------------------------------------


def test_taking_over_copies_the_weights_and_shares_nothing() -> None:
    a, b = Training(task(), Settings(0.05, 8)), Training(task(), Settings(0.001, 4))
    for run in (a, b):
        run.advance(3)
    spent = b.cost
    assert not torch.equal(weights(a), weights(b))
    b.take(a)
    assert torch.equal(weights(a), weights(b)) and b.settings == a.settings
    assert b.cost == spent, "what it has computed itself stays charged"
    before = weights(a).clone()
    moments = a.trainer.state_dict()["optimizer"]["state"][0]["exp_avg"].clone()
    b.advance(5)
    assert torch.equal(weights(a), before)
    kept = a.trainer.state_dict()["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(kept, moments)
    a.advance(5)
    assert torch.equal(weights(a), weights(b)), "the same place in the data"


def test_pbt_copies_the_best_to_the_worst() -> None:
    taken: list[tuple[float, float]] = []

    class Noted(Training):
        def take(self, other: Training) -> None:
            losses = self.trainer.last_probe, other.trainer.last_probe
            taken.append(losses)
            super().take(other)
            assert torch.equal(weights(self), weights(other))

    found = pbt(task(), np.random.default_rng(0), 4, 2, Noted)
    assert len(taken) == 2  # one of four, after decisions 2 and 4
    assert all(worse > better for worse, better in taken)
    assert len(found.runs) == 4
    assert found.cost == pytest.approx(4, rel=0.05)
    assert found.cost == pytest.approx(sum(run.cost for run in found.runs))
    assert found.best.probe_loss == min(run.probe_loss for run in found.runs)
    assert found == pbt(task(), np.random.default_rng(0), 4, 2)


def test_a_failed_run_is_worst_and_is_replaced() -> None:
    class Breaks(Training):
        """The first one made can learn nothing before it takes over from another."""

        count = 0

        def __init__(self, task: Task, settings: Settings) -> None:
            super().__init__(task, settings)
            Breaks.count += 1
            if Breaks.count == 1:
                loss = self.trainer._loss
                self.trainer._loss = (  # type: ignore[method-assign]
                    lambda out, chunk: loss(out, chunk) * math.nan
                )

        def take(self, other: Training) -> None:
            super().take(other)
            self.trainer.__dict__.pop("_loss", None)

    found = pbt(task(), np.random.default_rng(0), 3, 3, Breaks)
    assert all(math.isfinite(run.probe_loss) for run in found.runs)
    assert Breaks.count == 3 and len(found.runs) == 3
