"""Time series: forecasts of the next `horizon` values from the last `lookback`.

Shapes: V variables, W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from rlrnn import seeding
from rlrnn.checks import at_least, one_of
from rlrnn.data.chunks import Features, Problem
from rlrnn.data.encoding import (
    Format,
    Scaling,
    encode,
    fit_columns,
    fit_scalers,
    schema_tree,
)
from rlrnn.data.files import DataError, Paths
from rlrnn.data.forecasts import for_each_variable, make_judge
from rlrnn.data.tables import Form, Gaps, Schema, Series, read_series
from rlrnn.data.windows import Shape, Windows
from rlrnn.objectives import ForecastLoss, Numbers

Channels = Literal["together", "apart"]
Subtract = Literal["none", "last", "mean"]
Due = Literal["last", "every"]
STREAMS = 32  # of the parts that are not trained on


@dataclass(frozen=True)
class SeriesOptions:
    """Which columns mean what, what is forecast from what, and the split.

    Args:
        form: wide (a row is a time, a column a variable), long (a row is one time of
            one series) or rows (a row is a whole series, as in M4's files).
        time: the column of times, dates or whole numbers; without one, the first (wide)
            or ds (long).
        hour: a column of hours to add to it.
        series: the column of the series' names, in the long form.
        targets: the columns to forecast; without any, all other numeric ones (wide) or
            y (long).
        past: covariates that are known up to the present.
        future: covariates that are known in advance, over the horizon too.
        static: columns that are constant in each series, in the long form.
        categories: covariates whose values are names: one input for each.
        gaps: times that are missing are an error, or filled with missing values.
        lookback: values that a forecast is made from.
        horizon: values to forecast.
        patch: values that make one step of the model.
        stride: times between two windows of the training part.
        roll: times between two forecasts of the validation and test parts.
        channels: the variables of a series together, or each by itself.
        identity: a one-hot input says which series, and which variable if these are
            apart.
        subtract: each window's values are relative to nothing, its last value or its
            mean.
        log: of 1 + value is what is learned.
        scaling: of each series and variable, fitted on the training part: none,
            standard (mean 0, deviation 1), minmax (0 to 1), mean (absolute value 1) or
            change (over a season, absolute value 1: then mae is MASE).
        due: a forecast is learned after the last step of a window, or after every one.
        loss: mse, mae, quantile, normal or student.
        quantiles: of the quantile loss; the least and greatest bound the coverage.
        rows: of each series that are training, validation and test part, in this order;
            in place of the shares of data.split.
        last_horizon: the last horizon of each series is the test part, the one before
            the validation part.
        season: values in a season: of change, MASE, and Naive 2 in OWA.
    """

    form: Form = "wide"
    time: str | None = None
    hour: str | None = None
    series: str = "unique_id"
    targets: list[str] = field(default_factory=list)
    past: list[str] = field(default_factory=list)
    future: list[str] = field(default_factory=list)
    static: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    gaps: Gaps = "error"
    lookback: int = 96
    horizon: int = 24
    patch: int = 1
    stride: int = 1
    roll: int = 1
    channels: Channels = "together"
    identity: bool = False
    subtract: Subtract = "none"
    log: bool = False
    scaling: Scaling = "standard"
    due: Due = "last"
    loss: ForecastLoss = "mse"
    quantiles: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    rows: list[int] = field(default_factory=list)
    last_horizon: bool = False
    season: int = 1

    def __post_init__(self) -> None:
        for name, choices in (
            ("form", Form),
            ("gaps", Gaps),
            ("channels", Channels),
            ("subtract", Subtract),
            ("scaling", Scaling),
            ("due", Due),
            ("loss", ForecastLoss),
        ):
            one_of(f"data.series.{name}", getattr(self, name), choices)
        for name in ("lookback", "horizon", "patch", "stride", "roll", "season"):
            at_least(f"data.series.{name}", getattr(self, name), 1)
        if self.lookback % self.patch:
            raise ValueError(
                f"data.series.patch is {self.patch}, expected a divisor of the "
                f"lookback {self.lookback}"
            )
        if self.due == "every" and self.subtract != "none":
            raise ValueError(
                f"data.series.subtract is {self.subtract}, which is not known before "
                "the end of a window, but due is every; set one of them otherwise"
            )
        if not all(0 < q < 1 for q in self.quantiles) or not self.quantiles:
            raise ValueError(
                f"data.series.quantiles is {self.quantiles}, expected numbers between "
                "0 and 1"
            )
        unknown = set(self.categories) - {*self.past, *self.future, *self.static}
        if unknown:
            raise ValueError(
                f"data.series.categories has {min(unknown)}, which is neither in past, "
                "future nor static"
            )
        if self.rows and (len(self.rows) != 3 or min(self.rows) < 1):
            raise ValueError(
                f"data.series.rows is {self.rows}, expected three numbers of rows, of "
                "training, validation and test part"
            )
        if self.rows and self.last_horizon:
            raise ValueError(
                f"data.series.rows is {self.rows}, but last_horizon is true; leave one "
                "of them out"
            )

    def schema(self) -> Schema:
        """The columns, for the reader."""
        return Schema(
            self.form,
            self.time,
            self.hour,
            self.series,
            tuple(self.targets),
            tuple(self.past),
            tuple(self.future),
            tuple(self.static),
            tuple(self.categories),
            self.gaps,
        )

    def shape(self) -> Shape:
        """The windows' form."""
        every = self.due == "every"
        return Shape(self.lookback, self.horizon, self.patch, self.subtract, every)


@dataclass(frozen=True)
class Borders:
    """Where the parts of one series end: training without its probe, training,
    validation, test."""

    trained: int
    train: int
    valid: int
    test: int


def series_problem(
    paths: Paths,
    split: Sequence[float],
    batch: int,
    seed: int,
    options: SeriesOptions,
) -> Problem:
    """Forecasts of the series in `paths`. Raises DataError, in one line.

    A valid or test file goes on where the one before ends, and is that part. The probe
    is the last 5 % of each training part, at least a horizon. The targets of a window
    lie in one part; its lookback may reach into those before.
    """
    series, borders, schema = _read_parts(paths, split, options)
    format = _fitted(series, borders, schema, options)
    panel = encode(series, format)
    apart = options.channels == "apart"

    def windows(part: str, each: int) -> tuple[torch.Tensor, torch.Tensor]:
        begins, rows = _begins(series, borders, part, options, each)
        if not len(begins):
            raise DataError(
                f"{paths.train}: no window of {options.lookback} + {options.horizon} "
                f"values has its forecast in the {part} part; give more data, or a "
                "shorter data.series.lookback or horizon"
            )
        if apart:
            begins, rows = for_each_variable(begins, rows, panel, len(schema.targets))
        return torch.from_numpy(begins), torch.from_numpy(rows)

    shape = options.shape()
    last = replace(shape, every=False)
    train = windows("training", options.stride)
    if len(train[0]) < batch:
        raise DataError(
            f"{paths.train} has {len(train[0])} windows for training, expected at "
            f"least one for each of {batch} streams; lower data.batch"
        )
    # The probe may be read in part: its windows are in an order that is like any other.
    begins, rows = windows("probe", 1)
    mixed = torch.from_numpy(
        np.random.default_rng(seeding.derive(0, "probe")).permutation(len(begins))
    )
    untested = all(border.test <= border.valid for border in borders)
    parts = {"valid": "validation", "test": "validation" if untested else "test"}
    tests = {
        name: Windows(panel, *windows(part, options.roll), last, STREAMS)
        for name, part in parts.items()
    }
    ends = {
        "valid": [border.train for border in borders],
        "test": [border.train if untested else border.valid for border in borders],
    }
    objective = Numbers(
        options.horizon * panel.values.shape[1],
        options.loss,
        tuple(sorted(options.quantiles)),
    )
    return Problem(
        inputs=Features(shape.width(panel)),
        objective=objective,
        train=Windows(panel, *train, shape, batch, seeding.derive(seed, "windows")),
        probe=Windows(panel, begins[mixed], rows[mixed], last, STREAMS),
        valid=tests["valid"],
        test=tests["test"],
        format=format,
        judge=make_judge(series, ends, objective, format, tests),
    )


def _read_parts(
    paths: Paths, split: Sequence[float], options: SeriesOptions
) -> tuple[list[Series], list[Borders], Schema]:
    series, schema = read_series(paths.train, options.schema())
    ends = [[len(one)] for one in series]
    for path in (paths.valid, paths.test):
        if path is not None:
            more, _ = read_series(path, schema)
            series = _joined(series, more, str(path))
            ends = [[*end, len(one)] for end, one in zip(ends, series, strict=True)]
    if paths.valid is not None and paths.test is None:  # tested on the validation part
        ends = [[*end, end[-1]] for end in ends]
    least = options.lookback + options.horizon
    for one in series:
        if np.isnan(one.targets).all():
            raise DataError(
                f"{paths.train}: the series {one.name} has no values in "
                f"{', '.join(schema.targets)}; leave it out"
            )
        if len(one) < least:
            raise DataError(
                f"{paths.train}: the series {one.name} has {len(one)} values, expected "
                f"at least {least} (lookback {options.lookback} + horizon "
                f"{options.horizon}); leave it out, or shorten these"
            )
    return series, [_borders(end, split, options) for end in ends], schema


def _borders(
    ends: Sequence[int], split: Sequence[float], options: SeriesOptions
) -> Borders:
    """Of a series whose files end at `ends`: one, train and test, or all three."""
    horizon = options.horizon
    parts: Sequence[float]
    if len(ends) == 3:
        train, valid, test = ends
    elif options.last_horizon:
        valid, test = (ends[0] - horizon, ends[0]) if len(ends) == 1 else ends
        train = valid - horizon
    else:
        # Shares of one file; of a training file with a test file, the first two.
        among = sum(split) if len(ends) == 1 else sum(split[:2])
        parts = options.rows or [share / among * ends[0] for share in split]
        train, valid, test = (min(round(end), ends[0]) for end in np.cumsum(parts))
        if len(ends) == 2:
            valid, test = ends
    probe = max(horizon, round(0.05 * train))
    return Borders(train - probe, train, valid, test)


def _joined(series: list[Series], more: list[Series], path: str) -> list[Series]:
    """Each series with the values that follow it in another file."""
    following = {one.name: one for one in more}
    if len(series) == len(more) == 1:  # wide files are named as they like
        following = {series[0].name: more[0]}
    joined = []
    for one in series:
        if one.name not in following:
            raise DataError(f"{path} lacks the series {one.name}, which is in training")
        then = following[one.name]
        times = then.times
        if isinstance(one.times, pd.RangeIndex):  # series in rows have no times
            times = times + len(one)
        expected = one.following(-1, 1)[0]
        if times[0] != expected:
            raise DataError(
                f"{path}: the series {one.name} begins at {times[0]}, expected "
                f"{expected}, a step after the file before"
            )
        whole = one.times.append(times)
        if isinstance(one.times, pd.RangeIndex):
            whole = pd.RangeIndex(len(whole))
        covariates = pd.concat((one.covariates, then.covariates)).set_axis(whole)
        targets = np.concatenate((one.targets, then.targets))
        joined.append(replace(one, times=whole, targets=targets, covariates=covariates))
    return joined


def _fitted(
    series: list[Series],
    borders: list[Borders],
    schema: Schema,
    options: SeriesOptions,
) -> Format:
    """What a prediction needs beside the model; from the training part alone."""
    ends = [border.train for border in borders]
    if min(ends) < 1:
        short = series[ends.index(min(ends))]
        raise DataError(
            f"the series {short.name} has {len(short)} values, of which none are left "
            "for training; leave it out, or choose another split"
        )
    offset, scale = fit_scalers(
        series, ends, options.log, options.scaling, options.season
    )
    past = zip(series, ends, strict=True)
    return {
        "kind": "series",
        "schema": schema_tree(schema),
        "lookback": options.lookback,
        "horizon": options.horizon,
        "patch": options.patch,
        "channels": options.channels,
        "identity": options.identity,
        "subtract": options.subtract,
        "log": options.log,
        "scaling": options.scaling,
        "loss": options.loss,
        "quantiles": sorted(options.quantiles),
        "season": options.season,
        "gaps": any(
            bool(np.isnan(one.targets[:end]).any())
            for one, end in zip(series, ends, strict=True)
        ),
        "names": [one.name for one in series],
        "offset": offset,
        "scale": scale,
        "columns": fit_columns([one.covariates[:end] for one, end in past]),
        "statics": fit_columns([one.static for one in series]),
    }


def _begins(
    series: list[Series],
    borders: list[Borders],
    split: str,
    options: SeriesOptions,
    each: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first row of each window whose targets lie in a part, and its series; one
    window in `each`, without those that have no target at all."""
    begins, rows = [], []
    first = 0
    for number, (one, border) in enumerate(zip(series, borders, strict=True)):
        low, high = {
            "training": (0, border.trained),
            "probe": (border.trained, border.train),
            "validation": (border.train, border.valid),
            "test": (border.valid, border.test),
        }[split]
        low = max(low, options.lookback)
        origins = np.arange(low, high - options.horizon + 1, each)
        there = np.concatenate(([0], np.cumsum(~np.isnan(one.targets).all(axis=1))))
        origins = origins[there[origins + options.horizon] > there[origins]]
        begins.append(first + origins - options.lookback)
        rows.append(np.full(len(origins), number))
        first += len(one)
    return np.concatenate(begins), np.concatenate(rows)
