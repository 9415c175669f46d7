"""How good a model is on a split: its loss and the field's metrics."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlrnn.data.chunks import Chunk, Problem, Source
from rlrnn.models import SequenceModel
from rlrnn.objectives import Objective, Sums

WINDOW = 256  # steps at a time; bounds the memory, not the result


@contextmanager
def evaluating(model: SequenceModel) -> Iterator[None]:
    """Inside, no dropout and no gradients."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def outputs(
    model: SequenceModel, source: Source, steps: int
) -> Iterator[tuple[Chunk, Tensor]]:
    """The windows of the first `steps` of a source and the model's outputs there, from
    zero states. Use it under `evaluating`."""
    state, t = None, 0
    while t < steps:
        span = source.span(t, min(WINDOW, steps - t))
        chunk = source.window(t, span)
        if source.whole or state is None:
            state = model.initial_state(chunk.x.shape[1])
        out, state = model(chunk.x, state, chunk.starts)
        yield chunk, out
        t += span


def mean_loss(
    model: SequenceModel, objective: Objective, source: Source, steps: int
) -> Tensor:
    """Mean loss per due position over the first `steps`; a scalar on the device."""
    total, due = next(model.parameters()).new_zeros(()), 0.0
    with evaluating(model):
        for chunk, out in outputs(model, source, steps):
            total = total + objective.total(out, chunk.y, chunk.mask)
            due += chunk.due * chunk.scale
    return total / due


def tally(
    model: SequenceModel, objective: Objective, source: Source
) -> tuple[Sums, float]:
    """The sums from which metrics are made, over one pass of a source, and its due
    losses; on the CPU."""
    sums: Sums = {}
    due = 0.0
    with evaluating(model):
        for chunk, out in outputs(model, source, source.length):
            for name, value in objective.tally(out, chunk.y, chunk.mask).items():
                sums[name] = sums[name] + value if name in sums else value
            due += chunk.due * chunk.scale
    return {name: value.cpu() for name, value in sums.items()}, due


def score(model: SequenceModel, problem: Problem, split: str) -> dict[str, float]:
    """The metrics of a part of a problem (valid or test)."""
    source = getattr(problem, split)
    figures = problem.objective.report(*tally(model, problem.objective, source))
    if problem.judge is not None:
        figures |= problem.judge(model, split)
    return figures


def inference_speed(model: SequenceModel, source: Source) -> dict[str, float]:
    """Microseconds of one streamed step of one sequence (the median of 200; not for a
    bidirectional model), and time steps per second of whole windows."""
    span = source.span(0, WINDOW)
    chunk = source.window(0, span)
    figures = {}
    with evaluating(model):
        state = model.initial_state(chunk.x.shape[1])
        rounds = [_seconds(lambda: model(chunk.x, state, chunk.starts)) for _ in "123"]
        tokens = chunk.x.shape[0] * chunk.x.shape[1]
        figures["time/steps_per_second"] = tokens / min(rounds)
        if not model.config.bidirectional:
            x, one = chunk.x[:1, :1], model.initial_state(1)
            steps = [_seconds(lambda: model(x, one)) for _ in range(220)][20:]
            figures["time/step_microseconds"] = 1e6 * sorted(steps)[len(steps) // 2]
    return figures


def _seconds(job: Callable[[], Any]) -> float:
    began = time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
