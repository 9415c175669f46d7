"""Observations of every kind, exploration, and the policy of sb3-contrib as oracle."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from sb3_contrib import RecurrentPPO as ContribPPO
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import (
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

import rlrnn  # noqa: F401  (registers the environments)
from rlrnn.agents import RecurrentPolicy, RecurrentPPO
from rlrnn.agents.cores import Dropping, Memoryless
from rlrnn.agents.distributions import StateDependent, deviations
from rlrnn.agents.observations import on_each
from rlrnn.agents.policies import CnnLstmPolicy, MultiInputLstmPolicy
from rlrnn.agents.rollout import minibatches
from rlrnn.agents.vector import TensorVecEnv
from rlrnn.config import AgentConfig, RunConfig, TrainConfig
from rlrnn.flows import train
from rlrnn.recurrent import Recurrent
from rlrnn.running import policy_for
from shared import Inspect

VECTOR = spaces.Box(-2.0, 2.0, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
LAST = spaces.Box(0, 255, (36, 36, 3), np.uint8)  # channels last, as cameras have it
SECRET = spaces.Box(-1.0, 1.0, (2,), np.float32)
PARTS = spaces.Dict(
    {"image": IMAGE, "number": spaces.Discrete(4), "secret": SECRET, "vector": VECTOR}
)
BOUNDED = spaces.Box(np.array([-3.0, 0.0]), np.array([5.0, 1.0]), dtype=np.float32)

Spec = tuple[str, spaces.Space[Any], dict[str, Any]]
SMALL: dict[str, Any] = {"lstm_hidden_size": 8, "net_arch": [8]}
KINDS: dict[str, Spec] = {
    "box": ("MlpLstmPolicy", VECTOR, {}),
    "discrete": ("MlpLstmPolicy", spaces.Discrete(4), {}),
    "multidiscrete": ("MlpLstmPolicy", spaces.MultiDiscrete([3, 2]), {}),
    "flat image": ("MlpLstmPolicy", IMAGE, {}),
    "image": (
        "CnnLstmPolicy",
        IMAGE,
        {"features_extractor_kwargs": {"features_dim": 12}},
    ),
    "dict": (
        "MultiInputLstmPolicy",
        PARTS,
        {"features_extractor_kwargs": {"cnn_output_dim": 12}},
    ),
}
OURS = RecurrentPPO.policy_aliases
PEERS: dict[str, type[Any]] = {
    "MlpLstmPolicy": RecurrentActorCriticPolicy,
    "CnnLstmPolicy": RecurrentActorCriticCnnPolicy,
    "MultiInputLstmPolicy": RecurrentMultiInputActorCriticPolicy,
}
CRITICS: dict[str, dict[str, Any]] = {
    "own": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "none": {"enable_critic_lstm": False},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy_of(
    kind: str, action_space: spaces.Space[Any] | None = None, **kwargs: Any
) -> RecurrentPolicy:
    name, space, extra = KINDS[kind]
    made = OURS[name](
        space,
        action_space or spaces.Discrete(3),
        lambda _: 1e-3,
        **{**SMALL, **extra, **kwargs},
    )
    assert isinstance(made, RecurrentPolicy)
    return made


def observations(space: spaces.Space[Any], *lead: int, seed: int = 0) -> Any:
    """Random ones as arrays [*lead, ...]; a dict of them for a `Dict`."""
    if isinstance(space, spaces.Dict):
        parts = space.spaces.items()
        return {k: observations(v, *lead, seed=seed + 1) for k, v in parts}
    space.seed(seed)
    count = int(np.prod(lead))
    samples = np.stack([np.asarray(space.sample()) for _ in range(count)])
    return samples.reshape(*lead, *samples.shape[1:])


def tensors(obs: Any) -> Any:
    return on_each(torch.from_numpy, obs)


class Show(gymnasium.Env[Any, Any]):
    """Random observations of a space; truncates after `length` steps."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any] | None = None,
        index: int = 0,
        length: int = 5,
        scale: float = 1.0,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Discrete(3)
        self.index, self.length, self.scale = index, length, scale

    def _obs(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return on_each(lambda x: x, self.observation_space.sample())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        over = self.t >= self.length
        return self._obs(), float(self.np_random.normal()), False, over, {}


def shows(
    space: spaces.Space[Any], action_space: spaces.Space[Any] | None = None, n: int = 3
) -> DummyVecEnv:
    def make(index: int) -> Callable[[], Any]:
        return lambda: Show(space, action_space, index, length=4 + index)

    return DummyVecEnv([make(i) for i in range(n)])


def agent(
    kind: str, action_space: spaces.Space[Any] | None = None, **kwargs: Any
) -> RecurrentPPO:
    name, space, extra = KINDS[kind]
    env = kwargs.pop("env", None) or shows(space, action_space)
    settings: dict[str, Any] = {
        "n_steps": 12,
        "batch_size": 12,
        "n_epochs": 2,
        "learning_rate": 0.01,
        "seed": 0,
        "device": "cpu",
    }
    settings |= kwargs
    settings["policy_kwargs"] = {**SMALL, **extra, **kwargs.get("policy_kwargs", {})}
    return RecurrentPPO(name, env, **settings)


def weights(model: RecurrentPPO) -> Tensor:
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


# --- state-dependent exploration ------------------------------------------------------


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("expln", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_state_dependent_noise_is_that_of_stable_baselines3(
    full: bool, expln: bool, squash: bool
) -> None:
    L, D, B = 5, 2, 7
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    log_std, mean, features = random(L, D if full else 1), random(B, D), random(B, L)
    theirs = StateDependentNoiseDistribution(D, full, expln, squash)
    theirs.latent_sde_dim = L
    std = deviations(log_std, D, expln)
    # theirs adds 1e-6 to log_std
    torch.testing.assert_close(std, theirs.get_std(log_std), atol=2e-6, rtol=0)
    theirs.exploration_matrices = std * random(B, L, D)
    theirs.exploration_mat = theirs.exploration_matrices[0]
    theirs.proba_distribution(mean, log_std, features)

    ours = StateDependent((D,), L, squash)
    params = ours.params(mean, features, std)
    assert params.shape == (B, ours.size)
    actions = ours.explore(params, theirs.exploration_matrices)
    torch.testing.assert_close(actions, theirs.get_actions())
    torch.testing.assert_close(ours.mode(params), theirs.get_actions(True))
    # where the tanh is flat, theirs cuts the logarithm of its slope off
    tame = actions * 0.9 if squash else actions
    torch.testing.assert_close(
        ours.log_prob(params, tame), theirs.log_prob(tame), atol=5e-5, rtol=1e-5
    )
    if not squash:
        torch.testing.assert_close(
            ours.entropy(params), theirs.entropy(), atol=1e-5, rtol=0
        )


def test_the_entropy_of_squashed_actions_is_a_mean_over_samples() -> None:
    """Within five standard errors of -log_prob; theirs has that of one sample."""
    ours = StateDependent((2,), 3, squash=True)
    g = torch.Generator().manual_seed(0)
    mean, features = torch.randn(4, 2, generator=g), torch.randn(4, 3, generator=g)
    params = ours.params(mean, features, torch.full((3, 2), 0.7)).double()
    many = params.expand(20_000, -1, -1)
    surprise = -ours.log_prob(many, ours.sample(many, g))
    error = surprise.std(0) / len(many) ** 0.5
    assert ((surprise.mean(0) - ours.entropy(params)).abs() < 5 * error).all()


def test_over_many_matrices_the_noise_has_its_law() -> None:
    ours, n = StateDependent((2,), 3), 20_000
    g = torch.Generator().manual_seed(0)
    std = torch.rand(3, 2, generator=g) + 0.1
    mean, features = torch.randn(2, generator=g), torch.randn(3, generator=g)
    params = ours.params(mean, features, std).expand(n, -1)
    noise = std * torch.randn(n, 3, 2, generator=g)
    actions = ours.explore(params, noise)
    expected = (features.square() @ std.square()).sqrt()
    torch.testing.assert_close(actions.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(actions.std(0), expected, atol=0.03, rtol=0)
    sampled = ours.sample(params, g)
    torch.testing.assert_close(sampled.std(0), expected, atol=0.03, rtol=0)


def test_noise_stays_and_is_drawn_anew() -> None:
    policy = policy_of("box", BOUNDED, use_sde=True)
    params = policy.params(torch.randn(4, 8))
    draw = policy.sampler(torch.Generator().manual_seed(0), 3)
    drawn = [draw(params) for _ in range(7)]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[3], drawn[5])
    assert not torch.isclose(drawn[2], drawn[3]).any()
    assert not torch.isclose(drawn[5], drawn[6]).any()
    obs = observations(VECTOR, 2)
    first, _ = policy.predict(obs)
    again, _ = policy.predict(obs)
    np.testing.assert_array_equal(first, again)
    policy.reset_noise(2)
    assert not np.array_equal(policy.predict(obs)[0], again)


def test_exploration_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    kwargs = {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.3}}
    model = agent("box", BOUNDED, use_sde=True, policy_kwargs=kwargs)
    model.learn(72)
    model.predict(observations(VECTOR, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_squashed_actions_fill_their_space() -> None:
    """Played and predicted ones; `Show` refuses those outside."""
    kwargs = {"squash_output": True, "log_std_init": 1.0}
    model = agent("box", BOUNDED, use_sde=True, sde_sample_freq=1, policy_kwargs=kwargs)
    model.learn(72)
    played = model.rollout_buffer.actions
    assert played.abs().max() <= 1.0 and played.abs().max() > 0.9
    actions = np.concatenate(
        [model.predict(observations(VECTOR, 9, seed=i))[0] for i in range(20)]
    )
    assert all(BOUNDED.contains(action) for action in actions)
    assert actions[:, 0].max() > 2.0 and actions[:, 0].min() < -1.0


# --- sb3-contrib as oracle ------------------------------------------------------------

NAMES = {
    "pi_features_extractor.": "features_extractor.",
    "vf_features_extractor.": "critic_extractor.",
    "lstm_actor.": "actor.stack.",
    "lstm_critic.": "critic.stack.",
    "mlp_extractor.policy_net.": "actor_mlp.",
    "mlp_extractor.value_net.": "critic_mlp.",
}


def twins(
    kind: str, action_space: spaces.Space[Any], **kwargs: Any
) -> tuple[Any, RecurrentPolicy]:
    """Their policy and ours, with the same weights."""
    name, space, extra = KINDS[kind]
    settings = {**SMALL, **extra, **kwargs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = PEERS[name](space, action_space, lambda _: 1e-3, **settings)
        for parameter in theirs.parameters():  # none may be zero
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        theirs.reset_noise(3) if kwargs.get("use_sde") else None
    ours = policy_of(kind, action_space, **kwargs)
    known = ours.state_dict().keys()
    copied: dict[str, Tensor] = {}
    for key, value in theirs.state_dict().items():
        for their, our in NAMES.items():
            key = key.replace(their, our)
        if key.startswith("critic_extractor.") and key not in known:
            continue  # shared, under its other name
        copied[key] = value
    ours.load_state_dict(copied)
    return theirs, ours


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"n_lstm_layers": 2, "net_arch": {"pi": [], "vf": [6, 5]}},
    "extractors": {"share_features_extractor": False, "activation_fn": nn.ReLU},
    "unnormalised": {"normalize_images": False, "net_arch": None},
}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"multidiscrete"}))
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_policy_of_sb3_contrib(kind: str, critic: str, setting: str) -> None:
    """The same weights: the same values, log probabilities, entropies and actions.

    Theirs fails on MultiDiscrete observations.
    """
    if critic == "shared" and setting == "extractors":
        return
    kwargs = {**SETTINGS[setting], **CRITICS[critic]}
    _compare(*twins(kind, spaces.Discrete(3), **kwargs))


