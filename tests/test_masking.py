"""Masks of invalid actions: sb3-contrib's MaskablePPO is the oracle."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_contrib.common.wrappers import ActionMasker as ContribMasker
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecNormalize,
)
from torch import Tensor

from rlrnn.agents import RecurrentPPO, masking
from rlrnn.agents.distributions import distribution_for
from rlrnn.agents.rollout import minibatches
from rlrnn.agents.vector import TensorSource, TensorVecEnv

SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([2, 3, 2]),
    "multibinary": spaces.MultiBinary(3),
}


def random_masks(space: spaces.Space[Any], n: int, seed: int = 0) -> Tensor:
    """[n, M], something allowed in each group."""
    g = torch.Generator().manual_seed(seed)
    groups = []
    for size in masking.choices(space):
        allowed = torch.rand(n, size, generator=g) < 0.5
        sure = torch.randint(size, (n, 1), generator=g)
        groups.append(allowed.scatter(1, sure, True))
    return torch.cat(groups, -1)


def all_actions(space: spaces.Space[Any]) -> Tensor:
    """Each action of the space once."""
    match space:
        case spaces.Discrete():
            return torch.arange(int(space.n))
        case spaces.MultiDiscrete():
            return torch.cartesian_prod(*map(torch.arange, space.nvec.tolist()))
    return torch.cartesian_prod(*[torch.arange(2)] * int(np.prod(space.shape or ())))


def is_allowed(space: spaces.Space[Any], action: Any, mask: Any) -> bool:
    groups = np.split(np.asarray(mask), np.cumsum(masking.choices(space))[:-1])
    chosen = np.asarray(action).reshape(-1)
    return all(group[int(a)] for group, a in zip(groups, chosen, strict=True))


@pytest.mark.parametrize("name", SPACES)
def test_masked_distributions_agree_with_the_peer(name: str) -> None:
    """Log probability of each allowed action, entropy, mode, and their gradients."""
    space, n = SPACES[name], 50
    ours = distribution_for(space)
    g = torch.Generator().manual_seed(0)
    params = torch.randn(n, ours.size, generator=g, dtype=torch.float64)
    params.requires_grad_()
    masks = random_masks(space, n)
    masked = masking.masked(ours, params, masks)
    logits = params
    if name == "multibinary":  # the peer has a logit for 0, too
        logits = torch.stack((torch.zeros_like(params), params), -1).flatten(1)
    theirs: Any = make_masked_proba_distribution(space).proba_distribution(logits)
    theirs.apply_masking(masks)
    torch.testing.assert_close(ours.entropy(masked), theirs.entropy())
    total = torch.zeros(n, dtype=torch.float64)
    for action in all_actions(space):
        actions = action.expand(n, *action.shape)
        found = ours.log_prob(masked, actions)
        fine = torch.tensor([is_allowed(space, action, mask) for mask in masks])
        torch.testing.assert_close(found[fine], theirs.log_prob(actions)[fine])
        assert (found.exp()[~fine] == 0).all()
        total = total + found.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    mode = ours.mode(masked)
    assert all(is_allowed(space, a, m) for a, m in zip(mode, masks, strict=True))
    torch.testing.assert_close(
        ours.log_prob(masked, mode), theirs.log_prob(theirs.mode())
    )
    loss = (ours.entropy(masked) + ours.log_prob(masked, mode)).sum()
    (gradient,) = torch.autograd.grad(loss, params, retain_graph=True)
    expected = (theirs.entropy() + theirs.log_prob(theirs.mode())).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, params)[0])


@pytest.mark.parametrize("name", SPACES)
def test_what_is_not_allowed_is_never_drawn(name: str) -> None:
    space, n = SPACES[name], 20_000
    dist = distribution_for(space)
    masks = random_masks(space, n)
    params = 5 * torch.randn(n, dist.size, generator=torch.Generator().manual_seed(1))
    actions = dist.sample(
        masking.masked(dist, params, masks), torch.Generator().manual_seed(2)
    )
    log_probs = dist.log_prob(masking.masked(dist, params, masks), actions)
    assert (log_probs > -50).all()  # else the lowest finite number


def test_one_choice_left_is_certain() -> None:
    dist = distribution_for(spaces.Discrete(3))
    mask = torch.tensor([[False, True, False]])
    params = masking.masked(dist, torch.tensor([[50.0, -50.0, 3.0]]), mask)
    assert dist.entropy(params).item() == 0
    assert dist.log_prob(params, torch.tensor([1])).item() == 0


# --- environments ---------------------------------------------------------------------


class Locked(gymnasium.Env[Any, Any]):
    """Random masks; an action that is not allowed is an error, if `strict`."""

    def __init__(self, space: spaces.Space[Any], strict: bool = True) -> None:
        self.observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = space
        self.strict, self.wrong = strict, 0

    def _next(self) -> Any:
        seed = int(self.np_random.integers(1 << 30))
        self.mask = random_masks(self.action_space, 1, seed)[0].numpy()
        return self.np_random.normal(size=3).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._next(), {}

    def step(self, action: Any) -> Any:
        if not is_allowed(self.action_space, action, self.mask):
            assert not self.strict, (action, self.mask)
            self.wrong += 1
        self.t += 1
        return self._next(), 1.0, False, self.t >= 6, {}


class Open(Locked):
    def action_masks(self) -> Any:
        return self.mask.tolist()


class TensorLocked(VectorEnv[Any, Any, Any]):
    """The like of `Locked` in tensors; masks by a method, or in the infos."""

    def __init__(self, n: int, by: str = "method", strict: bool = True) -> None:
        self.metadata = {"tensor": True, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs, self.device = n, torch.device("cpu")
        self.single_observation_space = spaces.Box(-1, 1, (3,), np.float32)
        self.single_action_space = spaces.Discrete(4)
        self.strict, self.infos_ = strict, by == "infos"
        self.wrong = torch.zeros((), dtype=torch.int64)
        if by == "method":
            self.action_masks = lambda: self.mask

    def _next(self, infos: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.mask = random_masks(self.single_action_space, self.num_envs, self.count)
        self.count += 1
        if self.infos_:
            infos["action_mask"] = self.mask
        return torch.rand(self.num_envs, 3), infos

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.count = 0
        return self._next({})

    def step(self, actions: Tensor) -> Any:
        self.wrong += (~self.mask.gather(1, actions[:, None])).sum()
        assert not self.strict or not self.wrong
        final = torch.zeros(self.num_envs, 3)
        late = torch.full((self.num_envs,), self.count % 6 == 0)
        no = torch.zeros_like(late)
        lengths = torch.full((self.num_envs,), 6)
        obs, infos = self._next(
            {
                "final_obs": final,
                "episode_return": lengths.float(),
                "episode_length": lengths,
            }
        )
        return obs, torch.ones(self.num_envs), no, late, infos


def envs(
    space: spaces.Space[Any] | None = None, kind: type[Locked] = Open, **kwargs: Any
) -> DummyVecEnv:
    return DummyVecEnv([lambda: kind(space or SPACES["discrete"], **kwargs)] * 3)


def agent(env: Any, **kwargs: Any) -> RecurrentPPO:
    settings: dict[str, Any] = {
        "n_steps": 16,
        "batch_size": 16,
        "n_epochs": 2,
        "ent_coef": 0.01,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]},
    }
    return RecurrentPPO("MlpLstmPolicy", env, **{**settings, **kwargs})


class Ratios(BaseCallback):
    """How far the first epoch's ratios are from 1, after each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        policy, generator = model.policy, torch.Generator().manual_seed(0)
        segments = model.rollout_buffer.segments()
        for batch in minibatches(segments, model.batch_size, generator):
            with torch.no_grad():
                params, _, _ = policy.evaluate_sequence(
                    batch.obs, batch.state, batch.starts
                )
            assert batch.masks is not None
            params = masking.masked(policy.distribution, params, batch.masks)
            log_probs = policy.distribution.log_prob(params, batch.actions)
            self.errors.append(float((log_probs - batch.log_probs).abs().max()))


