"""Whole windows in one compiled call: the same training as torch's."""

from typing import Any

import numpy as np
import pytest
import torch

from rlrnn.control import Knobs, Signals
from rlrnn.fast import Fast
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.recurrent import Cell
from rlrnn.tasks import DataConfig, Kind, Task, build_trainer
from rlrnn.training import Trainer


def trainer(
    fast: bool,
    kind: Kind = "markov",
    model: ModelConfig | None = None,
    **training: Any,
) -> Trainer:
    """One that has not started, in float64."""
    task = Task(
        DataConfig(kind, batch=3, size=4000, symbols=6, memory=5),
        model or ModelConfig("lstm", 8, 1, 4),
        TrainingConfig(**{"budget": 6_000.0, "decisions": 6, **training}),
    )
    built = build_trainer(task)
    made = Trainer(built.model.double(), built.problem, built.config)
    assert made.fast is not None
    if not fast:
        made.fast = None
    return made


def play(trainer: Trainer, decisions: int, lr: float = 3e-3) -> Signals:
    for number in range(decisions):
        rates = np.array([lr]), np.array([lr / 2])
        signals = trainer.step(Knobs(*rates, np.array([4 + 3 * number])))
    return signals


def near(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def agree(a: Trainer, b: Trainer) -> None:
    """But for rounding."""
    near(a.parameters, b.parameters)
    near(a.hidden, b.hidden)
    left, right = (t.optimizer.state_dict()["state"] for t in (a, b))
    assert left.keys() == right.keys()
    for number, state in left.items():
        shown = {k: v for k, v in right[number].items() if v is not None}
        near(state, shown)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize(("kind", "cell"), [("markov", "lstm"), ("copy", "gru")])
def test_a_training_is_the_same(kind: Kind, cell: Cell, optimizer: str) -> None:
    model = ModelConfig(cell, 8, 2, 4)
    options: dict[str, Any] = {"optimizer": optimizer}
    options |= {"weight_decay": 0.01, "clip": 0.3}
    a, b = (trainer(fast, kind, model, **options) for fast in (True, False))
    lr = 3e-3 if optimizer.startswith("adam") else 0.1
    first, second = a.start(True), b.start(True)
    for _ in range(2):
        for name, value in first.to_row().items():
            assert value == pytest.approx(second.to_row()[name], rel=1e-6, nan_ok=True)
        first, second = play(a, 3, lr), play(b, 3, lr)
    if optimizer != "sgd":  # torch's own has an empty state there
        agree(a, b)


def test_weights_are_averaged_as_ever() -> None:
    a, b = (trainer(fast, average=0.2, select="valid") for fast in (True, False))
    for t in (a, b):
        t.start()
        play(t, 4)
    agree(a, b)
    near(a.averaged, b.averaged)
    near(a.best, b.best)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_one_way_goes_on_where_the_other_left(optimizer: str) -> None:
    """In memory, and after a state was loaded."""
    ends = []
    for first, loaded, again in ((0, 0, 0), (1, 1, 1), (1, 0, 1), (0, 1, 0)):
        begun = trainer(bool(first), optimizer=optimizer)
        begun.start()
        play(begun, 2)
        t = trainer(True, optimizer=optimizer)
        t.load_state_dict(begun.state_dict())
        fast = t.fast
        for way in (loaded, again):
            t.fast = fast if way else None
            play(t, 1)
        ends.append(t)
    for end in ends[1:]:
        agree(end, ends[0])


def test_a_resumed_training_goes_on_to_the_same_bits() -> None:
    whole, half, rest = (trainer(True) for _ in range(3))
    whole.start()
    play(whole, 4)
    half.start()
    play(half, 2)
    rest.load_state_dict(half.state_dict())
    for number in (2, 3):
        rates = np.array([3e-3]), np.array([1.5e-3])
        rest.step(Knobs(*rates, np.array([4 + 3 * number])))
    for a, b in zip(whole.parameters, rest.parameters, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"ar": 1.0},
        {"tar": 1.0},
        {"unfreeze": 0.5},
        {"layer_decay": 0.5},
        {"frozen": "encoder"},
        {"decay_probe": True},
    ],
)
def test_options_that_it_has_not_take_the_other_way(options: dict[str, Any]) -> None:
    data = DataConfig("markov", batch=3, size=4000)
    training = TrainingConfig(**{"budget": 6_000.0, "decisions": 6, **options})
    assert build_trainer(Task(data, training=training)).fast is None


@pytest.mark.parametrize(
    "model",
    [ModelConfig(dropout=0.1), ModelConfig("mingru"), ModelConfig(layer_norm=True)],
)
def test_models_that_it_has_not_take_the_other_way(model: ModelConfig) -> None:
    t = build_trainer(Task(DataConfig("markov", size=40_000), model))
    assert t.fast is None


def test_large_models_with_several_threads_take_the_other_way() -> None:
    t = build_trainer(Task(DataConfig("markov", size=40_000), ModelConfig("gru", 256)))
    given = t.model, t.problem.objective, "adam"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert Fast.suits(*given)
        torch.set_num_threads(2)
        assert not Fast.suits(*given)
    finally:
        torch.set_num_threads(threads)
