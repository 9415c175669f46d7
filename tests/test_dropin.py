"""A drop-in for sb3-contrib's RecurrentPPO: what its users rely on, in both classes."""

import base64
import io
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO as ContribPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from sb3_contrib.ppo_recurrent import MlpLstmPolicy as TheirPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)
from torch import Tensor

import rlrnn  # noqa: F401  (registers the environments)
from rlrnn.agents import RecurrentPPO, vector
from rlrnn.agents.contrib import _ours as our_name
from rlrnn.agents.vector import TensorVecEnv

Agents = pytest.mark.parametrize(
    "Agent", [ContribPPO, RecurrentPPO], ids=["theirs", "ours"]
)
OBS = spaces.Box(-1, 1, (3,), np.float32)
SMALL = {"lstm_hidden_size": 8, "net_arch": {"pi": [8], "vf": [6, 4]}}
SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(3),
    "box": spaces.Box(-0.5, 0.5, (2,), np.float32),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Noise(gymnasium.Env[Any, Any]):
    """Random observations, episodes of 7 steps, reward 1 for the first action."""

    def __init__(
        self,
        action_space: spaces.Space[Any] | None = None,
        observation_space: spaces.Space[Any] = OBS,
        length: int = 7,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Discrete(3)
        self.length = length

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.t += 1
        reward = float(np.all(np.asarray(action) == 0))
        return self.observation_space.sample(), reward, False, self.t >= self.length, {}


def envs(n: int = 2, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: Noise(**kwargs)] * n)


def make(Agent: Any, env: Any, **kwargs: Any) -> Any:
    defaults = {
        "n_steps": 16,
        "batch_size": 16,
        "n_epochs": 2,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": SMALL,
    }
    return Agent("MlpLstmPolicy", env, **{**defaults, **kwargs})


def weights(model: Any) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


# --- files of sb3-contrib -------------------------------------------------------------

CRITICS: dict[str, dict[str, Any]] = {
    "two": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "none": {"enable_critic_lstm": False},
    "layers": {"n_lstm_layers": 2, "activation_fn": torch.nn.ReLU},
}


def their_values(model: Any, obs: Tensor, starts: Tensor) -> Tensor:
    """sb3-contrib's values along a sequence of one environment [T, D]."""
    size = model.policy.lstm_hidden_state_shape
    state = torch.zeros(size), torch.zeros(size)
    states = [state, state]
    values = []
    for x, start in zip(obs, starts, strict=True):
        with torch.no_grad():
            _, value, _, after = model.policy.forward(
                x[None], RNNStates(*states), start.float()[None], deterministic=True
            )
        states = [after.pi, after.vf]
        values.append(value.flatten())
    return torch.cat(values)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("name", SPACES)
