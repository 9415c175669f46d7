"""The recurrence on a CPU, compiled: lstm, gru and rnn with restarts inside.

Shapes: N networks of one size, T time steps, B columns, H units, G gates (an LSTM has
four blocks of H, a GRU three, an RNN one); R state rows (an LSTM has two, h and c).

What takes the time is `h @ w_h.T`, a matrix by a few columns, once per time step.
BLAS is made for larger products: at two columns it runs at a fifth of what the core can
do. Here the weights are packed into panels, once for all T steps, and the inner loop
keeps a tile of the result in vector registers. It is written for LLVM (numba), which
compiles it for the processor at hand on first use, in about a second, and keeps the
result for the next process. `Recurrent.reference` says what it computes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, no_type_check

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

Array = NDArray[Any]


def _registers() -> tuple[int, int]:
    """Bytes of a vector register, and vectors per row of a tile, on this processor."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 4
    if features.get("avx"):
        return 32, 2
    return 16, 4


BYTES, VECTORS = _registers()

# Sums may be contracted into fused multiply-adds. Not `fastmath=True`, which would let
# the compiler assume that nothing is NaN: a diverged network has to show.
_jit = njit(
    nogil=True,
    cache=True,
    error_model="numpy",
    fastmath={"contract", "arcp", "nsz"},
)


def panel_width(dtype: np.dtype[Any]) -> int:
    """Outputs per panel of packed weights."""
    return BYTES * VECTORS // dtype.itemsize


# ------------------------------------------------------------------- tile of a product


@no_type_check
def _tile(columns: int) -> Any:
    """y[c, :panel] = sum over k of x[c, k] · w[k, :panel], for a few columns c.

    All in registers but for one row of w and one x per column. Arguments: each array
    with the offset of its first element; the strides of c in y, of c and k in x.
    """
    # one column has too few independent sums to hide the latency: two chains of them
    chains = 2 if columns == 1 else 1

    @intrinsic
    def tile(
        context: Any,
        y: Any,
        y_at: Any,
        y_stride: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        k_stride: Any,
        w: Any,
        w_at: Any,
        size: Any,
    ) -> Any:
        n = types.intp
        signature = types.void(y, n, n, x, n, n, n, w, n, n)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            y, y_at, y_stride, x, x_at, x_stride, k_stride, w, w_at, size = args
            number = context.get_data_type(signature.args[0].dtype)
            lanes = BYTES * 8 // (32 if number == ir.FloatType() else 64)
            vector = ir.VectorType(number, lanes)
            index, lane = ir.IntType(64), ir.IntType(32)
            undefined = ir.Constant(vector, ir.Undefined)

            def start(i: int, array: Any, at: Any) -> Any:
                data = context.make_array(signature.args[i])(context, b, array).data
                return b.gep(data, [at])

            def as_vector(pointer: Any) -> Any:
                return b.bitcast(pointer, ir.PointerType(vector))

            y, x, w = start(0, y, y_at), start(3, x, x_at), start(7, w, w_at)
            zero = ir.Constant(vector, [0.0] * lanes)
            sums = [
                [
                    [cgutils.alloca_once_value(b, zero) for _ in range(VECTORS)]
                    for _ in range(columns)
                ]
                for _ in range(chains)
            ]
            xs = [b.gep(x, [b.mul(x_stride, index(c))]) for c in range(columns)]

            def add(k: Any, chain: int) -> None:
                row = b.gep(w, [b.mul(k, index(lanes * VECTORS))])
                weights = []
                for v in range(VECTORS):
                    weight = b.load(as_vector(b.gep(row, [index(lanes * v)])))
                    weight.align = 4  # numpy promises no more
                    weights.append(weight)
                for c in range(columns):
                    value = b.load(b.gep(xs[c], [b.mul(k, k_stride)]))
                    value = b.insert_element(undefined, value, lane(0))
                    everywhere = ir.Constant(ir.VectorType(lane, lanes), [0] * lanes)
                    value = b.shuffle_vector(value, undefined, everywhere)
                    for v in range(VECTORS):
                        total = sums[chain][c][v]
                        term = b.fmul(value, weights[v], flags=("contract",))
                        term = b.fadd(term, b.load(total), flags=("contract",))
                        b.store(term, total)

            even = b.sub(size, b.srem(size, index(2)))
            with cgutils.for_range_slice(b, index(0), even, index(2)) as (k, _):
                add(k, 0)
                add(b.add(k, index(1)), chains - 1)
            with cgutils.for_range_slice(b, even, size, index(1)) as (k, _):
                add(k, 0)
            for c in range(columns):
                row = b.gep(y, [b.mul(y_stride, index(c))])
                for v in range(VECTORS):
                    total = b.load(sums[0][c][v])
                    for chain in range(1, chains):
                        total = b.fadd(total, b.load(sums[chain][c][v]))
                    out = b.store(total, as_vector(b.gep(row, [index(lanes * v)])))
                    out.align = 4
            return context.get_dummy_value()

        return signature, generate

    return tile


