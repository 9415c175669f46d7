"""Held-out loss of one text model under each controller, over seeds.

    python benchmarks/fit_controllers.py                     # the standard library
    RLRNN_DATA=… python benchmarks/fit_controllers.py --text tinyshakespeare/input.txt

Each seed has its own initial weights; all controllers of a seed start from them, read
the data in the same order and spend the same budget. The table has the mean and the
standard deviation over seeds, and the mean over seeds of the loss relative to the
default's.
"""

import argparse
import os
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from rlrnn.cli import load_config
from rlrnn.config import FitConfig
from rlrnn.flows import fit_task, make_controller, run_task

NAMES = ("constant", "cosine", "plateau", "prior", "learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a file, or one under $RLRNN_DATA")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, help="tokens; default: the config's")
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"))
    parser.add_argument("--optimizer", choices=("sgd", "momentum", "adam", "adamw"))
    parser.add_argument("--controllers", nargs="*", default=NAMES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = options.text
    if text and not Path(text).is_file():
        text = str(Path(os.environ.get("RLRNN_DATA", "."), text))
    shipped: FitConfig = load_config("fit", "text_lstm")
    model = replace(
        shipped.model,
        hidden_size=options.hidden_size or shipped.model.hidden_size,
        cell=options.cell or shipped.model.cell,
    )
    training = replace(
        shipped.training,
        budget=options.budget or shipped.training.budget,
        optimizer=options.optimizer or shipped.training.optimizer,
    )
    nats: dict[str, list[float]] = {name: [] for name in options.controllers}
    for seed in range(options.seeds):
        config = replace(
            shipped,
            data=replace(shipped.data, path=text),
            model=model,
            training=training,
            seed=seed,
        )
        for name in options.controllers:
            trainer = run_task(fit_task(config), make_controller(name))
            nats[name].append(trainer.score("valid")["nats"])
            print(f"seed {seed} {name:10s} {nats[name][-1]:.4f} nats", flush=True)
    print(
        f"\n| controller | nats, {options.seeds} seeds | of the first |\n|---|---|---|"
    )
    first = nats[options.controllers[0]]
    for name, losses in nats.items():
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        ratio = statistics.mean(a / b for a, b in zip(losses, first, strict=True))
        print(
            f"| {name} | {statistics.mean(losses):.3f} ± {spread:.3f} | {ratio:.3f} |"
        )


if __name__ == "__main__":
    main()
