"""PopArt: values of any size, preserved as the moments of the returns move."""

import io
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor, nn

import rlrnn  # noqa: F401  (registers the ids)
from rlrnn.agents import RecurrentPPO
from rlrnn.config import AgentConfig
from rlrnn.moments import PopArt
from rlrnn.running import policy_kwargs
from shared import Inspect

CRITICS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "shared": {"shared_lstm": True, "enable_critic_lstm": False},
    "without": {"enable_critic_lstm": False},
    "gru": {"cell": "gru", "net_arch": []},
    "rnn": {"cell": "rnn", "n_lstm_layers": 2},
    "mingru": {"cell": "mingru"},
    "none": {"cell": "none", "enable_critic_lstm": False},
}


def cartpole(scale: float = 1.0, offset: float = 0.0) -> Any:
    """Rewards that differ from step to step, times `scale`, and `offset`."""
    env: Any = gymnasium.make_vec("rlrnn/CartPoleHiddenVelocity-v0", num_envs=4)
    step = env.step

    def other(actions: Tensor) -> Any:
        obs, rewards, *rest = step(actions)
        rewards = rewards + (obs[:, 0] * 3).sin() + actions * obs[:, 1].sign()
        return obs, scale * rewards + offset, *rest

    env.step = other
    return env


def agent(env: Any = None, norm_value: bool = True, **given: Any) -> RecurrentPPO:
    kwargs = {"lstm_hidden_size": 8, "net_arch": [8], "norm_value": norm_value}
    kwargs |= given.pop("policy_kwargs", {})
    defaults: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_epochs": 2}
    defaults |= {"learning_rate": 1e-2, "seed": 0, "device": "cpu"}
    env = cartpole() if env is None else env
    return RecurrentPPO(
        "MlpLstmPolicy", env, policy_kwargs=kwargs, **{**defaults, **given}
    )


def weights(model: RecurrentPPO) -> Tensor:
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


def popart(model: RecurrentPPO) -> PopArt:
    assert model.policy.popart is not None
    return model.policy.popart


def test_values_stay_as_the_moments_move() -> None:
    g = torch.Generator().manual_seed(0)
    art, head, x = PopArt(), nn.Linear(5, 1), torch.randn(100, 5, generator=g)
    before = head(x)
    for size, mean in ((1e3, -5e3), (1e-2, 3.0), (1e4, 0.0), (1.0, 1.0)):
        returns = mean + size * torch.randn(16, 4, generator=g)
        art.move(returns, head)
        rounding = 1e-5 * float(art.std + art.mean.abs())
        torch.testing.assert_close(
            art.unscale(head(x)), before, rtol=1e-5, atol=rounding
        )
    torch.testing.assert_close(art.scale(art.unscale(x)), x, atol=1e-4, rtol=1e-4)


def test_moments_are_those_of_the_returns_and_forget() -> None:
    art, head = PopArt(), nn.Linear(1, 1)
    old, new = torch.arange(10.0).view(5, 2), torch.arange(4.0).view(2, 2) + 20
    art.move(old, head)
    torch.testing.assert_close(art.mean, old.mean())
    torch.testing.assert_close(art.std, old.std(correction=0))
    art.move(new, head)
    whole = torch.cat((old, new))
    torch.testing.assert_close(art.mean, whole.mean())
    torch.testing.assert_close(art.std, whole.std(correction=0))
    for _ in range(200):
        art.move(new, head)
    torch.testing.assert_close(art.mean, new.mean())
    torch.testing.assert_close(art.std, new.std(correction=0))
    same, head = PopArt(), nn.Linear(1, 1)
    same.move(torch.full((2, 2), 7.0), head)
    assert same.std == pytest.approx(PopArt.LEAST) and head.weight.isfinite().all()


def test_what_is_not_finite_moves_nothing() -> None:
    art, head = PopArt(), nn.Linear(3, 1)
    for bad in (torch.inf, torch.nan, 3e38):
        kept = [x.clone() for x in (*art.buffers(), *head.parameters())]
        returns = torch.tensor([[1.0, bad]])
        (value,) = art.begin(returns, torch.ones(2))
        art.move(returns, head)
        assert torch.equal(value, torch.ones(2))
        for now, then in zip((*art.buffers(), *head.parameters()), kept, strict=True):
            assert torch.equal(now, then)
        art.move(torch.tensor([[1.0, 4.0]]), head)  # then, once there are some


