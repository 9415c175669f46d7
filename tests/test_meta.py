"""The flow tune: its ways to learn, what it tracks, and what it says of itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrnn import checkpoint
from rlrnn.agents.controller import load_controller
from rlrnn.config import AgentConfig, EvolutionConfig, RunConfig, TuneConfig
from rlrnn.data.synthetic import markov_problem
from rlrnn.flows import tune
from rlrnn.tasks import Tasks
from rlrnn.tracking import Run, read_metrics

# 3 generations of 4 members, or 3 rollouts of 6 decisions in 4 environments
TUNE = TuneConfig(
    tasks=Tasks(
        kinds=["markov"],
        cells=["gru"],
        hidden_sizes=[8],
        batches=[4],
        budget=(8_000.0, 9_000.0),
        decisions=6,
    ),
    episodes=12,
    envs=4,
    group=2,
    eval_tasks=2,
    algorithm="es",
    agent=AgentConfig(
        hidden_size=8, net_arch=[8], n_steps=6, batch_size=12, n_epochs=2, gamma=1.0
    ),
    es=EvolutionConfig(learning_rate=0.1, sigma=0.5),
    checkpoint_every=2,
)


@pytest.fixture(autouse=True, scope="module")
def short_chains() -> Iterator[None]:
    """A shorter chain takes less time to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rlrnn.tasks.markov_problem",
            lambda rng, _, *rest: markov_problem(rng, 20_000, *rest),
        )
        yield


def play(
    folder: Path, config: TuneConfig = TUNE, resume: Path | None = None
) -> dict[str, Any]:
    run = RunConfig(folder=str(folder), track="disabled")
    return tune(replace(config, run=run), resume, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("meta") / "run"
    return folder, play(folder)


@contextmanager
def at_row(number: int, do: Callable[[], object]) -> Iterator[None]:
    """Inside, `do` happens when the row with this number has been logged."""
    log, count = Run.log, 0

    def counting(run: Run, row: Any) -> None:
        nonlocal count
        log(run, row)
        count += 1
        if count == number:
            do()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", counting)
        yield


def cut() -> None:
    raise InterruptedError


def timeless(row: dict[str, Any]) -> dict[str, str]:
    return {key: repr(row[key]) for key in row if not key.startswith("time/")}


def weights(folder: Path) -> dict[str, Any]:
    policy: dict[str, Any] = checkpoint.load(folder / "controller.zip")["policy"]
    return policy


# --- evolution strategies -------------------------------------------------------------


def test_evolution_leaves_what_ppo_leaves(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole
    assert summary["episodes"] == 12
    rows = [row for row in read_metrics(folder) if "episodes" in row]
    assert [row["episodes"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert {"tune/log_loss_fall", "tune/no_op_rate", "tune/truncation"} <= set(row)
    controller = load_controller(folder / "controller.zip")
    assert controller.range_test


@pytest.mark.parametrize("row", [1, 3])
def test_evolution_interrupted_and_resumed_is_the_same_run(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, row: int
) -> None:
    with at_row(row, cut), pytest.raises(InterruptedError):
        play(tmp_path / "run")
    play(tmp_path / "run", resume=tmp_path / "run")
    rows, others = (read_metrics(f) for f in (tmp_path / "run", whole[0]))
    assert list(map(timeless, rows)) == list(map(timeless, others))
    mine, its = weights(tmp_path / "run"), weights(whole[0])
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_evolution_plays_in_pairs() -> None:
    with pytest.raises(ValueError, match="group is 3, expected an even number"):
        replace(TUNE, envs=3, group=3)
