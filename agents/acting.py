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

from rlrnn import kernels
from rlrnn.recurrent import Recurrent, compiles

# features [B, F], state [S, B, H], starts [B] -> outputs, latent [B, H], state
Step = Callable[
    [Float[Tensor, "B F"], Float[Tensor, "S B H"], Bool[Tensor, "B"]],
    tuple[Float[Tensor, "B P"], Float[Tensor, "B H"], Float[Tensor, "S B H"]],
]


def stepper(core: Recurrent, head: nn.Sequential) -> Step:
    """`core`, then `head`, without gradients, for as long as neither changes."""
    if compiles(core.weights(0)[0]) and (layers := _dense(head)) is not None:
        return _Compiled(core, layers)

    @torch.no_grad()
    def step(
        features: Tensor, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        latent, state = core(features[None], state, starts[None])
        return head(latent[0]), latent[0], state

    return step


def _dense(head: nn.Sequential) -> list[tuple[nn.Linear, str]] | None:
    """Linear layers, each with what follows it; None if there is anything else."""
    layers: list[tuple[nn.Linear, str]] = []
    for module in head:
        if isinstance(module, nn.Linear):
            layers.append((module, ""))
        elif isinstance(module, (nn.Tanh, nn.ReLU)) and layers and not layers[-1][1]:
            layers[-1] = layers[-1][0], type(module).__name__.lower()
        else:
            return None
    return layers


class _Compiled:
    def __init__(self, core: Recurrent, layers: list[tuple[nn.Linear, str]]) -> None:
        self.core = core
        self.cells = [self._pack_cell(core, i) for i in range(core.layers)]
        self.layers = [
            (_pack(layer.weight), layer.bias.detach().numpy(), squash)
            for layer, squash in layers
        ]

    @staticmethod
    def _pack_cell(core: Recurrent, layer: int) -> tuple[kernels.Array, ...]:
        w_x, w_h, b_x, b_h = (w.detach() for w in core.weights(layer))
        size = core.hidden_size
        bias, b_n = b_x + b_h, b_x[None, :0]
        if core.cell == "gru":  # the candidate's own bias is behind the reset gate
            bias[2 * size :] = b_x[2 * size :]
            b_n = b_h[None, 2 * size :].clone()
        return _pack(w_x), bias.numpy(), _pack(w_h), b_n.contiguous().numpy()

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


def _pack(weight: Tensor) -> kernels.Array:
    return kernels.pack(weight.detach()[None].contiguous().numpy(), transposed=True)
