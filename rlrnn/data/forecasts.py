"""Forecasts in the series' units: of a part's windows, with their measures, and of what
follows the end of a file.

Shapes: S series, V variables, W windows, H horizon, Q quantiles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlrnn.data.encoding import Array, Format, encode, restored, scalers_of, schema_of
from rlrnn.data.files import DataError
from rlrnn.data.tables import Series, read_series
from rlrnn.data.windows import Panel, Shape, Windows
from rlrnn.evaluation import evaluating, outputs
from rlrnn.forecast_metrics import mase, naive_2, smape
from rlrnn.models import SequenceModel
from rlrnn.objectives import Numbers, pinball


def for_each_variable(
    begins: NDArray[np.int64], rows: NDArray[np.int64], panel: Panel, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same windows of each variable by itself, [W V]."""
    times = len(panel.past)
    variable = np.arange(count)
    begins = begins[:, None] + times * variable
    return begins.ravel(), (rows[:, None] * count + variable).ravel()


def predicted(
    model: SequenceModel,
    objective: Numbers,
    windows: Windows,
    offset: Array,
    scale: Array,
    format: Format,
    levels: Sequence[float] = (),
) -> tuple[Array, Array]:
    """Point forecasts [W, H, V], and quantiles at `levels` [W, H, V, Q], in the series'
    units; `offset` and `scale` [S, V] are those of the windows' series. With separate
    channels W counts the windows of all variables together."""
    variables = len(format["schema"]["targets"])
    width = 1 if format["channels"] == "apart" else variables
    points, quantiles = [], []
    with evaluating(model):
        for _, out in outputs(model, windows, windows.length):
            out = out[windows.shape.steps - 1 :: windows.shape.steps]  # the last steps
            points.append(objective.point(out).cpu())
            if levels:
                quantiles.append(objective.intervals(out, tuple(levels)).cpu())
    count, horizon = len(windows), format["horizon"]

    def in_units(parts: list[torch.Tensor], trailing: tuple[int, ...]) -> Array:
        if not parts:
            return np.zeros((0,))
        whole = torch.cat(parts).flatten(0, 1)[:count].double().numpy()
        values = whole.reshape(count, horizon, width, *trailing)
        anchors = windows.anchors.cpu().double().numpy()[:, None]  # [W, 1, width]
        rows = windows.rows.cpu().numpy()
        if width == variables:
            a, b = offset[rows][:, None], scale[rows][:, None]
        else:
            a, b = (t.reshape(-1)[rows][:, None, None] for t in (offset, scale))
        if trailing:
            anchors, a, b = anchors[..., None], a[..., None], b[..., None]
        values = restored(values + anchors, a, b, format["log"])
        if width == variables:
            return values
        # [W V, H, 1] -> [W, H, V]
        values = values.reshape(count // variables, variables, horizon, *trailing)
        return np.moveaxis(values, 1, 2)

    return in_units(points, ()), in_units(quantiles, (len(levels),))


def make_judge(
    series: list[Series],
    ends: dict[str, list[int]],
    objective: Numbers,
    format: Format,
    tests: dict[str, Windows],
) -> Callable[[Any, str], dict[str, float]]:
    """`Problem.judge` for the windows `tests` of the parts valid and test; `ends`: of
    the values of each series before the part."""
    offset, scale = scalers_of(series, format)
    starts = np.concatenate(([0], np.cumsum([len(one) for one in series])))
    variables = len(format["schema"]["targets"])
    apart = format["channels"] == "apart"
    levels = objective.quantiles if objective.parameters > 1 else ()

    def judge(model: Any, split: str) -> dict[str, float]:
        """Metrics in the series' units, means over windows and variables; MASE over the
        seasonal naive error before the part."""
        device = next(model.parameters()).device
        windows = tests[split].to(device)
        points, quantiles = predicted(
            model, objective, windows, offset, scale, format, levels
        )
        begins = windows.begins.cpu().numpy()[:: variables if apart else 1]
        rows = windows.rows.cpu().numpy()[:: variables if apart else 1]
        which = rows // variables if apart else rows
        origins = begins - starts[which] + format["lookback"]
        at = (starts[which] + origins)[:, None] + np.arange(format["horizon"])
        true = np.concatenate([one.targets for one in series])[at]  # [W, H, V]
        figures = _errors(true, points)
        figures |= _scaled_errors(series, ends[split], which, true, points, format)
        if levels:
            truth, q = torch.from_numpy(true), torch.from_numpy(quantiles)
            lost = pinball(q, truth, tuple(levels))
            figures["pinball_units"] = float(lost.nanmean())
        return figures

    return judge


def _errors(true: Array, points: Array) -> dict[str, float]:
    error = points - true
    mse = float(np.nanmean(error**2))
    return {
        "mse_units": mse,
        "rmse_units": mse**0.5,
        "mae_units": float(np.nanmean(np.abs(error))),
    }


def _scaled_errors(
    series: list[Series],
    ends: list[int],
    which: NDArray[np.int64],
    true: Array,
    points: Array,
    format: Format,
) -> dict[str, float]:
    """sMAPE and MASE; and OWA, the mean of both relative to Naive 2, where each series
    has one forecast (the M4 competition's)."""
    season, horizon = format["season"], format["horizon"]
    one_each = len(np.unique(which)) == len(which)
    rows: dict[str, list[float]] = {"smape": [], "mase": []}
    naive: dict[str, list[float]] = {"smape": [], "mase": []}
    for number, y, forecast in zip(which, true, points, strict=True):
        for v in range(y.shape[1]):
            past = series[number].targets[: ends[number], v]
            rows["smape"].append(smape(y[:, v], forecast[:, v]))
            rows["mase"].append(mase(y[:, v], forecast[:, v], past, season))
            if one_each:
                filled = pd.Series(past).ffill().bfill().to_numpy()
                simple = naive_2(filled, horizon, season)
                naive["smape"].append(smape(y[:, v], simple))
                naive["mase"].append(mase(y[:, v], simple, past, season))
    figures = {name: float(np.nanmean(values)) for name, values in rows.items()}
    if one_each:
        ratios = [figures[name] / np.nanmean(naive[name]) for name in rows]
        figures["owa"] = float(np.mean(ratios))
    return figures


@dataclass(frozen=True)
class Forecast:
    """The values after the end of each series, in its units.

    values [S, H, V]; quantiles [S, H, V, Q] at `levels`, with Q = 0 for a model that
    gives none; times: [H] of each series.
    """

    names: list[str]
    targets: list[str]
    times: list[pd.Index]
    values: Array
    levels: list[float]
    quantiles: Array

    def frame(self) -> pd.DataFrame:
        """In the long form: unique_id, ds, then for each target its forecast and its
        quantiles (`OT`, `OT_0.1`, ...)."""
        parts = []
        for s, (name, times) in enumerate(zip(self.names, self.times, strict=True)):
            columns: dict[str, Any] = {"unique_id": name, "ds": times}
            for v, target in enumerate(self.targets):
                columns[target] = self.values[s, :, v]
                for q, level in enumerate(self.levels):
                    columns[f"{target}_{level:g}"] = self.quantiles[s, :, v, q]
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)


