"""The recurrence on CUDA, in Triton: lstm, gru and rnn with restarts inside.

Shapes as in `rlrnn.kernels`, whose arrays these functions take as float32 tensors:
N networks, T time steps, B columns, H units, G gates, R state rows. One program walks
all T steps for a few columns of one network, so that nothing waits for the host or for
another program; nothing is added up in an order that could change, so equal inputs give
equal bits. `Recurrent.reference` says what it computes.

There are two ways. Where the weights are small, `_forward_held` and `_backward_held`
keep them on the multiprocessor for all T steps, and the state in registers. Otherwise
`_forward_tiled` and `_backward_tiled` read them tile by tile, from the L2 cache, once
per step, and hand the state on through `y`, `kept` and `d_state`, which the next step
reads behind a barrier. (Splitting the weights over several multiprocessors would
spare the reading, but needs a barrier across programs.)

Some arrays are overwritten by the program that reads them. A small tile may be held by
several threads at once, each of which loads it while one of them stores: hence the
barriers between loads and stores.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

GATES = {"lstm": 4, "gru": 3, "rnn": 1}

# Recompiled for another H, not for another T; for another B if its tiles are others.
_jit = triton.jit(do_not_specialize=["steps", "columns", "apart"])


# ------------------------------------------------------------------------------- parts


@triton.jit
@no_type_check
def _tanh(x):
    """As in `rlrnn.kernels`: right to 4e-7, and NaN stays NaN."""
    x = tl.where(x > 9.0, 9.0, x)
    x = tl.where(x < -9.0, -9.0, x)
    s = x * x
    p = (1.335468374e-8 * s + 2.060909926e-5) * s + 3.495589173e-3
    p = (p * s + 1.338102651e-1) * s + 1.0
    q = (7.776567699e-7 * s + 3.285636522e-4) * s + 2.587698617e-2
    q = (q * s + 4.67143421e-1) * s + 1.0
    y = x * p / q
    y = tl.where(y > 1.0, 1.0, y)
    return tl.where(y < -1.0, -1.0, y)


@triton.jit
@no_type_check
def _sigmoid(x):
    return _tanh(x * 0.5) * 0.5 + 0.5


@triton.jit
@no_type_check
def _product(
    x, row, rows, w, unit, units,
    K: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[row, :K] @ w[unit, :K].T, tile by tile of K; rows of x and w have K numbers."""
    total = tl.zeros((row.shape[0], unit.shape[0]), tl.float32)
    for begin in range(0, K, TILE):
        k = begin + tl.arange(0, TILE)
        inside = (k < K)[None, :]
        at = row[:, None] * K + k[None, :]
        left = tl.load(x + at, mask=rows[:, None] & inside, other=0.0)
        at = unit[:, None] * K + k[None, :]
        right = tl.load(w + at, mask=units[:, None] & inside, other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
@no_type_check
def _square(w, unit, units, ROW: tl.constexpr):
    """w[unit, unit].T, where a row of w has ROW numbers."""
    at = unit[None, :] * ROW + unit[:, None]
    return tl.load(w + at, mask=units[None, :] & units[:, None], other=0.0)


# --------------------------------------------------------------------------- the cells
# One step of a tile of columns by units. `g` points at the tile's first gate; `s_` are
# the products with h.


@triton.jit
@no_type_check
def _lstm(g, s_i, s_f, s_u, s_o, c, ok, H: tl.constexpr):
    """Hochreiter & Schmidhuber 1997, forget gates of Gers et al. 2000: h, c."""
    i = _sigmoid(tl.load(g, mask=ok, other=0.0) + s_i)
    f = _sigmoid(tl.load(g + H, mask=ok, other=0.0) + s_f)
    u = _tanh(tl.load(g + 2 * H, mask=ok, other=0.0) + s_u)
    o = _sigmoid(tl.load(g + 3 * H, mask=ok, other=0.0) + s_o)
    tl.debug_barrier()
    tl.store(g, i, mask=ok)
    tl.store(g + H, f, mask=ok)
    tl.store(g + 2 * H, u, mask=ok)
    tl.store(g + 3 * H, o, mask=ok)
    c = f * c + i * u
    return o * _tanh(c), c


@triton.jit
@no_type_check
def _gru(g, s_r, s_z, s_n, h, ok, H: tl.constexpr):
    """Cho et al. 2014, reset gate after the product as in cuDNN: h."""
    r = _sigmoid(tl.load(g, mask=ok, other=0.0) + s_r)
    z = _sigmoid(tl.load(g + H, mask=ok, other=0.0) + s_z)
    u = _tanh(tl.load(g + 2 * H, mask=ok, other=0.0) + r * s_n)
    tl.debug_barrier()
    tl.store(g, r, mask=ok)
    tl.store(g + H, z, mask=ok)
    tl.store(g + 2 * H, u, mask=ok)
    return u + z * (h - u)


@triton.jit
@no_type_check
def _lstm_back(g, dg, dh, dc, c, before, ok, H: tl.constexpr):
    """The gradients of the four gates, and of the cell before, if it goes on."""
    i = tl.load(g, mask=ok, other=0.0)
    f = tl.load(g + H, mask=ok, other=0.0)
    u = tl.load(g + 2 * H, mask=ok, other=0.0)
    o = tl.load(g + 3 * H, mask=ok, other=0.0)
    squashed = _tanh(c)
    dc += dh * o * (1.0 - squashed * squashed)
    d_i = dc * u * i * (1.0 - i)
    d_f = dc * before * f * (1.0 - f)
    d_u = dc * i * (1.0 - u * u)
    d_o = dh * squashed * o * (1.0 - o)
    tl.store(dg, d_i, mask=ok)
    tl.store(dg + H, d_f, mask=ok)
    tl.store(dg + 2 * H, d_u, mask=ok)
    tl.store(dg + 3 * H, d_o, mask=ok)
    return d_i, d_f, d_u, d_o, dc * f


@triton.jit
@no_type_check
def _gru_back(g, dg, da, dh, behind, before, ok, H: tl.constexpr):
    """Gradients of the three products with h, and of h itself past them."""
    r = tl.load(g, mask=ok, other=0.0)
    z = tl.load(g + H, mask=ok, other=0.0)
    u = tl.load(g + 2 * H, mask=ok, other=0.0)
    d_u = dh * (1.0 - z) * (1.0 - u * u)
    d_r = d_u * behind * r * (1.0 - r)
    d_z = dh * (before - u) * z * (1.0 - z)
    tl.store(dg, d_r, mask=ok)
    tl.store(dg + H, d_z, mask=ok)
    tl.store(dg + 2 * H, d_u, mask=ok)
    tl.store(da, d_r, mask=ok)
    tl.store(da + H, d_z, mask=ok)
    tl.store(da + 2 * H, d_u * r, mask=ok)
    return d_r, d_z, d_u * r, dh * z


# ------------------------------------------------------------------------- the kernels
# A program has network n and BLOCK columns from `first` on; pointers move from step to
# step. `rows` are the columns that exist, `on` those that do not start at this step.


@_jit
@no_type_check
def _forward_held(
    gates, w, b_n, state, starts, y, kept, last, steps, columns, apart,
    H: tl.constexpr, CELL: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK)
    rows = first + row < columns
    unit = tl.arange(0, UNITS)
    units = unit < H
    ok = rows[:, None] & units[None, :]
    at = row[:, None] * H + unit[None, :]
    starts += n * apart + first
    y += (n * steps * columns + first) * H
    kept += (n * steps * columns + first) * H
    gates += (n * steps * columns + first) * G
    state += (n * R * columns + first) * H
    last += (n * R * columns + first) * H
    w += n * G * H
    w_0 = _square(w, unit, units, H)
    if G > H:
        w_1 = _square(w + H * H, unit, units, H)
        w_2 = _square(w + 2 * H * H, unit, units, H)
    if CELL == "lstm":
        w_3 = _square(w + 3 * H * H, unit, units, H)
        c = tl.load(state + columns * H + at, mask=ok, other=0.0)
    if CELL == "gru":
        bias = tl.load(b_n + n * H + unit, mask=units, other=0.0)[None, :]
    h = tl.load(state + at, mask=ok, other=0.0)
    for _ in range(steps):
        on = rows & (tl.load(starts + row, mask=rows, other=1) == 0)
        h = tl.where(on[:, None], h, 0.0)
        g = gates + row[:, None] * G + unit[None, :]
        s_0 = tl.dot(h, w_0, input_precision=PRECISION)
        if G > H:
            s_1 = tl.dot(h, w_1, input_precision=PRECISION)
            s_2 = tl.dot(h, w_2, input_precision=PRECISION)
        if CELL == "lstm":
            s_3 = tl.dot(h, w_3, input_precision=PRECISION)
            c = tl.where(on[:, None], c, 0.0)
            h, c = _lstm(g, s_0, s_1, s_2, s_3, c, ok, H)
            tl.store(kept + at, c, mask=ok)
        elif CELL == "gru":
            s_2 += bias
            h = _gru(g, s_0, s_1, s_2, h, ok, H)
            tl.store(kept + at, s_2, mask=ok)
        else:
            h = _tanh(tl.load(g, mask=ok, other=0.0) + s_0)
        tl.store(y + at, h, mask=ok)
        starts += columns
        gates += columns * G
        y += columns * H
        kept += columns * H
    tl.store(last + at, h, mask=ok)
    if CELL == "lstm":
        tl.store(last + columns * H + at, c, mask=ok)


@_jit
@no_type_check
def _forward_tiled(
    gates, w, b_n, state, starts, y, kept, last, steps, columns, apart,
    H: tl.constexpr, CELL: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK)
    rows = first + row < columns
    starts += n * apart + first
    y += (n * steps * columns + first) * H
    kept += (n * steps * columns + first) * H
    gates += (n * steps * columns + first) * G
    h_at = state + (n * R * columns + first) * H  # the state before this step
    c_at = h_at + columns * H
    last += (n * R * columns + first) * H
    w += n * G * H
    # one stage: no step may read ahead what the one before it writes
    for t in tl.range(steps, num_stages=1):
        on = rows & (tl.load(starts + row, mask=rows, other=1) == 0)
        for begin in range(0, H, UNITS):
            unit = begin + tl.arange(0, UNITS)
            units = unit < H
            ok = rows[:, None] & units[None, :]
            going = on[:, None] & units[None, :]
            at = row[:, None] * H + unit[None, :]
            g = gates + row[:, None] * G + unit[None, :]
            end = ok & (t == steps - 1)
            s_0 = _product(h_at, row, on, w, unit, units, H, TILE, PRECISION)
            if G > H:
                w_1, w_2 = w + H * H, w + 2 * H * H
                s_1 = _product(h_at, row, on, w_1, unit, units, H, TILE, PRECISION)
                s_2 = _product(h_at, row, on, w_2, unit, units, H, TILE, PRECISION)
            if CELL == "lstm":
                w_3 = w + 3 * H * H
                s_3 = _product(h_at, row, on, w_3, unit, units, H, TILE, PRECISION)
                c = tl.load(c_at + at, mask=going, other=0.0)
                h, c = _lstm(g, s_0, s_1, s_2, s_3, c, ok, H)
                tl.store(kept + at, c, mask=ok)
                tl.store(last + columns * H + at, c, mask=end)
            elif CELL == "gru":
                s_2 += tl.load(b_n + n * H + unit, mask=units, other=0.0)[None, :]
                h = tl.load(h_at + at, mask=going, other=0.0)
                h = _gru(g, s_0, s_1, s_2, h, ok, H)
                tl.store(kept + at, s_2, mask=ok)
            else:
                h = _tanh(tl.load(g, mask=ok, other=0.0) + s_0)
            tl.store(y + at, h, mask=ok)
            tl.store(last + at, h, mask=end)
        tl.debug_barrier()  # all of h is there
        h_at = y
        c_at = kept
        starts += columns
        gates += columns * G
        y += columns * H
        kept += columns * H


@_jit
@no_type_check
def _backward_held(
    gates, w, state, starts, y, kept, d_y, d_state, d_gates, d_h, steps, columns,
    apart,
    H: tl.constexpr, CELL: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK)
    rows = first + row < columns
    unit = tl.arange(0, UNITS)
    units = unit < H
    ok = rows[:, None] & units[None, :]
    at = row[:, None] * H + unit[None, :]
    end = n * steps * columns + (steps - 1) * columns.to(tl.int64) + first
    starts += n * apart + (steps - 1) * columns.to(tl.int64) + first
    y += end * H
    kept += end * H
    d_y += end * H
    gates += end * G
    d_gates += end * G
    d_h += end * G
    state += (n * R * columns + first) * H
    d_state += (n * R * columns + first) * H
    w += n * G * H
    w_0 = _square(w, unit, units, G)
    if G > H:
        w_1 = _square(w + H, unit, units, G)
        w_2 = _square(w + 2 * H, unit, units, G)
    if CELL == "lstm":
        w_3 = _square(w + 3 * H, unit, units, G)
        dc = tl.load(d_state + columns * H + at, mask=ok, other=0.0)
    dh = tl.load(d_state + at, mask=ok, other=0.0)
    for i in range(steps):
        on = rows & (tl.load(starts + row, mask=rows, other=1) == 0)
        going = on[:, None] & units[None, :]
        a = row[:, None] * G + unit[None, :]
        dh += tl.load(d_y + at, mask=ok, other=0.0)
        if CELL == "lstm":
            before_at = kept - columns * H
            if i == steps - 1:
                before_at = state + columns * H
            c = tl.load(kept + at, mask=ok, other=0.0)
            before = tl.load(before_at + at, mask=going, other=0.0)
            d_0, d_1, d_2, d_3, dc = _lstm_back(
                gates + a, d_gates + a, dh, dc, c, before, ok, H
            )
            dc = tl.where(on[:, None], dc, 0.0)
            dh = tl.dot(d_0, w_0, input_precision=PRECISION)
            dh = tl.dot(d_1, w_1, dh, input_precision=PRECISION)
            dh = tl.dot(d_2, w_2, dh, input_precision=PRECISION)
            dh = tl.dot(d_3, w_3, dh, input_precision=PRECISION)
        elif CELL == "gru":
            before_at = y - columns * H
            if i == steps - 1:
                before_at = state
            behind = tl.load(kept + at, mask=ok, other=0.0)
            before = tl.load(before_at + at, mask=going, other=0.0)
            d_0, d_1, d_2, dh = _gru_back(
                gates + a, d_gates + a, d_h + a, dh, behind, before, ok, H
            )
            dh = tl.dot(d_0, w_0, dh, input_precision=PRECISION)
            dh = tl.dot(d_1, w_1, dh, input_precision=PRECISION)
            dh = tl.dot(d_2, w_2, dh, input_precision=PRECISION)
        else:
            out = tl.load(y + at, mask=ok, other=0.0)
            d_0 = dh * (1.0 - out * out)
            tl.store(d_gates + a, d_0, mask=ok)
            dh = tl.dot(d_0, w_0, input_precision=PRECISION)
        dh = tl.where(on[:, None], dh, 0.0)
        starts -= columns
        y -= columns * H
        kept -= columns * H
        d_y -= columns * H
        gates -= columns * G
        d_gates -= columns * G
        d_h -= columns * G
    tl.debug_barrier()
    tl.store(d_state + at, dh, mask=ok)
    if CELL == "lstm":
        tl.store(d_state + columns * H + at, dc, mask=ok)


@_jit
@no_type_check
def _backward_tiled(
    gates, w, state, starts, y, kept, d_y, d_state, d_gates, d_h, steps, columns,
    apart,
    H: tl.constexpr, CELL: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`d_state` holds the gradients of h and c between one step and the next."""
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK)
    rows = first + row < columns
    end = n * steps * columns + (steps - 1) * columns.to(tl.int64) + first
    starts += n * apart + (steps - 1) * columns.to(tl.int64) + first
    y += end * H
    kept += end * H
    d_y += end * H
    gates += end * G
    d_gates += end * G
    d_h += end * G
    state += (n * R * columns + first) * H
    d_state += (n * R * columns + first) * H
    w += n * G * H
    for i in tl.range(steps, num_stages=1):
        on = rows & (tl.load(starts + row, mask=rows, other=1) == 0)
        for begin in range(0, H, UNITS):
            unit = begin + tl.arange(0, UNITS)
            units = unit < H
            ok = rows[:, None] & units[None, :]
            going = on[:, None] & units[None, :]
            at = row[:, None] * H + unit[None, :]
            a = row[:, None] * G + unit[None, :]
            dh = tl.load(d_state + at, mask=ok, other=0.0)
            dh += tl.load(d_y + at, mask=ok, other=0.0)
            if CELL == "lstm":
                before_at = kept - columns * H
                if i == steps - 1:
                    before_at = state + columns * H
                c = tl.load(kept + at, mask=ok, other=0.0)
                before = tl.load(before_at + at, mask=going, other=0.0)
                dc = tl.load(d_state + columns * H + at, mask=ok, other=0.0)
                tl.debug_barrier()
                d_0, d_1, d_2, d_3, dc = _lstm_back(
                    gates + a, d_gates + a, dh, dc, c, before, ok, H
                )
                dc = tl.where(on[:, None], dc, 0.0)
                tl.store(d_state + columns * H + at, dc, mask=ok)
            elif CELL == "gru":
                before_at = y - columns * H
                if i == steps - 1:
                    before_at = state
                behind = tl.load(kept + at, mask=ok, other=0.0)
                before = tl.load(before_at + at, mask=going, other=0.0)
                tl.debug_barrier()
                d_0, d_1, d_2, dh = _gru_back(
                    gates + a, d_gates + a, d_h + a, dh, behind, before, ok, H
                )
                tl.store(d_state + at, dh, mask=ok)
            else:
                out = tl.load(y + at, mask=ok, other=0.0)
                tl.store(d_gates + a, dh * (1.0 - out * out), mask=ok)
        tl.debug_barrier()  # all gates of this step are there
        for begin in range(0, H, UNITS):
            unit = begin + tl.arange(0, UNITS)
            units = unit < H
            ok = rows[:, None] & units[None, :]
            at = row[:, None] * H + unit[None, :]
            dh = _product(d_h, row, on, w, unit, units, G, TILE, PRECISION)
            if CELL == "gru":
                dh += tl.load(d_state + at, mask=ok, other=0.0)
                dh = tl.where(on[:, None], dh, 0.0)
                tl.debug_barrier()
            tl.store(d_state + at, dh, mask=ok)
        tl.debug_barrier()
        starts -= columns
        y -= columns * H
        kept -= columns * H
        d_y -= columns * H
        gates -= columns * G
        d_gates -= columns * G
        d_h -= columns * G


# -------------------------------------------------------------------------- launching


class Plan(NamedTuple):
    """Which of the two ways, the sizes the compiler knows, and how it compiles."""

    held: bool
    constants: dict[str, Any]
    options: dict[str, int]


def plan(cell: str, size: int, columns: int, processors: int, shared: int) -> Plan:
    """For H = `size`, and `columns` of all networks on so many multiprocessors.

    A program takes as few columns, 16 at least, as give each multiprocessor one. The
    weights are held where they and one step fit into `shared` bytes. With these sizes
    the compiler finds registers enough; they have not been measured.
    """
    gates, padded = GATES[cell], max(16, triton.next_power_of_2(size))
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    block = max(16, triton.next_power_of_2(triton.cdiv(columns, processors)))
    least = 4 * padded * (gates * padded + (gates + 1) * min(block, 32))
    held = padded <= 64 and least <= shared
    # Without tensor cores 64 columns take too many registers; and from 64 on Triton 3.7
    # computes in tf32 on a B200, whatever it is told.
    most = 64 if tf32 and not held else 32
    constants = {
        "H": size,
        "CELL": cell,
        "G": gates * size,
        "R": 2 if cell == "lstm" else 1,
        "BLOCK": min(block, most),
        "UNITS": padded if held else 64,
        "TILE": 32,
        "PRECISION": "tf32" if tf32 else "ieee",
    }
    return Plan(held, constants, {"num_warps": 8, "num_stages": 1 if held else 3})


@cache
def _resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the bytes of shared memory that a program may have."""
    if device.type != "cuda":  # Triton's interpreter
        return 1, 2**16
    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return found["multiprocessor_count"], found["max_shared_mem"]


def forward(cell: str, *arrays: Tensor) -> None:
    """In place: gates, w_h, b_n, state, starts, y, kept, last of `kernels.forward`.

    w_h [N, G, H] comes as it is, starts as [T, B] for all networks, or [N, T, B].
    """
    gates, w_h, b_n, state, starts, y, kept, last = arrays
    arrays = gates, w_h, b_n, state, starts.view(torch.uint8), y, kept, last
    _launch(_forward_held, _forward_tiled, cell, y, starts, arrays)


def backward(cell: str, *arrays: Tensor) -> None:
    """In place: gates, w_h, state, starts, y, kept, d_y, d_state, d_gates, d_h."""
    gates, w_h, state, starts, *rest = arrays
    w_t = w_h.transpose(1, 2).contiguous()  # [N, H, G]
    arrays = gates, w_t, state, starts.view(torch.uint8), *rest
    _launch(_backward_held, _backward_tiled, cell, rest[0], starts, arrays)


def _launch(
    held: Any,
    tiled: Any,
    cell: str,
    y: Tensor,
    starts: Tensor,
    arrays: tuple[Tensor, ...],
) -> None:
    count, steps, columns, size = y.shape
    assert steps > 0
    way = plan(cell, size, count * columns, *_resources(y.device))
    apart = 0 if starts.dim() == 2 else steps * columns  # those of one network
    grid = triton.cdiv(columns, way.constants["BLOCK"]), count
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]  # Triton's device
        (held if way.held else tiled)[grid](
            *arrays, steps, columns, apart, **way.constants, **way.options
        )


# --------------------------------------------------------------------------- autograd


class Recurrence(torch.autograd.Function):
    """What is behind the products with the inputs, of N networks that come stacked:
    y [N, T, B, H] and last [N, R, B, H], from gates [N, T, B, G], state [N, R, B, H],
    w_h [N, G, H], b_n [N, H] (a GRU's bias behind its reset gate) and starts [N, T, B].
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        starts: Tensor,
        gates: Tensor,
        state: Tensor,
        w_h: Tensor,
        b_n: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gates = gates.clone(memory_format=torch.contiguous_format)
        starts, state, w_h, b_n = (t.contiguous() for t in (starts, state, w_h, b_n))
        y = gates.new_empty(*gates.shape[:3], w_h.shape[2])
        kept = y.new_empty(0) if cell == "rnn" else torch.empty_like(y)
        last = torch.empty_like(state)
        forward(cell, gates, w_h, b_n, state, starts, y, kept, last)
        ctx.cell = cell
        ctx.save_for_backward(gates, w_h, state, starts, y, kept)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_last: Tensor) -> Any:
        gates, w_h, state, starts, y, kept = ctx.saved_tensors
        d_gates = torch.empty_like(gates)
        d_h = torch.empty_like(gates) if ctx.cell == "gru" else d_gates
        d_state = d_last.clone(memory_format=torch.contiguous_format)
        saved = gates, w_h, state, starts, y, kept
        backward(ctx.cell, *saved, d_y.contiguous(), d_state, d_gates, d_h)
        before = torch.cat((state[:, :1], y[:, :-1]), 1)  # h before each step
        before.masked_fill_(starts[..., None], 0.0)
        d_w_h = d_h.flatten(1, 2).mT @ before.flatten(1, 2)
        d_b_n = d_h[..., -y.shape[3] :].sum((1, 2)) if ctx.cell == "gru" else None
        return None, None, d_gates, d_state, d_w_h, d_b_n


class Layer(torch.autograd.Function):
    """One layer of N networks: y and kept [N, T, B, H], last [N, R, B, H].

    Tensors come as N times x [T, B, D], N times state [R, B, H], and so on for w_x,
    w_h, b_x and b_h. The products outside the recurrence are torch's.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: str, starts: Tensor | None, *tensors: Tensor
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
            rows = xs[n].flatten(0, 1)
            torch.addmm(bias, rows, w_xs[n].T, out=gates[n].flatten(0, 1))
        state, w_h, b_n = _stack(states), _stack(w_hs), w_hs[0]
        if cell == "gru":
            b_n = _stack(tuple(b_h[2 * size :] for b_h in b_hs))
        if starts is None:
            starts = torch.zeros_like(gates[0, ..., 0], dtype=torch.bool)
        starts = starts.contiguous()
        y = gates.new_empty(count, steps, columns, size)
        kept = y.new_empty(0) if cell == "rnn" else torch.empty_like(y)
        last = torch.empty_like(state)
        forward(cell, gates, w_h, b_n, state, starts, y, kept, last)
        ctx.cell = cell
        ctx.save_for_backward(gates, w_h, state, starts, y, kept, *xs, *w_xs)
        ctx.mark_non_differentiable(kept)
        return y, kept, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, _: Tensor, d_last: Tensor) -> Any:
        gates, w_h, state, starts, y, kept, *rest = ctx.saved_tensors
        cell, count = ctx.cell, len(y)
        xs, w_xs = rest[:count], rest[count:]
        d_gates = torch.empty_like(gates)
        d_h = torch.empty_like(gates) if cell == "gru" else d_gates
        d_state = d_last.clone(memory_format=torch.contiguous_format)
        saved = gates, w_h, state, starts, y, kept
        backward(cell, *saved, d_y.contiguous(), d_state, d_gates, d_h)
        before = torch.cat((state[:, :1], y[:, :-1]), 1)  # h before each step
        before.masked_fill_(starts[..., None], 0.0)
        d_gates, d_h, before = (x.flatten(1, 2) for x in (d_gates, d_h, before))
        d_xs: list[Tensor | None] = [None] * count
        for n in range(count):
            if ctx.needs_input_grad[2 + n]:
                d_xs[n] = (d_gates[n] @ w_xs[n]).view_as(xs[n])
        d_w_xs = [g.T @ x.flatten(0, 1) for g, x in zip(d_gates, xs, strict=True)]
        d_w_h = d_h.transpose(1, 2) @ before
        d_b_xs = d_gates.sum(1)
        # not the same memory, in which clipping would scale it twice
        d_b_hs = d_h.sum(1) if cell == "gru" else d_b_xs.clone()
        return None, None, *d_xs, *d_state, *d_w_xs, *d_w_h, *d_b_xs, *d_b_hs


def _by_kind(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Six kinds of them, each as many times as there are networks."""
    count = len(tensors) // 6
    return (tensors[count * i : count * (i + 1)] for i in range(6))


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    """Contiguous; of one alone without a copy, where that is possible."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None].contiguous()