def test_an_imported_agent_is_the_same(name: str, critic: str, tmp_path: Path) -> None:
    """Actions, states and values along a sequence with restarts; counters; learning."""
    kwargs = {**SMALL, **CRITICS[critic]}
    theirs = make(ContribPPO, envs(action_space=SPACES[name]), policy_kwargs=kwargs)
    if name != "multibinary":  # which sb3-contrib 2.9 cannot train on
        theirs.learn(64)
    theirs.save(tmp_path / "theirs")
    ours = RecurrentPPO.load(tmp_path / "theirs", device="cpu", trust=True)
    assert ours.num_timesteps == theirs.num_timesteps
    assert ours._n_updates == theirs._n_updates
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    for setting in ("n_steps", "batch_size", "n_epochs", "gamma", "seed", "n_envs"):
        assert getattr(ours, setting) == getattr(theirs, setting)
    assert ours.clip_range == 0.2 and ours.learning_rate == 3e-4

    rng = np.random.default_rng(0)
    obs = rng.normal(size=(9, 2, 3)).astype(np.float32)
    starts = rng.random((9, 2)) < 0.3
    state = their_state = None
    for x, start in zip(obs, starts, strict=True):
        action, state = ours.predict(x, state, start, deterministic=True)
        expected, their_state = theirs.predict(x, their_state, start, True)
        np.testing.assert_allclose(action, expected, atol=1e-5)
        assert state is not None and len(state) == len(their_state)
        for a, b in zip(state, their_state, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    column, begins = torch.tensor(obs[:, 0]), torch.tensor(starts[:, 0])
    with torch.no_grad():
        _, values, _ = ours.policy.evaluate_sequence(
            column[:, None], ours.policy.initial_state(1), begins[:, None]
        )
    expected_values = their_values(theirs, column, begins)
    torch.testing.assert_close(values[:, 0], expected_values, atol=1e-5, rtol=1e-4)

    ours.set_env(envs(action_space=SPACES[name]))
    before = weights(ours)
    ours.learn(32, reset_num_timesteps=False)
    assert ours.num_timesteps == theirs.num_timesteps + 32
    assert not torch.equal(weights(ours), before)
    ours.save(tmp_path / "ours")
    RecurrentPPO.load(tmp_path / "ours", device="cpu")  # from now on without trust


PICTURE = spaces.Box(0, 255, (1, 36, 36), np.uint8)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("alias", "space"),
    [
        ("CnnLstmPolicy", PICTURE),
        ("MultiInputLstmPolicy", spaces.Dict({"a": OBS, "b": PICTURE})),
    ],
)
def test_imported_eyes(alias: str, space: Any, shared: bool, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "device": "cpu", "seed": 0}
    kwargs["policy_kwargs"] = {
        "lstm_hidden_size": 8,
        "share_features_extractor": shared,
    }
    theirs = ContribPPO(alias, envs(observation_space=space), **kwargs).learn(16)
    theirs.save(tmp_path / "a")
    ours = RecurrentPPO.load(tmp_path / "a", device="cpu", trust=True)
    space.seed(0)
    state: Any = None
    their_state: Any = None
    for _ in range(5):
        obs = space.sample()
        action, state = ours.predict(obs, state, deterministic=True)
        expected, their_state = theirs.predict(obs, their_state, deterministic=True)
        np.testing.assert_array_equal(action, expected)
        for a, b in zip(state, their_state, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    adam, their_adam = ours.policy.optimizer, theirs.policy.optimizer
    for name, p in theirs.policy.named_parameters():
        mine = dict(ours.policy.named_parameters())[our_name(name)]
        torch.testing.assert_close(mine, p)
        torch.testing.assert_close(
            adam.state[mine]["exp_avg"], their_adam.state[p]["exp_avg"]
        )
    ours.set_env(envs(observation_space=space))
    ours.learn(16, reset_num_timesteps=False)


@pytest.mark.parametrize("squash", [False, True])
def test_imported_state_dependent_exploration(squash: bool, tmp_path: Path) -> None:
    kwargs = {**SMALL, "squash_output": squash, "full_std": not squash}
    env = envs(action_space=SPACES["box"])
    theirs = make(
        ContribPPO, env, use_sde=True, sde_sample_freq=4, policy_kwargs=kwargs
    )
    theirs.learn(64).save(tmp_path / "a")
    ours = RecurrentPPO.load(tmp_path / "a", device="cpu", trust=True)
    assert ours.use_sde and ours.sde_sample_freq == 4
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    action, _ = ours.predict(obs, deterministic=True)
    expected, _ = theirs.predict(obs, deterministic=True)
    np.testing.assert_allclose(action, expected, atol=1e-5)
    torch.testing.assert_close(ours.policy.log_std, theirs.policy.log_std)
    ours.set_env(env)
    ours.learn(32, reset_num_timesteps=False)


def test_the_optimiser_comes_along(tmp_path: Path) -> None:
    """One step on the same gradients leads to the same weights."""
    theirs = make(ContribPPO, envs(action_space=SPACES["box"])).learn(64)
    theirs.save(tmp_path / "theirs")
    ours = RecurrentPPO.load(tmp_path / "theirs", device="cpu", trust=True)
    parameters = dict(ours.policy.named_parameters())
    for name, p in theirs.policy.named_parameters():
        p.grad = torch.randn(
            p.shape, generator=torch.Generator().manual_seed(p.numel())
        )
        parameters[our_name(name)].grad = p.grad.clone()
    theirs.policy.optimizer.step()
    ours.policy.optimizer.step()
    for name, p in theirs.policy.named_parameters():
        torch.testing.assert_close(parameters[our_name(name)], p)


def changed(path: Path, change: Callable[[Any], None]) -> None:
    """Change the JSON of a saved agent in place."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["data"])
    change(data)
    members["data"] = json.dumps(data).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_importing_asks_for_trust_and_runs_nothing_before(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was here",)

    bomb = {":type:": "x", ":serialized:": pickled(Evil())}
    targets = ("ep_info_buffer", "observation_space", "policy_class", "clip_range")
    make(ContribPPO, envs()).save(tmp_path / "evil")
    changed(
        tmp_path / "evil.zip", lambda data: data.update(dict.fromkeys(targets, bomb))
    )
    message = r"pickles, which can run code.*trust=True"
    with pytest.raises(ValueError, match=message) as error:
        RecurrentPPO.load(tmp_path / "evil")
    assert "\n" not in str(error.value)
    make(RecurrentPPO, envs()).set_parameters(tmp_path / "evil")  # weights only
    assert not (tmp_path / "was here").exists()


def test_importing_without_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its policies are known by name; anything else of it is one clear line."""
    path = tmp_path / "a.zip"
    make(ContribPPO, envs()).save(path)
    whole = io.BytesIO(path.read_bytes())
    other = {":type:": "x", ":serialized:": pickled(RNNStates)}
    changed(path, lambda data: data.update(policy_kwargs=other))
    for name in [name for name in sys.modules if name.startswith("sb3_contrib")]:
        monkeypatch.setitem(sys.modules, name, None)
    RecurrentPPO.load(whole, device="cpu", trust=True)
    with pytest.raises(ValueError, match="policy_kwargs in .*pass load") as error:
        RecurrentPPO.load(path, trust=True)
    assert "\n" not in str(error.value)
    loaded = RecurrentPPO.load(path, trust=True, device="cpu", policy_kwargs=SMALL)
    assert loaded.policy.actor.hidden_size == 8


def pickled(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lstm_kwargs": {"bias": False}}, "lstm_kwargs has bias=False"),
        ({"lstm_hidden_size": 9}, "of another policy"),
    ],
)
def test_what_cannot_be_imported_is_named(
    kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make(ContribPPO, envs()).save(tmp_path / "a")
    changed(tmp_path / "a.zip", lambda data: data["policy_kwargs"].update(kwargs))
    with pytest.raises(ValueError, match=message) as error:
        RecurrentPPO.load(tmp_path / "a", trust=True)
    assert "\n" not in str(error.value)


def test_other_algorithms_cannot_be_imported(tmp_path: Path) -> None:
    PPO("MlpPolicy", envs(), n_steps=8, batch_size=8, device="cpu").save(tmp_path / "a")
    with pytest.raises(ValueError, match="without an LSTM"):
        RecurrentPPO.load(tmp_path / "a", trust=True)


def test_parameters_of_both_kinds_of_files(tmp_path: Path) -> None:
    theirs = make(ContribPPO, envs()).learn(32)
    theirs.save(tmp_path / "theirs")
    ours = make(RecurrentPPO, envs(), seed=1)
    ours.set_parameters(tmp_path / "theirs")
    obs = np.ones((2, 3), np.float32)
    actions, _ = ours.predict(obs, deterministic=True)
    np.testing.assert_array_equal(actions, theirs.predict(obs, deterministic=True)[0])
    ours.save(tmp_path / "ours")
    other = make(RecurrentPPO, envs(), seed=2)
    other.set_parameters(str(tmp_path / "ours"))
    assert torch.equal(weights(other), weights(ours))
    wider = make(RecurrentPPO, envs(), policy_kwargs={"lstm_hidden_size": 9})
    with pytest.raises(ValueError, match="of another policy"):
        wider.set_parameters(ours.get_parameters())


# --- what users of either class rely on -----------------------------------------------


@Agents
@pytest.mark.parametrize("name", [name for name in SPACES if name != "multibinary"])
def test_learns_and_predicts(Agent: Any, name: str) -> None:
    space = SPACES[name]
    model = make(Agent, envs(action_space=space)).learn(64)
    assert model.num_timesteps == 64
    one, state = model.predict(np.zeros(3, np.float32))
    assert space.contains(one) and len(state) == 2 and state[0].shape == (1, 1, 8)
    many, state = model.predict(np.zeros((5, 3), np.float32))
    assert len(many) == 5 and state[1].shape == (1, 5, 8)
    again, _ = model.predict(
        np.zeros((5, 3), np.float32), state, np.array([True] * 5), deterministic=True
    )
    first, _ = model.predict(np.zeros((5, 3), np.float32), deterministic=True)
    np.testing.assert_allclose(again, first, atol=1e-6)


@Agents
def test_states_begin_at_zero_and_may_be_given_as_zeros(Agent: Any) -> None:
    model = make(Agent, envs(action_space=SPACES["box"]))
    obs, zero = np.ones((2, 3), np.float32), np.zeros((1, 2, 8), np.float32)
    given, _ = model.predict(obs, (zero, zero), deterministic=True)
    none, _ = model.predict(obs, None, deterministic=True)
    np.testing.assert_array_equal(given, none)


@Agents
@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_lstm_layers": 2},
        {"shared_lstm": True, "enable_critic_lstm": False},
        {"enable_critic_lstm": False},
        {"net_arch": [8], "activation_fn": torch.nn.ReLU},
        {"net_arch": dict(pi=[], vf=[4]), "ortho_init": False},
        {"net_arch": (8,)},
        {"optimizer_kwargs": {"weight_decay": 1e-3}, "log_std_init": -1.0},
        {"optimizer_class": torch.optim.AdamW},
        {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
        {"optimizer_kwargs": {"fused": False}},
    ],
)
def test_policy_kwargs(Agent: Any, kwargs: dict[str, Any]) -> None:
    env = envs(action_space=SPACES["box"])
    model = make(Agent, env, policy_kwargs={**SMALL, **kwargs})
    before = weights(model)
    assert not torch.equal(weights(model.learn(32)), before)