@pytest.mark.parametrize("name", SPACES)
def test_learning_plays_only_what_is_allowed(name: str) -> None:
    """And the first ratio is one: the update knows the masks of the rollout."""
    ratios = Ratios()
    model = agent(envs(SPACES[name]), learning_rate=0.01).learn(3 * 48, ratios)
    assert len(ratios.errors) == 9 and max(ratios.errors) < 1e-5
    assert all(p.isfinite().all() for p in model.policy.parameters())


@pytest.mark.parametrize("by", ["method", "infos"])
def test_tensor_environments(by: str) -> None:
    ratios = Ratios()
    model = agent(TensorLocked(3, by), learning_rate=0.01).learn(3 * 48, ratios)
    assert len(ratios.errors) == 9 and max(ratios.errors) < 1e-5
    model.learn(48, reset_num_timesteps=False)  # the mask is that of the last step


@pytest.mark.parametrize("by", ["method", "infos"])
def test_masks_of_tensors_stay_on_the_device(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = agent(TensorLocked(3, by, strict=False), n_steps=64)
    model.learn(192)
    _, callback = model._setup_learn(192)
    looks: list[str] = []
    for method in "item cpu numpy tolist __float__ __int__".split():
        original = getattr(Tensor, method)

        def counted(
            self: Tensor, *args: Any, original: Any = original, name: str = method
        ) -> Any:
            looks.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, method, counted)
    for module in ("recurrent", "agents.acting"):  # what an accelerator would run
        monkeypatch.setattr(f"rlrnn.{module}.compiles", lambda x: False)
    monkeypatch.setattr(TensorSource, "_may_truncate", lambda self, truncated: True)
    assert model.env is not None
    model.collect_rollouts(model.env, callback, None, model.n_steps)
    assert looks == ["cpu", "numpy"]  # the one of a rollout
    looks.clear()
    model.train()
    assert looks == ["cpu", "numpy"]  # and that of an update


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_masks_can_be_ignored(kind: str) -> None:
    env: Any = envs(strict=False) if kind == "numpy" else TensorLocked(3, strict=False)
    agent(env).learn(96)
    wrong = sum(env.get_attr("wrong")) if kind == "numpy" else int(env.wrong)
    assert wrong == 0
    model = agent(env).learn(96, use_masking=False)
    wrong = sum(env.get_attr("wrong")) if kind == "numpy" else int(env.wrong)
    assert wrong > 0 and model.rollout_buffer.masks is None


