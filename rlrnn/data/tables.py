"""Tables of time series: CSV (also .gz) and Parquet files -> series on a regular grid.

| form | a row is                                    | example                        |
|------|---------------------------------------------|--------------------------------|
| wide | a time, with a column for each variable     | date,HUFL,OT                   |
| long | one time of one series                      | unique_id,ds,y                 |
| rows | a whole series: its name, then its values   | "H1",605,586,... (M4); ragged  |

Shapes: N times, V variables. What does not fit is told in one line, with the file and
the line or column.
"""

import difflib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlrnn.data.files import DataError, find, read_bytes, read_utf8

Form = Literal["wide", "long", "rows"]
Gaps = Literal["error", "fill"]
SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Schema:
    """Which columns of a table mean what; as in `SeriesOptions`. Without `time` it is
    the first column (wide) or `ds` (long); without `targets` all numeric columns that
    mean nothing else (wide) or `y` (long)."""

    form: Form = "wide"
    time: str | None = None
    hour: str | None = None
    series: str = "unique_id"
    targets: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    future: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    gaps: Gaps = "error"


@dataclass(frozen=True)
class Series:
    """One series on a regular grid of times: dates or whole numbers, `step` apart.

    Missing numbers are NaN. `covariates` and `static` (one row) have the columns of
    their names, numbers or, for `Schema.categories`, texts.
    """

    name: str
    times: pd.Index  # [N]
    step: Any  # a pandas offset or duration, or a whole number
    targets: NDArray[np.float64]  # [N, V]
    covariates: pd.DataFrame  # [N, ...]
    static: pd.DataFrame  # [1, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def following(self, last: int, count: int) -> pd.Index:
        """The `count` times after the one at index `last`."""
        if isinstance(self.times, pd.DatetimeIndex):
            begin = self.times[last]
            return pd.date_range(begin, periods=count + 1, freq=self.step)[1:]
        first = int(self.times[last]) + self.step
        return pd.RangeIndex(first, first + self.step * count, self.step)


def read_series(path: str | Path, schema: Schema) -> tuple[list[Series], Schema]:
    """The series of a file, a folder or a glob, and the schema with its time and
    targets named. Of several wide files each is a series, named after it.

    Raises DataError, in one line.
    """
    series: list[Series] = []
    for file in find(path, SUFFIXES):
        table = _Table(file, _read(file))
        if schema.form == "rows":
            schema = replace(schema, targets=("y",))
            series += _rows(table)
        else:
            schema = _resolved(table, schema)
            series += _columns(table, schema)
    names = [one.name for one in series]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has the series {twice} twice, expected once")
    return series, schema


@dataclass(frozen=True)
class _Table:
    path: Path
    frame: pd.DataFrame

    def line(self, row: Any) -> str:
        """Where a row stands, by its number from 0."""
        if ".parquet" in self.path.name:
            return f"{self.path} row {row + 1}"
        return f"{self.path} line {row + 2}"

    def column(self, name: str, option: str) -> "pd.Series[Any]":
        if name in self.frame.columns:
            found: pd.Series[Any] = self.frame[name]
            return found
        names = list(self.frame.columns)
        close = difflib.get_close_matches(name, names, 1, 0.5)
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        hint = f"did you mean {close[0]}?" if close else f"it has {shown}"
        raise DataError(
            f"{self.path} has no column {name} (data.series.{option}); {hint}"
        )

    def numbers(self, name: str, option: str) -> "pd.Series[float]":
        column = self.column(name, option)
        values = pd.to_numeric(column, errors="coerce").astype(np.float64)
        bad = np.flatnonzero((values.isna() & column.notna()) | np.isinf(values))
        if len(bad):
            raise DataError(
                f"{self.line(bad[0])}, column {name}: {str(column[bad[0]])!r} is no "
                "finite number; leave missing values empty"
            )
        if values.isna().all():
            raise DataError(f"{self.path}: column {name} has no numbers at all")
        return values