def forecast(
    model: SequenceModel,
    format: Format,
    path: str | Path,
    levels: Sequence[float] = (),
) -> Forecast:
    """What follows each series of a file, which has the columns of the training file.

    Rows after the last target give the future covariates. A series that training did
    not see is scaled by its own values; one wide file is taken for that of training,
    whatever its name. `levels`: of the quantiles; without any, those
    that a loss with intervals was trained with.

    Raises DataError, in one line, for a file that does not fit, a series shorter than
    the lookback, or future covariates that are missing; ValueError for levels that the
    model does not give.
    """
    series, schema = read_series(path, schema_of(format))
    names = [one.name for one in series]
    if schema.form == "wide" and len(series) == len(format["names"]) == 1:
        series = [replace(series[0], name=format["names"][0])]
    lookback, horizon = format["lookback"], format["horizon"]
    ready, ends = [], []
    for one in series:
        there = np.flatnonzero(~np.isnan(one.targets).all(axis=1))
        end = int(there[-1]) + 1 if len(there) else 0
        if end < lookback:
            raise DataError(
                f"{path}: the series {one.name} has {end} values, expected at least "
                f"the lookback, {lookback}"
            )
        ready.append(_extended(one, end, str(path), format))
        ends.append(end)
    panel = encode(ready, format)
    begins = np.cumsum([0, *(len(one) for one in ready[:-1])]) + ends - lookback
    rows = np.arange(len(ready))
    targets = format["schema"]["targets"]
    if format["channels"] == "apart":
        begins, rows = for_each_variable(begins, rows, panel, len(targets))
    shape = Shape(lookback, horizon, format["patch"], format["subtract"])
    windows = Windows(
        panel, torch.from_numpy(begins), torch.from_numpy(rows), shape, 256
    ).to(next(model.parameters()).device)
    objective = Numbers(
        horizon * panel.values.shape[1], format["loss"], tuple(format["quantiles"])
    )
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"levels has {level:g}, expected numbers between 0 and 1")
    levels = list(levels) or (format["quantiles"] if objective.parameters > 1 else [])
    offset, scale = scalers_of(series, format)
    points, quantiles = predicted(
        model, objective, windows, offset, scale, format, levels
    )
    if not levels:
        quantiles = np.zeros((*points.shape, 0))
    times = [
        one.following(end - 1, horizon) for one, end in zip(series, ends, strict=True)
    ]
    return Forecast(names, targets, times, points, list(levels), quantiles)


def _extended(one: Series, end: int, path: str, format: Format) -> Series:
    """The series with exactly a horizon of times after its last target."""
    horizon = format["horizon"]
    future = format["schema"]["future"]
    known = one.covariates[end : end + horizon]
    if future and (len(known) < horizon or known[future].isna().any().any()):
        count = len(known.dropna(subset=future))
        raise DataError(
            f"{path}: the series {one.name} has {count} rows with {', '.join(future)} "
            f"after its last target, expected {horizon}: future covariates are known "
            "over the horizon; add rows with empty targets"
        )
    times = one.times[:end].append(one.following(end - 1, horizon))
    targets = np.full((len(times), one.targets.shape[1]), np.nan)
    targets[:end] = one.targets[:end]
    covariates = (
        one.covariates.reindex(times)
        if len(one.covariates.columns)
        else (pd.DataFrame(index=times))
    )
    return replace(one, times=times, targets=targets, covariates=covariates)
