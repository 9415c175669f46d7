"""How good a model is on a split: its loss and the field's metrics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlrnn.data.chunks import Chunk, Source
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


def score(
    model: SequenceModel, objective: Objective, source: Source
) -> dict[str, float]:
    """The objective's metrics over one pass of a source."""
    sums: Sums = {}
    due = 0.0
    with evaluating(model):
        for chunk, out in outputs(model, source, source.length):
            for name, value in objective.tally(out, chunk.y, chunk.mask).items():
                sums[name] = sums[name] + value if name in sums else value
            due += chunk.due * chunk.scale
    return objective.report({name: v.cpu() for name, v in sums.items()}, due)
