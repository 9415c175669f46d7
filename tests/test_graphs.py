"""Captured graphs: on a CPU `Recording` takes their place, with the same rules."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from rlrnn import graphs
from rlrnn.control import Knobs
from rlrnn.graphs import Graphs, Recording, graphs_for
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.optimizers import Optimizer
from rlrnn.tasks import DataConfig, Kind, Task, build_trainer
from rlrnn.training import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Graphs are recorded from here on; what has been replayed."""
    replayed: list[str] = []
    replay = Recording.replay

    def noted(self: Recording) -> None:
        replayed.append("")
        replay(self)

    monkeypatch.setenv(graphs.SWITCH, "record")
    monkeypatch.setattr(Recording, "replay", noted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no captured graph")
        yield replayed


def recorder(limit: int = 32) -> Graphs:
    return Graphs(CPU, Recording, limit)


# --- the helper -----------------------------------------------------------------------


def test_on_a_cpu_there_are_none_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    assert graphs_for(CPU) is None
    monkeypatch.setenv(graphs.SWITCH, "record")
    assert graphs_for(CPU) is not None


def test_results_are_the_callers_own_and_those_of_plain_calls() -> None:
    held = recorder()
    weight = torch.ones(2)
    generator, plain = (torch.Generator().manual_seed(1) for _ in range(2))

    def step(
        x: Tensor, rest: dict[str, Any], rate: Any, source: torch.Generator
    ) -> Any:
        noise = torch.empty(2).uniform_(generator=source)
        weight.add_(x * rate)
        return {"y": weight * 2 + noise, "none": None, "same": x}, [rest["s"] + 1]

    ours, theirs = partial(step, source=generator), partial(step, source=plain)

    kept, expected = [], []
    for i in range(8):
        inputs = torch.tensor([i, 1.0]), {"s": torch.tensor(i), "n": None}, 0.1 * i
        before = weight.clone()
        expected.append(theirs(*inputs))
        wanted = weight.clone()
        weight.copy_(before)
        now = held("f", ours, inputs, state=lambda: [weight], generators=(generator,))
        kept.append(now)
        assert torch.equal(weight, wanted)
    for (a, [b]), (c, [d]) in zip(kept, expected, strict=True):
        assert torch.equal(a["y"], c["y"]) and torch.equal(b, d)
        assert torch.equal(a["same"], c["same"]) and a["none"] is None
    (entry,) = held.entries.values()
    assert entry.checked


def test_what_has_moved_is_captured_anew() -> None:
    held, weights = recorder(), [torch.zeros(2)]

    def step(x: Tensor) -> Tensor:
        return weights[0].add_(x).clone()

    total, used = 0.0, []
    for i in range(20):
        if i in (4, 7, 11):  # a roll-back, say
            weights[0] = weights[0].clone()
        total += i
        got = held("f", step, (torch.full((2,), float(i)),), state=lambda: weights)
        assert got.tolist() == [total, total]
        (entry,) = held.entries.values()
        used.append(entry.graph)
    assert not held.eager
    anew = [i for i in range(1, 20) if used[i] is not used[i - 1]]
    assert anew == [1, 4, 7, 11]


def test_the_last_used_are_kept() -> None:
    held = recorder(limit=3)
    for size in (1, 2, 3, 4, 2, 5):
        held("f", torch.neg, (torch.ones(size),))
        assert len(held.entries) <= 3
    assert [entry.graph is not None for entry in held.entries.values()] == [
        False,  # 4
        True,  # 2, twice
        False,
    ]


def test_without_a_capture_it_runs_eagerly_after_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Recording, run: Callable[[], Any], *_: Any) -> None:
        run()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(Recording, "__init__", broken)
    held, weight = recorder(), torch.zeros(1)
    generator = torch.Generator().manual_seed(0)
    plain = torch.Generator().manual_seed(0)

    def step(x: Tensor) -> Tensor:
        weight.add_(x)
        return weight + torch.empty(1).uniform_(generator=generator)

    total = torch.zeros(1)
    with pytest.warns(
        UserWarning, match="no captured graph of a f, .*not perm"
    ) as told:
        for i in range(6):
            given = (torch.full((1,), float(i)),)
            total += i
            got = held(
                "f", step, given, state=lambda: [weight], generators=(generator,)
            )
            assert torch.equal(got, total + torch.empty(1).uniform_(generator=plain))
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert held.eager == {"f"} and not held.entries


