"""M sequence models of one form, trained side by side: a population's arithmetic.

    stack = Stack(models, objective, ["adam", "sgd"], weight_decay=[0, 1e-4])
    done = stack.window(windows, state, lr, clip)  # one update of every model

Shapes: M models, N of them chosen, P parameters of one; K time steps, B columns, D
features, H units, S state rows, C outputs. The model comes first: [N, K, B, ...].

Each model has its own weights, data, rate, optimiser and clip, and becomes what
it would alone, under `torch.nn.utils.clip_grad_norm_` and `torch.optim`. The weights of
all lie in one matrix [M, P], and so do the gradients and the moments, so that clip and
optimiser are a few passes over matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Objective

MOMENTUM, BETA_1, BETA_2, EPSILON = 0.9, 0.9, 0.999, 1e-8  # torch.optim's


@dataclass(frozen=True)
class Form:
    """What the models of a stack have in common.

    `symbols` (0 for features) are embedded in `width` numbers. Of features, `dense`
    (None: no such layer) gives `width` numbers, with a ReLU.
    """

    cell: str
    layers: int
    symbols: int
    dense: int | None  # features that enter it
    width: int  # what enters the first layer
    hidden_size: int
    outputs: int

    @staticmethod
    def of(model: SequenceModel) -> "Form":
        """Raises ValueError for a model of other parts."""
        config, head = model.config, model.head
        plain = ModelConfig(
            config.cell, config.hidden_size, config.layers, config.embedding_size
        )
        if config != plain or config.cell not in GATES:
            raise ValueError(
                f"a stack cannot hold {config}, expected an lstm, gru or rnn with "
                "nothing else in it; train such a model alone"
            )
        encoder, symbols, dense = model.encoder, 0, None
        if isinstance(encoder, nn.Embedding):
            symbols = encoder.num_embeddings
        elif encoder is not None:
            (weight, _) = encoder.parameters()
            dense = weight.shape[1]
        return Form(
            config.cell,
            config.layers,
            symbols,
            dense,
            model.encoded,
            config.hidden_size,
            head.out_features,
        )

    @property
    def rows(self) -> int:
        """R: state rows of a layer."""
        return 2 if self.cell == "lstm" else 1

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters, in the order of the model's own: encoder; w_x, w_h, b_x
        and b_h of each layer; head."""
        gates, inputs = GATES[self.cell] * self.hidden_size, self.width
        shapes: list[tuple[int, ...]] = []
        if self.symbols:
            shapes += [(self.symbols, self.width)]
        elif self.dense is not None:
            shapes += [(self.width, self.dense), (self.width,)]
        for _ in range(self.layers):
            shapes += [(gates, inputs), (gates, self.hidden_size), (gates,), (gates,)]
            inputs = self.hidden_size
        return [*shapes, (self.outputs, self.hidden_size), (self.outputs,)]


GATES = {"lstm": 4, "gru": 3, "rnn": 1}


class Windows(NamedTuple):
    """A window of K steps of B streams for each of N models; see `Chunk`.

    | field  | shape          | meaning                                             |
    |--------|----------------|-----------------------------------------------------|
    | x      | [N, K, B]      | symbols; or features [N, K, B, D]                   |
    | y      | [N, K, B, ...] | targets                                             |
    | starts | [N, K, B] bool | a sequence begins here; None: none begins           |
    | mask   | [N, K, B] bool | a loss is due here; None: everywhere                |
    | scale  | [N]            | what the sum of the losses is divided by            |
    """

    x: Tensor
    y: Tensor
    starts: Tensor | None
    mask: Tensor | None
    scale: Tensor


class Done(NamedTuple):
    """What a window left behind.

    | field | shape        | meaning                                                 |
    |-------|--------------|---------------------------------------------------------|
    | loss  | [N]          | before the update                                       |
    | norm  | [N]          | of the gradient, before the clip                        |
    | state | [N, S, B, H] | after the last step                                     |
    | far   | [N]          | norm of the gradient of the state before the first step |
    | near  | [N]          | ... and in the middle; both NaN if not watched          |
    """

    loss: Tensor
    norm: Tensor
    state: Tensor
    far: Tensor
    near: Tensor


