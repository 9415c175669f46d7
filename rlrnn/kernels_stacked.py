"""A whole window of a small model on a CPU, compiled: forward, loss, back, update.

For each of N models in turn, with no operation of torch or numpy between, so that its
weights stay in the cache: embedding or dense layer, recurrent layers, head, loss, the
way back, clip and optimiser. The products and the recurrence are those of
`rlrnn.kernels`. `rlrnn.stacked` says what it computes, and has the plain way beside it.

Shapes as there; I = K·B positions of a window, G gates, R state rows of a layer.

What a symbol brings to the gates of the first layer is computed once for each symbol
that occurs in a window, however often it does: w_x is multiplied with the embeddings of
U ≤ min(V, I) symbols instead of with I rows; back, the gradients of its gates are
added up first.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from numba import njit, types
from numba.extending import overload

from rlrnn.kernels import (
    Array,
    _few,
    _gru_backward,
    _gru_forward,
    _jit,
    _linear,
    _lstm_backward,
    _lstm_forward,
    _outer,
    _pack,
    _rnn_backward,
    _rnn_forward,
)

CELLS = ("lstm", "gru", "rnn")
# The losses that are compiled in; others are taken between two stages.
LOSSES = ("classes", "labels", "mse", "mae")
FORWARD, LOSS, BACKWARD = 1, 2, 4  # stages, to be added up; the last with the update

# Beside what `_jit` allows, sums in any order: a reduction becomes vector code.
_jit_sum = njit(
    nogil=True,
    cache=True,
    error_model="numpy",
    fastmath={"contract", "arcp", "nsz", "reassoc"},
)


class Sizes(NamedTuple):
    """`symbols` is 0 for features, `dense` for no dense layer; `panel` as in
    `panel_width`; `cut`: the step at which a watched window is cut, else 0."""

    cell: int
    layers: int
    symbols: int
    dense: int
    width: int
    hidden: int
    outputs: int
    loss: int
    panel: int
    cut: int


class Data(NamedTuple):
    """[N, ...] each; of `symbols` and `features`, and of `classes` and `values`, one is
    empty, and so is a `mask` of ones."""

    symbols: Array  # [N, I] int64
    features: Array  # [N, I, D]
    classes: Array  # [N, I] int64
    values: Array  # [N, I, C]
    starts: Array  # [N, K, B] bool
    mask: Array  # [N, I] bool
    scale: Array  # [N] float64
    state: Array  # [N, S, B, H]


class Learning(NamedTuple):
    """[M, P] or [M], but for `rows` [N]: the row of each model of the window; `active`,
    `lr` and `clip` [N]."""

    rows: Array
    active: Array
    lr: Array
    clip: Array
    weights: Array
    grads: Array
    first: Array
    second: Array
    updates: Array
    adaptive: Array
    keeps: Array
    takes: Array
    coupled: Array
    decoupled: Array


class Results(NamedTuple):
    """[N] each, float64, and the state after [N, S, B, H]."""

    loss: Array
    norm: Array
    far: Array
    near: Array
    after: Array


class Work(NamedTuple):
    """What one thread needs for one model at a time."""

    offsets: Array  # of the parameters in a row of weights
    slots: Array  # [I] int64: which of the window's symbols is at a position
    place: Array  # [V] int64: which of the window's symbols this one is
    seen: Array  # [U] int64: the window's symbols
    rows: Array  # [I or U, D] what enters the first layer
    d_rows: Array  # [I or U, D]
    table: Array  # [U, G]
    gates: Array  # [L, K, B, G]
    y: Array  # [L, K, B, H]
    kept: Array  # [L, K, B, H]
    out: Array  # [I, C]; then its gradient
    d_y: Array  # [I, H]
    d_gates: Array  # [K, B, G]
    d_h: Array  # [K, B, G] for a gru
    before: Array  # [I, H]
    d_state: Array  # [R, B, H]
    middle: Array  # [R, B, H]
    bias: Array  # [G]
    packed: Array  # weights in panels


def work(sizes: Sizes, shapes: list[tuple[int, ...]], data: Data) -> Work:
    """Memory for windows of this form; what is in it means nothing."""
    _, steps, columns = data.starts.shape
    dtype = data.state.dtype
    cell, hidden, layers = CELLS[sizes.cell], sizes.hidden, sizes.layers
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[cell] * hidden
    state_rows = 2 if cell == "lstm" else 1
    positions = steps * columns
    first = min(positions, sizes.symbols) if sizes.symbols else positions
    recurrent = layers, steps, columns

    def empty(*shape: int) -> Array:
        return np.empty(shape, dtype)

    # Panels of what has `a` rows and `b` columns, either way round.
    matrices = [s for s in shapes if len(s) == 2]
    matrices += [(positions, max(hidden, sizes.width, sizes.dense))]
    room = max(max(_room(a, b, sizes), _room(b, a, sizes)) for a, b in matrices)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return Work(
        offsets=np.concatenate(([0], ends)).astype(np.int64),
        slots=np.empty(positions, np.int64),
        place=np.empty(max(sizes.symbols, 1), np.int64),
        seen=np.empty(max(sizes.symbols, 1), np.int64),
        rows=empty(first, sizes.width),
        d_rows=empty(first, sizes.width),
        table=empty(first if sizes.symbols else 0, gates),
        gates=empty(*recurrent, gates),
        y=empty(*recurrent, hidden),
        kept=empty(*recurrent, hidden),
        out=empty(positions, sizes.outputs),
        d_y=empty(positions, hidden),
        d_gates=empty(steps, columns, gates),
        d_h=empty(steps if cell == "gru" else 0, columns, gates),
        before=empty(positions, hidden),
        d_state=empty(state_rows, columns, hidden),
        middle=empty(state_rows, columns, hidden),
        bias=empty(gates),
        packed=empty(room),
    )


def _room(outputs: int, inputs: int, sizes: Sizes) -> int:
    return -(-outputs // sizes.panel) * sizes.panel * inputs


# ------------------------------------------------------------------------------ parts


@no_type_check
def _exp(x):
    return np.exp(x)


@no_type_check
@overload(_exp)
def _exp_overload(x):
    """e^x for x <= 0: x = n log 2 + r, and e^r by its series, right to 2e-7. Unlike
    libm's, a loop of it becomes vector code."""
    if x != types.float32:
        return lambda x: np.exp(x)
    low, log2e, half = np.float32(-87), np.float32(1.44269504), np.float32(0.5)
    high_part, low_part = np.float32(0.693359375), np.float32(-2.12194440e-4)
    c2, c3, c4, c5, c6, one = np.array(
        [1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1], np.float32
    )

    def series(x):
        x = low if x < low else x  # NaN stays
        n = np.floor(x * log2e + half)
        r = (x - n * high_part) - n * low_part
        p = ((((c6 * r + c5) * r + c4) * r + c3) * r + c2) * r * r + r + one
        n = n if n > -127 else np.float32(-127)
        return p * np.int32((np.int32(n) + 127) << 23).view(np.float32)

    return series


