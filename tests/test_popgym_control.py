"""POPGym's cart-poles and pendulums: POPGym is the oracle."""

import math
from typing import Any

import gymnasium
import numpy as np
import popgym.envs
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

import rlrnn  # noqa: F401  (registers the ids)
from rlrnn.envs.cartpole import (
    TAU,
    CartPole,
    NoisyPositionOnlyCartPole,
    PositionOnlyCartPole,
    VelocityOnlyCartPole,
)
from rlrnn.envs.pendulum import (
    DT,
    MAX_SPEED,
    MAX_TORQUE,
    NoisyPositionOnlyPendulum,
    PositionOnlyPendulum,
)
from rlrnn.envs.tensor import TensorVectorEnv, normal
from shared import Policy, first_returns

LEVELS = ["Easy", "Medium", "Hard"]
TASKS = [
    PositionOnlyCartPole,
    VelocityOnlyCartPole,
    NoisyPositionOnlyCartPole,
    PositionOnlyPendulum,
    NoisyPositionOnlyPendulum,
]
POLES = TASKS[:3]
NOTHING = torch.zeros(0)


def make(task: type, level: str, num_envs: int) -> Any:
    id = f"rlrnn/{task.__name__}{level}-v0"
    env = gymnasium.make_vec(id, num_envs=num_envs)
    assert isinstance(env, TensorVectorEnv)
    return env


def table(task: type, level: str) -> dict[str, float]:
    """The row of a level in the first table of a docstring."""
    lines = [line.strip() for line in (task.__doc__ or "").splitlines()]
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    row = next(row for row in rows if row[0].strip() == level.lower())
    return {
        key.strip(): float(value)
        for key, value in zip(rows[0][1:], row[1:], strict=True)
    }


def at_random(env: Any, seed: int = 0) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    n = env.num_envs
    if isinstance(env.single_action_space, Box):
        return lambda _: (2 * torch.rand(n, 1, generator=generator) - 1) * MAX_TORQUE
    return lambda _: torch.randint(2, (n,), generator=generator)


def near(returns: Tensor, mean: float, digits: float = 5e-4) -> bool:
    """Within 4 standard errors, and the rounding of the table, of the mean."""
    error = float(returns.std()) / math.sqrt(len(returns))
    return abs(float(returns.mean()) - mean) < 4 * error + digits


# --------------------------------------------------- POPGym, given the same states


