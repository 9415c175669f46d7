"""One step of the actor at a time, while its weights stay as they are.

A rollout asks for T steps of a few columns each, where calling torch costs more than
computing. On a CPU the weights are packed once, and the step runs in `rlrnn.kernels`;
elsewhere, and with layers that these do not know, it runs in torch.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlrnn import compiled, kernels
from rlrnn.agents.cores import Memoryless
from rlrnn.recurrent import Recurrent, compiles

# features [B, F], state [S, B, H], starts [B] -> outputs, latent [B, H], state
Step = Callable[
    [Float[Tensor, "B F"], Float[Tensor, "S B H"], Bool[Tensor, "B"]],
    tuple[Float[Tensor, "B P"], Float[Tensor, "B H"], Float[Tensor, "S B H"]],
]


def stepper(core: Recurrent | Memoryless, head: nn.Sequential) -> Step:
    """`core`, then `head`, without gradients, for as long as neither changes."""
    layers = compiled.dense(head)
    if isinstance(core, Recurrent) and layers is not None and not core.parallel:
        if compiles(core.weights(0)[0]):
            return _Compiled(core, layers)

    @torch.no_grad()
    def step(
        features: Tensor, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        latent, state = core(features[None], state, starts[None])
        return head(latent[0]), latent[0], state

    return step


class _Compiled:
    def __init__(self, core: Recurrent, layers: list[tuple[nn.Linear, str]]) -> None:
        self.core = core
        self.cells = [self._pack_cell(core, i) for i in range(core.layers)]
        self.layers = [
            (
                compiled.pack(layer.weight.detach().numpy()),
                layer.bias.detach().numpy().copy(),
                squash,
            )
            for layer, squash in layers
        ]

    @staticmethod
    def _pack_cell(core: Recurrent, layer: int) -> tuple[kernels.Array, ...]:
        w_x, w_h, b_x, b_h = (w.detach().numpy() for w in core.weights(layer))
        bias, b_n = compiled.biases(core.cell, b_x, b_h)
        return compiled.pack(w_x), bias, compiled.pack(w_h), b_n.copy()

    def __call__(
        self, features: Tensor, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = features.detach().contiguous().numpy()
        before = state.detach().numpy()
        columns, size, depth = len(x), self.core.hidden_size, self.core.layers
        after = np.empty((depth, len(before) // depth, columns, size), x.dtype)
        begins = starts.numpy()[None, None]
        for layer, (w_x, bias, w_h, b_n) in enumerate(self.cells):
            gates = kernels.linear(x, w_x, bias)[None, None]
            y = np.empty((1, 1, columns, size), x.dtype)
            kernels.forward(
                self.core.cell,
                gates,
                w_h,
                b_n,
                np.ascontiguousarray(before[None, layer::depth]),
                begins,
                y,
                y if self.core.cell == "rnn" else np.empty_like(y),
                after[None, layer],
                1,
            )
            x = y[0, 0]
        latent = torch.from_numpy(x)
        for packed, bias, squash in self.layers:
            x = kernels.linear(x, packed, bias, squash)
        # from [L, R, B, H] to the rows of a state: all h, then all c
        rows = after[0] if depth == 1 else after.swapaxes(0, 1).reshape(before.shape)
        return torch.from_numpy(x), latent, torch.from_numpy(rows)