@pytest.mark.parametrize(
    ("space", "kwargs"),
    [
        (BOUNDED, {"log_std_init": -0.5}),
        (BOUNDED, {"use_sde": True}),
        (BOUNDED, {"use_sde": True, "squash_output": True, "full_std": False}),
        (BOUNDED, {"use_sde": True, "use_expln": True, "net_arch": []}),
        (spaces.MultiDiscrete([2, 3]), {}),
        (spaces.MultiBinary(3), {}),
    ],
)
def test_equals_it_for_other_actions(
    space: spaces.Space[Any], kwargs: dict[str, Any]
) -> None:
    _compare(*twins("box", space, **kwargs))
    _compare(*twins("dict", space, **kwargs, share_features_extractor=False))


def _compare(theirs: Any, ours: RecurrentPolicy) -> None:
    T, B = 6, 3
    g = torch.Generator().manual_seed(1)
    obs = tensors(observations(ours.observation_space, T, B))
    starts = torch.rand(T, B, generator=g) < 0.3
    state = torch.randn(ours.initial_state(B).shape, generator=g)
    mine, its = ours.split(state)
    pair = tuple(mine.chunk(2))
    states = RNNStates(pair, tuple(its.chunk(2)) if len(its) else pair)

    def flat(x: Tensor) -> Tensor:  # theirs: one column after the other
        return x.transpose(0, 1).flatten(0, 1)

    params, values, _ = ours.evaluate_sequence(obs, state, starts)
    actions = ours.distribution.sample(params, g)
    log_probs = ours.distribution.log_prob(params, actions)
    value, log_prob, entropy = theirs.evaluate_actions(
        on_each(flat, obs), flat(actions).float(), states, flat(starts).float()
    )
    torch.testing.assert_close(flat(values), value.flatten(), atol=1e-5, rtol=1e-4)
    tolerance = 2e-3 if ours.squash_output else 1e-5
    torch.testing.assert_close(
        flat(log_probs), log_prob, atol=tolerance, rtol=tolerance
    )
    if entropy is not None:
        torch.testing.assert_close(
            flat(ours.distribution.entropy(params)), entropy, atol=1e-5, rtol=1e-5
        )
    next_value = theirs.predict_values(
        on_each(lambda x: x[0], obs), states.vf, starts[0].float()
    )
    torch.testing.assert_close(
        ours.value(on_each(lambda x: x[0], obs), state, starts[0]),
        next_value.flatten(),
        atol=1e-5,
        rtol=1e-4,
    )
    played, plays = None, None
    for t in range(T):
        now = on_each(lambda x, t=t: x[t].numpy(), obs)
        begins = starts[t].numpy()
        action, played = ours.predict(now, played, begins, deterministic=True)
        expected, plays = theirs.predict(now, plays, begins, deterministic=True)
        np.testing.assert_allclose(action, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "actions", "kwargs"),
    [
        ("image", spaces.Discrete(3), {"share_features_extractor": False}),
        ("dict", BOUNDED, {"use_sde": True, "sde_sample_freq": 4}),
        ("box", BOUNDED, {"use_sde": True, "squash_output": True}),
    ],
)
def test_its_files_are_imported(
    kind: str, actions: spaces.Space[Any], kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """Their saved agent plays on here, with the noise it had learned."""
    name, space, extra = KINDS[kind]
    agents = ("use_sde", "sde_sample_freq")
    settings = {k: v for k, v in kwargs.items() if k in agents}
    rest = {k: v for k, v in kwargs.items() if k not in agents}
    theirs = ContribPPO(
        name,
        shows(space, actions),
        n_steps=12,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={**SMALL, **extra, **rest},
        **settings,
    ).learn(36)
    theirs.save(tmp_path / "a")
    env = shows(space, actions)
    ours = RecurrentPPO.load(tmp_path / "a", env=env, device="cpu", trust=True)
    assert {name: getattr(ours, name) for name in settings} == settings
    _compare(theirs.policy, ours.policy)
    ours.learn(36)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("kwargs", [None, {"weight_decay": 0.1}])
def test_the_optimiser_has_its_settings(cls: type[Any], kwargs: Any) -> None:
    settings = {"optimizer_class": cls, "optimizer_kwargs": kwargs}
    theirs, ours = twins("box", spaces.Discrete(3), **settings)
    for ours_, theirs_ in zip(
        ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True
    ):
        for name in ("lr", "eps", "weight_decay"):
            assert ours_[name] == theirs_[name]


# --- acting and learning --------------------------------------------------------------

CASES: list[tuple[str, spaces.Space[Any] | None, dict[str, Any], dict[str, Any]]] = [
    *((kind, None, CRITICS["own"], {}) for kind in KINDS),
    ("image", None, CRITICS["shared"], {}),
    ("image", None, {"share_features_extractor": False}, {}),
    ("dict", None, {"share_features_extractor": False, **CRITICS["none"]}, {}),
    ("dict", None, {"critic_keys": ["secret"], "cell": "gru"}, {}),
    (
        "dict",
        None,
        {"critic_keys": ["image"], "share_features_extractor": False},
        {},
    ),
    ("box", BOUNDED, {"share_features_extractor": False}, {"use_sde": True}),
    ("dict", BOUNDED, {}, {"use_sde": True, "sde_sample_freq": 4}),
    ("box", BOUNDED, {"squash_output": True}, {"use_sde": True, "ent_coef": 0.01}),
    ("box", None, {"cell": "none"}, {}),
    ("box", None, {"cell": "mingru"}, {}),
    ("dict", BOUNDED, {"cell": "mingru", **CRITICS["shared"]}, {}),
    ("dict", BOUNDED, {"cell": "none", **CRITICS["shared"]}, {}),
    ("discrete", None, {"cell": "none", **CRITICS["none"]}, {}),
    ("box", None, {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.3}}, {}),
]


