"""The recurrent core: rnn, gru and lstm over sequences that restart inside.

Shapes: T time steps, B columns, D inputs, H units, L layers. Time comes first.
The state is one tensor [S, B, H]: the L hidden states, then, for an LSTM, the L cell
states. This file alone knows that layout; others keep it, index its columns, and give
it back.
"""

from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Cell = Literal["lstm", "gru", "rnn"]
_STACKS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Recurrent(nn.Module):
    """A stack of recurrent layers with state resets inside the sequence.

    The parameters are those of `nn.LSTM`, `nn.GRU` or `nn.RNN` (tanh), whose results
    it gives exactly where nothing restarts.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layers: int = 1,
        cell: Cell = "lstm",
    ) -> None:
        super().__init__()
        if cell not in get_args(Cell):
            raise ValueError(
                f"cell is {cell!r}, expected one of {', '.join(get_args(Cell))}"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.layers = layers
        self.cell: Cell = cell
        self.stack: nn.RNNBase = _STACKS[cell](input_size, hidden_size, layers)

    def initial_state(self, batch: int) -> Float[Tensor, "S B H"]:
        """The state before the first step: zeros, on the device of the weights."""
        weight = self.stack.weight_hh_l0
        assert isinstance(weight, Tensor)
        rows = self.layers * (2 if self.cell == "lstm" else 1)
        return weight.new_zeros(rows, batch, self.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "T B D"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "S B H"]]:
        """Outputs of the last layer, and the state after the last step.

        Where `starts[t, b]` holds, a new sequence begins at step t of column b: the
        state is zero before that step, and no gradient crosses it. `starts=None` says
        that no sequence begins.
        """
        if starts is None and x.shape[0] > 1:
            return self._unbroken(x, state)
        if x.device.type == "cpu" and x.shape[0] > 1:
            assert starts is not None
            return self._between_restarts(x, state, starts)
        # One step; or an accelerator, where finding the restarts would synchronise.
        return self.reference(x, state, starts)

    def reference(
        self,
        x: Float[Tensor, "T B D"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "S B H"]]:
        """`forward` as a loop over time that anyone can check."""
        if starts is not None:
            keep = (~starts).to(x.dtype).unsqueeze(-1)  # [T, B, 1]
        hidden: list[Tensor] = []
        memory: list[Tensor] = []
        for layer in range(self.layers):
            weights: list[Any] = self.stack._flat_weights[4 * layer : 4 * layer + 4]
            w_x, w_h, b_x, b_h = weights
            h = state[layer]
            c = state[self.layers + layer] if self.cell == "lstm" else h
            gates = F.linear(x, w_x, b_x)  # [T, B, G*H]: one product for all steps
            outputs = []
            for t in range(x.shape[0]):
                if starts is not None:
                    h = h * keep[t]
                    c = c * keep[t]
                if self.cell == "lstm":
                    h, c = _lstm_step(gates[t], h, c, w_h, b_h)
                elif self.cell == "gru":
                    h = _gru_step(gates[t], h, w_h, b_h)
                else:
                    h = torch.tanh(gates[t] + F.linear(h, w_h, b_h))
                outputs.append(h)
            x = torch.stack(outputs)
            hidden.append(h)
            memory.append(c)
        return x, torch.stack(hidden + memory if self.cell == "lstm" else hidden)

    def _unbroken(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """No restarts: torch's own kernels (oneDNN on the CPU, cuDNN on CUDA)."""
        if self.cell == "lstm":
            y, (h, c) = self.stack(x, tuple(state.chunk(2)))
            return y, torch.cat((h, c))
        y, h = self.stack(x, state)
        return y, h

    def _between_restarts(
        self, x: Tensor, state: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """torch's kernels on each stretch of time in which no column restarts."""
        keep = (~starts).to(x.dtype).unsqueeze(-1)  # [T, B, 1]
        bounds = [0, *(np.flatnonzero(starts[1:].numpy().any(1)) + 1), len(x)]
        outputs = []
        for begin, end in pairwise(bounds):
            y, state = self._unbroken(x[begin:end], state * keep[begin])
            outputs.append(y)
        return torch.cat(outputs), state


def _lstm_step(
    gates: Tensor, h: Tensor, c: Tensor, w_h: Tensor, b_h: Tensor
) -> tuple[Tensor, Tensor]:
    """Hochreiter & Schmidhuber 1997 with forget gates (Gers et al. 2000)."""
    i, f, g, o = (gates + F.linear(h, w_h, b_h)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(gates: Tensor, h: Tensor, w_h: Tensor, b_h: Tensor) -> Tensor:
    """Cho et al. 2014, with the reset gate after the product, as cuDNN has it."""
    x_r, x_z, x_n = gates.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w_h, b_h).chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + z * (h - n)