_tile_1, _tile_2, _tile_4 = _tile(1), _tile(2), _tile(4)


@_jit
@no_type_check
def _product(y, x, x_at, columns, size, w, n):
    """y[:columns] = x[columns, size] @ w[n], with w in panels [N, P, size, panel]."""
    panels, width = w.shape[1], w.shape[3]
    stride = panels * width
    for p in range(panels):
        at = (n * panels + p) * size * width
        _columns(y, p * width, stride, x, x_at, size, 1, columns, w, at, size)


@_jit
@no_type_check
def _columns(y, y_at, y_stride, x, x_at, x_stride, k_stride, columns, w, w_at, size):
    """`_tile` for any number of columns."""
    c = 0
    while c + 4 <= columns:
        a, b = y_at + c * y_stride, x_at + c * x_stride
        _tile_4(y, a, y_stride, x, b, x_stride, k_stride, w, w_at, size)
        c += 4
    if c + 2 <= columns:
        a, b = y_at + c * y_stride, x_at + c * x_stride
        _tile_2(y, a, y_stride, x, b, x_stride, k_stride, w, w_at, size)
        c += 2
    if c < columns:
        a, b = y_at + c * y_stride, x_at + c * x_stride
        _tile_1(y, a, y_stride, x, b, x_stride, k_stride, w, w_at, size)


@_jit
@no_type_check
def _pack(w, packed, transposed):
    """w [N, rows, columns] into panels of columns, or of rows if `transposed`."""
    rows, columns = w.shape[1], w.shape[2]
    width = packed.shape[3]
    for n in range(len(w)):
        for p in range(packed.shape[1]):
            begin = p * width
            if transposed:
                for j in range(min(width, rows - begin)):
                    for k in range(columns):
                        packed[n, p, k, j] = w[n, begin + j, k]
            else:
                for k in range(rows):
                    for j in range(min(width, columns - begin)):
                        packed[n, p, k, j] = w[n, k, begin + j]


def pack(w: Array, transposed: bool) -> Array:
    """`w` [N, G, H] for `forward` if `transposed`, else for `backward`."""
    count, rows, columns = w.shape
    outputs, inputs = (rows, columns) if transposed else (columns, rows)
    width = panel_width(w.dtype)
    panels = -(-outputs // width)
    make = np.empty if outputs % width == 0 else np.zeros
    packed = make((count, panels, inputs, width), w.dtype)
    _pack(w, packed, transposed)
    return packed


# ------------------------------------------------------------------------ activations

# tanh(x) = x·P(x²)/Q(x²) for |x| < 9, beyond which it is 1 in float32. Fitted to the
# least largest relative error, 2e-8; in float32 the result is right to 4e-7. A loop of
# it becomes vector code, which a call of libm would not.


@no_type_check
def _tanh(x):
    return np.tanh(x)


@no_type_check
@overload(_tanh)
def _tanh_overload(x):
    if x != types.float32:
        return lambda x: np.tanh(x)
    one, end = np.float32(1), np.float32(9)
    p1, p2, p3, p4 = np.array(
        [1.338102651e-1, 3.495589173e-3, 2.060909926e-5, 1.335468374e-8], np.float32
    )
    q1, q2, q3, q4 = np.array(
        [4.67143421e-1, 2.587698617e-2, 3.285636522e-4, 7.776567699e-7], np.float32
    )

    def rational(x):
        # comparisons that leave NaN as it is
        x = end if x > end else x
        x = -end if x < -end else x
        s = x * x
        p = (((p4 * s + p3) * s + p2) * s + p1) * s + one
        q = (((q4 * s + q3) * s + q2) * s + q1) * s + one
        y = x * p / q
        y = one if y > one else y
        return -one if y < -one else y

    return rational


_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)


