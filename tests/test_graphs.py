"""Captured graphs: on a CPU `Recording` takes their place, with the same rules."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrnn import graphs
from rlrnn.graphs import Graphs, Recording, graphs_for

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
