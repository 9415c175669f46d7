"""The recurrent agent: exact where it can be, and a Stable-Baselines3 citizen."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

import rlrnn  # noqa: F401  (registers the environments)
import rlrnn.envs.tensor as tensor_tasks
from rlrnn.agents import RecurrentPolicy, RecurrentPPO
from rlrnn.agents.distributions import (
    ActionDistribution,
    Bernoulli,
    Categorical,
    Gaussian,
    MultiCategorical,
    distribution_for,
)
from rlrnn.agents.rollout import Rollout, minibatches, segment_length
from rlrnn.agents.vector import TensorSource, TensorVecEnv
from rlrnn.checkpoint import CheckpointError
from shared import Inspect, Syncs

ROOT = Path(__file__).parents[1]
CARTPOLE = "rlrnn/CartPoleHiddenVelocity-v0"
RECALL = "rlrnn/RepeatPreviousEasy-v0"
SMALL = {"lstm_hidden_size": 8, "net_arch": [8]}
BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
BOUNDED = spaces.Box(-0.5, 0.5, (2,), np.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensor_env(env_id: str = CARTPOLE, n: int = 4, **kwargs: Any) -> Any:
    return gymnasium.make_vec(env_id, num_envs=n, **kwargs)


def agent(env: Any, **kwargs: Any) -> RecurrentPPO:
    defaults: dict[str, Any] = {
        "n_steps": 16,
        "batch_size": 32,
        "n_epochs": 2,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": SMALL,
    }
    return RecurrentPPO("MlpLstmPolicy", env, **{**defaults, **kwargs})


def weights(model: RecurrentPPO) -> Tensor:
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


class Counter(gymnasium.Env[Any, Any]):
    """Shows (index, steps so far, 0); terminates or truncates after `length` steps."""

    def __init__(
        self,
        action_space: spaces.Space[Any],
        index: int = 0,
        length: int = 5,
        truncate: bool = True,
    ) -> None:
        self.observation_space = spaces.Box(-1000, 1000, (3,), np.float32)
        self.action_space = action_space
        self.index, self.length, self.truncate = index, length, truncate

    def _obs(self) -> NDArray[np.float32]:
        return np.array([self.index, self.t, 0], np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        end = self.t >= self.length
        over = end and not self.truncate, end and self.truncate
        return self._obs(), float(self.index), *over, {}


def counters(n: int = 3, space: spaces.Space[Any] | None = None, **kw: Any) -> Any:
    space = space or spaces.Discrete(2)

    def make(index: int) -> Callable[[], Any]:
        return lambda: Counter(
            space,
            index,
            length=kw.get("length", 4 + index),
            **{k: v for k, v in kw.items() if k != "length"},
        )

    return DummyVecEnv([make(i) for i in range(n)])


# --- distributions --------------------------------------------------------------------

SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([2, 4]),
    "multibinary": spaces.MultiBinary([2, 2]),
    "box": BOUNDED,
}


def _torch_log_prob_and_entropy(
    dist: ActionDistribution, params: Tensor, actions: Tensor
) -> tuple[Tensor, Tensor]:
    D = torch.distributions
    parts: list[tuple[Any, Tensor]]
    match dist:
        case Categorical():
            parts = [(D.Categorical(logits=params), actions)]
        case MultiCategorical():
            logits = torch.split(params, dist.choices, -1)
            parts = [
                (D.Categorical(logits=x), a)
                for x, a in zip(logits, actions.unbind(-1), strict=True)
            ]
        case Bernoulli():
            bits = actions.reshape(params.shape).to(params.dtype)
            one = D.Independent(D.Bernoulli(logits=params), 1)
            parts = [(one, bits)]
        case _:
            mean, log_std = params.chunk(2, -1)
            many = D.Independent(D.Normal(mean, log_std.exp()), 1)
            parts = [(many, actions.reshape(mean.shape))]
    return (
        torch.stack([d.log_prob(a) for d, a in parts]).sum(0),
        torch.stack([d.entropy() for d, _ in parts]).sum(0),
    )


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("lead", [(), (5,), (4, 5)])
def test_distributions_agree_with_torch(name: str, lead: tuple[int, ...]) -> None:
    space = SPACES[name]
    dist = distribution_for(space)
    g = torch.Generator().manual_seed(0)
    params = torch.randn(*lead, dist.size, generator=g, dtype=torch.float64)
    actions = dist.sample(params, g)
    assert actions.shape == (*lead, *(space.shape or ())) == dist.mode(params).shape
    log_prob, entropy = _torch_log_prob_and_entropy(dist, params, actions)
    torch.testing.assert_close(dist.log_prob(params, actions), log_prob)
    torch.testing.assert_close(dist.entropy(params), entropy)
    best = dist.log_prob(params, dist.mode(params))
    assert (best >= dist.log_prob(params, actions)).all()


@pytest.mark.parametrize("name", ["discrete", "multidiscrete", "multibinary"])
def test_sample_frequencies(name: str) -> None:
    """Within five standard errors of what log_prob says, for every action."""
    dist = distribution_for(SPACES[name])
    g = torch.Generator().manual_seed(0)
    params = torch.randn(dist.size, generator=g)
    n = 20_000
    samples = dist.sample(params.expand(n, -1), g)
    seen, counts = torch.unique(samples, dim=0, return_counts=True)
    p = dist.log_prob(params.expand(len(seen), -1), seen).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_gaussian_moments() -> None:
    dist = Gaussian((2,))
    params = torch.tensor([1.0, -2.0, 0.0, -1.0])
    samples = dist.sample(params.expand(20_000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(0), params[:2], atol=0.04, rtol=0)
    torch.testing.assert_close(samples.std(0), params[2:].exp(), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": BOX}),
        spaces.Tuple([BOX]),
        spaces.Discrete(2, start=1),
        spaces.Text(3),
    ],
)
def test_unsupported_action_spaces(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match="expected Discrete"):
        distribution_for(space)


# --- policy ---------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"shared_lstm": True, "enable_critic_lstm": False},
    {"enable_critic_lstm": False},
    {"cell": "gru", "n_lstm_layers": 2},
    {"cell": "rnn", "net_arch": {"pi": [], "vf": [4, 4]}},
    {"cell": "mingru", "n_lstm_layers": 2},
]


def policy_of(space: spaces.Space[Any], **kwargs: Any) -> RecurrentPolicy:
    settings = {"lstm_hidden_size": 8, "net_arch": [8], **kwargs}
    return RecurrentPolicy(BOX, space, lambda _: 1e-3, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_acting_equals_learning(variant: dict[str, Any]) -> None:
    """Step by step and as a sequence: same log probabilities, values and state."""
    policy = policy_of(spaces.Discrete(3), **variant)
    g = torch.Generator().manual_seed(0)
    T, B = 7, 3
    obs = torch.randn(T, B, 3, generator=g)
    starts = torch.rand(T, B, generator=g) < 0.3
    first = torch.randn(policy.initial_state(B).shape, generator=g)
    mine, its = policy.split(first)
    act, steps = policy.stepper(), []
    for t in range(T):
        now = slice(t, t + 1)
        features = policy.features(obs[now])
        params, latent, after = act(features[0], mine, starts[t])
        values, states = policy.appraise(features, latent[None], its, starts[now])
        state = torch.cat((mine, its))
        expected = policy.evaluate_sequence(obs[now], state, starts[now])
        for ours, theirs in zip(
            (params, values[0], torch.cat((after, states[-1]))),
            (expected[0][0], expected[1][0], expected[2]),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            policy.value(obs[t], state, starts[t]), expected[1][0]
        )
        mine, its = after, states[-1]
        steps.append((params, values[0]))
    params, values = map(torch.stack, zip(*steps, strict=True))
    sequence_params, sequence_values, end = policy.evaluate_sequence(obs, first, starts)
    torch.testing.assert_close(sequence_values, values)
    torch.testing.assert_close(sequence_params, params)
    torch.testing.assert_close(end, torch.cat((mine, its)))


def test_norm_obs_is_the_same_as_normalising_outside() -> None:
    """By what came in earlier rollouts; a saved agent takes raw observations."""
    model = agent(tensor_env(), policy_kwargs={"norm_obs": True}, norm_reward=True)
    obs: list[Tensor] = []
    for _ in range(3):
        seen = model.policy.seen
        assert seen is not None
        if obs:
            whole = torch.cat(obs)
            torch.testing.assert_close(seen.mean, whole.mean(0))
            torch.testing.assert_close(seen.var, whole.var(0, correction=0))
        model.learn(model.n_steps * model.n_envs, reset_num_timesteps=False)
        seen_now = model.rollout_buffer.obs
        assert isinstance(seen_now, Tensor)
        obs.append(seen_now.flatten(0, 1))
    scale = torch.rsqrt(model._spread.var + 1e-8)
    rewards = torch.ones(2, model.n_envs)
    done = torch.zeros(2, model.n_envs, dtype=torch.bool)
    found = model._scaled(rewards, done)
    torch.testing.assert_close(
        found, torch.rsqrt(model._spread.var + 1e-8).expand_as(found)
    )
    assert not torch.equal(scale, torch.rsqrt(model._spread.var + 1e-8))
    buffer = io.BytesIO()
    model.save(buffer)
    again = RecurrentPPO.load(io.BytesIO(buffer.getvalue()))
    look = np.ones((2, 2), np.float32)
    for mine, its in zip(
        model.predict(look, deterministic=True),
        again.predict(look, deterministic=True),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("cell") != "mingru"])
def test_the_compiled_step_equals_torch(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(spaces.Discrete(3), activation_fn=nn.ReLU, **variant)
    g = torch.Generator().manual_seed(0)
    features, starts = torch.randn(5, 3, generator=g), torch.arange(5) % 2 == 1
    state, _ = policy.split(torch.randn(policy.initial_state(5).shape, generator=g))
    compiled = policy.stepper()
    monkeypatch.setattr("rlrnn.agents.acting.compiles", lambda x: False)
    plain = policy.stepper()
    assert type(compiled) is not type(plain)
    for ours, theirs in zip(
        compiled(features, state, starts), plain(features, state, starts), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_shared_critic_sends_no_gradient_to_the_actor() -> None:
    policy = policy_of(spaces.Discrete(3), shared_lstm=True, enable_critic_lstm=False)
    starts = torch.zeros(2, 1, dtype=torch.bool)
    _, values, _ = policy.evaluate_sequence(
        torch.ones(2, 1, 3), policy.initial_state(1), starts
    )
    values.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in policy.actor.parameters())
    assert policy.critic_mlp[0].weight.grad is not None


def test_shared_and_separate_is_an_error() -> None:
    with pytest.raises(ValueError, match="shared_lstm and enable_critic_lstm"):
        policy_of(spaces.Discrete(3), shared_lstm=True)


def test_initial_logits_are_what_an_untrained_agent_plays() -> None:
    logits = [0.0, 2.0, -1.0]
    policy = policy_of(spaces.Discrete(3), initial_logits=logits)
    params, _, _ = policy.evaluate_sequence(
        torch.randn(5, 2, 3), policy.initial_state(2), torch.ones(5, 2).bool()
    )
    assert torch.equal(params, torch.tensor(logits).expand(5, 2, 3))
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        policy_of(spaces.Discrete(3), initial_logits=[0.0, 1.0])


def test_predict_single_vectorised_and_restarted() -> None:
    policy = policy_of(BOUNDED, log_std_init=2.0)
    obs = np.ones((2, 3), np.float32)
    actions, state = policy.predict(obs)
    assert BOUNDED.contains(actions[0]) and BOUNDED.contains(actions[1])
    _, next_state = policy.predict(obs, state)
    assert state is not None and next_state is not None
    assert not np.array_equal(state[0], next_state[0])
    _, again = policy.predict(obs, next_state, episode_start=np.array([True, False]))
    assert again is not None
    np.testing.assert_allclose(again[0][:, 0], state[0][:, 0], atol=1e-6)
    assert not np.allclose(again[0][:, 1], state[0][:, 1])
    one, _ = policy.predict(obs[0], deterministic=True)
    both, _ = policy.predict(obs, deterministic=True)
    assert one.shape == (2,) and both.shape == (2, 2)
    np.testing.assert_allclose(one, both[0], atol=1e-6)
    with pytest.raises(ValueError, match="state has shape"):
        policy.predict(obs[0], state)


# --- rollout --------------------------------------------------------------------------


def test_segment_length() -> None:
    cases = {(128, 128): 128, (128, 512): 128, (1024, 128): 128, (1024, 100): 64}
    cases |= {(7, 3): 1, (12, 5): 4, (5, 1): 1}
    for (n_steps, batch_size), expected in cases.items():
        assert segment_length(n_steps, batch_size) == expected


@pytest.mark.parametrize("batch_size", [4, 8, 20, 24, 1000])
def test_minibatches_cover_every_step_once(batch_size: int) -> None:
    """Each segment in time order, in one column, with the state it began in."""
    T, B = 12, 5
    length = segment_length(T, batch_size)
    number = torch.arange(T * B).view(T, B)
    x = number.float()
    states = number[::length].float()[:, None, :, None].expand(-1, 2, -1, 3)
    rollout = Rollout(number, number, number > 0, x, x, x, x, states)
    generator = torch.Generator().manual_seed(0)
    found = []
    batches = list(minibatches(rollout.segments(), batch_size, generator))
    for batch in batches:
        assert isinstance(batch.obs, Tensor)
        assert batch.obs.numel() <= max(batch_size, length)
        assert torch.equal(batch.obs, batch.obs[0] + B * torch.arange(length)[:, None])
        assert torch.equal(batch.state[1, :, 2], batch.obs[0].float())
        assert torch.equal(batch.returns, batch.actions.float())
        found.append(batch.obs.flatten())
    assert torch.equal(torch.cat(found).sort().values, number.flatten())
    sizes = [b.starts.numel() for b in batches]
    assert all(size == sizes[0] for size in sizes[:-1])


def ratio_error(model: RecurrentPPO) -> float:
    """How far the first epoch's ratios, and values, are from those that were played."""
    policy = model.policy
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    segments = model.rollout_buffer.segments()
    with torch.no_grad():
        for batch in minibatches(segments, model._minibatch, generator):
            params, values, _ = policy.evaluate_sequence(
                batch.obs, batch.state, batch.starts
            )
            log_probs = policy.distribution.log_prob(params, batch.actions)
            ratio = (log_probs - batch.log_probs).exp()
            worst = max(worst, float((ratio - 1).abs().max()))
            worst = max(worst, float((values - batch.values).abs().max()))
    return worst


