"""Cart-pole with something hidden.

`CartPole` has the rewards and the length of gymnasium's; the others are those of POPGym
(Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement Learning", ICLR
2023), step by step. The dynamics are the same.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv, normal

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


class _Pole(TensorVectorEnv):
    """The dynamics, the start and the end of all tasks here, in float32."""

    start_draws: ClassVar[int] = 4

    def __init__(
        self,
        num_envs: int,
        shown: list[int],
        reward: float,
        max_episode_steps: int,
        device: torch.device | str,
    ) -> None:
        high = np.array([2 * X_LIMIT, np.inf, 2 * ANGLE_LIMIT, np.inf], np.float32)
        super().__init__(
            num_envs,
            Box(-high[shown], high[shown], dtype=np.float32),
            Discrete(2),
            max_episode_steps=max_episode_steps,
            device=device,
        )
        self.reward = reward
        self._shown = torch.tensor(shown, device=self.device)
        self._limits = self._constant([X_LIMIT, math.inf, ANGLE_LIMIT, math.inf])
        self._start = self._constant(-START)
        self._left = self._constant(-FORCE / MASS)
        self._inertia = self._constant(HALF_LENGTH * 4 / 3)

    def _constant(self, value: float | list[float]) -> Tensor:
        return torch.tensor(value, device=self.device, dtype=torch.float32)

    def start(self, u: Float32[Tensor, "k 4"]) -> State:
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
        return {"pole": pole}, torch.full_like(angle, self.reward), terminated

    def observe(self, state: State) -> Float32[Tensor, "B shown"]:
        return state["pole"].index_select(1, self._shown)


class CartPole(_Pole):
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

    def __init__(
        self,
        num_envs: int = 1,
        *,
        hide_velocities: bool = True,
        max_episode_steps: int = 500,
        device: torch.device | str = "cpu",
    ) -> None:
        shown = [0, 2] if hide_velocities else [0, 1, 2, 3]
        super().__init__(num_envs, shown, 1.0, max_episode_steps, device)


class PositionOnlyCartPole(_Pole):
    """POPGym's cart-pole with hidden velocities: the return of a full episode is 1.

    The task of Morad et al. (ICLR 2023), step by step.

    | level  | steps L | memoryless | chance |
    |--------|---------|------------|--------|
    | easy   | 200     | 0.257      | 0.111  |
    | medium | 400     | 0.128      | 0.056  |
    | hard   | 600     | 0.086      | 0.037  |

    Observation (the position in ±4.8, the angle in ±0.419 rad), action, start and
    limits are those of `CartPole`, where velocities are hidden.

    - Reward: 1/L for every step, the last one included.
    - End: terminated beyond the limits, else truncated after L steps. POPGym reports a
      pole that falls on the very last step as truncated, too.

    Returns (undiscounted): the best is 1, reached in every episode by a linear policy
    on the two coordinates and their last differences. Memoryless and chance are those
    of `CartPole`, measured in the same way: 51 and 22 steps, with 60/L as the ceiling
    to call a policy memoryless.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int = 200,
        device: torch.device | str = "cpu",
    ) -> None:
        reward = 1 / max_episode_steps
        super().__init__(num_envs, [0, 2], reward, max_episode_steps, device)


class VelocityOnlyCartPole(_Pole):
    """POPGym's cart-pole that shows velocities only.

    The task of Morad et al. (ICLR 2023), step by step.

    | level  | steps L | best | memoryless | chance |
    |--------|---------|------|------------|--------|
    | easy   | 200     | 1    | 1          | 0.111  |
    | medium | 400     | 1    | 0.999      | 0.056  |
    | hard   | 600     | 1    | 0.872      | 0.037  |

    | observation           | bounds | at the start                               |
    |-----------------------|--------|--------------------------------------------|
    | velocity of the cart  | ±inf   | the position of the cart, as POPGym has it |
    | velocity of the angle | ±inf   | the angle of the pole, as POPGym has it    |

    Action, start, limits, rewards and end are those of `PositionOnlyCartPole`.

    Returns (undiscounted): the best is 1, reached in every episode by a linear policy
    on the velocities and their sums since the first observation, the positions. Memory
    is hardly needed: the memoryless column is what search has found (cross-entropy over
    cubic policies; at the easy level a linear one will do), and no ceiling.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int = 200,
        device: torch.device | str = "cpu",
    ) -> None:
        reward = 1 / max_episode_steps
        super().__init__(num_envs, [1, 3], reward, max_episode_steps, device)

    def start(self, u: Float32[Tensor, "k 4"]) -> State:
        state = super().start(u)
        return state | {"seen": state["pole"][:, ::2].clone()}  # POPGym's, see above

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 0"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        after, rewards, terminated = super().advance(state, actions, u)
        return after | {"seen": super().observe(after)}, rewards, terminated

    def observe(self, state: State) -> Float32[Tensor, "B shown"]:
        return state["seen"].clone()


class NoisyPositionOnlyCartPole(PositionOnlyCartPole):
    """`PositionOnlyCartPole` of 200 steps whose observations are noisy.

    The task of POPGym (Morad et al., ICLR 2023), step by step.

    | level  | sigma | Kalman filter | memoryless | chance |
    |--------|-------|---------------|------------|--------|
    | easy   | 0.1   | 0.98          | 0.25       | 0.111  |
    | medium | 0.2   | 0.62          | 0.21       | 0.111  |
    | hard   | 0.3   | 0.37          | 0.177      | 0.111  |

    Normal noise of standard deviation `sigma` is added to both coordinates, the first
    observation included; what lies beyond the bounds is clipped to them. The rest is
    as there: bounds, action, reward (1/200 for every step), start and end.

    Returns (undiscounted): 1 at most; the best mean is not known. The columns are
    measured means: a Kalman filter with a linear policy on its estimate, and the best
    policy without memory found by search (cross-entropy over cubic and logistic cubic
    ones), an estimate, with 0.28 as the ceiling to call a policy memoryless.
    """

    start_draws: ClassVar[int] = _Pole.start_draws + 2
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
        self._high = self._constant([2 * X_LIMIT, 2 * ANGLE_LIMIT])

    def start(self, u: Float32[Tensor, "k 6"]) -> State:
        return super().start(u[:, 2:]) | {"noise": normal(u[:, :2])}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 2"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        after, rewards, terminated = super().advance(state, actions, u[:, :0])
        return after | {"noise": normal(u)}, rewards, terminated

    def observe(self, state: State) -> Float32[Tensor, "B shown"]:
        noisy = torch.add(super().observe(state), state["noise"], alpha=self.sigma)
        return noisy.clamp_(-self._high, self._high)


def cartpole(**kwargs: Any) -> SingleEnv:
    """`CartPole` as an ordinary gymnasium environment."""
    return SingleEnv(CartPole(**kwargs))


def position_only_cartpole(**kwargs: Any) -> SingleEnv:
    """`PositionOnlyCartPole` as an ordinary gymnasium environment."""
    return SingleEnv(PositionOnlyCartPole(**kwargs))


def velocity_only_cartpole(**kwargs: Any) -> SingleEnv:
    """`VelocityOnlyCartPole` as an ordinary gymnasium environment."""
    return SingleEnv(VelocityOnlyCartPole(**kwargs))


def noisy_position_only_cartpole(**kwargs: Any) -> SingleEnv:
    """`NoisyPositionOnlyCartPole` as an ordinary gymnasium environment."""
    return SingleEnv(NoisyPositionOnlyCartPole(**kwargs))
