"""The diagnostics of memory: the course of an episode, the optimum and the ceilings."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

import rlrnn  # noqa: F401  (registers the ids)
from rlrnn.envs.diagnostics import Adding, Copy, DelayedXor, MemoryChain, TMaze
from rlrnn.envs.tensor import TensorVectorEnv

LEVELS = ["Easy", "Medium", "Hard"]
Player = Callable[[Tensor], Tensor]

every_level = pytest.mark.parametrize("level", LEVELS)


def make(name: str, level: str, num_envs: int) -> Any:
    env = gymnasium.make_vec(f"rlrnn/{name}{level}-v0", num_envs=num_envs)
    assert isinstance(env, TensorVectorEnv)
    return env


def first_returns(env: TensorVectorEnv, player: Player, seed: int = 0) -> Tensor:
    """The return of each copy's first episode."""
    obs, _ = env.reset(seed=seed)
    returns = torch.full((env.num_envs,), math.nan)
    while bool(returns.isnan().any()):
        obs, _, terminated, truncated, infos = env.step(player(obs))
        ended = (terminated | truncated) & returns.isnan()
        returns = torch.where(ended, infos["episode_return"], returns)
    return returns


def mean_is(returns: Tensor, value: float) -> bool:
    """To within five standard errors."""
    error = 5 * float(returns.std()) / math.sqrt(len(returns)) + 1e-5
    return abs(float(returns.mean()) - value) < error


def at_random(env: TensorVectorEnv, n: int) -> Player:
    generator = torch.Generator().manual_seed(0)
    return lambda obs: torch.randint(n, (env.num_envs,), generator=generator)


def row(env: TensorVectorEnv, level: str) -> list[str]:
    """The cells of the docstring's table for this level."""
    rows = [line.split("|")[1:-1] for line in (type(env).__doc__ or "").splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if row]
    return next(row for row in cells if row[0] == level.lower())


