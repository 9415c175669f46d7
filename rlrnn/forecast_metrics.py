"""The field's measures of forecasts, and the simple forecasts they compare with.

Pure functions on one series. n: values in the past, h: of the forecast, m: values in a
season. Missing values are NaN and count for nothing.
"""

import warnings

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def smape(true: Values, forecast: Values) -> float:
    """200 |y - f| / (|y| + |f|), the mean; in per cent (Makridakis 1993)."""
    size = np.abs(true) + np.abs(forecast)
    return _mean(200 * np.abs(true - forecast) / np.where(size == 0, 1.0, size))


def mase(true: Values, forecast: Values, past: Values, season: int = 1) -> float:
    """The mean absolute error over that of the seasonal naive forecast in the past
    (Hyndman & Koehler 2006). NaN for a past that is shorter than a season, or repeats
    its season exactly."""
    scale = _mean(np.abs(past[season:] - past[:-season])) if len(past) > season else 0.0
    # what equal numbers differ by may be a rounding error
    exact = not scale > 1e-9 * _mean(np.abs(past))
    return np.nan if exact else _mean(np.abs(true - forecast)) / scale


def _mean(values: Values) -> float:
    with warnings.catch_warnings():  # the mean of nothing is NaN, and no surprise
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(values))


def seasonal_naive(past: Values, horizon: int, season: int = 1) -> Values:
    """The last season, again and again; [h]."""
    ahead = np.arange(horizon) % season - season
    return past[ahead]


def naive_2(past: Values, horizon: int, season: int = 1) -> Values:
    """The M4 competition's Naive 2: the last value, after a multiplicative seasonal
    adjustment where the series is seasonal at 90 % (Makridakis et al. 2020, "The M4
    competition"); [h]."""
    if season > 1 and is_seasonal(past, season):
        indices = seasonal_indices(past, season)
        ahead = (len(past) + np.arange(horizon)) % season
        last = past[-1] / indices[(len(past) - 1) % season]
    else:
        indices, ahead, last = np.ones(1), np.zeros(horizon, int), past[-1]
    forecast: Values = last * indices[ahead]
    return forecast


def is_seasonal(past: Values, season: int) -> bool:
    """Whether the autocorrelation at lag m is outside its 90 % limits, which allow for
    that at the lags before (Bartlett 1946). False for less than three seasons."""
    count = len(past)
    if count < 3 * season:
        return False
    centred = past - past.mean()
    power = centred @ centred
    if power == 0:
        return False
    r = np.array([centred[k:] @ centred[:-k] for k in range(1, season + 1)]) / power
    limit = 1.645 / np.sqrt(count) * np.sqrt(1 + 2 * (r[:-1] ** 2).sum())
    return bool(abs(r[-1]) > limit)


def seasonal_indices(past: Values, season: int) -> Values:
    """Of the classical multiplicative decomposition: the mean ratio of the values to
    their centred moving average, for each phase from the first value on; [m], mean 1.
    """
    weights = np.full(season, 1 / season)
    if season % 2 == 0:  # 2 x m: half of the first and of the last
        weights = np.convolve(weights, [0.5, 0.5])
    trend = np.convolve(past, weights, "valid")
    begin = len(weights) // 2
    ratio = np.full(len(past), np.nan)
    ratio[begin : begin + len(trend)] = past[begin : begin + len(trend)] / trend
    indices = np.array([np.nanmean(ratio[phase::season]) for phase in range(season)])
    indices /= indices.mean()
    return indices
