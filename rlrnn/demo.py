"""The main job: an agent learns to remember, and a text model trains itself.

1. `train`: an LSTM actor-critic on cart-pole with hidden velocities.
2. `fit`: one LSTM on text four times, from the same weights, over the same data, with
   the same budget: the library's default rate and truncation, warm-up and cosine at
   that rate, the controller's prior, and the controller.
3. A table and plots.
"""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlrnn import flows, plots
from rlrnn.cli import load_config, look_at
from rlrnn.config import FitConfig, RunConfig, TrainConfig
from rlrnn.tasks import build_trainer
from rlrnn.tracking import Mode, RunExistsError, read_metrics

FITS = {
    "constant": "default: Adam 1e-3, K=32",
    "cosine": "warm-up + cosine, 1e-3, K=32",
    "prior": "range test + cosine, K=16",
    "learned": "RL controller, on the latter",
}


def demo(
    folder: str | None = None,
    text: str | None = None,
    track: Mode = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Run the main job and print what came out; the summaries by name.

    Raises ValueError in one line if `folder` holds something or `text` is no text.
    """
    root = Path(folder or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}")
    if root.is_dir() and any(root.iterdir()):
        raise RunExistsError(
            f"{root} already holds something: expected a new or empty folder"
        )
    console = Console()

    def place(name: str) -> RunConfig:
        return RunConfig(folder=str(root / name), track=track, group=root.name)

    fit_config: FitConfig = load_config("fit", "text_lstm")
    fit_config = replace(
        fit_config, data=replace(fit_config.data, path=text), seed=seed
    )
    build_trainer(flows.fit_task(fit_config), fit_config.device)  # fail early
    train_config: TrainConfig = load_config("train", "cartpole_hidden_velocity")
    console.rule("1. train: an LSTM actor-critic on cart-pole without velocities")
    agent = flows.train(replace(train_config, seed=seed, run=place("train")))
    console.rule("2. fit: one text model, four ways to set its rate and truncation")
    fits = {
        name: flows.fit(replace(fit_config, controller=name, run=place(f"fit-{name}")))
        for name in FITS
    }
    rows = {name: read_metrics(root / f"fit-{name}") for name in FITS}
    source = text or "the sources of the standard library"
    pictures = [
        root / "train" / "returns.png",
        plots.plot_fits(
            rows, root / "fits.png", f"{fit_config.model.cell} on {source}"
        ),
    ]
    console.rule("3. what came out")
    console.print(_table(agent, fits))
    console.print(
        "The agent: likeliest actions; 500 is the most, and without memory a policy "
        "stays near 50."
    )
    console.print(
        f"The fits: {fit_config.training.budget:,.0f} tokens each; held-out loss, on "
        f"the validation part of {source}."
    )
    behind = [
        name
        for name in ("constant", "cosine", "prior")
        if fits[name]["valid_bits"] <= fits["learned"]["valid_bits"]
    ]
    if behind:
        console.print(f"Here the controller did not beat {', '.join(behind)}.")
    for picture in pictures:
        console.print(f"plot        {picture}", soft_wrap=True)
    console.print(f"run folders {root}/*", soft_wrap=True)
    for line in look_at(fits["learned"]):
        console.print(line, soft_wrap=True)
    return {"train": agent, **fits}


def _table(agent: dict[str, Any], fits: dict[str, dict[str, Any]]) -> Table:
    table = Table()
    for column in ("run", "result", "seconds", "per second"):
        side: Any = "left" if column == "run" else "right"
        table.add_column(column, justify=side, no_wrap=True)
    table.add_row(
        f"agent, {agent['episodes']} episodes",
        f"return {agent['return_mean']:.1f} ± {agent['return_std']:.1f}",
        f"{agent['time/seconds']:.0f}",
        f"{agent['time/steps_per_second']:,.0f} steps",
    )
    for name, summary in fits.items():
        table.add_row(
            FITS[name],
            f"{summary['valid_bits']:.3f} bits/char",
            f"{summary['time/seconds']:.0f}",
            f"{summary['time/tokens_per_second']:,.0f} tokens",
        )
    return table
