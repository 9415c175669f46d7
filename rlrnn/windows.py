"""A window of a stream, update and all, as a captured graph: see `rlrnn.graphs`."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlrnn.data.chunks import Chunk
from rlrnn.graphs import Graphs, graphs_for
from rlrnn.optimizers import at_rates, capturable, moments

if TYPE_CHECKING:
    from rlrnn.training import Trainer


class Window(NamedTuple):
    """What a window gave; `gradients` as the optimiser saw them, if asked for."""

    loss: Tensor
    norm: Tensor
    hidden: Tensor
    watched: dict[str, Tensor]
    gradients: list[Tensor]


def graphs_of(trainer: "Trainer") -> Graphs | None:
    """None for what a graph cannot hold: whole sequences, each batch of another length;
    updates of several windows; layers that learn later; a probe of gradients, which is
    charged; optimisers with counts in Python."""
    config = trainer.config
    if trainer.source.whole or config.accumulate > 1:
        return None
    if config.unfreeze or config.decay_probe or not capturable(trainer.optimizer):
        return None
    return graphs_for(trainer.device)


def learn(
    graphs: Graphs,
    trainer: "Trainer",
    chunk: Chunk,
    watch: bool,
    keep: bool,
    before: list[Tensor],
) -> Window:
    """One update. `watch`: see `Trainer._watched_gradient`; `keep`: the gradients;
    `before`: gradients to compare this one with."""
    optimizer, scale = trainer.optimizer, chunk.scale

    def window(
        x: Tensor,
        y: Tensor,
        starts: Tensor | None,
        mask: Tensor | None,
        hidden: Tensor,
        rates: list[Any],
        before: list[Tensor],
    ) -> Window:
        # None, not zero: so backward takes memory of the graph, and does not add up
        optimizer.zero_grad(set_to_none=True)
        trainer.hidden = hidden.detach()  # the buffer itself must not ask for gradients
        given = Chunk(x, y, starts, mask, scale)
        watched: dict[str, Tensor] = {}
        if watch:
            loss, watched = trainer._watched_gradient(given)
        else:
            loss = trainer._gradient(given, len(x))
        gradients = trainer._gradients()
        if before:
            watched = watched | {"grad_cosine": cosine(before, gradients)}
        norm = torch.nn.utils.clip_grad_norm_(trainer.parameters, trainer.config.clip)
        with at_rates(optimizer, rates):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # nobody is to look at a graph's memory
        kept = gradients if keep else []
        return Window(loss, norm, trainer.hidden, watched, kept)

    inputs = chunk.x, chunk.y, chunk.starts, chunk.mask, trainer.hidden
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if watch and trainer.drops:
        # its halves have one mask: a generator cannot be turned back in a graph
        return window(*inputs, rates, before)
    done: Window = graphs(
        # two names, should one of their kernels not be capturable: cuDNN's, or ours
        "window" if chunk.starts is None else "window with starts",
        window,
        (*inputs, rates, before),
        constants=(scale, watch, keep),
        written=lambda: [*trainer.model.parameters(), *moments(optimizer)],
        generators=(trainer.generator,) if trainer.drops else (),
    )
    return done


def total_norm(tensors: list[Tensor]) -> Tensor:
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    products = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]
    scale = (total_norm(a) * total_norm(b)).clamp_min(1e-12)
    return torch.stack(products).sum() / scale
