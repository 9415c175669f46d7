"""Encoder, recurrent core, head.

Shapes: T time steps, B streams, H units, C outputs. The state is one tensor [S, B, H]:
the states of all layers on top of each other, then what a running mean needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from rlrnn.checks import at_least, one_of, share
from rlrnn.data.chunks import Features, Symbols
from rlrnn.recurrent import Cell, Recurrent

Readout = Literal["step", "mean"]


@dataclass(frozen=True)
class ModelConfig:
    """What learns.

    Args:
        cell: lstm, gru, rnn or mingru.
        hidden_size: units of a layer, in each direction.
        layers: how many lie on top of each other.
        embedding_size: of a symbol; without one, the smaller of hidden_size and 64.
            For features: of a dense layer (ReLU) before the first one; without one,
            there is none.
        bidirectional: a second stack reads the sequence backwards; for whole sequences.
        readout: what the head sees at a step: its output, or the mean of all outputs
            since the sequence began.
        tied: the head's weights are the embedding's (Press & Wolf 2017).
        residual: a layer's input is added to its output, from the second layer on.
        layer_norm: of each layer's output (Ba et al. 2016).
        projection: width of a dense layer before the head; without one, there is none.
        dropout: of each layer's output; one mask for all steps of a window (Gal &
            Ghahramani 2016).
        input_dropout: the same, of the encoder's output.
        weight_drop: share of recurrent weights that are zero in a window (Merity et
            al. 2018).
        reach: steps after which units forget at first, from 1 to this (chrono
            initialisation, Tallec & Ollivier 2018); without it, torch's biases.
    """

    cell: Cell = "lstm"
    hidden_size: int = 128
    layers: int = 1
    embedding_size: int | None = None
    bidirectional: bool = False
    readout: Readout = "step"
    tied: bool = False
    residual: bool = False
    layer_norm: bool = False
    projection: int | None = None
    dropout: float = 0.0
    input_dropout: float = 0.0
    weight_drop: float = 0.0
    reach: int | None = None

    def __post_init__(self) -> None:
        one_of("model.cell", self.cell, Cell)
        one_of("model.readout", self.readout, Readout)
        at_least("model.hidden_size", self.hidden_size, 1)
        at_least("model.layers", self.layers, 1)
        if self.reach is not None and self.cell == "rnn":
            raise ValueError(
                f"model.reach is {self.reach}, but rnn has no gates: leave it out"
            )
        for name in ("embedding_size", "projection", "reach"):
            if getattr(self, name) is not None:
                at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("dropout", "input_dropout", "weight_drop"):
            share(f"model.{name}", getattr(self, name))


class SequenceModel(nn.Module):
    """Symbols or features in, `outputs` numbers per step out.

    Raises ValueError for tied weights of different widths, or without symbols.
    """

    def __init__(
        self, inputs: Symbols | Features, outputs: int, config: ModelConfig
    ) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        width = self._make_encoder(inputs)
        self.encoded = width
        stacks = 2 if config.bidirectional else 1
        self.cores = nn.ModuleList()
        self.norms = nn.ModuleList()
        for layer in range(config.layers):
            for _ in range(stacks):
                reads = width if layer == 0 else stacks * config.hidden_size
                core = Recurrent(
                    reads, config.hidden_size, 1, config.cell, config.weight_drop
                )
                if config.reach is not None:
                    core.reach(config.reach)
                self.cores.append(core)
            if config.layer_norm:
                self.norms.append(nn.LayerNorm(stacks * config.hidden_size))
        width = stacks * config.hidden_size
        self.projection: nn.Linear | None = None
        if config.projection is not None:
            self.projection = nn.Linear(width, config.projection)
            width = config.projection
        self.head = nn.Linear(width, outputs)
        if config.tied:
            self._tie(inputs, outputs, width)
        self.generator: torch.Generator | None = None

    def _make_encoder(self, inputs: Symbols | Features) -> int:
        """The width of what the first layer reads."""
        size = self.config.embedding_size
        self.encoder: nn.Module | None = None
        if isinstance(inputs, Symbols):
            width = size or min(self.config.hidden_size, 64)
            self.encoder = nn.Embedding(inputs.count, width)
            # Unit-variance embeddings (torch's default) saturate small cells.
            nn.init.normal_(self.encoder.weight, std=width**-0.5)
            return width
        if size is None:
            return inputs.width
        self.encoder = nn.Sequential(nn.Linear(inputs.width, size), nn.ReLU())
        return size

    def _tie(self, inputs: Symbols | Features, outputs: int, width: int) -> None:
        if not isinstance(inputs, Symbols) or inputs.count != outputs:
            raise ValueError("model.tied is for predicting the next symbol; leave it")
        assert isinstance(self.encoder, nn.Embedding)
        if self.encoder.embedding_dim != width:
            raise ValueError(
                f"model.tied needs one width, but embeddings have "
                f"{self.encoder.embedding_dim} numbers and the head reads {width}; set "
                f"model.embedding_size to {width}"
            )
        self.head.weight = self.encoder.weight

    def seed(self, generator: torch.Generator) -> None:
        """What dropout draws from; on the device of the weights."""
        self.generator = generator
        for core in self._cores():
            core.generator = generator

    def _cores(self) -> Iterator[Recurrent]:
        for core in self.cores:
            assert isinstance(core, Recurrent)
            yield core

    def parts(self) -> list[tuple[str, list[nn.Parameter]]]:
        """Parameters from the bottom to the top: encoder, each layer, head. Tied ones
        belong to the encoder."""
        stacks = len(self.cores) // self.config.layers
        modules: list[tuple[str, list[nn.Module]]] = []
        if self.encoder is not None:
            modules.append(("encoder", [self.encoder]))
        for layer in range(self.config.layers):
            own = list(self.cores[layer * stacks : (layer + 1) * stacks])
            modules.append((f"layer {layer + 1}", own + list(self.norms)[layer:][:1]))
        top = [] if self.projection is None else [self.projection]
        modules.append(("head", [*top, self.head]))
        seen: set[int] = set()
        parts = []
        for name, members in modules:
            every = [p for module in members for p in module.parameters()]
            parts.append((name, [p for p in every if id(p) not in seen]))
            seen |= {id(p) for p in every}
        return parts

    def initial_state(self, batch: int) -> Float[Tensor, "S B H"]:
        """Zeros: nothing has been read."""
        state = torch.cat([core.initial_state(batch) for core in self._cores()])
        if self.config.readout == "step":
            return state
        stacks = 2 if self.config.bidirectional else 1
        return torch.cat([state, state.new_zeros(stacks + 1, *state.shape[1:])])

    def forward(
        self,
        x: Shaped[Tensor, "T B *D"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B C"], Float[Tensor, "S B H"]]:
        """Outputs, and the state after the last step. Resets as in `Recurrent`."""
        _, out, state = self.read(x, state, starts)
        return out, state

    def read(
        self,
        x: Shaped[Tensor, "T B *D"],
        state: Float[Tensor, "S B H"],
        starts: Bool[Tensor, "T B"] | None = None,
    ) -> tuple[Float[Tensor, "T B W"], Float[Tensor, "T B C"], Float[Tensor, "S B H"]]:
        """`forward`, and the last layer's outputs before dropout (what temporal
        activation regularisation looks at)."""
        config = self.config
        y = x if self.encoder is None else self.encoder(x)
        y = self._drop(y, config.input_dropout)
        after = []
        rows = 0
        stacks = 2 if config.bidirectional else 1
        for layer in range(config.layers):
            outputs = []
            for direction in range(stacks):
                core = self.cores[layer * stacks + direction]
                assert isinstance(core, Recurrent)
                before = state[rows : rows + core.rows]
                rows += core.rows
                if direction == 0:
                    out, new = core(y, before, starts)
                else:
                    out, new = _backwards(core, y, before, starts)
                outputs.append(out)
                after.append(new)
            above = outputs[0] if stacks == 1 else torch.cat(outputs, -1)
            if config.residual and layer > 0:
                above = above + y
            if config.layer_norm:
                above = self.norms[layer](above)
            last = above
            y = self._drop(above, config.dropout)
        if config.readout == "mean":
            y, carried = _running_mean(y, state[rows:], starts)
            after.append(carried)
        if self.projection is not None:
            y = torch.relu(self.projection(y))
        return last, self.head(y), torch.cat(after)

    def _drop(self, y: Tensor, share: float) -> Tensor:
        if not self.training or share == 0:
            return y
        assert self.generator is not None, "seed() comes before training with dropout"
        kept = torch.empty_like(y[:1]).bernoulli_(1 - share, generator=self.generator)
        return y * (kept / (1 - share))


def _backwards(
    core: Recurrent, x: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`core` over time reversed: where a sequence ends, it begins. What comes before a
    window's last step is not there, so the window is a whole sequence."""
    ends = None
    if starts is not None:
        ends = torch.cat((starts[1:], torch.ones_like(starts[:1]))).flip(0)
    y, after = core(x.flip(0), torch.zeros_like(state), ends)
    return y.flip(0), after


