"""Evolution strategies: the gradient they estimate, and what they learn by it."""

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from rlrnn.agents import RecurrentPolicy
from rlrnn.agents.evolution import (
    EvolutionStrategies,
    antithetic_gradient,
    centred_ranks,
)


def paired(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.reshape(2, -1).T.reshape(-1)


def test_ranks_are_centred_and_shared_by_equals() -> None:
    given = np.array([[1.0, 30.0, 2.0], [5.0, 5.0, 5.0], [0.0, 7.0, 7.0]])
    expected = [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.25]]
    np.testing.assert_allclose(centred_ranks(given), expected)
    np.testing.assert_allclose(centred_ranks(np.exp(given)), expected)


def test_the_gradient_of_a_linear_fitness_is_exact_for_orthogonal_noise() -> None:
    """sum_i (a.e_i) e_i / n is a where the e_i are orthogonal and of length sqrt(n)."""
    rng = np.random.default_rng(0)
    slope = rng.normal(size=6)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    noise = basis * np.sqrt(6)
    for sigma in (0.01, 2.0):
        moved = np.concatenate([sigma * noise, -sigma * noise])
        fitness = paired(3.0 + moved @ slope)
        estimate = antithetic_gradient(fitness, torch.from_numpy(noise), sigma)
        np.testing.assert_allclose(estimate, slope, rtol=1e-9)


def test_with_random_noise_it_is_unbiased_and_curvature_cancels() -> None:
    """Of a quadratic, pairs see the slope at the middle: the estimate's error is that
    of a linear fitness, of order sqrt(P / pairs)."""
    rng = np.random.default_rng(1)
    slope, pairs, sigma = rng.normal(size=5), 40_000, 0.5
    noise = rng.normal(size=(pairs, 5))
    moved = np.concatenate([sigma * noise, -sigma * noise])
    fitness = paired(moved @ slope + 4 * (moved**2).sum(1))
    estimate = antithetic_gradient(fitness, torch.from_numpy(noise), sigma)
    error = np.linalg.norm(estimate.numpy() - slope) / np.linalg.norm(slope)
    assert error < 4 * np.sqrt(5 / pairs)


class Recall(gymnasium.Env[NDArray[np.float32], NDArray[np.int64]]):
    """A bit is shown once; 1 for saying it one step later."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.MultiDiscrete([2, 3])

    def __init__(self, first: int = 0, fails: bool = False) -> None:
        self.fails, self.episode = fails, first

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        self.bit = self.episode % 2
        return np.array([2 * self.bit - 1, 1], np.float32), {}

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.t += 1
        reward = float(self.t == 2 and action[0] == self.bit)
        done = self.t == (1 if self.fails else 2)
        return np.zeros(2, np.float32), reward, done, False, {}


def agent(**kwargs: Any) -> EvolutionStrategies:
    """One group has the one bit, the other the other."""
    made = EvolutionStrategies(
        DummyVecEnv([partial(Recall, rank // 8) for rank in range(16)]),
        **{
            "group": 8,
            "learning_rate": 0.2,
            "sigma": 0.5,
            "policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [], "cell": "gru"},
            "device": "cpu",
            **kwargs,
        },
    )
    made.set_logger(Logger(None, []))
    return made


class Stop(BaseCallback):
    def _on_step(self) -> bool:
        return False


def earned(policy: RecurrentPolicy) -> float:
    """By the likeliest actions, over both bits."""
    total = 0.0
    for bit in (0, 1):
        env, state, done = Recall(bit), None, False
        obs, _ = env.reset()
        while not done:
            actions, state = policy.predict(obs[None], state, deterministic=True)
            obs, reward, done, _, _ = env.step(actions[0])
            total += reward
    return total


def test_it_learns_to_remember() -> None:
    """Without memory one of two is the most."""
    es = agent()
    assert earned(es.policy) <= 1
    es.learn(20 * 32)
    assert earned(es.policy) == 2


def test_only_the_actor_moves_and_equal_returns_move_nothing() -> None:
    es = agent(weight_decay=0.0)
    before = {k: v.clone() for k, v in es.policy.state_dict().items()}
    es._setup_learn(32)
    noise = es._perturb()
    pair = [m.state_dict()["action_net.bias"] for m in es.members[:2]]
    torch.testing.assert_close(sum(pair) / 2, before["action_net.bias"])
    es._update(np.repeat([1.0, 7.0], 8), noise)  # equal within each group
    assert all(torch.equal(v, before[k]) for k, v in es.policy.state_dict().items())
    es._update(np.arange(16.0), noise)
    moved = {
        k.split(".")[0]
        for k, v in es.policy.state_dict().items()
        if not torch.equal(v, before[k])
    }
    assert moved == {"actor", "action_net"}


def test_resumed_to_the_same_bits() -> None:
    whole, first, again = agent(), agent(), agent()
    whole.learn(4 * 32)
    first.learn(2 * 32)
    again.load_state_dict(first.state_dict())
    assert again.env is not None and first.env is not None
    for env, other in zip(again.env.envs, first.env.envs, strict=True):  # type: ignore[attr-defined]
        env.unwrapped.__dict__.update(other.unwrapped.__dict__)
    again.learn(2 * 32, reset_num_timesteps=False)
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, again.policy.state_dict()[name]), name


def test_who_fails_early_waits_for_the_others() -> None:
    makers: Any = [Recall, partial(Recall, fails=True)] * 4
    es = EvolutionStrategies(
        DummyVecEnv(makers), 8, policy_kwargs={"lstm_hidden_size": 4}, device="cpu"
    )
    es.set_logger(Logger(None, []))
    es.learn(16)
    assert es.num_timesteps == 16
    assert isinstance(es.env, DummyVecEnv)
    assert all(env.unwrapped.t == 0 for env in es.env.envs)  # type: ignore[attr-defined]


def test_stopped_within_an_episode_nothing_is_learned() -> None:
    es = agent()
    before = es.policy.action_net.bias.clone()
    es.learn(32, Stop())
    assert torch.equal(es.policy.action_net.bias, before)


def test_groups_are_pairs() -> None:
    with pytest.raises(ValueError, match="group is 3, expected an even divisor of"):
        EvolutionStrategies(DummyVecEnv([Recall] * 6), 3)
