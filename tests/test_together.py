"""A population does what its trainers would do alone: to 1e-9 in float64, through range
test, decisions, recovery and the end."""

from typing import Any

import numpy as np
import pytest
import torch

from rlrnn.baselines import Linear, WarmupCosine
from rlrnn.control import Knobs, Signals
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.population import Population, play_all, suits
from rlrnn.tasks import DataConfig, Task, build_model, build_problem
from rlrnn.training import Trainer

RUNS, DECISIONS = 10, 8


def trainers(**options: Any) -> list[Trainer]:
    """Kinds of data, cells, layers, optimisers and budgets, mixed."""
    made = []
    for i in range(RUNS):
        budget = 11_000.0 if i % 3 == 0 else 8_000.0
        training = TrainingConfig(
            budget,
            optimizer=("adam", "sgd", "momentum", "adamw")[i % 4],
            decisions=DECISIONS,
            weight_decay=0.01 * (i % 2),
            clip=0.5 + 0.1 * i,
            **options,
        )
        kind, cell = ("markov", "copy")[i % 2], ("lstm", "gru")[i // 5]
        task = Task(
            DataConfig(kind, batch=4, size=10_000, symbols=6, memory=4),  # type: ignore[arg-type]
            ModelConfig(cell, 12, layers=1 + i % 2),  # type: ignore[arg-type]
            training,
            seed=i,
        )
        problem = build_problem(task)
        model = build_model(problem, task.model, task.seed).double()
        made.append(Trainer(model, problem, training))
    return made


def one(knobs: Knobs, run: int) -> Knobs:
    return Knobs(**{name: value[run : run + 1] for name, value in vars(knobs).items()})


def random_knobs(rng: np.random.Generator) -> Knobs:
    return Knobs(
        10 ** rng.uniform(-3.5, -1.8, RUNS),
        10 ** rng.uniform(-3.5, -1.8, RUNS),
        2 ** rng.integers(2, 7, RUNS),
    )


def assert_same(alone: list[Signals], together: Signals, rtol: float = 1e-9) -> None:
    for name, value in vars(together).items():
        true = np.concatenate([getattr(signals, name) for signals in alone])
        np.testing.assert_allclose(value, true, rtol, rtol / 10, err_msg=name)


def assert_equal_weights(alone: list[Trainer], together: list[Trainer]) -> None:
    for a, b in zip(alone, together, strict=True):
        assert a.position == b.position
        assert b.spent == pytest.approx(a.spent, rel=1e-12)
        torch.testing.assert_close(a.hidden, b.hidden, rtol=1e-8, atol=1e-11)
        for p, q in zip(a.parameters, b.parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)


def test_as_alone_to_the_end() -> None:
    rng = np.random.default_rng(1)
    alone, members = trainers(), trainers()
    population = Population(members)
    told = [trainer.start(range_test=True) for trainer in alone]
    assert_same(told, population.start(range_test=True))
    for decision in range(DECISIONS):
        knobs = random_knobs(rng)
        if decision == 3:  # four of them diverge
            knobs.lr[:4] = knobs.lr_end[:4] = 50.0
        told = [t.step(one(knobs, i)) for i, t in enumerate(alone)]
        signals = population.step(knobs)
        assert_same(told, signals)
        assert signals.recovered.any() == (decision == 3)
    assert population.done.all()
    with pytest.raises(RuntimeError, match="all runs are done"):
        population.step(random_knobs(rng))
    population.sync()
    assert_equal_weights(alone, members)


def test_trainers_go_on_alone_after_a_population_and_back() -> None:
    rng = np.random.default_rng(2)
    alone, members = trainers(), trainers()
    told = [trainer.start() for trainer in alone]
    for member in members:
        member.start()
    for together in (True, False, True):
        knobs = random_knobs(rng)
        told = [t.step(one(knobs, i)) for i, t in enumerate(alone)]
        if together:
            population = Population(members)
            assert_same(told, population.step(knobs))
            population.sync()
        else:
            for i, trainer in enumerate(members):
                trainer.step(one(knobs, i))
    assert_equal_weights(alone, members)


def test_a_controller_steers_them_all_at_once() -> None:
    controller = WarmupCosine(3e-3, truncation=8)
    alone, members = trainers(), trainers()
    population = Population(members)
    signals, state = population.start(), controller.init(RUNS)
    while not population.done.all():
        knobs, state = controller(signals, state)
        signals = population.step(knobs)
    population.sync()
    for a, b in zip(alone, members, strict=True):
        own, mine = a.start(), controller.init(1)
        while not a.done:
            knobs, mine = controller(own, mine)
            own = a.step(knobs)
        assert b.last_probe == pytest.approx(a.last_probe, rel=1e-9)


def test_what_a_stack_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="train such a run alone"):
        Population(trainers(average=0.1))


def test_runs_under_controllers_of_their_own_are_as_alone() -> None:
    """Also those that a population cannot hold, and with and without range tests."""
    controllers = [
        Linear()
        if i in (4, 8)
        else WarmupCosine(10.0 ** -(2 + i % 2), 4 * 2 ** (i % 3))
        for i in range(RUNS + 1)
    ]
    alone, together = trainers(), trainers()
    for some in (alone, together):
        some.append(one_by_itself())
    assert [suits(trainer) for trainer in together] == [True] * RUNS + [False]
    told = play_all(together, controllers)
    for run, (trainer, controller) in enumerate(zip(alone, controllers, strict=True)):
        expected, state = [trainer.start(controller.range_test)], controller.init(1)
        while not trainer.done:
            knobs, state = controller(expected[-1], state)
            expected.append(trainer.step(knobs))
        assert len(told[run]) == len(expected)
        for ours, theirs in zip(told[run], expected, strict=True):
            assert_same([theirs], ours, 1e-6)
        for a, b in zip(trainer.parameters, together[run].parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def one_by_itself() -> Trainer:
    task = Task(
        DataConfig("markov", batch=4, size=10_000, symbols=6, memory=4),
        ModelConfig("mingru", 12),
        TrainingConfig(8_000.0, decisions=DECISIONS),
    )
    problem = build_problem(task)
    return Trainer(build_model(problem, task.model, 0).double(), problem, task.training)