@_jit
@no_type_check
def _sigmoid(x):
    return _tanh(x * _HALF) * _HALF + _HALF


# --------------------------------------------------------------------------- the cells
# Each works on networks n and columns begin..end alone, so that threads can share the
# work. `gates` [N, T, B, G] comes in as the products with the inputs, biases included,
# and leaves as what the backward pass needs of them: their activations.


@_jit
@no_type_check
def _reset(h, starts, t, n, begin, end):
    """h [R, end - begin, H] is zero where a sequence starts at step t."""
    for b in range(begin, end):
        if starts[n % starts.shape[0], t, b]:
            h[:, b - begin] = _ZERO


@_jit
@no_type_check
def _through(d_hidden, a, d_gates, w, starts, t, n, begin):
    """Adds to d_hidden [width, H] what comes through the gates of step t, and cuts it
    where a sequence starts: then it is of h before that step. `a` is for the product.
    """
    _, steps, columns, size = d_gates.shape
    width = len(d_hidden)
    at = ((n * steps + t) * columns + begin) * size
    _product(a, d_gates, at, width, size, w, n)
    for b in range(width):
        on = _ZERO if starts[n % starts.shape[0], t, begin + b] else _ONE
        d, s = d_hidden[b], a[b]
        for j in range(len(d)):
            d[j] = (d[j] + s[j]) * on


@_jit
@no_type_check
def _lstm_forward(n, begin, end, gates, w, b_n, state, starts, y, kept, last):
    """Hochreiter & Schmidhuber 1997, forget gates of Gers et al. 2000; kept: c."""
    steps, size = gates.shape[1], y.shape[3]
    width = end - begin
    h = state[n, :, begin:end].copy()  # [2, width, H]
    a = np.empty((width, w.shape[1] * w.shape[3]), gates.dtype)
    for t in range(steps):
        _reset(h, starts, t, n, begin, end)
        _product(a, h, 0, width, size, w, n)
        for b in range(width):
            g, s, out = gates[n, t, begin + b], a[b], y[n, t, begin + b]
            hidden, cell, keep = h[0, b], h[1, b], kept[n, t, begin + b]
            for j in range(2 * size):
                g[j] = _sigmoid(g[j] + s[j])
            g_u, s_u, g_o, s_o = (
                g[2 * size :],
                s[2 * size :],
                g[3 * size :],
                s[3 * size :],
            )
            for j in range(size):
                g_u[j] = _tanh(g_u[j] + s_u[j])
            for j in range(size):
                g_o[j] = _sigmoid(g_o[j] + s_o[j])
            # short loops, which the compiler can prove free of overlaps
            for j in range(size):
                cell[j] = g[size + j] * cell[j] + g[j] * g[2 * size + j]
            for j in range(size):
                hidden[j] = g[3 * size + j] * _tanh(cell[j])
            keep[:] = cell
            out[:] = hidden
    last[n, :, begin:end] = h


@_jit
@no_type_check
def _lstm_backward(
    n, begin, end, gates, w, b_n, state, starts, y, kept, d_y, d_state, d_gates, d_h
):
    steps, size = gates.shape[1], y.shape[3]
    width = end - begin
    d = d_state[n, :, begin:end].copy()  # of h and c after step t
    a = np.zeros((width, w.shape[1] * w.shape[3]), gates.dtype)
    for t in range(steps - 1, -1, -1):
        for b in range(width):
            g, dg, e = (
                gates[n, t, begin + b],
                d_gates[n, t, begin + b],
                d_y[n, t, begin + b],
            )
            d_hidden, d_cell, c = d[0, b], d[1, b], kept[n, t, begin + b]
            start = starts[n % starts.shape[0], t, begin + b]
            before = kept[n, t - 1, begin + b] if t > 0 else state[n, 1, begin + b]
            on = _ZERO if start else _ONE
            i, f, u, o = g, g[size:], g[2 * size :], g[3 * size :]
            d_i, d_f, d_u, d_o = dg, dg[size:], dg[2 * size :], dg[3 * size :]
            # short loops again
            for j in range(size):
                squashed, dh = _tanh(c[j]), d_hidden[j] + e[j]
                d_cell[j] += dh * o[j] * (_ONE - squashed * squashed)
                d_hidden[j] = dh * squashed
            for j in range(size):
                d_o[j] = d_hidden[j] * o[j] * (_ONE - o[j])
                d_hidden[j] = _ZERO
            for j in range(size):
                d_i[j] = d_cell[j] * u[j] * i[j] * (_ONE - i[j])
            for j in range(size):
                d_u[j] = d_cell[j] * i[j] * (_ONE - u[j] * u[j])
            for j in range(size):
                d_f[j] = d_cell[j] * on * before[j] * f[j] * (_ONE - f[j])
                d_cell[j] = d_cell[j] * f[j] * on
        _through(d[0], a, d_gates, w, starts, t, n, begin)
    d_state[n, :, begin:end] = d


