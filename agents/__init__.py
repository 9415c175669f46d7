"""Agents with memory, trained by Stable-Baselines3's `learn` and used by `predict`."""

from rlrnn.agents.loop import LearnedController
from rlrnn.agents.policies import (
    CnnLstmPolicy,
    MlpLstmPolicy,
    MultiInputLstmPolicy,
    RecurrentPolicy,
)
from rlrnn.agents.ppo import RecurrentPPO

__all__ = [
    "CnnLstmPolicy",
    "LearnedController",
    "MlpLstmPolicy",
    "MultiInputLstmPolicy",
    "RecurrentPPO",
    "RecurrentPolicy",
]
