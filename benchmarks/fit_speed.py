"""Tokens per second of training: `Trainer` beside a plain loop around torch's modules.

    python benchmarks/fit_speed.py --threads 1 --cells lstm --hidden 64 256 --steps 4 64

Both train the same model on the same data with the same recipe: embedding, one layer,
head, cross-entropy, gradients clipped, Adam (fused), the state carried on. The plain
loop does nothing else; the Trainer's time has its probe, its signals and its snapshots,
one interval of some windows at a time. They take turns; the figures are medians.
`data` is the share of the Trainer's time in which it cuts windows.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rlrnn.control import Knobs
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig
from rlrnn.recurrent import Cell
from rlrnn.tasks import DataConfig, Task, build_problem, build_trainer
from rlrnn.training import Trainer

BATCH, LR, CLIP = 32, 1e-3, 1.0


class Plain(nn.Module):
    """What a user writes."""

    def __init__(self, cell: Cell, symbols: int, hidden: int) -> None:
        super().__init__()
        width = min(hidden, 64)
        self.embedding = nn.Embedding(symbols, width)
        self.core = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](width, hidden)
        self.head = nn.Linear(hidden, symbols)

    def train_on(self, lines: torch.Tensor, truncation: int, windows: int) -> float:
        """Tokens per second on streams [N + 1, B]."""
        optimizer = torch.optim.Adam(self.parameters(), lr=LR, fused=True)
        state, total = None, 0.0
        begin = time.perf_counter()
        for window in range(windows):
            t = window * truncation % (len(lines) - truncation - 1)
            x, y = lines[t : t + truncation], lines[t + 1 : t + truncation + 1]
            optimizer.zero_grad()
            out, state = self.core(self.embedding(x), state)
            loss = F.cross_entropy(self.head(out).flatten(0, 1), y.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters(), CLIP)
            optimizer.step()
            if isinstance(state, tuple):
                state = state[0].detach(), state[1].detach()
            else:
                state = state.detach()
            if window % 100 == 99:
                total += loss.item()
        return windows * truncation * BATCH / (time.perf_counter() - begin)


def one_interval(trainer: Trainer, truncation: int) -> float:
    """Tokens per second of a decision."""
    rate, steps = np.array([LR]), np.array([truncation])
    before, begin = trainer.position, time.perf_counter()
    trainer.step(Knobs(rate, rate, steps))
    taken = time.perf_counter() - begin
    return (trainer.position - before) * trainer.batch / taken


def cutting(trainer: Trainer, truncation: int) -> float:
    """Seconds for a window of the data."""
    begin = time.perf_counter()
    for window in range(100):
        trainer.source.window(window * truncation, truncation)
    return (time.perf_counter() - begin) / 100


def compare(cell: Cell, hidden: int, truncation: int, rounds: int) -> str:
    data = DataConfig(batch=BATCH)
    symbols = build_problem(Task(data)).inputs
    plain = Plain(cell, symbols.count, hidden)  # type: ignore[union-attr]
    lines = build_problem(Task(data)).train.window(0, 20_000).x
    plain.train_on(lines, truncation, 3)
    rate = plain.train_on(lines, truncation, 10)
    windows = max(4, 100 // truncation, round(rate * 0.3 / truncation / BATCH))
    # the intervals that follow the first sixth share 95 % of the budget
    decisions = 6 * (rounds + 2)
    late = decisions - decisions // 6
    budget = (windows + 0.5) * truncation * BATCH * late / 0.95
    training = TrainingConfig(budget, decisions=decisions, clip=CLIP, probe_share=1e-4)
    trainer = build_trainer(Task(data, ModelConfig(cell, hidden), training))
    trainer.start()
    for _ in range(decisions // 6 + 1):
        one_interval(trainer, truncation)
    turns: list[tuple[Callable[[], float], list[float]]] = [
        (lambda: one_interval(trainer, truncation), []),
        (lambda: plain.train_on(lines, truncation, windows), []),
    ]
    for _ in range(rounds):
        for turn, rates in turns:
            rates.append(turn())
    ours, torchs = (statistics.median(rates) for _, rates in turns)
    share = cutting(trainer, truncation) * ours / truncation / BATCH
    return (
        f"| {cell} | {hidden} | {truncation} | {ours:,.0f} | {torchs:,.0f} | "
        f"{ours / torchs:.2f} | {100 * share:.1f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="*", default=["lstm", "gru"])
    parser.add_argument("--hidden", nargs="*", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--steps", nargs="*", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{BATCH} streams, {options.threads} threads")
    print("| cell | H | K | tokens/s | torch | ratio | data |")
    print("|---|---|---|---|---|---|---|")
    for cell in options.cells:
        for hidden in options.hidden:
            for truncation in options.steps:
                row = compare(cell, hidden, truncation, options.rounds)
                print(row, flush=True)


if __name__ == "__main__":
    main()
