"""The memory games against POPGym's, and what their docstrings promise."""

import dataclasses
import functools
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete, MultiDiscrete, Tuple
from numpy.typing import NDArray
from torch import Tensor

import rlrnn  # noqa: F401  (registers the ids)
from rlrnn.envs.bandit import MultiarmedBandit
from rlrnn.envs.cards import Concentration, HigherLower, deal, full_deck
from rlrnn.envs.recall import Autoencode, CountRecall, RepeatFirst
from rlrnn.envs.tensor import TensorVectorEnv, offsets, uniform

LEVELS = ["Easy", "Medium", "Hard"]
DEALT = {  # nothing that is done changes what is dealt
    "RepeatFirst": "repeat_first",
    "Autoencode": "autoencode",
    "CountRecall": "count_recall",
    "HigherLower": "higher_lower",
}
MODULES = DEALT | {
    "RepeatPrevious": "repeat_previous",  # its ceilings: test_envs.py
    "Concentration": "concentration",
    "MultiarmedBandit": "multiarmed_bandit",
}
Player = Callable[[Tensor], Tensor]

every_level = pytest.mark.parametrize("level", LEVELS)


def make(name: str, level: str, num_envs: int) -> Any:
    env = gymnasium.make_vec(f"rlrnn/{name}{level}-v0", num_envs=num_envs)
    assert isinstance(env, TensorVectorEnv)
    return env


def make_theirs(name: str, level: str) -> Any:
    return getattr(
        importlib.import_module(f"popgym.envs.{MODULES[name]}"), name + level
    )()


def length_of(theirs: Any) -> int:
    """Of an episode, at most; each of POPGym's games has its own name for it."""
    for name in ("max_episode_length", "episode_length"):
        if hasattr(theirs, name):
            return int(getattr(theirs, name))
    return int(theirs.deck_size) - 1


def n_actions(env: TensorVectorEnv) -> int:
    assert isinstance(env.single_action_space, Discrete)
    return int(env.single_action_space.n)


def at_random(env: TensorVectorEnv, seed: int = 0) -> Player:
    generator = torch.Generator().manual_seed(seed)
    n = n_actions(env)
    return lambda obs: torch.randint(n, (env.num_envs,), generator=generator)


def first_returns(env: TensorVectorEnv, player: Player, seed: int = 0) -> Tensor:
    """The return of each copy's first episode."""
    obs, _ = env.reset(seed=seed)
    returns = torch.full((env.num_envs,), math.nan)
    while bool(returns.isnan().any()):
        obs, _, terminated, truncated, infos = env.step(player(obs))
        ended = (terminated | truncated) & returns.isnan()
        returns = torch.where(ended, infos["episode_return"], returns)
    return returns


def five_errors(returns: Tensor) -> float:
    """Of the mean."""
    return 5 * float(returns.std()) / math.sqrt(len(returns)) + 1e-6


def assert_in_docstring(env: TensorVectorEnv, level: str, *numbers: str) -> None:
    """In the row of the table for this level."""
    rows = [row.split("|")[1:-1] for row in (type(env).__doc__ or "").splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if row]
    row = next(row for row in cells if row[0] == level.lower())
    assert set(numbers) <= set(row), f"{numbers} not in {row}"


# ------------------------------------------------------------------ POPGym as oracle


class Luck:
    """In place of POPGym's generator: what happened to us happens to it."""

    def __init__(self, orders: list[NDArray[np.int64]], numbers: list[Any]) -> None:
        self.orders, self.numbers = orders, numbers

    def shuffle(self, cards: NDArray[np.int64]) -> None:
        cards[:] = self.orders.pop(0)

    def random(self, *size: int, **kwargs: Any) -> Any:
        return self.numbers.pop(0)