@Agents
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_range_vf": 0.1, "target_kl": 0.05},
        {"normalize_advantage": False, "ent_coef": 0.01, "gae_lambda": 0.9},
        {"learning_rate": lambda progress: 1e-3 * progress, "clip_range": lambda p: p},
        {"batch_size": 7, "n_steps": 10},
        {"stats_window_size": 3, "max_grad_norm": 0.1},
    ],
)
def test_settings(Agent: Any, settings: dict[str, Any]) -> None:
    model = make(Agent, envs(), **settings).learn(64)
    assert weights(model).isfinite().all()


@Agents
def test_the_same_seed_gives_the_same_agent(Agent: Any) -> None:
    one, two, other = (make(Agent, envs(), seed=s).learn(64) for s in (3, 3, 4))
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


@Agents
def test_saved_and_loaded(Agent: Any, tmp_path: Path) -> None:
    """Same predictions; goes on learning; with another number of environments, too."""
    model = make(Agent, envs(action_space=SPACES["box"])).learn(64)
    model.save(tmp_path / "a")
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    for n in (2, 3):
        env = envs(n, action_space=SPACES["box"])
        loaded = Agent.load(tmp_path / "a", env=env, device="cpu")
        found, _ = loaded.predict(obs, deterministic=True)
        np.testing.assert_array_equal(found, expected)
        assert loaded.n_envs == n and loaded.num_timesteps == 64
        loaded.learn(16 * n, reset_num_timesteps=False)
        assert loaded.num_timesteps == 64 + 16 * n
    loaded = Agent.load(tmp_path / "a", device="cpu", custom_objects={"n_epochs": 5})
    assert loaded.n_epochs == 5 and loaded.get_env() is None
    with pytest.raises(ValueError, match="spaces do not match"):
        Agent.load(tmp_path / "a", env=envs(action_space=SPACES["discrete"]))
    model.save(str(tmp_path / "b.zip"), exclude=["tensorboard_log"])
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    Agent.load(file, device="cpu")


