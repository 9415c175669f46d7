"""Tasks that ask for something seen before."""

from typing import Any, ClassVar

import torch
from gymnasium.spaces import Discrete
from jaxtyping import Bool, Float32, Int8, Int64
from torch import Tensor

from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv

SUITS = 4
CARDS_PER_SUIT = 13  # in one deck


class RepeatPrevious(TensorVectorEnv):
    """Cards are dealt one by one: name the suit of the k-th latest (1st: the shown).

    The task of POPGym (Morad et al., "POPGym: Benchmarking Partially Observable
    Reinforcement Learning", ICLR 2023), step by step. The N = 52·decks cards are
    shuffled and dealt without replacement; for k=4 the suit asked for was shown three
    steps ago.

    | level  | decks | k  | steps = N-1 | of them scored = N-k | memoryless |
    |--------|-------|----|-------------|----------------------|------------|
    | easy   | 1     | 4  | 51          | 48                   | -0.4902    |
    | medium | 2     | 32 | 103         | 72                   | -0.4951    |
    | hard   | 3     | 64 | 155         | 92                   | -0.4968    |

    - Observation: `Discrete(4)`, the suit of the card dealt last.
    - Action: `Discrete(4)`, a suit.
    - Reward: 0 until k cards have been dealt; then 1/(N-k) if right, -1/(N-k) if wrong.
    - Start: one card is dealt.
    - End: terminated when the last card has been dealt; never truncated.

    Returns (undiscounted): the best is 1, always wrong is -1, by chance -1/2. Without
    memory at most 2·13·decks/(N-1) - 1, the last column: the cards are drawn without
    replacement, so any suit but the shown one is the best guess, at all times (k > 1).
    """

    start_draws: ClassVar[int] = 1
    step_draws: ClassVar[int] = 1

    def __init__(
        self,
        num_envs: int = 1,
        *,
        k: int = 4,
        decks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        cards = SUITS * CARDS_PER_SUIT * decks
        if not 1 <= k < cards:
            raise ValueError(
                f"k is {k} with decks={decks}: choose k from 1 to {cards - 1}"
            )
        super().__init__(num_envs, Discrete(SUITS), Discrete(SUITS), device=device)
        self.k = k
        # Cards of suits 0 ... j, for j = 0 ... 3: the full deck
        self._deck = torch.arange(
            1.0, SUITS + 1, device=self.device, dtype=torch.float32
        )
        self._deck = (CARDS_PER_SUIT * decks * self._deck).expand(num_envs, SUITS)
        self._empty = torch.full(
            (num_envs, k - 1), -1, device=self.device, dtype=torch.int8
        )
        self._right = torch.tensor(
            1 / (cards - k), device=self.device, dtype=torch.float32
        )
        self._wrong = -self._right

    def start(self, u: Float32[Tensor, "B 1"]) -> State:
        suit, left = _deal(self._deck, u)
        return {"left": left, "latest": torch.cat([self._empty, suit], dim=1)}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        latest = state["latest"]  # [B, k], oldest first, -1 before the first card
        asked = latest[:, 0]
        rewards = torch.where(actions == asked, self._right, self._wrong)
        rewards = rewards.masked_fill_(asked < 0, 0.0)
        suit, left = _deal(state["left"], u)
        latest = torch.cat([latest[:, 1:], suit], dim=1)
        return {"left": left, "latest": latest}, rewards, left[:, -1] <= 0

    def observe(self, state: State) -> Int64[Tensor, "B"]:
        return state["latest"][:, -1].long()


def _deal(
    left: Float32[Tensor, "B 4"], u: Float32[Tensor, "B 1"]
) -> tuple[Int8[Tensor, "B 1"], Float32[Tensor, "B 4"]]:
    """The suit of a card drawn with u from a deck, and the deck without it.

    `left[:, j]` counts the cards left of suits 0 ... j: the suit is the number of
    counts that the position of the card passes.
    """
    passed = left <= u * left[:, -1:]
    suit = passed.sum(dim=1, keepdim=True, dtype=torch.int8)
    return suit, (left + passed).sub_(1)


def repeat_previous(**kwargs: Any) -> SingleEnv:
    """`RepeatPrevious` as an ordinary gymnasium environment."""
    return SingleEnv(RepeatPrevious(**kwargs))
