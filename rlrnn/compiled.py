"""Recurrent networks with dense layers behind them, on a CPU, as one step of autograd.

Shapes: T time steps, B columns, D inputs, H units, S state rows, O outputs, M = T·B.

Between two small matrix products torch spends more time on its own affairs than on
them. Here a whole network, recurrent layers and then dense ones, goes through
`rlrnn.kernels` and back in one call, and several networks on as many threads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlrnn import kernels
from rlrnn.kernels import Array


@dataclass(frozen=True)
class Shape:
    """What the tensors of a network mean: w_x, w_h, b_x and b_h of each layer, then
    weight and bias of each dense one."""

    cell: str
    layers: int
    squashes: tuple[str, ...]  # after each dense layer: "", "tanh" or "relu"


def dense(head: nn.Sequential) -> list[tuple[nn.Linear, str]] | None:
    """Linear layers, each with what follows it; None if there is anything else."""
    layers: list[tuple[nn.Linear, str]] = []
    for module in head:
        if isinstance(module, nn.Linear) and module.bias is not None:
            layers.append((module, ""))
        elif isinstance(module, (nn.Tanh, nn.ReLU)) and layers and not layers[-1][1]:
            layers[-1] = layers[-1][0], type(module).__name__.lower()
        else:
            return None
    return layers


# ------------------------------------------------------------------------ one network


@dataclass
class Tape:
    """What the way back needs, layer by layer."""

    inputs: list[Array]  # of recurrent and then of dense layers, [M, ...]
    gates: list[Array]  # [1, T, B, G]
    states: list[Array]  # [1, R, B, H] before the first step
    kept: list[Array]  # [1, T, B, H]
    outputs: list[Array]  # of all layers; [1, T, B, H], then [M, O]


def forward(
    shape: Shape,
    weights: Sequence[Array],
    x: Array,
    state: Array,
    starts: Array,
    threads: int = 1,
) -> tuple[Array, Array, Tape]:
    """Outputs [T, B, O], the state after the last step, and the tape.

    x [T, B, D], state [S, B, H], starts [T, B]; contiguous.
    """
    steps, columns, _ = x.shape
    tape = Tape([], [], [], [], [])
    after = np.empty_like(state)
    rows = x.reshape(steps * columns, -1)
    for layer in range(shape.layers):
        w_x, w_h, b_x, b_h = weights[4 * layer : 4 * layer + 4]
        bias, b_n = biases(shape.cell, b_x, b_h)
        gates = kernels.linear(rows, pack(w_x), bias)
        gates = gates.reshape(1, steps, columns, -1)
        before = np.ascontiguousarray(state[None, layer :: shape.layers])
        y = np.empty((1, steps, columns, w_h.shape[1]), x.dtype)
        kept = y if shape.cell == "rnn" else np.empty_like(y)
        last = np.empty_like(before)
        kernels.forward(
            shape.cell,
            gates,
            pack(w_h),
            b_n,
            before,
            starts[None],
            y,
            kept,
            last,
            threads,
        )
        after[layer :: shape.layers] = last[0]
        tape.inputs.append(rows)
        tape.gates.append(gates)
        tape.states.append(before)
        tape.kept.append(kept)
        tape.outputs.append(y)
        rows = y.reshape(steps * columns, -1)
    for i, squash in enumerate(shape.squashes):
        weight, bias = weights[4 * shape.layers + 2 * i : 4 * shape.layers + 2 * i + 2]
        tape.inputs.append(rows)
        rows = kernels.linear(rows, pack(weight), bias, squash)
        tape.outputs.append(rows)
    return rows.reshape(steps, columns, -1), after, tape


def backward(
    shape: Shape,
    weights: Sequence[Array],
    tape: Tape,
    starts: Array,
    d_out: Array,
    d_after: Array,
    need_x: bool,
    threads: int = 1,
) -> tuple[Array | None, Array, list[Array]]:
    """The gradients of x [T, B, D] (if needed), of the state and of the weights."""
    steps, columns, _ = d_out.shape
    d_rows: Array | None = d_out.reshape(steps * columns, -1)
    grads: list[Array] = [d_out] * len(weights)
    for i in reversed(range(len(shape.squashes))):
        at, row = 4 * shape.layers + 2 * i, shape.layers + i
        assert d_rows is not None
        d_z = kernels.unsquash(d_rows, tape.outputs[row], shape.squashes[i])
        grads[at] = outer(d_z, tape.inputs[row], threads)
        grads[at + 1] = d_z.sum(0)
        d_rows = kernels.product(
            d_z, pack(weights[at], transposed=False), weights[at].shape[1]
        )
    d_state = np.empty_like(d_after)
    for layer in reversed(range(shape.layers)):
        w_x, w_h, _, b_h = weights[4 * layer : 4 * layer + 4]
        gates, before, y = tape.gates[layer], tape.states[layer], tape.outputs[layer]
        _, b_n = biases(shape.cell, b_h, b_h)
        assert d_rows is not None
        d_gates = np.empty_like(gates)
        d_h = np.empty_like(gates) if shape.cell == "gru" else d_gates
        # a copy, which the kernel writes into: `d_after` may be a tensor's own gradient
        d_layer = np.array(d_after[None, layer :: shape.layers])
        kernels.backward(
            shape.cell,
            gates,
            pack(w_h, transposed=False),
            b_n,
            before,
            starts[None],
            y,
            tape.kept[layer],
            d_rows.reshape(y.shape),
            d_layer,
            d_gates,
            d_h,
            threads,
        )
        d_state[layer :: shape.layers] = d_layer[0]
        hidden = np.concatenate((before[0, :1], y[0, :-1]))  # h before each step
        hidden[starts] = 0.0
        flat, flat_h = (d.reshape(steps * columns, -1) for d in (d_gates, d_h))
        d_b = flat.sum(0)
        grads[4 * layer : 4 * layer + 4] = (
            outer(flat, tape.inputs[layer], threads),
            outer(flat_h, hidden.reshape(steps * columns, -1), threads),
            d_b,
            # not the same memory, in which clipping would scale it twice
            flat_h.sum(0) if shape.cell == "gru" else d_b.copy(),
        )
        d_rows = None
        if layer or need_x:
            packed = pack(w_x, transposed=False)
            d_rows = kernels.product(flat, packed, w_x.shape[1])
    d_x = None if d_rows is None else d_rows.reshape(steps, columns, -1)
    return d_x, d_state, grads


def biases(cell: str, b_x: Array, b_h: Array) -> tuple[Array, Array]:
    """What is added to the products with the inputs; a GRU's [1, H] behind its gate."""
    bias = b_x + b_h
    if cell != "gru":
        return bias, bias[None, :0]
    size = len(bias) // 3
    bias[2 * size :] = b_x[2 * size :]
    return bias, b_h[None, 2 * size :]


