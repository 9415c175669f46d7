"""Scores of few runs, honestly (Agarwal et al. 2021, "Deep reinforcement learning at
the edge of the statistical precipice").

Scores are [R, T]: R runs (seeds) of each of T tasks. All but losses and regret are
"higher is better".
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Array = NDArray[np.float64]


def interquartile_mean(scores: Float[np.ndarray, "*shape"]) -> float:
    """The mean of the middle half of all scores, runs and tasks together: a quarter of
    them, rounded down, is cut at each end."""
    ordered = np.sort(np.asarray(scores, np.float64), axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def bootstrap_interval(
    scores: Float[np.ndarray, "R T"],
    statistic: Callable[[Array], float] = interquartile_mean,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """A percentile interval of a statistic, by stratified bootstrap: runs are drawn
    anew for each task by itself."""
    rng = np.random.default_rng(seed)
    runs, tasks = scores.shape
    columns = np.arange(tasks)
    values = [
        statistic(scores[rng.integers(0, runs, (runs, tasks)), columns])
        for _ in range(draws)
    ]
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def probability_of_improvement(
    x: Float[np.ndarray, "R T"], y: Float[np.ndarray, "S T"]
) -> float:
    """How likely a run of x has a higher score than one of y, on a task drawn at
    random; a tie is half (Mann & Whitney 1947)."""
    above = (x[:, None] > y[None]).mean((0, 1))
    tied = (x[:, None] == y[None]).mean((0, 1))
    return float((above + tied / 2).mean())


def improvement_interval(
    x: Float[np.ndarray, "R T"],
    y: Float[np.ndarray, "S T"],
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of `probability_of_improvement`, both drawn anew."""
    rng = np.random.default_rng(seed)
    columns = np.arange(x.shape[1])

    def again(scores: Array) -> Array:
        drawn: Array = scores[rng.integers(0, len(scores), scores.shape), columns]
        return drawn

    values = [probability_of_improvement(again(x), again(y)) for _ in range(draws)]
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def normalised(
    losses: Float[np.ndarray, "R T"],
    default: Float[np.ndarray, "R T"],
    best: Float[np.ndarray, "R T"],
) -> Float[np.ndarray, "R T"]:
    """Scores of losses: 0 is the default's, 1 the best's on average. Each run is
    compared with the default's of the same seed, in units of the mean distance on its
    task between default and best.

    Raises ValueError for a task in which the default is no worse than the best.
    """
    room = (default - best).mean(0)
    if not (room > 0).all():
        raise ValueError(
            f"task {int(np.argmin(room))}: the default is {-room.min():.4g} below "
            "the best, expected above it; such a task measures nothing: leave it out"
        )
    scores: Array = (default - losses) / room
    return scores


def regret(
    losses: Float[np.ndarray, "R T"], best: Float[np.ndarray, "R T"]
) -> Float[np.ndarray, "R T"]:
    """How far losses lie above the best of the same seed, as a share of it."""
    above: Array = losses / best - 1
    return above


def expected_best(
    selected_by: Float[np.ndarray, "M"], losses: Float[np.ndarray, "M"]
) -> Float[np.ndarray, "M"]:
    """The expected loss of random searches of 1, 2, ... M runs, from M runs that were
    made (Dodge et al. 2019, "Show your work"): a search draws n of them with
    replacement and takes the loss of the one that `selected_by` is lowest for."""
    order = np.argsort(selected_by, kind="stable")
    size = len(order)
    behind = 1 - np.arange(size + 1) / size  # P(a draw is behind the i-th best)
    n = np.arange(1, size + 1)[:, None]
    chance = behind[None, :-1] ** n - behind[None, 1:] ** n
    expected: Array = chance @ losses[order]
    return expected


def equivalent_trials(
    loss: float,
    selected_by: Float[np.ndarray, "M"],
    losses: Float[np.ndarray, "M"],
) -> float:
    """How many runs of a random search are expected to reach `loss`: between two whole
    numbers by linear interpolation of `expected_best`. 0 if a single run is expected to
    do better; as many as were made, a lower bound, if all of them are not."""
    curve = np.minimum.accumulate(expected_best(selected_by, losses))
    if loss > curve[0]:
        return 0.0
    if loss <= curve[-1]:
        return float(len(curve))
    after = int(np.argmax(curve <= loss))
    above, below = curve[after - 1], curve[after]
    return float(after + (above - loss) / (above - below))