@_jit
@no_type_check
def _packed(work, w, transposed, panel):
    """`w` [rows, columns] in panels, [1, P, inputs, panel]."""
    rows, columns = w.shape
    outputs, inputs = (rows, columns) if transposed else (columns, rows)
    panels = (outputs + panel - 1) // panel
    packed = work.packed[: panels * inputs * panel].reshape(1, panels, inputs, panel)
    if outputs % panel:
        packed[0, panels - 1] = 0
    _pack(w.reshape(1, rows, columns), packed, transposed)
    return packed


@_jit
@no_type_check
def _add_up(a, out):
    """out [G] = the sum over i of a [I, G]."""
    out[:] = 0
    for i in range(len(a)):
        row = a[i]
        for j in range(len(out)):
            out[j] += row[j]


@_jit
@no_type_check
def _gradient(a, b, out, work, panel):
    """out [G, D] = a.T @ b for a [I, G] and b [I, D]."""
    if b.shape[1] < 16:
        turned = np.zeros((b.shape[1], a.shape[1]), a.dtype)
        _few(b, a, turned)
        for i in range(len(out)):
            for j in range(b.shape[1]):
                out[i, j] = turned[j, i]
    elif a.shape[1] < 16:
        out[:] = 0
        _few(a, b, out)
    else:
        packed = _packed(work, b, False, panel)
        rows, size = a.shape
        at = a.reshape(1, rows, size)
        _outer(0, 0, size, at, packed, out.reshape(1, size, b.shape[1]))


