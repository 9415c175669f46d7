"""Truncated back-propagation through time, one decision interval at a time.

    signals = trainer.start()
    while not trainer.done:
        knobs, state = controller(signals, state)
        signals = trainer.step(knobs)

The trainer is the physics of the tuning environment: it spends a budget of tokens (one
token is one step of one stream; forward only counts a third), recovers from
divergence whoever holds the knobs, and reads the device once per interval.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlrnn.checks import at_least, one_of, share
from rlrnn.control import TRUNCATION_BOUNDS, Array, Knobs, Signals
from rlrnn.data.chunks import Chunk, Problem
from rlrnn.evaluation import mean_loss, score
from rlrnn.models import SequenceModel, activation_penalty
from rlrnn.rangetest import suggest_lambda

Optimizer = Literal["sgd", "momentum", "adam", "adamw"]
Select = Literal["last", "valid"]
Frozen = Literal["none", "encoder", "core"]

FORWARD_COST = 1 / 3  # of a token that is also trained on
WINDOWS = 4  # the fewest in a decision interval
GIVE_UP = 3  # recoveries in a row


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        budget: tokens to spend, on training, probing, range test and all.
        optimizer: sgd, momentum (0.9), adam or adamw.
        weight_decay: decoupled for adamw, an L2 penalty for the others.
        clip: the gradient norm above which gradients are scaled down.
        decisions: intervals that a controller decides on; a sixth of them lie in the
            first 5 % of the budget.
        probe_share: of the budget, spent on watching the probe loss.
        range_test_share: of the budget, spent on a range test if one is asked for.
        epochs: passes over the training part, in place of a budget in tokens.
        accumulate: windows whose gradients make one update.
        average: share of the budget over which weights are averaged (an exponential
            moving average with that time constant); 0 for none.
        ar: weight of the squared outputs of the last layer (activation
            regularisation), and
        tar: of their squared changes from step to step (temporal; Merity et al. 2017).
        select: the weights that are kept: the last, or those of the decision with the
            lowest validation loss (measured after each, outside the budget).
        frozen: parts that never learn: encoder, or core (encoder and layers).
        unfreeze: share of the budget over which layers begin to learn, one after the
            other, from the head down (Howard & Ruder 2018); 0: all learn at once.
        layer_decay: the rate of a layer is this times that of the one above it (the
            same).
        patience: decisions without a lower validation loss after which training ends.
    """

    budget: float = 1_000_000.0
    optimizer: Optimizer = "adam"
    weight_decay: float = 0.0
    clip: float = 1.0
    decisions: int = 24
    probe_share: float = 0.02
    range_test_share: float = 0.04
    epochs: float | None = None
    accumulate: int = 1
    average: float = 0.0
    ar: float = 0.0
    tar: float = 0.0
    frozen: Frozen = "none"
    unfreeze: float = 0.0
    layer_decay: float = 1.0
    select: Select = "last"
    patience: int | None = None

    def __post_init__(self) -> None:
        one_of("optimizer", self.optimizer, Optimizer)
        one_of("select", self.select, Select)
        one_of("frozen", self.frozen, Frozen)
        if not self.budget >= 1:
            raise ValueError(f"budget is {self.budget}, expected at least 1 token")
        for name in ("clip", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a number above 0")
        at_least("decisions", self.decisions, 6)
        at_least("accumulate", self.accumulate, 1)
        for name in ("weight_decay", "ar", "tar"):
            at_least(name, getattr(self, name), 0)
        for name in ("average", "unfreeze"):
            share(name, getattr(self, name))
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"layer_decay is {self.layer_decay}, expected above 0 and at most 1"
            )
        if self.patience is not None:
            at_least("patience", self.patience, 1)
            if self.select != "valid":
                raise ValueError(
                    f"patience is {self.patience}, but select is {self.select!r}: "
                    "expected select valid"
                )
        for name in ("probe_share", "range_test_share"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected between 0 and 0.5"
                )

    def boundary(self, decision: int) -> float:
        """The share of the budget that is spent when this decision's turn comes."""
        early = self.decisions // 6
        if decision <= early:
            return 0.05 * decision / early
        return 0.05 + 0.95 * (decision - early) / (self.decisions - early)

    @property
    def power(self) -> float:
        """p of lr = lambda K^p."""
        return 0.5 if self.optimizer.startswith("adam") else 1.0


