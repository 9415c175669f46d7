"""The environments: both faces, the same randomness, and what the tasks promise."""

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from popgym.envs.repeat_previous import RepeatPrevious as PopgymRepeatPrevious
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlrnn  # noqa: F401  (registers the ids)
from rlrnn.envs.cartpole import CartPole, cartpole
from rlrnn.envs.recall import RepeatPrevious, repeat_previous
from rlrnn.envs.tensor import (
    GAMMA,
    SingleEnv,
    TensorVectorEnv,
    _numbers,
    _uniform,
    offsets,
    streams,
    uniform,
)
from rlrnn.envs.wrappers import HideCoordinates

TENSOR_IDS = [
    id
    for id, spec in gymnasium.registry.items()
    if id.startswith("rlrnn/") and spec.vector_entry_point
]
HIDDEN_IDS = [
    "rlrnn/PendulumHiddenVelocity-v0",
    "rlrnn/MountainCarContinuousHiddenVelocity-v0",
    "rlrnn/AcrobotHiddenVelocity-v0",
]
if all(map(importlib.util.find_spec, ("Box2D", "pygame"))):  # gymnasium[box2d]
    HIDDEN_IDS.append("rlrnn/LunarLanderHiddenVelocity-v0")
Policy = Callable[[Tensor], Tensor]


def make_vec(id: str, num_envs: int, **kwargs: Any) -> TensorVectorEnv:
    env = gymnasium.make_vec(
        id, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs
    )
    assert isinstance(env, TensorVectorEnv)
    return env


def random_actions(env: TensorVectorEnv, steps: int, seed: int = 0) -> Tensor:
    """Uniform in the action space, [T, B, ...]."""
    space = env.single_action_space
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(steps, env.num_envs, *(space.shape or ()), generator=generator)
    if isinstance(space, Box):
        low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
        return low + u * (high - low)
    assert isinstance(space, Discrete | MultiDiscrete)
    sizes = space.n if isinstance(space, Discrete) else space.nvec
    return (u * torch.as_tensor(sizes)).long()


def play(env: TensorVectorEnv, actions: Tensor) -> list[Tensor]:
    """Everything that `step` returned, each [T, B, ...]."""
    rows = []
    for action in actions:
        obs, rewards, terminated, truncated, infos = env.step(action)
        rows.append([obs, rewards, terminated, truncated, *infos.values()])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def finished_returns(env: TensorVectorEnv, policy: Policy, steps: int) -> Tensor:
    """The returns of the episodes that ended within `steps` steps."""
    obs, _ = env.reset(seed=0)
    returns = []
    for _ in range(steps):
        obs, _, terminated, truncated, infos = env.step(policy(obs))
        returns.append(infos["episode_return"][terminated | truncated])
    return torch.cat(returns)


# ------------------------------------------------------------------ random numbers


def test_uniform_is_the_published_mixer() -> None:
    """Against Evensen's moremur in unbounded integers, masked to 64 bits."""

    def moremur(x: int) -> int:
        x = (x ^ x >> 27) * 0x3C79AC492BA7B653 % 2**64
        x = (x ^ x >> 33) * 0x1C69B3F74AC4AE35 % 2**64
        return x ^ x >> 27

    stream = streams(3, 5)
    u, after = uniform(stream, offsets(4))
    for i in range(5):
        for j in range(4):
            word = moremur((int(stream[i]) + (j + 1) * GAMMA) % 2**64)
            # Read as signed and centred, so 0 lies in the middle of [0, 1)
            assert float(u[i, j]) == ((word >> 40) ^ 2**23) / 2**24
    both, _ = uniform(stream, offsets(8))
    assert torch.equal(both[:, 4:], uniform(after, offsets(4))[0])
    assert torch.equal(streams(3, 2), stream[:2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 33, 5), (2, 1024, 0)])
def test_compiled_uniform_is_torchs(shape: tuple[int, int, int]) -> None:
    steps, copies, n = shape
    stream, numbers = streams(1, copies), offsets(steps * n).view(steps, 1, n)
    assert torch.equal(_numbers(stream, numbers), _uniform(stream + numbers))


