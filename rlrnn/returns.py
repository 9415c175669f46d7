"""Return and advantage estimators: pure functions on [T, B].

T time steps, B columns. `rewards[t]` is what the action at step t earned, and
`dones[t]` says that the episode ended with it, whether terminated or truncated.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def next_values(
    values: Float[Tensor, "T B"],
    last_values: Float[Tensor, "B"],
    terminated: Bool[Tensor, "T B"],
    truncated: Bool[Tensor, "T B"],
    final_values: Float[Tensor, "T B"],
) -> Float[Tensor, "T B"]:
    """The value of what follows step t, as a one-step target needs it.

    Nothing follows a terminated episode: 0. A truncated one would have gone on, so its
    true last observation counts, valued with the recurrent state before the reset:
    `final_values[t]` (Pardo et al. 2018, "Time limits in reinforcement learning"). Else
    it is the next row of `values`, and `last_values` after the last row.
    """
    following = torch.cat((values[1:], last_values[None]))
    following = torch.where(truncated, final_values, following)
    return following.masked_fill(terminated, 0.0)


def gae(
    rewards: Float[Tensor, "T B"],
    values: Float[Tensor, "T B"],
    following: Float[Tensor, "T B"],
    dones: Bool[Tensor, "T B"],
    gamma: float,
    lam: float,
) -> Float[Tensor, "T B"]:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma * v'_t - v_t
        A_t     = delta_t + gamma * lam * A_{t+1}     (A_{t+1} = 0 where t is done)

    `following` is v' of `next_values`. `lam=0` is one-step TD, `lam=1` Monte Carlo.
    `A + values` are the lambda-returns that the critic learns.
    """
    deltas = rewards + gamma * following - values
    carry = gamma * lam * (~dones).to(rewards.dtype)
    advantages = []
    advantage = torch.zeros_like(deltas[0])
    for delta, keep in zip(
        deltas.flip(0).unbind(), carry.flip(0).unbind(), strict=True
    ):
        advantage = torch.addcmul(delta, keep, advantage)
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def running(
    rewards: Float[Tensor, "T B"],
    dones: Bool[Tensor, "T B"],
    before: Float[Tensor, "B"],
    gamma: float,
) -> Float[Tensor, "T B"]:
    """Discounted sums of what an episode has earned so far, from `before` on.

    G_t = gamma * G_{t-1} + r_t     (G_{t-1} = 0 where an episode ended)
    """
    carry = gamma * (~dones).to(rewards.dtype)
    sums, weight = [], torch.full_like(before, gamma)
    for reward, next_weight in zip(rewards, carry, strict=True):
        before = torch.addcmul(reward, weight, before)
        sums.append(before)
        weight = next_weight
    return torch.stack(sums)
