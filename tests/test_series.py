"""Time series: windows, scalers, splits, forecasts and their measures."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rlrnn import forecast_metrics
from rlrnn.data.chunks import Features, Problem, Source
from rlrnn.data.encoding import encode, fit_scalers, restored, scalers_of
from rlrnn.data.files import DataError, Paths
from rlrnn.data.forecasts import forecast
from rlrnn.data.series import SeriesOptions, series_problem
from rlrnn.data.tables import Schema, read_series
from rlrnn.data.windows import Windows
from rlrnn.evaluation import evaluating
from rlrnn.flows import make_controller
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Numbers
from rlrnn.seeding import initialising
from rlrnn.tasks import DataConfig, Task, build_trainer

DATA = os.environ.get("RLRNN_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="RLRNN_DATA is not set")

SPLIT = [0.7, 0.1, 0.2]
SMALL = SeriesOptions(lookback=8, horizon=4, patch=2)


def table(path: Path, rows: int = 300, variables: int = 3, seed: int = 0) -> Path:
    """A wide CSV file: hours, a sum of a day's wave and a random walk."""
    rng = np.random.default_rng(seed)
    times = pd.date_range("2020-01-01", periods=rows, freq="h")
    day = np.sin(np.arange(rows) * 2 * np.pi / 24)[:, None]
    values = 50 + 5 * day + rng.normal(size=(rows, variables)).cumsum(0)
    frame = pd.DataFrame(values, columns=[f"v{i}" for i in range(variables)])
    frame.insert(0, "date", times)
    frame.to_csv(path, index=False)
    return path


def problem_of(path: Path, options: SeriesOptions, batch: int = 4) -> Problem:
    return series_problem(Paths(str(path)), SPLIT, batch, 0, options)


def windows(source: Source) -> Windows:
    assert isinstance(source, Windows)
    return source


def model_of(problem: Problem, seed: int = 0) -> SequenceModel:
    with initialising(seed, "test"):
        return SequenceModel(
            problem.inputs, problem.objective.outputs, ModelConfig("gru", 8)
        )


# --- windows --------------------------------------------------------------------------


def features(
    values: np.ndarray, begin: int, step: int, options: SeriesOptions
) -> np.ndarray:
    """What a step of a window reads, without covariates; [patch V]."""
    window = values[begin : begin + options.lookback]
    anchor: np.ndarray | float = 0.0
    if options.subtract == "last":
        anchor = window[-1]
    if options.subtract == "mean":
        anchor = window.mean(0)
    patch = options.patch
    return (window[step * patch : (step + 1) * patch] - anchor).ravel()


@pytest.mark.parametrize("channels", ["together", "apart"])
@pytest.mark.parametrize("subtract", ["none", "last", "mean"])
def test_windows_equal_slices_of_the_table(
    tmp_path: Path, channels: str, subtract: str
) -> None:
    options = replace(SMALL, channels=channels, subtract=subtract)  # type: ignore[arg-type]
    path = table(tmp_path / "t.csv")
    problem = problem_of(path, options)
    raw = pd.read_csv(path).iloc[:, 1:].to_numpy()
    end = round(0.7 * len(raw))
    scaled = (raw - raw[:end].mean(0)) / raw[:end].std(0)
    lanes = [scaled] if channels == "together" else list(scaled.T[:, :, None])
    # every window of the test part in order, one sequence of L = 4 steps each
    low, high = round(0.8 * len(raw)), len(raw)
    origins = range(low, high - options.horizon + 1)
    expected = [(lane, origin) for origin in origins for lane in lanes]
    source = windows(problem.test)
    assert len(source) == len(expected)
    chunk = source.window(0, source.length)
    assert chunk.starts is not None and chunk.mask is not None
    for number, (lane, origin) in enumerate(expected):
        place, stream = divmod(number, source.batch)
        begin = origin - options.lookback
        for step in range(4):
            k = 4 * place + step
            want = features(lane, begin, step, options)
            np.testing.assert_allclose(chunk.x[k, stream], want, atol=2e-5)
            assert bool(chunk.starts[k, stream]) == (step == 0)
            assert bool(chunk.mask[k, stream]) == (step == 3)
        anchor = lane[begin:origin][-1] if subtract == "last" else 0.0
        anchor = lane[begin:origin].mean(0) if subtract == "mean" else anchor
        target = (lane[origin : origin + options.horizon] - anchor).ravel()
        np.testing.assert_allclose(chunk.y[4 * place + 3, stream], target, atol=2e-5)
    assert int(chunk.mask.sum()) == len(expected)
    assert chunk.due * chunk.scale == pytest.approx(len(expected))