class Trainer:
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
        self.model = model
        self.problem = problem
        self.config = config
        self.device = next(model.parameters()).device
        self.source = problem.train
        self.batch = self.source.batch
        if model.config.bidirectional and not self.source.whole:
            raise ValueError(
                "model.bidirectional is true, but these data are streams without an "
                "end; it is for whole sequences"
            )
        self.budget = config.budget
        if config.epochs is not None:
            tokens = config.epochs * self.source.length * self.batch
            self.budget = tokens / (1 - config.probe_share)
        self.generator = torch.Generator(self.device).manual_seed(seed % 2**63)
        model.seed(self.generator)
        self.parameters, self.groups = self._learning_parts()
        self.optimizer = self._make_optimizer()
        self.hidden = model.initial_state(self.batch)
        self.averaged = (
            [p.detach().clone() for p in self.parameters] if config.average else []
        )
        self.best: list[Tensor] = []  # weights of the lowest validation loss
        self.position = 0  # of the next window, in time steps
        self.spent = 0.0  # tokens
        self.origin = 0.0  # tokens spent before the first decision
        self.decision = 0
        self.lr_scale = 1.0
        self.ceiling = math.inf  # no raises above it for two decisions after a recovery
        self.held = 0
        self.failures = 0  # recoveries in a row
        self.usual_loss = math.nan
        self.usual_noise = math.nan
        self.last_probe = math.nan
        self.range_lr = math.nan
        self.updates = 0
        self.valid_loss = math.nan  # the last, where it is measured
        self.best_valid = math.inf
        self.waited = 0  # decisions since then
        probes = self.budget * config.probe_share / FORWARD_COST
        per_probe = probes / (config.decisions + 1) / problem.probe.batch
        self.probe_steps = int(min(max(per_probe, 32), problem.probe.length))
        self._check_budget()

    def _check_budget(self) -> None:
        shortest = self.source.typical(TRUNCATION_BOUNDS[0])
        least = 1.1 * self._fewest * shortest * self.batch + self._probe_cost
        first = self.config.boundary(1)
        if self.budget * first >= least:
            return
        needed = math.ceil(least / first)
        given, more = f"budget is {self.budget:.0f} tokens", "raise the budget"
        if self.config.epochs is not None:
            given = f"epochs is {self.config.epochs:g}, {self.budget:.0f} tokens"
            more = "raise the epochs"
        raise ValueError(
            f"{given}, expected at least {needed} tokens for {self.batch} streams and "
            f"{self.config.decisions} decisions; {more}, or lower the streams or the "
            "decisions"
        )

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

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # fused: the step count stays on the device, and nothing is read back
        decay = self.config.weight_decay
        match self.config.optimizer:
            case "adam":
                return torch.optim.Adam(self.groups, fused=True, weight_decay=decay)
            case "adamw":
                return torch.optim.AdamW(self.groups, fused=True, weight_decay=decay)
            case name:
                momentum = 0.9 if name == "momentum" else 0.0
                return torch.optim.SGD(
                    self.groups,
                    lr=1e-3,
                    fused=True,
                    momentum=momentum,
                    weight_decay=decay,
                )

    @property
    def done(self) -> bool:
        """Whether the budget is spent, the run has failed, or patience has ended."""
        patience = self.config.patience
        return (
            self.decision >= self.config.decisions
            or self.failures >= GIVE_UP
            or (patience is not None and self.waited >= patience)
        )

    @property
    def _fewest(self) -> int:
        """Windows in a decision interval. Whole sequences may be long and few."""
        return 1 if self.source.whole else WINDOWS

    @property
    def _probe_cost(self) -> float:
        return FORWARD_COST * self.probe_steps * self.problem.probe.batch

    def _room(self) -> float:
        """Time steps that the next interval has room for."""
        share = self.config.boundary(self.decision + 1)
        end = self.origin + share * (self.budget - self.origin)
        return max(0.0, end - self.spent - self._probe_cost) / self.batch

    def _longest(self) -> int:
        """The longest K, a power of two, of which the next interval holds 4 windows;
        for whole sequences, the K that cuts none."""
        shortest, longest = TRUNCATION_BOUNDS
        if self.source.whole:
            steps = max(float(shortest), self.source.typical(longest))
            return int(min(longest, 2 ** math.ceil(math.log2(2 * steps))))
        room = max(float(shortest), self._room() / WINDOWS)
        return int(min(longest, 2 ** math.floor(math.log2(room))))

    def _plan(self, truncation: int) -> list[int]:
        """The time steps of each window of the next interval."""
        room, t = self._room(), self.position
        spans = [self.source.span(t, truncation)]
        while True:
            t += spans[-1]
            room -= spans[-1]
            following = self.source.span(t, truncation)
            if room < following / 2:
                return spans
            spans.append(following)

    def start(self, range_test: bool = False) -> Signals:
        """The signals before the first decision."""
        self.last_probe = float(self._probe())
        self.usual_loss = self.last_probe
        self.usual_noise = 0.05 * abs(self.last_probe)
        if range_test:
            self.range_lr = suggest_lambda(*self._range_test(), self.config.power)
        self.origin = self.spent
        return self._signals(truncation=TRUNCATION_BOUNDS[0])

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
        truncation = min(int(knobs.truncation[0]), self._longest())
        begin, end = (
            min(float(rate[0]) * self.lr_scale, self.ceiling)
            for rate in (knobs.lr, knobs.lr_end)
        )
        self._unfreeze()
        snapshot = self._snapshot()
        interval = _Interval()
        spans = self._plan(truncation)
        passed, total = 0, sum(spans)
        for number, steps in enumerate(spans):
            share = (passed + steps / 2) / total
            passed += steps
            chunk = self._next_chunk(steps)
            if chunk.due == 0:  # nothing to learn: only the state goes on
                with torch.no_grad():
                    _, self.hidden = self.model(chunk.x, self.hidden, chunk.starts)
                continue
            self._set_lr(begin + (end - begin) * share)
            last = number == len(spans) - 1
            watch = last and not self.source.whole and steps > 1
            self._train(chunk, truncation, interval, last, watch)
        if len(interval.losses) % self.config.accumulate:
            interval.norms.append(self._update(spans[-1]))
        interval.watched["update_ratio"] = self._update_ratio(snapshot)
        probe = self._probe()
        self.decision += 1
        return self._settle(snapshot, interval, probe, end, truncation)

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]

    def _next_chunk(self, steps: int) -> Chunk:
        chunk = self.source.window(self.position, steps)
        self.position += steps
        self.spent += steps * self.batch
        return chunk

    def _train(
        self,
        chunk: Chunk,
        truncation: int,
        interval: "_Interval",
        last: bool,
        watch: bool,
    ) -> None:
        """One window: its gradient, and, each `accumulate` windows, an update."""
        every = self.config.accumulate
        before: list[Tensor] = []
        if len(interval.losses) % every == 0:
            if last and interval.losses:
                before = [p.grad for p in self.parameters if p.grad is not None]
            self.optimizer.zero_grad(set_to_none=True)
        if watch:
            loss, watched = self._watched_gradient(chunk)
            interval.watched.update(watched)
        else:
            loss = self._gradient(chunk, truncation)
        interval.losses.append(loss)
        interval.due.append(chunk.due)
        if len(interval.losses) % every == 0:
            if before:
                now = [p.grad for p in self.parameters if p.grad is not None]
                interval.watched["grad_cosine"] = _cosine(before, now)
            interval.norms.append(self._update(len(chunk.x)))

    def _gradient(self, chunk: Chunk, truncation: int) -> Tensor:
        """Adds one window's gradient; its loss. Whole sequences begin at zero, and
        their state is detached each `truncation` steps."""
        state, cuts = self.hidden, [len(chunk.x)]
        if self.source.whole:
            state = self.model.initial_state(chunk.x.shape[1])
            if not self.model.config.bidirectional:
                cuts = list(range(truncation, len(chunk.x), truncation)) + cuts
        parts, penalty, begin = [], state.new_zeros(()), 0
        for cut in cuts:
            starts = None if chunk.starts is None else chunk.starts[begin:cut]
            y, out, state = self.model.read(chunk.x[begin:cut], state.detach(), starts)
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
        y_1, first, middle = self.model.read(chunk.x[:half], carried, halves[0])
        middle.retain_grad()
        y_2, second, state = self.model.read(chunk.x[half:], middle, halves[1])
        loss = self._loss(torch.cat((first, second)), chunk)
        penalty = loss.new_zeros(())
        if self.config.ar or self.config.tar:
            y = torch.cat((y_1, y_2))
            penalty = activation_penalty(y, self.config.ar, self.config.tar)
        self._backward(loss + penalty)
        self.hidden = state.detach()
        assert carried.grad is not None and middle.grad is not None
        tiny = torch.finfo(loss.dtype).tiny
        far, near = carried.grad.norm() + tiny, middle.grad.norm() + tiny
        # Per-step quantities: the loss is a mean over the window's steps.
        size = self.config.accumulate * far * carried.detach().norm()
        carried_grad = size * steps / loss.detach().abs()
        return loss.detach(), {
            "carried_grad": carried_grad.clamp(1e-6, 1e6),
            "grad_decay": (near.log() - far.log()) / half,
        }

    def _update(self, steps: int) -> Tensor:
        """Clips, and moves the weights; the gradient's norm before, on the device."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
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
        return norm

    def _probe(self) -> Tensor:
        self.spent += self._probe_cost
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
            return _norm(change) / _norm(snapshot.weights)

    # --- the weights that are kept --------------------------------------------------

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that the run is for: the best ones, the
        averaged ones, or the last."""
        kept = self.best or self.averaged
        if not kept:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        self._load_weights(kept)
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
        candidate = self.averaged or [p.detach() for p in self.parameters]
        current = [p.detach().clone() for p in self.parameters]
        self._load_weights(candidate)
        self.valid_loss = float(self._mean_loss("valid", self.problem.valid.length))
        self._load_weights(current)
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
        )

    def _restore(self, snapshot: "_Snapshot") -> None:
        self._load_weights(snapshot.weights)
        self.optimizer.load_state_dict(snapshot.optimizer)
        self.hidden = snapshot.hidden
        self.averaged = snapshot.averaged

    def _settle(
        self,
        snapshot: "_Snapshot",
        interval: "_Interval",
        probe: Tensor,
        lr: float,
        truncation: int,
    ) -> Signals:
        """Reads the interval back from the device, and rolls it back if need be."""
        losses, norms, watched = interval.losses, interval.norms, interval.watched
        names = list(watched)
        stacked = torch.stack([probe, *watched.values(), *losses, *norms])
        # The one copy to the host of the interval.
        numbers = stacked.double().cpu().numpy()
        probe_loss, rest = float(numbers[0]), numbers[1 + len(names) :]
        measured = dict(
            zip(names, map(float, numbers[1 : 1 + len(names)]), strict=True)
        )
        weight = np.array(interval.due)
        norm = rest[len(losses) :]
        mean, noise = _mean_and_noise(rest[: len(losses)] / weight, weight)
        usual = self.usual_loss
        limit = usual + 6 * max(self.usual_noise, 0.02 * abs(usual))
        self.held = max(0, self.held - 1)
        if self.held == 0:
            self.ceiling = math.inf
        finite = np.isfinite(numbers).all() and np.isfinite(probe_loss)
        if not finite or mean > limit:
            self._restore(snapshot)
            self.failures += 1
            self.lr_scale /= 2
            self.ceiling, self.held = lr / 2, 2
            return self._signals(truncation=truncation, lr=lr, recovered=1.0)
        self.failures = 0
        if losses:
            self.usual_loss += 0.3 * (mean - self.usual_loss)
            self.usual_noise += 0.3 * (noise - self.usual_noise)
        self.last_probe = probe_loss
        if self.config.select == "valid":
            self._select()
        return self._signals(
            truncation=truncation,
            lr=lr,
            train_loss=self._positive(mean),
            loss_noise=max(noise / abs(mean), 1e-6),
            grad_norm=float(np.exp(_mean(np.log(norm.clip(1e-12))))),
            clip_fraction=_mean(norm > self.config.clip),
            **measured,
        )

    def _signals(
        self,
        truncation: int,
        lr: float = math.nan,
        recovered: float = 0.0,
        **measured: float,
    ) -> Signals:
        decisions, budget = self.config.decisions, self.budget
        following = min(self.decision + 1, decisions)
        steps = self.source.typical(truncation)
        left = max(0.0, budget - self.spent) / self.batch / steps
        last = self.decision >= decisions
        values: dict[str, float] = {
            "train_loss": math.nan,
            "loss_noise": math.nan,
            "grad_norm": math.nan,
            "clip_fraction": math.nan,
            "grad_cosine": math.nan,
            "update_ratio": math.nan,
            "carried_grad": math.nan,
            "grad_decay": math.nan,
            "progress": (self.spent - self.origin) / (budget - self.origin),
            "next_progress": self.config.boundary(following),
            "windows_left": left,
            "probe_loss": self._positive(self.last_probe),
            "lr": lr,
            "truncation": float(truncation),
            "truncation_max": float(truncation if last else self._longest()),
            "range_lr": self.range_lr,
            "adaptive": float(self.config.power < 1),
            "recovered": recovered,
            "lr_scale": self.lr_scale,
            "failed": float(self.failures >= GIVE_UP),
            "whole": float(self.source.whole),
            **measured,
        }
        return Signals(**{name: np.array([value]) for name, value in values.items()})

    def _positive(self, loss: float) -> float:
        """Controllers see logarithms of losses. A log-density may be negative: of it
        they see the loss itself."""
        logarithmic = self.problem.objective.logarithmic
        return math.exp(min(loss, 50.0)) if logarithmic else loss

    # --- range test -----------------------------------------------------------------

    def _range_test(self) -> tuple[Array, Array, int]:
        """Rates, losses and K of a sweep (after Smith 2017, "Cyclical learning rates").

        The rate grows by a constant factor per window. Then weights, optimiser and
        hidden state are restored; the tokens are spent.
        """
        room = self.budget * self.config.range_test_share / self.batch
        truncation = 16
        while room / truncation < 40 and truncation > TRUNCATION_BOUNDS[0]:
            truncation //= 2
        typical = self.source.typical(truncation)
        windows = int(min(max(room / typical, 16), 100))
        low, high = (1e-4, 1.0) if self.config.power < 1 else (1e-2, 30.0)
        rates = np.geomspace(low, high, windows)
        snapshot = self._snapshot()
        losses = []
        for lr in rates:
            self._set_lr(float(lr))
            steps = self.source.span(self.position, truncation)
            chunk = self._next_chunk(steps)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._gradient(chunk, max(truncation, steps))
            self._update(steps)
            losses.append(loss / (chunk.due or math.nan))
        self._restore(snapshot)
        self.updates = 0
        return rates, torch.stack(losses).double().cpu().numpy(), truncation

    # --- resuming -------------------------------------------------------------------

    _NUMBERS = (
        "position",
        "spent",
        "origin",
        "decision",
        "lr_scale",
        "ceiling",
        "held",
        "failures",
        "usual_loss",
        "usual_noise",
        "last_probe",
        "range_lr",
        "updates",
        "valid_loss",
        "best_valid",
        "waited",
    )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on to the same bits."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "hidden": self.hidden.detach(),
            "averaged": self.averaged,
            "best": self.best,
            "generator": self.generator.get_state(),
            "numbers": {name: getattr(self, name) for name in self._NUMBERS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hidden = state["hidden"].to(self.device)
        self.averaged = [p.to(self.device) for p in state["averaged"]]
        self.best = [p.to(self.device) for p in state["best"]]
        self.generator.set_state(state["generator"].cpu())
        for name in self._NUMBERS:
            setattr(self, name, state["numbers"][name])


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _mean_and_noise(losses: Array, weights: Array) -> tuple[float, float]:
    """Weighted mean and standard deviation; NaN for no losses at all."""
    if not len(losses):
        return math.nan, math.nan
    mean = float(np.average(losses, weights=weights))
    return mean, math.sqrt(float(np.average((losses - mean) ** 2, weights=weights)))


@dataclass(frozen=True)
class _Snapshot:
    weights: list[Tensor]
    optimizer: dict[str, Any]
    hidden: Tensor
    averaged: list[Tensor]


@dataclass(frozen=True)
class _Interval:
    """What the windows of an interval gave, on the device; `due` is on the host."""

    losses: list[Tensor] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)  # one per update
    watched: dict[str, Tensor] = field(default_factory=dict)


def _norm(tensors: list[Tensor]) -> Tensor:
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    products = [torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]
    scale = (_norm(a) * _norm(b)).clamp_min(1e-12)
    return torch.stack(products).sum() / scale
