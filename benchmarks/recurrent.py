"""Microseconds per time step, forward and backward, of the recurrent core.

    python benchmarks/recurrent.py [--device cuda]

`forward` is what training uses on this device, `reference` the readable loop, and
`torch` its own kernels (oneDNN, cuDNN), which know no restarts.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from rlrnn.recurrent import Recurrent

STEPS, INPUTS, HIDDEN = 128, 64, 128
COLUMNS = {"cpu": (2, 8, 64), "cuda": (16, 256, 2048, 8192)}


def micros(device: str, run: Callable[..., Any], *given: Any) -> str:
    """Per time step; the median of ten runs after two."""
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        run(*given)[0].sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return f"{1e6 * sorted(times[2:])[5] / STEPS:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="the recurrent core, timed")
    parser.add_argument("--device", choices=COLUMNS, default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    core = Recurrent(INPUTS, HIDDEN).to(device)
    print("| columns | restarts per step | forward, µs | reference, µs | torch, µs |")
    print("|---|---|---|---|---|")
    for columns in COLUMNS[device]:
        x = torch.randn(STEPS, columns, INPUTS, generator=draw).to(device)
        x.requires_grad_()
        state = core.initial_state(columns)
        plain = micros(device, core.stack, x)
        for share in (0.0, 0.02, 0.1):
            starts = torch.rand(STEPS, columns, generator=draw) < share
            given = x, state, starts.to(device)
            row = [micros(device, run, *given) for run in (core, core.reference)]
            print(
                f"| {columns} | {share:g} | {' | '.join(row)} | {plain} |", flush=True
            )


if __name__ == "__main__":
    main()
