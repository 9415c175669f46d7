"""Simple forecasts of a config's series, by the same measures as its models.

    RLRNN_DATA=… python benchmarks/series.py etth1
    RLRNN_DATA=… python benchmarks/series.py bike_sharing --boosting

naive: the last season again (`data.series.season`; with 1 the last value). linear:
ridge regression of the horizon on a window's inputs, what DLinear's class of models can
say; its penalty is chosen on the validation part. boosting: scikit-learn's histogram
gradient boosting of the same lags, a model for each time of the horizon; leaves, rate
and the number of trees are chosen on the validation part. Further options are those of
`rlrnn fit`.

Each is a `model` whose forecast is made at the last step of a window, from all of its
steps, so that `rlrnn.evaluation.score` judges it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlrnn.cli import parse
from rlrnn.data.chunks import Problem
from rlrnn.data.windows import Windows
from rlrnn.evaluation import score
from rlrnn.flows import fit_task
from rlrnn.objectives import Numbers
from rlrnn.tasks import build_problem

PENALTIES = (1e-3, 1.0, 1e2, 1e4)


class AtOnce(nn.Module):
    """Forecasts from a window's values [W, lookback, V] and the other inputs of its
    last step [W, C]."""

    def __init__(
        self, windows: Windows, forecast: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.windows, self.forecast = windows, forecast
        self.nothing = nn.Parameter(torch.zeros(1))  # says on which device this is

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(0, batch, 0)

    def forward(
        self, x: Tensor, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, other = inputs(self.windows, x)
        made = self.forecast(values, other)
        out = made.new_zeros(*x.shape[:2], made.shape[-1])
        length = self.windows.shape.steps
        out[length - 1 :: length] = made.view(-1, x.shape[1], made.shape[-1])
        return out, state


def inputs(windows: Windows, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of whole windows x [K, B, D]: values and other inputs, as in `AtOnce`."""
    length, patch = windows.shape.steps, windows.shape.patch
    count = windows.panel.values.shape[1]
    parts = x.view(-1, length, *x.shape[1:]).transpose(1, 2).flatten(0, 1)  # [W, L, D]
    values = parts[:, :, : patch * count].reshape(len(parts), -1, count)
    return values, parts[:, -1, patch * count :]


def naive(windows: Windows, season: int) -> AtOnce:
    ahead = torch.arange(windows.shape.horizon) % season - season

    def forecast(values: Tensor, other: Tensor) -> Tensor:
        return values[:, ahead].flatten(1)

    return AtOnce(windows, forecast)