def _read(path: Path) -> pd.DataFrame:
    raw = io.BytesIO(read_bytes(path))
    try:
        if ".parquet" in path.name:
            frame = pd.read_parquet(raw).reset_index(drop=True)
        else:
            frame = pd.read_csv(raw, low_memory=False, skip_blank_lines=False)
    except ImportError:
        raise DataError(
            f"{path}: Parquet needs pyarrow; pip install 'rlrnn[parquet]'"
        ) from None
    except UnicodeDecodeError as error:
        read_utf8(path)  # says in which line; pandas counts from somewhere else
        raise DataError(f"{path} is not UTF-8 ({error.reason})") from None
    except (ValueError, OSError) as error:  # pandas' and pyarrow's are of these
        told = " ".join(str(error).split())
        raise DataError(f"{path} is no table that can be read: {told}") from None
    filled = np.flatnonzero(frame.notna().any(axis=1))
    if not len(filled):
        raise DataError(f"{path} has no rows, expected some after the header")
    frame = frame[: filled[-1] + 1]  # blank lines at end
    frame.columns = pd.Index([str(name).strip() for name in frame.columns])
    return frame


def _rows(table: _Table) -> list[Series]:
    """A series in each row; empty cells at its end pad it."""
    names = table.frame.iloc[:, 0].astype(str)
    cells = table.frame.iloc[:, 1:]
    try:
        values = cells.to_numpy(np.float64)
    except ValueError:
        numbers = cells.apply(pd.to_numeric, errors="coerce")
        row, column = np.argwhere((numbers.isna() & cells.notna()).to_numpy())[0]
        raise DataError(
            f"{table.line(row)}, column {cells.columns[column]}: "
            f"{str(cells.iloc[row, column])!r} is no number"
        ) from None
    series = []
    for row, line in enumerate(values):
        there = np.flatnonzero(~np.isnan(line))
        if not len(there):
            raise DataError(f"{table.line(row)}: the series {names[row]} has no values")
        targets = line[: there[-1] + 1, None]
        times = pd.RangeIndex(len(targets))
        none = pd.DataFrame(index=times)
        series.append(Series(names[row], times, 1, targets, none, none[:1]))
    return series


def _resolved(table: _Table, schema: Schema) -> Schema:
    """The schema with its time and targets named; all its columns are there."""
    long = schema.form == "long"
    time = schema.time or ("ds" if long else str(table.frame.columns[0]))
    targets = schema.targets
    if not targets and long:
        targets = ("y",)
    if not targets:
        meant = {time, schema.hour, *schema.past, *schema.future, *schema.static}
        other = [name for name in table.frame.columns if name not in meant]
        targets = tuple(name for name in other if _looks_numeric(table.frame[name]))
    if not targets:
        raise DataError(f"{table.path} has no numeric column to forecast")
    return replace(schema, time=time, targets=targets)


def _looks_numeric(column: "pd.Series[Any]") -> bool:
    """Whether most of a column's values are numbers: a word among them is an error."""
    if pd.api.types.is_numeric_dtype(column):
        return True
    there = column.dropna()
    return bool(pd.to_numeric(there, errors="coerce").notna().mean() > 0.5)


def _columns(table: _Table, schema: Schema) -> list[Series]:
    """The series of a wide or long table."""
    assert schema.time is not None
    clean: dict[str, pd.Series[Any]] = {}
    for option in ("targets", "past", "future", "static"):
        for name in getattr(schema, option):
            if name in schema.categories:
                clean[name] = table.column(name, option).astype(str)
            else:
                clean[name] = table.numbers(name, option)
    values = pd.DataFrame(clean, index=table.frame.index)
    times = pd.Series(_times(table, schema), index=table.frame.index)
    if schema.form == "wide":
        groups = {table.path.name.split(".")[0]: values}
    else:
        names = table.column(schema.series, "series").astype(str)
        groups = {str(name): rows for name, rows in values.groupby(names, sort=False)}
    return [
        _one(table, name, rows, pd.Index(times[rows.index]), schema)
        for name, rows in groups.items()
    ]


