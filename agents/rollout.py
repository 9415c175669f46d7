"""What was played, and the minibatches it is learned from.

Shapes: T steps, B environments, L steps per segment, C = T / L segments per column,
N segments per minibatch, S and H of the recurrent state. Time comes first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from rlrnn.agents.observations import Sequences, on_each


class Minibatch(NamedTuple):
    """N segments of L steps, each with the recurrent state it began in."""

    obs: Sequences
    actions: Shaped[Tensor, "L N *action"]
    starts: Bool[Tensor, "L N"]
    values: Float[Tensor, "L N"]
    log_probs: Float[Tensor, "L N"]
    advantages: Float[Tensor, "L N"]
    returns: Float[Tensor, "L N"]
    state: Float[Tensor, "S N H"]
    masks: Bool[Tensor, "L N M"] | None = None


def segment_length(n_steps: int, batch_size: int) -> int:
    """The largest divisor of `n_steps` that fits into a minibatch."""
    return max(
        length
        for length in range(1, min(n_steps, batch_size) + 1)
        if n_steps % length == 0
    )


@dataclass(frozen=True)
class Rollout:
    """T steps in B environments, and the recurrent state at the start of each segment.

    `starts[t, b]`: an episode begins with `obs[t, b]`. `values` and `log_probs` are
    those of the policy that played; `returns` are what the critic learns. `masks` say
    which actions were allowed, if the environment does.
    """

    obs: Sequences
    actions: Shaped[Tensor, "T B *action"]
    starts: Bool[Tensor, "T B"]
    values: Float[Tensor, "T B"]
    log_probs: Float[Tensor, "T B"]
    advantages: Float[Tensor, "T B"]
    returns: Float[Tensor, "T B"]
    states: Float[Tensor, "C S B H"]
    masks: Bool[Tensor, "T B M"] | None = None

    def segments(self) -> Minibatch:
        """All of it as one minibatch [L, C·B]: segment c of column b is c·B + b."""
        cuts = len(self.states)

        def cut(x: Tensor) -> Tensor:
            return x.reshape(cuts, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)

        return Minibatch(
            on_each(cut, self.obs),
            cut(self.actions),
            cut(self.starts),
            cut(self.values),
            cut(self.log_probs),
            cut(self.advantages),
            cut(self.returns),
            self.states.transpose(0, 1).flatten(1, 2),
            None if self.masks is None else cut(self.masks),
        )


def minibatches(
    segments: Minibatch, batch_size: int, generator: torch.Generator
) -> Iterator[Minibatch]:
    """One epoch: all segments in random order, `batch_size` steps or fewer at a time.

    A ragged tail is one smaller minibatch.
    """
    length, count = segments.starts.shape
    order = torch.randperm(count, generator=generator, device=generator.device)
    for chosen in torch.split(order, max(batch_size // length, 1)):
        parts = [
            x if x is None else on_each(lambda y, c=chosen: y.index_select(1, c), x)
            for x in segments
        ]
        yield Minibatch(*parts)  # type: ignore[arg-type]
