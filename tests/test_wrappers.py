"""Wrappers for any gymnasium environment: what is seen, and what stays as it was."""

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import rlrnn  # noqa: F401  (registers the ids)
from rlrnn.envs.wrappers import (
    COORDINATES,
    Delay,
    Flicker,
    HideCoordinates,
    ObservationNoise,
    PreviousActionReward,
)

Env = gymnasium.Env[Any, Any]
CLASSICS = [
    "CartPole-v1",
    "Pendulum-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Acrobot-v1",
]
WRAPPERS: dict[str, Callable[[Env], Env]] = {
    "hide": lambda env: HideCoordinates(env, hide=[1]),
    "noise": lambda env: ObservationNoise(env, sigma=0.1),
    "flicker": lambda env: Flicker(env),
    "hold": lambda env: Flicker(env, hold=True),
    "delay": lambda env: Delay(env, steps=3),
    "previous": lambda env: PreviousActionReward(env),
    "all": lambda env: PreviousActionReward(
        Delay(Flicker(ObservationNoise(env, sigma=0.1)), steps=2)
    ),
}


def course(env: Env, steps: int = 60, seed: int = 0) -> list[tuple[Any, ...]]:
    """Observation, reward and ends at each step; random actions, resets as needed."""
    obs, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    rows: list[tuple[Any, ...]] = [(obs, 0.0, False, False)]
    for _ in range(steps):
        obs, reward, over, cut, _ = env.step(env.action_space.sample())
        rows.append((obs, reward, over, cut))
        if over or cut:
            obs, _ = env.reset()
            rows.append((obs, 0.0, False, False))
    return rows