class Noise:
    """Stands in for POPGym's generator: the noise has been drawn."""

    def __init__(self) -> None:
        self.standard = np.zeros(2)

    def normal(self, mean: float, sigma: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return mean + sigma * self.standard


def state_of(env: Any) -> np.ndarray[Any, Any]:
    key = "pole" if "pole" in env.state else "rod"
    return np.asarray(env.state[key].double().numpy())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_popgym_says_the_same(task: type, level: str) -> None:
    """10,000 steps, POPGym in our state before each: to the accuracy of float32."""
    copies, steps = 20, 500
    env = make(task, level, copies)
    theirs = getattr(popgym.envs, task.__name__ + level)()
    theirs.reset(seed=0)
    assert env.single_observation_space == theirs.observation_space
    assert env.single_action_space == theirs.action_space
    assert env.max_episode_steps == theirs.max_episode_length
    if hasattr(env, "sigma"):
        theirs.np_random = noise = Noise()
        assert np.all(theirs.noise_sigma == env.sigma)

    env.reset(seed=0)
    policy, ours, oracles = at_random(env), [], []
    for _ in range(steps):
        before, states = env.state, state_of(env)
        lengths = before["episode_length"].tolist()
        actions = policy(NOTHING)
        _, rewards, terminated, truncated, infos = env.step(actions)
        drawn = normal(env._draw(before["stream"])[1][:, -2:])
        for i in range(copies):
            theirs.state = states[i]
            theirs.num_steps = lengths[i]
            theirs.steps_beyond_terminated = None  # gymnasium's cart-pole
            if hasattr(env, "sigma"):
                noise.standard = drawn[i].numpy()
            obs, reward, over, late, _ = theirs.step(actions[i].numpy()[()])
            oracles.append([*obs, reward, over, late and not over])
        columns = [infos["final_obs"], rewards, terminated, truncated]
        ours.append(torch.cat([c.view(copies, -1).double() for c in columns], 1))
    played = torch.cat(ours).numpy()
    assert np.allclose(played, np.array(oracles), rtol=2e-6, atol=2e-6)
    assert played[:, -2:].sum() > copies  # ends


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", [PositionOnlyCartPole, PositionOnlyPendulum])
def test_whole_episodes_are_popgyms(task: type) -> None:
    """From the same start, with the same actions, to the end."""
    env = make(task, "Hard", 20)
    env.reset(seed=0)
    oracles = [getattr(popgym.envs, f"{task.__name__}Hard")() for _ in range(20)]
    for theirs, state in zip(oracles, state_of(env), strict=True):
        theirs.reset()
        theirs.state = state
    policy, alive = at_random(env), set(range(20))
    while alive:
        actions = policy(NOTHING)
        _, rewards, terminated, truncated, infos = env.step(actions)
        for i in sorted(alive):
            obs, reward, *ended, _ = oracles[i].step(actions[i].numpy()[()])
            assert np.allclose(obs, infos["final_obs"][i], rtol=1e-3, atol=1e-3)
            assert float(rewards[i]) == pytest.approx(reward, abs=1e-4)
            assert ended == [bool(terminated[i]), bool(truncated[i])]
            if any(ended):
                alive.remove(i)


@pytest.mark.parametrize("task", TASKS)
def test_starts(task: type) -> None:
    """Uniform in their bounds, independent of each other; what is shown of them."""
    n = 20_000
    env = make(task, "Medium", n)
    obs, _ = env.reset(seed=0)
    pole = task in POLES
    bounds = torch.tensor([0.05] * 4 if pole else [math.pi, 1.0])
    state = torch.from_numpy(state_of(env)) / bounds
    assert bool((state.abs() <= 1 + 1e-6).all()) and state.abs().max() > 0.999
    assert bool((state.mean(0).abs() < 5 * math.sqrt(1 / 3 / n)).all())
    assert bool(((state.square().mean(0) - 1 / 3).abs() < 5 * 0.3 / math.sqrt(n)).all())
    correlation = torch.corrcoef(state.T) - torch.eye(len(bounds))
    assert correlation.abs().max() < 5 / math.sqrt(n)

    state = torch.from_numpy(state_of(env)).float()
    # Positions, from the one that shows velocities, too: POPGym's
    seen = state[:, ::2] if pole else torch.cat([state.cos(), state.sin()], 1)[:, ::2]
    if not hasattr(env, "sigma"):
        assert torch.allclose(obs, seen)
        return
    high = torch.from_numpy(env.single_observation_space.high)
    assert bool((obs.abs() <= high).all()) and bool((obs.abs() == high).any())
    free = seen.abs() < high - 4 * env.sigma  # where next to nothing is clipped
    noise = ((obs - seen) / env.sigma)[free]
    assert len(noise) > 4000
    assert abs(float(noise.mean())) < 5 / math.sqrt(len(noise))
    assert float(noise.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * len(noise)))


def test_normal() -> None:
    """Its moments, and its quantiles by the error function."""
    u = (torch.arange(2**16) + 0.5) / 2**16
    z = normal(u)
    assert torch.allclose(0.5 + 0.5 * torch.erf(z / math.sqrt(2)), u, atol=1e-6)
    assert float(z.mean()) == pytest.approx(0, abs=1e-5)
    assert float(z.square().mean()) == pytest.approx(1, abs=1e-3)
    ends = normal(torch.tensor([0.0, 1 - 2**-24]))
    assert torch.equal(ends, -ends.flip(0)) and 5.3 < ends[1] < 5.5


# ----------------------------------------------------------------------- cart-poles


def linear(estimate: Tensor) -> Tensor:
    """Pushes to where the pole leans and drifts, and a little to where the cart is."""
    return (estimate @ torch.tensor([0.05, 0.1, 1.0, 0.3]) > 0).long()


@pytest.mark.parametrize("level", LEVELS)
def test_position_only_cartpole(level: str) -> None:
    env = make(PositionOnlyCartPole, level, 64)
    measured = table(PositionOnlyCartPole, level)
    estimate = torch.zeros(64, 4)

    def differences(obs: Tensor) -> Tensor:
        estimate[:, 1::2] = (obs - estimate[:, ::2]) / TAU
        estimate[:, ::2] = obs
        return linear(estimate)

    assert torch.allclose(first_returns(env, differences), torch.ones(()))

    env = make(PositionOnlyCartPole, level, 1024)
    generator = torch.Generator().manual_seed(0)

    def logistic(obs: Tensor) -> Tensor:
        """Nearly the best found without memory."""
        right = torch.sigmoid(4.8 * obs[:, 1] / 0.2095)
        return (torch.rand(1024, generator=generator) < right).long()

    without, steps = first_returns(env, logistic), env.max_episode_steps
    assert 0.9 * measured["memoryless"] < without.mean() < 60 / steps
    assert near(first_returns(env, at_random(env)), measured["chance"])