@pytest.mark.parametrize(("kind", "actions", "kwargs", "settings"), CASES)
def test_first_ratio_is_one(
    kind: str,
    actions: spaces.Space[Any] | None,
    kwargs: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """In every rollout, values too; updates change the weights, all stay finite.

    Then a file of the agent predicts and learns on as it does.
    """
    errors: list[float] = []

    def look(model: RecurrentPPO) -> None:
        generator = torch.Generator().manual_seed(0)
        segments = model.rollout_buffer.segments()
        policy = model.policy
        with torch.no_grad():
            for batch in minibatches(segments, 8, generator):
                params, values, _ = policy.evaluate_sequence(
                    batch.obs, batch.state, batch.starts
                )
                log_probs = policy.distribution.log_prob(params, batch.actions)
                for ours, played in (
                    (log_probs.exp(), batch.log_probs.exp()),
                    (values, batch.values),
                ):
                    difference = (ours - played).abs() / (1 + played.abs())
                    errors.append(float(difference.max()))

    model = agent(kind, actions, policy_kwargs=kwargs, **settings)
    before = weights(model)
    model.learn(3 * 36, Inspect(look))
    assert max(errors) < 2e-5
    assert not torch.equal(weights(model), before)
    assert weights(model).isfinite().all()

    model.save(tmp_path / "a")
    env = shows(KINDS[kind][1], actions)
    loaded = RecurrentPPO.load(tmp_path / "a", env=env, device="cpu")
    assert type(loaded.policy) is type(model.policy)
    assert loaded.policy_kwargs == model.policy_kwargs
    obs, state = observations(model.observation_space, 4), None
    theirs = None
    for begins in (None, np.array([True, False, False, True])):
        ours, state = model.predict(obs, state, begins, deterministic=begins is None)
        again, theirs = loaded.predict(obs, theirs, begins, begins is None)
        np.testing.assert_array_equal(ours, again)
    loaded.learn(36, reset_num_timesteps=False)
    mean, _ = evaluate_policy(loaded, env, 2, warn=False)
    assert np.isfinite(mean)


@pytest.mark.parametrize(("kind", "actions", "kwargs", "settings"), CASES)
def test_acting_equals_learning(
    kind: str,
    actions: spaces.Space[Any] | None,
    kwargs: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Step by step and as a sequence: same parameters, values and state."""
    kwargs = {**kwargs, "use_sde": settings.get("use_sde", False)}
    policy = policy_of(kind, actions, **kwargs)
    policy.set_training_mode(False)
    T, B = 5, 3
    g = torch.Generator().manual_seed(0)
    obs = tensors(observations(policy.observation_space, T, B))
    starts = torch.rand(T, B, generator=g) < 0.3
    first = torch.randn(policy.initial_state(B).shape, generator=g)
    mine, its = policy.split(first)
    act, steps = policy.stepper(), []
    with torch.no_grad():
        for t in range(T):
            now = slice(t, t + 1)
            features = policy.features(on_each(lambda x, now=now: x[now], obs))
            params, latent, mine = act(features[0], mine, starts[t])
            values, states = policy.appraise(features, latent[None], its, starts[now])
            its = states[-1]
            steps.append((params, values[0]))
        params, values = map(torch.stack, zip(*steps, strict=True))
        expected = policy.evaluate_sequence(obs, first, starts)
    for ours, theirs in zip(
        (params, values, torch.cat((mine, its))), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["image", "dict"])
def test_truncated_episodes_are_valued_where_they_were_cut(kind: str) -> None:
    """lambda = 0: a target is r + gamma v(terminal observation, state before)."""
    ends: list[tuple[int, int, Any]] = []
    rewards: list[NDArray[Any]] = []

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            for b, info in enumerate(self.locals["infos"]):
                if self.locals["dones"][b]:
                    t = self.locals["n_steps"]
                    ends.append((t, b, info["terminal_observation"]))
            rewards.append(np.array(self.locals["rewards"]))
            return True

    model = agent(kind, gae_lambda=0.0, n_epochs=1, learning_rate=0.0)
    model.learn(36, Note())
    rollout, policy = model.rollout_buffer, model.policy
    assert len(ends) >= 6
    for t, b, final in ends:
        column = on_each(lambda x, t=t, b=b: x[: t + 1, b : b + 1], rollout.obs)
        with torch.no_grad():
            _, _, state = policy.evaluate_sequence(
                column, rollout.states[0][:, b : b + 1], rollout.starts[: t + 1, [b]]
            )
            last = on_each(lambda x: torch.as_tensor(np.asarray(x))[None], final)
            value = policy.value(last, state, torch.tensor([False]))
        expected = rewards[t][b] + model.gamma * value
        torch.testing.assert_close(
            rollout.returns[t, [b]], expected.float(), atol=1e-5, rtol=1e-5
        )


def test_images_stay_bytes_and_channels_come_first() -> None:
    model = agent("image", env=shows(LAST))
    assert model.observation_space.shape == (3, 36, 36)
    model.learn(36)
    assert isinstance(model.rollout_buffer.obs, Tensor)
    assert model.rollout_buffer.obs.dtype == torch.uint8
    assert model.rollout_buffer.segments().obs.dtype == torch.uint8  # type: ignore[union-attr]
    camera = observations(LAST, 2)
    first, _ = model.predict(camera, deterministic=True)
    again, _ = model.predict(camera.transpose(0, 3, 1, 2), deterministic=True)
    np.testing.assert_array_equal(first, again)
    assert model.predict(camera[0])[0].shape == ()


def test_an_index_in_a_dict_never_leaks_into_another_column() -> None:
    space = spaces.Dict({"index": spaces.Discrete(3), "t": spaces.Box(0, 99, (1,))})

    class Indexed(Show):
        def _obs(self) -> Any:
            return {"index": self.index, "t": np.array([self.t], np.float32)}

    def make(index: int) -> Callable[[], Any]:
        return lambda: Indexed(space, index=index, length=4 + index)

    model = RecurrentPPO(
        "MultiInputLstmPolicy",
        DummyVecEnv([make(i) for i in range(3)]),
        n_steps=12,
        batch_size=4,
        n_epochs=1,
        policy_kwargs=SMALL,
        seed=0,
        device="cpu",
    ).learn(36)
    rollout = model.rollout_buffer
    assert isinstance(rollout.obs, dict)
    assert torch.equal(rollout.obs["index"], torch.arange(3).expand(12, 3))
    assert torch.equal(rollout.starts, rollout.obs["t"][..., 0] == 0)
    for batch in minibatches(rollout.segments(), 4, torch.Generator().manual_seed(0)):
        assert isinstance(batch.obs, dict)
        assert torch.equal(batch.obs["index"], batch.obs["index"][:1].expand(4, -1))


def test_vec_normalize_over_a_dict(tmp_path: Path) -> None:
    space = spaces.Dict({"a": VECTOR, "b": spaces.Discrete(4), "c": SECRET})

    def env() -> VecNormalize:
        return VecNormalize(shows(space), norm_obs_keys=["a", "c"])

    model = RecurrentPPO(
        "MultiInputLstmPolicy",
        env(),
        n_steps=12,
        n_epochs=1,
        policy_kwargs={**SMALL, "critic_keys": ["c"]},
        seed=0,
        device="cpu",
    ).learn(72)
    model.save(tmp_path / "a")
    loaded = RecurrentPPO.load(tmp_path / "a", env=env())
    ours, theirs = model.get_vec_normalize_env(), loaded.get_vec_normalize_env()
    assert ours is not None and theirs is not None
    obs = observations(space, 2)
    seen, again = ours.normalize_obs(obs), theirs.normalize_obs(obs)
    assert isinstance(seen, dict) and isinstance(again, dict)
    for key in "abc":
        np.testing.assert_array_equal(seen[key], again[key])
    assert not np.allclose(seen["a"], obs["a"])
    loaded.learn(36, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="learned on normalised observations"):
        RecurrentPPO.load(tmp_path / "a", env=shows(space))


class Parts(VectorEnv[Any, Any, Any]):
    """A tensor environment that shows its observation and the velocity apart."""

    def __init__(self, n: int) -> None:
        self.inner: Any = gymnasium.make_vec(
            "rlrnn/CartPoleHiddenVelocity-v0", num_envs=n, max_episode_steps=9
        )
        self.metadata = self.inner.metadata
        self.num_envs, self.device = n, self.inner.device  # type: ignore[attr-defined]
        position = self.inner.single_observation_space
        clock = spaces.Box(0, np.inf, (1,), np.float32)
        self.single_observation_space = spaces.Dict({"x": position, "clock": clock})
        self.single_action_space = self.inner.single_action_space

    def _parts(self, obs: Tensor, length: Tensor) -> dict[str, Tensor]:
        return {"x": obs, "clock": length[:, None].float()}

    def reset(self, **kwargs: Any) -> Any:
        obs, infos = self.inner.reset(**kwargs)
        return self._parts(obs, torch.zeros(self.num_envs)), infos

    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = self.inner.step(actions)
        length = infos["episode_length"]
        infos = {**infos, "final_obs": self._parts(infos["final_obs"], length)}
        length = length.masked_fill(terminated | truncated, 0)
        return self._parts(obs, length), rewards, terminated, truncated, infos


def test_dicts_of_a_tensor_environment() -> None:
    def make(env: Any) -> RecurrentPPO:
        return RecurrentPPO(
            "MultiInputLstmPolicy",
            env,
            n_steps=16,
            batch_size=32,
            n_epochs=2,
            policy_kwargs={**SMALL, "critic_keys": ["clock"]},
            seed=0,
        )

    model = make(Parts(4)).learn(128)
    assert isinstance(model.rollout_buffer.obs, dict)
    starts = model.rollout_buffer.obs["clock"][..., 0] == 0
    assert torch.equal(model.rollout_buffer.starts, starts)
    # through numpy it is the same environment
    face = TensorVecEnv(Parts(4))
    face.seed(3)
    obs, env = face.reset(), Parts(4)
    expected, _ = env.reset(seed=3)
    for t in range(12):
        for key in ("x", "clock"):
            np.testing.assert_array_equal(obs[key], expected[key].numpy())
        actions = np.full(4, t % 2)
        obs, _, dones, infos = face.step(actions)
        expected, *_, described = env.step(torch.tensor(actions))
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            assert last["clock"] == described["final_obs"]["clock"][i].numpy()
    evaluate_policy(model, face, 4, warn=False)


# --- what only the critic may see -----------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("critic", ["own", "none"])
def test_critic_keys_change_values_and_never_actions(critic: str, share: bool) -> None:
    policy = policy_of(
        "dict",
        critic_keys=["secret", "image"],
        share_features_extractor=share,
        **CRITICS[critic],
    )
    obs = tensors(observations(PARTS, 4, 2))
    other = {**obs, **{k: v.flip(0) for k, v in obs.items() if k in ("secret",)}}
    state, starts = policy.initial_state(2), torch.zeros(4, 2, dtype=torch.bool)
    one, another = (
        policy.evaluate_sequence(x, state, starts)[:2] for x in (obs, other)
    )
    assert torch.equal(one[0], another[0])
    assert not torch.isclose(one[1], another[1]).any()
    # nor do the actor's weights: what the secret's extractor learns, values alone say
    one[0].square().sum().backward()  # type: ignore[no-untyped-call]
    assert policy.critic_extractor is not None
    assert all(
        p.grad is None or not p.grad.any() for p in policy.critic_mlp.parameters()
    )
    assert all(
        p.grad is None or not p.grad.any() for p in policy.critic_extractor.parameters()
    )
    whole = {key: value[0].numpy() for key, value in obs.items()}
    part = {k: v for k, v in whole.items() if k not in ("secret", "image")}
    policy.action_net.weight.data.mul_(1000)
    for given, same in ((whole, part), (part, whole)):
        np.testing.assert_array_equal(
            policy.predict(given, deterministic=True)[0],
            policy.predict(same, deterministic=True)[0],
        )


# --- without memory; dropout ----------------------------------------------------------


def test_the_control_has_no_memory() -> None:
    policy = policy_of("box", cell="none")
    assert policy.initial_state(5).shape == (0, 5, 8)
    assert isinstance(policy.actor, Memoryless)
    obs = torch.randn(6, 2, 3)
    alone = [
        policy.evaluate_sequence(
            obs[t : t + 1], policy.initial_state(2), torch.ones(1, 2, dtype=torch.bool)
        )[:2]
        for t in range(6)
    ]
    params, values, _ = policy.evaluate_sequence(
        obs, policy.initial_state(2), torch.zeros(6, 2, dtype=torch.bool)
    )
    torch.testing.assert_close(params, torch.cat([p for p, _ in alone]))
    torch.testing.assert_close(values, torch.cat([v for _, v in alone]))


@pytest.mark.parametrize("cell", ["lstm", "gru", "mingru"])
def test_dropout_is_between_layers(cell: Any) -> None:
    """Layer by layer with the masks applied by hand; gradients reach the weights."""
    torch.manual_seed(0)
    core = Recurrent(3, 4, 3, cell)
    x, state = torch.randn(5, 2, 3), torch.randn(core.initial_state(2).shape)
    starts = torch.rand(5, 2) < 0.3
    expected, after = core(x, state, starts)
    whole = Dropping(core, 0.0, torch.Generator())(x, state, starts)
    torch.testing.assert_close(whole[0], expected)
    torch.testing.assert_close(whole[1], after)

    dropping = Dropping(core, 0.5, torch.Generator().manual_seed(7))
    y, _ = dropping(x, state, starts)
    generator = torch.Generator().manual_seed(7)
    for i, layer in enumerate(dropping.layers):
        if i:
            mask = torch.empty(5, 2, 4).bernoulli_(0.5, generator=generator)
            x = x * mask * 2
        x, _ = layer.reference(x, state[i::3], starts)
    torch.testing.assert_close(y, x)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in core.parameters())


def test_dropout_is_for_updates_only() -> None:
    policy = policy_of("box", n_lstm_layers=2, lstm_kwargs={"dropout": 0.5})
    inputs = torch.randn(4, 2, 3), policy.initial_state(2), torch.zeros(4, 2).bool()
    policy.set_training_mode(True)
    first, again = (policy.evaluate_sequence(*inputs)[0] for _ in range(2))
    assert not torch.equal(first, again)
    policy.set_training_mode(False)
    first, again = (policy.evaluate_sequence(*inputs)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.warns(UserWarning, match="nothing is dropped"):
        policy_of("box", lstm_kwargs={"dropout": 0.5})


# --- what cannot be -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("box", {"shared_lstm": True}, "shared_lstm and enable_critic_lstm"),
        (
            "image",
            {**CRITICS["shared"], "share_features_extractor": False},
            "shared_lstm with share_features_extractor=False",
        ),
        (
            "dict",
            {**CRITICS["shared"], "critic_keys": ["secret"]},
            "shared_lstm with critic_keys",
        ),
        ("box", {"squash_output": True}, "squash_output without use_sde"),
        ("box", {"use_sde": True}, "use_sde with the action space Discrete"),
        ("box", {"net_arch": {"qf": [3]}}, r"net_arch has \['qf'\]"),
        ("box", {"net_arch": [8, {"pi": [4]}]}, "expected a list of widths"),
        ("box", {"net_arch": {"pi": [0]}}, "expected a list of widths"),
        ("box", {"lstm_kwargs": {"bias": False}}, "lstm_kwargs has bias=False"),
        ("box", {"lstm_kwargs": {"dropout": 1.5}}, "lstm_kwargs has dropout=1.5"),
        ("box", {"critic_keys": ["a"]}, "expected some keys of a Dict"),
        ("dict", {"critic_keys": ["a"]}, r"critic_keys are \['a'\]"),
        ("dict", {"critic_keys": list(PARTS.spaces)}, "not all"),
        ("dict", {"features_extractor_class": FlattenExtractor}, "MultiInputLstmPol"),
        ("box", {"features_extractor_class": CombinedExtractor}, "expected a Dict"),
        ("box", {"features_extractor_class": NatureCNN}, "expected an image"),
    ],
)
def test_impossible_policies(kind: str, kwargs: dict[str, Any], message: str) -> None:
    if "features_extractor_class" in kwargs:
        kwargs = {**kwargs, "features_extractor_kwargs": {}}
    with pytest.raises(ValueError, match=message) as error:
        policy_of(kind, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "space", [spaces.Tuple([VECTOR]), spaces.Dict({"a": spaces.Dict({"b": VECTOR})})]
)
def test_nested_observations_are_an_error(space: spaces.Space[Any]) -> None:
    for policy in (RecurrentPolicy, MultiInputLstmPolicy, CnnLstmPolicy):
        with pytest.raises(ValueError, match="wrap the environment"):
            policy(space, spaces.Discrete(2), lambda _: 1e-3)


def test_discrete_observations_start_at_zero() -> None:
    later = spaces.Discrete(3, start=1)
    for policy, space in (
        (RecurrentPolicy, later),
        (MultiInputLstmPolicy, spaces.Dict({"a": later})),
    ):
        with pytest.raises(ValueError, match="numbers that start at 0"):
            policy(space, spaces.Discrete(2), lambda _: 1e-3)


def test_defaults_of_the_policies() -> None:
    """As in sb3-contrib: no layers behind a CNN, two of 64 elsewhere."""
    expected: dict[str, list[int]] = {"image": [], "dict": [64, 64], "box": [64, 64]}
    for kind, widths in expected.items():
        policy = policy_of(kind, net_arch=None)
        assert [
            len(m.bias) for m in policy.actor_mlp if isinstance(m, nn.Linear)
        ] == widths
    extractors = {kind: type(policy_of(kind).features_extractor) for kind in KINDS}
    assert extractors["image"] is NatureCNN
    assert extractors["dict"] is CombinedExtractor
    assert extractors["flat image"] is FlattenExtractor


@pytest.mark.parametrize("space", [LAST, PARTS], ids=["image", "dict"])
def test_the_flow_takes_the_policy_that_reads_them(
    space: spaces.Space[Any], tmp_path: Path
) -> None:
    def make(**kwargs: Any) -> gymnasium.Env[Any, Any]:
        return Show(space, **kwargs)

    gymnasium.register("Shown-v0", make)
    try:
        agent_config = AgentConfig(hidden_size=8, n_steps=8, batch_size=8, n_epochs=1)
        run = RunConfig(str(tmp_path / "run"), "disabled")
        summary = train(
            TrainConfig("Shown-v0", 2, steps=16, agent=agent_config, run=run),
            progress=False,
        )
        names = {spaces.Dict: MultiInputLstmPolicy, spaces.Box: CnnLstmPolicy}
        path = Path(summary["folder"], "agent.zip")
        assert type(RecurrentPPO.load(path).policy) is names[type(space)]
    finally:
        del gymnasium.registry["Shown-v0"]


def test_configs_choose_the_policy_by_the_observations() -> None:
    for kind, (name, space, _) in KINDS.items():
        if kind != "flat image":  # there the caller chose otherwise
            assert policy_for(space) == name
