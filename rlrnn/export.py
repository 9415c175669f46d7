"""Models and agents as ONNX graphs, for ONNX Runtime and others.

The recurrent state is an input and an output: who serves a graph carries it from call
to call, and begins with zeros. A graph is replayed against torch at three lengths, or
three batch sizes, before it is called done.

B: streams. T: time steps. S, H: rows and width of the state.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlrnn.agents import RecurrentPPO
from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.data.chunks import Features, Symbols
from rlrnn.finished import load_model
from rlrnn.models import SequenceModel

TOLERANCE = 1e-4
OPSET = 17


class ModelStep(nn.Module):
    """x [B, ...], state [S, B, H] -> outputs [B, C], state after."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, after = self.model(x.unsqueeze(0), state)
        return out.squeeze(0), after


class ModelSequence(nn.Module):
    """x [T, B, ...], state [S, B, H] -> outputs [T, B, C], state after."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, after = self.model(x, state)
        return out, after


class AgentStep(nn.Module):
    """Observations [B, ...] (one input per key of a Dict), state [S, B, H] and
    episode_start [B] (1 where an episode begins) -> the likeliest actions, the
    parameters of their distribution [B, P], state after."""

    def __init__(self, policy: RecurrentPolicy, keys: Sequence[str]) -> None:
        super().__init__()
        self.policy, self.keys = policy, keys

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *parts, state, episode_start = inputs
        observations = [part.unsqueeze(0) for part in parts]
        obs: Any = observations[0]
        if self.keys:
            obs = dict(zip(self.keys, observations, strict=True))
        seen = self.policy.actor_features(obs)
        state = state * (1 - episode_start).view(1, -1, 1)
        latent, after = self.policy.actor(seen, state)
        params = self.policy.params(latent).squeeze(0)
        return self.policy.distribution.mode(params), params, after


def needs_onnx() -> None:
    """Raises ValueError without the packages of the extra."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"export needs {error.name}: pip install 'rlrnn[export]'"
        ) from None


def _export(
    module: nn.Module,
    examples: Sequence[Sequence[Tensor]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: dict[str, dict[int, str]],
    path: Path,
    card: dict[str, Any],
) -> float:
    """Writes the graph, traced on the first example; the largest difference from torch
    on all of them. Raises ValueError if that is above the tolerance."""
    import onnx
    import onnxruntime

    module.eval()
    with torch.no_grad(), warnings.catch_warnings():
        # of what a trace fixes and of batch sizes: the replay below finds out
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(examples[0]),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            # torch.export fixes or mistakes a dynamic time axis; tracing does not
            dynamo=False,
        )
    graph = onnx.load(str(path))
    for key, value in card.items():
        entry = graph.metadata_props.add()
        entry.key = key
        entry.value = value if isinstance(value, str) else json.dumps(value)
    onnx.save(graph, str(path))
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    worst = 0.0
    for example in examples:
        feed = {
            name: value.numpy() for name, value in zip(inputs, example, strict=True)
        }
        with torch.no_grad():
            expected = module(*example)
        for got, true in zip(session.run(None, feed), expected, strict=True):
            difference = np.abs(np.asarray(got, np.float64) - true.double().numpy())
            worst = max(worst, float(difference.max(initial=0.0)))
    if not worst < TOLERANCE:
        path.unlink()
        raise ValueError(
            f"the graph differs from torch by {worst:.2g}, expected less than "
            f"{TOLERANCE}: it was not kept; please report the model's options"
        )
    return worst


