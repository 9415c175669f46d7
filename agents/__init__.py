"""Agents with memory, trained by Stable-Baselines3's `learn` and used by `predict`."""

from rlrnn.agents.policies import RecurrentPolicy
from rlrnn.agents.ppo import RecurrentPPO

__all__ = ["RecurrentPPO", "RecurrentPolicy"]
