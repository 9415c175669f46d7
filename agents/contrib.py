"""Agents that sb3-contrib's `RecurrentPPO` saved, read into ours.

Such a file is a zip: settings as JSON, in which some values are pickles, and weights
and optimiser as torch files. The latter are read without running code. A pickle can run
any, so it is opened only on trust, and only for the settings that an agent needs.
"""

import base64
import inspect
import io
import json
import os
import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from torch import Tensor, nn

Where = str | os.PathLike[str] | io.BufferedIOBase

DATA, WEIGHTS, OPTIMIZER = "data", "policy.pth", "policy.optimizer.pth"
POLICIES = {
    "RecurrentActorCriticPolicy": "MlpLstmPolicy",
    "RecurrentActorCriticCnnPolicy": "CnnLstmPolicy",
    "RecurrentMultiInputActorCriticPolicy": "MultiInputLstmPolicy",
}
# Their names of weights, and ours; all others are the same.
PREFIXES = (
    ("lstm_actor.", "actor.stack."),
    ("lstm_critic.", "critic.stack."),
    ("mlp_extractor.policy_net.", "actor_mlp."),
    ("mlp_extractor.value_net.", "critic_mlp."),
    ("vf_features_extractor.", "critic_extractor."),
)
# What our policies may lack, where it is as it would be without.
USUAL: dict[str, Any] = {
    "use_sde": False,
    "full_std": True,
    "use_expln": False,
    "squash_output": False,
    "share_features_extractor": True,
    "optimizer_class": torch.optim.Adam,
    "lstm_kwargs": None,
}


class Saved(NamedTuple):
    """What a file says: arguments of the constructor, spaces, weights, counters."""

    settings: dict[str, Any]
    observation_space: Any
    action_space: Any
    n_envs: int
    num_timesteps: int
    n_updates: int
    progress_remaining: float
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def recognises(path: Where) -> bool:
    """Whether `path` is a zip of Stable-Baselines3 or sb3-contrib."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {DATA, WEIGHTS} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    finally:
        if not isinstance(path, (str, os.PathLike)):
            path.seek(0)


def read_parameters(path: Where) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, by their names, and the state of the optimiser. Runs no code."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        weights = _tensors(archive, WEIGHTS)
        optimizer = _tensors(archive, OPTIMIZER) if OPTIMIZER in names else {}
    if "lstm_actor.weight_hh_l0" not in weights:
        raise ValueError(
            f"{_name(path)} holds an agent of Stable-Baselines3 without an LSTM: "
            "expected one of sb3-contrib's RecurrentPPO; load it with its own class"
        )
    return weights, optimizer


def read(
    path: Where, names: Iterable[str], given: Collection[str], trust: bool
) -> Saved:
    """All that an agent needs; the settings in `names`, but for those `given`."""
    if not trust:
        raise ValueError(
            f"{_name(path)} was saved by Stable-Baselines3 or sb3-contrib: its "
            "settings are pickles, which can run code; if you trust where it comes "
            "from, pass load(..., trust=True), and save() it as a file without code"
        )
    weights, optimizer = read_parameters(path)
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read(DATA))
    source = _name(path)
    settings = {}
    for name in names:
        stored = {
            "policy": "policy_class",
            "stats_window_size": "_stats_window_size",
        }.get(name, name)
        if stored in data and name not in given:
            settings[name] = _plain(_value(data, stored, source, name))
    if not isinstance(settings.get("policy", ""), str):
        raise ValueError(
            f"{source} has the policy {settings['policy']!r}: expected one of "
            f"sb3-contrib's; pass load(..., policy='MlpLstmPolicy') if it is alike"
        )
    if "policy_kwargs" in settings:
        kwargs = dict(settings["policy_kwargs"] or {})
        kwargs.pop("device", None)
        arch = kwargs.get("net_arch")
        if isinstance(arch, list) and arch and isinstance(arch[0], dict):
            kwargs["net_arch"] = arch[0]  # before Stable-Baselines3 1.8
        if arch is None:  # the default depends on what is in front of it
            kwargs["net_arch"] = {
                "pi": _widths(weights, "mlp_extractor.policy_net."),
                "vf": _widths(weights, "mlp_extractor.value_net."),
            }
        settings["policy_kwargs"] = kwargs
    return Saved(
        settings,
        _value(data, "observation_space", source),
        _value(data, "action_space", source),
        int(data["n_envs"]),
        int(data["num_timesteps"]),
        int(data["_n_updates"]),
        float(data["_current_progress_remaining"]),
        weights,
        optimizer,
    )


def fitting(kwargs: Mapping[str, Any], policy: type[nn.Module]) -> dict[str, Any]:
    """Their `policy_kwargs` for our `policy`; ValueError for what it cannot do."""
    known = inspect.signature(policy.__init__).parameters
    result = {}
    for key, value in kwargs.items():
        if key in known:
            result[key] = value
        elif not (key in USUAL and (value == USUAL[key] or not value)):
            raise ValueError(
                f"the file's policy_kwargs have {key}={value!r}, which "
                f"{policy.__name__} does not support; it cannot be imported"
            )
    return result


def load_parameters(
    policy: Any, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]
) -> None:
    """Put their weights, and what their Adam remembers of each, into our policy."""
    own = policy.state_dict()
    # without the aliases of an extractor that actor and critic share
    kept = {
        name: _ours(name)
        for name in weights
        if not name.startswith(("pi_features_extractor.", "vf_features_extractor."))
        or _ours(name) in own
    }
    shapes = {ours: weights[name].shape for name, ours in kept.items()}
    wrong = {name for name in own if shapes.get(name) != own[name].shape}
    if wrong := wrong | (shapes.keys() - own.keys()):
        first = min(wrong)
        there, here = (
            list(x) if x is not None else "nothing"
            for x in (shapes.get(first), getattr(own.get(first), "shape", None))
        )
        raise ValueError(
            f"the file's weights are of another policy: {first} is {there}, expected "
            f"{here}; check policy_kwargs"
        )
    policy.load_state_dict({ours: weights[name] for name, ours in kept.items()})
    if not optimizer:
        return
    order = {name: i for i, (name, _) in enumerate(policy.named_parameters())}
    (group,) = optimizer["param_groups"]
    theirs = [ours for ours in kept.values() if ours in order]
    if len(theirs) != len(group["params"]):
        raise ValueError(
            f"the file's optimiser has {len(group['params'])} parameters, its policy "
            f"{len(theirs)}: expected one group for all; it cannot be imported"
        )
    ours = policy.optimizer.state_dict()
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        if key in group:
            ours["param_groups"][0][key] = group[key]
    ours["state"] = {order[theirs[i]]: s for i, s in optimizer["state"].items()}
    policy.optimizer.load_state_dict(ours)


def _ours(name: str) -> str:
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _widths(weights: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Of the layers of an MLP, in their order."""
    layers = {
        int(name.removeprefix(prefix).removesuffix(".weight")): len(weight)
        for name, weight in weights.items()
        if name.startswith(prefix) and name.endswith(".weight")
    }
    return [layers[i] for i in sorted(layers)]


