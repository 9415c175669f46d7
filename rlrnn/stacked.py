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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlrnn import compiled, kernels, kernels_stacked
from rlrnn.models import ModelConfig, SequenceModel
from rlrnn.objectives import Numbers, Objective
from rlrnn.recurrent import compiles, fuses

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

    @staticmethod
    def fits(model: SequenceModel) -> bool:
        """Whether a stack can hold such a model."""
        try:
            Form.of(model)
        except ValueError:
            return False
        return True

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
    | near  | [N]          | ... and in the middle                                   |

    `far` and `near` are NaN if not watched; all norms where nothing was updated.
    """

    loss: Tensor
    norm: Tensor
    state: Tensor
    far: Tensor
    near: Tensor


class Stack:
    """M models of one form, each with an optimiser (sgd, momentum, adam or adamw).

    The models are copied; `write` copies back. `weights`, `grads`, `first` and `second`
    are [M, P]: the weights, the gradients that were kept, and the optimisers' moments;
    `updates` [M] counts updates. To go back to an earlier point, write into them.

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
        self._works: dict[tuple[int, int], list[kernels_stacked.Work]] = {}

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
        return [p.view(*p.shape[:-1], *s) for p, s in zip(parts, shapes, strict=True)]

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
        keep: bool = False,
    ) -> Done:
        """One update each of the `chosen` models (None: all), to which the rows of
        everything else belong; where `active` does not hold, only the state goes on.

        loss = objective.total(out, y, mask) / scale. `watch`: see `Done`; the window
        has at least two steps. `keep`: the gradients, before the clip, in `grads`.
        """
        way = self._run if self._compiles() else self.reference
        return way(windows, state, lr, clip, chosen, active, watch, keep)

    def reference(
        self,
        windows: Windows,
        state: Float[Tensor, "N S B H"],
        lr: Float[Tensor, "N"],
        clip: Float[Tensor, "N"],
        chosen: Int[Tensor, "N"] | None = None,
        active: Bool[Tensor, "N"] | None = None,
        watch: bool = False,
        keep: bool = False,
    ) -> Done:
        """`window` by torch's autograd."""
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
        nothing = torch.full_like(norm, math.nan)
        far, near = [_norms(d) for d in seen] or [nothing, nothing]
        if keep:
            self._put(self.grads, grad, chosen, active)
        grad = grad * (clip.to(grad) / (norm + 1e-6)).clamp(max=1.0)[:, None]
        self._update(grad, lr, chosen, active)
        norms = [norm, far, near]
        if active is not None:
            norms = [torch.where(active, each, nothing) for each in norms]
        return Done(loss.detach(), norms[0], states[-1].detach(), *norms[1:])

    @torch.no_grad()
    def evaluate(
        self,
        windows: Windows,
        state: Float[Tensor, "N S B H"],
        chosen: Int[Tensor, "N"] | None = None,
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N S B H"]]:
        """The loss as in `window`, and the state after; nothing else changes."""
        if self._compiles():
            done = self._run(windows, state, chosen=chosen)
            return done.loss, done.state
        return self.reference_evaluate(windows, state, chosen)

    @torch.no_grad()
    def reference_evaluate(
        self,
        windows: Windows,
        state: Float[Tensor, "N S B H"],
        chosen: Int[Tensor, "N"] | None = None,
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N S B H"]]:
        """`evaluate` by torch."""
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

    def _run(
        self,
        windows: Windows,
        state: Tensor,
        lr: Tensor | None = None,
        clip: Tensor | None = None,
        chosen: Tensor | None = None,
        active: Tensor | None = None,
        watch: bool = False,
        keep: bool = False,
    ) -> Done:
        """`window`, and without rates `evaluate`, by `rlrnn.kernels_stacked`; as many
        models at once as there are threads."""
        form, like = self.form, self.weights
        count, steps, columns = windows.x.shape[:3]
        loss = _compiled_loss(self.objective)
        assert loss is not None
        positions = steps * columns
        inputs = windows.x.reshape(count, positions, -1)
        targets = windows.y.reshape(count, positions, -1)
        values = windows.y.is_floating_point()
        indices = torch.empty(count, 0, dtype=torch.int64)
        numbers = like.new_empty(count, 0, 0)
        starts = windows.starts
        if starts is None:
            starts = torch.zeros(windows.x.shape[:3], dtype=torch.bool)
        mask = windows.mask
        if mask is None:
            mask = torch.empty(count, 0, dtype=torch.bool)
        data = kernels_stacked.Data(
            symbols=_array(inputs[..., 0] if form.symbols else indices),
            features=_array(numbers if form.symbols else inputs.to(like)),
            classes=_array(indices if values else targets[..., 0]),
            values=_array(targets.to(like) if values else numbers),
            starts=_array(starts),
            mask=_array(mask.reshape(count, -1)),
            scale=_array(windows.scale.double()),
            state=_array(state.to(like)),
        )
        everyone = torch.arange(count)
        ones = torch.ones(count, dtype=torch.float64)
        learning = kernels_stacked.Learning(
            rows=_array(everyone if chosen is None else chosen),
            active=_array(ones.bool() if active is None else active),
            lr=_array(ones if lr is None else lr.double()),
            clip=_array(ones if clip is None else clip.double()),
            weights=self.weights.numpy(),
            grads=self.grads.numpy() if keep else self.grads[:0].numpy(),
            first=self.first.numpy(),
            second=self.second.numpy(),
            updates=self.updates.numpy(),
            **{name: _array(rule) for name, rule in self.rules._asdict().items()},
        )
        figures = torch.full((4, count), math.nan, dtype=torch.float64)
        after = torch.empty_like(state, memory_format=torch.contiguous_format)
        results = kernels_stacked.Results._make([*figures.numpy(), after.numpy()])
        sizes = kernels_stacked.Sizes(
            kernels_stacked.CELLS.index(form.cell),
            form.layers,
            form.symbols,
            form.dense or 0,
            form.width,
            form.hidden_size,
            form.outputs,
            loss,
            kernels.panel_width(data.state.dtype),
            steps // 2 if watch else 0,
        )
        threads = min(compiled.threads(), count)
        works = self._works.setdefault((steps, columns), [])
        while len(works) < threads:
            works.append(kernels_stacked.work(sizes, form.shapes, data))
        size = max(1, count // (4 * threads))
        turns = iter(range(0, count, size))

        given = lr is not None, sizes, data, learning, results
        job = partial(_take_turns, turns, size, count, given, works)
        compiled.in_parallel(job, threads, threads)
        if not watch:
            figures[2:] = math.nan
        losses, *norms = figures.to(like)
        return Done(losses, norms[0], after, *norms[1:])

    def _compiles(self) -> bool:
        """Whether `rlrnn.kernels_stacked` work here."""
        return compiles(self.weights) and has_kernel(self.objective)

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
        old = [self.weights, self.first, self.second, self.updates]
        weights, first, second, updates = (self._of(m, chosen) for m in old)
        rules = Rules(*(self._of(rule, chosen) for rule in self.rules))
        rate, updates = lr.double(), updates + 1
        g = grad + _column(rules.coupled, weights) * weights
        m = _column(rules.keeps, weights) * first + _column(rules.takes, weights) * g
        v = BETA_2 * second + (1 - BETA_2) * g * g
        v = torch.where(rules.adaptive[:, None], v, second)
        root = v.sqrt() / _column((1 - BETA_2**updates).sqrt(), weights) + EPSILON
        root = torch.where(rules.adaptive[:, None], root, 1.0)
        step = torch.where(rules.adaptive, rate / (1 - rules.keeps**updates), rate)
        kept = _column(1 - rate * rules.decoupled, weights)
        w = kept * weights - _column(step, weights) * m / root
        for rows, new in zip(old, (w, m, v, updates), strict=True):
            self._put(rows, new, chosen, active)

    def _put(
        self, rows: Tensor, new: Tensor, chosen: Tensor | None, active: Tensor | None
    ) -> None:
        """Writes those that are active into the rows of those chosen."""
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
    if fuses(x):
        return _fused_layer(cell, x, state, starts, w_x, w_h, b_x, b_h)
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


def _fused_layer(
    cell: str,
    x: Tensor,
    state: Tensor,
    starts: Tensor | None,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor,
    b_h: Tensor,
) -> tuple[Tensor, Tensor]:
    """`_layer` on CUDA: one launch for all steps of all models."""
    from rlrnn import kernels_cuda

    if starts is None:
        starts = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
    bias, b_n = b_x + b_h, b_h
    if cell == "gru":  # the candidate's own bias is behind the reset gate
        size = w_h.shape[2]
        bias = torch.cat((bias[:, : 2 * size], b_x[:, 2 * size :]), 1)
        b_n = b_h[:, 2 * size :]
    given = starts, _linear(x, w_x, bias), state, w_h, b_n
    y, last = kernels_cuda.Recurrence.apply(cell, *given)  # type: ignore[no-untyped-call]
    return y, last


def has_kernel(objective: Objective) -> bool:
    """Whether `rlrnn.kernels_stacked` know its loss."""
    return _compiled_loss(objective) is not None


def _compiled_loss(objective: Objective) -> int | None:
    """Its place in `kernels_stacked.LOSSES`; None for another."""
    name = type(objective).__name__.lower()
    if isinstance(objective, Numbers):
        name = objective.loss
    names = kernels_stacked.LOSSES
    return names.index(name) if name in names else None


def _take_turns(
    turns: Iterator[int],
    size: int,
    count: int,
    given: tuple[Any, ...],
    works: list[kernels_stacked.Work],
    thread: int,
) -> None:
    """A thread's part of `Stack._run`: whoever is free takes the next models."""
    for begin in turns:
        kernels_stacked.run(begin, min(begin + size, count), *given, works[thread])


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _halves(windows: Windows) -> list[Windows]:
    """The inputs of the first steps, and of the others."""
    x, starts = windows.x, windows.starts
    half = x.shape[1] // 2
    return [
        windows._replace(x=x[:, at], starts=None if starts is None else starts[:, at])
        for at in (slice(None, half), slice(half, None))
    ]


def _column(values: Float[Tensor, "N"], like: Tensor) -> Float[Tensor, "N 1"]:
    return values.to(like.dtype)[:, None]


def _norms(gradients: Float[Tensor, "N S B H"]) -> Float[Tensor, "N"]:
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms


def _flat(model: SequenceModel) -> Float[Tensor, "P"]:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
