"""Controllers of a training run: what they see, what they set, and the codec.

A controller sets the knobs of n runs at once, and is pure: all it remembers is in the
state that it returns, a tree of arrays that a checkpoint can hold.

    state = controller.init(n)
    knobs, state = controller(signals, state)

The codec stands between a training run and an agent: signals -> observation, action
-> knobs. `rlrnn.envs.tuning` and `Steered` use the same one, so that an episode of the
tuning environment and a run of `fit` are one thing.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = dict[str, Any]  # a tree that `rlrnn.checkpoint` can hold

LR_BOUNDS = (1e-6, 10.0)
TRUNCATION_BOUNDS = (4, 1024)
SOLVED = 0.02  # of the first loss: below it a task is solved, its logarithm noise


@dataclass(frozen=True)
class Knobs:
    """What a controller sets for one decision interval of n runs; each array is [n].

    The rate moves linearly from `lr` to `lr_end` inside the interval, so that a
    cosine is a cosine and no staircase. `truncation` is K, the number of steps that
    the gradient goes back.
    """

    lr: Array
    lr_end: Array
    truncation: NDArray[np.int64]


@dataclass(frozen=True)
class Signals:
    """What a trainer tells after a decision interval of n runs; each array is [n].

    A signal that was not measured is NaN. Losses are positive, in the objective's unit;
    of one that is a log-density, and may be negative, its exponential.
    """

    progress: Array  # share of the budget spent, in [0, 1]
    next_progress: Array  # the same, after the next interval
    windows_left: Array  # optimiser steps left at the K in force
    train_loss: Array  # mean over the interval
    loss_noise: Array  # standard deviation of the windows' losses / their mean
    probe_loss: Array
    grad_norm: Array  # geometric mean over the interval, before the clip
    clip_fraction: Array  # share of windows whose gradient was clipped
    grad_cosine: Array  # between the last two gradients
    update_ratio: Array  # |change of the weights| / |weights|
    carried_grad: Array  # |dL/dh| |h| / L at the start of the last window: what is cut
    grad_decay: Array  # log |dL/dh| lost per step, going back inside the last window
    lr: Array  # in force at the end, recoveries included
    truncation: Array  # in force
    truncation_max: Array  # the longest K that the next interval has room for
    range_lr: Array  # lambda that the range test found: lr = lambda K^p
    adaptive: Array  # 1: Adam's family, p = 1/2; 0: SGD's, p = 1
    recovered: Array  # 1: the interval diverged and was rolled back
    lr_scale: Array  # 1/2 to the power of the recoveries so far
    failed: Array  # 1: given up after three recoveries in a row
    whole: Array  # 1: a window is whole sequences, and K cuts inside them

    def to_row(self, run: int = 0) -> dict[str, float]:
        """The signals of one run by name, for a log."""
        return {name: float(value[run]) for name, value in vars(self).items()}


@runtime_checkable
class Controller(Protocol):
    """Sets the knobs of n training runs. See the module's text."""

    @property
    def range_test(self) -> bool:
        """Whether `Signals.range_lr` is needed."""

    def init(self, n: int) -> State: ...

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]: ...


def make_knobs(lr: Array, lr_end: Array, truncation: int | Array) -> Knobs:
    """Knobs with their kinds, and rates inside their bounds."""
    whole = np.broadcast_to(np.asarray(truncation), lr.shape).astype(np.int64)
    return Knobs(lr.clip(*LR_BOUNDS), lr_end.clip(*LR_BOUNDS), whole)


def warmup_cosine(progress: Array, warmup: float) -> Array:
    """Linear from 0 to 1 over `warmup`, then half a cosine down to 0 (Loshchilov &
    Hutter 2017)."""
    falling = (progress - warmup) / (1 - warmup)
    cosine = 0.5 * (1 + np.cos(math.pi * falling.clip(0, 1)))
    rising = progress / warmup if warmup > 0 else np.ones_like(progress)
    return np.where(progress < warmup, rising, cosine)