def _tensors(archive: zipfile.ZipFile, name: str) -> Any:
    try:
        data = io.BytesIO(archive.read(name))
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds
        raise ValueError(
            f"{_name(archive.filename or 'the file')} is damaged: {name} cannot be "
            f"read ({_line(error)}); use another copy"
        ) from error


def _value(data: Mapping[str, Any], key: str, source: str, option: str = "") -> Any:
    """A value of the JSON; pickles are opened."""
    value = data[key]
    if not (isinstance(value, dict) and ":serialized:" in value):
        return value
    try:
        return _Unpickler(io.BytesIO(base64.b64decode(value[":serialized:"]))).load()
    except Exception as error:  # whatever the code in it raises
        hint = f"; pass load(..., {option}=...)" if option else ""
        raise ValueError(
            f"{key} in {source} cannot be unpickled here ({_line(error)}): expected "
            f"what it needs to be installed{hint}"
        ) from error


class _Unpickler(pickle.Unpickler):
    """sb3-contrib need not be installed for its policies to be known."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("sb3_contrib.") and name in POLICIES:
            return POLICIES[name]
        if module.split(".")[0] == "gym":  # files of before Stable-Baselines3 2.0
            module = f"gymnasium{module[3:]}"
        return super().find_class(module, name)


def _plain(value: Any) -> Any:
    """Constant schedules as their numbers."""
    if isinstance(value, FloatSchedule):
        value = value.value_schedule
    return value.val if isinstance(value, ConstantSchedule) else value


def _name(path: object) -> str:
    if isinstance(path, (str, os.PathLike)):
        return str(path)
    return str(getattr(path, "name", "the file"))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