@pytest.mark.parametrize("batch_size", [4, 16, 32, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_ratio_is_one(variant: dict[str, Any], batch_size: int) -> None:
    """In every rollout, whatever was learned before; many short episodes."""
    errors: list[float] = []
    model = agent(
        counters(),
        batch_size=batch_size,
        learning_rate=0.01,
        policy_kwargs={**SMALL, **variant},
    )
    model.learn(3 * 16 * 3, Inspect(lambda m: errors.append(ratio_error(m))))
    assert len(errors) == 3 and max(errors) < 1e-5


def test_first_ratio_is_one_on_tensor_environments() -> None:
    errors: list[float] = []
    for env_id in (CARTPOLE, RECALL):
        model = agent(tensor_env(env_id), batch_size=8, learning_rate=0.01)
        model.learn(3 * 64, Inspect(lambda m: errors.append(ratio_error(m))))
    assert len(errors) == 6 and max(errors) < 1e-5


def test_an_index_never_leaks_into_another_column() -> None:
    """Observations, rewards and starts of environment i stay in column i."""

    def look(model: RecurrentPPO) -> None:
        rollout = model.rollout_buffer
        scale = model.reward_scale
        assert isinstance(rollout.obs, Tensor)
        index, t = rollout.obs[..., 0], rollout.obs[..., 1]
        assert torch.equal(index, torch.arange(3.0).expand(16, 3))
        assert torch.equal(rollout.starts, t == 0)
        # without discount or critic, returns count the index over the steps left
        left = torch.arange(4.0, 7.0) - t
        ends = torch.arange(16)[:, None] + left <= 16
        expected = scale * index * left
        torch.testing.assert_close(rollout.returns[ends], expected[ends])

    model = agent(
        counters(truncate=False),
        gamma=1.0,
        gae_lambda=1.0,
        learning_rate=0.0,
        reward_scale=0.5,
    )
    with torch.no_grad():
        for p in model.policy.value_net.parameters():
            p.zero_()
    model.learn(2 * 16 * 3, Inspect(look))


def test_memory_lasts_from_one_rollout_to_the_next() -> None:
    """An episode of 20 steps over rollouts of 16: both halves are one sequence."""
    rollouts: list[Rollout] = []
    model = agent(counters(length=20), learning_rate=0.0)
    model.learn(2 * 16 * 3, Inspect(lambda m: rollouts.append(m.rollout_buffer)))
    first, second = rollouts
    with torch.no_grad():
        _, _, end = model.policy.evaluate_sequence(
            first.obs, first.states[0], first.starts
        )
    assert not second.starts[0].any() and end.any()
    torch.testing.assert_close(second.states[0], end)


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_truncation_is_valued_with_the_state_before_the_reset(kind: str) -> None:
    """An oracle that plays column 0 by hand: one-step TD targets with gamma = 1."""
    if kind == "numpy":
        env = counters(n=2, length=5)
    else:
        env = tensor_env(n=2, max_episode_steps=5)
    targets: list[Tensor] = []

    def look(model: RecurrentPPO) -> None:
        rollout, policy = model.rollout_buffer, model.policy
        assert isinstance(rollout.obs, Tensor)
        reward = 0.0 if kind == "numpy" else 1.0
        no = torch.zeros(2, dtype=torch.bool)
        with torch.no_grad():
            _, _, state = policy.evaluate_sequence(
                rollout.obs[:5], rollout.states[0], rollout.starts[:5]
            )
            assert bool(rollout.starts[5, 0])
            if kind == "numpy":
                final = torch.tensor([[0.0, 5.0, 0.0], [1.0, 5.0, 0.0]])
            else:
                final = finals[4]
            kept = policy.value(final, state, no)[0]
            cleared = policy.value(final, state, ~no)[0]
        targets.extend((rollout.returns[4, 0], reward + kept, reward + cleared))

    finals: list[Tensor] = []
    model = agent(env, gamma=1.0, gae_lambda=0.0, n_epochs=1)
    if kind == "tensor":
        step = env.step

        def remembering(actions: Tensor) -> Any:
            result = step(actions)
            finals.append(result[4]["final_obs"])
            return result

        env.step = remembering
    model.learn(32, Inspect(look))
    found, kept, cleared = targets
    torch.testing.assert_close(found, kept)
    assert abs(float(found - cleared)) > 1e-4


# --- learning -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_learns_on_every_action_space(name: str) -> None:
    env = counters(space=SPACES[name])
    model = agent(env)
    before = weights(model)
    model.learn(96)
    assert not torch.equal(weights(model), before)
    assert weights(model).isfinite().all()
    action, _ = model.predict(np.zeros(3, np.float32))
    assert SPACES[name].contains(action)


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4), BOX],
)
def test_observation_spaces(space: spaces.Space[Any]) -> None:
    class Random(Counter):
        def __init__(self) -> None:
            super().__init__(spaces.Discrete(2))
            self.observation_space = space

        def _obs(self) -> Any:
            return self.observation_space.sample()

    model = agent(DummyVecEnv([Random, Random])).learn(64)
    action, _ = model.predict(np.asarray(space.sample()))
    assert action.shape == ()


