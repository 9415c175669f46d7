"""Observations: a tensor, or, where the space is a `Dict`, a dict of tensors."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

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


def infinite(obs: Any, axes: int) -> Bool[Tensor, "..."]:
    """Which observations are not finite; they have `axes` axes before their own."""
    result = torch.tensor(False)
    for _, x in parts(obs):
        bad = x.new_zeros(x.shape[:axes], dtype=torch.bool)
        if x.is_floating_point():
            bad = ~x.isfinite().flatten(axes).all(-1)
        result = result | bad
    return result