def pack(weight: Array, transposed: bool = True) -> Array:
    return kernels.pack(weight[None], transposed)


def outer(a: Array, b: Array, threads: int) -> Array:
    """a.T @ b for a [M, G] and b [M, D]."""
    # not by BLAS, numpy's or torch's, whose own threads would take the cores
    out = np.empty((a.shape[1], b.shape[1]), a.dtype)
    if b.shape[1] < 16:
        out[:] = kernels.few(b, a).T
    elif a.shape[1] < 16:
        out[:] = kernels.few(a, b)
    else:
        kernels.outer(a[None], b[None], out[None], threads)
    return out


# --------------------------------------------------------------------- several of them

_threads = 0  # those that `undisturbed` lends


def threads() -> int:
    """That networks here may use."""
    return _threads or torch.get_num_threads()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, torch has one thread, and the networks here have all that it had.

    Where networks are small, torch gains nothing from more than one; but its idle
    threads keep the cores busy for a while after each operation.
    """
    global _threads
    if _threads:  # already
        yield
        return
    _threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_threads)
        _threads = 0


class Networks(torch.autograd.Function):
    """N networks side by side: outputs, then states, then (without gradient) latents.

    `shapes` say how the tensors, after N inputs and N states, fall to the networks.
    """

    @staticmethod
    def forward(
        ctx: Any, shapes: tuple[Shape, ...], starts: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(shapes)
        arrays = [t.detach().contiguous().numpy() for t in tensors]
        begins = starts.contiguous().numpy()
        weights = _deal(shapes, arrays[2 * count :])
        available = threads()
        each = max(available // count, 1)
        xs, states = arrays[:count], arrays[count : 2 * count]
        there = partial(_there, shapes, weights, xs, states, begins, each)
        results = in_parallel(there, count, available)
        ctx.shapes, ctx.starts, ctx.threads = shapes, begins, available
        ctx.tapes, ctx.weights = [tape for _, _, tape in results], weights
        ctx.save_for_backward(*tensors)
        latents = [
            torch.from_numpy(tape.outputs[shape.layers - 1][0])
            for shape, (_, _, tape) in zip(shapes, results, strict=True)
        ]
        outputs = [torch.from_numpy(out) for out, _, _ in results]
        afters = [torch.from_numpy(after) for _, after, _ in results]
        if any(not shape.squashes for shape in shapes):
            latents = [latent.clone() for latent in latents]
        ctx.mark_non_differentiable(*latents)
        return (*outputs, *afters, *latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        shapes, count = ctx.shapes, len(ctx.shapes)
        _ = ctx.saved_tensors  # an error if one has been written to since
        needs = ctx.needs_input_grad[2 : 2 + count]
        arrays = [g.contiguous().numpy() for g in grads[: 2 * count]]
        each = max(ctx.threads // count, 1)
        gradients = list(zip(arrays[:count], arrays[count:], needs, strict=True))
        taped = list(zip(shapes, ctx.weights, ctx.tapes, strict=True))
        back = partial(_back, taped, ctx.starts, gradients, each)
        results = in_parallel(back, count, ctx.threads)
        d_xs = [None if d is None else torch.from_numpy(d) for d, _, _ in results]
        d_states = [torch.from_numpy(d) for _, d, _ in results]
        d_weights = [torch.from_numpy(g) for _, _, gs in results for g in gs]
        return None, None, *d_xs, *d_states, *d_weights


# Not inside `Networks`: what is defined in each call is checked anew by each, in tests.


def _there(
    shapes: tuple[Shape, ...],
    weights: list[list[Array]],
    xs: list[Array],
    states: list[Array],
    starts: Array,
    threads: int,
    n: int,
) -> tuple[Array, Array, Tape]:
    return forward(shapes[n], weights[n], xs[n], states[n], starts, threads)


def _back(
    taped: list[tuple[Shape, list[Array], Tape]],
    starts: Array,
    gradients: list[tuple[Array, Array, bool]],
    threads: int,
    n: int,
) -> tuple[Array | None, Array, list[Array]]:
    return backward(*taped[n], starts, *gradients[n], threads)


def _deal(shapes: tuple[Shape, ...], arrays: list[Array]) -> list[list[Array]]:
    """The weights of each network."""
    hands, begin = [], 0
    for shape in shapes:
        end = begin + 4 * shape.layers + 2 * len(shape.squashes)
        hands.append(arrays[begin:end])
        begin = end
    return hands


def in_parallel(job: Callable[[int], Any], count: int, threads: int) -> list[Any]:
    """job(0), job(1), ...; on several threads, if there are any."""
    if threads == 1 or count == 1:
        return [job(n) for n in range(count)]
    futures = [kernels.pool(threads).submit(job, n) for n in range(1, count)]
    return [job(0), *(future.result() for future in futures)]
