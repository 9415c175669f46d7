"""A deck of cards in tensors, and the card games of POPGym, step by step.

Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement Learning",
ICLR 2023. Letters: N cards, K of each of n kinds; B copies.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Discrete, MultiDiscrete
from jaxtyping import Bool, Float32, Int8, Int64
from torch import Tensor

from rlrnn.envs.tensor import SingleEnv, State, TensorVectorEnv

DECK = 52
KINDS = {"colors": 2, "suits": 4, "ranks": 13}
SUITS, RANKS = KINDS["suits"], KINDS["ranks"]


# ------------------------------------------------------------------------ the deck


def deck_size(decks: int) -> int:
    if decks < 1:
        raise ValueError(f"decks is {decks}: give at least 1")
    return DECK * decks


def full_deck(
    kinds: int, decks: int, num_envs: int, device: torch.device
) -> Float32[Tensor, "B n"]:
    """A shuffled deck for `deal`: column j counts the cards of kinds 0 ... j."""
    counts = torch.arange(1.0, kinds + 1, device=device, dtype=torch.float32)
    return (DECK * decks // kinds * counts).expand(num_envs, kinds)


def deal(
    left: Float32[Tensor, "*B n"], u: Float32[Tensor, "*B 1"]
) -> tuple[Int8[Tensor, "*B 1"], Float32[Tensor, "*B n"]]:
    """The kind of a card drawn with u from a deck, and the deck without it.

    `left[..., j]` counts the cards left of kinds 0 ... j: the kind is the number of
    counts that the position of the card passes. From an empty deck: n, and no change.
    """
    passed = left <= u * left[..., -1:]
    kind = passed.sum(dim=-1, keepdim=True, dtype=torch.int8)
    return kind, (left + passed).sub_(1)


def scalar(value: float, device: torch.device) -> Float32[Tensor, ""]:
    return torch.tensor(value, device=device, dtype=torch.float32)


# ----------------------------------------------------------------------- the games


class HigherLower(TensorVectorEnv):
    """Cards are dealt one by one: is the next one higher or lower than the shown one?

    The task of POPGym (Morad et al., ICLR 2023), step by step. Who counts the cards
    knows better. The N = 52·decks cards are shuffled and dealt without replacement; the
    ace is the lowest.

    | level  | decks | steps = N-1 | best   | memoryless |
    |--------|-------|-------------|--------|------------|
    | easy   | 1     | 51          | 0.5276 | 0.4970     |
    | medium | 2     | 103         | 0.5161 | 0.4970     |
    | hard   | 3     | 155         | 0.5115 | 0.4970     |

    - Observation: `Discrete(13)`, the rank of the card dealt last: ace 0 ... king 12.
    - Action: `Discrete(2)`, 0 says higher, 1 lower.
    - Reward: 1/N if right, -1/N if wrong, 0 if the ranks are equal.
    - Start: one card is dealt.
    - End: terminated when the last card has been dealt; never truncated.

    Returns (undiscounted) lie within ±(N-1)/N: POPGym divides by the cards, not by the
    steps. The best counts the cards, and says higher where more of those left are
    higher; its mean is that of |higher - lower| / left, over all decks and summed over
    the steps. Without memory at most 84/169, for higher below the seven and lower above
    it. By chance 0.
    """

    start_draws: ClassVar[int] = 1
    step_draws: ClassVar[int] = 1

    def __init__(
        self, num_envs: int = 1, *, decks: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        cards = deck_size(decks)
        super().__init__(num_envs, Discrete(RANKS), Discrete(2), device=device)
        self._deck = full_deck(RANKS, decks, num_envs, self.device)
        self._scale = scalar(1 / cards, self.device)

    def start(self, u: Float32[Tensor, "k 1"]) -> State:
        rank, left = deal(self._deck[: len(u)], u)
        return {"left": left, "rank": rank}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        rank, left = deal(state["left"], u)
        change = (rank - state["rank"]).sign()[:, 0]  # 1: higher
        rewards = change * (1 - 2 * actions) * self._scale
        return {"left": left, "rank": rank}, rewards, left[:, -1] <= 0

    def observe(self, state: State) -> Int64[Tensor, "B"]:
        return state["rank"][:, 0].long()


class Concentration(TensorVectorEnv):
    """N cards lie face down: turn them two by two, and pairs of a kind stay open.

    The task of POPGym (Morad et al., ICLR 2023), step by step but for two differences,
    see below.

    | level  | decks | kind   | n  | N   | steps | best   | position-blind | chance |
    |--------|-------|--------|----|-----|-------|--------|----------------|--------|
    | easy   | 1     | colors | 2  | 52  | 104   | 0.8333 | 0.4634         | -0.192 |
    | medium | 2     | colors | 2  | 104 | 208   | 0.8333 | 0.4761         | -0.186 |
    | hard   | 1     | ranks  | 13 | 52  | 104   | 0.7324 | -0.8122        | -0.835 |

    - Observation: `MultiDiscrete([n+1]*N)`, what lies at each place: the kind of an
      open card (0 ... n-1), n for one that is face down.
    - Action: `Discrete(N)`, the place of the card to turn.
    - Reward: 0 for the first card of a turn; for the second 2/N if the two are a pair,
      -1/N if not, or if it is the first once more. Choosing a card of an earlier pair
      ends the turn, with -1/(2N) if it was to be the first, -1/N if the second.
    - Start: all N cards are face down.
    - End: terminated when all are open, else truncated after 2N steps.

    Cards that failed are in sight until the next step, which first turns them down.

    Returns (undiscounted): 1 without a failure, and at least -1. The best mean is that
    of a perfect memory, by dynamic programming over the numbers of known and of unknown
    cards of each kind. It turns an unknown card first. With ranks, then the other card
    of a pair if it is known, else one more unknown; with colors it may be better to try
    an unknown card, and to save the known one.

    Without memory, and with no way to tell face-down places apart, at most the column
    before the last (dynamic programming over the cards left and the steps). A policy
    that does tell them apart can leave itself notes, as the place that it turns next
    says what it has just seen: no ceiling below the best is known for those.

    Two differences from POPGym: an episode that is completed on its very last step is
    terminated there and truncated, too. And a card is drawn when it is first turned,
    where POPGym shuffles at the start: the same lottery at a fraction of the work. The
    `faces` of the state, bytes in int64, are -1 until then.
    """

    step_draws: ClassVar[int] = 1

    def __init__(
        self,
        num_envs: int = 1,
        *,
        kind: str = "colors",
        decks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in ("colors", "ranks"):
            raise ValueError(f"kind is {kind!r}: choose colors or ranks")
        kinds, cards = KINDS[kind], deck_size(decks)
        super().__init__(
            num_envs,
            MultiDiscrete(np.full(cards, kinds + 1)),
            Discrete(cards),
            max_episode_steps=2 * cards,
            device=device,
        )
        self.cards, self._face_down = cards, kinds
        deck = full_deck(kinds, decks, num_envs, self.device)
        # Place N stands for no card: it can be looked at, turned and left alone
        nowhere = torch.full((num_envs, 2), cards, device=self.device)
        faces = torch.full(
            (num_envs, 8 * (cards // 8 + 1)), -1, device=self.device, dtype=torch.int8
        )
        self._start = {
            "left": deck,
            "first": nowhere[:, :1],
            "failed": nowhere,
            "opened": torch.zeros_like(nowhere[:, 0]),
            # int8, kept as int64: `step` resets eight places at the price of one
            "faces": faces.view(torch.int64),
            "table": torch.full_like(faces, kinds).view(torch.int64),
        }
        self._success = scalar(2 / cards, self.device)
        self._failure = scalar(-1 / (2 * cards), self.device)

    def start(self, u: Float32[Tensor, "k 0"]) -> State:
        return {key: value[: len(u)] for key, value in self._start.items()}

    def advance(
        self, state: State, actions: Int64[Tensor, "B"], u: Float32[Tensor, "B 1"]
    ) -> tuple[State, Float32[Tensor, "B"], Bool[Tensor, "B"]]:
        card, first = actions[:, None], state["first"]  # [B, 1]
        faces, table = (state[key].view(torch.int8) for key in ("faces", "table"))
        face = faces.gather(1, card)
        unknown = face < 0
        drawn, left = deal(state["left"], u)
        face = torch.where(unknown, drawn, face)

        table = table.scatter(1, state["failed"], self._face_down)
        idle = table.gather(1, card) != self._face_down  # open, or the first again
        match = (table.gather(1, first) == face) & ~idle
        second = first < self.cards
        over = second | idle  # is the turn
        spent = over + second.long()  # steps
        rewards = torch.where(match, self._success, self._failure * spent)
        opened = state["opened"] + 2 * match[:, 0]
        failed = [
            first.masked_fill(match, self.cards),
            card.masked_fill(match | idle | ~second, self.cards),
        ]
        after = {
            "left": torch.where(unknown, left, state["left"]),
            "first": card.masked_fill(over, self.cards),
            "failed": torch.cat(failed, dim=1),
            "opened": opened,
            "faces": faces.scatter(1, card, face).view(torch.int64),
            "table": table.scatter(1, card, face).view(torch.int64),
        }
        return after, rewards[:, 0], opened == self.cards

    def observe(self, state: State) -> Int64[Tensor, "B N"]:
        return state["table"].view(torch.int8)[:, : self.cards].long()


def higher_lower(**kwargs: Any) -> SingleEnv:
    """`HigherLower` as an ordinary gymnasium environment."""
    return SingleEnv(HigherLower(**kwargs))


def concentration(**kwargs: Any) -> SingleEnv:
    """`Concentration` as an ordinary gymnasium environment."""
    return SingleEnv(Concentration(**kwargs))
