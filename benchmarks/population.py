"""Many trainings in one program, beside the same trainings one after another.

    python benchmarks/population.py [--device cuda]

One window of K steps for each of M character models (embedding of 64, LSTM of 64, 65
classes, 16 streams, Adam, clip 1), forward, back and update. `stack` is
`rlrnn.stacked` on two threads; `one process` is the trainer's own window step, one
thread, model after model; `two processes` have half of the models each. Milliseconds
for all models: the median of rounds in which the three take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import torch

from rlrnn import compiled
from rlrnn.data.chunks import Problem, Symbols, split_symbols
from rlrnn.ledger import TrainingConfig
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.stacked import Stack, Windows
from rlrnn.training import Trainer, _Seen

CLASSES, STREAMS, LR = 65, 16, 1e-3
MODELS = {"cpu": 64, "cuda": 512}
ROUNDS = 15


def problem() -> Problem:
    rng = np.random.default_rng(0)
    return split_symbols(rng.integers(0, CLASSES, 200_000), STREAMS, CLASSES)


def model() -> SequenceModel:
    return SequenceModel(Symbols(CLASSES), CLASSES, ModelConfig(hidden_size=64))


def one_by_one(count: int, device: str) -> Callable[[int], None]:
    """A window of each of `count` trainers."""
    data = problem().to(torch.device(device))
    trainers = [
        Trainer(model().to(device), data, TrainingConfig()) for _ in range(count)
    ]
    for trainer in trainers:
        trainer._set_lr(LR)

    def run(steps: int) -> None:
        for trainer in trainers:
            seen, chunk = _Seen(), trainer.next_chunk(steps)
            if trainer.fast is not None:  # as `Trainer.step` does
                trainer._train_at_once(trainer.fast, chunk, seen, steps)
            else:
                trainer._train(chunk, steps, seen, steps)

    return run


def stacked(count: int, device: str) -> Callable[[int], None]:
    """A window of all; putting the windows together is part of it."""
    data = problem().to(torch.device(device))
    models = [model().to(device) for _ in range(count)]
    stack = Stack(models, data.objective, ["adam"] * count, [0.0] * count)
    state = [stack.initial_state(STREAMS)]
    lr = torch.full((count,), LR, device=device)
    clip = torch.ones(count, device=device)
    position = [0]

    def run(steps: int) -> None:
        chunks = [data.train.window(position[0], steps) for _ in range(count)]
        position[0] += steps
        starts = None
        if chunks[0].starts is not None:
            starts = torch.stack([c.starts for c in chunks if c.starts is not None])
        windows = Windows(
            torch.stack([chunk.x for chunk in chunks]),
            torch.stack([chunk.y for chunk in chunks]),
            starts,
            None,
            torch.full((count,), chunks[0].scale, device=device),
        )
        state[0] = stack.window(windows, state[0], lr, clip).state

    return run


def half(link: Connection, count: int) -> None:
    """Another process."""
    torch.set_num_threads(1)
    run = one_by_one(count, "cpu")
    while True:
        try:
            run(link.recv())
        except EOFError:  # nobody asks any more
            return
        link.send(True)


def two_processes(count: int) -> Callable[[int], None]:
    context = get_context("spawn")
    links = []
    for _ in range(2):
        ours, theirs = context.Pipe()
        context.Process(target=half, args=(theirs, count // 2), daemon=True).start()
        links.append(ours)

    def run(steps: int) -> None:
        for link in links:
            link.send(steps)
        for link in links:
            link.recv()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="many trainings at once, timed")
    parser.add_argument("--device", choices=MODELS, default="cpu")
    device = parser.parse_args().device
    count = MODELS[device]
    torch.set_num_threads(2)
    ways = {"stack": stacked(count, device), "one process": one_by_one(count, device)}
    if device == "cpu":
        ways["two processes"] = two_processes(count)
    print(f"| K | {' | '.join(ways)} | {' | '.join(list(ways)[1:])} / stack |")
    print("|---|" + (2 * len(ways) - 1) * "---|")
    for steps in (4, 16, 64):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS + 2):
            for name, run in ways.items():
                begin = time.perf_counter()
                if name == "stack":
                    with compiled.undisturbed():
                        run(steps)
                else:
                    torch.set_num_threads(1)
                    run(steps)
                    torch.set_num_threads(2)
                if device == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - begin)
        ours, *others = (statistics.median(t[2:]) for t in times.values())
        row = [f"{1e3 * figure:.1f}" for figure in (ours, *others)]
        row += [f"{other / ours:.2f}" for other in others]
        print(f"| {steps} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
