"""Tasks that ask for something seen before."""

from typing import Any, ClassVar

import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from rlrnn.envs.cards import (
    DECK,
    KINDS,
    SUITS,
    deal,
    deck_size,
    full_deck,
    scalar,
)
from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv


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
        cards = DECK * decks
        if not 1 <= k < cards:
            raise ValueError(
                f"k is {k} with decks={decks}: choose k from 1 to {cards - 1}"
            )
        super().__init__(num_envs, Discrete(SUITS), Discrete(SUITS), device=device)
        self.k = k
        self._deck = full_deck(SUITS, decks, num_envs, self.device)
        self._empty = torch.full(
            (num_envs, k - 1), -1, device=self.device, dtype=torch.int8
        )
        self._right = scalar(1 / (cards - k), self.device)
        self._wrong = -self._right

    def start(self, u: Float32[Tensor, "k 1"]) -> State:
        suit, left = deal(self._deck[: len(u)], u)
        latest = torch.cat([self._empty[: len(u)], suit], dim=1)
        return {"left": left, "latest": latest}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        latest = state["latest"]  # [B, k], oldest first, -1 before the first card
        asked = latest[:, 0]
        rewards = torch.where(actions == asked, self._right, self._wrong)
        rewards = rewards.masked_fill_(asked < 0, 0.0)
        suit, left = deal(state["left"], u)
        latest = torch.cat([latest[:, 1:], suit], dim=1)
        return {"left": left, "latest": latest}, rewards, left[:, -1] <= 0

    def observe(self, state: State) -> Int64[Tensor, "B"]:
        return state["latest"][:, -1].long()