def export_model(
    model: SequenceModel,
    example: Tensor,
    path: Path,
    format: dict[str, Any],
    whole: bool = False,
) -> dict[str, Any]:
    """A trained model as a step, or, with `whole`, over any number of steps.

    `example` [T, B, ...] is any input. Raises ValueError for a form that would be
    wrong, a step of a bidirectional model or whole sequences of a minGRU (its scan
    depends on the length), and without the packages of `rlrnn[export]`.
    """
    needs_onnx()
    config = model.config
    if config.bidirectional and not whole:
        raise ValueError(
            "a bidirectional model has no step: it reads whole sequences; export it "
            "with --whole"
        )
    if whole and config.cell == "mingru":
        raise ValueError(
            "cell mingru exports as a step only: leave --whole, and carry the state"
        )
    model = model.cpu()
    card = {"kind": str(format.get("kind", "")), "cell": config.cell}
    random = torch.Generator().manual_seed(0)

    def sample(steps: int, batch: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(example), (steps,), generator=random)
        column = torch.randint(example.shape[1], (batch,), generator=random)
        x = example[at][:, column]
        state = model.initial_state(batch)
        if config.readout == "step":
            noise = torch.rand(state.shape, generator=random) - 0.5
            state = state + noise
        return x, state

    if whole:
        steps, axes = (6, 1, 33), {0: "T", 1: "B"}
        examples = [sample(t, 2) for t in steps]
        module: nn.Module = ModelSequence(model)
    else:
        axes = {0: "B"}
        pairs = [sample(1, batch) for batch in (2, 1, 7)]
        examples = [(x[0], state) for x, state in pairs]
        module = ModelStep(model)
    difference = _export(
        module,
        examples,
        ("x", "state"),
        ("output", "state_after"),
        {"x": axes, "output": axes, "state": {1: "B"}, "state_after": {1: "B"}},
        path,
        card,
    )
    return {"form": "whole" if whole else "step", "difference": difference}


def export_agent(policy: RecurrentPolicy, path: Path) -> dict[str, Any]:
    """An agent's step: the likeliest action. Raises ValueError without the packages of
    `rlrnn[export]`."""
    needs_onnx()
    policy = policy.cpu()
    policy.set_training_mode(False)
    space = policy.observation_space
    hidden = policy.critic_keys
    examples, keys = [], list[str]()
    random = torch.Generator().manual_seed(0)
    for batch in (2, 1, 7):
        space.seed(batch)
        samples = [space.sample() for _ in range(batch)]
        if isinstance(samples[0], dict):
            keys = [key for key in samples[0] if key not in hidden]
            parts = [
                torch.as_tensor(np.stack([one[key] for one in samples])) for key in keys
            ]
        else:
            parts = [torch.as_tensor(np.stack(samples))]
        shape = policy.actor.initial_state(batch).shape
        state = torch.rand(shape, generator=random) - 0.5
        begins = (torch.rand(batch, generator=random) < 0.3).float()
        examples.append([*parts, state, begins])
    names = [f"obs.{key}" for key in keys] or ["obs"]
    first = {name: {0: "B"} for name in (*names, "episode_start", "action", "params")}
    difference = _export(
        AgentStep(policy, keys),
        examples,
        (*names, "state", "episode_start"),
        ("action", "params", "state_after"),
        {**first, "state": {1: "B"}, "state_after": {1: "B"}},
        path,
        {"kind": "agent"},
    )
    return {"form": "step", "difference": difference}


def export_run(
    folder: str | Path, output: str | Path | None = None, whole: bool = False
) -> dict[str, Any]:
    """A finished run's model or agent as ONNX, in its folder or at `output`.

    Raises ValueError for a run without either, and as `export_model`.
    """
    folder = Path(folder)
    if (folder / "agent.zip").is_file():
        path = Path(output or folder / "agent.onnx")
        if whole:
            raise ValueError("an agent exports as a step; leave --whole")
        agent = RecurrentPPO.load(folder / "agent.zip", device="cpu")
        made = export_agent(agent.policy, path)
    else:
        finished = load_model(folder)
        path = Path(output or folder / f"model-{'whole' if whole else 'step'}.onnx")
        made = export_model(
            finished.model, _example(finished.inputs), path, finished.format, whole
        )
    return {"file": str(path), "bytes": path.stat().st_size, **made}


def _example(inputs: Symbols | Features) -> Tensor:
    """Any input, [64, 4, ...]."""
    random = torch.Generator().manual_seed(0)
    if isinstance(inputs, Symbols):
        return torch.randint(inputs.count, (64, 4), generator=random)
    return torch.randn(64, 4, inputs.width, generator=random)
