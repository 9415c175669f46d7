"""Cart-pole, with or without its velocities."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv

# The constants of gymnasium's CartPole-v1
GRAVITY = 9.8
MASS = 1.1  # cart 1.0 and pole 0.1
POLE_MASS = 0.1
HALF_LENGTH = 0.5  # of the pole
FORCE = 10.0
TAU = 0.02  # seconds per step
X_LIMIT = 2.4
ANGLE_LIMIT = 12 * math.pi / 180
START = 0.05


class CartPole(TensorVectorEnv):
    """Push a cart left or right so that the pole on it stays up; velocities are hidden.

    The cart-pole of Barto, Sutton and Anderson ("Neuronlike adaptive elements that can
    solve difficult learning control problems", 1983), with the equations, constants and
    Euler step of gymnasium's CartPole-v1, in float32. That velocities must be inferred
    makes it a memory task: POPGym's PositionOnlyCartPole (Morad et al., ICLR 2023), but
    with the rewards and the length of CartPole-v1.

    | observation           | bounds      |                                          |
    |-----------------------|-------------|------------------------------------------|
    | position of the cart  | ±4.8        | the episode ends beyond ±2.4             |
    | velocity of the cart  | ±inf        | only with `hide_velocities=False`        |
    | angle of the pole     | ±0.419 rad  | the episode ends beyond ±0.2095 (12°)    |
    | velocity of the angle | ±inf        | only with `hide_velocities=False`        |

    - Action: `Discrete(2)`, 0 pushes left, 1 pushes right.
    - Reward: 1 for every step, the last one included.
    - Start: all four, velocities too, uniform in ±0.05.
    - End: terminated beyond the limits above, else truncated after 500 steps.

    Returns (undiscounted): the best is 500, reached in every episode by a linear policy
    on the two coordinates and their last differences; by chance 22. Without memory
    about 51 (45 if deterministic), the mean of the best policies found by searching
    (random and cross-entropy search over linear, logistic and cubic-logistic policies):
    an estimate, with 60 as the ceiling to call a policy memoryless.
    """

    start_draws: ClassVar[int] = 4

    def __init__(
        self,
        num_envs: int = 1,
        *,
        hide_velocities: bool = True,
        max_episode_steps: int = 500,
        device: torch.device | str = "cpu",
    ) -> None:
        shown = [0, 2] if hide_velocities else [0, 1, 2, 3]
        high = np.array([2 * X_LIMIT, np.inf, 2 * ANGLE_LIMIT, np.inf], np.float32)
        super().__init__(
            num_envs,
            Box(-high[shown], high[shown], dtype=np.float32),
            Discrete(2),
            max_episode_steps=max_episode_steps,
            device=device,
        )
        self._shown = torch.tensor(shown, device=self.device)
        self._limits = self._constant([X_LIMIT, math.inf, ANGLE_LIMIT, math.inf])
        self._start = self._constant(-START)
        self._left = self._constant(-FORCE / MASS)
        self._inertia = self._constant(HALF_LENGTH * 4 / 3)

    def _constant(self, value: float | list[float]) -> Tensor:
        return torch.tensor(value, device=self.device, dtype=torch.float32)

    def start(self, u: Float32[Tensor, "B 4"]) -> State:
        return {"pole": torch.add(self._start, u, alpha=2 * START)}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        """One Euler step of the equations in gymnasium's `cartpole.py`."""
        pole = state["pole"]
        _, velocity, angle, spin = pole.unbind(dim=1)
        sin, cos = angle.sin(), angle.cos()
        # temp = (±F + m·l·spin²·sin) / M
        # angle'' = (g·sin - cos·temp) / (l·(4/3 - m·cos²/M))
        # position'' = temp - m·l·angle''·cos / M
        ratio = POLE_MASS * HALF_LENGTH / MASS
        push = torch.add(self._left, actions, alpha=2 * FORCE / MASS)
        temp = torch.addcmul(push, spin.square(), sin, value=ratio)
        torque = torch.addcmul(GRAVITY * sin, cos, temp, value=-1)
        angular = torque / torch.addcmul(self._inertia, cos, cos, value=-ratio)
        linear = torch.addcmul(temp, angular, cos, value=-ratio)
        rates = torch.stack([velocity, linear, spin, angular], dim=1)
        pole = torch.add(pole, rates, alpha=TAU)
        terminated = (pole.abs() > self._limits).any(dim=1)
        return {"pole": pole}, torch.ones_like(angle), terminated

    def observe(self, state: State) -> Float32[Tensor, "B shown"]:
        return state["pole"].index_select(1, self._shown)


def cartpole(**kwargs: Any) -> SingleEnv:
    """`CartPole` as an ordinary gymnasium environment."""
    return SingleEnv(CartPole(**kwargs))
