"""One plain model on a CPU: a whole window, update and all, in one compiled call.

It is a stack of one (`rlrnn.stacked`) that shares its memory with the model and its
optimiser: parameters and moments are views of the stack's rows, and torch may go on
from where this has left, and the other way round.
"""

import torch
from torch import Tensor

from rlrnn import compiled
from rlrnn.data.chunks import Chunk
from rlrnn.models import SequenceModel
from rlrnn.objectives import Objective
from rlrnn.recurrent import compiles
from rlrnn.stacked import Done, Form, Stack, Windows, has_kernel

SMALL = 128  # units, up to which one thread here is faster than two in torch
MOMENTS = {  # what torch calls the rows of a stack
    "sgd": {},
    "momentum": {"first": "momentum_buffer"},
    "adam": {"first": "exp_avg", "second": "exp_avg_sq"},
    "adamw": {"first": "exp_avg", "second": "exp_avg_sq"},
}


class Fast:
    """Moves the weights of a model and the state of the optimiser (of torch, and one of
    MOMENTS) that was made for it."""

    def __init__(
        self,
        model: SequenceModel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        name: str,
        weight_decay: float | int,
    ) -> None:
        self.optimizer, self.adaptive = optimizer, name.startswith("adam")
        self.stack = Stack([model], objective, [name], [weight_decay])
        self.parameters = list(model.parameters())
        self.weights = self._rows(self.stack.weights)
        self.moments = {
            key: self._rows(getattr(self.stack, row))
            for row, key in MOMENTS[name].items()
        }

    @staticmethod
    def suits(model: SequenceModel, objective: Objective, name: str) -> bool:
        """Whether there is a compiled window for these, and it is the faster way."""
        several = compiled.threads() > 1
        if several and model.config.hidden_size > SMALL:
            return False
        if name not in MOMENTS or not has_kernel(objective):
            return False
        learning = all(p.requires_grad for p in model.parameters())
        return learning and compiles(model.head.weight) and Form.fits(model)

    def _rows(self, matrix: Tensor) -> list[Tensor]:
        return self.stack.parameters(matrix[0])

    @torch.no_grad()
    def _share(self) -> None:
        """Parameters and moments become views of the stack's rows, if they are not:
        at first, and when a state was loaded."""
        for parameter, row in zip(self.parameters, self.weights, strict=True):
            if parameter.data_ptr() != row.data_ptr():
                row.copy_(parameter)
                parameter.data = row
        for key, rows in self.moments.items():
            for parameter, row in zip(self.parameters, rows, strict=True):
                state = self.optimizer.state[parameter]
                if state.get(key) is not row:
                    row.copy_(state[key]) if key in state else row.zero_()
                    state[key] = row

    def _counts(self) -> list[Tensor]:
        """The optimiser's updates so far, of each parameter."""
        if not self.adaptive:
            return []
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [state.setdefault("step", torch.zeros(())) for state in states]

    def window(
        self,
        chunk: Chunk,
        state: Tensor,
        lr: float,
        clip: float,
        watch: bool,
        keep: bool,
    ) -> Done:
        """One update; see `Stack.window`, but state [S, B, H]."""
        self._share()
        counts = self._counts()
        if not self.moments:
            self.stack.first.zero_()  # 0 times what a diverged window left is NaN
        if counts:
            self.stack.updates.fill_(counts[0])
            torch._foreach_add_(counts, 1)
        windows = Windows(
            chunk.x[None],
            chunk.y[None],
            None if chunk.starts is None else chunk.starts[None],
            None if chunk.mask is None else chunk.mask[None],
            torch.tensor([chunk.scale], dtype=torch.float64),
        )
        rate, limit = torch.tensor([[lr], [clip]], dtype=torch.float64)
        return self.stack.window(
            windows, state[None], rate, limit, watch=watch, keep=keep
        )

    def gradients(self) -> list[Tensor]:
        """Those of the last window that kept them, before the clip."""
        return [row.clone() for row in self._rows(self.stack.grads)]