@pytest.mark.parametrize("critic", CRITICS)
def test_an_agent_keeps_its_values(critic: str) -> None:
    """Of all cells and critics: acting, learning and `value` agree, before and after
    the moments move; so the loss of the first minibatch is that of old values."""
    model = agent(cartpole(1000.0, 50.0), policy_kwargs=CRITICS[critic])
    seen: list[tuple[Tensor, ...]] = []

    def values(model: RecurrentPPO) -> Tensor:
        rollout, policy = model.rollout_buffer, model.policy
        state = rollout.states[0]
        with torch.no_grad():
            found: Tensor = policy.evaluate_sequence(
                rollout.obs, state, rollout.starts
            )[1]
            assert isinstance(rollout.obs, Tensor)
            first = policy.value(rollout.obs[0], state, rollout.starts[0])
        size = float(popart(model).std + popart(model).mean.abs())
        torch.testing.assert_close(first, found[0], rtol=1e-4, atol=1e-5 * size)
        return found

    def look(model: RecurrentPPO) -> None:
        rollout, moved = model.rollout_buffer, popart(model)
        before, mean = values(model), moved.mean.clone()
        size = float(moved.std + mean.abs())
        torch.testing.assert_close(before, rollout.values, rtol=1e-4, atol=1e-5 * size)
        state = {k: v.clone() for k, v in model.policy.state_dict().items()}
        model.policy.adapt(rollout.returns)
        assert not torch.equal(moved.mean, mean)
        size = max(size, float(moved.std + moved.mean.abs()))
        torch.testing.assert_close(values(model), before, rtol=1e-4, atol=1e-5 * size)
        model.policy.load_state_dict(state)
        seen.append((moved.mean, moved.std))

    model.learn(192, callback=Inspect(look))
    assert len(seen) == 3
    rollout = model.rollout_buffer
    assert rollout.returns.mean() > 1000 and popart(model).mean > 1000


@pytest.mark.parametrize(
    ("scale", "offset", "gamma"),
    [
        (1000.0, 0.0, 0.99),
        (1e-2, 0.0, 0.99),
        # an offset shifts all returns alike where they are of one reward each
        (1000.0, 5e3, 0.0),
        (1.0, -300.0, 0.0),
    ],
)
def test_rewards_of_any_size_are_learned_alike(
    scale: float, offset: float, gamma: float
) -> None:
    """From the first update on, actor and critic; without it they are not."""
    sizes = (1.0, 0.0), (scale, offset)
    plain, other = (
        agent(cartpole(*size), gamma=gamma, clip_range_vf=0.5) for size in sizes
    )
    before = weights(plain)
    assert torch.equal(weights(other), before)
    for steps, close in ((64, 1e-4), (128, 1e-3)):
        for model in (plain, other):
            model.learn(steps, reset_num_timesteps=False)
        torch.testing.assert_close(weights(other), weights(plain), rtol=0, atol=close)
        expected = scale * popart(plain).mean + offset
        torch.testing.assert_close(popart(other).mean, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(popart(other).std, scale * popart(plain).std)
    assert (weights(plain) - before).abs().max() > 1e-2
    theirs = [
        agent(cartpole(*size), False, gamma=gamma, clip_range_vf=0.5).learn(64)
        for size in sizes
    ]
    assert (weights(theirs[0]) - weights(theirs[1])).abs().max() > 5e-3


@pytest.mark.parametrize("critic", ["lstm", "shared"])
def test_with_moments_of_nothing_it_is_the_plain_one(
    critic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean 0 and deviation 1, held: the same bits."""
    monkeypatch.setattr(PopArt, "begin", lambda self, returns, *values: values)
    monkeypatch.setattr(PopArt, "move", lambda self, returns, head: None)
    ours, plain = (
        agent(norm_value=on, policy_kwargs=CRITICS[critic], clip_range_vf=0.2)
        for on in (True, False)
    )
    for model in (ours, plain):
        model.learn(192)
    assert torch.equal(weights(ours), weights(plain))
    assert torch.equal(ours.rollout_buffer.returns, plain.rollout_buffer.returns)


def test_a_loaded_agent_goes_on_to_the_same_bits() -> None:
    whole = agent().learn(128)
    file = io.BytesIO()
    whole.save(file)
    half = RecurrentPPO.load(io.BytesIO(file.getvalue()), env=cartpole(), device="cpu")
    for model in (whole, half):
        model.learn(128, reset_num_timesteps=False)
    ours, theirs = half.policy.state_dict(), whole.policy.state_dict()
    assert ours.keys() == theirs.keys() and "popart.mean" in ours
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert popart(half).mean > 5


def test_configs_have_it() -> None:
    assert not policy_kwargs(AgentConfig())["norm_value"]
    assert policy_kwargs(AgentConfig(norm_value=True))["norm_value"]
    assert agent(norm_value=False).policy.popart is None
