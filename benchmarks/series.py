"""Simple forecasts of a config's series, by the same measures as its models.

    RLRNN_DATA=… python benchmarks/series.py etth1
    RLRNN_DATA=… python benchmarks/series.py bike_sharing --boosting

naive: the last season again (`data.series.season`; with 1 the last value). linear:
ridge regression of the horizon on a window's inputs, what DLinear's class of models can
say; its penalty is chosen on the validation part. boosting: scikit-learn's histogram
gradient boosting of the same inputs, a model for each time of the horizon; leaves, rate
and the number of trees are chosen on the validation part.

Each is a `model` whose forecast is made at the last step of a window, from all of its
steps, so that `rlrnn.evaluation.score` judges it.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlrnn.cli import load_config
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


def boosting(
    windows: Windows, valid: Windows, leaves: int, rate: float, most: int = 400
) -> AtOnce:
    from sklearn.ensemble import HistGradientBoostingRegressor

    values, other, y = training_set(windows)
    late_values, late_other, late_y = training_set(valid)
    x = np.concatenate((values.flatten(1), other), axis=1)
    late = np.concatenate((late_values.flatten(1), late_other), axis=1)
    models = []
    for column in range(y.shape[1]):
        model = HistGradientBoostingRegressor(
            learning_rate=rate,
            max_leaf_nodes=leaves,
            max_iter=most,
            early_stopping=True,
            n_iter_no_change=20,
            random_state=0,
        )
        model.fit(x, y[:, column], X_val=late, y_val=late_y[:, column])
        models.append(model)

    def forecast(values: Tensor, other: Tensor) -> Tensor:
        features = np.concatenate((values.flatten(1), other), axis=1)
        made = np.stack([model.predict(features) for model in models], axis=1)
        return torch.from_numpy(made).float()

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
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config("fit", options.name)
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
        trees = {
            f"boosting, {leaves} leaves, rate {rate:g}": boosting(
                train, valid, leaves, rate
            )
            for leaves, rate in ((15, 0.1), (31, 0.1), (31, 0.05), (63, 0.05))
        }
        name, model = best(trees, problem, options.measure)
        models[name] = model
    for name, model in models.items():
        figures = judged(model, problem, "test")
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"| {options.name} | {name} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