@Agents
def test_environments_can_be_changed(Agent: Any) -> None:
    model = make(Agent, envs()).learn(32)
    other = envs()
    model.set_env(other)
    assert model.get_env() is other and model.get_vec_normalize_env() is None
    model.learn(32, reset_num_timesteps=False)
    model.set_env(VecNormalize(envs()))
    assert model.get_vec_normalize_env() is model.get_env()
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 96
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(envs(3))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(envs(action_space=SPACES["box"]))


@Agents
def test_parameters_in_and_out(Agent: Any) -> None:
    one, two = (make(Agent, envs(), seed=s).learn(32) for s in (0, 1))
    given = {
        part: {k: v.clone() if isinstance(v, Tensor) else v for k, v in tree.items()}
        for part, tree in one.get_parameters().items()
    }
    assert set(given) == {"policy", "policy.optimizer"}
    two.set_parameters(given)
    assert torch.equal(weights(one), weights(two))
    two.set_parameters({"policy": given["policy"]}, exact_match=False)
    with pytest.raises(ValueError, match="do not match"):
        two.set_parameters({"policy": given["policy"]})


@Agents
def test_counters_and_logs(Agent: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []

    class Rows(KVWriter):
        def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
            rows.append({**key_values, "step": step})

        def close(self) -> None:
            pass

    model = make(Agent, VecMonitor(envs()), ent_coef=0.1)
    model.set_logger(Logger(None, [Rows()]))
    assert model.learn(160, log_interval=2) is model
    assert [row["step"] for row in rows] == [64, 128] and model.num_timesteps == 160
    names = {
        "time/fps",
        "time/iterations",
        "rollout/ep_rew_mean",
        "rollout/ep_len_mean",
    }
    names |= {f"train/{n}" for n in ("loss", "approx_kl", "entropy_loss", "clip_range")}
    assert names <= rows[-1].keys()
    assert rows[-1]["rollout/ep_len_mean"] == 7
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 192
    model.learn(32)
    assert model.num_timesteps == 32
    if Agent is RecurrentPPO:
        extra = {"time/collect_fps", "time/update_fps", "rollout/state_norm"}
        assert extra <= rows[-1].keys() | rows[1].keys()
        assert 0 < rows[1]["rollout/state_norm"] < np.sqrt(8)


@Agents
def test_random_seed_and_single_environments(Agent: Any) -> None:
    model = make(Agent, Noise(), n_steps=32)
    model.set_random_seed(5)
    model.learn(32)
    assert len(model.ep_info_buffer) >= 4  # a Monitor was put around it
    assert make(Agent, "CartPole-v1").learn(16).num_timesteps == 16


# --- Stable-Baselines3's callbacks, wrappers and evaluation ---------------------------

Kinds = pytest.mark.parametrize("kind", ["numpy", "tensor"])
TASK = "rlrnn/CartPoleHiddenVelocity-v0"


def task(kind: str, n: int = 2) -> Any:
    """Episodes of at most 9 steps, each with reward 1."""
    if kind == "tensor":
        return TensorVecEnv(gymnasium.make_vec(TASK, num_envs=n, max_episode_steps=9))
    return make_vec_env(TASK, n, env_kwargs={"max_episode_steps": 9})


@Kinds
def test_stopping_callbacks(kind: str, tmp_path: Path) -> None:
    model = make(RecurrentPPO, task(kind))
    stop = StopTrainingOnMaxEpisodes(3)
    model.learn(10_000, stop)
    assert 6 <= stop.n_episodes <= 8 and model.num_timesteps <= 64

    def evaluation(**kwargs: Any) -> EvalCallback:
        return EvalCallback(
            task(kind), eval_freq=8, n_eval_episodes=2, verbose=0, warn=False, **kwargs
        )

    model.learn(
        10_000,
        evaluation(
            callback_on_new_best=StopTrainingOnRewardThreshold(5),
            best_model_save_path=str(tmp_path),
            log_path=str(tmp_path),
        ),
    )
    assert model.num_timesteps == 16 and (tmp_path / "best_model.zip").is_file()
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (1, 2)
    RecurrentPPO.load(tmp_path / "best_model", device="cpu")
    after = StopTrainingOnNoModelImprovement(1)
    model.learn(10_000, evaluation(callback_after_eval=after))
    assert model.num_timesteps < 1000


@Kinds
def test_lists_progress_and_checkpoints(kind: str, tmp_path: Path) -> None:
    calls: list[int] = []

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            calls.append(self.num_timesteps)
            return True

    def function(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        assert locals_["self"] is model
        return True

    callbacks = [
        EveryNTimesteps(24, Count()),
        CheckpointCallback(16, str(tmp_path), save_vecnormalize=True),
        ProgressBarCallback(),
    ]
    model = make(RecurrentPPO, VecNormalize(task(kind)))
    model.learn(96, callbacks)
    assert calls == [24, 48, 72, 96]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"rl_model_{kind}{steps}_steps.{end}"
        for steps in (32, 64, 96)
        for kind, end in (("", "zip"), ("vecnormalize_", "pkl"))
    }
    with pytest.warns(Warning):  # rich's bars are experimental in tqdm
        model.learn(32, function, progress_bar=True, reset_num_timesteps=False)


@Kinds
def test_what_callbacks_see(kind: str) -> None:
    """Arrays and dicts as of a `VecEnv`, for code that was written for SB3."""
    seen: dict[str, int] = {"episodes": 0, "dones": 0}

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            rewards, dones = self.locals["rewards"], self.locals["dones"]
            assert np.asarray(rewards).shape == np.asarray(dones).shape == (2,)
            assert (rewards == 1).all() and np.mean(rewards) == 1 and rewards[0] == 1
            assert (rewards + 1).sum() == 4 and len(dones) == 2 and max(rewards) == 1
            for done, info in zip(dones, self.locals["infos"], strict=True):
                assert ("episode" in info) == bool(done)
                seen["dones"] += int(done)
                seen["episodes"] += int("episode" in info)
            assert self.locals["new_obs"].shape == (2, 2)
            assert np.asarray(self.locals["actions"]).shape == (2,)
            assert isinstance(self.locals["obs_tensor"], Tensor)
            return True

    make(RecurrentPPO, task(kind)).learn(64, Look())
    assert seen["episodes"] == seen["dones"] >= 6


def test_only_what_a_callback_looks_at_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies: list[torch.Size] = []
    original = vector._numpy

    def counted(x: Tensor) -> Any:
        copies.append(x.shape)
        return original(x)

    model = make(RecurrentPPO, task("tensor")).learn(32)
    monkeypatch.setattr(vector, "_numpy", counted)
    model.learn(64, reset_num_timesteps=False)
    model.learn(
        64, EveryNTimesteps(10, ConvertCallback(None)), reset_num_timesteps=False
    )
    assert not copies
    model.learn(64, StopTrainingOnMaxEpisodes(1000), reset_num_timesteps=False)
    assert len(copies) == 32  # `dones`, at each of the 32 steps


def test_a_callback_may_change_rewards() -> None:
    class Double(BaseCallback):
        def _on_step(self) -> bool:
            self.locals["rewards"] *= 2
            return True

        def _on_rollout_end(self) -> None:
            rollout = self.locals["rollout_buffer"]
            assert (
                rollout.returns - rollout.values - rollout.advantages
            ).abs().max() < 1
            self.total = float(rollout.returns[-1].sum())

    def total(callback: Any) -> float:
        model = make(RecurrentPPO, task("numpy"), gamma=0.0, gae_lambda=0.0)
        model.learn(32, callback)
        return float(model.rollout_buffer.returns.mean())

    assert total(Double()) == pytest.approx(2 * total(None))


@Kinds
@pytest.mark.parametrize("wrapper", ["VecNormalize", "VecFrameStack", "VecMonitor"])
@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
def test_wrappers(wrapper: str, kind: str, tmp_path: Path) -> None:
    def wrapped() -> Any:
        match wrapper:
            case "VecNormalize":
                return VecNormalize(task(kind))
            case "VecFrameStack":
                return VecFrameStack(task(kind), 3)
        return VecMonitor(task(kind), str(tmp_path / "log"))

    env = wrapped()
    evaluation = EvalCallback(wrapped(), n_eval_episodes=2, eval_freq=16, verbose=0)
    model = make(RecurrentPPO, env).learn(64, evaluation)
    assert evaluation.last_mean_reward > 1
    assert model.ep_info_buffer[0]["l"] <= 9
    mean, _ = evaluate_policy(model, env, 4)
    assert 1 < float(np.mean(mean)) <= 9
    model.save(tmp_path / "a")
    again = RecurrentPPO.load(tmp_path / "a", wrapped(), device="cpu")
    again.learn(32, reset_num_timesteps=False)


def test_video_recorder(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    env = VecVideoRecorder(
        make_vec_env("CartPole-v1", 2, env_kwargs={"render_mode": "rgb_array"}),
        str(tmp_path),
        lambda step: step == 0,
        10,
    )
    make(RecurrentPPO, env).learn(32)
    assert list(tmp_path.glob("*.mp4"))


@Kinds
@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_wandb_callback(
    mode: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.integration.sb3 import WandbCallback

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run = wandb.init(mode=mode, dir=tmp_path, project="test")
    try:
        callback = WandbCallback(
            gradient_save_freq=1, model_save_path=str(tmp_path / "m"), model_save_freq=8
        )
        make(RecurrentPPO, task(kind)).learn(64, callback)
    finally:
        run.finish()
    RecurrentPPO.load(tmp_path / "m" / "model", device="cpu")


# --- bad input ------------------------------------------------------------------------


class Faulty(Noise):
    """From its tenth step on it does something that it should not."""

    def __init__(self, fault: str, observation_space: spaces.Space[Any] = OBS) -> None:
        super().__init__(observation_space=observation_space, length=50)
        self.fault = fault
        self.steps = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = super().reset(**kwargs)
        return (np.zeros(4, np.float32) if self.fault == "reset" else obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, over, late, info = super().step(action)
        self.steps += 1
        if self.steps == 10:
            match self.fault:
                case "obs":
                    obs = np.array([0, np.nan, 0], np.float32)
                case "reward":
                    reward = float("inf")
                case "final":
                    obs, late = np.array([0, np.inf, 0], np.float32), True
                case "shape" | "last shape":
                    obs, late = np.zeros(4, np.float32), self.fault != "shape"
                case "number":
                    obs = 4
                case "key":
                    obs = {"b": obs["b"]}
                case "b":
                    obs = {**obs, "b": -1}
        return obs, reward, over, late, info


FAULTS = {
    "obs": r"environment 1 saw an observation that is not finite, at step 10 ",
    "reward": r"environment 1 gave a reward that is not finite, at step 9 .* 20\)",
    "final": r"environment 1 gave an observation that is not finite, at step 9 ",
    "shape": r"does not fit .* at step 9 of the rollout",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_environments_that_break(fault: str, tmp_path: Path) -> None:
    """One clear line, and the agent is as before: it can be saved and go on."""
    env = DummyVecEnv([Noise, lambda: Faulty(fault)])
    model = make(RecurrentPPO, env)
    before = weights(model)
    with pytest.raises(ValueError, match=FAULTS[fault]) as error:
        model.learn(320)
    assert "\n" not in str(error.value)
    assert torch.equal(weights(model), before)
    model.save(tmp_path / "a")
    RecurrentPPO.load(tmp_path / "a", envs(), device="cpu").learn(32)
    model.set_env(envs())
    model.learn(32, reset_num_timesteps=False)
    assert weights(model).isfinite().all()


PARTS = spaces.Dict({"a": OBS, "b": spaces.Discrete(4)})
MISFITS: list[tuple[str, spaces.Space[Any], str]] = [
    ("shape", OBS, "an observation does not fit .* at step 9 of the rollout: expected"),
    ("last shape", OBS, "an observation does not fit .* at step 9 "),
    ("reset", OBS, "the first observations do not fit .*: expected 2 of Box"),
    ("key", PARTS, "an observation does not fit .KeyError: 'a'. at step 9 "),
    ("number", spaces.Discrete(4), "environment 1 gave an observation 4, outside of "),
    ("b", PARTS, r"1 gave an observation b -1, outside of Discrete\(4\), at step 10 "),
]


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize(("fault", "space", "message"), MISFITS)
def test_observations_that_do_not_fit(
    fault: str, space: spaces.Space[Any], message: str, processes: bool
) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: Noise(observation_space=space),
        lambda: Faulty(fault, space),
    ]
    env = SubprocVecEnv(makers, "fork") if processes else DummyVecEnv(makers)
    policy = "MultiInputLstmPolicy" if space is PARTS else "MlpLstmPolicy"
    model = RecurrentPPO(policy, env, n_steps=16, batch_size=16, policy_kwargs=SMALL)
    with pytest.raises(ValueError, match=message) as error:
        model.learn(320)
    env.close()
    assert "\n" not in str(error.value)
    model.set_env(envs(observation_space=space))
    model.learn(32, reset_num_timesteps=False)


def test_all_first_observations_of_another_shape() -> None:
    makers: list[Callable[[], Any]] = [lambda: Faulty("reset")] * 2
    env = SubprocVecEnv(makers, "fork")
    with pytest.raises(ValueError, match=r"observations are \[2, 4\]: expected 2"):
        make(RecurrentPPO, env).learn(32)
    env.close()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("fault", ["obs", "reward"])
def test_normalisation_does_not_hide_who_broke(fault: str) -> None:
    """Its statistics are then of all copies; they are put back."""
    env = VecNormalize(DummyVecEnv([Noise, lambda: Faulty(fault)]))
    model = make(RecurrentPPO, env, n_steps=8)
    with pytest.raises(ValueError, match=rf"environment 1 .* at step {ONE_ON[fault]} "):
        model.learn(320)
    assert isinstance(env.obs_rms, RunningMeanStd)
    for moments in (env.obs_rms, env.ret_rms):
        assert np.isfinite(moments.mean).all() and np.isfinite(moments.var).all()
        assert round(moments.count) == 16 + 2 * (moments is env.obs_rms)
    model.learn(16, reset_num_timesteps=False)


ONE_ON = {"obs": 2, "reward": 1}  # steps of the second rollout


@pytest.mark.parametrize("fault", ["obs", "reward", "shape", "dtype", "rewards"])
def test_tensor_environments_that_break(fault: str) -> None:
    env: Any = gymnasium.make_vec(TASK, num_envs=2)
    step = env.step
    count = 0

    def broken(actions: Tensor) -> Any:
        nonlocal count
        obs, rewards, *rest = step(actions)
        count += 1
        if count == 10:
            match fault:
                case "obs":
                    obs = obs.clone()
                    obs[1, 0] = torch.nan
                case "reward":
                    rewards = rewards / torch.tensor([1.0, 0.0])
                case "shape":
                    obs = obs[:, :1]
                case "dtype":
                    obs = obs.double()
                case "rewards":
                    rewards = rewards[:, None]
        return obs, rewards, *rest

    env.step = broken
    messages = {
        **FAULTS,
        "shape": r"torch.float32 \[2, 1\] at step 9 .*expected .*\[2, 2\]",
        "dtype": r"an observation torch.float64 \[2, 2\] at step 9",
        "rewards": r"rewards \[2, 1\] and terminated \[2\]: expected \[2\]",
    }
    with pytest.raises(ValueError, match=messages[fault]) as error:
        make(RecurrentPPO, env).learn(64)
    assert "\n" not in str(error.value)


OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"optimizer_class": torch.optim.AdamW},
    {"optimizer_class": torch.optim.SGD},
    {"optimizer_class": torch.optim.RMSprop},
    {"optimizer_kwargs": {"foreach": True}},
    {"norm_value": True},
]


@pytest.mark.parametrize("kwargs", OPTIMIZERS)
def test_an_update_that_diverges_leaves_the_weights_alone(
    kwargs: dict[str, Any],
) -> None:
    """Rewards that are finite, whose returns are not."""

    class Huge(Noise):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            obs, _, over, late, info = super().step(action)
            return obs, 3e38, over, late, info

    env = DummyVecEnv([Huge, Huge])
    model = make(RecurrentPPO, env, policy_kwargs={**SMALL, **kwargs})
    before = weights(model)
    with pytest.raises(ValueError, match="the update diverged") as error:
        model.learn(320)
    assert "\n" not in str(error.value)
    assert torch.equal(weights(model), before)
    model.set_env(envs())
    model.learn(32, reset_num_timesteps=False)
    assert weights(model).isfinite().all() and not torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"n_epochs": -1}, "n_epochs is -1"),
        ({"gamma": 1.5}, "gamma is 1.5: expected 0 to 1"),
        ({"clip_range_vf": 0.0}, "clip_range_vf is 0.0.*None for no clipping"),
    ],
)
def test_nonsense_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(RecurrentPPO, envs(), **settings)


