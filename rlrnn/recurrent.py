"""The recurrent core: rnn, gru, lstm and minGRU over sequences that restart inside.

Shapes: T time steps, B columns, D inputs, H units, L layers. Time comes first.
The state is one tensor [S, B, H]: the L hidden states, then, for an LSTM, the L cell
states. This file alone knows that layout; others keep it, index its columns, and give
it back.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlrnn import compiled
from rlrnn.scan import scan

Cell = Literal["lstm", "gru", "rnn", "mingru"]
_NO_HEAD = nn.Sequential()


class MinGRU(nn.Module):
    """The weights of a minGRU, named as torch names those of its cells."""

    def __init__(self, input_size: int, hidden_size: int, layers: int) -> None:
        super().__init__()
        for layer in range(layers):
            inputs = hidden_size if layer else input_size
            linear = nn.Linear(inputs, 2 * hidden_size)
            setattr(self, f"weight_ih_l{layer}", linear.weight)
            setattr(self, f"bias_ih_l{layer}", linear.bias)


_STACKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "mingru": MinGRU,
}


class Recurrent(nn.Module):
    """A stack of recurrent layers with state resets inside the sequence.

    The parameters are those of `nn.LSTM`, `nn.GRU` or `nn.RNN` (tanh), whose results
    it gives exactly where nothing restarts.

    A minGRU (Feng et al. 2024, "Were RNNs all we needed?") has gates that see the input
    alone: z = sigmoid(W_z x), h' = (1 - z) h + z g(W_h x), where g(x) is x + 1/2 above
    zero and sigmoid(x) below. That is linear in h, so `rlrnn.scan` goes over all steps
    at once.

    `weight_drop` (Merity et al. 2018, "Regularizing and optimizing LSTM language
    models") is the share of hidden-to-hidden weights that are zero in training, the
    same ones at all steps of a call; the others are divided by 1 - weight_drop. They
    are drawn from `generator`, to be set before, on the device of the weights.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        layers: int = 1,
        cell: Cell = "lstm",
        weight_drop: float | int = 0.0,
    ) -> None:
        super().__init__()
        if cell not in get_args(Cell):
            raise ValueError(
                f"cell is {cell!r}, expected one of {', '.join(get_args(Cell))}"
            )
        if not 0 <= weight_drop < 1:
            raise ValueError(
                f"weight_drop is {weight_drop}, expected at least 0 and below 1"
            )
        if weight_drop and cell == "mingru":
            raise ValueError(
                f"weight_drop is {weight_drop} and cell is 'mingru', which has no "
                "hidden-to-hidden weights: expected 0; leave weight_drop out"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.layers = layers
        self.cell: Cell = cell
        self.rows = layers * (2 if cell == "lstm" else 1)  # of the state, S
        self.parallel = cell == "mingru"  # in time
        self.stack = _STACKS[cell](input_size, hidden_size, layers)
        self.weight_drop = weight_drop
        self.generator: torch.Generator | None = None

    def initial_state(self, batch: int) -> Float[Tensor, "S B H"]:
        """The state before the first step: zeros, on the device of the weights."""
        return self.weights(0)[0].new_zeros(self.rows, batch, self.hidden_size)

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
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            # for an export: operations that ONNX has
            one = starts is not None or x.shape[0] == 1
            return self.reference(x, state, starts) if one else self._unbroken(x, state)
        if torch.is_autocast_enabled(x.device.type):
            return self._in_half(x, state, starts)
        if self.parallel:
            return self._result(self._scanned(x, state, starts))
        if compiles(x):
            ((y, after, _),) = together([self], [_NO_HEAD], [x], [state], starts)
            return y, after
        if starts is None and x.shape[0] > 1 and not self._drops():
            return self._unbroken(x, state)
        if fuses(x):
            layers = _fused([self], [x], [state], starts)
            return layers[-1].y[0], _after(layers)[0]
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
        if self.parallel:
            return torch.stack(self._scanned(x, state, starts), 1)
        if compiles(x):
            weights = [w.numpy() for i in range(self.layers) for w in self.drawn(i)]
            _, _, tape = compiled.forward(
                compiled.Shape(self.cell, self.layers, ()),
                weights,
                x.contiguous().numpy(),
                state.contiguous().numpy(),
                _no_starts(x, starts).numpy(),
                compiled.threads(),
            )
            arrays = tape.outputs + (tape.kept if self.cell == "lstm" else [])
            return torch.stack([torch.from_numpy(a[0]) for a in arrays], 1)
        if fuses(x):
            layers = _fused([self], [x], [state], starts)
            memory = [layer.kept for layer in layers if self.cell == "lstm"]
            return torch.cat([layer.y for layer in layers] + memory).transpose(0, 1)
        return torch.stack(self._looped(x, state, starts), 1)

    def reference(
        self,
        x: Float[Tensor, "T B D"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "S B H"]]:
        """`forward` as a loop over time that anyone can check."""
        return self._result(self._looped(x, state, starts))

    def _result(self, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs of the last layer, and the state after the last step."""
        return states[self.layers - 1], torch.stack([rows[-1] for rows in states])

    def _looped(
        self, x: Tensor, state: Tensor, starts: Tensor | None
    ) -> list[Float[Tensor, "T B H"]]:
        """The rows of the state after each step."""
        if starts is not None:
            keep = (~starts).to(x.dtype).unsqueeze(-1)  # [T, B, 1]
        hidden: list[Tensor] = []
        memory: list[Tensor] = []
        for layer in range(self.layers):
            if self.parallel:
                w_x, b_x = self.weights(layer)
            else:
                w_x, w_h, b_x, b_h = self.drawn(layer)
            h = state[layer]
            c = state[self.layers + layer] if self.cell == "lstm" else h
            gates = F.linear(x, w_x, b_x)  # [T, B, G*H]: one product for all steps
            hs, cs = [], []
            for t in range(x.shape[0]):
                if starts is not None:
                    h = h * keep[t]
                    c = c * keep[t]
                if self.cell == "lstm":
                    h, c = _lstm_step(gates[t], h, c, w_h, b_h)
                    cs.append(c)
                elif self.cell == "gru":
                    h = _gru_step(gates[t], h, w_h, b_h)
                elif self.cell == "mingru":
                    z, candidate = _mingru_gates(gates[t])
                    h = (1 - z) * h + z * candidate
                else:
                    h = torch.tanh(gates[t] + F.linear(h, w_h, b_h)).to(state.dtype)
                hs.append(h)
            x = torch.stack(hs)
            hidden.append(x)
            if cs:
                memory.append(torch.stack(cs))
        return hidden + memory

    def _unbroken(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """No restarts: torch's own kernels, cuDNN on CUDA."""
        if self.cell == "lstm":
            y, (h, c) = self.stack(x, tuple(state.chunk(2)))
            return y, torch.cat((h, c))
        y, h = self.stack(x, state)
        return y, h

    def _in_half(
        self, x: Tensor, state: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`forward` under `torch.autocast`: products in half precision, the state and
        what is handed on in the weights' own. Torch's kernels would round the state at
        each step, and with it what is to be remembered."""
        if self.parallel:
            y, after = self._result(self._scanned(x, state, starts))
        elif fuses(x.to(state.dtype)):  # products in its own precision
            with torch.autocast(x.device.type, enabled=False):
                layers = _fused([self], [x.to(state.dtype)], [state], starts)
            y, after = layers[-1].y[0], _after(layers)[0]
        else:
            y, after = self.reference(x, state, starts)
        return y.to(state.dtype), after.to(state.dtype)

    def _scanned(
        self, x: Tensor, state: Tensor, starts: Tensor | None
    ) -> list[Float[Tensor, "T B H"]]:
        """The rows of the state of a minGRU after each step."""
        outputs = []
        for layer in range(self.layers):
            gates = F.linear(x, *self.weights(layer)).to(state.dtype)
            z, candidate = _mingru_gates(gates)
            keep = 1 - z
            if starts is not None:
                keep = keep.masked_fill(starts.unsqueeze(-1), 0.0)
            x = scan(keep, z * candidate, state[layer])
            outputs.append(x)
        return outputs

    @torch.no_grad()
    def reach(self, steps: int) -> None:
        """Draws the gates' biases anew, so that units forget after 1 to `steps` steps:
        chrono initialisation (Tallec & Ollivier 2018, "Can recurrent neural networks
        warp time?"), from torch's default generator. A gate that keeps a share
        1 - 1/T of the state at each step has the bias log(T - 1)."""
        assert self.cell != "rnn", "it has no gates"
        size = self.hidden_size
        for layer in range(self.layers):
            weights = self.weights(layer)
            keep = torch.empty(size).uniform_(1, max(1.0, steps - 1)).log()
            keep = keep.to(weights[0].device)
            if self.cell == "mingru":
                weights[1][:size] = -keep
                continue
            b_x, b_h = weights[2:]
            gates = slice(0, 2 * size)  # lstm: new, keep; gru: reset, keep
            b_x[gates] = b_h[gates] = 0
            b_x[size : 2 * size] = keep
            if self.cell == "lstm":
                b_x[:size] = -keep

    def weights(self, layer: int) -> list[Tensor]:
        """w_x [G, D], w_h [G, H], b_x [G], b_h [G] of a layer; of a minGRU w_x [2H, D]
        and b_x [2H].
        """
        return [getattr(self.stack, f"{kind}_l{layer}") for kind in self._kinds()]

    def drawn(self, layer: int) -> list[Tensor]:
        """`weights` for one call: in training some are zero, see `weight_drop`."""
        weights = self.weights(layer)
        if self._drops():
            assert self.generator is not None, (
                "set `generator`: weight_drop draws of it"
            )
            keep = 1 - self.weight_drop
            kept = torch.empty_like(weights[1])
            kept.bernoulli_(keep, generator=self.generator)
            weights[1] = weights[1] * kept / keep
        return weights

    def _drops(self) -> bool:
        return self.training and self.weight_drop > 0

    def layer(self, index: int) -> "Recurrent":
        """A layer as a core of its own with the same parameters; nothing is dropped."""
        inputs = self.hidden_size if index else self.input_size
        one = Recurrent(inputs, self.hidden_size, 1, self.cell)
        for kind, weight in zip(self._kinds(), self.weights(index), strict=True):
            setattr(one.stack, f"{kind}_l0", weight)
        return one

    def _kinds(self) -> tuple[str, ...]:
        """What torch calls the weights of a layer."""
        if self.parallel:
            return "weight_ih", "bias_ih"
        return "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def compiles(x: Tensor) -> bool:
    """Whether `rlrnn.kernels` work on this tensor."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def fuses(x: Tensor) -> bool:
    """Whether `rlrnn.kernels_cuda` work on this tensor."""
    return x.device.type == "cuda" and x.dtype == torch.float32 and _triton()


@cache
def _triton() -> bool:
    """Whether Triton runs here; it needs a C compiler and Python's headers, too."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        warnings.warn(
            f"no fused recurrence on CUDA, but a slow loop: {error!r} from Triton; "
            "it needs a C compiler and Python's headers",
            stacklevel=2,
        )
        return False
    return True


def together(
    cores: Sequence[Recurrent],
    heads: Sequence[nn.Sequential],
    xs: Sequence[Float[Tensor, "T B _"]],
    states: Sequence[Float[Tensor, "_ B _"]],
    starts: Bool[Tensor, "T B"] | None = None,
) -> list[
    tuple[Float[Tensor, "T B _"], Float[Tensor, "_ B _"], Float[Tensor, "T B _"]]
]:
    """Each core with dense layers behind it: `head(y)`, the state after, and `y`.

    On a CPU they share its threads, and `y` comes without gradient. On CUDA cores of
    one form share the launches.
    """
    kernels = not any(core.parallel for core in cores)  # which a minGRU does not need
    forms = {(c.cell, c.layers, c.input_size, c.hidden_size) for c in cores}
    if kernels and fuses(xs[0]) and starts is not None and len(forms) == 1:
        fused = _fused(cores, xs, states, starts)
        parts = zip(heads, fused[-1].y, _after(fused), strict=True)
        return [(head(y), after, y) for head, y, after in parts]
    dense = [compiled.dense(head) for head in heads]
    if not (kernels and compiles(xs[0])) or any(layers is None for layers in dense):
        results = []
        for core, head, x, state in zip(cores, heads, xs, states, strict=True):
            y, after = core(x, state, starts)
            results.append((head(y), after, y))
        return results
    shapes, weights = [], []
    for core, layers in zip(cores, dense, strict=True):
        assert layers is not None
        squashes = tuple(squash for _, squash in layers)
        shapes.append(compiled.Shape(core.cell, core.layers, squashes))
        for layer in range(core.layers):
            weights += core.drawn(layer)
        for linear, _ in layers:
            weights += [linear.weight, linear.bias]
    outputs: tuple[Tensor, ...] = compiled.Networks.apply(  # type: ignore[no-untyped-call]
        tuple(shapes), _no_starts(xs[0], starts), *xs, *states, *weights
    )
    count = len(cores)
    return [outputs[n::count] for n in range(count)]  # type: ignore[misc]


class _Fused(NamedTuple):
    """A layer of N cores: see `rlrnn.kernels_cuda.Layer`."""

    y: Tensor
    kept: Tensor
    last: Tensor


def _fused(
    cores: Sequence[Recurrent],
    xs: Sequence[Tensor],
    states: Sequence[Tensor],
    starts: Tensor | None,
) -> list[_Fused]:
    """The layers of cores of one form."""
    from rlrnn import kernels_cuda

    layers: list[_Fused] = []
    for i in range(cores[0].layers):
        before = [state[i :: cores[0].layers] for state in states]
        kinds = zip(*(core.drawn(i) for core in cores), strict=True)
        weights = [w for kind in kinds for w in kind]
        outputs = kernels_cuda.Layer.apply(  # type: ignore[no-untyped-call]
            cores[0].cell, starts, *xs, *before, *weights
        )
        layers.append(_Fused(*outputs))
        xs = layers[-1].y.unbind()
    return layers


def _after(layers: list[_Fused]) -> Float[Tensor, "N S B H"]:
    """The hidden states of all layers, then the cell states."""
    return torch.stack([layer.last for layer in layers], 2).flatten(1, 2)


def _no_starts(x: Tensor, starts: Tensor | None) -> Tensor:
    if starts is None:
        return torch.zeros(x.shape[:2], dtype=torch.bool)
    return starts.contiguous()


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


def _mingru_gates(gates: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the state is new, and the candidate for it, which is positive."""
    x_z, x_h = gates.chunk(2, -1)
    candidate = torch.where(x_h >= 0, x_h + 0.5, torch.sigmoid(x_h))
    return torch.sigmoid(x_z), candidate