@_jit
@no_type_check
def _gru_forward(n, begin, end, gates, w, b_n, state, starts, y, kept, last):
    """Cho et al. 2014, reset gate after the product as in cuDNN; kept: w_n h + b_n."""
    steps, size = gates.shape[1], y.shape[3]
    width = end - begin
    h = state[n, :, begin:end].copy()  # [1, width, H]
    a = np.empty((width, w.shape[1] * w.shape[3]), gates.dtype)
    bias = b_n[n]
    for t in range(steps):
        _reset(h, starts, t, n, begin, end)
        _product(a, h, 0, width, size, w, n)
        for b in range(width):
            g, s, out = gates[n, t, begin + b], a[b], y[n, t, begin + b]
            hidden, keep = h[0, b], kept[n, t, begin + b]
            for j in range(2 * size):
                g[j] = _sigmoid(g[j] + s[j])
            for j in range(size):
                keep[j] = s[2 * size + j] + bias[j]
                u = _tanh(g[2 * size + j] + g[j] * keep[j])
                g[2 * size + j] = u
                value = u + g[size + j] * (hidden[j] - u)
                hidden[j] = value
                out[j] = value
    last[n, :, begin:end] = h


@_jit
@no_type_check
def _gru_backward(
    n, begin, end, gates, w, b_n, state, starts, y, kept, d_y, d_state, d_gates, d_h
):
    """`d_h` differs from `d_gates` in the candidate: its product is behind a gate."""
    steps, size = gates.shape[1], y.shape[3]
    width = end - begin
    d = d_state[n, :, begin:end].copy()
    a = np.zeros((width, w.shape[1] * w.shape[3]), gates.dtype)
    for t in range(steps - 1, -1, -1):
        for b in range(width):
            g, dg, e = (
                gates[n, t, begin + b],
                d_gates[n, t, begin + b],
                d_y[n, t, begin + b],
            )
            da, d_hidden, keep = d_h[n, t, begin + b], d[0, b], kept[n, t, begin + b]
            start = starts[n % starts.shape[0], t, begin + b]
            before = y[n, t - 1, begin + b] if t > 0 else state[n, 0, begin + b]
            on = _ZERO if start else _ONE
            for j in range(size):
                r, z, u = g[j], g[size + j], g[2 * size + j]
                dh = d_hidden[j] + e[j]
                du = dh * (_ONE - z) * (_ONE - u * u)
                dr = du * keep[j] * r * (_ONE - r)
                dz = dh * (before[j] * on - u) * z * (_ONE - z)
                dg[j] = dr
                dg[size + j] = dz
                dg[2 * size + j] = du
                da[j] = dr
                da[size + j] = dz
                da[2 * size + j] = du * r
                d_hidden[j] = dh * z
        _through(d[0], a, d_h, w, starts, t, n, begin)
    d_state[n, :, begin:end] = d


@_jit
@no_type_check
def _rnn_forward(n, begin, end, gates, w, b_n, state, starts, y, kept, last):
    """Elman 1990, with tanh."""
    steps, size = gates.shape[1], y.shape[3]
    width = end - begin
    h = state[n, :, begin:end].copy()  # [1, width, H]
    a = np.empty((width, w.shape[1] * w.shape[3]), gates.dtype)
    for t in range(steps):
        _reset(h, starts, t, n, begin, end)
        _product(a, h, 0, width, size, w, n)
        for b in range(width):
            g, s, out = gates[n, t, begin + b], a[b], y[n, t, begin + b]
            hidden = h[0, b]
            for j in range(size):
                value = _tanh(g[j] + s[j])
                hidden[j] = value
                out[j] = value
    last[n, :, begin:end] = h


