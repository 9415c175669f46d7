"""The recurrent core: rnn, gru and lstm over sequences that restart inside.

Shapes: T time steps, B columns, D inputs, H units, L layers. Time comes first.
The state is one tensor [S, B, H]: the L hidden states, then, for an LSTM, the L cell
states. This file alone knows that layout; others keep it, index its columns, and give
it back.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlrnn import kernels

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
        if compiles(x):
            ((y, after),) = together([self], [x], [state], starts)
            return y, after
        if starts is None and x.shape[0] > 1:
            return self._unbroken(x, state)
        # Finding the restarts would synchronise.
        return self.reference(x, state, starts)

    @torch.no_grad()
    def trace(
        self,
        x: Float[Tensor, "T B D"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> Float[Tensor, "T S B H"]:
        """The state after each step, without gradients."""
        if compiles(x):
            hidden, memory = [], []
            for layer in range(self.layers):
                y, kept, _ = _compiled_layer([self], [x], [state], starts, layer)
                x = y[0]
                hidden.append(x)
                if self.cell == "lstm":
                    memory.append(kept[0])
            return torch.stack(hidden + memory, 1)
        states = []
        for t in range(x.shape[0]):
            now = None if starts is None else starts[t : t + 1]
            _, state = self.reference(x[t : t + 1], state, now)
            states.append(state)
        return torch.stack(states)

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
            w_x, w_h, b_x, b_h = self.weights(layer)
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

    def weights(self, layer: int) -> list[Tensor]:
        """w_x [G, D], w_h [G, H], b_x [G], b_h [G] of a layer."""
        return self.stack._flat_weights[4 * layer : 4 * layer + 4]  # type: ignore[return-value]


def compiles(x: Tensor) -> bool:
    """Whether `rlrnn.kernels` work on this tensor."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def together(
    cores: Sequence[Recurrent],
    xs: Sequence[Float[Tensor, "T B _"]],
    states: Sequence[Float[Tensor, "_ B _"]],
    starts: Bool[Tensor, "T B"] | None = None,
) -> list[tuple[Float[Tensor, "T B _"], Float[Tensor, "_ B _"]]]:
    """`core(x, state, starts)` for each core; on a CPU they share its threads."""
    first = cores[0]
    form = first.cell, first.layers, first.input_size, first.hidden_size
    alike = all((c.cell, c.layers, c.input_size, c.hidden_size) == form for c in cores)
    if not (alike and compiles(xs[0])):
        return [c(x, s, starts) for c, x, s in zip(cores, xs, states, strict=True)]
    hidden: list[Tensor] = []
    memory: list[Tensor] = []
    for layer in range(first.layers):
        y, _, last = _compiled_layer(cores, xs, states, starts, layer)
        xs = y.unbind()
        hidden.append(last[:, 0])
        memory.extend(last[:, 1:].unbind(1))
    ends = torch.stack(hidden + memory, 1)
    return list(zip(xs, ends, strict=True))


