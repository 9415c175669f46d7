"""Microseconds per time step, forward and backward, of the recurrent core.

    python benchmarks/recurrent.py

`forward` is what training uses on this device, `reference` the readable loop.
"""

import time

import torch

from rlrnn.recurrent import Recurrent

STEPS, INPUTS, HIDDEN = 128, 64, 128


def main() -> None:
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    core = Recurrent(INPUTS, HIDDEN)
    print("| columns | restarts per step | forward, µs | reference, µs |")
    print("|---|---|---|---|")
    for columns in (2, 8, 64):
        x = torch.randn(STEPS, columns, INPUTS, generator=draw, requires_grad=True)
        state = core.initial_state(columns)
        for share in (0.0, 0.02, 0.1):
            starts = torch.rand(STEPS, columns, generator=draw) < share
            row = [f"{columns}", f"{share:g}"]
            for run in (core.forward, core.reference):  # the median of ten
                times = []
                for _ in range(12):
                    begin = time.perf_counter()
                    run(x, state, starts)[0].sum().backward()  # type: ignore[no-untyped-call]
                    times.append(time.perf_counter() - begin)
                row.append(f"{1e6 * sorted(times[2:])[5] / STEPS:.0f}")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