def seen(rows: list[tuple[Any, ...]]) -> Any:
    return np.stack([row[0] for row in rows])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("id", CLASSICS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # advice on unbounded spaces
def test_conforms(id: str, wrapper: str) -> None:
    """Both checkers; the same seed, the same course; only observations change."""
    make = WRAPPERS[wrapper]
    env = make(gymnasium.make(id, disable_env_checker=True))
    check_env(env, skip_render_check=True)
    sb3_check_env(env)
    first, again, other = (course(env, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(seen(first), seen(again))
    assert not np.array_equal(seen(first)[: len(other)], seen(other)[: len(first)])
    plain = course(gymnasium.make(id), seed=1)
    assert [row[1:] for row in first] == [row[1:] for row in plain]
    assert all(env.observation_space.contains(row[0]) for row in first)
    assert env.spec is not None  # can be made again from its spec
    remade = course(gymnasium.make(env.spec), seed=1)
    assert np.array_equal(seen(first), seen(remade))


def test_coordinates_by_name() -> None:
    for id in CLASSICS:
        env = gymnasium.make(id)
        space = env.observation_space
        assert isinstance(space, Box)
        names = COORDINATES[type(env.unwrapped).__name__]
        assert (len(names),) == space.shape
        by_name = HideCoordinates(env, hide=names[1:])
        assert np.array_equal(by_name.reset(seed=0)[0], env.reset(seed=0)[0][:1])
    env = gymnasium.make("CartPole-v1")
    positions = HideCoordinates(env, keep=["position", 2])
    assert np.array_equal(positions.reset(seed=0)[0], env.reset(seed=0)[0][[0, 2]])
    # of those that are left, where some are hidden already
    fewer = HideCoordinates(HideCoordinates(env, hide=["velocity"]), hide=["angle"])
    assert np.array_equal(fewer.reset(seed=0)[0], env.reset(seed=0)[0][[0, 3]])
    with pytest.raises(ValueError, match="CartPoleEnv has position, angular velocity"):
        HideCoordinates(fewer, hide=["angle"])
    with pytest.raises(ValueError, match="of CartPoleEnv have no names here"):
        HideCoordinates(PreviousActionReward(env), hide=["angle"])
    for given, message in [
        ("velocty", "no coordinate 'velocty': CartPoleEnv has position, velocity, "),
        ("velocty", "did you mean velocity?"),
    ]:
        with pytest.raises(ValueError, match=message):
            HideCoordinates(env, hide=[given])
    unknown = gymnasium.make("rlrnn/CartPoleHiddenVelocity-v0")
    with pytest.raises(ValueError, match="of SingleEnv have no names here, 'velocity'"):
        HideCoordinates(unknown, hide=["velocity"])


def test_velocities_are_velocities() -> None:
    """Pushed, a cart's velocity changes at once, its position a step later."""
    env = gymnasium.make("CartPole-v1")
    before, _ = env.reset(seed=0)
    after, *_ = env.step(1)
    velocity = COORDINATES["CartPoleEnv"].index("velocity")
    assert after[velocity] - before[velocity] > 0.15


def test_noise() -> None:
    """Of that deviation, independent in time and between coordinates; 0 is none."""
    env = gymnasium.make("MountainCarContinuous-v0")
    sigma = [1e-3, 1e-4]
    noisy = seen(course(ObservationNoise(env, sigma=sigma), 4000)).astype(float)
    noise = (noisy - seen(course(env, 4000))) / sigma
    assert abs(noise.mean()) < 5 / math.sqrt(2 * 4000)
    assert np.all(abs(noise.var(0) - 1) < 5 * math.sqrt(2 / 4000) + 0.01)
    for other in (noise[1:, 0], noise[:-1, 1]):
        assert abs((noise[:-1, 0] * other).mean()) < 5 / math.sqrt(4000)
    loud = seen(course(ObservationNoise(env, sigma=10.0), 200))
    space = env.observation_space
    assert isinstance(space, Box)
    assert np.all((loud == space.low) | (loud == space.high) | (abs(loud) < 1.2))
    none = course(ObservationNoise(env, sigma=0.0), 200)
    assert np.array_equal(seen(none), seen(course(env, 200)))


def test_flicker() -> None:
    env = gymnasium.make("Pendulum-v1")
    plain = seen(course(env, 4000))
    for p in (0.0, 0.3, 1.0):
        zeros = seen(course(Flicker(env, p=p), 4000))
        dropped = (zeros == 0).all(1)
        assert np.array_equal(zeros[~dropped], plain[~dropped])
        error = 5 * math.sqrt(p * (1 - p) / 4000)
        assert abs(dropped.mean() - p) <= error
        held = course(Flicker(env, p=p, hold=True), 4000)
        fresh = (seen(held) == plain).all(1)
        assert abs(fresh.mean() - (1 - p)) <= error + 0.01
        assert fresh[0] and fresh[201]  # each episode opens with its own
        for t in np.flatnonzero(~fresh):
            assert np.array_equal(held[t][0], held[t - 1][0])


def test_delay() -> None:
    env = gymnasium.make("Pendulum-v1")
    plain = seen(course(env, 150))
    for steps in (0, 1, 7):
        late = seen(course(Delay(env, steps=steps), 150))
        expected = [plain[max(0, t - steps)] for t in range(151)]
        assert np.array_equal(late, expected)
    cards = gymnasium.make("rlrnn/RepeatPreviousEasy-v0")  # and a Discrete one
    late = course(Delay(cards, steps=4), 120)
    plain = [row[0] for row in course(cards, 120)]
    for t, (obs, *_) in enumerate(late[:52]):
        assert obs == plain[max(0, t - 4)]
    assert late[52][0] == plain[52]  # a new episode, not the rest of the old one


def test_previous_action_and_reward() -> None:
    env = PreviousActionReward(gymnasium.make("CartPole-v1"))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (7,) and np.array_equal(obs[4:], [0, 0, 0])
    obs, reward, *_ = env.step(1)
    assert np.array_equal(obs[4:], [0, 1, reward])
    assert np.array_equal(env.reset()[0][4:], [0, 0, 0])

    swing = gymnasium.make("Pendulum-v1")
    env = PreviousActionReward(swing)
    env.reset(seed=0)
    obs, reward, *_ = env.step(np.array([1.5], np.float32))
    assert obs[3] == 1.5 and obs[4] == np.float32(reward)

    only = PreviousActionReward(swing, reward=False)
    assert only.observation_space.shape == (4,)
    cards = PreviousActionReward(gymnasium.make("rlrnn/AutoencodeEasy-v0"))
    obs, _ = cards.reset(seed=0)  # one-hot: 2 + 4 for the observation, 4 for the action
    assert obs.shape == (11,) and obs[:6].sum() == 2 and obs[6:].sum() == 0
    obs, reward, *_ = cards.step(np.int64(3))
    assert np.array_equal(obs[6:], [0, 0, 0, 1, reward])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: ObservationNoise(e, sigma=-1.0), "sigma is -1.0, expected a number"),
        (lambda e: ObservationNoise(e, sigma=[1.0, 2.0]), r"one for each of the coord"),
        (lambda e: Flicker(e, p=1.5), "p is 1.5, expected 0 to 1"),
        (lambda e: Delay(e, steps=-1), "steps is -1: give at least 0"),
    ],
)
def test_errors(make: Callable[[Env], Env], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(gymnasium.make("CartPole-v1"))


def test_errors_of_spaces() -> None:
    cards = gymnasium.make("rlrnn/RepeatPreviousEasy-v0")
    for make in (lambda: ObservationNoise(cards, sigma=1.0), lambda: Flicker(cards)):
        with pytest.raises(ValueError, match=r"Discrete\(4\), expected a Box"):
            make()


def test_lunar_lander() -> None:
    """With Box2D it hides the three velocities; without, one line says what to do."""
    id = "rlrnn/LunarLanderHiddenVelocity-v0"
    assert id in gymnasium.registry
    try:
        env = gymnasium.make(id)
    except gymnasium.error.DependencyNotInstalled as error:
        assert 'install "gymnasium[box2d]"' in str(error)
        assert "\n" not in str(error)
        return
    names = COORDINATES["LunarLander"]
    whole = gymnasium.make("LunarLander-v3")
    obs, _ = whole.reset(seed=0)
    kept = [i for i, name in enumerate(names) if "velocity" not in name]
    assert np.array_equal(env.reset(seed=0)[0], obs[kept])
    assert env.spec and whole.spec
    assert env.spec.max_episode_steps == whole.spec.max_episode_steps
