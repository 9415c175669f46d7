"""The shipped recipe on cart-pole with hidden velocities: return and speed over seeds.

    python benchmarks/cartpole.py

Each seed is trained from scratch in this process on the CPU, and judged over 20
evaluation episodes of its likeliest actions.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from rlrnn.cli import load_config
from rlrnn.config import RunConfig, TrainConfig
from rlrnn.flows import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="cartpole_hidden_velocity")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(9)))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    shipped: TrainConfig = load_config("train", options.config)
    returns, speeds, seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            run = RunConfig(folder=str(Path(folder, str(seed))), track="disabled")
            config = replace(shipped, seed=seed, device=options.device, run=run)
            summary = train(config, progress=False)
            returns.append(summary["return_mean"])
            speeds.append(summary["time/steps_per_second"])
            seconds.append(summary["time/seconds"])
            print(
                f"seed {seed}: return {returns[-1]:.1f}, {seconds[-1]:.1f} s, "
                f"{speeds[-1]:,.0f} steps/s",
                flush=True,
            )
    print(
        f"median return {statistics.median(returns):.1f} "
        f"({min(returns):.1f} to {max(returns):.1f}), "
        f"median {statistics.median(seconds):.1f} s, "
        f"{statistics.median(speeds):,.0f} steps/s"
    )


if __name__ == "__main__":
    main()
