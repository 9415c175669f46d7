"""Wrappers of environments in tensors: the same numbers as those of gymnasium's."""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

import rlrnn  # noqa: F401  (registers the ids)
from rlrnn.agents import RecurrentPPO
from rlrnn.config import AgentConfig, RunConfig, TrainConfig
from rlrnn.envs.tensor_wrappers import TensorPreviousActionReward, _flattener
from rlrnn.envs.wrappers import PreviousActionReward
from rlrnn.flows import evaluate, make_envs, train
from shared import Syncs

CARTPOLE = "rlrnn/CartPoleHiddenVelocity-v0"
TENSOR_IDS = [
    id
    for id, spec in gymnasium.registry.items()
    if id.startswith("rlrnn/") and spec.vector_entry_point
    if not id.endswith(("Medium-v0", "Hard-v0"))  # whose spaces are alike
]


def wrapped(id: str, num_envs: int = 4, device: str = "cpu", **parts: Any) -> Any:
    env = gymnasium.make_vec(id, num_envs=num_envs, device=device)
    return TensorPreviousActionReward(env, **parts)


def actions_for(env: Any, steps: int) -> Tensor:
    """Uniform in the action space, [T, B, ...]."""
    env.action_space.seed(0)
    return torch.from_numpy(np.stack([env.action_space.sample() for _ in range(steps)]))


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_agrees_with_the_wrapper_of_one_copy(id: str) -> None:
    """Step by step over three episodes: copy 0 of many, and gymnasium's in numpy."""
    many, face = wrapped(id, 3), gymnasium.make(id)
    many.env.max_episode_steps = face.unwrapped.vector.max_episode_steps = 30  # type: ignore[attr-defined]
    single = PreviousActionReward(face)
    assert many.single_observation_space == single.observation_space
    assert many.metadata["tensor"]
    assert many.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    actions = actions_for(many, 90)
    start, _ = many.reset(seed=9)
    obs, _ = single.reset(seed=9)
    assert np.array_equal(obs, start[0].numpy())
    assert start.dtype == torch.float32
    assert many.observation_space.contains(start.numpy())
    episodes = 0
    for action in actions:
        after, rewards, terminated, truncated, infos = many.step(action)
        obs, reward, over, cut, _ = single.step(action[0].numpy())
        assert np.array_equal(obs, infos["final_obs"][0].numpy())
        ends = terminated[0].item(), truncated[0].item()
        assert (reward, over, cut) == (rewards[0].item(), *ends)
        if over or cut:
            episodes += 1
            obs, _ = single.reset()
        assert np.array_equal(obs, after[0].numpy())
        if episodes == 3:
            return
    raise AssertionError(f"{episodes} episodes in 90 steps, expected 3")


@pytest.mark.parametrize("parts", [{"action": False}, {"reward": False}])
def test_one_of_both(parts: dict[str, Any]) -> None:
    id = "rlrnn/PositionOnlyPendulumEasy-v0"
    many = wrapped(id, 2, **parts)
    single = PreviousActionReward(gymnasium.make(id), **parts)
    assert many.single_observation_space == single.observation_space
    many.reset(seed=0), single.reset(seed=0)
    for action in actions_for(many, 5):
        obs, *_ = many.step(action)
        assert np.array_equal(single.step(action[0].numpy())[0], obs[0].numpy())


SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=2),
    spaces.MultiDiscrete([2, 5, 3]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 1]])),
    spaces.MultiBinary([2, 2]),
    spaces.Box(-1, 1, (2, 3), np.float32),
    spaces.Box(0, 9, (), np.int64),
    spaces.Dict({"b": spaces.Discrete(3), "a": spaces.Box(0, 1, (2,), np.float32)}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_flattened_as_gymnasium_has_it(space: Any) -> None:
    space.seed(0)
    samples: list[Any] = [space.sample() for _ in range(20)]
    batch: Any
    if isinstance(space, spaces.Dict):
        batch = {
            key: torch.from_numpy(np.stack([one[key] for one in samples]))
            for key in space
        }
    else:
        batch = torch.from_numpy(np.stack(samples))
    flat: list[Any] = [spaces.flatten(space, one) for one in samples]
    expected = np.stack(flat)
    found = _flattener(space, torch.device("cpu"))(batch)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("id", TENSOR_IDS)
def test_nothing_waits_for_the_device(id: str) -> None:
    """The meta device does what an accelerator does, without values."""
    env = wrapped(id, 4, "meta")
    syncs = Syncs()
    with syncs:
        obs, _ = env.reset(seed=0)
        for action in actions_for(env, 3).to("meta").unbind():
            obs, *_, infos = env.step(action)
    assert syncs.found == []
    assert obs.device == infos["final_obs"].device == env.device
    assert obs.shape == env.observation_space.shape


def test_an_agent_learns_and_resumes_to_the_same_bits() -> None:
    def agent(env: Any) -> RecurrentPPO:
        kwargs = {"lstm_hidden_size": 8, "net_arch": [8], "norm_obs": True}
        return RecurrentPPO(
            "MlpLstmPolicy",
            env,
            n_steps=32,
            n_epochs=2,
            policy_kwargs=kwargs,
            seed=0,
            device="cpu",
        )

    whole, file = agent(wrapped(CARTPOLE)).learn(128), io.BytesIO()
    obs, starts = whole.rollout_buffer.obs, whole.rollout_buffer.starts
    assert isinstance(obs, Tensor)
    assert starts.any() and not starts.all()
    actions, inner = whole.rollout_buffer.actions, obs.shape[-1] - 3
    played = torch.nn.functional.one_hot(actions[:-1], 2) * ~starts[1:, :, None]
    assert torch.equal(obs[1:, :, inner : inner + 2], played.float())
    assert torch.equal(obs[1:, :, -1], (~starts[1:]).float())  # a reward of 1
    whole.save(file)
    half = RecurrentPPO.load(
        io.BytesIO(file.getvalue()), env=wrapped(CARTPOLE), device="cpu"
    )
    for model in (whole, half):
        model.learn(128, reset_num_timesteps=False)
    ours, theirs = half.policy.state_dict(), whole.policy.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_attributes_are_those_of_the_environment() -> None:
    env = wrapped(CARTPOLE)
    env.reset(seed=0)
    assert env.max_episode_steps == env.env.max_episode_steps
    state = env.state_dict()
    again = copy.deepcopy(env)
    action = torch.ones(4, dtype=torch.int64)
    first = env.step(action)[0]
    assert torch.equal(again.step(action)[0], first)
    env.load_state_dict(state)
    assert torch.equal(env.step(action)[0], first)
    assert not hasattr(env, "action_masks")


def test_errors() -> None:
    with pytest.raises(ValueError, match=r'expected a VectorEnv with metadata\["ten'):
        TensorPreviousActionReward(gymnasium.make_vec("CartPole-v1", num_envs=2))


@pytest.mark.parametrize("id", [CARTPOLE, "CartPole-v1"])
def test_make_envs(id: str) -> None:
    """As SB3 takes them, from both kinds."""
    plain, env = (make_envs(id, 2, "cpu", 0, previous) for previous in (False, True))
    (width,), (wider,) = plain.observation_space.shape, env.observation_space.shape  # type: ignore[misc]
    assert wider == width + 3
    env.seed(0)
    first: Any = env.reset()
    assert np.array_equal(first[:, width:], np.zeros((2, 3)))
    obs: Any = env.step(np.array([0, 1]))[0]
    assert np.array_equal(obs[:, width:], [[1, 0, 1], [0, 1, 1]])
    env.close(), plain.close()


@pytest.mark.parametrize("id", [CARTPOLE, "CartPole-v1"])
def test_the_flow_trains_and_evaluates_with_it(id: str, tmp_path: Path) -> None:
    config = TrainConfig(
        id,
        envs=2,
        steps=64,
        eval_episodes=2,
        agent=AgentConfig(hidden_size=4, net_arch=[], n_steps=16, norm_value=True),
        device="cpu",
        previous=True,
        run=RunConfig(folder=str(tmp_path / "run"), track="disabled"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a batch_size beyond the rollout
        summary = train(config, progress=False)
    agent = RecurrentPPO.load(tmp_path / "run" / "agent.zip", device="cpu")
    (width,) = agent.observation_space.shape  # type: ignore[misc]
    assert width == {CARTPOLE: 2, "CartPole-v1": 4}[id] + 3
    assert agent.policy.popart is not None and agent.policy.popart.mean > 1
    again = evaluate(tmp_path / "run", config)
    assert again["return_mean"] == summary["return_mean"]


class Pictures(gymnasium.Env[Any, Any]):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    action_space = spaces.Discrete(2)


def test_images_are_refused() -> None:
    gymnasium.register("Pictures-v0", lambda **kwargs: Pictures())
    try:
        with pytest.raises(ValueError, match="previous is true and the observations"):
            make_envs("Pictures-v0", 2, "cpu", 0, True)
    finally:
        del gymnasium.registry["Pictures-v0"]
