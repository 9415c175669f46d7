"""A drop-in for sb3-contrib's RecurrentPPO: what its users rely on, in both classes."""

import base64
import io
import json
import pickle
import sys
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
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

import rlrnn  # noqa: F401  (registers the environments)
from rlrnn.agents import RecurrentPPO
from rlrnn.agents.contrib import _ours as our_name

Agents = pytest.mark.parametrize("Agent", [ContribPPO, RecurrentPPO])
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
        ({"squash_output": True}, "squash_output=True"),
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
