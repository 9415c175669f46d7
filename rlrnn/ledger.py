"""The books of a training run: budget, decisions, recovery. No tensors.

    interval = ledger.plan(knobs)         the windows until the next decision
    signals = ledger.settle(interval, measured)

`rlrnn.training.Trainer` and `rlrnn.population.Population` do what the books say. One
token is one step of one stream; forward only counts a third.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlrnn.checks import at_least, one_of, share
from rlrnn.control import TRUNCATION_BOUNDS, Array, Knobs, Signals
from rlrnn.data.chunks import Chunk, Problem
from rlrnn.optimizers import Optimizer, rate_power
from rlrnn.rangetest import SGD_FACTOR, suggest_lambda

Select = Literal["last", "valid"]
Frozen = Literal["none", "encoder", "core"]
Precision = Literal["float32", "bfloat16"]

FORWARD_COST = 1 / 3  # of a token that is also trained on
WINDOWS = 4  # the fewest in a decision interval
GIVE_UP = 3  # recoveries in a row
LEAST_LOSS = 1e-12  # that is told: a loss of zero has no logarithm


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        budget: tokens to spend, on training, probing, range test and all.
        optimizer: sgd, momentum (0.9), adam, adamw, schedulefree (AdamW without a
            schedule) or prodigy (Adam that finds its rate; lr is a factor, usually 1).
        weight_decay: an L2 penalty for sgd, momentum and adam, decoupled for others.
        clip: the gradient norm above which gradients are scaled down.
        decisions: intervals that a controller decides on; a sixth of them lie in the
            first 5 % of the budget.
        probe_share: of the budget, spent on watching the probe loss.
        range_test_share: of the budget, spent on a range test if one is asked for.
        decay_probe: the last window of each interval goes back once more, charged, so
            that grad_decay is that of its later losses alone (see controller adaptive).
        epochs: passes over the training part, in place of a budget in tokens.
        minutes: in place of both, for `rlrnn fit`: as many tokens as this machine
            trains on in that time at K = 16, by a table that it keeps
            (docs/controller.md).
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
        precision: of the products in training, float32 or bfloat16 (meant for GPUs; on
            a CPU float32 is the faster one). Weights, state and loss stay float32, and
            so do probes and metrics.
    """

    budget: float = 1_000_000.0
    optimizer: Optimizer = "adam"
    weight_decay: float = 0.0
    clip: float = 1.0
    decisions: int = 24
    probe_share: float = 0.02
    range_test_share: float = 0.04
    decay_probe: bool = False
    epochs: float | None = None
    minutes: float | None = None
    accumulate: int = 1
    average: float = 0.0
    ar: float = 0.0
    tar: float = 0.0
    frozen: Frozen = "none"
    unfreeze: float = 0.0
    layer_decay: float = 1.0
    select: Select = "last"
    patience: int | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        one_of("optimizer", self.optimizer, Optimizer)
        one_of("precision", self.precision, Precision)
        one_of("select", self.select, Select)
        one_of("frozen", self.frozen, Frozen)
        if not self.budget >= 1:
            raise ValueError(f"budget is {self.budget}, expected at least 1 token")
        for name in ("clip", "epochs", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a number above 0")
        if self.minutes is not None and self.epochs is not None:
            raise ValueError(
                f"minutes is {self.minutes:g} and epochs is {self.epochs:g}, expected "
                "one of them; leave the other out, or set it to null"
            )
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
        if self.optimizer == "prodigy" and self.layer_decay != 1:
            raise ValueError(
                f"layer_decay is {self.layer_decay}, expected 1: optimizer "
                "prodigy has one rate"
            )
        if self.optimizer == "schedulefree" and self.average:
            raise ValueError(
                f"average is {self.average}, expected 0 with optimizer schedulefree, "
                "which averages by itself"
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
        return rate_power(self.optimizer)


class Ledger:
    """What a run has spent, where it stands, and what its controller is told.

    Raises ValueError if the budget is too small for `config.decisions`.
    """

    # What a resumed run needs to go on.
    NUMBERS = (
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
        "waited",
    )

    def __init__(self, problem: Problem, config: TrainingConfig) -> None:
        if config.minutes is not None:
            raise ValueError(
                f"minutes is {config.minutes:g}, expected a budget in tokens: only "
                "`rlrnn fit` turns minutes into one"
            )
        self.problem, self.config = problem, config
        self.source = problem.train
        self.batch = self.source.batch
        self.budget = config.budget
        if config.epochs is not None:
            tokens = config.epochs * self.source.length * self.batch
            self.budget = tokens / (1 - config.probe_share)
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
        self.waited = 0  # decisions without a lower validation loss
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

    def plan(self, knobs: Knobs) -> "Interval":
        """The windows of the next interval, with their rates, under knobs [1]."""
        truncation = min(int(knobs.truncation[0]), self._longest())
        room, t = self._room(), self.position
        spans = [self.source.span(t, truncation)]
        while True:
            t += spans[-1]
            room -= spans[-1]
            following = self.source.span(t, truncation)
            if room < following / 2:
                break
            spans.append(following)
        begin, end = (
            min(float(rate[0]) * self.lr_scale, self.ceiling)
            for rate in (knobs.lr, knobs.lr_end)
        )
        steps = np.array(spans, np.float64)
        middles = (np.cumsum(steps) - steps / 2) / steps.sum()
        return Interval(truncation, spans, begin + (end - begin) * middles, end)

    def next_chunk(self, steps: int) -> Chunk:
        """The next steps of the training part, charged."""
        chunk = self.source.window(self.position, steps)
        self.position += steps
        self.spent += steps * self.batch
        return chunk

    def charge_probe(self) -> None:
        self.spent += self._probe_cost

    def begin(self, probe: float, sweep: tuple[Array, Array, int] | None) -> Signals:
        """Books what `start` measures: the first probe loss, and the rates, losses and
        K of a range test."""
        self.last_probe = self.usual_loss = probe
        self.usual_noise = 0.05 * abs(probe)
        if sweep is not None:
            self.range_lr = suggest_lambda(*sweep, self.config.power)
            if self.config.optimizer == "sgd":
                self.range_lr *= SGD_FACTOR
        self.origin = self.spent
        return self._signals(truncation=TRUNCATION_BOUNDS[0])

    def settle(self, interval: "Interval", measured: "Measured") -> Signals:
        """Books an interval that has been played, and tells its signals. If they say
        `recovered`, the weights, the optimiser and the hidden state are to be those
        from before it."""
        self.decision += 1
        truncation, lr = interval.truncation, interval.end
        mean, noise = _mean_and_noise(measured.losses, measured.due)
        usual = self.usual_loss
        limit = usual + 6 * max(self.usual_noise, 0.02 * abs(usual))
        self.held = max(0, self.held - 1)
        if self.held == 0:
            self.ceiling = math.inf
        if not measured.finite or mean > limit:
            self.failures += 1
            self.lr_scale /= 2
            self.ceiling, self.held = lr / 2, 2
            return self._signals(truncation=truncation, lr=lr, recovered=1.0)
        self.failures = 0
        if len(measured.losses):
            self.usual_loss += 0.3 * (mean - self.usual_loss)
            self.usual_noise += 0.3 * (noise - self.usual_noise)
        self.last_probe = measured.probe
        norms = measured.norms
        return self._signals(
            truncation=truncation,
            lr=lr,
            train_loss=self.positive(mean),
            loss_noise=max(noise / max(abs(mean), 1e-12), 1e-6),
            grad_norm=float(np.exp(_mean(np.log(norms.clip(1e-12))))),
            clip_fraction=_mean(norms > self.config.clip),
            **measured.watched,
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
            "probe_loss": self.positive(self.last_probe),
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

    def positive(self, loss: float) -> float:
        """Controllers see logarithms of losses. A log-density may be negative: of it
        they see the loss itself."""
        logarithmic = self.problem.objective.logarithmic
        told = math.exp(min(loss, 50.0)) if logarithmic else loss
        return max(told, LEAST_LOSS)  # NaN stays so

    def range_plan(self) -> tuple[Array, int]:
        """Rates and K of a sweep (after Smith 2017, "Cyclical learning rates"): the
        rate grows by a constant factor per window."""
        room = self.budget * self.config.range_test_share / self.batch
        truncation = 16
        while room / truncation < 40 and truncation > TRUNCATION_BOUNDS[0]:
            truncation //= 2
        typical = self.source.typical(truncation)
        windows = int(min(max(room / typical, 16), 100))
        low, high = (1e-4, 1.0) if self.config.power < 1 else (1e-2, 30.0)
        return np.geomspace(low, high, windows), truncation


@dataclass(frozen=True)
class Interval:
    """What will be done until the next decision.

    `spans`: the time steps of each window; `rates`: its learning rate; `end`: the rate
    in the end.
    """

    truncation: int
    spans: list[int]
    rates: Array
    end: float


@dataclass(frozen=True)
class Measured:
    """What an interval gave, on the host.

    `losses` and `due` have an entry for each window in which a loss was due (`losses`
    are per due position), `norms` one for each update.
    """

    probe: float
    losses: Array
    due: Array
    norms: Array
    watched: dict[str, float]

    @property
    def finite(self) -> bool:
        numbers = [self.probe, *self.losses, *self.norms, *self.watched.values()]
        return bool(np.isfinite(numbers).all())


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _mean_and_noise(losses: Array, weights: Array) -> tuple[float, float]:
    """Weighted mean and standard deviation; NaN for no losses at all."""
    if not len(losses):
        return math.nan, math.nan
    mean = float(np.average(losses, weights=weights))
    return mean, math.sqrt(float(np.average((losses - mean) ** 2, weights=weights)))