def _compiled_layer(
    cores: Sequence[Recurrent],
    xs: Sequence[Tensor],
    states: Sequence[Tensor],
    starts: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of N alike cores: y and memory [N, T, B, H], last [N, R, B, H]."""
    rows = slice(layer, None, cores[0].layers)  # h, and c if there is one
    weights = [core.weights(layer) for core in cores]
    outputs: tuple[Tensor, Tensor, Tensor] = _Compiled.apply(  # type: ignore[no-untyped-call]
        cores[0].cell,
        starts,
        *xs,
        *(state[rows] for state in states),
        *(w for kind in zip(*weights, strict=True) for w in kind),
    )
    return outputs


class _Compiled(torch.autograd.Function):
    """One layer of N networks, its recurrence in `rlrnn.kernels`.

    Tensors come as N times x, N times state, and so on for w_x, w_h, b_x and b_h.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, starts: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        xs, states, w_xs, w_hs, b_xs, b_hs = _by_kind(tensors)
        steps, columns, _ = xs[0].shape
        outputs, size = w_hs[0].shape
        count = len(xs)
        gates = w_hs[0].new_empty(count, steps, columns, outputs)
        for n in range(count):
            bias = b_xs[n] + b_hs[n]
            if cell == "gru":  # the candidate's own bias is behind the reset gate
                bias[2 * size :] = b_xs[n][2 * size :]
            torch.addmm(
                bias, xs[n].flatten(0, 1), w_xs[n].T, out=gates[n].flatten(0, 1)
            )
        state = torch.stack(states)
        w_h = torch.stack(w_hs)
        b_n = torch.stack(b_hs)[:, 2 * size :] if cell == "gru" else w_h[:, 0, :0]
        b_n = b_n.contiguous()
        if starts is None:
            starts = torch.zeros(steps, columns, dtype=torch.bool)
        starts = starts[None].contiguous()
        y = gates.new_empty(count, steps, columns, size)
        kept = y.new_empty(0, 0, 0, 0) if cell == "rnn" else torch.empty_like(y)
        last = torch.empty_like(state)
        kernels.forward(
            cell,
            gates.numpy(),
            kernels.pack(w_h.numpy(), transposed=True),
            b_n.numpy(),
            state.numpy(),
            starts.numpy(),
            y.numpy(),
            kept.numpy(),
            last.numpy(),
            torch.get_num_threads(),
        )
        ctx.cell = cell
        ctx.save_for_backward(gates, w_h, b_n, state, starts, y, kept, *xs, *w_xs)
        ctx.mark_non_differentiable(kept)
        return y, kept, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, _: Tensor, d_last: Tensor) -> Any:
        gates, w_h, b_n, state, starts, y, kept, *rest = ctx.saved_tensors
        cell, count = ctx.cell, len(y)
        xs, w_xs = rest[:count], rest[count:]
        d_gates = torch.empty_like(gates)
        d_h = torch.empty_like(gates) if cell == "gru" else d_gates
        d_state = d_last.clone(memory_format=torch.contiguous_format)
        kernels.backward(
            cell,
            gates.numpy(),
            kernels.pack(w_h.numpy(), transposed=False),
            b_n.numpy(),
            state.numpy(),
            starts.numpy(),
            y.numpy(),
            kept.numpy(),
            d_y.contiguous().numpy(),
            d_state.numpy(),
            d_gates.numpy(),
            d_h.numpy(),
            torch.get_num_threads(),
        )
        before = torch.cat((state[:, None, 0], y[:, :-1]), 1)  # h before each step
        before.masked_fill_(starts[..., None], 0.0)
        d_gates, d_h, before = (x.flatten(1, 2) for x in (d_gates, d_h, before))
        d_xs: list[Tensor | None] = [None] * count
        for n in range(count):
            if ctx.needs_input_grad[2 + n]:
                d_xs[n] = (d_gates[n] @ w_xs[n]).view_as(xs[n])
        # x.T @ g rather than g.T @ x, which takes ten times as long for a narrow x
        d_w_xs = [
            (x.flatten(0, 1).T @ g).T.contiguous()
            for g, x in zip(d_gates, xs, strict=True)
        ]
        d_w_h = torch.empty_like(w_h)
        kernels.outer(
            d_h.numpy(), before.numpy(), d_w_h.numpy(), torch.get_num_threads()
        )
        d_b_xs = d_gates.sum(1)
        # not the same memory, in which clipping would scale it twice
        d_b_hs = d_h.sum(1) if cell == "gru" else d_b_xs.clone()
        return None, None, *d_xs, *d_state, *d_w_xs, *d_w_h, *d_b_xs, *d_b_hs


def _by_kind(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Six kinds of them, each as many times as there are networks."""
    count = len(tensors) // 6
    return (tensors[count * i : count * (i + 1)] for i in range(6))


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