@_jit_sum
@no_type_check
def _square(a):
    """The sum of squares, in float64 from block to block."""
    total = 0.0
    for begin in range(0, len(a), 1024):
        block = a[begin : begin + 1024]
        part = block.dtype.type(0)
        for value in block:
            part += value * value
        total += part
    return total


@_jit
@no_type_check
def _highest(row):
    """max(row), sixteen at a time, so that it becomes vector code."""
    best = np.empty(16, row.dtype)
    best[:] = row[0]
    whole = len(row) // 16 * 16
    for begin in range(0, whole, 16):
        part = row[begin : begin + 16]
        for j in range(16):
            best[j] = part[j] if part[j] > best[j] else best[j]
    top = best[0]
    for j in range(1, 16):
        top = best[j] if best[j] > top else top
    for j in range(whole, len(row)):
        top = row[j] if row[j] > top else top
    return top


@_jit_sum
@no_type_check
def _exponentials(row, top):
    """row ← exp(row - top), and the sum of it."""
    for j in range(len(row)):
        row[j] = _exp(row[j] - top)
    total = row.dtype.type(0)
    for j in range(len(row)):
        total += row[j]
    return total


# ------------------------------------------------------------------------------ stages


@_jit
@no_type_check
def _matrix(row, work, i, columns):
    """Parameter i as [..., columns]."""
    begin, end = work.offsets[i], work.offsets[i + 1]
    return row[begin:end].reshape((end - begin) // columns, columns)


@_jit
@no_type_check
def _vector(row, work, i):
    return row[work.offsets[i] : work.offsets[i + 1]]


@_jit
@no_type_check
def _encoders(sizes):
    """How many parameters come before the layers'."""
    return 1 if sizes.symbols else 2 if sizes.dense else 0


@_jit
@no_type_check
def _list_symbols(symbols, work):
    """Fills `seen` and `slots`; how many there are."""
    place, seen, slots = work.place, work.seen, work.slots
    place[:] = -1
    count = 0
    for i in range(len(symbols)):
        symbol = symbols[i]
        if place[symbol] < 0:
            place[symbol] = count
            seen[count] = symbol
            count += 1
        slots[i] = place[symbol]
    return count


@_jit
@no_type_check
def _forward(n, weights, sizes, data, after, work):
    """`gates`, `y`, `kept` and `out`; how many symbols there are."""
    _, steps, columns = data.starts.shape
    hidden, size, panel = sizes.hidden, work.gates.shape[3], sizes.panel
    state_rows = len(work.d_state)
    positions = steps * columns
    encoders, count = _encoders(sizes), 0
    rows = work.y[0].reshape(positions, hidden)  # of its type; replaced
    if sizes.symbols:
        count = _list_symbols(data.symbols[n], work)
        embedding = _matrix(weights, work, 0, sizes.width)
        for i in range(count):
            work.rows[i] = embedding[work.seen[i]]
        rows = work.rows[:count]
    elif sizes.dense:
        packed = _packed(work, _matrix(weights, work, 0, sizes.dense), True, panel)
        bias = _vector(weights, work, 1)
        _linear(data.features[n], packed, bias, work.rows, 2)
        rows = work.rows
    else:
        rows = data.features[n]
    for layer in range(sizes.layers):
        at = encoders + 4 * layer
        b_x, b_h = _vector(weights, work, at + 2), _vector(weights, work, at + 3)
        for j in range(size):
            work.bias[j] = b_x[j] + b_h[j]
        if sizes.cell == 1:  # the candidate's own bias is behind the reset gate
            work.bias[2 * hidden :] = b_x[2 * hidden :]
        gates = work.gates[layer]
        flat = gates.reshape(positions, size)
        packed = _packed(work, _matrix(weights, work, at, rows.shape[1]), True, panel)
        if sizes.symbols and layer == 0:
            _linear(rows, packed, work.bias, work.table[:count], 0)
            for i in range(positions):
                flat[i] = work.table[work.slots[i]]
        else:
            _linear(rows, packed, work.bias, flat, 0)
        packed = _packed(work, _matrix(weights, work, at + 1, hidden), True, panel)
        begin, end = state_rows * layer, state_rows * (layer + 1)
        kept = work.y[layer] if sizes.cell == 2 else work.kept[layer]
        sequence = 1, steps, columns, hidden
        state = 1, state_rows, columns, hidden
        a, b = gates.reshape(1, steps, columns, size), b_h[size - hidden :]
        b_n, before = b.reshape(1, hidden), data.state[n, begin:end].reshape(state)
        starts = data.starts[n : n + 1]
        y, kept_4 = work.y[layer].reshape(sequence), kept.reshape(sequence)
        last = after[n, begin:end].reshape(state)
        if sizes.cell == 0:
            _lstm_forward(
                0, 0, columns, a, packed, b_n, before, starts, y, kept_4, last
            )
        elif sizes.cell == 1:
            _gru_forward(0, 0, columns, a, packed, b_n, before, starts, y, kept_4, last)
        else:
            _rnn_forward(0, 0, columns, a, packed, b_n, before, starts, y, kept_4, last)
        rows = work.y[layer].reshape(positions, hidden)
    at = encoders + 4 * sizes.layers
    packed = _packed(work, _matrix(weights, work, at, hidden), True, panel)
    _linear(rows, packed, _vector(weights, work, at + 1), work.out, 0)
    return count


@_jit
@no_type_check
def _loss(n, sizes, data, work):
    """The loss; `out` becomes its gradient."""
    total, out = 0.0, work.out
    masked = data.mask.shape[1] > 0
    number = out.dtype.type
    share = number(1 / data.scale[n])
    for i in range(len(out)):
        row = out[i]
        if masked and not data.mask[n, i]:
            row[:] = 0
        elif sizes.loss == 0:
            label = data.classes[n, i]
            chosen, top = row[label], _highest(row)
            power = _exponentials(row, top)
            total += np.log(power) + top - chosen
            factor = share / power
            for j in range(len(row)):
                row[j] *= factor
            row[label] -= share
        elif sizes.loss == 1:
            y = data.values[n, i]
            for j in range(len(row)):
                power = np.exp(-abs(row[j]))
                positive = row[j] if row[j] > 0 else number(0)
                total += positive - row[j] * y[j] + np.log1p(power)
                value = number(1) / (number(1) + power)
                value = value if row[j] >= 0 else power * value
                row[j] = share * (value - y[j])
        else:
            y = data.values[n, i]
            there = 0
            for j in range(len(row)):
                there += 0 if np.isnan(y[j]) else 1
            each = number(1) / number(max(there, 1))
            for j in range(len(row)):
                error = number(0) if np.isnan(y[j]) else row[j] - y[j]
                if sizes.loss == 2:
                    total += each * error * error
                    row[j] = 2 * share * each * error
                else:
                    total += each * abs(error)
                    row[j] = share * each * np.sign(error)
    return total / data.scale[n]


@_jit
@no_type_check
def _layer_back(
    cell, gates, packed, b_n, state, starts, y, kept, d_y, d_state, d_gates, d_h
):
    """Of some steps: `gates`, `y`, ... [K, B, ...], `state` [R, B, H]."""
    steps, columns, size = gates.shape
    sequence, flow = (1, steps, columns, y.shape[2]), (1, steps, columns, size)
    a, da, dh = gates.reshape(flow), d_gates.reshape(flow), d_h.reshape(flow)
    out, keep, e = y.reshape(sequence), kept.reshape(sequence), d_y.reshape(sequence)
    shape = 1, len(state), columns, y.shape[2]
    s, ds = state.reshape(shape), d_state.reshape(shape)
    on, w = starts.reshape(1, steps, columns), packed
    if cell == 0:
        _lstm_backward(0, 0, columns, a, w, b_n, s, on, out, keep, e, ds, da, dh)
    elif cell == 1:
        _gru_backward(0, 0, columns, a, w, b_n, s, on, out, keep, e, ds, da, dh)
    else:
        _rnn_backward(0, 0, columns, a, w, b_n, s, on, out, keep, e, ds, da, dh)


@_jit
@no_type_check
def _backward(n, weights, grad, count, sizes, data, work):
    """Fills `grad` [P] from the gradient in `out`; the norms of the gradients of the
    states before the window, and before step `cut`."""
    _, steps, columns = data.starts.shape
    hidden, size, panel = sizes.hidden, work.gates.shape[3], sizes.panel
    state_rows, positions = len(work.d_state), steps * columns
    encoders, cut, starts = _encoders(sizes), sizes.cut, data.starts[n]
    far = near = 0.0
    at = encoders + 4 * sizes.layers
    head = _matrix(weights, work, at, hidden)
    above = work.y[sizes.layers - 1].reshape(positions, hidden)
    _gradient(work.out, above, _matrix(grad, work, at, hidden), work, panel)
    _add_up(work.out, _vector(grad, work, at + 1))
    _linear(work.out, _packed(work, head, False, panel), work.bias, work.d_y, -1)
    for layer in range(sizes.layers - 1, -1, -1):
        at = encoders + 4 * layer
        begin, end = state_rows * layer, state_rows * (layer + 1)
        state = data.state[n, begin:end]
        gates, y = work.gates[layer], work.y[layer]
        kept = y if sizes.cell == 2 else work.kept[layer]
        d_gates = work.d_gates
        d_h = work.d_h if sizes.cell == 1 else d_gates
        d_y, d_state = work.d_y.reshape(steps, columns, hidden), work.d_state
        b_h = _vector(weights, work, at + 3)
        b_n = b_h[size - hidden :].reshape(1, hidden)
        packed = _packed(work, _matrix(weights, work, at + 1, hidden), False, panel)
        d_state[:] = 0
        if cut:
            work.middle[0] = y[cut - 1]
            if sizes.cell == 0:
                work.middle[1] = kept[cut - 1]
            _layer_back(
                sizes.cell, gates[cut:], packed, b_n, work.middle, starts[cut:],
                y[cut:], kept[cut:], d_y[cut:], d_state, d_gates[cut:], d_h[cut:],
            )  # fmt: skip
            near += _square(d_state.reshape(d_state.size))
        stop = cut if cut else steps
        _layer_back(
            sizes.cell, gates[:stop], packed, b_n, state, starts[:stop],
            y[:stop], kept[:stop], d_y[:stop], d_state, d_gates[:stop], d_h[:stop],
        )  # fmt: skip
        far += _square(d_state.reshape(d_state.size))
        for t in range(steps):
            for b in range(columns):
                row = work.before[t * columns + b]
                if starts[t, b]:
                    row[:] = 0
                else:
                    row[:] = y[t - 1, b] if t else state[0, b]
        flat, flat_h = d_gates.reshape(positions, size), d_h.reshape(-1, size)
        _gradient(flat_h, work.before, _matrix(grad, work, at + 1, hidden), work, panel)
        d_table, rows, d_rows = flat, work.rows, work.d_y
        if layer:
            rows = work.y[layer - 1].reshape(positions, hidden)
        elif sizes.symbols:
            d_table, rows = work.table[:count], work.rows[:count]
            d_rows = work.d_rows[:count]
            d_table[:] = 0
            for i in range(positions):
                row, total = flat[i], d_table[work.slots[i]]
                for j in range(size):
                    total[j] += row[j]
        elif sizes.dense:
            d_rows = work.d_rows
        else:
            rows = data.features[n]
        w_x = _matrix(weights, work, at, rows.shape[1])
        _gradient(d_table, rows, _matrix(grad, work, at, rows.shape[1]), work, panel)
        d_b = _vector(grad, work, at + 2)
        _add_up(d_table, d_b)
        if sizes.cell == 1:
            _add_up(flat_h, _vector(grad, work, at + 3))
        else:
            _vector(grad, work, at + 3)[:] = d_b
        if layer or encoders:
            w_packed = _packed(work, w_x, False, panel)
            _linear(d_table, w_packed, work.bias, d_rows, -1)
    if sizes.symbols:
        d_embedding = _matrix(grad, work, 0, sizes.width)
        d_embedding[:] = 0
        for i in range(count):
            d_embedding[work.seen[i]] = work.d_rows[i]
    elif sizes.dense:
        for i in range(positions):
            for j in range(sizes.width):
                if not work.rows[i, j] > 0:
                    work.d_rows[i, j] = 0
        d_dense = _matrix(grad, work, 0, sizes.dense)
        _gradient(work.d_rows, data.features[n], d_dense, work, panel)
        _add_up(work.d_rows, _vector(grad, work, 1))
    return np.sqrt(far), np.sqrt(near)


@_jit
@no_type_check
def _step(w, g, m, v, rates):
    """Sgd and momentum; see `rlrnn.stacked.Rules`."""
    clip, keeps, takes, coupled, shrink, rate, _, _, _, _ = rates
    for j in range(len(w)):
        g[j] *= clip
        total = g[j] + coupled * w[j]
        moment = keeps * m[j] + takes * total
        m[j] = moment
        w[j] = shrink * w[j] - rate * moment


@_jit
@no_type_check
def _adaptive_step(w, g, m, v, rates):
    """Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""
    clip, keeps, takes, coupled, shrink, rate, keeps_2, takes_2, root, epsilon = rates
    for j in range(len(w)):
        clipped = g[j] * clip
        total = clipped + coupled * w[j]
        moment = keeps * m[j] + takes * total
        square = keeps_2 * v[j] + takes_2 * total * total
        g[j], m[j], v[j] = clipped, moment, square
        w[j] = shrink * w[j] - rate * moment / (np.sqrt(square) * root + epsilon)


@_jit
@no_type_check
def _update(n, row, norm, learning):
    number = learning.weights.dtype.type
    lr, adaptive = learning.lr[n], learning.adaptive[row]
    clip = learning.clip[n] / (norm + 1e-6)
    clip = 1.0 if clip > 1 else clip  # NaN stays
    learning.updates[row] += 1
    count, keeps = learning.updates[row], learning.keeps[row]
    rates = (
        number(clip),
        number(keeps),
        number(learning.takes[row]),
        number(learning.coupled[row]),
        number(1 - lr * learning.decoupled[row]),
        number(lr / (1 - keeps**count) if adaptive else lr),
        number(0.999),
        number(1 - 0.999),
        number(1 / np.sqrt(1 - 0.999**count)),
        number(1e-8),
    )
    w, g = learning.weights[row], learning.grads[row]
    m, v = learning.first[row], learning.second[row]
    if adaptive:
        _adaptive_step(w, g, m, v, rates)
    else:
        _step(w, g, m, v, rates)


@_jit
@no_type_check
def run(begin, end, stages, count, sizes, data, learning, results, work):
    """The `stages` for models begin..end of the window; how many symbols the last one
    saw, which the way back wants to know as `count` if it is a call of its own."""
    for n in range(begin, end):
        row = learning.rows[n]
        weights = learning.weights[row]
        if stages & 1:
            count = _forward(n, weights, sizes, data, results.after, work)
        if stages & 2:
            results.loss[n] = _loss(n, sizes, data, work)
        if stages & 4 and learning.active[n]:
            grad = learning.grads[row]
            far, near = _backward(n, weights, grad, count, sizes, data, work)
            results.far[n], results.near[n] = far, near
            norm = np.sqrt(_square(grad))
            results.norm[n] = norm
            _update(n, row, norm, learning)
    return count
