"""A controller leaves the prior alone outside of what it learned on, and says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv

from rlrnn import checkpoint
from rlrnn.agents.controller import (
    OBSERVATIONS,
    Ranges,
    learned,
    load_controller,
    save_controller,
)
from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.cli import main
from rlrnn.config import AgentConfig, Algorithm, FitConfig, RunConfig, TuneConfig
from rlrnn.control import ACTIONS, FEATURES, NO_OP, Familiar, State, prior
from rlrnn.envs import tuning
from rlrnn.envs.tuning import TuningEnv
from rlrnn.flows import fit, run_task, tune
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.tasks import DataConfig, Task, Tasks
from rlrnn.tracking import read_metrics
from rlrnn.training import Trainer

WIDTH = len(FEATURES)
TASK = Task(
    DataConfig("markov", batch=3, size=4000, symbols=6, memory=4),
    ModelConfig("lstm", 6),
    TrainingConfig(6000.0, "adam", decisions=6),
    seed=5,
)
SMALL: dict[str, Any] = {"lstm_hidden_size": 8, "net_arch": [8], "seed": 3}
EVERYTHING = np.full(WIDTH, -5, np.float32), np.full(WIDTH, 5, np.float32)


class Mover:
    """Always the same move; counts its calls."""

    def init(self, n: int) -> State:
        return {"calls": np.zeros(n)}

    def __call__(
        self, observation: NDArray[np.float32], state: State
    ) -> tuple[NDArray[np.int64], State]:
        moves = np.tile(np.array([5, 0]), (len(observation), 1))
        return moves, {"calls": state["calls"] + 1}


def policy() -> RecurrentPolicy:
    """Of random weights, such that its likeliest action changes."""
    actions = spaces.MultiDiscrete(list(ACTIONS))
    made = RecurrentPolicy(OBSERVATIONS, actions, lambda _: 0.0, **SMALL)
    with torch.no_grad():
        made.action_net.weight.mul_(300)
    return made


def unknown(name: str) -> Ranges:
    """All observations but for any value of one feature."""
    low, high = (end.copy() for end in EVERYTHING)
    at = FEATURES.index(name)
    low[at] = high[at] = 77
    return low, high


def test_inside_a_player_moves_and_outside_it_does_not() -> None:
    low, high = np.zeros(3, np.float32), np.array([1, 1, 0], np.float32)
    player = Familiar(Mover(), low, high)
    observations = np.array(
        [
            [0.5, 1.0, 0.0],
            [-0.09, 1.09, 0.0],  # the margin
            [0.5, 1.11, 0.0],
            [0.5, 0.5, 0.01],  # what was always the same has no margin
            [-0.2, 5.0, -1.0],
        ],
        np.float32,
    )
    actions, state = player(observations, player.init(5))
    assert actions.tolist() == [[5, 0]] * 2 + [list(NO_OP)] * 3
    assert state["outside"].tolist() == [
        [False, False, False],
        [False, False, False],
        [False, True, False],
        [False, False, True],
        [True, True, True],
    ]
    assert state["player"]["calls"].tolist() == [1.0] * 5  # it has seen them all


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


def test_at_the_limits_it_is_the_player_or_the_prior() -> None:
    made = policy()
    known, strange = EVERYTHING, unknown("progress")
    one, other = run_task(TASK, learned(made)), run_task(TASK, prior())
    assert not torch.equal(weights(one), weights(other))
    for ranges, same in ((known, one), (strange, other)):
        steered = run_task(TASK, learned(made, ranges=ranges))
        assert torch.equal(weights(steered), weights(same))


def test_ranges_are_in_the_file(tmp_path: Path) -> None:
    path, made = tmp_path / "mine.zip", policy()
    ranges = unknown("progress")
    save_controller(path, made, SMALL, {}, ranges=ranges)
    controller = load_controller(path)
    assert isinstance(controller.player, Familiar)
    player = controller.player
    for end, stored in zip(ranges, (player.low, player.high), strict=True):
        assert end.dtype == stored.dtype and np.array_equal(end, stored)
    alone = run_task(TASK, prior())
    assert torch.equal(weights(run_task(TASK, controller)), weights(alone))
    state = controller.init(2)
    checkpoint.save(tmp_path / "state", state)
    again = checkpoint.load(tmp_path / "state")["player"]["outside"]
    assert again.dtype == bool and again.shape == (2, WIDTH)


def test_a_file_without_ranges_is_as_before(tmp_path: Path) -> None:
    path, made = tmp_path / "old.zip", policy()
    save_controller(path, made, SMALL, {})
    tree = checkpoint.load(path)
    del tree["ranges"]
    checkpoint.save(path, tree)
    controller = load_controller(path)
    assert not isinstance(controller.player, Familiar)
    alone = run_task(TASK, learned(made))
    assert torch.equal(weights(run_task(TASK, controller)), weights(alone))


def config(folder: Path, controller: Path) -> FitConfig:
    return FitConfig(
        data=TASK.data,
        model=TASK.model,
        training=TASK.training,
        controller=str(controller),
        run=RunConfig(folder=str(folder), track="disabled"),
    )


def test_a_fit_says_what_was_left_to_the_prior_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.zip"
    low, high = (end.copy() for end in EVERYTHING)
    high[FEATURES.index("progress")] = 0  # the first half of a run
    save_controller(path, policy(), SMALL, {}, ranges=(low, high))
    fit(config(tmp_path / "run", path), progress=False)
    said = capsys.readouterr().err
    rows = read_metrics(tmp_path / "run")[1:]
    left = [row for row in rows if row["decision/fallback"]]
    assert 0 < len(left) < len(rows)
    assert {row["decision/outside"] for row in left} == {"progress"}
    assert all(row["decision/rate_factor"] == 1.0 for row in left)
    words = (
        f"the controller left {len(left)} of 6 decisions to the prior: progress "
        "outside what it was trained on"
    )
    assert said.count(words) == 1
    assert main(["explain", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.count("left to the prior") == len(left) and words in said


def test_nothing_is_said_where_nothing_is_strange(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.zip"
    save_controller(path, policy(), SMALL, {}, ranges=EVERYTHING)
    fit(config(tmp_path / "run", path), progress=False)
    assert "left" not in capsys.readouterr().err
    rows = read_metrics(tmp_path / "run")[1:]
    assert {row["decision/fallback"] for row in rows} == {0.0}
    assert not any("decision/outside" in row for row in rows)
    json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))


TASKS = Tasks(
    kinds=["markov"],
    hidden_sizes=[4],
    optimizers=["adam"],
    batches=[2],
    budget=(2500.0, 3000.0),
    decisions=6,
)


@pytest.mark.parametrize("algorithm", ["ppo", "es"])
def test_a_tuned_controller_knows_what_it_was_trained_on(
    tmp_path: Path, algorithm: Algorithm
) -> None:
    config = TuneConfig(
        tasks=TASKS,
        episodes=4,
        envs=2,
        group=2,
        algorithm=algorithm,
        validation_tasks=0,
        eval_tasks=0,
        agent=AgentConfig(hidden_size=8, net_arch=[8], n_steps=6, batch_size=12),
        run=RunConfig(folder=str(tmp_path / "tune"), track="disabled"),
    )
    tune(config, progress=False)
    controller = load_controller(tmp_path / "tune" / "controller.zip")
    player = controller.player
    assert isinstance(player, Familiar)
    assert (player.low <= player.high).all()
    always = {
        FEATURES[i]: player.low[i] for i in np.flatnonzero(player.low == player.high)
    }
    assert always["Adam's family"] == 1
    # which is why it does nothing with another optimiser
    other = replace(TASK, training=replace(TASK.training, optimizer="sgd"))
    steered, alone = run_task(other, controller), run_task(other, prior())
    assert torch.equal(weights(steered), weights(alone))


def test_ranges_are_those_of_all_that_was_seen() -> None:
    envs = tuning.Ranges(DummyVecEnv([lambda: TuningEnv(TASKS, 1) for _ in "12"]))
    envs.seed(0)
    seen = [envs.reset()]
    for _ in range(8):
        seen.append(envs.step(np.tile(NO_OP, (2, 1)))[0])
    assert np.array_equal(envs.low, np.concatenate(seen).min(0))
    assert np.array_equal(envs.high, np.concatenate(seen).max(0))