@pytest.mark.parametrize("what", ["result", "state", "generator"])
def test_a_replay_that_differs_is_not_used(what: str) -> None:
    """What a graph does not see: something outside of it that changes."""
    held, weight, outside = recorder(), torch.zeros(2), [0.0]
    generator = torch.Generator().manual_seed(0)
    runs = [0]

    def step(x: Tensor) -> Tensor:
        runs[0] += 1
        replayed = runs[0] == 5  # after two eager runs, the capture, another eager one
        outside[0] += 1
        off = 1e-2 * replayed
        weight.add_(1e-5 * x * (1 - (what == "state") * replayed))
        if not (what == "generator" and replayed):
            torch.empty(1).uniform_(generator=generator)
        return x + off * (what == "result")

    with pytest.warns(UserWarning, match="first replay differs") as told:
        for i in range(1, 7):
            got = held(
                "f",
                step,
                (torch.ones(2),),
                state=lambda: [weight],
                generators=(generator,),
            )
            assert torch.equal(got, torch.ones(2))
            assert torch.allclose(weight, torch.full((2,), 1e-5 * i), rtol=1e-6)
    assert len(told) == 1
    plain = torch.Generator().manual_seed(0)
    for _ in range(6):
        torch.empty(1).uniform_(generator=plain)
    assert torch.equal(generator.get_state(), plain.get_state())


# --- the trainer ----------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    (xs, left), (ys, right) = tree_flatten(a), tree_flatten(b)
    assert left == right
    return all(
        np.array_equal(
            np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f"
        )
        for x, y in zip(xs, ys, strict=True)
    )


def trainer(
    kind: Kind = "markov",
    optimizer: Optimizer = "adam",
    model: dict[str, Any] | None = None,
    device: str = "cpu",
    **training: Any,
) -> Trainer:
    task = Task(
        DataConfig(kind, batch=3, size=3000, symbols=4, memory=7),
        ModelConfig("lstm", 5, 1, 4, **(model or {})),
        TrainingConfig(2000.0, optimizer=optimizer, decisions=8, **training),
        0,
    )
    built = build_trainer(task)
    if device != "cpu":
        problem = built.problem.to(torch.device(device))
        built = Trainer(built.model.to(device), problem, built.config)
    built.fast = None  # what a CPU has in place of graphs
    return built


def knobs(lr: float, truncation: int) -> Knobs:
    return Knobs(np.array([lr]), np.array([lr / 2]), np.array([truncation]))


# the rate of decision 3 is survived by a roll-back; K changes and comes back
PLAN = [(0.01, 8), (0.02, 8), (0.01, 16), (math.inf, 8), (0.02, 8), (0.01, 16)]


def played(t: Trainer, plan: list[tuple[float, int]] = PLAN) -> list[Any]:
    """What a controller is told, and all that is left in the end."""
    told = [vars(t.step(knobs(lr, truncation))) for lr, truncation in plan]
    return [told, t.state_dict()]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks and starts": {"kind": "copy"},
    "momentum": {"optimizer": "momentum", "average": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "layer_decay": 0.5},
    "ar, frozen": {"ar": 0.1, "tar": 0.1, "frozen": "encoder"},
    "dropout": {"model": {"dropout": 0.3, "weight_drop": 0.2}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trainer_with_graphs_is_the_same(
    name: str, recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trainer(**VARIANTS[name])
    monkeypatch.setenv(graphs.SWITCH, "0")
    theirs = trainer(**VARIANTS[name])
    assert ours.graphs is not None and theirs.graphs is None
    for t in (ours, theirs):
        t.start(range_test=name == "plain")
    assert same(played(ours), played(theirs))
    assert ours.lr_scale == 0.5  # the roll-back was one
    entries = ours.graphs.entries.values()
    assert any(entry.checked for entry in entries) and len(recording) > 10


def test_a_resumed_trainer_captures_again(
    recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer("copy")
    t.start()
    first = played(t)
    begun = trainer("copy")
    begun.start()
    begun.step(knobs(0.5, 8))
    begun.step(knobs(0.5, 8))
    again = trainer("copy")
    again.start()
    played(again, PLAN[:2])
    state = copy.deepcopy(again.state_dict())
    for other in (begun, trainer("copy")):  # one that has graphs, and a new one
        other.load_state_dict(copy.deepcopy(state))
        rest = played(other, PLAN[2:])
        assert same(rest, [first[0][2:], first[1]])


def test_a_trainer_without_a_capture_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no")

    theirs = trainer("copy")
    monkeypatch.setenv(graphs.SWITCH, "record")
    monkeypatch.setattr(Recording, "__init__", broken)
    ours = trainer("copy")
    for t in (ours, theirs):
        t.start()
    with pytest.warns(UserWarning, match="no captured graph of a window") as told:
        assert same(played(ours), played(theirs))
    assert len(told) == 1


def test_what_a_trainer_does_not_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graphs.SWITCH, "record")
    for options in (
        {"accumulate": 2},
        {"unfreeze": 0.5},
        {"decay_probe": True},
        {"optimizer": "schedulefree"},
    ):
        assert trainer(**options).graphs is None
    assert trainer().graphs is not None