def test_a_window_read_in_parts_is_the_same(tmp_path: Path) -> None:
    train = problem_of(table(tmp_path / "t.csv"), SMALL).train
    whole = train.window(0, 40)
    for k in (1, 3, 4, 7):
        for t in range(0, 40 - k, k):
            part = train.window(t, k)
            torch.testing.assert_close(part.x, whole.x[t : t + k])
            torch.testing.assert_close(part.y, whole.y[t : t + k])
            assert part.mask is not None and whole.mask is not None
            assert torch.equal(part.mask, whole.mask[t : t + k])
            assert part.due * part.scale == float(part.mask.sum())


def test_each_pass_has_each_window_once_in_another_order(tmp_path: Path) -> None:
    train = windows(problem_of(table(tmp_path / "t.csv"), SMALL, batch=3).train)
    passes = [train._order(lap).ravel() for lap in range(2)]
    for order in passes:
        assert len(set(order.tolist())) == len(order) == len(train) // 3 * 3
    assert not np.array_equal(passes[0], passes[1])
    again = windows(problem_of(tmp_path / "t.csv", SMALL, batch=3).train)
    assert np.array_equal(again._order(1).ravel(), passes[1])
    across = train.window(train.length - 4, 8)  # the last window and the next pass'
    torch.testing.assert_close(across.x[:4], train.window(train.length - 4, 4).x)
    torch.testing.assert_close(across.x[4:], train.window(train.length, 4).x)


