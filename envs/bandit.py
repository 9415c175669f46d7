"""Arms whose odds must be found out."""

from typing import Any, ClassVar

import torch
from gymnasium.spaces import Discrete
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv


class MultiarmedBandit(TensorVectorEnv):
    """n arms pay with fixed, unknown odds: find a good one and stay with it.

    The task of POPGym (Morad et al., "POPGym: Benchmarking Partially Observable
    Reinforcement Learning", ICLR 2023), step by step, with new odds in each episode.

    | level  | arms n | steps L | odds known: (n-1)/(n+1) | learned | memoryless |
    |--------|--------|---------|-------------------------|---------|------------|
    | easy   | 10     | 200     | 0.8182                  | 0.73    | 0.0986     |
    | medium | 20     | 400     | 0.9048                  | 0.82    | 0.0986     |
    | hard   | 30     | 600     | 0.9355                  | 0.85    | 0.0986     |

    - Observation: `Discrete(2)`, 1 if the arm pulled last has paid; 0 at the start. It
      does not say which arm that was: a player must know its own actions.
    - Action: `Discrete(n)`, the arm to pull.
    - Reward: 1/L if the arm pays, -1/L if not.
    - Start: the odds of each arm are uniform in [0, 1).
    - End: truncated after L steps; never terminated.

    Returns (undiscounted) lie within ±1; by chance 0. No mean is higher than that of
    a player who knows the odds, the fourth column; what is the best for one who must
    learn them is not known. The fifth is reached with the arm of the highest
    m + s·√(½·ln(1 + r/(c + 2))), where m and s are mean and standard deviation of its
    odds given what was seen, c counts its pulls and r the steps that remain.

    Without memory at most ln 3 - 1 in the long run: one arm after a 1, and any other,
    at random, after a 0. If what follows a 0 has odds p and what follows a 1 odds q, a
    share p/(p + 1 - q) of the steps pays; the mean of that is convex in the choice
    after a 1, so that one arm is the best, and concave in the choice after a 0.

    POPGym draws the odds at the start, and its `info` holds them. Here those of an arm
    are drawn when it is first pulled: the same lottery, with two random numbers per
    step. The `odds` of the state are -1 until then.
    """

    step_draws: ClassVar[int] = 2

    def __init__(
        self,
        num_envs: int = 1,
        *,
        arms: int = 10,
        max_episode_steps: int = 200,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("arms", arms), ("max_episode_steps", max_episode_steps)):
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        super().__init__(
            num_envs,
            Discrete(2),
            Discrete(arms),
            max_episode_steps=max_episode_steps,
            device=device,
        )
        self._start = {
            "odds": torch.full(
                (num_envs, arms), -1.0, device=self.device, dtype=torch.float32
            ),
            "paid": torch.zeros(num_envs, device=self.device, dtype=torch.bool),
        }
        self._pay = torch.tensor(
            1 / max_episode_steps, device=self.device, dtype=torch.float32
        )
        self._none = -self._pay

    def start(self, u: Float32[Tensor, "k 0"]) -> State:
        return {key: value[: len(u)] for key, value in self._start.items()}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 2"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        arm = actions[:, None]
        fresh, chance = u.chunk(2, dim=1)
        odds = state["odds"].gather(1, arm)
        odds = torch.where(odds < 0, fresh, odds)
        paid = (chance < odds)[:, 0]
        after = {"odds": state["odds"].scatter(1, arm, odds), "paid": paid}
        rewards = torch.where(paid, self._pay, self._none)
        return after, rewards, torch.zeros_like(paid)

    def observe(self, state: State) -> Int64[Tensor, "B"]:
        return state["paid"].long()


def multiarmed_bandit(**kwargs: Any) -> SingleEnv:
    """`MultiarmedBandit` as an ordinary gymnasium environment."""
    return SingleEnv(MultiarmedBandit(**kwargs))
