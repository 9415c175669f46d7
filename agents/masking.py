"""Masks of invalid actions, by the convention of sb3-contrib's `MaskablePPO`.

An environment says what is allowed now: `action_masks()` gives booleans, True where an
action is allowed. Their number M depends on the action space: n for `Discrete`, all
choices end to end for `MultiDiscrete`, two for each bit of `MultiBinary` (0, then 1).
A tensor environment gives [B, M] for all copies, or has `action_mask` in its infos.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy as _evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor

from rlrnn.agents.distributions import (
    ActionDistribution,
    Bernoulli,
    Categorical,
    MultiCategorical,
)

METHOD = "action_masks"
AnyEnv = gymnasium.Env[Any, Any] | VecEnv


def choices(space: spaces.Space[Any]) -> list[int]:
    """Sizes of the groups of a mask, in each of which one action must be allowed."""
    match space:
        case spaces.Discrete():
            return [int(space.n)]
        case spaces.MultiDiscrete():
            return [int(n) for n in space.nvec.flat]
        case spaces.MultiBinary():
            return [2] * int(np.prod(space.shape))
    raise ValueError(
        f"the environment has {METHOD}() and the action space {space}: expected "
        "Discrete, MultiDiscrete or MultiBinary; learn(..., use_masking=False) ignores "
        "the masks"
    )


def masked(
    distribution: ActionDistribution,
    params: Float[Tensor, "*N P"],
    allowed: Bool[Tensor, "*N M"],
) -> Float[Tensor, "*N P"]:
    """Parameters under which the probability of what is not allowed is exactly 0.

    The lowest finite number stands for minus infinity, which would make the entropy and
    its gradient NaN.
    """
    never = torch.finfo(params.dtype).min
    match distribution:
        case Categorical() | MultiCategorical():
            return params.masked_fill(~allowed, never)
        case Bernoulli():
            off, on = allowed[..., ::2], allowed[..., 1::2]
            return params.masked_fill(~on, never).masked_fill(~off, -never)
    raise ValueError(
        f"action masks for {type(distribution).__name__}: expected Discrete, "
        "MultiDiscrete or MultiBinary actions; leave them out"
    )


def possible(
    space: spaces.Space[Any], allowed: Bool[Tensor, "*N M"]
) -> Bool[Tensor, "*N"]:
    """Whether each group has an action that is allowed."""
    groups = torch.split(allowed, choices(space), -1)
    return torch.stack([group.any(-1) for group in groups]).all(0)


def is_masking_supported(env: AnyEnv) -> bool:
    """Whether `env` says which actions are allowed."""
    if isinstance(env, VecEnv):
        return env.has_attr(METHOD)
    try:
        env.get_wrapper_attr(METHOD)
    except AttributeError:
        return False
    return True


def get_action_masks(env: AnyEnv) -> NDArray[np.bool_]:
    """What `env` allows now: [B, M] for a `VecEnv`, [M] for one environment."""
    if isinstance(env, VecEnv):
        return np.stack([np.asarray(m, bool) for m in env.env_method(METHOD)])
    return np.asarray(env.get_wrapper_attr(METHOD)(), bool)


def as_masks(
    space: spaces.Space[Any], masks: Any, batch: int, source: str = METHOD
) -> NDArray[np.bool_]:
    """`masks` as [batch, M]; ValueError if they do not fit, or forbid everything."""
    groups = choices(space)
    array = np.asarray(masks, bool)
    if array.size != batch * sum(groups):
        raise ValueError(
            f"{source} has shape {list(array.shape)}: expected "
            f"{[batch, sum(groups)]} booleans for {space}"
        )
    array = array.reshape(batch, -1)
    first = np.cumsum([0, *groups[:-1]])
    if not (some := np.logical_or.reduceat(array, first, axis=1)).all():
        row = int(np.argwhere(~some)[0, 0])
        raise ValueError(
            f"{source} of environment {row} allows nothing: expected at least one "
            "action; end the episode instead"
        )
    return array


class ActionMasker(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gives an environment its `action_masks()`.

    `action_mask_fn` is a function of the wrapped environment, or the name of a method
    that it has.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        action_mask_fn: str | Callable[[gymnasium.Env[Any, Any]], Any],
    ) -> None:
        super().__init__(env)
        self._masks: Callable[[], Any]
        if callable(action_mask_fn):
            self._masks = partial(action_mask_fn, env)
        else:
            self._masks = env.get_wrapper_attr(action_mask_fn)
        if not callable(self._masks):
            raise ValueError(
                f"action_mask_fn is {action_mask_fn!r}, which {env} has as "
                f"{self._masks!r}: expected the name of a method"
            )

    def action_masks(self) -> Any:
        return self._masks()


class _Player:
    """An agent that is told, when it predicts, what `env` allows."""

    def __init__(self, model: Any, env: VecEnv) -> None:
        self.model, self.env = model, env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["action_masks"] = get_action_masks(self.env)
        return self.model.predict(*args, **kwargs)


def evaluate_policy(
    model: Any, env: AnyEnv, *args: Any, use_masking: bool = True, **kwargs: Any
) -> Any:
    """Stable-Baselines3's `evaluate_policy`, with masks where `env` has them."""
    if use_masking and is_masking_supported(env):
        if not isinstance(env, VecEnv):
            one: Callable[[], Any] = lambda: env  # noqa: E731
            env = DummyVecEnv([one])
        model = _Player(model, env)
    return _evaluate_policy(model, env, *args, **kwargs)


class MaskableEvalCallback(EvalCallback):
    """Stable-Baselines3's `EvalCallback`, with masks where `eval_env` has them."""

    def __init__(self, *args: Any, use_masking: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_masking = use_masking

    def _on_step(self) -> bool:
        if not (self.use_masking and is_masking_supported(self.eval_env)):
            return super()._on_step()
        model = self.model
        self.model = _Player(model, self.eval_env)  # type: ignore[assignment]
        try:
            return super()._on_step()
        finally:
            self.model = model