def test_due_at_every_step_forecasts_what_follows_each(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv")
    every = problem_of(path, replace(SMALL, due="every"))
    last = problem_of(path, SMALL)
    chunk, reference = every.train.window(0, 8), last.train.window(0, 8)
    torch.testing.assert_close(chunk.x, reference.x)
    torch.testing.assert_close(chunk.y[3], reference.y[3])
    assert chunk.mask is None and chunk.due == 1
    # the first two values after step 0 are the segment that step 1 reads
    torch.testing.assert_close(chunk.y[0][:, :6], chunk.x[1])
    with pytest.raises(ValueError, match="not known before the end of a window"):
        replace(SMALL, due="every", subtract="last")


# --- no look-ahead --------------------------------------------------------------------


def changed(path: Path, row: int, column: int, by: float) -> None:
    frame = pd.read_csv(path)
    frame.iloc[row:, column] += by
    frame.to_csv(path, index=False)


@pytest.mark.parametrize("subtract", ["none", "last", "mean"])
def test_what_follows_a_window_does_not_change_its_input(
    tmp_path: Path, subtract: str
) -> None:
    options = replace(SMALL, subtract=subtract, past=["v2"], gaps="fill")  # type: ignore[arg-type]
    path = table(tmp_path / "t.csv")
    before = problem_of(path, options).test
    changed(path, 280, 2, 7.0)
    changed(path, 280, 3, 7.0)
    after = problem_of(path, options).test
    a, b = (s.window(0, s.length) for s in (before, after))
    # forecasts made from row 280 on, the 41st of those from 240 on, may see the change
    seen = (windows(after).begins + options.lookback > 280).tolist()
    for number, may in enumerate(seen):
        place, stream = divmod(number, before.batch)
        rows = slice(4 * place, 4 * place + 4)
        same = torch.equal(a.x[rows, stream], b.x[rows, stream])
        assert same != may
    assert not torch.equal(a.y, b.y)


def test_the_test_part_changes_nothing_in_training(tmp_path: Path) -> None:
    options = replace(SMALL, past=["v2"])
    path = table(tmp_path / "t.csv")
    before = problem_of(path, options)
    changed(path, 210, 1, 1000.0)  # where validation begins
    changed(path, 210, 3, -1000.0)
    after = problem_of(path, options)
    for name in ("offset", "scale", "columns"):
        np.testing.assert_equal(before.format[name], after.format[name])
    for split in ("train", "probe"):
        old, new = getattr(before, split), getattr(after, split)
        a, b = old.window(0, old.length), new.window(0, new.length)
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_probe_targets_are_not_trained_on(tmp_path: Path) -> None:
    problem = problem_of(table(tmp_path / "t.csv"), SMALL)
    train, probe = windows(problem.train), windows(problem.probe)
    ends = train.begins + SMALL.lookback + SMALL.horizon
    assert int(ends.max()) <= int((probe.begins + SMALL.lookback).min())
    assert int((probe.begins + SMALL.lookback + SMALL.horizon).max()) == 210


# --- scalers, gaps, covariates --------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scaling", ["none", "standard", "minmax", "mean", "change"])
def test_scalers_invert(tmp_path: Path, scaling: str, log: bool) -> None:
    series, _ = read_series(table(tmp_path / "t.csv"), Schema())
    offset, scale = fit_scalers(series, [200], log, scaling, 7)
    options = replace(SMALL, scaling=scaling, log=log)  # type: ignore[arg-type]
    problem = problem_of(tmp_path / "t.csv", options)
    panel = encode(series, problem.format)
    fitted, spread = scalers_of(series, problem.format)
    back = restored(panel.values.double().numpy(), fitted[0], spread[0], log)
    np.testing.assert_allclose(back, series[0].targets, rtol=1e-4)
    part = np.log1p(series[0].targets[:200]) if log else series[0].targets[:200]
    scaled = (part - offset) / scale
    facts = {
        "none": (scaled, part),
        "standard": ([scaled.mean(0), scaled.std(0)], [[0] * 3, [1] * 3]),
        "minmax": ([scaled.min(0), scaled.max(0)], [[0] * 3, [1] * 3]),
        "mean": (np.abs(scaled).mean(0), [1] * 3),
        "change": (np.abs(scaled[7:] - scaled[:-7]).mean(0), [1] * 3),
    }
    np.testing.assert_allclose(*facts[scaling], atol=1e-9)


def test_a_constant_column_keeps_its_size(tmp_path: Path) -> None:
    frame = pd.read_csv(table(tmp_path / "t.csv"))
    frame["v1"] = 0.1
    frame.to_csv(tmp_path / "t.csv", index=False)
    problem = problem_of(tmp_path / "t.csv", SMALL)
    assert problem.format["scale"][0, 1] == 1
    assert torch.isfinite(problem.train.window(0, 8).x).all()


def test_gaps_are_filled_forward_and_told_and_not_due(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", variables=1)
    frame = pd.read_csv(path)
    frame.loc[100:101, "v0"] = np.nan
    frame.drop(index=[150]).to_csv(path, index=False)
    with pytest.raises(DataError, match=r"line 152: from .* more than one step"):
        problem_of(path, SMALL)
    problem = problem_of(path, replace(SMALL, gaps="fill", scaling="none"))
    panel = windows(problem.train).panel
    values = frame["v0"].to_numpy()
    for row, source in ((100, 99), (101, 99), (150, 149)):
        assert float(panel.values[row]) == pytest.approx(values[source], rel=1e-5)
        assert panel.missing[row] == 1 and panel.targets[row].isnan()
    assert float(panel.missing.sum()) == 3
    assert isinstance(problem.inputs, Features)
    assert problem.inputs.width == SMALL.patch * 2
    out = torch.zeros(1, 1, SMALL.horizon, requires_grad=True)
    y = torch.tensor([[[1.0, torch.nan, 3.0, torch.nan]]])
    loss = Numbers(SMALL.horizon).total(out, y, None)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 5.0
    assert out.grad is not None and out.grad[0, 0].tolist() == [-1, 0, -3, 0]


@pytest.mark.parametrize("every", [False, True])
def test_forecasts_of_missing_values_alone_are_not_due(
    tmp_path: Path, every: bool
) -> None:
    """Of variables apart, one of which has a long gap."""
    frame = pd.read_csv(table(tmp_path / "t.csv", variables=2))
    frame.loc[40:280, "v0"] = np.nan
    path = tmp_path / "gaps.csv"
    frame.to_csv(path, index=False)
    options = replace(SMALL, channels="apart", due="every" if every else "last")
    problem = problem_of(path, options)
    for part in (problem.train, problem.valid):
        source = windows(part)
        due, scale = 0, 0.0
        for t in range(0, source.length, 4):
            chunk = source.window(t, 4)
            assert chunk.mask is not None
            there = ~chunk.y.isnan().all(-1)
            if not source.shape.every:
                there[:-1] = False
            if t < source.length - 4:  # what lies after the last window is not due
                assert torch.equal(chunk.mask, there)
            assert chunk.due * chunk.scale == pytest.approx(int(chunk.mask.sum()))
            due, scale = due + int(chunk.mask.sum()), scale + chunk.scale
        assert due > 0
        if part is problem.train:
            assert due == pytest.approx(scale, rel=0.05)


def long_table(path: Path) -> Path:
    """Three series of different lengths with covariates of each kind."""
    rng = np.random.default_rng(1)
    parts = []
    for name, rows, region in (
        ("a", 120, "north"),
        ("b", 90, "south"),
        ("c", 150, "x"),
    ):
        parts.append(
            pd.DataFrame(
                {
                    "unique_id": name,
                    "ds": pd.date_range("2021-03-01", periods=rows, freq="D"),
                    "y": rng.normal(size=rows).cumsum() + 20,
                    "rain": rng.random(rows),
                    "weekday": [["mo", "tu", "we"][i % 3] for i in range(rows)],
                    "region": region,
                }
            )
        )
    pd.concat(parts).to_csv(path, index=False)
    return path


LONG = replace(
    SMALL,
    form="long",
    past=["rain"],
    future=["weekday"],
    static=["region"],
    categories=["weekday", "region"],
    identity=True,
)


def test_long_form_with_covariates(tmp_path: Path) -> None:
    problem = problem_of(long_table(tmp_path / "l.csv"), LONG)
    panel = windows(problem.train).panel
    assert len(panel.values) == 360 and panel.future.shape[1] == 3
    # patch (y, rain, three weekdays), horizon x weekdays, three regions, three names
    assert isinstance(problem.inputs, Features)
    assert problem.inputs.width == 2 * (1 + 1 + 3) + 4 * 3 + 3 + 3
    chunk = problem.test.window(0, problem.test.length)
    assert chunk.x.shape[-1] == problem.inputs.width
    # the horizon's weekdays at the last step of the first window of a, which begins its
    # forecast at row 96: mo, tu, we, mo
    ahead = chunk.x[3, 0, 10:22].view(4, 3)
    assert ahead.argmax(1).tolist() == [0, 1, 2, 0]
    assert chunk.x[3, 0, 22:].tolist() == [1, 0, 0, 1, 0, 0]


# --- splits ---------------------------------------------------------------------------


def test_the_last_horizon_of_each_series(tmp_path: Path) -> None:
    path = long_table(tmp_path / "l.csv")
    problem = problem_of(path, replace(SMALL, form="long", last_horizon=True))
    test, valid = windows(problem.test), windows(problem.valid)
    assert len(test) == len(valid) == 3
    ends = np.cumsum([120, 90, 150])
    assert (test.begins + 12).tolist() == ends.tolist()
    assert (valid.begins + 16).tolist() == ends.tolist()


def test_rolling_origins(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv")
    problem = problem_of(path, replace(SMALL, roll=4, stride=3))
    assert np.diff(windows(problem.test).begins).tolist() == [4] * 14
    assert set(np.diff(windows(problem.train).begins)) == {3}


def test_a_test_file_goes_on_where_training_ends(tmp_path: Path) -> None:
    lines = ["V1," + ",".join(f"V{i}" for i in range(2, 62))]
    values = {"A": np.arange(60) + 1.0, "B": np.arange(40) * 2.0 + 5}
    for name, row in values.items():
        cells = [f"{v:g}" for v in row] + [""] * (60 - len(row))
        lines.append(f'"{name}",' + ",".join(cells))
    (tmp_path / "train.csv").write_text("\n".join(lines))
    head = "V1,V2,V3,V4,V5\n"
    (tmp_path / "test.csv").write_text(head + "A,61,62,63,64\nB,85,87,89,91\n")
    options = replace(SMALL, form="rows", last_horizon=True, scaling="none")
    paths = Paths(str(tmp_path / "train.csv"), None, str(tmp_path / "test.csv"))
    problem = series_problem(paths, SPLIT, 4, 0, options)
    chunk = problem.test.window(0, 4)
    assert chunk.y[3].tolist() == [[61, 62, 63, 64], [85, 87, 89, 91]]
    assert chunk.x[3, :, -1].tolist() == [60, 83]
    assert problem.valid.window(0, 4).y[3, 1].tolist() == [77, 79, 81, 83]
    (tmp_path / "test.csv").write_text(head + "A,61,62,63,64\nB,85,x,89,91\n")
    with pytest.raises(DataError, match="line 3, column V3: 'x' is no number"):
        series_problem(paths, SPLIT, 4, 0, options)
    (tmp_path / "test.csv").write_text(head + "A,61,62,63,64\n")
    with pytest.raises(DataError, match="lacks the series B"):
        series_problem(paths, SPLIT, 4, 0, options)


def test_a_validation_file_alone_is_tested_on_too(tmp_path: Path) -> None:
    frame = pd.read_csv(table(tmp_path / "t.csv"))
    frame[:250].to_csv(tmp_path / "a.csv", index=False)
    frame[250:].to_csv(tmp_path / "b.csv", index=False)
    paths = Paths(str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    problem = series_problem(paths, SPLIT, 4, 0, SMALL)
    valid, test = windows(problem.valid), windows(problem.test)
    assert len(valid) == 50 - 4 + 1
    assert torch.equal(valid.begins, test.begins)
    frame[251:].to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(DataError, match="begins at .*, expected 2020-01-11 10:00:00"):
        series_problem(paths, SPLIT, 4, 0, SMALL)


@needs_data
def test_the_standard_split_of_etth1() -> None:
    options = SeriesOptions(lookback=96, horizon=96, rows=[8640, 2880, 2880])
    paths = Paths("$RLRNN_DATA/ett/ETTh1.csv.gz")
    problem = series_problem(paths, SPLIT, 32, 0, options)
    assert len(windows(problem.valid)) == len(windows(problem.test)) == 2785
    train, probe = windows(problem.train), windows(problem.probe)
    assert int(probe.begins.max()) + 1 == 8449  # windows of the training part
    assert (len(train), len(probe)) == (8449 - 432, 337)
    assert int(windows(problem.valid).begins[0]) == 8640 - 96


# --- measures -------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    true, guess = np.array([10.0, 20.0]), np.array([12.0, 16.0])
    assert forecast_metrics.smape(true, guess) == pytest.approx(
        (200 * 2 / 22 + 200 * 4 / 36) / 2
    )
    past = np.array([1.0, 5.0, 2.0, 8.0])
    # seasonal differences at m = 2: 1 and 3
    assert forecast_metrics.mase(true, guess, past, 2) == pytest.approx(3 / 2)
    assert np.isnan(forecast_metrics.mase(true, guess, np.ones(5), 1))
    wave = np.sin(np.arange(99) * 2 * np.pi / 24)  # repeats, but for the last bits
    assert np.isnan(forecast_metrics.mase(true, guess, wave, 24))
    missing = np.array([10.0, np.nan])
    assert forecast_metrics.smape(missing, guess) == pytest.approx(200 * 2 / 22)
    assert forecast_metrics.seasonal_naive(past, 3, 2).tolist() == [2, 8, 2]


def test_naive_2_undoes_a_pure_season() -> None:
    season = np.array([0.5, 1.0, 1.5, 1.0])
    past = np.tile(season, 10) * 8
    np.testing.assert_allclose(forecast_metrics.seasonal_indices(past, 4), season)
    np.testing.assert_allclose(
        forecast_metrics.naive_2(past, 6, 4), 8 * np.resize(season, 6)
    )
    flat = np.random.default_rng(0).normal(10, 1, 40)
    assert not forecast_metrics.is_seasonal(flat, 4)
    assert not forecast_metrics.is_seasonal(past[:11], 4)  # less than three seasons
    assert forecast_metrics.naive_2(flat, 2, 4).tolist() == [flat[-1]] * 2


@needs_data
@pytest.mark.parametrize(
    ("name", "season", "published"),
    [("Hourly", 24, (18.383, 2.395)), ("Weekly", 1, (9.161, 2.777))],
)
def test_naive_2_of_m4(name: str, season: int, published: tuple[float, float]) -> None:
    """Makridakis et al. 2020, and the tables of github.com/Mcompetitions/M4-methods."""
    past, future = (
        read_series(f"$RLRNN_DATA/m4/{name}-{part}.csv.gz", Schema("rows"))[0]
        for part in ("train", "test")
    )
    figures = []
    for before, after in zip(past, future, strict=True):
        x, y = before.targets[:, 0], after.targets[:, 0]
        guess = forecast_metrics.naive_2(x, len(y), season)
        scaled = forecast_metrics.mase(y, guess, x, season)
        figures.append((forecast_metrics.smape(y, guess), scaled))
    np.testing.assert_allclose(np.mean(figures, axis=0), published, atol=5e-4)


class Persistence(SequenceModel):
    """Outputs zeros: with `subtract: last`, the naive forecast."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(
            problem.inputs, problem.objective.outputs, ModelConfig("rnn", 2)
        )
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)


@pytest.mark.parametrize("channels", ["together", "apart"])
@pytest.mark.parametrize("log", [False, True])
def test_judge_in_the_series_units(tmp_path: Path, channels: str, log: bool) -> None:
    options = replace(SMALL, subtract="last", channels=channels, log=log, season=3)  # type: ignore[arg-type]
    path = table(tmp_path / "t.csv")
    problem = problem_of(path, options)
    assert problem.judge is not None
    figures = problem.judge(Persistence(problem), "test")
    raw = pd.read_csv(path).iloc[:, 1:].to_numpy()
    origins = range(240, 297)
    errors = np.stack([raw[o : o + 4] - raw[o - 1] for o in origins])
    assert figures["mse_units"] == pytest.approx((errors**2).mean(), rel=1e-4)
    assert figures["mae_units"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    scale = np.abs(raw[3:240] - raw[:237]).mean(0)
    mase = (np.abs(errors).mean(1) / scale).mean()
    assert figures["mase"] == pytest.approx(mase, rel=1e-4)


def test_the_naive_forecast_has_owa_1(tmp_path: Path) -> None:
    options = replace(SMALL, subtract="last", form="long", last_horizon=True)
    problem = problem_of(long_table(tmp_path / "l.csv"), options)
    assert problem.judge is not None
    assert problem.judge(Persistence(problem), "test")["owa"] == pytest.approx(1)


# --- forecasts of files ---------------------------------------------------------------


@pytest.mark.parametrize("channels", ["together", "apart"])
def test_a_forecast_is_the_one_of_the_test_part(tmp_path: Path, channels: str) -> None:
    options = replace(SMALL, subtract="mean", channels=channels, loss="normal")  # type: ignore[arg-type]
    path = table(tmp_path / "t.csv")
    problem = problem_of(path, options)
    model = model_of(problem)
    # the file without its last horizon: its forecast is that of the last test window
    pd.read_csv(path)[:-4].to_csv(tmp_path / "new.csv", index=False)
    result = forecast(model, problem.format, tmp_path / "new.csv", [0.1, 0.5])
    assert result.names == ["new"]
    assert result.values.shape == (1, 4, 3) and result.quantiles.shape == (1, 4, 3, 2)
    renamed = pd.read_csv(path).rename(columns={"v1": "speed"})
    renamed.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(DataError, match="no column v1 .data.series.targets.; did you"):
        forecast(model, problem.format, tmp_path / "bad.csv")
    source = windows(problem.test)
    chunk = source.window(0, source.length)
    with evaluating(model):
        out, _ = model(chunk.x, model.initial_state(source.batch), chunk.starts)
    count = 3 if channels == "apart" else 1
    wanted = []
    for number in range(len(source) - count, len(source)):
        place, stream = divmod(number, source.batch)
        assert isinstance(problem.objective, Numbers)
        wanted.append(
            problem.objective.point(out[4 * place + 3, stream])
            + source.anchors[number].repeat(4 if channels == "together" else 1)
        )
    scaled = torch.stack(wanted).numpy().reshape(count, 4, -1)
    scaled = scaled[0] if channels == "together" else scaled[:, :, 0].T
    offset, scale = problem.format["offset"][0], problem.format["scale"][0]
    np.testing.assert_allclose(result.values[0], scaled * scale + offset, rtol=1e-5)
    np.testing.assert_allclose(result.quantiles[..., 1], result.values, rtol=1e-5)
    assert (result.quantiles[..., 0] < result.values).all()
    last = pd.read_csv(path)["date"].iloc[-4]
    assert str(result.times[0][0]) == last
    assert list(result.frame().columns[:5]) == [
        "unique_id",
        "ds",
        "v0",
        "v0_0.1",
        "v0_0.5",
    ]


def test_one_step_at_a_time_is_the_whole_sequence(tmp_path: Path) -> None:
    problem = problem_of(table(tmp_path / "t.csv"), replace(SMALL, subtract="last"))
    model = model_of(problem)
    chunk = problem.valid.window(0, 16)
    with evaluating(model):
        whole, _ = model(
            chunk.x, model.initial_state(problem.valid.batch), chunk.starts
        )
        state = model.initial_state(problem.valid.batch)
        assert chunk.starts is not None
        for t in range(16):
            out, state = model(chunk.x[t : t + 1], state, chunk.starts[t : t + 1])
            torch.testing.assert_close(out[0], whole[t])


def test_future_covariates_are_needed(tmp_path: Path) -> None:
    path = long_table(tmp_path / "l.csv")
    problem = problem_of(path, LONG)
    model = model_of(problem)
    with pytest.raises(DataError, match="series a has 0 rows with weekday"):
        forecast(model, problem.format, path)
    frame = pd.read_csv(path)
    frame.loc[frame.groupby("unique_id").tail(4).index, "y"] = np.nan
    frame.to_csv(path, index=False)
    result = forecast(model, problem.format, path)
    with pytest.raises(ValueError, match="levels has 1.5, expected numbers between"):
        forecast(model, problem.format, path, [0.5, 1.5])
    assert result.values.shape == (3, 4, 1)
    assert str(result.times[1][0].date()) == "2021-05-26"


# --- learning, and what cannot be read ------------------------------------------------


def test_a_season_is_learned(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", rows=800)
    frame = pd.read_csv(path)
    for i in range(3):
        frame[f"v{i}"] = 10 + np.sin((np.arange(800) + 5 * i) * 2 * np.pi / 24)
    frame.to_csv(path, index=False)
    options = SeriesOptions(lookback=24, horizon=12, patch=6, channels="apart")
    training = TrainingConfig(20_000.0, decisions=6)
    data = DataConfig("series", str(path), batch=16, series=options)
    trainer = build_trainer(Task(data, ModelConfig("gru", 16), training))
    controller = make_controller("cosine", 1e-2, 8)
    signals, state = trainer.start(), controller.init(1)
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)
    figures = trainer.score("test")
    assert figures["mse"] < 0.02
    assert figures["mae_units"] < 0.1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"line": (10, "v0", "oops")}, r"line 12, column v0: 'oops' is no finite"),
        ({"column": ("v1", np.nan)}, "column v1 has no numbers at all"),
        ({"line": (10, "date", "2020-01-01 05:00:00")}, r"line 12: the time .* after"),
        ({"line": (10, "date", "2020-01-01 09:00:00")}, r"line 12: .* is there twice"),
        ({"line": (10, "date", "2020-01-01 10:20:00")}, "no whole number of steps"),
        ({"line": (10, "date", "soon")}, "line 12, column date: 'soon' is no date"),
        ({"options": {"targets": ["vv0"]}}, "no column vv0 .*; did you mean v0"),
        ({"options": {"time": "when"}}, "no column when .*; it has date, v0"),
        ({"options": {"lookback": 400}}, "has 300 values, expected at least 404"),
        ({"options": {"lookback": 240}}, "in the training part"),
        ({"options": {"log": True}, "column": ("v1", -3.0)}, "no log"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, edit: dict, message: str) -> None:  # type: ignore[type-arg]
    path = table(tmp_path / "t.csv")
    frame = pd.read_csv(path).astype(object)
    if "line" in edit:
        row, column, value = edit["line"]
        frame.loc[row, column] = value
    if "column" in edit:
        frame[edit["column"][0]] = edit["column"][1]
    frame.to_csv(path, index=False)
    with pytest.raises(DataError, match=message) as error:
        problem_of(path, replace(SMALL, **edit.get("options", {})))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"date,v0\n", "has no rows"),
        (b"date,v0\n2020-01-01,1\n2020-01-02,caf\xe9\n", r"\(line 3: byte 0xe9 at"),
        (b"date,v0,caf\xe9\n2020-01-01,1,2\n", r"\(line 1: byte 0xe9 at offset 11"),
        (b"date,v0\n2020-01-01,1\n2020-01-02,2,3\n", "in line 3"),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read_series(path, Schema())
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_series_without_values(tmp_path: Path) -> None:
    path = long_table(tmp_path / "l.csv")
    options = replace(LONG, future=[], categories=["region"])
    problem = problem_of(path, options)
    frame = pd.read_csv(path)
    frame.loc[frame["unique_id"] == "b", "y"] = np.nan
    frame.to_csv(path, index=False)
    with pytest.raises(DataError, match="the series b has no values in y"):
        problem_of(path, options)
    with pytest.raises(DataError, match="the series b has 0 values, expected at least"):
        forecast(model_of(problem), problem.format, path)


def test_parquet_equals_csv(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = table(tmp_path / "t.csv")
    pd.read_csv(path).to_parquet(tmp_path / "t.parquet")
    (one,), _ = read_series(path, Schema())
    (other,), _ = read_series(tmp_path / "t.parquet", Schema())
    np.testing.assert_array_equal(one.targets, other.targets)
    assert list(one.times) == list(other.times)


def test_calendar_steps(tmp_path: Path) -> None:
    times = pd.date_range("2020-01-31", periods=40, freq="ME")
    frame = pd.DataFrame({"date": times, "y": np.arange(40.0)})
    frame.to_csv(tmp_path / "m.csv", index=False)
    (one,), _ = read_series(tmp_path / "m.csv", Schema())
    assert str(one.following(-1, 1)[0].date()) == "2023-05-31"
    frame["date"] = pd.bdate_range("2024-01-01", periods=40)
    frame.to_csv(tmp_path / "m.csv", index=False)
    (one,), _ = read_series(tmp_path / "m.csv", Schema())
    assert str(one.following(-1, 1)[0].date()) == "2024-02-26"
    frame["date"] = pd.date_range("2000-02-01", periods=40, freq="QS-FEB")
    frame.to_csv(tmp_path / "m.csv", index=False)
    (one,), _ = read_series(tmp_path / "m.csv", Schema())
    assert str(one.following(-1, 1)[0].date()) == "2010-02-01"
