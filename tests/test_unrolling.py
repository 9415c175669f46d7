"""How far an update looks back: truncated gradients, and states that are stale."""

import io
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

import rlrnn  # noqa: F401  (registers the environments)
from rlrnn.agents import RecurrentPolicy, RecurrentPPO
from rlrnn.agents.rollout import Minibatch, minibatches
from rlrnn.config import AgentConfig

T, B, D = 7, 3, 2
VARIANTS: list[dict[str, Any]] = [
    {},
    {"cell": "gru", "n_lstm_layers": 2},
    {"cell": "mingru"},
    {"cell": "none"},
    {"shared_lstm": True, "enable_critic_lstm": False},
    {"n_lstm_layers": 2, "lstm_kwargs": {"dropout": 0.3}},
]
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy_of(**kwargs: Any) -> RecurrentPolicy:
    box = spaces.Box(-np.inf, np.inf, (D,), np.float32)
    settings = {"lstm_hidden_size": 6, "net_arch": [5], **kwargs}
    policy = RecurrentPolicy(box, spaces.Discrete(3), lambda _: 1e-3, **settings)
    policy.set_training_mode(False)
    return policy


def sequence(policy: RecurrentPolicy) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    state = torch.randn(policy.initial_state(B).shape, generator=g)
    return torch.randn(T, B, D, generator=g), state, torch.zeros(T, B).bool()


def agent(policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> RecurrentPPO:
    env: Any = gymnasium.make_vec("rlrnn/CartPoleHiddenVelocity-v0", num_envs=4)
    settings: dict[str, Any] = {
        "n_steps": 24,
        "batch_size": 8,
        "n_epochs": 3,
        "learning_rate": 0.01,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]},
    }
    settings["policy_kwargs"] |= policy_kwargs or {}
    return RecurrentPPO("MlpLstmPolicy", env, **{**settings, **kwargs})


def weights(model: RecurrentPPO) -> Tensor:
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


# --- truncation -----------------------------------------------------------------------


@variants
@pytest.mark.parametrize("truncation", [1, 3, T + 2])
def test_truncation_changes_gradients_only(
    variant: dict[str, Any], truncation: int
) -> None:
    """Those of step t go back to the last multiple of K, and no further."""
    policy = policy_of(**variant)
    obs, state, starts = sequence(policy)
    expected = policy.evaluate_sequence(obs, state, starts)
    obs.requires_grad_()
    found = policy.evaluate_sequence(obs, state, starts, truncation)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    params, values, _ = found
    # a shared critic sends no gradient back
    outputs = [params] if "shared_lstm" in variant else [params, values]
    for t in range(T):
        first = t if variant.get("cell") == "none" else t // truncation * truncation
        for output in outputs:
            (grad,) = torch.autograd.grad(output[t].sum(), obs, retain_graph=True)
            reached = grad.flatten(1).any(1).nonzero().flatten()
            assert reached.tolist() == list(range(first, t + 1))