def test_uniform_quality() -> None:
    """Each statistic lies within 5 standard errors of its expectation."""
    copies, n = 512, 1024
    stream = streams(0, copies)
    u, _ = uniform(stream, offsets(n))
    u = u.double()
    assert 0 <= u.min() and u.max() < 1
    total = copies * n
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / total)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / total)

    z = (u - 1 / 2) * math.sqrt(12)
    for other in (
        z.roll(1, 0),  # the next copy
        z.roll(1, 1),  # the next number
        z.roll(7, 1),
        (uniform(streams(1, copies), offsets(n))[0].double() - 1 / 2) * math.sqrt(12),
    ):
        assert abs((z * other).mean()) < 5 / math.sqrt(total)
    # All pairs of copies, and all pairs of counters: the largest of 131 k or 523 k
    assert (torch.corrcoef(z) - torch.eye(copies)).abs().max() < 6.5 / math.sqrt(n)
    assert (torch.corrcoef(z.T) - torch.eye(n)).abs().max() < 6.5 / math.sqrt(copies)

    # Chi-square: single numbers in 256 bins, and pairs of neighbours in 16 × 16, by
    # the high bits and by low ones
    for x in (u, (u * 2**12) % 1):
        bins = (x * 256).long()
        pairs = (x[:, ::2] * 16).long() * 16 + (x[:, 1::2] * 16).long()
        for values in (bins, pairs):
            counts = torch.bincount(values.flatten(), minlength=256).double()
            chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
            assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_integers_stay_below_their_bound() -> None:
    largest = torch.tensor(1 - 2**-24)
    m = torch.arange(1, 2**16)
    assert bool(((largest * m).long() == m - 1).all())


# ------------------------------------------------------------- conformance, by id


@pytest.mark.parametrize("id", TENSOR_IDS + HIDDEN_IDS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # advice on unbounded spaces
def test_checkers(id: str) -> None:
    env = gymnasium.make(id, disable_env_checker=True)
    plain = id in TENSOR_IDS
    check_env(env.unwrapped if plain else env, skip_render_check=True)
    sb3_check_env(env)
    env.close()


def test_importing_registers_without_torch() -> None:
    code = (
        "import rlrnn, sys, gymnasium; assert 'torch' not in sys.modules;"
        "assert 'rlrnn/Tuning-v0' in gymnasium.registry"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=rlrnn.__path__[0] + "/.."
    )


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_vector_interface(id: str) -> None:
    env = make_vec(id, 3)
    assert env.metadata["tensor"] is True
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, infos = env.reset(seed=0)
    assert env.observation_space.contains(obs.numpy()) and infos == {}
    obs, rewards, terminated, truncated, infos = env.step(random_actions(env, 1)[0])
    assert env.observation_space.contains(obs.numpy())
    assert rewards.dtype == torch.float32 and rewards.shape == (3,)
    assert terminated.dtype == truncated.dtype == torch.bool
    assert set(infos) == {"final_obs", "episode_return", "episode_length"}
    goes_on = ~(terminated | truncated)
    assert torch.equal(infos["final_obs"][goes_on], obs[goes_on])
    # without asking, the tensor face is what make_vec gives
    assert isinstance(gymnasium.make_vec(id, num_envs=2), TensorVectorEnv)


# ---------------------------------------------------------- the same trajectories


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_same_seed_same_trajectory(id: str) -> None:
    first, second, other = (make_vec(id, 8) for _ in range(3))
    actions = random_actions(first, 60)
    starts = [env.reset(seed=s)[0] for env, s in ((first, 1), (second, 1), (other, 2))]
    a, b, c = play(first, actions), play(second, actions), play(other, actions)
    assert torch.equal(starts[0], starts[1])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    # a later reset() starts new episodes, again the same ones
    assert torch.equal(first.reset()[0], second.reset()[0])
    a, b = play(first, actions[:10]), play(second, actions[:10])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_width_does_not_matter(id: str) -> None:
    wide, single = make_vec(id, 33), make_vec(id, 1)
    actions = random_actions(wide, 200)
    assert torch.equal(wide.reset(seed=4)[0][:1], single.reset(seed=4)[0])
    ours, theirs = play(single, actions[:, :1]), play(wide, actions)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y[:, :1])