# --- the codec ----------------------------------------------------------------------

LR_FACTORS = np.array([1 / 4, 1 / 2, 1 / 1.3, 1.0, 1.3, 2.0, 4.0])
TRUNCATION_FACTORS = np.array([1 / 2, 1.0, 2.0])
ACTIONS = (len(LR_FACTORS), len(TRUNCATION_FACTORS))
NO_OP = (3, 1)

FEATURES = (
    "train loss, fall per interval",
    "train loss, fall per interval, slow average",
    "probe loss, fall per interval",
    "probe loss, fall per interval, slow average",
    "log probe loss, fall since the start",
    "log probe loss - log train loss",
    "log loss noise",
    "log gradient norm - its average",
    "log gradient norm - log clip",
    "clip fraction",
    "gradient cosine",
    "log update ratio",
    "log(lambda of the prior / default)",
    "log(lambda / lambda of the prior)",
    "log2(K / K of the prior)",
    "log2 K",
    "log2(K / longest possible K)",
    "progress",
    "log2 windows left",
    "log carried gradient",
    "gradient decay",
    "recovered",
    "log2 learning-rate scale",
    "Adam's family",
    "previous action, rate",
    "previous action, truncation",
    "no probe",
    "no hidden gradient",
)
BIAS_FEATURES = ("log carried gradient", "gradient decay", "no hidden gradient")

# What is taken from a player, to see what it is worth:
#   open_loop         all signals but the share of the budget that is spent
#   rate_only         moves of the truncation
#   truncation_only   moves of the rate
#   no_bias_features  what tells of the gradient that truncation cuts off
#   no_prior          range test and schedule: moves are on a constant default rate
Ablation = Literal[
    "none",
    "open_loop",
    "rate_only",
    "truncation_only",
    "no_bias_features",
    "no_prior",
]


def visible(ablation: Ablation) -> NDArray[np.bool_]:
    """Which of the features a player sees."""
    if ablation == "open_loop":
        return np.array([name == "progress" for name in FEATURES])
    hidden = BIAS_FEATURES if ablation == "no_bias_features" else ()
    return np.array([name not in hidden for name in FEATURES])