@pytest.mark.parametrize("level", LEVELS)
def test_velocity_only_cartpole(level: str) -> None:
    env = make(VelocityOnlyCartPole, level, 64)
    measured = table(VelocityOnlyCartPole, level)
    estimate, started = torch.zeros(64, 4), False

    def sums(obs: Tensor) -> Tensor:
        """The positions shown first, and what the velocities have added to them."""
        nonlocal started
        if started:
            estimate[:, ::2] += TAU * estimate[:, 1::2]
            estimate[:, 1::2] = obs
        else:
            estimate[:, ::2] = obs
        started = True
        return linear(estimate)

    assert measured["best"] == 1
    assert torch.allclose(first_returns(env, sums), torch.ones(()))

    env = make(VelocityOnlyCartPole, level, 512)
    speeds = torch.tensor([0.1, 1.0])
    without = first_returns(env, lambda obs: (obs @ speeds > 0).long())
    assert (
        measured["memoryless"] - 0.03 < without.mean() < measured["memoryless"] + 1e-4
    )
    assert near(first_returns(env, at_random(env)), measured["chance"])


def gains(sigma: float, steps: int) -> list[Tensor]:
    """Of the Kalman filter of the linearised cart-pole, one per step."""
    env = CartPole(4)
    small = 1e-3 * torch.eye(4)
    right = env.advance({"pole": small}, torch.ones(4).long(), torch.zeros(4, 0))
    left = env.advance({"pole": small}, torch.zeros(4).long(), torch.zeros(4, 0))
    motion = (right[0]["pole"] + left[0]["pole"]).T.double() / 2e-3
    shown = torch.eye(4).double()[::2]
    covariance = 0.05**2 / 3 * torch.eye(4).double()
    found = []
    for _ in range(steps):
        seen = shown @ covariance @ shown.T + sigma**2 * torch.eye(2).double()
        gain = covariance @ shown.T @ torch.linalg.inv(seen)
        found.append(gain.float())
        covariance = covariance - gain @ shown @ covariance
        covariance = motion @ covariance @ motion.T + 1e-5 * torch.eye(4).double()
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_noisy_position_only_cartpole(level: str) -> None:
    copies = 1024
    env, model = make(NoisyPositionOnlyCartPole, level, copies), CartPole(copies)
    measured = table(NoisyPositionOnlyCartPole, level)
    steps = iter(gains(env.sigma, env.max_episode_steps))
    estimate = torch.zeros(copies, 4)

    def kalman(obs: Tensor) -> Tensor:
        nonlocal estimate
        estimate = estimate + (obs - estimate[:, ::2]) @ next(steps).T
        action = (estimate @ torch.tensor([0.02, 0.05, 1.0, 0.3]) > 0).long()
        after = model.advance({"pole": estimate}, action, torch.zeros(copies, 0))
        estimate = after[0]["pole"]
        return action

    assert near(first_returns(env, kalman), measured["Kalman filter"], 0.005)

    weights = torch.tensor([-1.5, 70.0])
    without = first_returns(env, lambda obs: (obs @ weights > 0).long())
    assert 0.85 * measured["memoryless"] < without.mean() < 0.28
    assert near(first_returns(env, at_random(env)), measured["chance"])


# ------------------------------------------------------------------------ pendulums