def arranged(wanted: Tensor, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The whole deck in an order that shows the wanted kinds; any card for -1.

    Fails if the deck has not as many of a kind.
    """
    pools = {kind: np.flatnonzero(kinds == kind).tolist() for kind in set(kinds)}
    order = [pools[kind].pop() if kind >= 0 else -1 for kind in wanted.tolist()]
    rest = [card for pool in pools.values() for card in pool]
    return np.array([rest.pop() if card < 0 else card for card in order])


def luck_of(name: str, theirs: Any, seen: Tensor, numbers: list[Any]) -> Luck:
    """From what a copy saw in one episode [T+1, ...], and the bandit's numbers."""
    match name:  # POPGym deals from the end
        case "RepeatPrevious" | "RepeatFirst":
            orders = [arranged(seen.flip(0), theirs.deck.suits_idx)]
        case "HigherLower":
            orders = [arranged(seen.flip(0), theirs.deck.ranks_idx)]
        case "Autoencode":
            dealt = seen[: theirs.deck.num_cards, 1]
            orders = [arranged(dealt.flip(0), theirs.deck.suits_idx)]
        case "CountRecall":
            orders = [arranged(s.flip(0), theirs.deck_idx_type) for s in seen.T]
        case "Concentration":
            places = seen.where(seen < theirs.facedown_card, -1).amax(0)
            orders = [arranged(places, theirs.deck_idx_type)]
        case _:
            orders = []
    return Luck(orders, numbers)


@dataclasses.dataclass
class Episode:
    seen: Tensor  # [T+1, ...]
    actions: list[int]
    rewards: list[float]
    ends: list[list[bool]]  # terminated, truncated
    numbers: list[Any]  # drawn by the bandit: the odds [n], then one per step


def first_episodes(env: TensorVectorEnv, player: Player) -> Iterator[Episode]:
    obs, _ = env.reset(seed=1)
    seen, rows = [obs], []
    over = torch.zeros(env.num_envs, dtype=torch.bool)
    odds = chances = torch.zeros(env.num_envs, 1)
    while not over.all():
        actions = player(obs)
        if isinstance(env, MultiarmedBandit):
            u, _ = uniform(env.state["stream"], offsets(2))
            after, _, _ = env.advance(env.state, actions, u)
            odds = torch.where(over[:, None], odds, after["odds"])
            chances = u[:, 1]
        obs, rewards, terminated, truncated, infos = env.step(actions)
        seen.append(infos["final_obs"])
        ends = torch.stack([terminated, truncated], dim=1)
        rows.append([actions, rewards, ends, chances])
        over |= ends.any(1)
    saw = torch.stack(seen)
    acted, got, ended, drawn = (torch.stack(row) for row in zip(*rows, strict=True))
    lengths = ended.any(2).int().argmax(0) + 1
    for i, steps in enumerate(lengths.tolist()):
        acted_i, got_i, ended_i, drawn_i = (
            column[:steps, i].tolist() for column in (acted, got, ended, drawn)
        )
        numbers = [odds[i].numpy(), *drawn_i]
        yield Episode(saw[: steps + 1, i], acted_i, got_i, ended_i, numbers)


def some_player(env: TensorVectorEnv) -> Player:
    """At random; two thirds seek pairs from memory, half of them dawdling."""
    random = at_random(env)
    if not isinstance(env, Concentration):
        return random
    thirds = torch.arange(env.num_envs) % 3
    memory = PairsFromMemory(env, dawdle=thirds == 2)
    return lambda obs: torch.where(thirds > 0, memory(obs), random(obs))


@every_level
@pytest.mark.parametrize("name", MODULES)
def test_is_popgyms(name: str, level: str) -> None:
    """With the same luck and actions, the same to the end, for 10,000 steps."""
    theirs = make_theirs(name, level)
    copies = math.ceil(10_000 / length_of(theirs))
    if name == "Concentration":  # some are done early
        copies = copies * 3 // 2
    env = make(name, level, copies)
    a, b = env.single_observation_space, theirs.observation_space
    if name == "Autoencode":  # the one mapping
        assert isinstance(b, Tuple) and a == MultiDiscrete([part.n for part in b])
    else:
        assert a == b
    assert env.single_action_space == theirs.action_space

    lengths, both = [], 0
    for ours in first_episodes(env, some_player(env)):
        lengths.append(len(ours.actions))
        theirs.np_random = luck_of(name, theirs, ours.seen, ours.numbers)
        seen, rewards, ends = [theirs.reset()[0]], [], []
        for action in ours.actions:
            obs, reward, *end, _ = theirs.step(action)
            seen.append(obs)
            rewards.append(reward)
            ends.append(end)
        assert np.array_equal(np.array(seen), ours.seen.numpy())
        assert np.allclose(rewards, ours.rewards, rtol=1e-6, atol=0)
        assert abs(sum(rewards)) <= 1 + 1e-9
        if ends[-1] == [True, True]:  # where we say terminated
            both += 1
            ends[-1] = [True, False]
        assert ends == ours.ends and True in ends[-1]
    assert sum(lengths) >= 10_000 and max(lengths) == length_of(theirs)
    assert (both > 0) == (name == "Concentration")


# ------------------------------------------------------ cards and odds are drawn fairly


def chi_square(counts: Tensor, expected: Tensor | float) -> float:
    """In standard deviations above its mean, all counts free but for their sum."""
    freedom = counts.numel() - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    return (chi2 - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("kinds", [2, 4, 13])
def test_deal_is_without_replacement(kinds: int) -> None:
    """Every card of the deck once; first and last card distributed as they must."""
    copies, decks = 20_000, 2
    generator = torch.Generator().manual_seed(kinds)
    left = full_deck(kinds, decks, copies, torch.device("cpu"))
    cards, dealt = 52 * decks, []
    for _ in range(cards):
        kind, left = deal(left, torch.rand(copies, 1, generator=generator))
        dealt.append(kind)
    table = torch.cat(dealt, dim=1).long()
    each = cards // kinds
    assert bool((torch.nn.functional.one_hot(table).sum(1) == each).all())
    assert bool((left == 0).all())
    kind, left = deal(left, torch.zeros(copies, 1))  # from an empty deck
    assert bool((kind == kinds).all()) and bool((left == 0).all())

    pairs = torch.bincount(table[:, 0] * kinds + table[:, -1], minlength=kinds**2)
    expected = torch.full((kinds, kinds), each / cards * each / (cards - 1))
    expected.diagonal().mul_((each - 1) / each)
    assert abs(chi_square(pairs, copies * expected.flatten())) < 5


@pytest.mark.parametrize("name", DEALT)
def test_starts(name: str) -> None:
    """Uniform over all observations that an episode can begin with."""
    env = make(name, "Medium", 8192)
    obs, _ = env.reset(seed=0)
    if name == "Autoencode":
        assert bool((obs[:, 0] == 1).all())
        obs = obs[:, 1]
    if name == "CountRecall":
        obs = obs @ torch.tensor([4, 1])  # value and question are independent
    n = {"HigherLower": 13, "CountRecall": 16}.get(name, 4)
    assert abs(chi_square(torch.bincount(obs, minlength=n), 8192 / n)) < 5


def test_concentration_starts() -> None:
    """All face down; what is turned first and second is dealt from one deck."""
    env = make("Concentration", "Hard", 20_000)
    obs, _ = env.reset(seed=0)
    assert bool((obs == 13).all())
    places = torch.rand(20_000, 52, generator=torch.Generator().manual_seed(0))
    first, second = places.topk(2).indices.T
    env.step(first)
    obs, *_ = env.step(second)
    faces = obs.gather(1, torch.stack([first, second], dim=1))
    pairs = torch.bincount(faces @ torch.tensor([13, 1]), minlength=169)
    expected = torch.full((13, 13), 1 / 13 * 4 / 51)
    expected.diagonal().mul_(3 / 4)
    assert abs(chi_square(pairs, 20_000 * expected.flatten())) < 5


def test_bandit_odds() -> None:
    """Uniform; and a run of an arm pays as often as its odds say."""
    env = make("MultiarmedBandit", "Easy", 4096)
    env.reset(seed=0)
    arm, paid = torch.arange(4096) % 10, torch.zeros(4096)
    for _ in range(199):
        obs, *_ = env.step(arm)
        paid += obs
    odds = env.state["odds"].gather(1, arm[:, None])[:, 0]
    assert bool(((env.state["odds"] >= 0).sum(1) == 1).all())
    bins = torch.bincount((odds * 64).long(), minlength=64)
    assert abs(chi_square(bins, 4096 / 64)) < 5
    z = (paid - 199 * odds) / (199 * odds * (1 - odds)).clamp(min=1).sqrt()
    assert abs(float(z.mean())) < 5 / math.sqrt(4096) and float(z.std()) < 1.1


# ------------------------------------------- games in which no action moves the cards


def best_player(name: str, decks: int) -> Player:
    """For one episode, from its start; all copies run in step."""
    seen: list[Tensor] = []
    watching = True

    def repeat_first(obs: Tensor) -> Tensor:
        seen.append(obs)
        return seen[0]

    def autoencode(obs: Tensor) -> Tensor:
        nonlocal watching
        if watching:
            seen.append(obs[:, 1])
        watching = bool(obs[0, 0])
        return seen[0] if watching else seen.pop()

    def count_recall(obs: Tensor) -> Tensor:
        seen.append(obs[:, 0])
        return (torch.stack(seen, dim=1) == obs[:, 1:]).sum(1)

    def higher_lower(obs: Tensor) -> Tensor:
        seen.append(obs)
        ranks = torch.arange(13)
        left = 4 * decks - (torch.stack(seen, dim=1)[..., None] == ranks).sum(1)
        direction = (ranks - obs[:, None]).sign()
        return ((left * direction).sum(1) < 0).long()

    player: Player = locals()[MODULES[name]]
    return player


def best_of_higher_lower(cards: int) -> float:
    """The mean of |higher - lower| / left, summed over the steps, divided by N.

    Given the rank shown, the r cards left are any r of the others: how many of them are
    higher and lower is multivariate hypergeometric.
    """
    log = np.cumsum(np.log(np.maximum(np.arange(cards + 1), 1)))

    def choose(n: int, k: Any) -> Any:
        inside = (k >= 0) & (k <= n)
        k = np.where(inside, k, 0)
        return np.where(inside, log[n] - log[k] - log[n - k], -np.inf)

    total, each = 0.0, cards // 13
    for rank in range(13):
        above, below = each * (12 - rank), each * rank
        higher, lower = np.arange(above + 1)[:, None], np.arange(below + 1)
        ways = choose(above, higher) + choose(below, lower)
        for r in range(1, cards):
            p = ways + choose(each - 1, r - higher - lower) - choose(cards - 1, r)
            total += float((np.exp(p) * abs(higher - lower)).sum()) / r
    return total / 13 / cards


def without_memory(name: str, env: TensorVectorEnv, steps: int) -> tuple[float, Player]:
    """The stated ceiling, and a player that reaches it."""
    cards = steps + 1
    match name:
        case "RepeatFirst":
            return -1 / 2 + 3 / (2 * steps**2), lambda obs: obs
        case "Autoencode":
            return -1 / 2 + 3 / (steps + 1), lambda obs: obs[:, 1]
        case "CountRecall":
            each = n_actions(env) - 1
            right = 1 + (cards / each - 1) * each / (each + 1)
            return 2 * right / steps - 1, lambda obs: torch.ones_like(obs[:, 0])
        case _:
            return 84 / 169, lambda obs: (obs > 6).long()


def row_numbers(env: TensorVectorEnv, obs: Tensor) -> Tensor:
    space = env.single_observation_space
    if isinstance(space, MultiDiscrete):
        return obs[:, 0] * int(space.nvec[1]) + obs[:, 1]
    return obs


def tabulated(env: TensorVectorEnv, steps: int) -> Player:
    """For each observation, the action with the highest mean reward after it."""
    n, player = n_actions(env), at_random(env)
    table = torch.zeros(2, 256 * n)  # sums, visits
    obs, _ = env.reset(seed=1)
    for _ in range(steps):
        actions = player(obs)
        cells = row_numbers(env, obs) * n + actions
        obs, rewards, *_ = env.step(actions)
        table[0].index_add_(0, cells, rewards)
        table[1] += torch.bincount(cells, minlength=256 * n)
    best = (table[0] / table[1]).nan_to_num(-1.0).view(256, n).argmax(1)
    return lambda obs: best[row_numbers(env, obs)]


@every_level
@pytest.mark.parametrize("name", DEALT)
def test_ceilings(name: str, level: str) -> None:
    env = make(name, level, 512)
    steps = length_of(make_theirs(name, level))
    decks = LEVELS.index(level) + 1
    best = first_returns(env, best_player(name, decks))
    by_chance = first_returns(env, at_random(env))
    n = n_actions(env)
    if name == "HigherLower":
        value = best_of_higher_lower(steps + 1)
        assert_in_docstring(env, level, f"{value:.4f}")
        assert float(best.mean()) == pytest.approx(value, abs=five_errors(best))
        chance = 0.0
    else:
        assert torch.allclose(best, torch.ones(()))
        player = best_player(name, decks)
        worst = first_returns(env, lambda obs: (player(obs) + 1) % n)
        assert torch.allclose(worst, -torch.ones(()))
        chance = 2 / n - 1
    assert float(by_chance.mean()) == pytest.approx(chance, abs=five_errors(by_chance))

    ceiling, rule = without_memory(name, env, steps)
    digits = 6 if name == "RepeatFirst" else 4
    assert_in_docstring(env, level, str(steps), f"{ceiling:.{digits}f}")
    returns = first_returns(env, rule)
    assert float(returns.mean()) == pytest.approx(ceiling, abs=five_errors(returns))
    returns = first_returns(env, tabulated(env, steps))
    assert float(returns.mean()) < ceiling + five_errors(returns)


# -------------------------------------------------------------------- Concentration

Cards = tuple[tuple[int, int], ...]  # (unknown, known) of each kind that is left
Gamble = Callable[[tuple[int, int], Cards], bool]


class Oracle:
    """Least mean number of failures, if an unknown card is turned first."""

    def __init__(self) -> None:
        self.failures = functools.cache(self._failures)

    def _failures(self, cards: Cards) -> float:
        unknown = sum(u for u, _ in cards)
        if unknown == 0:
            return 0.0
        total = 0.0
        for (u, k), times in Counter(cards).items():
            if u:
                match, gamble = self.second((u - 1, k), without(cards, (u, k)))
                total += times * u / unknown * min(match, gamble)
        return total

    def second(self, kind: tuple[int, int], others: Cards) -> tuple[float, float]:
        """Failures to come if a known card is turned second, or an unknown one.

        `kind` is that of the first card, which is not counted.
        """
        u, k = kind
        match = self.failures(with_(others, (u, k - 1))) if k else math.inf
        unknown = u + sum(v for v, _ in others)
        if unknown == 0:
            return match, math.inf
        gamble = 0.0
        if u:
            gamble += u / unknown * self.failures(with_(others, (u - 1, k)))
        for (v, m), times in Counter(others).items():
            if v:
                after = with_(without(others, (v, m)), (v - 1, m + 1), (u, k + 1))
                gamble += times * v / unknown * (1 + self.failures(after))
        return match, gamble


def without(cards: Cards, kind: tuple[int, int]) -> Cards:
    i = cards.index(kind)
    return cards[:i] + cards[i + 1 :]


def with_(cards: Cards, *kinds: tuple[int, int]) -> Cards:
    return tuple(sorted(cards + tuple(kind for kind in kinds if kind != (0, 0))))


class PairsFromMemory:
    """An unknown card, then its match if known: one episode, in which no step is idle.

    - `gamble(kind, others)`: to turn an unknown card where a match is known.
    - `dawdle`: copies that turn the last pair as late as possible.
    """

    def __init__(
        self,
        env: Concentration,
        gamble: Gamble | None = None,
        dawdle: Tensor | None = None,
    ) -> None:
        self.kinds = int(env._face_down)
        self.seen = torch.full((env.num_envs, env.cards), self.kinds)
        self.gone = torch.zeros_like(self.seen, dtype=torch.bool)
        self.dawdle = torch.zeros(env.num_envs) if dawdle is None else dawdle
        self.gamble = gamble
        self.each, self.last_turn = env.cards // self.kinds, 2 * env.cards - 2
        self.turned: list[Tensor] = []  # places [B, 1]

    def __call__(self, obs: Tensor) -> Tensor:
        seen = self.seen = torch.where(obs < self.kinds, obs, self.seen)
        if self.turned and len(self.turned) % 2 == 0:
            a, b = self.turned[-2:]
            pair = torch.cat([a, b], dim=1)
            match = (seen.gather(1, a) == seen.gather(1, b)) & (a != b)
            self.gone = self.gone.scatter(1, pair, self.gone.gather(1, pair) | match)
        free = ~self.gone
        unknown = free & (seen == self.kinds)
        if len(self.turned) % 2 == 0:
            wanted = unknown.where(unknown.any(1, keepdim=True), free)
        else:
            first = self.turned[-1]
            match = free & (seen == seen.gather(1, first))
            match = match.scatter(1, first, False)
            known = match.any(1, keepdim=True)
            if self.gamble:
                known = known & ~self._gambles(first, free)
            wanted = match.where(known | ~unknown.any(1, keepdim=True), unknown)
        idle = (free.sum(1) == 2) & (len(self.turned) < self.last_turn)
        wanted = self.gone.where((idle & self.dawdle.bool())[:, None], wanted)
        self.turned.append(wanted.int().argmax(1, keepdim=True))
        return self.turned[-1][:, 0]

    def _gambles(self, first: Tensor, free: Tensor) -> Tensor:
        assert self.gamble
        kinds = torch.arange(self.kinds)
        shown = self.seen[..., None] == kinds
        unknown = (self.each - shown.sum(1)).tolist()
        known = (shown & free.scatter(1, first, False)[..., None]).sum(1).tolist()
        rows = []
        for i, kind in enumerate(self.seen.gather(1, first)[:, 0].tolist()):
            pairs = list(zip(unknown[i], known[i], strict=True))
            mine = pairs.pop(kind)
            rows.append(mine[1] > 0 and self.gamble(mine, with_((), *pairs)))
        return torch.tensor(rows)[:, None]


@pytest.mark.parametrize(
    "level",
    ["Easy", *(pytest.param(x, marks=pytest.mark.slow) for x in ("Medium", "Hard"))],
)
def test_concentration_best(level: str) -> None:
    env = make("Concentration", level, 512)
    kinds, oracle = int(env._face_down), Oracle()
    best = 1 - oracle.failures(((env.cards // kinds, 0),) * kinds) / env.cards
    assert_in_docstring(env, level, str(env.cards), f"{best:.4f}")

    def gamble(kind: tuple[int, int], others: Cards) -> bool:
        match, other = oracle.second(kind, others)
        return other < match - 1e-12

    returns = first_returns(env, PairsFromMemory(env, gamble))
    assert float(returns.mean()) == pytest.approx(best, abs=five_errors(returns))
    if level == "Hard":  # there it never gambles
        player = PairsFromMemory(env)
        assert torch.equal(first_returns(env, player), returns)
    assert not oracle.failures(((2, 0),))  # two of a kind: nothing to fail


def test_concentration_greedy() -> None:
    """The best player for ranks, checked above, reaches what is stated."""
    env = make("Concentration", "Hard", 2048)
    returns = first_returns(env, PairsFromMemory(env))
    assert float(returns.mean()) == pytest.approx(0.7324, abs=five_errors(returns))


def position_blind(kinds: int, cards: int) -> float:
    """The best mean without memory, if all places face down are alike.

    State: the cards left of each kind that has any, the turns left, and of how many
    cards are the kinds of the two in sight, if the last turn failed.
    """

    @functools.cache
    def value(left: tuple[int, ...], turns: int, sight: tuple[int, ...]) -> float:
        if not left or not turns:
            return 0.0
        total = sum(left)

        def turn(first: int) -> float:
            i = left.index(first)
            others = left[:i] + left[i + 1 :]
            after = tuple(sorted(others + ((first - 2,) if first > 2 else ())))
            result = 0.0
            if first > 1:
                result += (first - 1) * (2 / cards + value(after, turns - 1, ()))
            for second, times in Counter(others).items():
                failed = value(left, turns - 1, tuple(sorted((first, second))))
                result += times * second * (-1 / cards + failed)
            return result / (total - 1)

        def any_of(weights: dict[int, int]) -> float:
            some = sum(weights.values())
            return sum(n / some * turn(count) for count, n in weights.items() if n)

        everywhere = Counter({n: n * times for n, times in Counter(left).items()})
        choices = [any_of(everywhere), *(turn(count) for count in sight)]
        if sight and total > 2:
            choices.append(any_of(everywhere - Counter(sight)))
        return max(choices)

    return value((cards // kinds,) * kinds, cards, ())


@every_level
def test_concentration_without_memory(level: str) -> None:
    env = make("Concentration", level, 2048)
    down = int(env._face_down)
    ceiling = position_blind(down, env.cards)
    assert_in_docstring(env, level, f"{ceiling:.4f}")
    generator = torch.Generator().manual_seed(0)

    def blind(obs: Tensor) -> Tensor:
        """Any card that is face down."""
        draw = torch.rand(obs.shape, generator=generator)
        return draw.where(obs == down, -1.0).argmax(1)

    returns = first_returns(env, blind)
    assert -0.05 < float(returns.mean()) - ceiling < five_errors(returns)
    chance = first_returns(env, at_random(env))
    stated = {"Easy": -0.192, "Medium": -0.186, "Hard": -0.835}[level]
    assert_in_docstring(env, level, f"{stated:.3f}")
    assert float(chance.mean()) == pytest.approx(stated, abs=five_errors(chance))


# ------------------------------------------------------------------------- the bandit


@every_level
def test_bandit_ceilings(level: str) -> None:
    env = make("MultiarmedBandit", level, 2048)
    n, steps, copies = n_actions(env), env.max_episode_steps, env.num_envs
    chance = first_returns(env, at_random(env))
    assert float(chance.mean()) == pytest.approx(0, abs=five_errors(chance))

    # Who knows the odds
    env.reset(seed=0)
    odds = torch.rand(copies, n, generator=torch.Generator().manual_seed(0))
    env.load_state_dict(env.state_dict() | {"odds": odds})
    for _ in range(steps):
        *_, truncated, infos = env.step(odds.argmax(1))
    assert bool(truncated.all())
    informed, value = infos["episode_return"], (n - 1) / (n + 1)
    assert_in_docstring(env, level, str(steps), f"{value:.4f}")
    assert float(informed.mean()) == pytest.approx(value, abs=five_errors(informed))

    # Who learns them, from its own actions and what they paid
    pulls, paid = torch.zeros(copies, n), torch.zeros(copies, n)
    actions = torch.zeros(copies, 1, dtype=torch.int64)

    def learns(obs: Tensor) -> Tensor:
        nonlocal actions
        t = int(pulls[0].sum())
        paid.scatter_add_(1, actions, obs[:, None].float())  # 0 before the first step
        mean, count = (paid + 1) / (pulls + 2), pulls + 2
        deviation = (mean * (1 - mean) / (count + 1)).sqrt()
        width = (torch.log1p((steps - t) / count) / 2).sqrt()
        actions = (mean + deviation * width).argmax(1, keepdim=True)
        pulls.scatter_add_(1, actions, torch.ones(copies, 1))
        return actions[:, 0]

    learned = first_returns(env, learns)
    stated = {"Easy": 0.73, "Medium": 0.82, "Hard": 0.85}[level]
    assert_in_docstring(env, level, f"{stated:.2f}")
    off = five_errors(learned) + 0.005
    assert float(learned.mean()) == pytest.approx(stated, abs=off)
    assert learned.mean() < value

    # Who forgets at once
    random = at_random(env)
    ceiling = math.log(3) - 1
    assert_in_docstring(env, level, f"{ceiling:.4f}")
    others = (n - 1) / n

    def memoryless(obs: Tensor) -> Tensor:
        return torch.where(obs > 0, 0, 1 + (random(obs) * others).long())

    returns = first_returns(env, memoryless)
    assert -0.03 < float(returns.mean()) - ceiling < five_errors(returns)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepeatFirst(decks=0), "decks is 0: give at least 1"),
        (lambda: Autoencode(decks=-1), "decks is -1: give at least 1"),
        (lambda: CountRecall(decks=0), "decks is 0: give at least 1"),
        (lambda: HigherLower(decks=0), "decks is 0: give at least 1"),
        (lambda: Concentration(decks=0), "decks is 0: give at least 1"),
        (lambda: CountRecall(kind="faces"), "kind is 'faces': choose one of colors, "),
        (lambda: Concentration(kind="suits"), "kind is 'suits': choose colors or r"),
        (lambda: MultiarmedBandit(arms=0), "arms is 0: give at least 1"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