@_jit
@no_type_check
def _rnn_backward(
    n, begin, end, gates, w, b_n, state, starts, y, kept, d_y, d_state, d_gates, d_h
):
    steps, size = gates.shape[1], y.shape[3]
    width = end - begin
    d = d_state[n, :, begin:end].copy()
    a = np.zeros((width, w.shape[1] * w.shape[3]), gates.dtype)
    for t in range(steps - 1, -1, -1):
        for b in range(width):
            dg, e, out = (
                d_gates[n, t, begin + b],
                d_y[n, t, begin + b],
                y[n, t, begin + b],
            )
            d_hidden = d[0, b]
            for j in range(size):
                dg[j] = (d_hidden[j] + e[j]) * (_ONE - out[j] * out[j])
                d_hidden[j] = _ZERO
        _through(d[0], a, d_gates, w, starts, t, n, begin)
    d_state[n, :, begin:end] = d


_FORWARD = {"lstm": _lstm_forward, "gru": _gru_forward, "rnn": _rnn_forward}
_BACKWARD = {"lstm": _lstm_backward, "gru": _gru_backward, "rnn": _rnn_backward}


def forward(
    cell: str,
    gates: Array,
    packed: Array,
    b_n: Array,
    state: Array,
    starts: Array,
    y: Array,
    kept: Array,
    last: Array,
    threads: int,
) -> None:
    """The recurrence, in place; contiguous arrays of one dtype, `starts` of bool.

    | array    | shape        |                                                        |
    |----------|--------------|--------------------------------------------------------|
    | `gates`  | [N, T, B, G] | products with the inputs and biases → activations      |
    | `packed` |              | w_h, see `pack`                                        |
    | `b_n`    | [N, H]       | a GRU's bias behind its reset gate, else [N, 0]        |
    | `state`  | [N, R, B, H] | before the first step                                  |
    | `starts` | [1 or N, T, B] | where a sequence begins                              |
    | `y`      | [N, T, B, H] | → outputs                                              |
    | `kept`   | [N, T, B, H] | → an LSTM's cell, a GRU's product behind the gate      |
    | `last`   | [N, R, B, H] | → the state after the last step                        |
    """
    arrays = gates, packed, b_n, state, starts, y, kept, last
    _share(_FORWARD[cell], len(gates), gates.shape[2], threads, arrays)


def backward(
    cell: str,
    gates: Array,
    packed: Array,
    b_n: Array,
    state: Array,
    starts: Array,
    y: Array,
    kept: Array,
    d_y: Array,
    d_state: Array,
    d_gates: Array,
    d_h: Array,
    threads: int,
) -> None:
    """The gradients, from what `forward` left.

    `d_state` [N, R, B, H] is that of the state after the last step, and leaves as that
    of the state before the first. `d_gates` [N, T, B, G] is written, and so is `d_h`,
    the gradient of the products with h: another array for a GRU, else the same one.
    """
    arrays = gates, packed, b_n, state, starts, y, kept, d_y, d_state, d_gates, d_h
    _share(_BACKWARD[cell], len(gates), gates.shape[2], threads, arrays)


DEPTH = 512  # rows of a product's long side that stay in the cache together


@_jit
@no_type_check
def _quads(a, n, at, depth, begin, end, x):
    """Four columns of a[n, at : at + depth, begin:end] side by side in x [Q, K, 4]:
    read across, a column is a cache line per number."""
    for first in range(0, depth, 16):  # rows whose lines stay while columns pass
        last = min(depth, first + 16)
        for q in range(len(x)):
            j = begin + 4 * q
            for k in range(first, last):
                row = a[n, at + k]
                if j + 4 <= end:
                    for c in range(4):
                        x[q, k, c] = row[j + c]
                else:
                    for c in range(end - j):
                        x[q, k, c] = row[j + c]


