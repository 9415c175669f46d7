"""From a sweep of rates to the rate of a run (after Smith 2017, "Cyclical learning
rates for training neural networks")."""

import math

import numpy as np

from rlrnn.control import Array

# Measured: see docs/controller.md.
RANGE_SHARE = 0.8  # of the sweep's fall
SGD_FACTOR = 16.0  # plain SGD stands more than a sweep finds; momentum does not


def suggest_lambda(rates: Array, losses: Array, truncation: int, power: float) -> float:
    """Lambda for a run: the first rate of the sweep at which the smoothed loss has
    fallen by most of what it falls before it blows up.

    The lowest loss itself comes late, on a plateau: there the sweep has merely gone on
    for longer. NaN if the loss never fell by 2 %: the sweep was too short to tell.
    Windows in which no loss was due are NaN in `losses`.
    """
    known = ~np.isnan(losses)
    rates, losses = rates[known], losses[known]
    if len(losses) < 5:
        return math.nan
    level = float(losses[:3].mean())
    alive = np.isfinite(losses) & (losses < level + abs(level))
    end = len(losses) if alive.all() else max(1, int(np.argmin(alive)))
    kernel = np.array([1.0, 2.0, 3.0, 2.0, 1.0])
    weight = np.convolve(np.ones(end), kernel, mode="same")[:end]
    smooth = np.convolve(losses[:end], kernel, mode="same")[:end] / weight
    if not math.isfinite(level) or smooth.min() > level - 0.02 * abs(level):
        return math.nan
    target = level - RANGE_SHARE * (level - float(smooth.min()))
    return float(rates[int(np.argmax(smooth <= target))] / truncation**power)