def test_settings_that_are_not_as_they_seem() -> None:
    with pytest.warns(UserWarning, match="gradients go back 1 steps only"):
        make(RecurrentPPO, envs(), n_steps=17, batch_size=16)
    with pytest.warns(UserWarning, match="the last minibatch of an epoch has 16 steps"):
        make(RecurrentPPO, envs(3), n_steps=16, batch_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(RecurrentPPO, envs(), n_steps=16, batch_size=32)
        whole = make(RecurrentPPO, envs(), n_steps=17, batch_size=None)
    whole.learn(34)
    assert whole._n_updates == 2


def test_predict_checks_what_it_is_given() -> None:
    model = make(RecurrentPPO, envs())
    obs = np.zeros((2, 3), np.float32)
    _, state = model.predict(obs)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"observation": np.zeros((2, 4))}, "shape"),
        ({"observation": np.zeros((3, 3)), "state": state}, "state has shape"),
        ({"observation": obs, "state": state[:1]}, "state has shapes"),
        ({"observation": obs, "state": ()}, "state has shapes"),
        ({"observation": obs, "state": (state[0], state[1][:, :, :3])}, "has shapes"),
        ({"observation": obs * [[1], [np.nan]]}, "observation 1 of 2 is not finite"),
        ({"observation": obs, "episode_start": np.ones(3)}, "episode_start has 3"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            model.predict(**arguments)
        assert "\n" not in str(error.value)


def test_a_file_of_another_policy(tmp_path: Path) -> None:
    make(RecurrentPPO, envs()).save(tmp_path / "a")
    with pytest.raises(ValueError, match="weights of another policy") as error:
        RecurrentPPO.load(tmp_path / "a", policy_kwargs={"lstm_hidden_size": 9})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        RecurrentPPO.load(tmp_path / "a", task("numpy"))
    with pytest.raises(ValueError, match="load was given steps: expected arguments"):
        RecurrentPPO.load(tmp_path / "a", steps=3)


def test_policies_of_others() -> None:
    for policy in (TheirPolicy, ActorCriticPolicy):
        with pytest.raises(ValueError, match=f"{policy.__name__}: expected one of 'M"):
            RecurrentPPO(policy, envs())


def test_stopping_by_the_divergence_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(RecurrentPPO, envs(), target_kl=1e-9, learning_rate=0.1, verbose=1)
    model.learn(32)
    assert "Stopping in epoch 0: the KL is" in capsys.readouterr().out