@dataclass(frozen=True)
class Codec:
    """Signals to observation, action to knobs, for n runs.

    Actions are residuals on a prior, warm-up and cosine around the rate that a range
    test suggests, so that the no-op action repeated for ever *is* the prior:

        lambda = lambda_prior * shape(progress) * product of the rate factors so far
        K      = K_prior * product of the truncation factors so far
        lr     = lambda * K^p,  p = 1/2 for Adam, 1 for SGD

    With the exponent p a move of K leaves the noise of the updates as it was. Where a
    window is whole sequences, shorter K are no more updates: none is cut, and the rate
    has nothing to do with K. Moves of the rate add up to a factor of `reach` at most,
    up or down, around what a range test suggests: a loss that stands still because it
    is noise is no reason for more (docs/controller.md).

    Under an `ablation` features are zero, and moves no-op, that are not the player's.
    """

    truncation: int = 16
    warmup: float = 0.05
    ablation: Ablation = "none"
    reach: float = 4.0

    @property
    def range_test(self) -> bool:
        """Whether the prior needs one."""
        return self.ablation != "no_prior"

    def init(self, n: int) -> State:
        zeros = np.zeros(n)
        return {
            "log_lambda": zeros,  # offset from the prior
            "log2_k": np.full(n, math.log2(self.truncation)),
            "previous": np.zeros((n, 2)),
            "train": np.full(n, np.nan),  # log losses at the decision before
            "probe": np.full(n, np.nan),
            "first": np.full(n, np.nan),  # log probe loss before training
            "train_fall": zeros,
            "probe_fall": zeros,
            "log_grad": np.full(n, np.nan),
        }

    def observe(
        self, signals: Signals, state: State
    ) -> tuple[NDArray[np.float32], State]:
        """The observation [n, len(FEATURES)], within ±5, and the state after it."""
        train, probe = np.log(signals.train_loss), np.log(signals.probe_loss)
        first = np.where(np.isnan(state["first"]), probe, state["first"])
        train_fall = np.nan_to_num(state["train"] - train)
        probe_fall = np.nan_to_num(state["probe"] - probe)
        slow_train = 0.8 * state["train_fall"] + 0.2 * train_fall
        slow_probe = 0.8 * state["probe_fall"] + 0.2 * probe_fall
        log_grad = np.log(signals.grad_norm)
        usual = np.where(np.isnan(state["log_grad"]), log_grad, state["log_grad"])
        columns = (
            20 * train_fall,
            20 * slow_train,
            20 * probe_fall,
            20 * slow_probe,
            first - probe,
            5 * (probe - train),
            np.log(signals.loss_noise) + 3,
            log_grad - usual,
            log_grad,
            2 * signals.clip_fraction - 1,
            2 * signals.grad_cosine,
            (np.log(np.maximum(signals.update_ratio, 1e-30)) + 4) / 2,  # or no update
            np.log(base_lambda(signals) / default_lambda(rate_power(signals))),
            state["log_lambda"],
            state["log2_k"] - math.log2(self.truncation),
            state["log2_k"] / 2 - 2,
            (state["log2_k"] - np.log2(signals.truncation_max)) / 2,
            4 * signals.progress - 2,
            (np.log2(signals.windows_left + 1) - 8) / 3,
            np.log(signals.carried_grad) / 2,
            5 * signals.grad_decay,
            signals.recovered,
            np.log2(signals.lr_scale),
            signals.adaptive,
            state["previous"][:, 0],
            state["previous"][:, 1],
            np.isnan(signals.probe_loss),
            np.isnan(signals.carried_grad),
        )
        stacked = np.stack(columns, axis=1)
        observation = np.nan_to_num(stacked, nan=0.0).clip(-5, 5).astype(np.float32)
        observation[:, ~visible(self.ablation)] = 0
        after = {
            **state,
            "train": np.where(np.isnan(train), state["train"], train),
            "probe": np.where(np.isnan(probe), state["probe"], probe),
            "first": first,
            "train_fall": slow_train,
            "probe_fall": slow_probe,
            "log_grad": np.where(
                np.isnan(log_grad), usual, 0.8 * usual + 0.2 * log_grad
            ),
        }
        return observation, after

    def act(
        self, actions: NDArray[np.int64], signals: Signals, state: State
    ) -> tuple[Knobs, State]:
        """The knobs that `actions` [n, 2] stand for, and the state after them."""
        low, high = TRUNCATION_BOUNDS
        actions = self._allowed(actions, signals)
        log_lambda = state["log_lambda"] + np.log(LR_FACTORS[actions[:, 0]])
        suggested = self.range_test & ~np.isnan(signals.range_lr)
        most = np.where(suggested, math.log(self.reach), np.inf)
        log_lambda = log_lambda.clip(-most, most)
        log2_k = state["log2_k"] + np.log2(TRUNCATION_FACTORS[actions[:, 1]])
        log2_k = log2_k.clip(math.log2(low), math.log2(high))
        longest = np.maximum(signals.truncation_max, low)
        k = np.where(signals.whole > 0, self.truncation, np.minimum(2**log2_k, longest))
        cut = np.where(signals.whole > 0, longest, k)
        power = rate_power(signals)
        base = base_lambda(signals) if self.range_test else default_lambda(power)
        peak = base * np.exp(log_lambda) * k**power
        # Offsets past the bounds of the rate would take as many moves to come back.
        bounded = peak.clip(*LR_BOUNDS)
        log_lambda = log_lambda + np.log(bounded / peak)
        begin = bounded * self._shape(signals.progress)
        end = bounded * self._shape(signals.next_progress)
        moved = actions / (np.array(ACTIONS) - 1) * 2 - 1
        after = {
            **state,
            "log_lambda": log_lambda,
            "log2_k": log2_k,
            "previous": moved,
        }
        return make_knobs(begin, end, cut), after

    def _shape(self, progress: Array) -> Array:
        if self.ablation == "no_prior":
            return np.ones_like(progress)
        return warmup_cosine(progress, self.warmup)

    def _allowed(
        self, actions: NDArray[np.int64], signals: Signals
    ) -> NDArray[np.int64]:
        allowed = actions.copy()
        allowed[signals.whole > 0, 1] = NO_OP[1]
        taken = {"rate_only": 1, "truncation_only": 0}.get(self.ablation)
        if taken is not None:
            allowed[:, taken] = NO_OP[taken]
        return allowed