@variants
def test_truncation_is_windows_one_by_one(variant: dict[str, Any]) -> None:
    policy = policy_of(**variant)
    obs, state, starts = sequence(policy)
    starts[4, 1] = True
    gradients = []
    for by_hand in (False, True):
        if by_hand:
            parts, after = [], state
            for begin in (0, 3, 6):
                now = slice(begin, begin + 3)
                *part, after = policy.evaluate_sequence(
                    obs[now], after.detach(), starts[now]
                )
                parts.append(part)
            params, values = (torch.cat(part) for part in zip(*parts, strict=True))
        else:
            params, values, _ = policy.evaluate_sequence(obs, state, starts, 3)
        loss = params.square().sum() + values.square().sum()
        gradients.append(torch.autograd.grad(loss, list(policy.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_truncation_beyond_the_segment_changes_no_bit() -> None:
    results = []
    for truncation in (None, 24, 100, 5):
        model = agent(batch_size=48, bptt_truncation=truncation)
        model.learn(2 * 96)
        results.append(weights(model))
    whole, same, also, shorter = results
    assert torch.equal(same, whole) and torch.equal(also, whole)
    assert not torch.equal(shorter, whole)


# --- stale states ---------------------------------------------------------------------


def played_again(model: RecurrentPPO) -> Tensor:
    """States where segments begin, step by step through the rollout."""
    rollout, policy = model.rollout_buffer, model.policy
    length = len(rollout.starts) // len(rollout.states)
    training = policy.training
    policy.set_training_mode(False)
    state, states = rollout.states[0], []
    assert isinstance(rollout.obs, Tensor)
    with torch.no_grad():
        for t in range(len(rollout.starts)):
            if t % length == 0:
                states.append(state)
            now = slice(t, t + 1)
            _, _, state = policy.evaluate_sequence(
                rollout.obs[now], state, rollout.starts[now]
            )
    policy.set_training_mode(training)
    return torch.stack(states)


@pytest.mark.parametrize(
    ("variant", "recompute"), [({}, False), *((variant, True) for variant in VARIANTS)]
)
def test_states_of_each_epoch(
    variant: dict[str, Any], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has those that were stored, in which its ratio is 1; later ones have
    what the current weights make of the same observations, or the stored ones."""
    model = agent(variant, recompute_states=recompute)
    used: list[Tensor] = []
    fresh: list[Tensor] = []

    def spy(segments: Minibatch, *rest: Any) -> Iterator[Minibatch]:
        used.append(segments.state)
        fresh.append(played_again(model).transpose(0, 1).flatten(1, 2))
        assert model.policy.training
        return minibatches(segments, *rest)

    monkeypatch.setattr("rlrnn.agents.ppo.minibatches", spy)
    for rollout in range(2):
        model.learn(96, reset_num_timesteps=False)
        stored = model.rollout_buffer.states.transpose(0, 1).flatten(1, 2)
        epochs = slice(3 * rollout, 3 * rollout + 3)
        assert torch.equal(used[epochs][0], stored)
        torch.testing.assert_close(fresh[epochs][0], stored)
        for state, wanted in zip(used[epochs][1:], fresh[epochs][1:], strict=True):
            torch.testing.assert_close(state, wanted if recompute else stored)
            if variant.get("cell") != "none":
                assert not torch.allclose(wanted, stored, rtol=1e-3, atol=1e-4)


def test_one_epoch_has_nothing_to_recompute() -> None:
    """And no step of the rollout or of an epoch's first minibatch is another."""
    once = [agent(n_epochs=1, recompute_states=on) for on in (True, False)]
    thrice = [agent(n_epochs=3, recompute_states=on) for on in (True, False)]
    for model in (*once, *thrice):
        model.learn(96)
    assert torch.equal(weights(once[0]), weights(once[1]))
    assert not torch.equal(weights(thrice[0]), weights(thrice[1]))


# --- as options -----------------------------------------------------------------------


def test_a_file_holds_both() -> None:
    model, file = agent(recompute_states=True, bptt_truncation=3), io.BytesIO()
    model.learn(96)
    model.save(file)
    again = RecurrentPPO.load(io.BytesIO(file.getvalue()), device="cpu")
    assert (again.recompute_states, again.bptt_truncation) == (True, 3)
    assert torch.equal(weights(again), weights(model))


def test_what_makes_no_sense_is_said() -> None:
    with pytest.raises(ValueError, match="bptt_truncation is 0: expected a whole"):
        agent(bptt_truncation=0)
    with pytest.raises(ValueError, match=r"agent\.bptt_truncation is 0, expected"):
        AgentConfig(bptt_truncation=0)
    with pytest.warns(UserWarning, match="nothing to recompute"):
        agent(recompute_states=True, batch_size=48)
    with warnings.catch_warnings(action="error"):
        agent(recompute_states=True, batch_size=12)
