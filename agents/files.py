"""The file of an agent: settings, spaces and `state_dict()`; sb3-contrib's, too."""

import os
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv

from rlrnn import checkpoint
from rlrnn.agents import contrib
from rlrnn.agents.contrib import Where
from rlrnn.agents.storage import (
    Unstorable,
    decode,
    decode_space,
    encode,
    encode_space,
)
from rlrnn.agents.vector import AnyEnv

# What the constructor is given, in its order; the file holds these too.
SETTINGS = (
    "policy",
    "learning_rate",
    "n_steps",
    "batch_size",
    "n_epochs",
    "gamma",
    "gae_lambda",
    "clip_range",
    "clip_range_vf",
    "normalize_advantage",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "use_sde",
    "sde_sample_freq",
    "target_kl",
    "stats_window_size",
    "tensorboard_log",
    "policy_kwargs",
    "verbose",
    "seed",
    "reward_scale",
    "norm_reward",
    "recompute_states",
    "bptt_truncation",
)


def save(agent: Any, path: Where) -> None:
    """See `RecurrentPPO.save`."""
    settings: dict[str, Any] = {}
    missing: list[str] = []
    for name in SETTINGS:
        if name == "policy":
            names = {made: name for name, made in agent.policy_aliases.items()}
            value: Any = names.get(agent.policy_class, agent.policy_class)
        elif name == "stats_window_size":
            value = agent._stats_window_size
        else:
            value = getattr(agent, name)
        try:
            settings[name] = encode(value)
        except Unstorable:
            missing.append(name)
    tree = {
        "settings": settings,
        "missing": missing,
        "observation_space": encode_space(agent.observation_space),
        "action_space": encode_space(agent.action_space),
        "n_envs": agent.n_envs,
        "state": agent.state_dict(),
    }
    checkpoint.save(_with_suffix(path), tree, {"kind": "agent"})


def load(
    cls: type[Any],
    path: Where,
    env: AnyEnv | str | None,
    device: torch.device | str,
    trust: bool,
    overrides: dict[str, Any],
) -> Any:
    """See `RecurrentPPO.load`; an agent of the class `cls`."""
    if unknown := overrides.keys() - set(SETTINGS):
        raise ValueError(
            f"load was given {', '.join(sorted(unknown))}: expected arguments of the "
            "constructor; set other attributes of the agent afterwards"
        )
    path = existing(path)
    if contrib.recognises(path):
        return _imported(cls, path, env, device, trust, overrides)
    name = path if isinstance(path, Path) else getattr(path, "name", "the file")
    tree = checkpoint.load(path)
    if not (isinstance(tree, dict) and "observation_space" in tree):
        raise ValueError(f"{name} is a checkpoint of something else than an agent")
    if absent := set(tree["missing"]) - overrides.keys():
        raise ValueError(
            f"{name} cannot hold {', '.join(sorted(absent))}, which was code: "
            f"expected as an argument; pass load(..., {min(absent)}=...)"
        )
    agent = _assembled(
        cls,
        {**decode(tree["settings"]), **overrides},
        decode_space(tree["observation_space"]),
        decode_space(tree["action_space"]),
        tree["n_envs"],
        env,
        device,
    )
    normalized = "obs" in (tree["state"]["normalize"] or {})
    if normalized and agent.env is not None and agent._vec_normalize_env is None:
        raise ValueError(
            f"{name} learned on normalised observations, env has them raw: "
            "expected a VecNormalize, into which the statistics go; wrap env"
        )
    try:
        agent.load_state_dict(tree["state"])
    except RuntimeError as error:  # torch lists all weights, a line each
        raise ValueError(
            f"{name} has the weights of another policy than its settings and "
            f"{sorted(overrides) or 'no'} overrides make: expected the same; leave "
            "policy and policy_kwargs out"
        ) from error
    return agent


def _imported(
    cls: type[Any],
    path: Where,
    env: AnyEnv | str | None,
    device: torch.device | str,
    trust: bool,
    overrides: dict[str, Any],
) -> Any:
    """An agent of sb3-contrib: its weights, optimiser, settings and counters."""
    saved = contrib.read(path, SETTINGS, overrides.keys(), trust)
    settings = {**saved.settings, **overrides}
    policy = settings["policy"]
    if isinstance(policy, str) and policy not in cls.policy_aliases:
        raise ValueError(
            f"the file has a {policy}, which is not supported yet: expected one "
            f"of {', '.join(cls.policy_aliases)}"
        )
    chosen = cls.policy_aliases[policy] if isinstance(policy, str) else policy
    settings["policy_kwargs"] = contrib.fitting(
        settings.get("policy_kwargs") or {}, chosen
    )
    agent = _assembled(
        cls,
        settings,
        saved.observation_space,
        saved.action_space,
        saved.n_envs,
        env,
        device,
    )
    contrib.load_parameters(agent.policy, saved.weights, saved.optimizer)
    agent.num_timesteps = saved.num_timesteps
    agent._n_updates = saved.n_updates
    agent._current_progress_remaining = saved.progress_remaining
    return agent


def _assembled(
    cls: type[Any],
    settings: dict[str, Any],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    n_envs: int,
    env: AnyEnv | str | None,
    device: torch.device | str,
) -> Any:
    """A new agent for these spaces, which `env` must have."""
    if env is not None:
        if isinstance(env, str):
            env = maybe_make_env(env, settings["verbose"])
        env = cls._wrap_env(env)
        assert isinstance(env, VecEnv)
        check_for_correct_spaces(env, observation_space, action_space)
    agent = cls(env=env, device=device, _init_setup_model=False, **settings)
    if env is None:
        agent.observation_space = observation_space
        agent.action_space = action_space
        agent.n_envs = n_envs
    agent._setup_model()
    return agent


def existing(path: Where) -> Where:
    """The file at `path`, or at that with the suffix it was saved with."""
    if isinstance(path, (str, os.PathLike)) and Path(path).is_file():
        return path
    return _with_suffix(path)


def _with_suffix(path: Where) -> Where:
    """`agent` → `agent.zip`, as Stable-Baselines3 has it; file objects as they are."""
    if not isinstance(path, (str, os.PathLike)):
        return path
    path = Path(path)
    return path if path.suffix == ".zip" else path.with_name(f"{path.name}.zip")
