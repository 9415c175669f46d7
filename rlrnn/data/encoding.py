"""Series as the numbers that a model reads, and a model's outputs as series.

The `format` is a plain tree: what was fitted on the training part, and what the columns
mean. Shapes: S series, N times of all series after each other, V variables, H horizon.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlrnn.data.files import DataError
from rlrnn.data.tables import Schema, Series
from rlrnn.data.windows import Panel

Scaling = Literal["none", "standard", "minmax", "mean", "change"]
Format = dict[str, Any]
Array = NDArray[np.float64]


def fit_scalers(
    series: Sequence[Series],
    ends: Sequence[int],
    log: bool,
    scaling: str,
    season: int = 1,
) -> tuple[Array, Array]:
    """Offset and scale of each series and variable, [S, V], from its first `ends`
    values. Raises DataError for variables that `log` has no logarithm of."""
    pairs = [
        _scaler(logged(one, log)[:end], scaling, season)
        for one, end in zip(series, ends, strict=True)
    ]
    return np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])


def _scaler(values: Array, scaling: str, season: int) -> tuple[Array, Array]:
    """Of columns [N, V]; one without numbers, or without spread, keeps its size."""
    count = values.shape[1]
    offset, scale = np.zeros(count), np.ones(count)
    for v, column in enumerate(values.T):
        there = column[~np.isnan(column)]
        if scaling == "none" or not len(there):
            continue
        if scaling == "standard":
            offset[v], spread = there.mean(), there.std()
        elif scaling == "minmax":
            offset[v], spread = there.min(), np.ptp(there)
        elif scaling == "change":
            changes = np.abs(column[season:] - column[:-season])
            spread = np.nanmean(changes) if not np.isnan(changes).all() else 0.0
        else:
            spread = np.abs(there).mean()
        # the spread of equal numbers may be a rounding error
        scale[v] = spread if spread > 1e-9 * np.abs(there).max() else 1.0
    return offset, scale


def logged(one: Series, log: bool) -> Array:
    """The targets [N, V]; with `log`, log(1 + y)."""
    if not log:
        return one.targets
    if np.nanmin(one.targets) <= -1:
        raise DataError(
            f"the series {one.name} has the value {np.nanmin(one.targets):g}, of which "
            "there is no log(1 + y); set data.series.log to false"
        )
    return np.log1p(one.targets)


def restored(values: Array, offset: Array, scale: Array, log: bool) -> Array:
    """Scaled values in their units: the inverse of scaling and logarithm."""
    values = values * scale + offset
    return np.expm1(values) if log else values


def fit_columns(frames: Sequence[pd.DataFrame]) -> Format:
    """For each covariate its mean and standard deviation, or the levels of a
    category, from the rows of the training part."""
    columns: Format = {}
    whole = pd.concat(frames)
    for name in whole.columns:
        column = whole[name].dropna()
        if pd.api.types.is_numeric_dtype(column):
            spread = float(column.std(ddof=0)) if len(column) else 0.0
            mean = float(column.mean()) if len(column) else 0.0
            columns[str(name)] = {"mean": mean, "scale": spread or 1.0}
        else:
            columns[str(name)] = {"levels": sorted(set(column))}
    return columns


def _encoded(frame: pd.DataFrame, names: Sequence[str], columns: Format) -> Array:
    """Columns `names` of a frame as numbers [N, ...]: scaled, or one-hot (an unknown
    level is all zeros). Gaps have the value before them."""
    parts = [np.zeros((len(frame), 0))]
    for name in names:
        column, how = frame[name].ffill(), columns[name]
        if "levels" in how:
            levels = np.array(how["levels"], dtype=object)
            parts.append((column.to_numpy(object)[:, None] == levels).astype(float))
        else:
            numbers = column.to_numpy(np.float64)[:, None]
            parts.append(np.nan_to_num((numbers - how["mean"]) / how["scale"]))
    return np.concatenate(parts, axis=1)


def encode(series: Sequence[Series], format: Format) -> Panel:
    """The numbers of these series. One that the format does not know is scaled by
    its own values."""
    schema = format["schema"]
    columns, statics = format["columns"], format["statics"]
    values, targets, past, future, static = [], [], [], [], []
    for one, offset, scale in zip(series, *scalers_of(series, format), strict=True):
        scaled = (logged(one, format["log"]) - offset) / scale
        targets.append(scaled)
        values.append(pd.DataFrame(scaled).ffill().fillna(0.0).to_numpy())
        past.append(_encoded(one.covariates, schema["past"], columns))
        future.append(_encoded(one.covariates, schema["future"], columns))
        static.append(_encoded(one.static, schema["static"], statics)[0])
    due = np.concatenate(targets)
    gaps = np.isnan(due).astype(float)
    rows = np.stack(static)
    if format["channels"] == "apart":
        count = due.shape[1]
        values = [_apart(np.concatenate(values))]
        due, gaps = _apart(due), _apart(gaps)
        rows = np.repeat(rows, count, axis=0)
    if not format["gaps"]:
        gaps = gaps[:, :0]
    if format["identity"]:
        rows = np.concatenate((rows, _identities(series, format)), axis=1)
    arrays = (np.concatenate(values), due, gaps)
    covariates = (np.concatenate(past), np.concatenate(future))
    return Panel(
        *(
            torch.from_numpy(np.ascontiguousarray(a, np.float32))
            for a in (*arrays, *covariates, rows)
        )
    )


def _apart(values: Array) -> Array:
    """[N, V] with the variables after each other, [V N, 1]."""
    return values.T.reshape(-1, 1)


def _identities(series: Sequence[Series], format: Format) -> Array:
    """One-hot: which series, and with separate channels which variable."""
    names = format["names"]
    which = np.zeros((len(series), len(names) if len(names) > 1 else 0))
    known = {name: column for column, name in enumerate(names)}
    for row, one in enumerate(series):
        if which.shape[1] and one.name in known:
            which[row, known[one.name]] = 1
    if format["channels"] == "together":
        return which
    count = len(format["schema"]["targets"])
    variables = np.tile(np.eye(count), (len(series), 1))
    return np.concatenate((np.repeat(which, count, axis=0), variables), axis=1)


def scalers_of(series: Sequence[Series], format: Format) -> tuple[Array, Array]:
    """Offset and scale of each series and variable, [S, V]: those of training, or, for
    a series that was not there, of its own values."""
    known = {name: row for row, name in enumerate(format["names"])}
    pairs = [
        (format["offset"][known[one.name]], format["scale"][known[one.name]])
        if one.name in known
        else _scaler(logged(one, format["log"]), format["scaling"], format["season"])
        for one in series
    ]
    return np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])


def schema_of(format: Format) -> Schema:
    """The columns that a file needs, to be encoded."""
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in format["schema"].items()
    }
    return Schema(**fields)


def schema_tree(schema: Schema) -> Format:
    """The inverse of `schema_of`."""
    tree = asdict(schema)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in tree.items()}