class Solved:
    """The pendulum by dynamic programming on a grid of angles and speeds."""

    ANGLES, SPEEDS = 150, 121

    def __init__(self, steps: int) -> None:
        self.torques = torch.linspace(-MAX_TORQUE, MAX_TORQUE, 9)
        angles = (torch.arange(self.ANGLES) / self.ANGLES * 2 - 1) * math.pi
        speeds = torch.linspace(-MAX_SPEED, MAX_SPEED, self.SPEEDS)
        grid = torch.cartesian_prod(angles, speeds)
        self.steps = steps
        after, rewards = self.look_ahead(grid)
        places, weights = self.interpolate(after)
        self.values = [torch.zeros(len(grid))]  # by the steps that are left
        for _ in range(steps):
            worth = (weights * self.values[-1][places]).sum(0)
            self.values.append((rewards + worth.view(len(grid), -1)).amax(1))

    def look_ahead(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The state after each torque, and the reward."""
        n = len(self.torques)
        torques = self.torques.repeat(len(states))[:, None]
        env = PositionOnlyPendulum(len(torques), max_episode_steps=self.steps)
        states = states.repeat_interleave(n, 0)
        after, rewards, _ = env.advance(
            {"rod": states}, torques, torch.zeros(len(torques), 0)
        )
        return after["rod"], rewards.view(-1, n)

    def interpolate(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The four corners around each state, and their bilinear weights."""
        x = torch.remainder(states[:, 0] / math.tau + 0.5, 1) * self.ANGLES
        y = (states[:, 1] / MAX_SPEED + 1) / 2 * (self.SPEEDS - 1)
        i, j = x.floor().long(), y.floor().long().clamp(0, self.SPEEDS - 2)
        right, up = x - i, y - j
        i, after = i % self.ANGLES * self.SPEEDS, (i + 1) % self.ANGLES * self.SPEEDS
        places = torch.stack([i + j, i + j + 1, after + j, after + j + 1])
        left, down = 1 - right, 1 - up
        return places, torch.stack([left * down, left * up, right * down, right * up])

    def act(self, states: Tensor, left: int) -> Tensor:
        after, rewards = self.look_ahead(states)
        places, weights = self.interpolate(after)
        worth = (weights * self.values[left - 1][places]).sum(0).view(len(states), -1)
        return self.torques[(rewards + worth).argmax(1)][:, None]


@pytest.mark.parametrize("level", LEVELS)
def test_position_only_pendulum(level: str) -> None:
    copies = 1024
    env = make(PositionOnlyPendulum, level, copies)
    measured, steps = table(PositionOnlyPendulum, level), env.max_episode_steps
    solved = Solved(steps)
    left, angle = steps, None

    def best(obs: Tensor) -> Tensor:
        """The angle and the last one give the speed; before the first it is 0."""
        nonlocal left, angle
        now = torch.atan2(obs[:, 1], obs[:, 0])
        moved = torch.zeros(copies) if angle is None else now - angle
        speed = (torch.remainder(moved + math.pi, math.tau) - math.pi) / DT
        angle, left = now, left - 1
        return solved.act(torch.stack([now, speed], 1), left + 1)

    returns = first_returns(env, best)
    assert near(returns, measured["best"])
    # No player can do better than the values say, but for the grid
    env.reset(seed=0)
    places, weights = solved.interpolate(torch.from_numpy(state_of(env)).float())
    bound = (weights * solved.values[-1][places]).sum(0).mean()
    assert returns.mean() < bound + 1e-3 and bound < measured["best"] + 0.02

    chance = first_returns(env, at_random(env))
    assert near(chance, measured["chance"])
    without = first_returns(env, against_the_fall)
    assert 0.9 * measured["memoryless"] < without.mean() < 0.40


def against_the_fall(obs: Tensor) -> Tensor:
    """Nearly the best found without memory: all force against gravity."""
    return -MAX_TORQUE * obs[:, 1:].sign()


@pytest.mark.parametrize("level", LEVELS)
def test_noisy_position_only_pendulum(level: str) -> None:
    copies = 512
    env = make(NoisyPositionOnlyPendulum, level, copies)
    measured, left = table(NoisyPositionOnlyPendulum, level), env.max_episode_steps
    solved = Solved(left)
    model = PositionOnlyPendulum(copies)
    state = torch.zeros(copies, 2)
    covariance = torch.zeros(copies, 2, 2)

    def kalman(obs: Tensor) -> Tensor:
        """An extended Kalman filter; only noise along the circle tells an angle."""
        nonlocal state, covariance, left
        if left == env.max_episode_steps:
            first = torch.atan2(obs[:, 1], obs[:, 0])
            state = torch.stack([first, torch.zeros(copies)], 1)
            covariance = torch.diag(torch.tensor([env.sigma**2, 1 / 3]))
            covariance = covariance.expand(copies, 2, 2)
        else:
            cos, sin = state[:, 0].cos(), state[:, 0].sin()
            surprise = cos * obs[:, 1] - sin * obs[:, 0]
            gain = covariance[:, :, 0] / (covariance[:, :1, 0] + env.sigma**2)
            state = state + gain * surprise[:, None]
            covariance = covariance - gain[:, :, None] * covariance[:, :1]
        action = solved.act(state, left)
        left -= 1
        motion = torch.eye(2).repeat(copies, 1, 1)
        motion[:, 1, 0] = DT * 15 * state[:, 0].cos()
        motion[:, 0] += DT * motion[:, 1]
        covariance = motion @ covariance @ motion.mT + 1e-4 * torch.eye(2)
        after = model.advance({"rod": state}, action, torch.zeros(copies, 0))
        state = after[0]["rod"]
        return action

    assert near(first_returns(env, kalman), measured["Kalman filter"], 0.005)
    assert near(first_returns(env, at_random(env)), measured["chance"])
    without = first_returns(env, against_the_fall)
    assert 0.8 * measured["memoryless"] < without.mean() < 0.38