def test_the_whole_of_it_touches_no_global_random_state() -> None:
    """In a process of its own: the type checker of the tests draws from `random`."""
    code = """
import random, gymnasium, numpy as np, torch, rlrnn
from rlrnn.agents import RecurrentPPO

def states():
    torchs = torch.get_rng_state().tolist()
    return str((torchs, np.random.get_state(), random.getstate()))
before = states()
for env in (gymnasium.make_vec("rlrnn/CartPoleHiddenVelocity-v0", 3), "Pendulum-v1"):
    kwargs = dict(n_steps=16, batch_size=32, n_epochs=1, device="cpu")
    for seed in (None, 1):
        model = RecurrentPPO("MlpLstmPolicy", env, seed=seed, **kwargs).learn(32)
        model.predict(np.zeros(model.observation_space.shape, np.float32))
assert states() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_seeds() -> None:
    def trained(seed: int) -> Tensor:
        return weights(agent(tensor_env(), seed=seed).learn(128))

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_predict_does_not_disturb_training() -> None:
    class Predict(BaseCallback):
        def _on_step(self) -> bool:
            self.model.predict(np.zeros((3, 2), np.float32))
            return True

    plain = agent(tensor_env()).learn(128)
    disturbed = agent(tensor_env()).learn(128, Predict())
    assert torch.equal(weights(plain), weights(disturbed))


def test_target_kl_stops_the_epochs() -> None:
    model = agent(tensor_env(), target_kl=1e-9, learning_rate=0.05, n_epochs=10)
    model.learn(64)
    assert model._n_updates < 10


def test_value_clipping_and_one_step_minibatches() -> None:
    model = agent(counters(), clip_range_vf=0.1, batch_size=1, n_steps=3).learn(18)
    assert weights(model).isfinite().all()


def test_logged_names() -> None:
    model = agent(tensor_env(), verbose=0)
    seen: dict[str, Any] = {}
    model.learn(64)
    seen.update(model.logger.name_to_value)
    names = "entropy_loss policy_gradient_loss value_loss approx_kl clip_fraction loss"
    names += " explained_variance grad_norm n_updates clip_range learning_rate"
    expected = {f"train/{name}" for name in names.split()}
    assert expected | {"rollout/state_norm", "time/update_fps"} == set(seen)


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_episode_statistics(kind: str) -> None:
    """Both kinds of environment report the same facts: r = steps, l = steps."""
    env = tensor_env(max_episode_steps=9)
    if kind == "numpy":
        env = make_vec_env(CARTPOLE, 4, env_kwargs={"max_episode_steps": 9})
    model = agent(env).learn(64 * 3)
    assert model.ep_info_buffer is not None and len(model.ep_info_buffer) >= 20
    assert all(e["r"] == e["l"] <= 9 for e in model.ep_info_buffer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_sde": True}, "only be used with continuous actions"),
        ({"n_steps": 0}, "n_steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(counters(), **settings)


def test_a_numpy_vector_environment_is_an_error() -> None:
    with pytest.raises(ValueError, match="a gymnasium VectorEnv in numpy"):
        agent(gymnasium.make_vec("CartPole-v1", 2))


# --- no waiting for the device --------------------------------------------------------


@pytest.mark.parametrize("norm_value", [False, True])
def test_collection_and_update_look_at_the_device_once_each(
    norm_value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what an accelerator would run
    for module in ("recurrent", "agents.acting"):
        monkeypatch.setattr(f"rlrnn.{module}.compiles", lambda x: False)
    monkeypatch.setattr(TensorSource, "_may_truncate", lambda self, truncated: True)
    monkeypatch.setattr(
        tensor_tasks, "_numbers", lambda a, b: tensor_tasks._uniform(a + b)
    )
    env = tensor_env(max_episode_steps=7)
    env._may_read = False
    model = agent(env, policy_kwargs={**SMALL, "norm_value": norm_value})
    model.learn(64)  # everything lazy has happened
    model._n_updates = 0  # so that what the first rollout does is among it
    _, callback = model._setup_learn(64)
    syncs = Syncs()
    methods = "item cpu numpy tolist __bool__ __float__ __int__ __index__".split()
    originals = {method: getattr(Tensor, method) for method in methods}
    for method in methods:

        def counted(
            self: Tensor,
            *args: Any,
            original: Any = originals[method],
            name: str = method,
            **kwargs: Any,
        ) -> Any:
            syncs.found.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, method, counted)
    assert model.env is not None
    with syncs:
        model.collect_rollouts(model.env, callback, None, model.n_steps)
    assert syncs.found == ["cpu", "numpy"]  # one transfer
    syncs.found.clear()
    with syncs:
        model.train()
    assert syncs.found == ["cpu", "numpy"]


# --- storing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_a_loaded_agent_predicts_the_same(name: str, tmp_path: Path) -> None:
    kwargs = {**SMALL, "activation_fn": nn.ReLU, "cell": "gru"}
    model = agent(counters(space=SPACES[name]), policy_kwargs=kwargs).learn(48)
    model.save(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model.zip"]
    loaded = RecurrentPPO.load(tmp_path / "model", device="cpu")
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.action_space == model.action_space
    assert loaded.observation_space == model.observation_space
    assert loaded.policy_kwargs == kwargs
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    for deterministic in (True, False):
        ours, state = model.predict(obs, deterministic=deterministic)
        theirs, again = loaded.predict(obs, deterministic=deterministic)
        np.testing.assert_array_equal(ours, theirs)
        assert state is not None and again is not None
        np.testing.assert_array_equal(state[0], again[0])


def test_files_and_settings_round_trip() -> None:
    model = agent(
        counters(), learning_rate=LinearSchedule(1e-3, 0.0, 1.0), clip_range_vf=0.3
    )
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = RecurrentPPO.load(file, env=counters(), device="cpu", n_epochs=7)
    assert loaded.lr_schedule(0.5) == 5e-4
    assert loaded.clip_range_vf == 0.3 and loaded.n_epochs == 7
    loaded.learn(48)


def test_torchs_own_classes_are_stored(tmp_path: Path) -> None:
    kwargs = {"activation_fn": nn.Mish, "optimizer_class": torch.optim.NAdam}
    agent(counters(), policy_kwargs={**SMALL, **kwargs}).save(tmp_path / "a")
    loaded = RecurrentPPO.load(tmp_path / "a", device="cpu")
    assert loaded.policy_kwargs == {**SMALL, **kwargs}


def test_code_is_not_stored_but_asked_for(tmp_path: Path) -> None:
    agent(counters(), learning_rate=lambda p: p * 1e-3).save(tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"cannot hold learning_rate.*pass load\("):
        RecurrentPPO.load(tmp_path / "a.zip")
    loaded = RecurrentPPO.load(tmp_path / "a.zip", learning_rate=1e-3)
    assert loaded.learning_rate == 1e-3


def test_loading_errors(tmp_path: Path) -> None:
    agent(counters()).save(tmp_path / "a")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        RecurrentPPO.load(tmp_path / "a", env=tensor_env())
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        RecurrentPPO.load(tmp_path / "b")
    rlrnn.checkpoint.save(tmp_path / "c.zip", {"x": 1})
    with pytest.raises(ValueError, match="something else than an agent"):
        RecurrentPPO.load(tmp_path / "c")


@pytest.mark.parametrize("env_id", [CARTPOLE, RECALL])
def test_resuming_equals_never_stopping(env_id: str, tmp_path: Path) -> None:
    """Bit for bit, with an annealed rate, from a save made inside a callback."""

    class SaveOnce(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.model.num_timesteps == 128:
                self.model.save(tmp_path / "half")

    schedule = LinearSchedule(1e-2, 0.0, 1.0)
    whole = agent(tensor_env(env_id), learning_rate=schedule)
    whole.learn(256, SaveOnce())
    half = RecurrentPPO.load(tmp_path / "half", env=tensor_env(env_id))
    assert half.num_timesteps == 128
    half.learn(128, reset_num_timesteps=False)
    assert torch.equal(weights(half), weights(whole))
    assert half.num_timesteps == whole.num_timesteps
    ours, theirs = half.state_dict(), whole.state_dict()
    assert torch.equal(ours["last_state"], theirs["last_state"])
    for name in ("acting", "shuffling"):
        assert torch.equal(ours["generators"][name], theirs["generators"][name])
    for a, b in zip(ours["episodes"], theirs["episodes"], strict=True):
        assert (a["r"], a["l"]) == (b["r"], b["l"])
    half.learn(64, reset_num_timesteps=False)


def test_numpy_environments_start_new_episodes_on_resuming(tmp_path: Path) -> None:
    env = make_vec_env(CARTPOLE, 2)
    first = agent(env).learn(64)
    first.save(tmp_path / "a")
    again = RecurrentPPO.load(tmp_path / "a", env=make_vec_env(CARTPOLE, 3))
    again.learn(96, reset_num_timesteps=False)
    assert again.num_timesteps == 64 + 96
    assert again._last_state.shape[1] == 3


# --- Stable-Baselines3 outside --------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_callbacks(kind: str, tmp_path: Path) -> None:
    def env() -> Any:
        if kind == "tensor":
            return TensorVecEnv(tensor_env())
        return make_vec_env(CARTPOLE, 4)

    best, saved = tmp_path / "best", tmp_path / "saved"
    callbacks: list[BaseCallback] = [
        EvalCallback(
            env(),
            eval_freq=16,
            n_eval_episodes=4,
            best_model_save_path=str(best),
            verbose=0,
        ),
        CheckpointCallback(16, str(saved)),
    ]
    model = agent(env()).learn(128, callbacks)
    assert model.num_timesteps == 128
    RecurrentPPO.load(best / "best_model", device="cpu")
    RecurrentPPO.load(saved / "rl_model_64_steps", device="cpu")


def test_stop_training_on_max_episodes() -> None:
    model = agent(counters()).learn(10_000, StopTrainingOnMaxEpisodes(4))
    assert model.num_timesteps < 200


@pytest.mark.filterwarnings("error")
def test_evaluate_policy() -> None:
    model = agent(tensor_env())
    tensor = evaluate_policy(model, TensorVecEnv(tensor_env()), 8)
    numpy = evaluate_policy(model, make_vec_env(CARTPOLE, 1), 8)
    assert tensor[0] > 5 and numpy[0] > 5  # type: ignore[operator]


def test_the_tensor_face_equals_the_tensor_environment() -> None:
    """The same seed and actions: the numpy face shows what the tensors say."""
    face, env = (
        TensorVecEnv(tensor_env(max_episode_steps=9)),
        tensor_env(max_episode_steps=9),
    )
    face.seed(3)
    obs: Any = face.reset()
    expected, _ = env.reset(seed=3)
    np.testing.assert_array_equal(obs, expected.numpy())
    rng = np.random.default_rng(0)
    for _ in range(30):
        actions = rng.integers(2, size=4)
        obs, rewards, dones, infos = face.step(actions)
        expected, r, terminated, truncated, described = env.step(torch.tensor(actions))
        np.testing.assert_array_equal(obs, expected.numpy())
        np.testing.assert_array_equal(rewards, r.numpy())
        np.testing.assert_array_equal(dones, (terminated | truncated).numpy())
        for i, info in enumerate(infos):
            assert info["TimeLimit.truncated"] == bool(truncated[i])
            assert ("episode" in info) == bool(dones[i])
            if dones[i]:
                final = described["final_obs"][i].numpy()
                np.testing.assert_array_equal(info["terminal_observation"], final)
                assert info["episode"]["l"] == int(described["episode_length"][i])


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_vec_normalize(kind: str, tmp_path: Path) -> None:
    def env() -> VecNormalize:
        inner = TensorVecEnv(tensor_env()) if kind == "tensor" else counters()
        return VecNormalize(inner)

    model = agent(env()).learn(192)
    model.save(tmp_path / "a")
    loaded = RecurrentPPO.load(tmp_path / "a", env=env())
    ours, theirs = model.get_vec_normalize_env(), loaded.get_vec_normalize_env()
    assert ours is not None and theirs is not None
    obs = np.ones((1, 3 if kind == "numpy" else 2), np.float32)
    seen, again = ours.normalize_obs(obs), theirs.normalize_obs(obs)
    np.testing.assert_array_equal(seen, again)
    np.testing.assert_array_equal(ours.ret_rms.var, theirs.ret_rms.var)
    loaded.learn(48, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="learned on normalised observations"):
        RecurrentPPO.load(tmp_path / "a", env=env().venv)


def test_environment_ids_and_single_environments() -> None:
    for env in (CARTPOLE, gymnasium.make(RECALL)):
        model = agent(env).learn(32)
        assert model.num_timesteps >= 32
        assert model.n_envs == 1  # an id is one numpy environment


@pytest.mark.slow
def test_learns_to_infer_velocities() -> None:
    """Cart-pole without velocities to a mean return of 450 of 500 (40 s, unchecked)."""
    model = RecurrentPPO(
        "MlpLstmPolicy",
        tensor_env(n=32),
        learning_rate=LinearSchedule(3e-3, 0.0, 1.0),
        n_steps=128,
        batch_size=1024,  # 8 whole columns
        n_epochs=8,
        gae_lambda=0.98,
        reward_scale=0.05,  # values up to 5, not 100
        policy_kwargs={"lstm_hidden_size": 64, "net_arch": [64]},
        seed=1,
        device="cpu",
    )
    model.learn(300_000)
    env = TensorVecEnv(tensor_env(n=20))
    env.seed(1001)
    mean, _ = evaluate_policy(model, env, 20)
    assert isinstance(mean, float) and mean >= 450