def test_unseeded_runs_differ_and_can_be_repeated() -> None:
    env, other = CartPole(4), CartPole(4)
    obs, _ = env.reset()
    assert not torch.equal(obs, other.reset()[0])
    assert torch.equal(obs, other.reset(seed=env.np_random_seed)[0])


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_two_faces_agree(id: str) -> None:
    """Step by step, over several episodes: copy 0 of many, and the single face."""
    many, single = make_vec(id, 5), gymnasium.make(id)
    actions = random_actions(many, 3_100)
    start, _ = many.reset(seed=9)
    obs, info = single.reset(seed=9)
    assert np.array_equal(obs, start[0].numpy()) and info == {}
    episodes = 0
    for action in actions:
        after, rewards, terminated, truncated, infos = many.step(action)
        obs, reward, over, cut, info = single.step(action[0].numpy())
        assert np.array_equal(obs, infos["final_obs"][0].numpy()) and info == {}
        assert [reward, over, cut] == [
            rewards[0].item(),
            terminated[0].item(),
            truncated[0].item(),
        ]
        assert type(reward) is float and type(over) is bool and type(cut) is bool
        if over or cut:
            episodes += 1
            obs, _ = single.reset()
        assert np.array_equal(obs, after[0].numpy())
        if episodes == 2:
            return
    raise AssertionError(f"{episodes} episodes in 3,100 steps, expected 2")


def test_reset_in_the_middle_agrees() -> None:
    many, single = CartPole(3), cartpole()
    for env in (many, single):
        env.reset(seed=0)
    actions = random_actions(many, 5)
    play(many, actions)
    for action in actions:
        single.step(int(action[0]))
    assert np.array_equal(many.reset()[0][0].numpy(), single.reset()[0])


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_resume_to_the_same_bits(id: str) -> None:
    env, resumed = make_vec(id, 6), make_vec(id, 6)
    env.reset(seed=0)
    actions = random_actions(env, 80)
    play(env, actions[:30])
    saved = env.state_dict()
    expected = play(env, actions[30:])
    for target in (resumed, env):  # a fresh one, and going back
        target.load_state_dict(saved)
        got = play(target, actions[30:])
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert torch.equal(resumed.reset()[0], env.reset()[0])


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_resets_of_rows_and_of_all_agree(id: str) -> None:
    """On a CPU only the rows that are done are made anew; elsewhere all, and chosen."""
    env, other = make_vec(id, 12), make_vec(id, 12)
    other._may_read = False
    env.reset(seed=3), other.reset(seed=3)
    limit = env.max_episode_steps
    actions = random_actions(env, 850 if limit is None else 60)
    before = env.state_dict()
    play(env, actions[:17])
    even, mixed = torch.arange(12) % 2 == 0, env.state_dict()
    for key, value in mixed.items():  # two moments of an episode
        rows = even.view(-1, *[1] * (value.ndim - 1))
        mixed[key] = torch.where(rows, before[key], value)
    if limit is not None:  # its end is near
        mixed["episode_length"] += max(0, limit - 50)
    for each in (env, other):
        each.load_state_dict(mixed)
    for some in torch.split(actions, 60):
        a, b = play(env, some), play(other, some)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert env.state.keys() == other.state.keys()
        assert all(torch.equal(env.state[key], other.state[key]) for key in env.state)
        if (a[2] | a[3]).any():
            return
    raise AssertionError("nothing has ended")


def test_results_can_be_written_to() -> None:
    """What `step` returned is the user's: writing to it changes no later step."""
    env, other = CartPole(8), CartPole(8)
    env.reset(seed=0), other.reset(seed=0)
    for action in random_actions(env, 40):
        ours, theirs = env.step(action), other.step(action)
        for x, y in zip(
            (*ours[:4], *ours[4].values()),
            (*theirs[:4], *theirs[4].values()),
            strict=True,
        ):
            assert torch.equal(x, y)
        seen = {id(x): x for x in (*ours[:4], *ours[4].values())}
        for x in seen.values():
            x.zero_()


# ------------------------------------------------------------ autoreset, time limit


