"""Observations: a tensor, or, where the space is a `Dict`, a dict of tensors."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Shaped
from torch import Tensor

# of T steps in B environments, and of one step
Sequences: TypeAlias = Shaped[Tensor, "T B ..."] | dict[str, Shaped[Tensor, "T B ..."]]
Batch: TypeAlias = Shaped[Tensor, "B ..."] | dict[str, Shaped[Tensor, "B ..."]]


def on_each(function: Callable[..., Any], *obs: Any) -> Any:
    """`function` of tensors or arrays; of dicts, key by key."""
    if isinstance(obs[0], dict):
        return {key: function(*(one[key] for one in obs)) for key in obs[0]}
    return function(*obs)


def parts(obs: Any) -> Iterable[tuple[str, Any]]:
    """The items of a dict, or of a `Dict` space; else itself, without a name."""
    return obs.items() if isinstance(obs, (dict, spaces.Dict)) else (("", obs),)


def columns(obs: Batch) -> int:
    """B."""
    return next(len(x) for _, x in parts(obs))


def outside(obs: Any, space: spaces.Space[Any]) -> Iterator[tuple[int, str]]:
    """Columns whose numbers are not among those of a discrete space: b, and what."""
    for key, part in parts(space):
        if isinstance(part, (spaces.Discrete, spaces.MultiDiscrete)):
            x = np.asarray(obs[key] if key else obs)
            limit = part.n if isinstance(part, spaces.Discrete) else part.nvec
            wrong = ((x < 0) | (x >= limit)).reshape(len(x), -1).any(1)
            for b in np.flatnonzero(wrong):
                yield int(b), f"{key} {x[b]}, outside of {part}".strip()


def infinite(obs: Any, axes: int) -> Bool[Tensor, "..."]:
    """Which observations are not finite; they have `axes` axes before their own."""
    result = torch.tensor(False)
    for _, x in parts(obs):
        bad = x.new_zeros(x.shape[:axes], dtype=torch.bool)
        if x.is_floating_point():
            bad = ~x.isfinite().flatten(axes).all(-1)
        result = result | bad
    return result