def rate_power(signals: Signals) -> Array:
    """p of lr = lambda K^p: 1/2 for Adam's family, 1 for SGD."""
    return np.where(signals.adaptive > 0, 0.5, 1.0)


def base_lambda(signals: Signals) -> Array:
    """Lambda of the range test, or the default where it found none."""
    default = default_lambda(rate_power(signals))
    return np.where(np.isnan(signals.range_lr), default, signals.range_lr)


def default_lambda(power: Array) -> Array:
    """Where a range test was not made, or could not tell: the middle of what was best
    on small tasks (docs/controller.md)."""
    return np.where(power < 1, 3e-3, 0.1)


@runtime_checkable
class Player(Protocol):
    """An agent at the codec: observations [n, D] in, actions [n, 2] out."""

    def init(self, n: int) -> State: ...

    def __call__(
        self, observation: NDArray[np.float32], state: State
    ) -> tuple[NDArray[np.int64], State]: ...


class NoOp:
    """The player that never moves: it leaves the prior as it is."""

    def init(self, n: int) -> State:
        return {}

    def __call__(
        self, observation: NDArray[np.float32], state: State
    ) -> tuple[NDArray[np.int64], State]:
        return np.tile(np.array(NO_OP), (len(observation), 1)), state


@dataclass(frozen=True)
class Familiar:
    """A player that moves only where it knows its way about: at an observation outside
    the range `low` to `high` [D] of those that it learned on, the prior is left alone.

    The range of a feature is widened by a tenth on both sides. It is that of all
    observations, and not of most: what lies outside adds up over the features
    (docs/controller.md), and the rarest task is still one that it learned on.

    The state has `outside` [n, D], what was unfamiliar at the last decision.
    """

    player: Player
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def init(self, n: int) -> State:
        outside = np.zeros((n, len(self.low)), bool)
        return {"player": self.player.init(n), "outside": outside}

    def __call__(
        self, observation: NDArray[np.float32], state: State
    ) -> tuple[NDArray[np.int64], State]:
        actions, player = self.player(observation, state["player"])
        margin = (self.high - self.low) / 10
        outside = observation < self.low - margin
        outside |= observation > self.high + margin
        strange = outside.any(1, keepdims=True)
        actions = np.where(strange, np.array(NO_OP), actions)
        return actions, {"player": player, "outside": outside}


@dataclass(frozen=True)
class Steered:
    """A player's moves on top of the codec's prior. With `NoOp`, the prior alone."""

    player: Player
    codec: Codec = Codec()

    @property
    def range_test(self) -> bool:
        return self.codec.range_test

    def init(self, n: int) -> State:
        return {"codec": self.codec.init(n), "player": self.player.init(n)}

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        observation, codec = self.codec.observe(signals, state["codec"])
        actions, player = self.player(observation, state["player"])
        knobs, codec = self.codec.act(actions, signals, codec)
        return knobs, {"codec": codec, "player": player}


def prior() -> Steered:
    """Range test, then warm-up and cosine: what the untrained controller does."""
    return Steered(NoOp())