@_jit
@no_type_check
def _outer(n, begin, end, a, packed, out):
    steps, size = a.shape[1], out.shape[2]
    panels, width = packed.shape[1], packed.shape[3]
    deepest = min(DEPTH, steps)
    x = np.empty((-(-(end - begin) // 4), deepest, 4), a.dtype)
    x[-1] = _ZERO  # where the columns run out
    part = np.empty((4, width), a.dtype)
    for k in range(0, steps, DEPTH):
        depth = min(DEPTH, steps - k)
        _quads(a, n, k, depth, begin, end, x)
        for p in range(panels):
            at = ((n * panels + p) * steps + k) * width
            last = min(width, size - p * width)
            for q in range(len(x)):
                _tile_4(part, 0, width, x, q * deepest * 4, 1, 4, packed, at, depth)
                i = begin + 4 * q
                for c in range(min(4, end - i)):
                    row, sums = out[n, i + c, p * width :], part[c]
                    if k == 0:
                        for j in range(last):
                            row[j] = sums[j]
                    else:
                        for j in range(last):
                            row[j] += sums[j]


def outer(a: Array, b: Array, out: Array, threads: int) -> None:
    """out [N, G, H] = the sum over i of a[n, i, :, None] * b[n, i, None, :]."""
    packed = pack(b, transposed=False)
    _share(_outer, len(a), a.shape[2], threads, (a, packed, out))


@_jit
@no_type_check
def _few(a, b, out):
    for i in range(len(a)):
        row = b[i]
        for g in range(a.shape[1]):
            value, sums = a[i, g], out[g]
            for j in range(len(row)):
                sums[j] += value * row[j]


def few(a: Array, b: Array) -> Array:
    """a.T @ b for an `a` [M, G] that is too narrow for panels."""
    out = np.zeros((a.shape[1], b.shape[1]), a.dtype)
    _few(a, b, out)
    return out


@_jit
@no_type_check
def _linear(x, packed, bias, y, squash):
    rows, outputs = y.shape
    size, some = x.shape[1], min(rows, 64)  # a few rows at a time stay in the cache
    a = np.empty((some, packed.shape[1] * packed.shape[3]), y.dtype)
    for begin in range(0, rows, some):
        count = min(some, rows - begin)
        _product(a, x, begin * size, count, size, packed, 0)
        for b in range(count):
            out, s = y[begin + b], a[b]
            if squash == 1:
                for j in range(outputs):
                    out[j] = _tanh(s[j] + bias[j])
            elif squash == 2:
                for j in range(outputs):
                    value = s[j] + bias[j]
                    out[j] = _ZERO if value < _ZERO else value
            elif squash == 0:
                for j in range(outputs):
                    out[j] = s[j] + bias[j]
            else:
                for j in range(outputs):
                    out[j] = s[j]


SQUASH = {"": 0, "tanh": 1, "relu": 2}


def linear(x: Array, packed: Array, bias: Array, squash: str = "") -> Array:
    """squash(x @ w + bias) for x [M, K] and w packed."""
    y = np.empty((len(x), len(bias)), x.dtype)
    _linear(x, packed, bias, y, SQUASH[squash])
    return y


def product(x: Array, packed: Array, outputs: int) -> Array:
    """x @ w for x [M, K] and w [K, outputs] packed."""
    y = np.empty((len(x), outputs), x.dtype)
    _linear(x, packed, y[0], y, -1)
    return y


@_jit
@no_type_check
def _unsquash(d_y, y, d_z, squash):
    for i in range(len(y)):
        d, out, z = d_y[i], y[i], d_z[i]
        if squash == 1:
            for j in range(len(out)):
                z[j] = d[j] * (_ONE - out[j] * out[j])
        else:
            for j in range(len(out)):
                z[j] = d[j] if out[j] > _ZERO else _ZERO


def unsquash(d_y: Array, y: Array, squash: str) -> Array:
    """The gradient before the squashing, from that of its result `y` [M, O]."""
    if not squash:
        return d_y
    d_z = np.empty_like(y)
    _unsquash(d_y, y, d_z, SQUASH[squash])
    return d_z


def _share(
    function: Callable[..., None],
    count: int,
    size: int,
    threads: int,
    arrays: tuple[Array, ...],
) -> None:
    """Networks, and parts of their 0..size where they are too few, over the threads."""
    if threads == 1:
        for n in range(count):
            function(n, 0, size, *arrays)
        return
    # a part of fewer than eight would read the weights for too little
    parts = max(min(-(-threads // count), size // 8), 1)
    jobs = [
        (n, size * i // parts, size * (i + 1) // parts)
        for n in range(count)
        for i in range(parts)
    ]

    def work(share: list[tuple[int, int, int]]) -> None:
        for job in share:
            function(*job, *arrays)

    shares = [jobs[i::threads] for i in range(min(threads, len(jobs)))]
    futures = [pool(threads).submit(work, share) for share in shares[1:]]
    work(shares[0])
    for future in futures:
        future.result()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """The threads beside the calling one."""
    return ThreadPoolExecutor(threads - 1, "recurrent")
