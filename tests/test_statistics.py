"""Statistics of scores, against slow oracles and known limits."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from rlrnn.statistics import (
    bootstrap_interval,
    equivalent_trials,
    expected_best,
    improvement_interval,
    interquartile_mean,
    normalised,
    probability_of_improvement,
    regret,
)

RNG = np.random.default_rng(0)


def test_interquartile_mean_is_that_of_the_middle_half() -> None:
    assert interquartile_mean(np.array([0.0, 1, 2, 99])) == 1.5
    assert interquartile_mean(np.array([[5.0]])) == 5
    scores = RNG.normal(size=(5, 7))
    ordered = sorted(scores.ravel())
    assert interquartile_mean(scores) == pytest.approx(np.mean(ordered[8:27]))
    # what lies outside does not matter, nor does the order
    spoilt = np.where(scores >= ordered[27], 1e9, scores)
    assert interquartile_mean(spoilt[::-1]) == pytest.approx(interquartile_mean(scores))


def test_the_bootstrap_is_stratified() -> None:
    """Tasks that differ, and runs that do not: there is nothing to draw."""
    scores = np.tile(np.arange(6.0), (4, 1))
    low, high = bootstrap_interval(scores, draws=50)
    assert low == high == interquartile_mean(scores)


def test_the_interval_is_that_of_all_samples() -> None:
    scores = np.array([[0.0, 10.0], [1.0, 14.0], [5.0, 11.0]])

    def mean(sample: NDArray[np.float64]) -> float:
        return float(sample.mean())

    rows = list(itertools.product(range(3), repeat=3))
    every = [
        (scores[list(a), 0].mean() + scores[list(b), 1].mean()) / 2
        for a in rows
        for b in rows
    ]
    found = bootstrap_interval(scores, mean, draws=20_000)
    for value, q in zip(found, (2.5, 97.5), strict=True):
        assert value == pytest.approx(np.percentile(every, q), abs=0.15)
    assert bootstrap_interval(scores, mean, 500) == bootstrap_interval(
        scores, mean, 500
    )


def test_the_interval_covers_as_often_as_it_says() -> None:
    def mean(sample: NDArray[np.float64]) -> float:
        return float(sample.mean())

    inside = 0
    for i in range(200):
        scores = np.random.default_rng(i).normal(size=(20, 2))
        low, high = bootstrap_interval(scores, mean, 200, 0.8, i)
        inside += low <= 0 <= high
    assert inside / 200 == pytest.approx(0.8, abs=0.08)


def test_probability_of_improvement_counts_pairs() -> None:
    x = RNG.integers(0, 4, (5, 3)).astype(float)
    y = RNG.integers(0, 4, (4, 3)).astype(float)
    total = 0.0
    for t in range(3):
        for i in range(5):
            for j in range(4):
                a, b = x[i, t], y[j, t]
                total += 1 if a > b else 0.5 if a == b else 0
    assert probability_of_improvement(x, y) == pytest.approx(total / 60)
    assert probability_of_improvement(y, x) == pytest.approx(1 - total / 60)
    assert probability_of_improvement(x, x) == 0.5
    assert probability_of_improvement(x + 9, x) == 1
    assert improvement_interval(x + 9, x, 50) == (1, 1)
    low, high = improvement_interval(x, y, 300)
    assert low < total / 60 < high


def test_scores_and_regret() -> None:
    default = np.array([[3.0, 2.0], [5.0, 2.5]])
    best = np.array([[1.0, 1.5], [2.0, 1.5]])
    assert not normalised(default, default, best).any()
    assert np.allclose(normalised(best, default, best).mean(0), 1)
    half = (default + best) / 2
    assert np.allclose(normalised(half, default, best).mean(0), 0.5)
    # what all runs of a seed have in common does not matter
    level = np.array([[7.0], [-1.0]])
    shifted = normalised(half + level, default + level, best + level)
    assert np.allclose(shifted, normalised(half, default, best))
    above = np.array([[2, 1 / 3], [1.5, 2 / 3]])
    assert np.allclose(regret(default, best), above)
    with pytest.raises(ValueError, match="^task 1: the default is 0.75 below the best"):
        normalised(half, np.array([[3.0, 0.75], [5.0, 0.75]]), best)


def test_expected_best_is_the_mean_over_all_searches() -> None:
    probe, valid = RNG.permutation(4).astype(float), RNG.normal(size=4)
    found = expected_best(probe, valid)
    for n in (1, 2, 3, 4):
        searches = itertools.product(range(4), repeat=n)
        taken = [valid[min(s, key=lambda i: probe[i])] for s in searches]
        assert found[n - 1] == pytest.approx(np.mean(taken))
    assert found[0] == pytest.approx(valid.mean())


def test_equivalent_trials_invert_the_curve() -> None:
    losses = RNG.normal(size=30)
    curve = expected_best(losses, losses)
    for n in (1, 2, 7, 29, 30):
        assert equivalent_trials(float(curve[n - 1]), losses, losses) == (
            pytest.approx(n)
        )
    middle = float(0.25 * curve[4] + 0.75 * curve[5])
    assert equivalent_trials(middle, losses, losses) == pytest.approx(5.75)
    assert equivalent_trials(math.inf, losses, losses) == 0
    assert equivalent_trials(-9.0, losses, losses) == 30
    # better losses are worth more trials
    worth = [equivalent_trials(x, losses, losses) for x in np.linspace(-3, 3, 50)]
    assert worth == sorted(worth, reverse=True)