class Stack:
    """M models of one form, each with an optimiser (sgd, momentum, adam or adamw).

    The models are copied; `write` copies back. `weights`, `grads`, `first` and `second`
    are [M, P]: the weights, their last gradients (clipped, without weight decay), and
    the optimisers' moments; `updates` [M] counts updates. To go back to an earlier
    point, write into them.

    Raises ValueError if the models do not have one form.
    """

    def __init__(
        self,
        models: Sequence[SequenceModel],
        objective: Objective,
        optimizers: Sequence[str],
        weight_decay: Sequence[float | int],
    ) -> None:
        assert len(models) == len(optimizers) == len(weight_decay)
        forms = {Form.of(model) for model in models}
        if len(forms) != 1:
            raise ValueError(
                f"the models have {len(forms)} forms, expected one; make a stack of "
                "each form"
            )
        (self.form,) = forms
        self.objective = objective
        self.weights = torch.stack([_flat(model) for model in models])
        self.grads = torch.zeros_like(self.weights)
        self.first = torch.zeros_like(self.weights)
        self.second = torch.zeros_like(self.weights)
        self.rules = Rules.of(optimizers, weight_decay, self.weights.device)
        self.updates = torch.zeros_like(self.rules.keeps)

    def write(self, models: Sequence[SequenceModel]) -> None:
        """Copies the weights into M models."""
        with torch.no_grad():
            for row, model in zip(self.weights, models, strict=True):
                parts = self.parameters(row)
                for parameter, part in zip(model.parameters(), parts, strict=True):
                    parameter.copy_(part)

    def parameters(self, rows: Float[Tensor, "*N P"]) -> list[Tensor]:
        """The parameters [*N, ...] of a model, as views of `rows`."""
        shapes = self.form.shapes
        parts = torch.split(rows, [math.prod(shape) for shape in shapes], -1)
        return [p.unflatten(-1, s) for p, s in zip(parts, shapes, strict=True)]

    def initial_state(self, columns: int) -> Float[Tensor, "M S B H"]:
        """Zeros."""
        form = self.form
        return self.weights.new_zeros(
            len(self.weights), form.layers * form.rows, columns, form.hidden_size
        )

    def window(
        self,
        windows: Windows,
        state: Float[Tensor, "N S B H"],
        lr: Float[Tensor, "N"],
        clip: Float[Tensor, "N"],
        chosen: Int[Tensor, "N"] | None = None,
        active: Bool[Tensor, "N"] | None = None,
        watch: bool = False,
    ) -> Done:
        """One update each of the `chosen` models (None: all), to which the rows of
        everything else belong; where `active` does not hold, only the state goes on.

        loss = objective.total(out, y, mask) / scale
        """
        weights = self._of(self.weights, chosen).detach().requires_grad_()
        given, parts = state.detach(), [windows]
        if watch:
            assert windows.x.shape[1] > 1
            parts = _halves(windows)
            given.requires_grad_()
        outputs, states = [], [given]
        for part in parts:
            out, after = self._forward(weights, part, states[-1])
            outputs.append(out)
            states.append(after)
        loss = self._loss(torch.cat(outputs, 1), windows)
        watched = states[:2] if watch else []
        grad, *seen = torch.autograd.grad(loss.sum(), [weights, *watched])
        norm = torch.linalg.vector_norm(grad, dim=1)
        far, near = [_norms(d) for d in seen] or 2 * [torch.full_like(norm, math.nan)]
        grad *= (clip.to(grad) / (norm + 1e-6)).clamp(max=1.0)[:, None]
        self._update(grad, lr, chosen, active)
        return Done(loss.detach(), norm, states[-1].detach(), far, near)

    @torch.no_grad()
    def evaluate(
        self,
        windows: Windows,
        state: Float[Tensor, "N S B H"],
        chosen: Int[Tensor, "N"] | None = None,
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N S B H"]]:
        """The loss as in `window`, and the state after; nothing else changes."""
        out, after = self._forward(self._of(self.weights, chosen), windows, state)
        return self._loss(out, windows), after

    def _forward(
        self, weights: Float[Tensor, "N P"], windows: Windows, state: Tensor
    ) -> tuple[Float[Tensor, "N K B C"], Float[Tensor, "N S B H"]]:
        """`SequenceModel.forward` for N models."""
        form, x = self.form, windows.x
        *parameters, head, bias = self.parameters(weights)
        if form.symbols:
            table = parameters.pop(0)  # [N, V, E]
            rows = form.symbols * torch.arange(len(table), device=x.device)
            x = F.embedding(x + rows[:, None, None], table.flatten(0, 1))
        elif form.dense is not None:
            x = torch.relu(_linear(x, parameters.pop(0), parameters.pop(0)))
        afters = []
        for layer, before in enumerate(torch.split(state, form.rows, 1)):
            four = parameters[4 * layer : 4 * layer + 4]
            x, after = _layer(form.cell, x, before, windows.starts, *four)
            afters.append(after)
        return _linear(x, head, bias), torch.cat(afters, 1)

    def _loss(
        self, out: Float[Tensor, "N K B C"], windows: Windows
    ) -> Float[Tensor, "N"]:
        where = None if windows.mask is None else 0
        total = torch.vmap(self.objective.total, (0, 0, where))
        return total(out, windows.y, windows.mask) / windows.scale.to(out)

    def _of(self, rows: Tensor, chosen: Tensor | None) -> Tensor:
        return rows if chosen is None else rows[chosen]

    @torch.no_grad()
    def _update(
        self,
        grad: Float[Tensor, "N P"],
        lr: Float[Tensor, "N"],
        chosen: Tensor | None,
        active: Tensor | None,
    ) -> None:
        """One step of the optimisers, see `Rules`."""
        old = [self.weights, self.grads, self.first, self.second, self.updates]
        weights, _, first, second, updates = (self._of(m, chosen) for m in old)
        rules = Rules(*(self._of(rule, chosen) for rule in self.rules))

        def column(values: Tensor) -> Tensor:
            return values.to(weights.dtype)[:, None]

        rate, updates = lr.double(), updates + 1
        g = grad + column(rules.coupled) * weights
        m = column(rules.keeps) * first + column(rules.takes) * g
        v = BETA_2 * second + (1 - BETA_2) * g * g
        root = v.sqrt() / column((1 - BETA_2**updates).sqrt()) + EPSILON
        root = torch.where(rules.adaptive[:, None], root, 1.0)
        step = torch.where(rules.adaptive, rate / (1 - rules.keeps**updates), rate)
        w = column(1 - rate * rules.decoupled) * weights - column(step) * m / root
        for rows, new in zip(old, (w, grad, m, v, updates), strict=True):
            if active is not None:
                on = active.view(-1, *(1,) * (new.dim() - 1))
                new = torch.where(on, new, self._of(rows, chosen))
            if chosen is None:
                rows.copy_(new)
            else:
                rows[chosen] = new


class Rules(NamedTuple):
    """The optimisers of M models as one formula; [M] each, in float64.

    g ← g + coupled · w;  m ← keeps · m + takes · g;  v ← β₂ v + (1 - β₂) g²
    w ← (1 - lr · decoupled) · w - lr · m̂ / (√v̂ + ε), the hats as in Kingma & Ba 2015,
    algorithm 1, if adaptive (adam, adamw), else ... - lr · m (sgd, momentum).
    """

    adaptive: Tensor  # bool
    keeps: Tensor
    takes: Tensor
    coupled: Tensor
    decoupled: Tensor

    @staticmethod
    def of(
        optimizers: Sequence[str],
        weight_decay: Sequence[float | int],
        device: torch.device,
    ) -> "Rules":
        rows = []
        for name, decay in zip(optimizers, weight_decay, strict=True):
            adaptive = name in ("adam", "adamw")
            keeps = BETA_1 if adaptive else MOMENTUM if name == "momentum" else 0.0
            takes = 1 - BETA_1 if adaptive else 1.0
            coupled, decoupled = (0.0, decay) if name == "adamw" else (decay, 0.0)
            rows.append((adaptive, keeps, takes, coupled, decoupled))
        values = torch.tensor(rows, dtype=torch.float64, device=device)
        adaptive_column, *others = values.T.contiguous()
        return Rules(adaptive_column > 0, *others)


def _linear(
    x: Float[Tensor, "N K B D"], weight: Float[Tensor, "N C D"], bias: Tensor
) -> Float[Tensor, "N K B C"]:
    y = torch.baddbmm(bias[:, None], x.flatten(1, 2), weight.mT)
    return y.view(*x.shape[:3], -1)


def _layer(
    cell: str,
    x: Float[Tensor, "N K B D"],
    state: Float[Tensor, "N R B H"],
    starts: Bool[Tensor, "N K B"] | None,
    w_x: Float[Tensor, "N G D"],
    w_h: Float[Tensor, "N G H"],
    b_x: Float[Tensor, "N G"],
    b_h: Float[Tensor, "N G"],
) -> tuple[Float[Tensor, "N K B H"], Float[Tensor, "N R B H"]]:
    """`Recurrent.reference` for N layers: outputs, and the state after."""
    gates = _linear(x, w_x, b_x)
    h, c = state[:, 0], state[:, -1]
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            keep = (~starts[:, t]).to(x.dtype)[..., None]
            h, c = h * keep, c * keep
        products = torch.baddbmm(b_h[:, None], h, w_h.mT)
        if cell == "lstm":
            i, f, u, o = (gates[:, t] + products).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)
            h = torch.sigmoid(o) * torch.tanh(c)
        elif cell == "gru":
            x_r, x_z, x_n = gates[:, t].chunk(3, -1)
            h_r, h_z, h_n = products.chunk(3, -1)
            z = torch.sigmoid(x_z + h_z)
            n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
            h = n + z * (h - n)
        else:
            h = torch.tanh(gates[:, t] + products)
        outputs.append(h)
    last = [h, c] if cell == "lstm" else [h]
    return torch.stack(outputs, 1), torch.stack(last, 1)


def _halves(windows: Windows) -> list[Windows]:
    """The inputs of the first steps, and of the others."""
    x, starts = windows.x, windows.starts
    half = x.shape[1] // 2
    return [
        windows._replace(x=x[:, at], starts=None if starts is None else starts[:, at])
        for at in (slice(None, half), slice(half, None))
    ]


def _norms(gradients: Float[Tensor, "N S B H"]) -> Float[Tensor, "N"]:
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms


def _flat(model: SequenceModel) -> Float[Tensor, "P"]:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