def training_set(windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Values [W, lookback, V], other inputs [W, C] and targets [W, H V] of all windows
    that are trained on, without those whose targets have gaps."""
    shape = replace(windows.shape, every=False)
    ordered = Windows(windows.panel, windows.begins, windows.rows, shape, 64)
    chunk = ordered.window(0, ordered.length)
    values, other = inputs(ordered, chunk.x)
    y = chunk.y[shape.steps - 1 :: shape.steps].flatten(0, 1)
    kept = ~y.isnan().any(1)
    return values[kept], other[kept], y[kept]


def linear(windows: Windows, penalty: float) -> AtOnce:
    values, other, y = training_set(windows)

    def columns(values: Tensor, other: Tensor) -> Tensor:
        return torch.cat((values.flatten(1), other, torch.ones(len(values), 1)), 1)

    x = columns(values, other).double()
    square = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(square, x.T @ y.double()).float()
    return AtOnce(windows, lambda values, other: columns(values, other) @ weights)


def known_at(windows: Windows, values: Tensor, other: Tensor, time: int) -> Any:
    """What tells of the horizon's value number `time`, [W, ...]: the lookback, the last
    covariates, those of that time that are known in advance, and the static ones."""
    panel, patch = windows.panel, windows.shape.patch
    past, future = panel.past.shape[1], panel.future.shape[1]
    sizes = [patch * panel.missing.shape[1], patch * past, patch * future]
    sizes += [windows.shape.horizon * future, panel.static.shape[1]]
    borders = np.cumsum(sizes)[:-1].tolist()
    _, before, _, ahead, static = other.tensor_split(borders, 1)
    then = ahead[:, time * future : (time + 1) * future]
    now = before[:, len(before[0]) - past :]
    return torch.cat((values.flatten(1), now, then, static), 1).numpy()


def boosting(
    windows: Windows, leaves: int, rate: float, times: Sequence[int], trees: int = 300
) -> dict[int, Any]:
    """A model for each of these times of the horizon."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    values, other, y = training_set(windows)
    made = {}
    for time in times:
        model = HistGradientBoostingRegressor(
            learning_rate=rate,
            max_leaf_nodes=leaves,
            max_iter=trees,
            early_stopping=False,
            random_state=0,
        )
        made[time] = model.fit(known_at(windows, values, other, time), y[:, time])
    return made


def boosted(windows: Windows, valid: Windows) -> AtOnce:
    """Leaves, rate and trees are those with the lowest squared error of three times of
    the horizon on the validation part."""
    values, other, y = training_set(valid)
    last = windows.shape.horizon - 1
    found = []
    for leaves, rate in ((15, 0.1), (31, 0.1), (31, 0.05), (63, 0.05)):
        errors = np.zeros(300)
        for time, model in boosting(
            windows, leaves, rate, (0, last // 2, last)
        ).items():
            staged = model.staged_predict(known_at(valid, values, other, time))
            errors += [((made - y[:, time].numpy()) ** 2).mean() for made in staged]
        trees = int(errors.argmin()) + 1
        found.append((errors.min() / 3, leaves, rate, trees))
        print(
            f"  boosting, {leaves} leaves, rate {rate}, {trees} trees: valid mse "
            f"{errors.min() / 3:.4g}",
            flush=True,
        )
    _, leaves, rate, trees = min(found)
    models = boosting(windows, leaves, rate, range(last + 1), trees)

    def forecast(values: Tensor, other: Tensor) -> Tensor:
        made = [
            model.predict(known_at(windows, values, other, time))
            for time, model in models.items()
        ]
        return torch.from_numpy(np.stack(made, axis=1)).float()

    return AtOnce(windows, forecast)


def judged(model: nn.Module, problem: Problem, split: str) -> dict[str, float]:
    stand_in: Any = model
    return score(stand_in, problem, split)


def best(made: dict[str, AtOnce], problem: Problem, measure: str) -> tuple[str, AtOnce]:
    """The one with the lowest error on the validation part, and its name."""
    errors = {
        name: judged(model, problem, "valid")[measure] for name, model in made.items()
    }
    for name, error in errors.items():
        print(f"  {name}: valid {measure} {error:.4g}", flush=True)
    name = min(errors, key=errors.__getitem__)
    return name, made[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of a config")
    parser.add_argument("--boosting", action="store_true")
    parser.add_argument("--measure", default="mse", help="that options are chosen by")
    options, more = parser.parse_known_args()
    torch.set_num_threads(1)
    config, _ = parse("fit", ["--config", options.name, *more])
    problem = build_problem(fit_task(config))
    # point forecasts, whatever the config's loss is
    assert isinstance(problem.objective, Numbers)
    problem = replace(problem, objective=Numbers(problem.objective.count, "mse"))
    train, valid = problem.train, problem.valid
    assert isinstance(train, Windows) and isinstance(valid, Windows)
    models = {"naive": naive(train, config.data.series.season)}
    ridges = {f"linear, penalty {p:g}": linear(train, p) for p in PENALTIES}
    name, model = best(ridges, problem, options.measure)
    models[name] = model
    if options.boosting:
        assert train.panel.values.shape[1] == 1, "boosting is for one variable"
        models["boosting"] = boosted(train, valid)
    for name, model in models.items():
        for split in ("valid", "test"):
            figures = judged(model, problem, split)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"| {options.name} | {name} | {split} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