def _running_mean(
    y: Float[Tensor, "T B W"],
    carried: Float[Tensor, "R B H"],
    starts: Bool[Tensor, "T B"] | None,
) -> tuple[Tensor, Tensor]:
    """The mean since the sequence began, after each step. `carried`: the sum so far,
    in rows of H, and a row with the number of steps."""
    steps, batch, width = y.shape
    before = carried[:-1].transpose(0, 1).reshape(batch, width)
    count = carried[-1, :, :1]  # [B, 1]
    total = y.cumsum(0) + before
    place = torch.arange(1, steps + 1, device=y.device).to(y.dtype).view(-1, 1, 1)
    number = place + count
    if starts is not None:
        # What had been summed and counted when the sequence of each step began.
        at = torch.arange(steps, device=y.device).view(-1, 1).expand(steps, batch)
        began = torch.where(starts, at, -1).cummax(0).values  # [T, B]
        index = began.clamp_min(0).unsqueeze(-1)
        past = (total - y).gather(0, index.expand(-1, -1, width))
        inside = (began >= 0).unsqueeze(-1)
        total = total - torch.where(inside, past, 0.0)
        number = number - torch.where(inside, index.to(y.dtype) + count, 0.0)
    hidden = carried.shape[-1]
    rows = total[-1].view(batch, -1, hidden).transpose(0, 1)
    after = torch.cat((rows, number[-1].expand(batch, hidden).unsqueeze(0)))
    return total / number, after


def activation_penalty(
    y: Float[Tensor, "T B W"], alpha: float, beta: float
) -> Float[Tensor, ""]:
    """alpha mean(y_t^2) + beta mean((y_t - y_{t-1})^2): activation and temporal
    activation regularisation (Merity et al. 2017)."""
    penalty = alpha * y.square().mean()
    if beta and len(y) > 1:
        penalty = penalty + beta * F.mse_loss(y[1:], y[:-1])
    return penalty
