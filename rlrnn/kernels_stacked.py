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
    _columns,
    _few,
    _gru_backward,
    _gru_forward,
    _jit,
    _linear,
    _lstm_backward,
    _lstm_forward,
    _pack,
    _rnn_backward,
    _rnn_forward,
)

CELLS = ("lstm", "gru", "rnn")
LOSSES = ("classes", "labels", "mse", "mae")

# Beside what `_jit` allows, sums in any order: a reduction becomes vector code.
_jit_sum = njit(
    nogil=True,
    cache=True,
    error_model="numpy",
    fastmath={"contract", "arcp", "nsz", "reassoc"},
)

# What is called in one place becomes part of it, instead of being compiled twice.
_part = njit(nogil=True, inline="always")


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
    `lr` and `clip` [N]; and `grads`, empty if they are not to be kept."""

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
    d_gates: Array  # [BLOCK, B, G], of a few steps
    d_h: Array  # [BLOCK, B, G] for a gru
    before: Array  # [BLOCK, B, H] h before each step
    d_state: Array  # [R, B, H]
    middle: Array  # [R, B, H] the state before a few steps
    bias: Array  # [G]
    grad: Array  # [P]
    packed: Array  # [3, ...] room for three matrices in panels


def work(sizes: Sizes, shapes: list[tuple[int, ...]], data: Data) -> Work:
    """Memory for windows of this form; what is in it means nothing."""
    _, steps, columns = data.starts.shape
    dtype = data.state.dtype
    cell, hidden, layers = CELLS[sizes.cell], sizes.hidden, sizes.layers
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[cell] * hidden
    state_rows = 2 if cell == "lstm" else 1
    positions, few = steps * columns, block(columns)
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
        d_gates=empty(few, columns, gates),
        d_h=empty(few if cell == "gru" else 0, columns, gates),
        before=empty(few, columns, hidden),
        d_state=empty(state_rows, columns, hidden),
        middle=empty(state_rows, columns, hidden),
        bias=empty(gates),
        grad=empty(int(ends[-1])),
        packed=empty(3, room),
    )


@_jit
@no_type_check
def block(columns):
    """Steps that go through a layer, and back, at a time: few enough that their gates
    stay in the cache until they have been used."""
    return max(256 // columns, 1)


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
def _packed(room, w, transposed, panel):
    """`w` [rows, columns] in panels, [1, P, inputs, panel]; may be `w` itself."""
    rows, columns = w.shape
    outputs, inputs = (rows, columns) if transposed else (columns, rows)
    if not transposed and columns == panel:  # as it is
        return w.reshape(1, 1, rows, columns)
    panels = (outputs + panel - 1) // panel
    packed = room[: panels * inputs * panel].reshape(1, panels, inputs, panel)
    if outputs % panel:
        packed[0, panels - 1] = 0
    _pack(w.reshape(1, rows, columns), packed, transposed)
    return packed


@_jit
@no_type_check
def _copy(source, target):
    for j in range(len(target)):
        target[j] = source[j]


@_jit
@no_type_check
def _add(source, target):
    for j in range(len(target)):
        target[j] += source[j]


@_jit
@no_type_check
def _shift(y, state, starts, before):
    """`before` [K, B, H]: h before each step, `state` [B, H] before the first."""
    for t in range(len(y)):
        for b in range(y.shape[1]):
            if starts[t, b]:
                before[t, b] = 0
            else:
                _copy(y[t - 1, b] if t else state[b], before[t, b])


@_jit
@no_type_check
def _add_up(a, out):
    """out [G] += the sum over i of a [I, G]."""
    for i in range(len(a)):
        row = a[i]
        for j in range(len(out)):
            out[j] += row[j]


@_jit
@no_type_check
def _gradient(a, b, out, room, panel):
    """out [G, D] += a.T @ b for a [I, G] and b [I, D]."""
    rows, size = a.shape
    if b.shape[1] < 16:
        turned = np.zeros((b.shape[1], size), a.dtype)
        _few(b, a, turned)
        for i in range(size):
            for j in range(b.shape[1]):
                out[i, j] += turned[j, i]
    elif size < 16:
        _few(a, b, out)
    else:
        packed = _packed(room, b, False, panel)
        part = np.empty((size, panel), a.dtype)
        for p in range(packed.shape[1]):
            at, width = p * rows * panel, min(panel, b.shape[1] - p * panel)
            _columns(part, 0, panel, a, 0, 1, size, size, packed, at, rows)
            for i in range(size):
                total, row = out[i, p * panel : p * panel + width], part[i]
                for j in range(len(total)):
                    total[j] += row[j]


@_jit_sum
@no_type_check
def _square(a):
    """The sum of squares, in float64 from block to block."""
    total = 0.0
    for begin in range(0, len(a), 1024):
        block, part = a[begin : begin + 1024], a.dtype.type(0)
        for j in range(len(block)):
            part += block[j] * block[j]
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
def _matrix(row, offsets, i, columns):
    """Parameter i as [..., columns]."""
    begin, end = offsets[i], offsets[i + 1]
    return row[begin:end].reshape((end - begin) // columns, columns)


@_jit
@no_type_check
def _vector(row, offsets, i):
    return row[offsets[i] : offsets[i + 1]]


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


@_part
@no_type_check
def _layer_forward(cell, gates, packed, b_n, state, starts, y, kept, last):
    """Of some steps: `gates`, `y`, ... [K, B, ...], `state` and `last` [R, B, H]."""
    steps, columns, size = gates.shape
    hidden = y.shape[2]
    sequence, shape = (1, steps, columns, hidden), (1, len(state), columns, hidden)
    g, b, s = gates.reshape(1, steps, columns, size), b_n.reshape(1, hidden), state
    s, end, on = (
        s.reshape(shape),
        last.reshape(shape),
        starts.reshape(1, steps, columns),
    )
    out, keep = y.reshape(sequence), kept.reshape(sequence)
    if cell == 0:
        _lstm_forward(0, 0, columns, g, packed, b, s, on, out, keep, end)
    elif cell == 1:
        _gru_forward(0, 0, columns, g, packed, b, s, on, out, keep, end)
    else:
        _rnn_forward(0, 0, columns, g, packed, b, s, on, out, keep, end)


@_part
@no_type_check
def _forward(n, weights, sizes, data, after, work):
    """`gates`, `y`, `kept` and `out`; how many symbols there are."""
    _, steps, columns = data.starts.shape
    hidden, size, panel = sizes.hidden, work.gates.shape[3], sizes.panel
    state_rows = len(work.d_state)
    positions = steps * columns
    encoders, count, few = _encoders(sizes), 0, block(columns)
    starts, offsets = data.starts[n], work.offsets
    rows = work.y[0].reshape(positions, hidden)  # of its type; replaced
    if sizes.symbols:
        count = _list_symbols(data.symbols[n], work)
        embedding = _matrix(weights, offsets, 0, sizes.width)
        for i in range(count):
            _copy(embedding[work.seen[i]], work.rows[i])
        rows = work.rows[:count]
    elif sizes.dense:
        packed = _packed(
            work.packed[0], _matrix(weights, offsets, 0, sizes.dense), True, panel
        )
        bias = _vector(weights, offsets, 1)
        _linear(data.features[n], packed, bias, work.rows, 2)
        rows = work.rows
    else:
        rows = data.features[n]
    for layer in range(sizes.layers):
        at = encoders + 4 * layer
        b_x, b_h = _vector(weights, offsets, at + 2), _vector(weights, offsets, at + 3)
        for j in range(size):
            work.bias[j] = b_x[j] + b_h[j]
        if sizes.cell == 1:  # the candidate's own bias is behind the reset gate
            work.bias[2 * hidden :] = b_x[2 * hidden :]
        w_x = _packed(
            work.packed[0], _matrix(weights, offsets, at, rows.shape[1]), True, panel
        )
        if sizes.symbols and layer == 0:
            _linear(rows, w_x, work.bias, work.table[:count], 0)
        w_h = _packed(
            work.packed[1], _matrix(weights, offsets, at + 1, hidden), True, panel
        )
        begin, end = state_rows * layer, state_rows * (layer + 1)
        state, last = data.state[n, begin:end], after[n, begin:end]
        kept = work.y[layer] if sizes.cell == 2 else work.kept[layer]
        b_n = b_h[size - hidden :]
        for t in range(0, steps, few):
            stop = min(t + few, steps)
            gates = work.gates[layer, t:stop]
            flat = gates.reshape((stop - t) * columns, size)
            if sizes.symbols and layer == 0:
                for i in range(len(flat)):
                    _copy(work.table[work.slots[t * columns + i]], flat[i])
            else:
                some = rows[t * columns : stop * columns]
                _linear(some, w_x, work.bias, flat, 0)
            _layer_forward(
                sizes.cell, gates, w_h, b_n, state, starts[t:stop],
                work.y[layer, t:stop], kept[t:stop], last,
            )  # fmt: skip
            state = last
        rows = work.y[layer].reshape(positions, hidden)
    at = encoders + 4 * sizes.layers
    packed = _packed(work.packed[0], _matrix(weights, offsets, at, hidden), True, panel)
    _linear(rows, packed, _vector(weights, offsets, at + 1), work.out, 0)
    return count


@_part
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


@_part
@no_type_check
def _layer_back(
    cell, gates, packed, b_n, state, starts, y, kept, d_y, d_state, d_gates, d_h
):
    """Of some steps: `gates`, `y`, ... [K, B, ...], `state` [R, B, H]."""
    steps, columns, size = gates.shape
    b = b_n.reshape(1, y.shape[2])
    sequence, flow = (1, steps, columns, y.shape[2]), (1, steps, columns, size)
    a, da, dh = gates.reshape(flow), d_gates.reshape(flow), d_h.reshape(flow)
    out, keep, e = y.reshape(sequence), kept.reshape(sequence), d_y.reshape(sequence)
    shape = 1, len(state), columns, y.shape[2]
    s, ds = state.reshape(shape), d_state.reshape(shape)
    on, w = starts.reshape(1, steps, columns), packed
    if cell == 0:
        _lstm_backward(0, 0, columns, a, w, b, s, on, out, keep, e, ds, da, dh)
    elif cell == 1:
        _gru_backward(0, 0, columns, a, w, b, s, on, out, keep, e, ds, da, dh)
    else:
        _rnn_backward(0, 0, columns, a, w, b, s, on, out, keep, e, ds, da, dh)


@_part
@no_type_check
def _backward(n, weights, grad, count, sizes, data, work):
    """Fills `grad` [P] from the gradient in `out`; the norms of the gradients of the
    states before the window, and before step `cut`."""
    _, steps, columns = data.starts.shape
    hidden, size, panel = sizes.hidden, work.gates.shape[3], sizes.panel
    state_rows, positions = len(work.d_state), steps * columns
    encoders, cut, few = _encoders(sizes), sizes.cut, block(columns)
    far, near, starts = 0.0, 0.0, data.starts[n]
    offsets, room = work.offsets, work.packed[2]
    grad[:] = 0
    at = encoders + 4 * sizes.layers
    head = _matrix(weights, offsets, at, hidden)
    above = work.y[sizes.layers - 1].reshape(positions, hidden)
    _gradient(work.out, above, _matrix(grad, offsets, at, hidden), room, panel)
    _add_up(work.out, _vector(grad, offsets, at + 1))
    _linear(
        work.out, _packed(work.packed[0], head, False, panel), work.bias, work.d_y, -1
    )
    for layer in range(sizes.layers - 1, -1, -1):
        at = encoders + 4 * layer
        begin, end = state_rows * layer, state_rows * (layer + 1)
        b_h = _vector(weights, offsets, at + 3)
        b_n = b_h[size - hidden :]
        y, rows, embedded = work.y[layer], work.rows, sizes.symbols > 0 and layer == 0
        kept = y if sizes.cell == 2 else work.kept[layer]
        if layer:
            rows = work.y[layer - 1].reshape(positions, hidden)
        elif not encoders:
            rows = data.features[n]
        width = rows.shape[1]
        d_w_x, d_w_h = (
            _matrix(grad, offsets, at, width),
            _matrix(grad, offsets, at + 1, hidden),
        )
        d_b_x, d_b_h = _vector(grad, offsets, at + 2), _vector(grad, offsets, at + 3)
        w_x = _packed(
            work.packed[0], _matrix(weights, offsets, at, width), False, panel
        )
        w_h = _packed(
            work.packed[1], _matrix(weights, offsets, at + 1, hidden), False, panel
        )
        work.d_state[:] = 0
        if embedded:
            work.table[:] = 0
        stop = steps
        while stop > 0:
            t = max(stop - few, 0)
            if t < cut < stop:
                t = cut
            state, number = data.state[n, begin:end], (stop - t) * columns
            if t:
                state = work.middle
                state[0] = y[t - 1]
                if sizes.cell == 0:
                    state[1] = kept[t - 1]
            d_gates = work.d_gates[: stop - t]
            d_h = work.d_h[: stop - t] if sizes.cell == 1 else d_gates
            d_y = work.d_y[t * columns : stop * columns]
            _layer_back(
                sizes.cell, work.gates[layer, t:stop], w_h, b_n, state,
                starts[t:stop], y[t:stop], kept[t:stop],
                d_y.reshape(stop - t, columns, hidden), work.d_state, d_gates, d_h,
            )  # fmt: skip
            before = work.before[: stop - t]
            _shift(y[t:stop], state[0], starts[t:stop], before)
            flat, flat_h = d_gates.reshape(number, size), d_h.reshape(number, size)
            _gradient(flat_h, before.reshape(number, hidden), d_w_h, room, panel)
            if sizes.cell == 1:
                _add_up(flat_h, d_b_h)
            if embedded:
                for i in range(number):
                    _add(flat[i], work.table[work.slots[t * columns + i]])
            else:
                _add_up(flat, d_b_x)
                some = rows[t * columns : stop * columns]
                _gradient(flat, some, d_w_x, room, panel)
                if layer:
                    _linear(flat, w_x, work.bias, d_y, -1)
                elif sizes.dense:
                    d_some = work.d_rows[t * columns : stop * columns]
                    _linear(flat, w_x, work.bias, d_some, -1)
            if t == cut:
                near += _square(work.d_state.reshape(work.d_state.size))
            stop = t
        far += _square(work.d_state.reshape(work.d_state.size))
        if embedded:
            d_table = work.table[:count]
            _add_up(d_table, d_b_x)
            _gradient(d_table, rows[:count], d_w_x, room, panel)
            _linear(d_table, w_x, work.bias, work.d_rows[:count], -1)
        if sizes.cell != 1:
            _copy(d_b_x, d_b_h)
    if sizes.symbols:
        d_embedding = _matrix(grad, offsets, 0, sizes.width)
        for i in range(count):
            _copy(work.d_rows[i], d_embedding[work.seen[i]])
    elif sizes.dense:
        for i in range(positions):
            for j in range(sizes.width):
                if not work.rows[i, j] > 0:
                    work.d_rows[i, j] = 0
        d_dense = _matrix(grad, offsets, 0, sizes.dense)
        _gradient(work.d_rows, data.features[n], d_dense, room, panel)
        _add_up(work.d_rows, _vector(grad, offsets, 1))
    return np.sqrt(far), np.sqrt(near)


@_jit
@no_type_check
def _step(w, g, m, v, rates):
    """Sgd and momentum; see `rlrnn.stacked.Rules`."""
    clip, keeps, takes, coupled, shrink, rate, _, _, _, _ = rates
    for j in range(len(w)):
        total = g[j] * clip + coupled * w[j]
        moment = keeps * m[j] + takes * total
        m[j] = moment
        w[j] = shrink * w[j] - rate * moment


@_jit
@no_type_check
def _adaptive_step(w, g, m, v, rates):
    """Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""
    clip, keeps, takes, coupled, shrink, rate, keeps_2, takes_2, root, epsilon = rates
    for j in range(len(w)):
        total = g[j] * clip + coupled * w[j]
        moment = keeps * m[j] + takes * total
        square = keeps_2 * v[j] + takes_2 * total * total
        m[j], v[j] = moment, square
        w[j] = shrink * w[j] - rate * moment / (np.sqrt(square) * root + epsilon)


@_part
@no_type_check
def _update(n, row, g, norm, learning):
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
    w, m, v = learning.weights[row], learning.first[row], learning.second[row]
    if adaptive:
        _adaptive_step(w, g, m, v, rates)
    else:
        _step(w, g, m, v, rates)


@_jit
@no_type_check
def run(begin, end, learn, sizes, data, learning, results, work):
    """Losses and states of models begin..end of the window; then, if `learn`, those
    that are active learn."""
    for n in range(begin, end):
        row = learning.rows[n]
        weights = learning.weights[row]
        count = _forward(n, weights, sizes, data, results.after, work)
        results.loss[n] = _loss(n, sizes, data, work)
        if learn and learning.active[n]:
            far, near = _backward(n, weights, work.grad, count, sizes, data, work)
            results.far[n], results.near[n] = far, near
            norm = np.sqrt(_square(work.grad))
            results.norm[n] = norm
            if len(learning.grads):
                _copy(work.grad, learning.grads[row])
            _update(n, row, work.grad, norm, learning)
