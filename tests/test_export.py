"""Exported graphs do what torch does, at lengths and batches that were never traced."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from rlrnn.agents import RecurrentPPO
from rlrnn.data.chunks import Features, Symbols
from rlrnn.export import export_agent, export_model
from rlrnn.models import ModelConfig, SequenceModel

OPTIONS: tuple[dict[str, Any], ...] = (
    {"layers": 2, "residual": True, "layer_norm": True, "projection": 7},
    {"readout": "mean"},
)


def model_of(
    inputs: Symbols | Features, **options: Any
) -> tuple[SequenceModel, Tensor]:
    torch.manual_seed(0)
    model = SequenceModel(inputs, 5, ModelConfig(hidden_size=12, **options)).eval()
    if isinstance(inputs, Symbols):
        return model, torch.randint(inputs.count, (50, 3))
    return model, torch.randn(50, 3, inputs.width)


def replay(path: Path, x: Tensor, state: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path))
    given: list[Any] = session.run(None, {"x": x.numpy(), "state": state.numpy()})
    return given


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "mingru"])
@pytest.mark.parametrize(
    "inputs", [Symbols(9), Features(3)], ids=["symbols", "numbers"]
)
def test_steps_one_after_another_are_the_sequence(
    tmp_path: Path, inputs: Symbols | Features, cell: Any, options: dict[str, Any]
) -> None:
    model, x = model_of(inputs, cell=cell, **options)
    path = tmp_path / "step.onnx"
    export_model(model, x, path, {})
    state = model.initial_state(3)
    with torch.no_grad():
        expected, after = model(x, state)
    outputs = []
    for step in x:
        output, carried = replay(path, step, state)
        outputs.append(output)
        state = torch.from_numpy(carried)
    np.testing.assert_allclose(np.stack(outputs), expected, atol=1e-5)
    np.testing.assert_allclose(state, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("options", [*OPTIONS, {"bidirectional": True}], ids=str)
def test_whole_sequences_of_any_length(
    tmp_path: Path, cell: Any, options: dict[str, Any]
) -> None:
    model, x = model_of(Features(3), cell=cell, **options)
    path = tmp_path / "whole.onnx"
    export_model(model, x, path, {}, whole=True)
    for steps, batch in ((1, 1), (2, 3), (50, 2)):
        part, state = x[:steps, :batch], model.initial_state(batch)
        with torch.no_grad():
            expected, after = model(part, state)
        output, carried = replay(path, part, state)
        np.testing.assert_allclose(output, expected, atol=1e-5)
        np.testing.assert_allclose(carried, after, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    model, x = model_of(Features(3), bidirectional=True)
    with pytest.raises(ValueError, match="a bidirectional model has no step"):
        export_model(model, x, tmp_path / "a.onnx", {})
    model, x = model_of(Features(3), cell="mingru")
    with pytest.raises(ValueError, match="cell mingru exports as a step only"):
        export_model(model, x, tmp_path / "a.onnx", {}, whole=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"norm_obs": True}, {"cell": "gru"}, {"cell": "mingru"}, {"cell": "none"}],
    ids=str,
)
def test_an_agent_acts_as_predict_does(
    tmp_path: Path, env: str, kwargs: dict[str, Any]
) -> None:
    agent = RecurrentPPO("MlpLstmPolicy", env, seed=0, n_steps=16, policy_kwargs=kwargs)
    agent.learn(16)
    path = tmp_path / "agent.onnx"
    export_agent(agent.policy, path)
    session = onnxruntime.InferenceSession(str(path))
    rng = np.random.default_rng(0)
    state: Any = None
    carried = agent.policy.actor.initial_state(4).numpy()
    for step in range(5):
        obs = rng.normal(size=(4, *(agent.observation_space.shape or ()))).astype(
            np.float32
        )
        begins = rng.random(4) < (1.0 if step == 0 else 0.3)
        actions, state = agent.predict(obs, state, begins, deterministic=True)
        begin = begins.astype(np.float32)
        feed = {"obs": obs, "episode_start": begin, "state": carried}
        names = {entry.name for entry in session.get_inputs()}
        fed = {name: value for name, value in feed.items() if name in names}
        got, _, carried = cast(Any, session.run(None, fed))
        low = getattr(agent.action_space, "low", -np.inf)
        high = getattr(agent.action_space, "high", np.inf)
        np.testing.assert_allclose(np.clip(got, low, high), actions, atol=1e-5)
