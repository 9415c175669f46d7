"""Parts of an agent as plain trees, and back. Nothing in a tree is ever executed.

Spaces, schedules and network classes are written by name from a fixed list. What is not
on it, a function of one's own, cannot be stored: `Unstorable` says so.
"""

from collections import OrderedDict
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import (
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.utils import (
    ConstantSchedule,
    FloatSchedule,
    LinearSchedule,
)
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn, optim

from rlrnn.agents.observations import on_each

CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        nn.Tanh,
        nn.ReLU,
        nn.ELU,
        nn.GELU,
        nn.SiLU,
        nn.LeakyReLU,
        nn.Identity,
        nn.CELU,
        nn.Hardswish,
        nn.Mish,
        nn.ReLU6,
        nn.SELU,
        nn.Sigmoid,
        nn.Softplus,
        nn.Softsign,
        FlattenExtractor,
        NatureCNN,
        CombinedExtractor,
        optim.Adam,
        optim.AdamW,
        optim.RMSprop,
        optim.SGD,
        optim.Adagrad,
        optim.Adamax,
        optim.NAdam,
        optim.RAdam,
        RMSpropTFLike,
    )
}


class Unstorable(ValueError):
    """A function or class of one's own, which a file without code cannot hold."""


def encode(value: Any) -> Any:
    """Plain scalars, lists, tuples and dicts of strings, for a checkpoint."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.generic():
            return value.item()
        case list() | tuple():
            return type(value)(encode(item) for item in value)
        case dict():
            return {key: encode(item) for key, item in value.items()}
        case FloatSchedule():
            return encode(value.value_schedule)
        case ConstantSchedule():
            return value.val
        case LinearSchedule():
            return {"$linear": [value.start, value.end, value.end_fraction]}
        case type(__name__=name) if CLASSES.get(name) is value:
            return {"$class": name}
    raise Unstorable(f"{value!r} cannot be stored")


def decode(tree: Any) -> Any:
    """The inverse of `encode`, but for constant schedules, which become numbers."""
    match tree:
        case {"$linear": [float() | int() as start, float() | int() as end, fraction]}:
            return LinearSchedule(start, end, float(fraction))
        case {"$class": str() as name}:
            if name not in CLASSES:
                raise ValueError(
                    f"the file names the class {name[:40]!r}, expected one of "
                    f"{', '.join(CLASSES)}"
                )
            return CLASSES[name]
        case dict():
            return {key: decode(item) for key, item in tree.items()}
        case list() | tuple():
            return type(tree)(decode(item) for item in tree)
    return tree


def encode_space(space: spaces.Space[Any]) -> dict[str, Any]:
    """A tree with the exact bounds; for the spaces that the agent supports."""
    match space:
        case spaces.Box():
            return {
                "type": "Box",
                "low": space.low.copy(),
                "high": space.high.copy(),
                "dtype": space.dtype.name,
            }
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n)}
        case spaces.MultiDiscrete():
            return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
        case spaces.MultiBinary():
            n = space.n  # MultiBinary(5) is not equal to MultiBinary([5])
            return {"type": "MultiBinary", "shape": n if isinstance(n, int) else [*n]}
        case spaces.Dict():
            parts = [[key, encode_space(part)] for key, part in space.spaces.items()]
            return {"type": "Dict", "parts": parts}
    raise Unstorable(f"{space} cannot be stored")


def decode_space(tree: dict[str, Any]) -> spaces.Space[Any]:
    """The inverse of `encode_space`."""
    match tree:
        case {"type": "Box", "low": low, "high": high, "dtype": str() as dtype}:
            return spaces.Box(low, high, dtype=np.dtype(dtype).type)
        case {"type": "Discrete", "n": int() as n}:
            return spaces.Discrete(n)
        case {"type": "MultiDiscrete", "nvec": list() as nvec}:
            return spaces.MultiDiscrete(nvec)
        case {"type": "MultiBinary", "shape": int() | list() as shape}:
            return spaces.MultiBinary(shape)
        case {"type": "Dict", "parts": list() as parts}:
            # in this order: a plain dict would be sorted
            return spaces.Dict(OrderedDict((k, decode_space(p)) for k, p in parts))
    raise ValueError(f"the file describes an unknown space: {str(tree)[:80]}")


def statistics(normalize: VecNormalize) -> dict[str, Any]:
    """The running statistics of a VecNormalize, as arrays."""

    def moments(r: RunningMeanStd) -> dict[str, Any]:
        return {"mean": np.asarray(r.mean), "var": np.asarray(r.var), "count": r.count}

    result = {"ret": moments(normalize.ret_rms), "returns": normalize.returns.copy()}
    if normalize.norm_obs:
        result["obs"] = on_each(moments, normalize.obs_rms)
    return result


def restore_statistics(normalize: VecNormalize, tree: dict[str, Any]) -> None:

    def restore(r: RunningMeanStd, moments: dict[str, Any]) -> None:
        r.mean, r.var, r.count = (moments[k] for k in ("mean", "var", "count"))

    restore(normalize.ret_rms, tree["ret"])
    if normalize.norm_obs and "obs" in tree:
        on_each(restore, normalize.obs_rms, tree["obs"])
    if tree["returns"].shape == normalize.returns.shape:
        normalize.returns = tree["returns"]
