"""The pendulum of gymnasium with its velocity hidden, step by step as in POPGym.

Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement Learning", ICLR
2023.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box
from jaxtyping import Bool, Float32
from torch import Tensor

from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv, normal

# The constants of gymnasium's Pendulum-v1: m = l = 1
GRAVITY = 10.0
DT = 0.05  # seconds per step
MAX_SPEED = 8.0
MAX_TORQUE = 2.0
# Half of POPGym's figure for the highest cost, π² + 0.1·8² + 0.001·2²
HALF_COST = 16.2736044 / 2


class PositionOnlyPendulum(TensorVectorEnv):
    """Swing a pendulum up and hold it there, by a torque too weak to lift it at once.

    The task of POPGym (Morad et al., ICLR 2023), step by step.

    | level  | steps L | best  | memoryless | chance |
    |--------|---------|-------|------------|--------|
    | easy   | 200     | 0.914 | 0.355      | 0.246  |
    | medium | 150     | 0.885 | 0.356      | 0.245  |
    | hard   | 100     | 0.828 | 0.360      | 0.245  |

    | observation      | bounds |                                     |
    |------------------|--------|-------------------------------------|
    | cos of the angle | ±1     | 1 upright, -1 hanging               |
    | sin of the angle | ±1     | a positive torque adds to the angle |

    - Action: `Box(-2, 2, (1,))`, the torque.
    - Reward: (1 - cost/8.1368) / L, where cost = angle² + speed²/10 + torque²/1000 of
      the state before the step, the angle in ±π and the speed in ±8.
    - Start: the angle uniform in ±π, the speed in ±1.
    - End: never terminated, truncated after L steps.

    Returns (undiscounted) lie within ±1. The best mean is measured, of a player by
    dynamic programming on a grid of angles and speeds: two angles give the speed, so
    that who remembers one misses it in the first step only. Memoryless is the best
    found by cross-entropy search over Fourier series of the angle, an estimate, with
    0.40 as the ceiling to call a policy memoryless. Chance is measured.
    """

    start_draws: ClassVar[int] = 2

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int = 200,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            num_envs,
            Box(-1.0, 1.0, (2,), np.float32),
            Box(-MAX_TORQUE, MAX_TORQUE, (1,), np.float32),
            max_episode_steps=max_episode_steps,
            device=device,
        )
        self._start = torch.tensor(
            [math.pi, 1.0], device=self.device, dtype=torch.float32
        )
        self._best = torch.tensor(
            1 / max_episode_steps, device=self.device, dtype=torch.float32
        )
        self._cost = 1 / (HALF_COST * max_episode_steps)

    def start(self, u: Float32[Tensor, "k 2"]) -> State:
        return {"rod": (2 * u).sub_(1).mul_(self._start)}

    def advance(
        self, state: State, actions: Float32[Tensor, "B 1"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        """One step of the equations in gymnasium's `pendulum.py`, m = l = 1."""
        angle, speed = state["rod"].split_with_sizes([1, 1], dim=1)
        torque = actions.clamp(-MAX_TORQUE, MAX_TORQUE)
        upright = torch.remainder(angle + math.pi, math.tau).sub_(math.pi)
        cost = torch.addcmul(0.1 * speed * speed, upright, upright)
        cost = torch.addcmul(cost, torque, torque, value=0.001)
        # angle'' = 3/2·g·sin + 3·torque; the angle moves by the new speed
        push = torch.add(1.5 * GRAVITY * angle.sin(), torque, alpha=3.0)
        speed = torch.add(speed, push, alpha=DT).clamp_(-MAX_SPEED, MAX_SPEED)
        angle = torch.add(angle, speed, alpha=DT)
        rewards = torch.add(self._best, cost[:, 0], alpha=-self._cost)
        never = torch.zeros_like(rewards, dtype=torch.bool)
        return {"rod": torch.cat([angle, speed], dim=1)}, rewards, never

    def observe(self, state: State) -> Float32[Tensor, "B 2"]:
        angle = state["rod"][:, :1]
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class NoisyPositionOnlyPendulum(PositionOnlyPendulum):
    """`PositionOnlyPendulum` of 200 steps whose observations are noisy.

    The task of POPGym (Morad et al., ICLR 2023), step by step.

    | level  | sigma | Kalman filter | memoryless | chance |
    |--------|-------|---------------|------------|--------|
    | easy   | 0.1   | 0.90          | 0.335      | 0.246  |
    | medium | 0.2   | 0.72          | 0.325      | 0.246  |
    | hard   | 0.3   | 0.65          | 0.319      | 0.246  |

    Normal noise of standard deviation `sigma` is added to both coordinates, the first
    observation included; what lies beyond ±1 is clipped to it. The rest is as there:
    action, reward, start and end.

    Returns (undiscounted): the best mean is not known; it is below the 0.914 without
    noise. The columns are measured means: an extended Kalman filter whose estimate is
    taken for the state, and the best policy without memory found as there, with 0.38 as
    the ceiling to call a policy memoryless.
    """

    start_draws: ClassVar[int] = PositionOnlyPendulum.start_draws + 2
    step_draws: ClassVar[int] = 2

    def __init__(
        self,
        num_envs: int = 1,
        *,
        sigma: float = 0.1,
        max_episode_steps: int = 200,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_envs, max_episode_steps=max_episode_steps, device=device)
        self.sigma = sigma

    def start(self, u: Float32[Tensor, "k 4"]) -> State:
        return super().start(u[:, 2:]) | {"noise": normal(u[:, :2])}

    def advance(
        self, state: State, actions: Float32[Tensor, "B 1"], u: Float32[Tensor, "B 2"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        after, rewards, never = super().advance(state, actions, u[:, :0])
        return after | {"noise": normal(u)}, rewards, never

    def observe(self, state: State) -> Float32[Tensor, "B 2"]:
        noisy = torch.add(super().observe(state), state["noise"], alpha=self.sigma)
        return noisy.clamp_(-1.0, 1.0)


def position_only_pendulum(**kwargs: Any) -> SingleEnv:
    """`PositionOnlyPendulum` as an ordinary gymnasium environment."""
    return SingleEnv(PositionOnlyPendulum(**kwargs))


def noisy_position_only_pendulum(**kwargs: Any) -> SingleEnv:
    """`NoisyPositionOnlyPendulum` as an ordinary gymnasium environment."""
    return SingleEnv(NoisyPositionOnlyPendulum(**kwargs))