def observed(env: TensorVectorEnv, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One episode: what was seen [T+1, B, ...], rewards [T, B], who was done [T, B]."""
    obs, _ = env.reset(seed=5)
    seen, rows = [obs], []
    for action in actions:
        _, rewards, terminated, truncated, infos = env.step(action)
        seen.append(infos["final_obs"])
        rows.append((rewards, terminated | truncated))
    rewards, done = (torch.stack(x) for x in zip(*rows, strict=True))
    return torch.stack(seen), rewards, done


# -------------------------------------------------------------------------- the T-maze


def walk_at_random(length: int, steps: int) -> float:
    """The mean return, by dynamic programming over the steps that are left."""
    value = torch.zeros(length + 1)
    for _ in range(steps):
        moves = torch.stack([value.roll(-1), value.roll(1), value - 0.1, value - 0.1])
        moves[0, -1] = value[-1] - 0.1  # east of the junction, west of the start
        moves[1, 0] = value[0] - 0.1
        moves[2, -1], moves[3, -1] = 4.0, -0.1
        value = moves.mean(0)
    return float(value[0])


@every_level
def test_t_maze(level: str) -> None:
    env = make("TMaze", level, 256)
    assert row(env, level)[1:3] == [str(env.length), str(env.max_episode_steps)]
    north, east, south, west = range(4)
    sign = torch.zeros(256, dtype=torch.int64)

    def remembers(obs: Tensor) -> Tensor:
        nonlocal sign
        sign = torch.where(obs >= 2, obs, sign)
        turn = torch.where(sign == 2, north, south)
        return torch.where(obs == 1, turn, east)

    assert torch.equal(first_returns(env, remembers), torch.full((256,), 4.0))
    assert 0.3 < float((sign == 2).float().mean()) < 0.7

    turns = at_random(env, 2)
    forgets = [
        lambda obs: torch.where(obs == 1, north, east),
        lambda obs: torch.where(obs == 1, 2 * turns(obs), east),
    ]
    for player in forgets:
        assert mean_is(first_returns(env, player), 1.95)
    assert row(env, level)[4] == "1.95"
    chance = walk_at_random(env.length, env.max_episode_steps)
    assert float(row(env, level)[5]) == pytest.approx(chance, rel=1e-3)
    assert mean_is(first_returns(env, at_random(env, 4)), chance)

    # To and fro: walls cost 0.1, ways back nothing
    path = [west, north, east, west, *[east] * env.length, east, south]
    actions = torch.tensor(path)[:, None].expand(-1, 256)
    seen, rewards, done = observed(env, actions)
    assert set(seen[0].tolist()) == {2, 3} and torch.equal(seen[0], seen[4])
    assert bool((seen[5 : 4 + env.length - 1] == 0).all())
    assert bool((seen[4 + env.length :] == 1).all())
    expected = [-0.1, -0.1, *[0.0] * (env.length + 2), -0.1]
    for i, value in enumerate(expected):
        assert torch.allclose(rewards[i], torch.tensor(value))
    last = torch.where(seen[0] == 3, 4.0, -0.1)
    assert torch.allclose(rewards[-1], last) and bool(done[-1].all())


# ----------------------------------------------------------------------- memory chain


@every_level
def test_memory_chain(level: str) -> None:
    env = make("MemoryChain", level, 256)
    n = env.length
    assert row(env, level)[1:4] == [str(n), "1", str(n + 1)]
    bit = torch.zeros(256)

    def remembers(obs: Tensor) -> Tensor:
        nonlocal bit
        bit = torch.where(obs[:, 2] != 0, obs[:, 2], bit)
        return (bit > 0).long()

    assert torch.equal(first_returns(env, remembers), torch.ones(256))
    for player in (at_random(env, 2), lambda obs: torch.ones(256).long()):
        assert mean_is(first_returns(env, player), 0.0)


def test_memory_chain_is_bsuites() -> None:
    """The course of an episode in bsuite's `memory_chain.py`, with several bits."""
    n, bits = 6, 3
    env = MemoryChain(64, length=n, bits=bits)
    actions = torch.zeros(n + 1, 64, dtype=torch.int64)
    seen, rewards, done = observed(env, actions)
    context, query = seen[0, :, 2:], seen[n, :, 1].long()
    assert set(context.flatten().tolist()) == {-1.0, 1.0}
    assert set(query.tolist()) == {0, 1, 2}
    times = [0, *range(n + 1)]
    for t, time in enumerate(times):
        assert torch.allclose(seen[t, :, 0], torch.tensor(1 - time / n))
        assert torch.equal(seen[t, :, 1] * (time != n - 1), torch.zeros(64))
        assert torch.equal(seen[t, :, 2:], context * (time == 0))
    assert torch.equal(rewards[:-1], torch.zeros(n, 64))
    assert torch.equal(rewards[-1], -context.gather(1, query[:, None])[:, 0])
    assert torch.equal(done, (torch.arange(n + 1) == n)[:, None].expand(n + 1, 64))


# -------------------------------------------------------------------------------- copy


@every_level
def test_copy(level: str) -> None:
    env = make("Copy", level, 256)
    length, delay, n = int(env.length), int(env.delay), int(env.symbols)
    steps = 2 * length + delay
    assert row(env, level)[1:5] == [str(x) for x in (length, delay, n, steps)]
    shown: list[Tensor] = []

    def remembers(obs: Tensor) -> Tensor:
        shown.append(obs)
        return shown[max(0, len(shown) - 1 - length - delay)] % n

    assert torch.allclose(first_returns(env, remembers), torch.ones(256))
    shown.clear()
    worst = first_returns(env, lambda obs: (remembers(obs) + 1) % n)
    assert torch.allclose(worst, -torch.ones(256))
    ceiling = 2 / n - 1
    assert float(row(env, level)[5]) == ceiling
    for player in (at_random(env, n), lambda obs: torch.full((256,), 3)):
        assert mean_is(first_returns(env, player), ceiling)

    seen, rewards, done = observed(env, torch.zeros(steps, 256, dtype=torch.int64))
    counts = torch.bincount(seen[:length].flatten(), minlength=n + 2).double()
    assert counts[n:].sum() == 0
    mean = 256 * length / n
    assert float(((counts[:n] - mean) ** 2 / mean).sum()) < n + 5 * math.sqrt(2 * n)
    assert bool((seen[length : length + delay] == n).all())
    assert bool((seen[length + delay :] == n + 1).all())
    assert bool((rewards[: length + delay] == 0).all())
    right = torch.where(seen[:length] == 0, 1 / length, -1 / length)
    assert torch.allclose(rewards[length + delay :], right)
    assert bool((done == (torch.arange(steps) == steps - 1)[:, None]).all())


# ------------------------------------------------------------------------------ adding


@every_level
def test_adding(level: str) -> None:
    env = make("Adding", level, 4096)
    n = env.length
    assert row(env, level)[1:4] == [str(n), str(n), "1"]
    total = torch.zeros(4096)

    def remembers(obs: Tensor) -> Tensor:
        nonlocal total
        total = total + obs[:, 0] * obs[:, 1]
        return total[:, None]

    assert torch.allclose(first_returns(env, remembers), torch.ones(()), atol=1e-5)
    assert mean_is(first_returns(env, lambda obs: torch.ones(4096, 1)), 0.0)

    def memoryless(obs: Tensor) -> Tensor:
        return torch.where(obs[:, 1:] > 0, obs[:, :1] + 0.5, 1.0)

    assert float(row(env, level)[4]) == 1 / n
    assert mean_is(first_returns(env, memoryless), 1 / n)
    generator = torch.Generator().manual_seed(0)
    chance = first_returns(
        env, lambda obs: 2 * torch.rand(4096, 1, generator=generator)
    )
    assert mean_is(chance, -2.0)
    outside = first_returns(env, lambda obs: torch.full((4096, 1), -9.0))
    clipped = first_returns(env, lambda obs: torch.zeros(4096, 1))
    assert torch.equal(outside, clipped) and float(clipped.min()) >= -23

    seen, rewards, done = observed(env, torch.ones(n, 4096, 1))
    marks = seen[:n, :, 1]
    halves = marks.view(2, n // 2, 4096).sum(1)
    assert bool((halves == 1).all())  # one mark in each
    expected = 4096 / (n // 2)
    counts = marks.sum(1)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert float(chi2) < n + 5 * math.sqrt(2 * n)
    assert torch.equal(rewards[:-1], torch.zeros(n - 1, 4096))
    assert bool((done == (torch.arange(n) == n - 1)[:, None]).all())


# ------------------------------------------------------------------------- delayed XOR


@every_level
def test_delayed_xor(level: str) -> None:
    env = make("DelayedXor", level, 512)
    delay = int(env.delay)
    steps = 2 * delay + 3
    assert row(env, level)[1:3] == [str(delay), str(steps)]
    shown: list[Tensor] = []

    def remembers(obs: Tensor) -> Tensor:
        shown.append(obs)
        first, second = shown[0], shown[min(delay + 1, len(shown) - 1)]
        return (first != second).long()

    def remembers_one(obs: Tensor) -> Tensor:
        shown.append(obs)
        return shown[0]

    assert torch.equal(first_returns(env, remembers), torch.ones(512))
    shown.clear()
    for player in (remembers_one, at_random(env, 2), lambda obs: (obs > 0).long()):
        assert mean_is(first_returns(env, player), 0.0)

    seen, rewards, done = observed(env, torch.zeros(steps, 512, dtype=torch.int64))
    first, second = seen[0], seen[delay + 1]
    pairs = torch.bincount(2 * first + second, minlength=4).double()
    assert float(((pairs - 128) ** 2 / 128).sum()) < 25  # 3 degrees of freedom
    blanks = [t for t in range(steps - 1) if t not in (0, delay + 1)]
    assert bool((seen[blanks] == 2).all()) and bool((seen[steps - 1] == 3).all())
    assert torch.equal(rewards[:-1], torch.zeros(steps - 1, 512))
    assert torch.equal(rewards[-1], torch.where(first == second, 1.0, -1.0))
    assert bool((done == (torch.arange(steps) == steps - 1)[:, None]).all())


# ------------------------------------------------------------------ the ends of a dial


def test_shortest() -> None:
    """With nothing in between: one step in the corridor, no delay, one bit."""
    for env in (
        TMaze(8, length=1),
        MemoryChain(8, length=1),
        Copy(8, length=1, delay=0, symbols=2),
        Adding(8, length=2),
        DelayedXor(8, delay=0),
    ):
        obs, _ = env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(30):
            assert env.observation_space.contains(obs.numpy())
            obs, *_ = env.step(torch.as_tensor(env.action_space.sample()))
    single = gymnasium.make("rlrnn/CopyEasy-v0", length=2, delay=1)
    obs, _ = single.reset(seed=0)
    seen = [int(obs)]
    for _ in itertools.repeat(None, 5):
        obs, *_ = single.step(0)
        seen.append(int(obs))
    assert seen[2:] == [8, 9, 9, 9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TMaze(length=0), "length is 0: give at least 1"),
        (lambda: TMaze(max_episode_steps=0), "max_episode_steps is 0: give at least 1"),
        (lambda: MemoryChain(length=0), "length is 0: give at least 1"),
        (lambda: MemoryChain(bits=21), "bits is 21: choose from 1 to 20"),
        (lambda: Copy(length=0), "length is 0: give at least 1"),
        (lambda: Copy(delay=-1), "delay is -1: give at least 0"),
        (lambda: Copy(symbols=1), "symbols is 1: choose from 2 to 64"),
        (lambda: Adding(length=7), "length is 7: choose an even number from 2"),
        (lambda: DelayedXor(delay=-1), "delay is -1: give at least 0"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
