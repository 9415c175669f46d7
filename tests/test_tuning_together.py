"""Tuning environments whose runs advance together are those that run alone."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rlrnn.control import ACTIONS, NO_OP
from rlrnn.envs.together import TuningVecEnv
from rlrnn.envs.tuning import TuningEnv
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.tasks import DataConfig, Task, build_trainer

TASK = Task(
    DataConfig("markov", batch=4, size=4000, symbols=6, memory=4),
    ModelConfig("gru", 8),
    TrainingConfig(9_000.0, decisions=6),
)


def envs(count: int) -> list[TuningEnv]:
    return [TuningEnv(TASK) for _ in range(count)]


def played(venv: VecEnv, moves: NDArray[np.int64]) -> tuple[Any, Any, Any]:
    observations = [np.asarray(venv.reset())]
    rewards, infos = [], []
    for actions in moves:
        obs, reward, _, info = venv.step(actions)
        observations.append(np.asarray(obs).copy())
        rewards.append(reward)
        infos.append(info)
    return observations, rewards, infos


def test_they_play_what_single_environments_play(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two episodes of random small moves, in float64: rounding is all that differs."""
    double = partial(build_trainer, prepare=lambda model, problem: model.double())
    monkeypatch.setattr("rlrnn.envs.tuning.build_trainer", double)
    monkeypatch.setattr("rlrnn.envs.together.build_trainer", double)
    rng = np.random.default_rng(0)
    moves = rng.integers([2, 0], [5, 3], size=(12, 3, 2))
    alone = played(DummyVecEnv([lambda: TuningEnv(TASK)] * 3), moves)
    together = played(TuningVecEnv(envs(3)), moves)
    for a, b in zip(alone[0], together[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    np.testing.assert_allclose(alone[1], together[1], atol=1e-4)
    for ours, theirs in zip(together[2], alone[2], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert one["decision"] == other["decision"]
            assert one["episode_index"] == other["episode_index"]


def test_a_failed_run_begins_anew_while_the_others_go_on() -> None:
    wild, calm = (ACTIONS[0] - 1, 1), NO_OP
    venv = TuningVecEnv(envs(2))
    venv.reset()
    ends = []
    for _ in range(6):
        _, _, dones, infos = venv.step(np.array([calm, calm]))
        ends.append(dones.tolist())
    assert ends[-1] == [True, True] and not any(any(e) for e in ends[:-1])
    assert [info["decision"] for info in infos] == [6, 6]
    venv.envs[0].trainer.failures = 2  # one more recovery, and it is given up
    venv.envs[0].trainer.lr_scale = 1e9
    _, _, dones, infos = venv.step(np.array([wild, calm]))
    assert dones.tolist() == [True, False]
    assert "terminal_observation" in infos[0]
    _, _, dones, infos = venv.step(np.array([calm, calm]))
    assert [info["decision"] for info in infos] == [1, 2]


def test_resumed_to_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    moves = rng.integers([2, 0], [5, 3], size=(5, 2, 2))
    whole = TuningVecEnv(envs(2))
    whole.reset()
    for actions in moves[:3]:
        whole.step(actions)
    states = whole.env_method("state_dict")
    again = TuningVecEnv(envs(2))
    again.reset()
    for rank, state in enumerate(states):
        again.env_method("load_state_dict", state, indices=rank)
    for actions in moves[3:]:
        a, b = whole.step(actions), again.step(actions)
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


def test_reset_brings_the_members_of_a_group_together() -> None:
    venv = TuningVecEnv(envs(3))
    venv.reset()
    venv.envs[1].episode_index = 4  # its runs failed
    venv.reset()
    assert [info["episode_index"] for info in venv.reset_infos] == [5, 5, 5]