def _times(table: _Table, schema: Schema) -> pd.Index:
    """The time of each row, as dates or whole numbers."""
    assert schema.time is not None
    column = table.column(schema.time, "time")
    if column.isna().any():
        row = int(np.flatnonzero(column.isna())[0])
        raise DataError(f"{table.line(row)}: no time in column {schema.time}")
    if pd.api.types.is_numeric_dtype(column):
        if (column % 1 != 0).any():
            row = int(np.flatnonzero(column % 1 != 0)[0])
            raise DataError(
                f"{table.line(row)}, column {schema.time}: {column[row]} is no time, "
                "expected dates or whole numbers"
            )
        times: pd.Index = pd.Index(column.astype(np.int64))
    else:
        dates = pd.to_datetime(column, errors="coerce")
        if dates.isna().any():
            row = int(np.flatnonzero(dates.isna())[0])
            raise DataError(
                f"{table.line(row)}, column {schema.time}: {str(column[row])!r} is no "
                "date in the form of the first ones"
            )
        times = pd.DatetimeIndex(dates)
    if schema.hour is None:
        return times
    if not isinstance(times, pd.DatetimeIndex):
        raise DataError(
            f"data.series.hour is {schema.hour}, but column {schema.time} of "
            f"{table.path} has numbers and no dates; leave the hour out"
        )
    return times + pd.to_timedelta(table.numbers(schema.hour, "hour"), unit="h").array


def _one(
    table: _Table, name: str, rows: pd.DataFrame, times: pd.Index, schema: Schema
) -> Series:
    """A series from its rows, whose index is their number in the file."""
    if len(times) < 2:
        raise DataError(f"{table.path}: the series {name} has 1 row, expected more")
    whole, step = _grid(table, rows.index, times, schema.gaps)
    static = rows[list(schema.static)]
    for column in static:
        if static[column].nunique(dropna=False) > 1:
            raise DataError(
                f"{table.path}: static column {column} changes in the series {name}"
            )
    aligned = rows.set_axis(times).reindex(whole)
    return Series(
        name,
        whole,
        step,
        aligned[list(schema.targets)].to_numpy(np.float64),
        aligned[list(dict.fromkeys((*schema.past, *schema.future)))],
        static.iloc[:1].reset_index(drop=True),
    )


def _grid(
    table: _Table, rows: pd.Index, times: pd.Index, gaps: Gaps
) -> tuple[pd.Index, Any]:
    """All times from the first to the last, and their step. Raises DataError for times
    that go back, are there twice, or are not a step apart (`gaps` may be filled)."""
    dates = times if isinstance(times, pd.DatetimeIndex) else None
    ticks = times.to_numpy(np.int64) if dates is None else dates.as_unit("ns").asi8
    apart = np.diff(ticks)
    back = np.flatnonzero(apart <= 0)
    if len(back):
        first = back[0]
        said = f"comes after {times[first]}" if apart[first] else "is there twice"
        raise DataError(
            f"{table.line(rows[first + 1])}: the time {times[first + 1]} {said}; sort "
            "the rows of a series by time, with one row for each"
        )
    unit = int(np.sort(apart)[len(apart) // 2])  # the median
    duration = pd.Timedelta(unit, "ns")
    step = unit if dates is None else duration
    odd = np.flatnonzero(apart != unit)
    if not len(odd):
        return times, step
    if dates is not None and (calendar := _calendar(dates)) is not None:
        return times, calendar
    between = np.flatnonzero(apart % unit)
    at = between[0] if len(between) else odd[0]
    where = f"{table.line(rows[at + 1])}: from {times[at]} to {times[at + 1]}"
    if len(between):
        raise DataError(
            f"{where} is no whole number of steps of {step}; resample the series to "
            "regular times"
        )
    if gaps == "error":
        raise DataError(
            f"{where} is more than one step of {step} ({len(odd)} such gaps); set "
            "data.series.gaps to fill, for missing values there"
        )
    count = (ticks[-1] - ticks[0]) // unit + 1
    if dates is None:
        return pd.Index(ticks[0] + unit * np.arange(count)), step
    return pd.date_range(times[0], periods=count, freq=duration), step


def _calendar(dates: pd.DatetimeIndex) -> Any:
    """The step of dates that are business days, or whole months apart; None for
    others."""
    first, second = dates[0], dates[1]
    months = 12 * (second.year - first.year) + second.month - first.month
    offsets: list[Any] = [pd.offsets.BDay()]
    if months > 0:
        offsets += [pd.DateOffset(months=months), pd.offsets.MonthEnd(months)]
    for offset in offsets:
        if pd.date_range(first, periods=len(dates), freq=offset).equals(dates):
            return offset
    return None