class RepeatFirst(TensorVectorEnv):
    """Cards are dealt one by one: name the suit of the first, at every step.

    The task of POPGym (see `RepeatPrevious`), step by step. The N = 52·decks cards are
    shuffled and dealt without replacement.

    | level  | decks | steps = N-1 | memoryless |
    |--------|-------|-------------|------------|
    | easy   | 1     | 51          | -0.499423  |
    | medium | 8     | 415         | -0.499991  |
    | hard   | 16    | 831         | -0.499998  |

    - Observation: `Discrete(4)`, the suit of the card dealt last.
    - Action: `Discrete(4)`, a suit.
    - Reward: 1/(N-1) if right, -1/(N-1) if wrong; also while the first card is shown.
    - Start: one card is dealt.
    - End: terminated when the last card has been dealt; never truncated.

    Returns (undiscounted): the best is 1, always wrong is -1, by chance -1/2. Without
    memory at most -1/2 + 3/(2·(N-1)²), the last column, for the suit shown: right once
    for certain, and only a little less often than the others after that.
    """

    start_draws: ClassVar[int] = 1
    step_draws: ClassVar[int] = 1

    def __init__(
        self, num_envs: int = 1, *, decks: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        cards = deck_size(decks)
        super().__init__(num_envs, Discrete(SUITS), Discrete(SUITS), device=device)
        self._deck = full_deck(SUITS, decks, num_envs, self.device)
        self._right = scalar(1 / (cards - 1), self.device)
        self._wrong = -self._right

    def start(self, u: Float32[Tensor, "k 1"]) -> State:
        suit, left = deal(self._deck[: len(u)], u)
        return {"left": left, "first": suit, "latest": suit}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        first = state["first"]
        rewards = torch.where(actions == first[:, 0], self._right, self._wrong)
        suit, left = deal(state["left"], u)
        after = {"left": left, "first": first, "latest": suit}
        return after, rewards, left[:, -1] <= 0

    def observe(self, state: State) -> Int64[Tensor, "B"]:
        return state["latest"][:, 0].long()


class Autoencode(TensorVectorEnv):
    """All cards are dealt one by one, then: name their suits in the reverse order.

    The task of POPGym (see `RepeatPrevious`), step by step. The N = 52·decks cards are
    shuffled and dealt without replacement.

    | level  | decks | steps = 2N-1 | of them scored = N | memoryless |
    |--------|-------|--------------|--------------------|------------|
    | easy   | 1     | 103          | 52                 | -0.4712    |
    | medium | 2     | 207          | 104                | -0.4856    |
    | hard   | 3     | 311          | 156                | -0.4904    |

    - Observation: `MultiDiscrete([2, 4])`, POPGym's `Tuple(Discrete(2), Discrete(4))`
      as one array: 1 while there are cards to deal, 0 from the last card on; the suit
      of the card dealt last, and 0 after the first answer.
    - Action: `Discrete(4)`, a suit.
    - Reward: 0 while cards are dealt; then 1/N if right, -1/N if wrong. The last card
      is the first that is asked for, and still in sight.
    - Start: one card is dealt.
    - End: terminated after the answer for the first card; never truncated.

    Returns (undiscounted): the best is 1, always wrong is -1, by chance -1/2. Without
    memory at most -1/2 + 3/(2N), the last column, for the suit shown: right for the
    last card, and for every card of suit 0.
    """

    start_draws: ClassVar[int] = 1
    step_draws: ClassVar[int] = 1

    def __init__(
        self, num_envs: int = 1, *, decks: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        cards = deck_size(decks)
        space = MultiDiscrete([2, SUITS])
        super().__init__(num_envs, space, Discrete(SUITS), device=device)
        self._deck = full_deck(SUITS, decks, num_envs, self.device)
        self._last = cards - 1  # the place of the last card
        # Two bits per card, 32 cards to the word: cheap to carry along and to reset
        self._empty = torch.zeros(
            (num_envs, self._last // 32 + 1), device=self.device, dtype=torch.int64
        )
        self._right = scalar(1 / cards, self.device)
        self._wrong = -self._right

    def start(self, u: Float32[Tensor, "k 1"]) -> State:
        suit, left = deal(self._deck[: len(u)], u)
        watching = left[:, -1:] > 0
        words = self._empty[: len(u)]
        return {"left": left, "words": words, "watching": watching, "shown": suit}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        steps = state["episode_length"][:, None]
        # The place of the card shown; then, back from the last, of the one asked for
        place = torch.minimum(steps, 2 * self._last - steps)
        word, shift = place >> 5, (place & 31) << 1
        shown = state["shown"].long() << shift  # 0 once all have been dealt
        written = state["words"].gather(1, word) | shown
        words = state["words"].scatter(1, word, written)
        asked = written >> shift & 3
        rewards = torch.where(actions[:, None] == asked, self._right, self._wrong)
        rewards = rewards.masked_fill_(state["watching"], 0.0)

        suit, left = deal(state["left"], u)
        after = {
            "left": left,
            "words": words,
            "watching": left[:, -1:] > 0,
            "shown": suit * state["watching"],
        }
        return after, rewards[:, 0], steps[:, 0] >= 2 * self._last

    def observe(self, state: State) -> Int64[Tensor, "B 2"]:
        return torch.cat([state["watching"], state["shown"]], dim=1).long()


class CountRecall(TensorVectorEnv):
    """A card is dealt, another asks: how many of its kind have been dealt so far?

    The task of POPGym (see `RepeatPrevious`), step by step. Cards and questions come
    from two decks of N = 52·decks cards, K of each of n kinds, shuffled and dealt
    without replacement.

    | level  | decks | kind   | n  | K  | steps = N-1 | memoryless | chance  |
    |--------|-------|--------|----|----|-------------|------------|---------|
    | easy   | 1     | colors | 2  | 26 | 51          | -0.9230    | -0.9259 |
    | medium | 2     | suits  | 4  | 26 | 103         | -0.9245    | -0.9259 |
    | hard   | 4     | ranks  | 13 | 16 | 207         | -0.8812    | -0.8824 |

    - Observation: `MultiDiscrete([n, n])`, the kind of the card dealt last and the kind
      asked for.
    - Action: `Discrete(K+1)`, the count; the card in sight counts.
    - Reward: 1/(N-1) if right, -1/(N-1) if wrong.
    - Start: one card is dealt, and one question.
    - End: terminated when the last cards have been dealt, with no answer to the last
      question; never truncated.

    Returns (undiscounted): the best is 1, always wrong is -1, by chance 2/(K+1) - 1.
    Without memory at most 2·(1 + (n-1)·K/(K+1))/(N-1) - 1, the column before, reached
    with 1 at all times: whatever is in sight, the counts short of K last equally long
    in the mean. POPGym's `error_clamp` does nothing there, and is left out; so is its
    `info`, which holds the counts.
    """

    start_draws: ClassVar[int] = 2
    step_draws: ClassVar[int] = 2

    def __init__(
        self,
        num_envs: int = 1,
        *,
        kind: str = "colors",
        decks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
        n, cards = KINDS[kind], deck_size(decks)
        self._each = cards // n
        super().__init__(
            num_envs, MultiDiscrete([n, n]), Discrete(self._each + 1), device=device
        )
        deck = full_deck(n, decks, num_envs, self.device)
        self._decks = torch.stack([deck, deck], dim=1)
        self._none = torch.zeros_like(deck[:, :1])
        self._right = scalar(1 / (cards - 1), self.device)
        self._wrong = -self._right

    def start(self, u: Float32[Tensor, "k 2"]) -> State:
        kinds, left = deal(self._decks[: len(u)], u[..., None])
        return {"left": left, "latest": kinds[..., 0]}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 2"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        asked = state["latest"][:, 1:].long()
        undealt = state["left"][:, 0].diff(dim=1, prepend=self._none).gather(1, asked)
        right = undealt[:, 0] == self._each - actions
        rewards = torch.where(right, self._right, self._wrong)
        kinds, left = deal(state["left"], u[..., None])
        after = {"left": left, "latest": kinds[..., 0]}
        return after, rewards, left[:, 0, -1] <= 0

    def observe(self, state: State) -> Int64[Tensor, "B 2"]:
        return state["latest"].long()


def repeat_previous(**kwargs: Any) -> SingleEnv:
    """`RepeatPrevious` as an ordinary gymnasium environment."""
    return SingleEnv(RepeatPrevious(**kwargs))


def repeat_first(**kwargs: Any) -> SingleEnv:
    """`RepeatFirst` as an ordinary gymnasium environment."""
    return SingleEnv(RepeatFirst(**kwargs))


def autoencode(**kwargs: Any) -> SingleEnv:
    """`Autoencode` as an ordinary gymnasium environment."""
    return SingleEnv(Autoencode(**kwargs))


def count_recall(**kwargs: Any) -> SingleEnv:
    """`CountRecall` as an ordinary gymnasium environment."""
    return SingleEnv(CountRecall(**kwargs))
