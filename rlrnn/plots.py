"""Pictures of runs, from the rows of `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Rows = Sequence[Mapping[str, Any]]


def _series(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    """The rows that have both, as two columns."""
    both = [(row[x], row[y]) for row in rows if x in row and y in row]
    return [float(a) for a, _ in both], [float(b) for _, b in both]


def _figure(rows: int, height: int) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]


def plot_returns(rows: Rows, path: Path, title: str) -> Path:
    """An agent's learning curve: mean return of recent episodes over steps."""
    figure, (axis,) = _figure(1, 4)
    axis.plot(*_series(rows, "env_steps", "rollout/ep_rew_mean"))
    axis.set(xlabel="environment steps", ylabel="return (mean of 100 episodes)")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


class Animation:
    """Frames [height, width, 3] of bytes, shrunk as they come, and saved as a GIF."""

    WIDTH = 320

    def __init__(self) -> None:
        self.frames: list[Any] = []

    def add(self, frame: Any) -> None:
        from PIL import Image

        image = Image.fromarray(frame)
        image.thumbnail((self.WIDTH, self.WIDTH))
        self.frames.append(image.quantize())

    def save(self, path: Path, fps: int = 30) -> Path:
        first, *others = self.frames
        first.save(path, save_all=True, append_images=others, duration=1000 // fps)
        return path


def plot_fits(fits: Mapping[str, Rows], path: Path, title: str) -> Path:
    """Loss, learning rate and truncation of runs over tokens, one colour per run."""
    figure, axes = _figure(3, 8)
    panels = (
        ("fit/probe_loss", "probe loss (nats)"),
        ("decision/lr", "learning rate"),
        ("decision/truncation", "truncation K (steps)"),
    )
    for axis, (key, label) in zip(axes, panels, strict=True):
        for name, rows in fits.items():
            style = "steps-pre" if key == "decision/truncation" else "default"
            axis.plot(
                *_series(rows, "tokens", key), label=name, drawstyle=style, alpha=0.85
            )
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log", base=2)
    axes[0].legend()
    axes[0].set_title(title)
    axes[-1].set_xlabel("tokens")
    figure.savefig(path, dpi=120)
    return path


def plot_decisions(rows: Rows, path: Path, title: str) -> Path:
    """One run over tokens: losses, knobs, what the controller saw of the fading
    gradient, reward; and where intervals were rolled back or left to the prior."""
    figure, (losses, rate, truncation, carried, reward) = _figure(5, 11)
    steps = {"drawstyle": "steps-pre"}  # a row tells of the interval before it
    panels: tuple[tuple[Any, str, str, dict[str, Any]], ...] = (
        (losses, "fit/train_loss", "training", {}),
        (losses, "fit/probe_loss", "probe", {}),
        (losses, "fit/valid_loss", "validation", {"marker": "o"}),
        (rate, "decision/lr", "this run's", {}),
        (rate, "decision/prior_lr", "the prior's", {"linestyle": "--"}),
        (truncation, "decision/truncation", "K", steps),
        (carried, "decision/carried_grad", "carried gradient |∂L/∂h| |h| / L", {}),
        (reward, "decision/reward", "reward", {"marker": "."}),
    )
    decided = [row for row in rows if row["decision"] > 0]  # before: no K yet
    for axis, key, label, style in panels:
        told = decided if axis is truncation else rows
        axis.plot(*_series(told, "tokens", key), label=label, **style)
    fading = carried.twinx()
    decay = _series(rows, "tokens", "decision/grad_decay")
    fading.plot(*decay, "C1--", label="log decay per step (right)")
    for axis, label in (
        (losses, "loss"),
        (rate, "learning rate"),
        (truncation, "truncation K (steps)"),
        (carried, "gradient going back"),
        (reward, "fall of log probe loss"),
    ):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        for key, colour, name in (
            ("decision/recovered", "C3", "rolled back"),
            ("decision/fallback", "C7", "left to the prior"),
        ):
            marked = [row["tokens"] for row in decided if row.get(key)]
            for number, at in enumerate(marked):
                first = name if axis is losses and not number else None
                axis.axvline(at, color=colour, alpha=0.6, linestyle=":", label=first)
    for axis in (losses, rate, truncation, carried):
        if axis.dataLim.minposy < float("inf"):  # there is something to draw
            axis.set_yscale("log", base=2 if axis is truncation else 10)
    lines = [*carried.get_lines()[:1], *fading.get_lines()]
    carried.legend(lines, [line.get_label() for line in lines], fontsize=8)
    losses.legend(fontsize=8)
    rate.legend(fontsize=8)
    losses.set_title(title)
    reward.set_xlabel("tokens")
    figure.savefig(path, dpi=120)
    return path


def plot_tuning(rows: Rows, path: Path) -> Path:
    """Meta-training over episodes: what they gain on their first loss, and how far the
    likeliest actions are below the prior's loss, with the standard error."""
    figure, (gained, below) = _figure(2, 7)
    gained.plot(*_series(rows, "episodes", "tune/log_loss_fall"))
    gained.set(ylabel="mean log(first / last probe loss)")
    gained.set_title("meta-training")
    name = "tune/loss_below_prior"
    episodes, share = _series(rows, "episodes", name)
    validations = [row for row in rows if name in row]
    errors = [float(row.get(f"{name}_error", 0.0)) for row in validations]
    below.errorbar(
        episodes,
        [100 * x for x in share],
        [100 * x for x in errors],
        marker="o",
        capsize=3,
    )
    below.axhline(0.0, color="black", linewidth=0.8)  # the prior
    below.set(xlabel="training runs played", ylabel="loss below the prior's (%)")
    below.set_title("validation tasks (likeliest actions)")
    for axis in (gained, below):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def plot_traces(names: Sequence[str], mine: Any, prior: Any, path: Path) -> Path:
    """Example runs, a column each, the first of each name: probe loss, rate and K over
    decisions, under a controller and its prior (`rlrnn.comparison.Played`)."""
    from matplotlib.figure import Figure

    shown = [names.index(name) for name in sorted(set(names))][:6]
    figure = Figure(figsize=(2 + 2.5 * len(shown), 7), layout="constrained")
    axes = figure.subplots(3, len(shown), sharex=True, squeeze=False)
    panels = (
        ("probe_loss", "probe loss"),
        ("lr", "learning rate"),
        ("truncation", "truncation K (steps)"),
    )
    for column, task in enumerate(shown):
        axes[0, column].set_title(names[task], fontsize=9)
        axes[-1, column].set_xlabel("decision")
        for axis, (key, label) in zip(axes[:, column], panels, strict=True):
            for who, played in (("controller", mine), ("prior", prior)):
                values = vars(played)[key][1:, task]
                axis.plot(
                    range(1, len(values) + 1),
                    values,
                    "k:" if played is prior else "-",
                    label=who,
                    drawstyle="steps-mid" if key == "truncation" else "default",
                )
            axis.set_yscale("log", base=2 if key == "truncation" else 10)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        peak = max(played.lr[1:, task].max() for played in (mine, prior))
        axes[1, column].set_ylim(peak / 1e3, 2 * peak)  # a cosine ends at zero
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    return path


def plot_confusion(counts: NDArray[Any], names: Sequence[str], path: Path) -> Path:
    """How often each class (rows) was taken for each (columns)."""
    from matplotlib.figure import Figure

    size = min(12.0, 3 + 0.45 * len(names))
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    axis.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0)
    places = range(len(names))
    axis.set_xticks(places, names, rotation=90)
    axis.set_yticks(places, names)
    axis.set(xlabel="predicted", ylabel="true")
    if len(names) <= 20:
        for i in places:
            for j in places:
                shade = "white" if counts[i, j] > 0.5 * counts[i].sum() else "black"
                number = f"{counts[i, j]:.0f}"
                axis.text(j, i, number, ha="center", va="center", color=shade)
    figure.savefig(path, dpi=120)
    return path


def plot_forecast(forecast: Any, path: Path, most: int = 8) -> Path:
    """What follows the end of each series (the first `most` of them), with its
    outermost quantiles as a band. `forecast`: a `rlrnn.data.forecasts.Forecast`."""
    shown = [
        (s, v) for s in range(len(forecast.names)) for v in range(len(forecast.targets))
    ][:most]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 1.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, (s, v) in zip(axes, shown, strict=True):
        times = forecast.times[s]
        axis.plot(times, forecast.values[s, :, v])
        if forecast.quantiles.shape[-1] > 1:
            band = forecast.quantiles[s, :, v]
            label = f"{min(forecast.levels):g} to {max(forecast.levels):g}"
            axis.fill_between(
                times, band.min(-1), band.max(-1), alpha=0.25, label=label
            )
            axis.legend()
        axis.set_title(f"{forecast.names[s]}: {forecast.targets[v]}", fontsize=9)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
