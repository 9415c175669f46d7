"""A new model that begins with what another run has learned.

Encoder and recurrent layers are taken. Of a vocabulary the symbols that both know are
taken, and new ones begin with fresh weights; a head for something else is fresh.
"""

import json
from typing import Any

import torch
from torch import Tensor

from rlrnn.data.chunks import Symbols
from rlrnn.finished import Finished, same
from rlrnn.models import SequenceModel
from rlrnn.objectives import Classes

# What makes the weights of the recurrent layers what they are.
CORE = ("cell", "hidden_size", "layers", "bidirectional", "residual", "layer_norm")


def transfer(
    model: SequenceModel, format: dict[str, Any], source: Finished
) -> dict[str, str]:
    """Copies weights from `source` into `model`, whose data have this `format`; what
    was taken of each part, in words.

    Raises ValueError if the recurrent layers are not of one form.
    """
    config, theirs = model.config, source.model.config
    for name in CORE:
        if getattr(config, name) != getattr(theirs, name):
            raise ValueError(
                f"model.{name} is {getattr(config, name)!r}, but the run to begin with "
                f"has {getattr(theirs, name)!r}; expected the same"
            )
    if model.encoded != source.model.encoded and config.embedding_size is None:
        raise ValueError(
            f"the first layer reads {model.encoded} numbers, in the run to begin with "
            f"{source.model.encoded}; set model.embedding_size in both, to the same"
        )
    new, old = model.state_dict(), source.model.state_dict()
    shared = _shared(format, source.format)
    taken = {}
    with torch.no_grad():
        for part in ("encoder", "cores", "norms", "projection", "head"):
            keys = [key for key in new if key.startswith(f"{part}.")]
            if not keys:
                continue
            fits = all(key in old and new[key].shape == old[key].shape for key in keys)
            rows = shared if _speaks(model, source, part) else None
            if rows is not None:
                for key in keys:
                    new[key][rows[0]] = old[key][rows[1]]
                taken[part] = f"{len(rows[0])} of {len(new[keys[0]])} symbols"
            elif fits and (part != "head" or same(format, source.format)):
                for key in keys:
                    new[key].copy_(old[key])
                taken[part] = "all"
            else:
                taken[part] = "nothing"
    if taken["cores"] != "all":
        raise ValueError(
            "the recurrent layers differ in size from those of the run to begin with; "
            "expected the same model.hidden_size and model.embedding_size"
        )
    return taken


def _speaks(model: SequenceModel, source: Finished, part: str) -> bool:
    """Whether a part has a row for each symbol, in both models."""
    if part == "encoder":
        both = (model.inputs, source.inputs)
        return all(isinstance(inputs, Symbols) for inputs in both)
    if part != "head" or not isinstance(model.inputs, Symbols):
        return False
    if not isinstance(source.inputs, Symbols):
        return False
    return (
        isinstance(source.objective, Classes)
        and source.objective.outputs == source.inputs.count
        and model.head.out_features == model.inputs.count
        and model.head.in_features == source.model.head.in_features
    )


def _shared(new: dict[str, Any], old: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The rows of the symbols that both know, in the new order and in the old one."""
    ours, theirs = _names(new), _names(old)
    if ours is None or theirs is None or new.get("level") != old.get("level"):
        return None
    place = {name: row for row, name in enumerate(theirs)}
    pairs = [(row, place[name]) for row, name in enumerate(ours) if name in place]
    rows = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return rows[:, 0], rows[:, 1]


def _names(format: dict[str, Any]) -> list[str] | None:
    """The symbols of a text's vocabulary, in their order."""
    match format.get("level"):
        case "characters" | "words":
            return list(format["vocabulary"])
        case "bytes":
            return [str(byte) for byte in range(256)]
        case "bpe":
            pieces = json.loads(format["vocabulary"])["model"]["vocab"]
            return sorted(pieces, key=lambda piece: int(pieces[piece]))
        case _:
            return None
