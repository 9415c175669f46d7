"""Truncated back-propagation through time, one decision interval at a time.

    signals = trainer.start()
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)

The trainer is the physics of the tuning environment: it spends a budget of tokens,
recovers from divergence whoever holds the knobs, and reads the device once per
interval. Its books are kept by `rlrnn.ledger`.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlrnn.control import Array, Knobs, Signals
from rlrnn.data.chunks import Chunk, Problem, Source
from rlrnn.evaluation import mean_loss, score
from rlrnn.fast import Fast
from rlrnn.graphs import Graphs
from rlrnn.ledger import FORWARD_COST, Ledger, Measured, TrainingConfig
from rlrnn.models import SequenceModel, activation_penalty
from rlrnn.optimizers import evaluation_weights, make_optimizer
from rlrnn.windows import cosine, graphs_of, learn, total_norm


class Trainer(Ledger):
    """One supervised run of a `SequenceModel` on a `Problem`.

    The model and the sources are expected on one device. All that is random is
    dropout, which draws from the generator of `seed`: the same model, data and knobs
    give the same bits on a CPU.

    Raises ValueError if the budget is too small for `config.decisions`.
    """

    def __init__(
        self,
        model: SequenceModel,
        problem: Problem,
        config: TrainingConfig,
        seed: int = 0,
    ) -> None:
        super().__init__(problem, config)
        self.model = model
        self.device = next(model.parameters()).device
        if model.config.bidirectional and not self.source.whole:
            raise ValueError(
                "model.bidirectional is true, but these data are streams without an "
                "end; it is for whole sequences"
            )
        self.generator = torch.Generator(self.device).manual_seed(seed % 2**63)
        model.seed(self.generator)
        self.parameters, self.groups = self._learning_parts()
        self.optimizer = make_optimizer(
            config.optimizer, self.groups, config.weight_decay
        )
        self.fast = self._make_fast()
        self.graphs = graphs_of(self)
        self.hidden = model.initial_state(self.batch)
        self.averaged = (
            [p.detach().clone() for p in self.parameters] if config.average else []
        )
        self.best: list[Tensor] = []  # weights of the lowest validation loss
        self.updates = 0
        self.valid_loss = math.nan  # the last, where it is measured
        self.best_valid = math.inf

    def _learning_parts(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """What learns, and the optimiser's groups: a part each, from the top down, the
        rate falling by `layer_decay`."""
        parts = self.model.parts()
        named = {"none": (), "encoder": ("encoder",)}.get(
            self.config.frozen, tuple(name for name, _ in parts if name != "head")
        )
        for name, parameters in parts:
            for parameter in parameters:
                parameter.requires_grad_(name not in named)
        learning = [parameters for name, parameters in parts if name not in named]
        scales = [self.config.layer_decay**i for i in range(len(learning))]
        groups: list[dict[str, Any]] = [
            {"params": parameters, "scale": scale}
            for parameters, scale in zip(reversed(learning), scales, strict=True)
            if parameters
        ]
        if self.config.layer_decay == 1 and not self.config.unfreeze:
            every = [p for parameters in learning for p in parameters]
            groups = [{"params": every, "scale": 1.0}]
        return [p for parameters in learning for p in parameters], groups

    def _make_fast(self) -> Fast | None:
        """The quick way to train on a window of a stream, for a model and a training
        without options; None for others."""
        config, objective = self.config, self.problem.objective
        others = config.ar, config.tar, config.unfreeze, config.decay_probe
        if self.source.whole or any(others) or config.accumulate > 1:
            return None
        if config.precision != "float32":
            return None
        if config.layer_decay != 1 or not Fast.suits(
            self.model, objective, config.optimizer
        ):
            return None
        given = self.model, objective, self.optimizer
        return Fast(*given, config.optimizer, config.weight_decay)

    def _unfreeze(self) -> None:
        """Lets the layers learn whose turn has come."""
        if not self.config.unfreeze:
            return
        progress = (self.spent - self.origin) / (self.budget - self.origin)
        due = 1 + int(progress / self.config.unfreeze * len(self.groups))
        for number, group in enumerate(self.groups):
            for parameter in group["params"]:
                parameter.requires_grad_(number < due)
                if number >= due:
                    parameter.grad = None

    def start(self, range_test: bool = False) -> Signals:
        """The signals before the first decision."""
        probe = float(self._probe())
        return self.begin(probe, self._range_test() if range_test else None)

    def step(self, knobs: Knobs) -> Signals:
        """One decision interval under `knobs` (arrays of length 1).

        The truncation is capped so that the interval holds 4 windows. If the interval
        diverges (anything non-finite, or a mean loss 6 standard deviations above the
        usual one) weights, optimiser and hidden state are restored, and all later
        rates are halved; data position and budget go on. Raises RuntimeError if the
        run is done.
        """
        if self.done:
            raise RuntimeError("the run is done: its budget is spent or it has failed")
        interval = self.plan(knobs)
        self._unfreeze()
        snapshot = self._snapshot()
        seen = _Seen()
        last = len(interval.spans) - 1
        for number, steps in enumerate(interval.spans):
            chunk = self.next_chunk(steps)
            if chunk.due == 0:
                self._read_on(chunk)
                continue
            self._set_lr(float(interval.rates[number]))
            if self.fast is not None:
                self._train_at_once(self.fast, chunk, seen, last - number)
            elif self.graphs is not None:
                self._train_captured(self.graphs, chunk, seen, last - number)
            else:
                self._train(chunk, interval.truncation, seen, last - number)
        if len(seen.losses) % self.config.accumulate:
            self._close(interval.spans[-1], seen)
        seen.watched["update_ratio"] = self._update_ratio(snapshot)
        signals = self.settle(interval, seen.read(self._probe()))
        if signals.recovered[0]:
            self._restore(snapshot)
        elif self.config.select == "valid":
            self._select()
        return signals

    @torch.no_grad()
    def _read_on(self, chunk: Chunk) -> None:
        """Nothing to learn: only the state of a stream goes on."""
        if self.source.whole:
            return
        _, self.hidden = self.model(chunk.x, self.hidden, chunk.starts)

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]

    def _train(
        self,
        chunk: Chunk,
        truncation: int,
        seen: "_Seen",
        following: int,
    ) -> None:
        """One window: its gradient, and, each `accumulate` windows, an update.
        `following` windows of the interval are left."""
        every = self.config.accumulate
        if len(seen.losses) % every == 0:
            # before the last full update, and before one of what is left over
            if seen.losses and following < 2 * every - 1:
                seen.before[:] = self._gradients()
            self.optimizer.zero_grad(set_to_none=True)
        if following == 0 and watchable(self.source, len(chunk.x)):
            loss, watched = self._watched_gradient(chunk)
            seen.watched.update(watched)
        else:
            loss = self._gradient(chunk, truncation)
        seen.losses.append(loss)
        seen.due.append(chunk.due)
        if len(seen.losses) % every == 0:
            self._close(len(chunk.x), seen)

    def _close(self, steps: int, seen: "_Seen") -> None:
        """The update of the windows so far. `grad_cosine` is that of an interval's last
        two updates: of the mean gradients of their windows."""
        if seen.before:
            seen.watched["grad_cosine"] = cosine(seen.before, self._gradients())
        seen.norms.append(self._update(steps))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    def _train_at_once(
        self, fast: Fast, chunk: Chunk, seen: "_Seen", following: int
    ) -> None:
        """`_train` in one call; `following` windows of the interval are left."""
        last, steps = following == 0, len(chunk.x)
        watch = last and watchable(self.source, steps)
        # of the last two windows that learn; with a mask it is not known which they are
        keep = following < 2 or chunk.mask is not None
        before = fast.gradients() if last and seen.losses else []
        carried, lr = self.hidden, float(self.optimizer.param_groups[0]["lr"])
        done = fast.window(chunk, carried, lr, self.config.clip, watch, keep)
        loss, self.hidden = done.loss[0], done.state[0]
        seen.losses.append(loss)
        seen.due.append(chunk.due)
        seen.norms.append(done.norm[0])
        if watch:
            ends = done.far[0], done.near[0], carried.norm()
            seen.watched.update(fading(*ends, loss, steps))
        if before:
            seen.watched["grad_cosine"] = cosine(before, fast.gradients())
        self._count_update(steps)

    def _train_captured(
        self, graphs: Graphs, chunk: Chunk, seen: "_Seen", following: int
    ) -> None:
        """`_train` as a graph on the device; `following` windows are left."""
        last, steps = following == 0, len(chunk.x)
        watch = last and watchable(self.source, steps)
        # of the last two windows that learn; with a mask it is not known which they are
        keep = not last and (following == 1 or chunk.mask is not None)
        before = seen.before if last else []
        done = learn(graphs, self, chunk, watch, keep, before)
        self.hidden = done.hidden
        seen.losses.append(done.loss)
        seen.due.append(chunk.due)
        seen.norms.append(done.norm)
        seen.watched.update(done.watched)
        seen.before[:] = done.gradients
        self._count_update(steps)

    @property
    def drops(self) -> bool:
        """Whether training draws random numbers."""
        config = self.model.config
        return any((config.dropout, config.input_dropout, config.weight_drop))

    def _gradient(self, chunk: Chunk, truncation: int) -> Tensor:
        """Adds one window's gradient; its loss. Whole sequences begin at zero, and
        their state is detached each `truncation` steps; the longest truncation cuts
        none, however long it is."""
        state, cuts = self.hidden, [len(chunk.x)]
        if self.source.whole:
            state = self.model.initial_state(chunk.x.shape[1])
            if not self.model.config.bidirectional and truncation < self._longest():
                cuts = list(range(truncation, len(chunk.x), truncation)) + cuts
        parts, penalty, begin = [], state.new_zeros(()), 0
        # a window's pieces have one dropout mask; a graph, without pieces, may not ask
        masks = self.generator.get_state() if len(cuts) > 1 else None
        for cut in cuts:
            if masks is not None:
                self.generator.set_state(masks)
            starts = None if chunk.starts is None else chunk.starts[begin:cut]
            y, out, state = self._read(chunk.x[begin:cut], state.detach(), starts)
            parts.append(out)
            if self.config.ar or self.config.tar:
                share = (cut - begin) / len(chunk.x)
                alpha, beta = self.config.ar, self.config.tar
                penalty = penalty + share * activation_penalty(y, alpha, beta)
            begin = cut
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        loss = self._loss(out, chunk)
        self._backward(loss + penalty)
        if not self.source.whole:
            self.hidden = state.detach()
        return loss.detach()

    def _read(
        self, x: Tensor, state: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`model.read` in the precision of the training; outputs in the weights'."""
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            y, out, state = self.model.read(x, state, starts)
        return y, out.to(state.dtype), state

    def _loss(self, out: Tensor, chunk: Chunk) -> Tensor:
        total = self.problem.objective.total(out, chunk.y, chunk.mask)
        return total / chunk.scale

    def _backward(self, loss: Tensor) -> None:
        (loss / self.config.accumulate).backward()  # type: ignore[no-untyped-call]

    def _watched_gradient(self, chunk: Chunk) -> tuple[Tensor, dict[str, Tensor]]:
        """`_gradient` of a window of a stream, cut in the middle to see how the
        gradient fades going back."""
        steps = len(chunk.x)
        half = steps // 2
        carried = self.hidden.requires_grad_()
        halves: tuple[Any, Any] = (None, None)
        if chunk.starts is not None:
            halves = chunk.starts[:half], chunk.starts[half:]
        masks = self.generator.get_state() if self.drops else None
        y_1, first, middle = self._read(chunk.x[:half], carried, halves[0])
        middle.retain_grad()
        if masks is not None:
            self.generator.set_state(masks)  # the same ones for the second half
        y_2, second, state = self._read(chunk.x[half:], middle, halves[1])
        decay = self._decay(second, chunk, carried, middle)
        loss = self._loss(torch.cat((first, second)), chunk)
        penalty = loss.new_zeros(())
        if self.config.ar or self.config.tar:
            y = torch.cat((y_1, y_2))
            penalty = activation_penalty(y, self.config.ar, self.config.tar)
        self._backward(loss + penalty)
        self.hidden = state.detach()
        assert carried.grad is not None and middle.grad is not None
        every = self.config.accumulate
        watched = fading(
            every * carried.grad.norm(),
            every * middle.grad.norm(),
            carried.detach().norm(),
            loss.detach(),
            steps,
        )
        return loss.detach(), watched | decay

    def _decay(
        self, later: Tensor, chunk: Chunk, carried: Tensor, middle: Tensor
    ) -> dict[str, Tensor]:
        """`grad_decay` of a window's later losses alone, through its first half; zero
        if none is due there. Nothing if it is not asked for.

        The gradient of all losses does not fade to begin with: those of the first half
        add to it on the way.
        """
        if not self.config.decay_probe:
            return {}
        half = len(chunk.x) - len(later)
        mask = None if chunk.mask is None else chunk.mask[half:]
        total = self.problem.objective.total(later, chunk.y[half:], mask)
        grads = torch.autograd.grad(total, (carried, middle), retain_graph=True)
        self.spent += (1 - FORWARD_COST) * len(chunk.x) * self.batch
        tiny = torch.finfo(total.dtype).tiny
        far, near = ((grad.norm() + tiny).log() for grad in grads)
        return {"grad_decay": (near - far) / half}

    def _update(self, steps: int) -> Tensor:
        """Clips, and moves the weights; the gradient's norm before, on the device."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self._count_update(steps)
        return norm

    def _count_update(self, steps: int) -> None:
        """And averages the weights."""
        self.updates += 1
        if self.averaged:
            # A time constant in tokens, so that K does not change it; at first the
            # plain mean, which forgets the initial weights.
            tokens = steps * self.batch * self.config.accumulate
            weight = tokens / (self.config.average * self.budget)
            weight = min(1.0, max(weight, 1 / (self.updates + 1)))
            torch._foreach_lerp_(
                self.averaged, [p.detach() for p in self.parameters], weight
            )

    def _probe(self) -> Tensor:
        self.spent += self._probe_cost
        with self._holding(evaluation_weights(self.optimizer, self.parameters)):
            return self._mean_loss("probe", self.probe_steps)

    def _mean_loss(self, split: str, steps: int) -> Tensor:
        source = getattr(self.problem, split)
        return mean_loss(self.model, self.problem.objective, source, steps)

    def _update_ratio(self, snapshot: "_Snapshot") -> Tensor:
        with torch.no_grad():
            change = [
                p - old
                for p, old in zip(self.parameters, snapshot.weights, strict=True)
            ]
            return total_norm(change) / total_norm(snapshot.weights)

    # --- the weights that are kept --------------------------------------------------

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that the run is for: the best ones, the
        averaged ones, or the last."""
        with self._holding(self.best or self._latest()):
            yield

    def _latest(self) -> list[Tensor]:
        """Averaged weights, ours or the optimiser's own; nothing without an average."""
        return self.averaged or evaluation_weights(self.optimizer, self.parameters)

    @contextmanager
    def _holding(self, weights: list[Tensor]) -> Iterator[None]:
        """Inside, the model has these weights, or its own if there are none."""
        if not weights:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        self._load_weights(weights)
        try:
            yield
        finally:
            self._load_weights(current)

    def score(self, split: str) -> dict[str, float]:
        """The metrics of a part (valid or test) under these weights; not charged to
        the budget."""
        with self.kept_weights():
            return score(self.model, self.problem, split)

    def _load_weights(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights, strict=True):
                parameter.copy_(value)

    def _select(self) -> None:
        """Keeps the weights if they are the best on the validation part so far."""
        candidate = self._latest() or [p.detach().clone() for p in self.parameters]
        with self._holding(candidate):
            self.valid_loss = float(self._mean_loss("valid", self.problem.valid.length))
        self.waited += 1
        if self.valid_loss < self.best_valid:
            self.best_valid, self.waited = self.valid_loss, 0
            self.best = [p.clone() for p in candidate]

    # --- recovery -------------------------------------------------------------------

    def _snapshot(self) -> "_Snapshot":
        return _Snapshot(
            [p.detach().clone() for p in self.parameters],
            copy.deepcopy(self.optimizer.state_dict()),
            self.hidden.detach().clone(),
            [p.clone() for p in self.averaged],
            self.updates,
        )

    def _restore(self, snapshot: "_Snapshot") -> None:
        self._load_weights(snapshot.weights)
        self.optimizer.load_state_dict(snapshot.optimizer)
        self.hidden = snapshot.hidden
        self.averaged = snapshot.averaged
        self.updates = snapshot.updates

    # --- range test -----------------------------------------------------------------

    def _range_test(self) -> tuple[Array, Array, int]:
        """Rates, losses and K of a sweep. Then weights, optimiser and hidden state are
        restored; the tokens are spent."""
        rates, truncation = self.range_plan()
        snapshot = self._snapshot()
        losses = []
        for lr in rates:
            self._set_lr(float(lr))
            steps = self.source.span(self.position, truncation)
            chunk = self.next_chunk(steps)
            if chunk.due == 0:
                self._read_on(chunk)
                losses.append(torch.full_like(snapshot.weights[0].sum(), math.nan))
                continue
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._gradient(chunk, max(truncation, steps))
            self._update(steps)
            losses.append(loss / chunk.due)
        self._restore(snapshot)
        return rates, torch.stack(losses).double().cpu().numpy(), truncation

    # --- resuming -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on to the same bits."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "hidden": self.hidden.detach(),
            "averaged": self.averaged,
            "best": self.best,
            "generator": self.generator.get_state(),
            "numbers": {name: getattr(self, name) for name in self._kept()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hidden = state["hidden"].to(self.device)
        self.averaged = [p.to(self.device) for p in state["averaged"]]
        self.best = [p.to(self.device) for p in state["best"]]
        self.generator.set_state(state["generator"].cpu())
        for name in self._kept():
            setattr(self, name, state["numbers"][name])

    def _kept(self) -> tuple[str, ...]:
        return (*self.NUMBERS, "updates", "valid_loss", "best_valid")


@dataclass(frozen=True)
class _Snapshot:
    weights: list[Tensor]
    optimizer: dict[str, Any]
    hidden: Tensor
    averaged: list[Tensor]
    updates: int


@dataclass(frozen=True)
class _Seen:
    """What the windows of an interval gave, on the device; `due` is on the host."""

    losses: list[Tensor] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)  # one per update
    watched: dict[str, Tensor] = field(default_factory=dict)
    before: list[Tensor] = field(default_factory=list)  # gradients of the last update

    def read(self, probe: Tensor) -> Measured:
        """The one copy to the host of an interval."""
        watched = list(self.watched.values())
        stacked = torch.stack([probe, *watched, *self.losses, *self.norms])
        numbers = stacked.double().cpu().numpy()
        ends = np.cumsum([1, len(watched), len(self.losses)])
        (first,), values, losses, norms = np.split(numbers, ends)
        due = np.array(self.due)
        named = dict(zip(self.watched, map(float, values), strict=True))
        return Measured(float(first), losses / due, due, norms, named)


def watchable(source: Source, steps: int) -> bool:
    """Whether a window can be cut in the middle, to see how the gradient fades."""
    return not source.whole and steps > 1


def fading(
    far: Tensor, near: Tensor, carried: Tensor, loss: Tensor, steps: int
) -> dict[str, Tensor]:
    """How the gradient of a window's loss fades going back: from its norms at the
    state before the first step (`far`) and in the middle (`near`), and the norm of that
    first state."""
    tiny = torch.finfo(loss.dtype).tiny
    far, near = far + tiny, near + tiny
    # Per-step quantities: the loss is a mean over the window's steps.
    carried_grad = far * carried * steps / (loss.abs() + tiny)
    return {
        "carried_grad": carried_grad.clamp(1e-6, 1e6),
        "grad_decay": (near.log() - far.log()) / (steps // 2),
    }
