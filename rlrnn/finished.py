"""The model of a finished run, in one safe file: what prediction, export and transfer
begin with. It needs no training data."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrnn import checkpoint, seeding
from rlrnn.data.chunks import Features, Symbols
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Classes, Ctc, Labels, Numbers, Objective
from rlrnn.tracking import NotARunError
from rlrnn.training import Trainer

KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Classes, Labels, Numbers, Ctc, Symbols, Features)
}


@dataclass(frozen=True)
class Finished:
    """A trained model, what its outputs mean, and the format of its data."""

    model: SequenceModel
    inputs: Symbols | Features
    objective: Objective
    format: dict[str, Any]
    config: dict[str, Any]  # of the run


def save_model(path: Path, trainer: Trainer, config: dict[str, Any]) -> None:
    """Write `model.zip`: the weights that the run is for."""
    with trainer.kept_weights():
        weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    tree = {
        "model": weights,
        "inputs": _to_tree(trainer.problem.inputs),
        "objective": _to_tree(trainer.problem.objective),
        "format": trainer.problem.format,
        "config": config,
    }
    checkpoint.save(path, tree, {"kind": "model"})


def load_model(run: str | Path, device: torch.device | str = "cpu") -> Finished:
    """The model of a run folder, or of a `model.zip`, ready to evaluate.

    Raises NotARunError if there is none, CheckpointError for a damaged file, ValueError
    for a file of something else.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "model.zip"
    if not path.is_file():
        raise NotARunError(
            f"{run} has no model.zip: expected the folder of a finished `rlrnn fit`; "
            f"go on with --resume {run} if it was stopped"
        )
    tree = checkpoint.load(path)
    if not (isinstance(tree, dict) and "objective" in tree and "model" in tree):
        raise ValueError(f"{path} is no model: expected a file that `rlrnn fit` wrote")
    inputs, objective = _from_tree(tree["inputs"]), _from_tree(tree["objective"])
    config = ModelConfig(**tree["config"]["model"])
    with seeding.initialising(0, "model"):  # no global random state is drawn from
        model = SequenceModel(inputs, objective.outputs, config)
    model.load_state_dict(tree["model"])
    model.eval()
    return Finished(model.to(device), inputs, objective, tree["format"], tree["config"])


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same values: formats of two data sets, say."""
    if isinstance(a, dict):
        keys = isinstance(b, dict) and a.keys() == b.keys()
        return keys and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        length = isinstance(b, (list, tuple)) and len(a) == len(b)
        return length and all(map(same, a, b))
    if isinstance(a, (np.ndarray, torch.Tensor)):
        alike = type(a) is type(b) and a.shape == b.shape
        return alike and bool(np.array_equal(a, b, equal_nan=a.dtype != object))
    return bool(a == b)


def _to_tree(value: Any) -> dict[str, Any]:
    return {"type": type(value).__name__, **dataclasses.asdict(value)}


def _from_tree(tree: dict[str, Any]) -> Any:
    fields = dict(tree)
    return KINDS[fields.pop("type")](**fields)