def _wrapped(masker: Any) -> DummyVecEnv:
    def make() -> Any:
        return masker(Locked(SPACES["discrete"]), lambda env: env.mask)

    return DummyVecEnv([make, make])


@pytest.mark.parametrize("masker", [masking.ActionMasker, ContribMasker])
def test_action_masker(masker: Any) -> None:
    agent(_wrapped(masker)).learn(32)


def test_action_masker_by_name() -> None:
    class Named(Locked):
        def allowed(self) -> Any:
            return self.mask

    single = masking.ActionMasker(Named(SPACES["discrete"]), "allowed")
    assert masking.is_masking_supported(single) and is_masking_supported(single)
    agent(single).learn(16)
    single.env.allowed = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="expected the name of a method"):
        masking.ActionMasker(single.env, "allowed")


def _subprocess() -> VecEnv:
    return SubprocVecEnv([_open, _open], start_method="fork")


def _open() -> Open:
    return Open(SPACES["discrete"])


@pytest.mark.parametrize(
    "make", [_subprocess, lambda: VecNormalize(envs())], ids=["processes", "normalised"]
)
def test_vectorised_and_wrapped(make: Callable[[], VecEnv]) -> None:
    env = make()
    agent(env).learn(48)
    env.close()


def test_the_tensor_face_has_a_mask_for_each_copy() -> None:
    """So that sb3-contrib's functions, and wrappers, find them too."""
    for by in ("method", "infos"):
        face = TensorVecEnv(TensorLocked(3, by))
        face.reset()
        wrapped = VecNormalize(face)
        assert is_masking_supported(face) and masking.is_masking_supported(wrapped)
        for masks in (get_action_masks(face), masking.get_action_masks(wrapped)):
            np.testing.assert_array_equal(masks, face.env.mask.numpy())
        agent(wrapped).learn(48)
    assert not is_masking_supported(TensorVecEnv(TensorLocked(3, "none")))


@pytest.mark.parametrize("name", SPACES)
def test_predict_with_masks(name: str) -> None:
    space = SPACES[name]
    model = agent(envs(space))
    obs = np.zeros((40, 3), np.float32)
    masks = random_masks(space, 40).numpy()
    for deterministic in (True, False):
        actions, _ = model.predict(obs, deterministic=deterministic, action_masks=masks)
        fine = [is_allowed(space, a, m) for a, m in zip(actions, masks, strict=True)]
        assert all(fine)
    one, _ = model.predict(obs[0], action_masks=masks[0])
    assert is_allowed(space, one, masks[0])


def test_wrong_masks() -> None:
    model = agent(envs())
    obs = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"has shape \[2, 3\]: expected \[2, 4\]"):
        model.predict(obs, action_masks=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="of environment 1 allows nothing"):
        model.predict(obs, action_masks=np.eye(2, 4, 1) * [[1], [0]])

    class Nothing(Open):
        def action_masks(self) -> Any:
            return [False] * 4

    with pytest.raises(ValueError, match="allows nothing"):
        agent(envs(kind=Nothing)).learn(48)
    box = envs(spaces.Box(-1, 1, (2,), np.float32))
    box.reset = lambda: np.zeros((3, 3), np.float32)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="use_masking=False"):
        agent(box).learn(48)
    tensor = TensorLocked(3, strict=False)
    tensor.action_masks = lambda: torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="environment 0 allowed no action, at step 0"):
        agent(tensor).learn(48)


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_evaluation_with_masks(kind: str) -> None:
    def env() -> Any:
        return envs() if kind == "numpy" else TensorVecEnv(TensorLocked(3))

    model = agent(env())
    mean, _ = masking.evaluate_policy(model, env(), 6, deterministic=False, warn=False)
    assert mean == 6
    callback = masking.MaskableEvalCallback(
        env(),
        n_eval_episodes=3,
        eval_freq=8,
        deterministic=False,
        verbose=0,
        warn=False,
    )
    model.learn(48, callback)
    assert callback.best_mean_reward == 6 and callback.model is model
    plain = gymnasium.make("CartPole-v1")
    masking.evaluate_policy(agent(plain), plain, 2, warn=False)  # no masks: as SB3's


def test_evaluation_keeps_the_memory() -> None:
    """What sb3-contrib's own `evaluate_policy` for masks loses."""
    model: Any = agent(envs())
    states: list[Any] = []
    predict = model.predict

    def spy(obs: Any, state: Any = None, *args: Any, **kwargs: Any) -> Any:
        states.append(state)
        return predict(obs, state, *args, **kwargs)

    model.predict = spy
    masking.evaluate_policy(model, envs(), 3, warn=False)
    assert states[0] is None and all(s is not None for s in states[1:])