def test_truncation_keeps_the_last_observation() -> None:
    env = CartPole(4, max_episode_steps=5)
    env.reset(seed=0)
    alternate = (torch.arange(12) % 2)[:, None].expand(12, 4)
    unlimited = CartPole(4)
    unlimited.reset(seed=0)
    obs, rewards, terminated, truncated, final_obs, returns, lengths = play(
        env, alternate
    )
    straight = play(unlimited, alternate)[0]
    assert not terminated.any()
    done = (torch.arange(1, 13) % 5 == 0)[:, None].expand(12, 4)
    assert torch.equal(truncated, done)
    assert torch.equal(final_obs[:5], straight[:5])
    assert torch.equal(obs[:4], straight[:4])
    assert not torch.equal(obs[4], final_obs[4])
    assert torch.equal(obs[~done], final_obs[~done])
    assert bool((obs[4].abs() <= 0.05).all())  # a start
    assert torch.equal(lengths[:, 0], torch.arange(12) % 5 + 1)
    assert torch.equal(returns, lengths.float())


def test_terminated_is_not_truncated() -> None:
    always_left = torch.zeros(30, 8, dtype=torch.int64)
    env = CartPole(8)
    env.reset(seed=0)
    length = int(play(env, always_left)[2].long().argmax(0)[0]) + 1
    env = CartPole(8, max_episode_steps=length)
    env.reset(seed=0)
    _, _, terminated, truncated, *_ = play(env, always_left[:length])
    assert terminated[-1, 0] and not truncated[-1, 0]


class CountSyncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations other than views, and those that wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = 0
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.ops += not func.is_view
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        if name in self.WAITING or any(i.dtype == torch.bool for i in indices):
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_step_never_waits_for_the_device(id: str) -> None:
    """As on an accelerator: the meta device does what they do, without values."""
    env = make_vec(id, 4, device="meta")
    env.reset(seed=0)
    actions = random_actions(env, 12).to("meta")
    with CountSyncs() as count:
        for action in actions.unbind():
            env.step(action)
    assert count.waits == []
    assert count.ops <= 64 * 12 + 1, f"{count.ops / 12} operations per step"
    with CountSyncs() as count:  # it would have seen one
        bool(torch.ones(4).any())
        torch.ones(4)[torch.ones(4) > 0]
    assert len(count.waits) == 2


