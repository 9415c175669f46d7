"""Losses of the agent: pure functions on [T, B], a mean over all steps each."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Number = float | Float[Tensor, ""]  # a tensor in a captured graph


def clipped_surrogate(
    log_ratio: Float[Tensor, "*T B"],
    advantages: Float[Tensor, "*T B"],
    epsilon: Number,
) -> Float[Tensor, ""]:
    """PPO's objective as a loss (Schulman et al. 2017, eq. 7), to be minimised.

    -E[min(r A, clip(r, 1 - epsilon, 1 + epsilon) A)],  r = exp(log_ratio)
    """
    ratio = log_ratio.exp()
    clipped = _between(ratio, 1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def value_loss(
    values: Float[Tensor, "*T B"],
    returns: Float[Tensor, "*T B"],
    old_values: Float[Tensor, "*T B"],
    epsilon: Number | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error; with `epsilon`, of values kept that near to the old ones."""
    if epsilon is not None:
        values = old_values + _between(values - old_values, -epsilon, epsilon)
    return (returns - values).square().mean()


def _between(x: Tensor, low: Any, high: Any) -> Tensor:
    return x.clamp(low, high)


def approximate_kl(log_ratio: Float[Tensor, "*T B"]) -> Float[Tensor, ""]:
    """E[(r - 1) - log r]: unbiased and never negative (Schulman 2020, "k3")."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def clip_fraction(log_ratio: Float[Tensor, "*T B"], epsilon: float) -> Tensor:
    """The share of steps whose ratio lies outside [1 - epsilon, 1 + epsilon]."""
    return ((log_ratio.exp() - 1).abs() > epsilon).float().mean()


def explained_variance(
    values: Float[Tensor, "T B"], returns: Float[Tensor, "T B"]
) -> Float[Tensor, ""]:
    """1 - Var[returns - values] / Var[returns]: 1 is perfect, 0 knows the mean."""
    return 1 - (returns - values).var() / returns.var()
