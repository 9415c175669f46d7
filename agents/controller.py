"""The recurrent agent as a controller of supervised training.

A controller file is one `.zip` of `rlrnn.checkpoint`: the weights of a
`RecurrentPolicy` at the codec's spaces, and a card that says how they came about.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rlrnn import checkpoint
from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.control import (
    ACTIONS,
    FEATURES,
    NO_OP,
    Ablation,
    Codec,
    Familiar,
    Player,
    State,
    Steered,
)

Ranges = tuple[NDArray[np.float32], NDArray[np.float32]]

SHIPPED = Path(__file__).parent / "controller.zip"
OBSERVATIONS = spaces.Box(-5.0, 5.0, (len(FEATURES),), np.float32)

# How the untrained policy plays: it mostly leaves the prior alone, and seldom goes far.
RATE_PROBABILITIES = (0.005, 0.02, 0.075, 0.8, 0.075, 0.02, 0.005)
TRUNCATION_PROBABILITIES = (0.04, 0.92, 0.04)


def initial_logits(scale: float = 1.0) -> list[float]:
    """The action head of an untrained controller; its likeliest action is no-op."""
    both = (*RATE_PROBABILITIES, *TRUNCATION_PROBABILITIES)
    return [float(logit) for logit in scale * np.log(both)]


class PolicyPlayer:
    """A `RecurrentPolicy` as a `rlrnn.control.Player`: its likeliest actions."""

    def __init__(self, policy: RecurrentPolicy) -> None:
        self.policy = policy

    def init(self, n: int) -> State:
        return {"recurrent": None}

    def __call__(
        self, observation: NDArray[np.float32], state: State
    ) -> tuple[NDArray[np.int64], State]:
        actions, recurrent = self.policy.predict(
            observation, state["recurrent"], deterministic=True
        )
        return actions, {"recurrent": recurrent}


def learned(
    policy: RecurrentPolicy, ablation: Ablation = "none", ranges: Ranges | None = None
) -> Steered:
    """The controller that plays `policy`, under the ablation that it learned with; with
    `ranges`, the least and the greatest observation [D] then, it leaves the prior alone
    where it is outside them."""
    player: Player = PolicyPlayer(policy)
    if ranges is not None:
        player = Familiar(player, *ranges)
    return Steered(player, Codec(ablation=ablation))


def save_controller(
    path: str | os.PathLike[str],
    policy: RecurrentPolicy,
    policy_kwargs: dict[str, Any],
    card: dict[str, Any],
    ablation: Ablation = "none",
    ranges: Ranges | None = None,
) -> None:
    """Write a controller file: no optimiser, no environment, nothing to run. `ranges`
    as in `learned`."""
    tree = {
        "policy": dict(policy.state_dict()),
        "policy_kwargs": policy_kwargs,
        "features": list(FEATURES),
        "ablation": ablation,
        "ranges": None if ranges is None else list(ranges),
    }
    checkpoint.save(path, tree, {"kind": "controller", **card})


def load_controller(path: str | os.PathLike[str] = SHIPPED) -> Steered:
    """The controller in a file; without a path, the one that ships with the package.

    Raises CheckpointError for a damaged file, ValueError for a file of something else
    or of another codec.
    """
    policy, tree = _load(path)
    ranges = tree.get("ranges")
    known = None if ranges is None else (ranges[0], ranges[1])
    return learned(policy, tree.get("ablation", "none"), known)


def load_policy(path: str | os.PathLike[str]) -> RecurrentPolicy:
    """What plays in a controller file. Errors as in `load_controller`."""
    return _load(path)[0]


def _load(path: str | os.PathLike[str]) -> tuple[RecurrentPolicy, dict[str, Any]]:
    tree = checkpoint.load(path)
    if not (isinstance(tree, dict) and "policy_kwargs" in tree and "features" in tree):
        raise ValueError(
            f"{path} is no controller: expected a file that `rlrnn tune` wrote"
        )
    if tree["features"] != list(FEATURES):
        raise ValueError(
            f"{path} was made for other signals ({len(tree['features'])}, here "
            f"{len(FEATURES)}): make it anew with `rlrnn tune`"
        )
    try:
        policy = RecurrentPolicy(
            OBSERVATIONS,
            spaces.MultiDiscrete(list(ACTIONS)),
            lambda _: 0.0,
            **tree["policy_kwargs"],
        )
        policy.load_state_dict(tree["policy"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no controller of this version ({reason}): make it anew with "
            "`rlrnn tune`"
        ) from None
    return policy, tree


def controller_card(path: str | os.PathLike[str] = SHIPPED) -> dict[str, Any]:
    """What made the controller: command, seed, time, versions, scores."""
    return checkpoint.load_info(path)


assert NO_OP == (
    int(np.argmax(RATE_PROBABILITIES)),
    int(np.argmax(TRUNCATION_PROBABILITIES)),
)