@pytest.mark.parametrize("id", TENSOR_IDS)
@pytest.mark.parametrize(
    "device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_all_tensors_live_on_the_device(id: str, device: str) -> None:
    """The meta device has no values: reading one raises."""
    env = make_vec(id, 4, device=device)
    obs, _ = env.reset(seed=0)
    actions = random_actions(env, 3).to(env.device)
    results = [obs, *play(env, actions), *env.state.values()]
    assert {result.device for result in results} == {env.device}


@pytest.mark.gpu
@pytest.mark.parametrize("id", TENSOR_IDS)
def test_devices_agree(id: str) -> None:
    """Whole trajectories; of the equations of motion each step from the same state, as
    an unstable one makes much of how sines are rounded."""
    here, there = make_vec(id, 64), make_vec(id, 64, device="cuda")
    here.reset(seed=0), there.reset(seed=0)
    steered = isinstance(here.single_observation_space, Box)
    for action in random_actions(here, 200):
        if steered:
            there.load_state_dict(here.state_dict())
        ours, theirs = here.step(action), there.step(action.to(there.device))
        pairs = [*zip(ours[:4], theirs[:4], strict=True)]
        pairs += [(value, theirs[4][key]) for key, value in ours[4].items()]
        for x, y in pairs:
            assert torch.allclose(x.double(), y.cpu().double(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ RepeatPrevious


@pytest.mark.parametrize(("k", "decks"), [(4, 1), (32, 2), (64, 3), (1, 1)])
def test_repeat_previous_is_popgyms(k: int, decks: int) -> None:
    """Dealt the same cards and given the same answers, POPGym says the same."""
    cards = 52 * decks
    env = RepeatPrevious(3, k=k, decks=decks)
    start, _ = env.reset(seed=k)
    actions = random_actions(env, cards - 1)
    _, rewards, terminated, truncated, final_obs, returns, _ = play(env, actions)
    assert not truncated.any() and not terminated[:-1].any() and terminated[-1].all()
    dealt = torch.cat([start[None], final_obs])  # [cards, B]
    for i in range(3):
        suits = dealt[:, i].tolist()
        assert sorted(suits) == sorted([0, 1, 2, 3] * 13 * decks)
        theirs = PopgymRepeatPrevious(num_decks=decks, k=k)
        theirs.reset(seed=0)
        pools = [list(range(suit, cards, 4)) for suit in range(4)]
        theirs.deck.reset(shuffle=False)
        theirs.deck.idx = np.array([pools[suit].pop() for suit in suits])[::-1]
        theirs.deck.deal("player", 1)
        for t in range(cards - 1):
            obs, reward, over, cut, _ = theirs.step(int(actions[t, i]))
            assert (obs, over, cut) == (suits[t + 1], bool(terminated[t, i]), False)
            assert float(rewards[t, i]) == pytest.approx(reward, abs=1e-7)
    assert bool((returns.abs() <= 1 + 1e-5).all())


def test_repeat_previous_deck_is_shuffled() -> None:
    """Uniform at each position, and neighbours differ as without replacement."""
    env = RepeatPrevious(4096)
    start, _ = env.reset(seed=0)
    dealt = torch.cat([start[None], play(env, random_actions(env, 51))[4]])
    for position in (0, 1, 25, 51):
        counts = torch.bincount(dealt[position], minlength=4).double()
        assert ((counts - 1024) ** 2 / 1024).sum() < 25  # 3 degrees of freedom
    same = (dealt[1:] == dealt[:-1]).double().mean(0)  # per copy, independent
    error = same.std() / math.sqrt(4096)
    assert abs(same.mean() - 12 / 51) < 5 * error


@pytest.mark.parametrize("level", ["Easy", "Medium", "Hard"])
def test_repeat_previous_ceilings(level: str) -> None:
    env = make_vec(f"rlrnn/RepeatPrevious{level}-v0", 512)
    assert isinstance(env, RepeatPrevious)
    k, steps = env.k, 2 * 155
    history: list[Tensor] = []

    def remember(obs: Tensor) -> Tensor:
        history.append(obs)
        return history[max(0, len(history) - k)]  # all copies run in step

    # History of the previous episode only answers while nothing is asked yet
    assert torch.allclose(finished_returns(env, remember, steps), torch.ones(()))

    decks = {4: 1, 32: 2, 64: 3}[k]
    ceiling = 2 * 13 * decks / (52 * decks - 1) - 1
    assert f"{ceiling:.4f}" in (RepeatPrevious.__doc__ or "")
    other, same = (
        finished_returns(env, policy, steps)
        for policy in (lambda obs: (obs + 1) % 4, lambda obs: obs)
    )
    error = float(other.std()) / math.sqrt(len(other))
    assert float(other.mean()) == pytest.approx(ceiling, abs=5 * error)
    assert same.mean() < ceiling
    generator = torch.Generator().manual_seed(0)
    chance = finished_returns(
        env, lambda obs: torch.randint(4, obs.shape, generator=generator), steps
    )
    assert float(chance.mean()) == pytest.approx(-0.5, abs=5 * error)


# ----------------------------------------------------------------------- cart-pole


def test_cartpole_is_gymnasiums() -> None:
    """From the same starts, with the same random pushes, to the end of each episode."""
    env = CartPole(200, hide_velocities=False)
    start, _ = env.reset(seed=0)
    actions = random_actions(env, 150)
    _, rewards, terminated, _, final_obs, _, lengths = play(env, actions)
    assert terminated.any(0).all()  # every copy has ended once
    theirs: Any = CartPoleEnv()
    assert env.single_observation_space == theirs.observation_space
    assert env.single_action_space == theirs.action_space
    for i in range(200):
        theirs.reset()
        theirs.state = start[i].double().numpy()
        over, t = False, 0
        while not over:
            obs, reward, over, _, _ = theirs.step(int(actions[t, i]))
            assert over == bool(terminated[t, i]) and reward == rewards[t, i] == 1
            assert np.allclose(obs, final_obs[t, i].numpy(), rtol=1e-4, atol=1e-4)
            t += 1
        assert t == int(lengths[t - 1, i])


def test_cartpole_one_step_is_gymnasiums() -> None:
    """From any state, to the accuracy of float32."""
    env = CartPole(1000, hide_velocities=False)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    widths = torch.tensor([2.4, 3.0, 0.2095, 3.0])
    pole = (2 * torch.rand(1000, 4, generator=generator) - 1) * widths
    env.load_state_dict(env.state_dict() | {"pole": pole})
    actions = random_actions(env, 1)
    _, _, terminated, _, final_obs, *_ = play(env, actions)
    theirs: Any = CartPoleEnv()
    for i in range(1000):
        theirs.reset()
        theirs.state = pole[i].double().numpy()
        obs, _, over, _, _ = theirs.step(int(actions[0, i]))
        assert np.allclose(obs, final_obs[0, i].numpy(), rtol=2e-6, atol=2e-6)
        assert over == bool(terminated[0, i])


def test_cartpole_hides_the_velocities() -> None:
    full, hidden = CartPole(4, hide_velocities=False), CartPole(4)
    actions = random_actions(full, 60)
    assert torch.equal(full.reset(seed=0)[0][:, ::2], hidden.reset(seed=0)[0])
    ours, theirs = play(hidden, actions), play(full, actions)
    assert torch.equal(ours[0], theirs[0][..., ::2])
    space, whole = hidden.single_observation_space, full.single_observation_space
    assert isinstance(space, Box) and isinstance(whole, Box)
    assert np.array_equal(space.high, whole.high[::2])


def test_cartpole_ceilings() -> None:
    env = CartPole(64)
    before = torch.zeros(64, 2)

    def differences(obs: Tensor) -> Tensor:
        """Linear in position, angle and their last differences."""
        nonlocal before
        speed = (obs - before) / 0.02
        before = obs
        weights = torch.tensor([0.05, 1.0]), torch.tensor([0.1, 0.3])
        return (obs @ weights[0] + speed @ weights[1] > 0).long()

    assert torch.equal(
        finished_returns(env, differences, 500), torch.full((64,), 500.0)
    )

    env = CartPole(512)
    generator = torch.Generator().manual_seed(0)

    def logistic(obs: Tensor) -> Tensor:
        """The best found without memory, to within its noise."""
        right = torch.sigmoid(4.8 * obs[:, 1] / 0.2095)
        return (torch.rand(512, generator=generator) < right).long()

    assert 45 < finished_returns(env, logistic, 600).mean() < 60
    chance = finished_returns(
        env, lambda obs: torch.randint(2, (512,), generator=generator), 400
    )
    assert 21 < chance.mean() < 24


# ------------------------------------------------------------------------ wrappers


@pytest.mark.parametrize(
    ("id", "original", "keep"),
    [
        (HIDDEN_IDS[0], "Pendulum-v1", [0, 1]),
        (HIDDEN_IDS[1], "MountainCarContinuous-v0", [0]),
        (HIDDEN_IDS[2], "Acrobot-v1", [0, 1, 2, 3]),
    ],
)
def test_hidden_classics(id: str, original: str, keep: list[int]) -> None:
    ours, theirs = gymnasium.make(id), gymnasium.make(original)
    assert ours.spec and theirs.spec
    assert ours.spec.max_episode_steps == theirs.spec.max_episode_steps
    theirs.action_space.seed(0)
    (a, _), (b, _) = ours.reset(seed=0), theirs.reset(seed=0)
    for _ in range(theirs.spec.max_episode_steps or 0):
        assert np.array_equal(a, b[keep])
        action = theirs.action_space.sample()
        (a, *mine), (b, *yours) = ours.step(action), theirs.step(action)
        assert mine[:3] == yours[:3]
        if yours[1] or yours[2]:
            break
    assert mine[1] or mine[2]
    copies = gymnasium.make_vec(id, num_envs=2)
    assert copies.reset(seed=0)[0].shape == (2, len(keep))


@pytest.mark.parametrize("id", HIDDEN_IDS)
def test_errors_of_hidden_classics(id: str) -> None:
    """As the tensor tasks have them; gymnasium's own would go on after the end."""
    env = gymnasium.make(id)
    with pytest.raises(ResetNeeded, match=r"reset\(\)"):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    wrong: list[Any] = ["x", None, 0.5, -1, [0.0, 0.0], np.full(1, np.nan, np.float32)]
    for action in wrong:
        with pytest.raises(ValueError, match="action is .*, expected a member of"):
            env.step(action)
    if isinstance(env.action_space, Box):
        env.step(np.full(1, 9.0, np.float32))  # is clipped
        env.step(np.zeros(1))
    ended = False
    while not ended:
        *_, over, cut, _ = env.step(env.action_space.sample())
        ended = over or cut
    with pytest.raises(ResetNeeded, match="end of an episode: call reset"):
        env.step(env.action_space.sample())
    env.reset()
    env.step(env.action_space.sample())
    assert env.spec is not None
    assert str(gymnasium.make(env.spec)) == str(env)


def test_hide_coordinates() -> None:
    env = gymnasium.make("CartPole-v1")
    for wrapped in (
        HideCoordinates(env, hide=[3, 1]),
        HideCoordinates(env, keep=[2, 0]),
    ):
        space = wrapped.observation_space
        assert isinstance(space, Box)
        assert isinstance(env.observation_space, Box)
        assert np.array_equal(space.high, env.observation_space.high[[0, 2]])
        obs, _ = wrapped.reset(seed=0)
        assert np.array_equal(obs, env.reset(seed=0)[0][[0, 2]])
        assert space.contains(obs)
    for arguments, message in [
        ({}, "give one of the two"),
        ({"keep": [0], "hide": [1]}, "give one of the two"),
        ({"hide": [4]}, r"no coordinates \[4\]: the observation has 0 to 3"),
        ({"keep": [-1]}, r"no coordinates \[-1\]"),
        ({"hide": [0, 1, 2, 3]}, "leaves nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            HideCoordinates(env, **arguments)
    with pytest.raises(ValueError, match=r"Discrete\(4\), expected a Box"):
        HideCoordinates(repeat_previous(), keep=[0])


# -------------------------------------------------------------------------- errors


def test_errors() -> None:
    env = CartPole(3)
    good = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(good)
    env.reset(seed=0)
    for actions, given in [
        (torch.zeros(4, dtype=torch.int64), r"torch.int64 \[4\] on cpu"),
        (good[:, None], r"torch.int64 \[3, 1\] on cpu"),
        (good.float(), r"torch.float32 \[3\] on cpu"),
        (good.to("meta"), r"torch.int64 \[3\] on meta"),
    ]:
        message = rf"actions are {given}, expected torch.int64 \[3\] on cpu"
        with pytest.raises(ValueError, match=message):
            env.step(actions)
    with pytest.raises(ValueError, match="leave it out"):
        env.reset(options={"low": 0.1})
    with pytest.raises(
        ValueError, match=r"'pole'\] is nothing, expected torch.float32"
    ):
        env.load_state_dict({k: v for k, v in env.state.items() if k != "pole"})
    wide = CartPole(4)
    wide.reset(seed=0)
    with pytest.raises(ValueError, match="same num_envs"):
        env.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match="device is 'gpu', expected"):
        CartPole(3, device="gpu")
    for make in (lambda: CartPole(0), lambda: RepeatPrevious(2, k=52)):
        with pytest.raises(ValueError, match="give at least 1|choose k from 1 to 51"):
            make()


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_values_of_actions(id: str) -> None:
    """One that is no member of the space is named; the state stays as it was."""
    env = make_vec(id, 5)
    env.reset(seed=0)
    before, space = env.state_dict(), env.single_action_space
    good = random_actions(env, 1)[0]
    if isinstance(space, Box):
        wrong = [math.nan, math.inf, -math.inf]
        env.step(torch.full_like(good, 1e6))  # is clipped
        env.load_state_dict(before)
    else:
        assert isinstance(space, Discrete | MultiDiscrete)
        wrong = [-1, int(space.n if isinstance(space, Discrete) else space.nvec[-1])]
    for value in wrong:
        actions = good.clone()
        actions.view(5, -1)[3, -1] = value
        row = re.escape(f"actions[3] is {actions[3].tolist()}, expected a member of")
        with pytest.raises(ValueError, match=row):
            env.step(actions)
    assert all(torch.equal(env.state[key], before[key]) for key in before)
    env.step(good)


def test_errors_of_the_single_face() -> None:
    env = repeat_previous(k=4)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action is 4, expected a member of Discrete"):
        env.step(4)
    for _ in range(51):
        *_, over, _, _ = env.step(0)
    assert over
    with pytest.raises(ResetNeeded, match="end of an episode"):
        env.step(0)
    with pytest.raises(ValueError, match="one copy"):
        SingleEnv(CartPole(2))
