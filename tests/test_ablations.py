"""What is taken from a player is taken in the environment, in fit and in its file."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from gymnasium import spaces

from rlrnn.agents.controller import (
    OBSERVATIONS,
    learned,
    load_controller,
    save_controller,
)
from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.cli import UsageError, parse
from rlrnn.control import ACTIONS, NO_OP, Ablation, visible
from rlrnn.envs.tuning import TuningEnv
from rlrnn.flows import run_task
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.tasks import DataConfig, Task

TASK = Task(
    DataConfig("markov", batch=3, size=4000, symbols=6, memory=4),
    ModelConfig("lstm", 6),
    TrainingConfig(6000.0, "adam", decisions=8),
    seed=5,
)
SMALL: dict[str, Any] = {"lstm_hidden_size": 8, "net_arch": [8], "seed": 3}


def restless() -> RecurrentPolicy:
    actions = spaces.MultiDiscrete(list(ACTIONS))
    policy = RecurrentPolicy(OBSERVATIONS, actions, lambda _: 0.0, **SMALL)
    policy.action_net.weight.data.mul_(300)
    return policy


@pytest.mark.parametrize("name", get_args(Ablation))
def test_an_episode_and_a_fit_are_one_thing(name: Ablation, tmp_path: Path) -> None:
    policy = restless()
    env = TuningEnv(TASK, ablation=name)
    observation, info = env.reset(seed=0)
    state, terminated, rates, lengths = None, False, set(), set()
    while not terminated:
        assert not observation[~visible(name)].any()
        action, state = policy.predict(observation, state, deterministic=True)
        before = env.codec_state
        observation, _, terminated, _, info = env.step(action)
        rates.add(float(env.codec_state["log_lambda"][0] - before["log_lambda"][0]))
        lengths.add(float(env.codec_state["log2_k"][0] - before["log2_k"][0]))
    assert (rates == {0.0}) == (name == "truncation_only")
    assert (lengths == {0.0}) == (name == "rate_only")
    assert np.isnan(env.trainer.range_lr) or name != "no_prior"

    path = tmp_path / "controller.zip"
    save_controller(path, policy, SMALL, {}, name)
    for controller in (learned(policy, name), load_controller(path)):
        trainer = run_task(TASK, controller)
        assert trainer.last_probe == env.trainer.last_probe
        assert trainer.spent == env.trainer.spent


def test_no_op_is_no_op_under_each() -> None:
    losses = set()
    for name in get_args(Ablation):
        env = TuningEnv(TASK, ablation=name)
        env.reset(seed=0)
        terminated = False
        while not terminated:
            _, _, terminated, _, _ = env.step(np.array(NO_OP))
        losses.add((name == "no_prior", env.trainer.last_probe))
    assert len(losses) == 2, "the prior, and the run without one"


def test_an_unknown_ablation_is_one_line() -> None:
    with pytest.raises(
        UsageError, match="^ablation is 'nothing', expected one of none"
    ):
        parse("tune", ["--ablation=nothing"])
    config, _ = parse("tune", ["--ablation=open_loop"])
    assert config.ablation == "open_loop"
