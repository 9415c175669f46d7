"""Controllers that are not learned: what people set a rate and a truncation by today.

They are the learned controller's rivals, and are charged the same: whatever they
measure on the way comes out of the run's own budget.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlrnn.control import (
    TRUNCATION_BOUNDS,
    Array,
    Codec,
    Controller,
    Knobs,
    Signals,
    State,
    base_lambda,
    make_knobs,
    rate_power,
    warmup_cosine,
)


@dataclass(frozen=True)
class Constant:
    """One rate, one truncation: what a training loop does when nobody tunes it. The
    rate may rise linearly over a share `warmup` of the budget."""

    lr: float = 1e-3
    truncation: int = 32
    warmup: float = 0.0
    range_test = False

    def init(self, n: int) -> State:
        return {}

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        begin = self.lr * _rising(signals.progress, self.warmup)
        end = self.lr * _rising(signals.next_progress, self.warmup)
        return make_knobs(begin, end, self.truncation), state


@dataclass(frozen=True)
class WarmupCosine:
    """A warm-up to `lr` over a share `warmup` of the budget, then a cosine to zero."""

    lr: float = 1e-3
    truncation: int = 32
    warmup: float = 0.05
    range_test = False

    def init(self, n: int) -> State:
        return {}

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        begin = self.lr * warmup_cosine(signals.progress, self.warmup)
        end = self.lr * warmup_cosine(signals.next_progress, self.warmup)
        return make_knobs(begin, end, self.truncation), state


@dataclass(frozen=True)
class Plateau:
    """Multiplies the rate by `factor` when the probe loss has not fallen by a share
    `threshold` for `patience` decisions, as torch's ReduceLROnPlateau does."""

    lr: float = 1e-3
    truncation: int = 32
    factor: float = 0.5
    patience: int = 3
    threshold: float = 1e-3
    range_test = False

    def init(self, n: int) -> State:
        return {
            "lr": np.full(n, self.lr),
            "best": np.full(n, np.inf),
            "waited": np.zeros(n),
        }

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        better = signals.probe_loss < state["best"] * (1 - self.threshold)
        waited = np.where(better, 0, state["waited"] + 1)
        drop = waited > self.patience
        lr = np.where(drop, state["lr"] * self.factor, state["lr"])
        best = np.where(better, signals.probe_loss, state["best"])
        state = {"lr": lr, "best": best, "waited": np.where(drop, 0, waited)}
        return make_knobs(lr, lr, self.truncation), state


@dataclass(frozen=True)
class Linear:
    """The range test's rate, lambda K^p: up to it over a share `warmup` of the budget,
    then linearly to zero."""

    truncation: int = 16
    warmup: float = 0.05
    range_test = True

    def init(self, n: int) -> State:
        return {}

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        # Whole sequences: updates are as many at any K; their rate is the prior's.
        k = np.where(signals.whole > 0, Codec().truncation, self.truncation)
        peak = base_lambda(signals) * k ** rate_power(signals)
        begin = peak * self._shape(signals.progress)
        end = peak * self._shape(signals.next_progress)
        return make_knobs(begin, end, self.truncation), state

    def _shape(self, progress: Array) -> Array:
        falling = (1 - progress) / (1 - self.warmup)
        rising = _rising(progress, self.warmup)
        return rising * np.where(progress < self.warmup, 1, falling.clip(0, 1))


@dataclass(frozen=True)
class LengthWarmup:
    """Sequence-length warm-up (Li, Zhang & He 2022, "The stability-efficiency
    dilemma"): K doubles from 4 to `truncation` over a share `growth` of the budget,
    each length for an equal part of it.

    The rate warms up and falls as a cosine, around a peak of `lr` at `truncation` and
    of `lr` (K / truncation)^p before.
    """

    lr: float = 1e-3
    truncation: int = 32
    growth: float = 0.3
    warmup: float = 0.05
    range_test = False

    def init(self, n: int) -> State:
        return {}

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        least = TRUNCATION_BOUNDS[0]
        doublings = np.ceil(np.log2(max(self.truncation / least, 1)))
        grown = np.floor(doublings * (signals.progress / self.growth).clip(0, 1))
        k = np.minimum(least * 2**grown, self.truncation)
        return _cosine_at(k, self.lr, self.truncation, self.warmup, signals), state


@dataclass(frozen=True)
class Adaptive:
    """Adaptive truncation (Aicher, Foti & Fox 2019, "Adaptively truncating
    backpropagation through time to control gradient bias"): the smallest K whose
    estimated relative bias is at most `delta`.

    Going back, the gradient of one step's loss fades as phi_k = |dL_s/dh_{s-k}| =
    phi_0 beta^k (their assumption A-2, from lag 0 on). With E(K) the sum of what is cut
    and |g_K| that of what is kept, the bias relative to the whole gradient is at most

        delta(K) = E(K) / (|g_K| - E(K)).

    There each loss goes back K steps; here the s-th of a window's K goes back s, and
    of the whole gradient, phi_0 / (1 - beta), the share that is cut is

        c(K) = (1/K) sum_{s=1..K} beta^s = beta (1 - beta^K) / (K (1 - beta)),

    so that delta(K) = c / (1 - 2c), and no bound at all where c >= 1/2. beta is a
    moving average of exp(-`grad_decay`); until that is measured K is `truncation`.
    With losses at each step `grad_decay` is that of the gradient only under
    `TrainingConfig.decay_probe`.

    The rate warms up and falls as a cosine, around a peak of `lr` (K / truncation)^p:
    the paper's own grows with K too.
    """

    lr: float = 1e-3
    truncation: int = 32
    delta: float = 0.5
    warmup: float = 0.05
    range_test = False

    def init(self, n: int) -> State:
        return {"beta": np.full(n, np.nan)}

    def __call__(self, signals: Signals, state: State) -> tuple[Knobs, State]:
        # Zero: nothing was due at the window's end, or its gradient does not fade.
        known = signals.grad_decay != 0
        seen = np.where(known, np.exp(-signals.grad_decay).clip(0, 1), np.nan)
        before = np.where(np.isnan(state["beta"]), seen, state["beta"])
        beta = np.where(np.isnan(seen), before, 0.7 * before + 0.3 * seen)
        k = np.where(np.isnan(beta), self.truncation, self._shortest(beta))
        knobs = _cosine_at(k, self.lr, self.truncation, self.warmup, signals)
        return knobs, {"beta": beta}

    def _shortest(self, beta: Array) -> Array:
        """The smallest power of two that keeps to `delta`, or the greatest."""
        low, high = TRUNCATION_BOUNDS
        lengths = 2.0 ** np.arange(np.log2(low), np.log2(high) + 1)
        enough = relative_bias(beta[:, None], lengths) <= self.delta
        enough[:, -1] = True
        shortest: Array = lengths[enough.argmax(1)]
        return shortest


def relative_bias(beta: Array, truncation: Array) -> Array:
    """delta(K) of `Adaptive`, for a gradient that fades by `beta` in [0, 1] per step;
    infinite where there is no bound."""
    faded = np.minimum(beta, 1 - 1e-9)
    cut = faded * (1 - faded**truncation) / (truncation * (1 - faded))
    return np.where(cut < 0.5, cut / np.maximum(1 - 2 * cut, 1e-12), np.inf)


def _rising(progress: Array, warmup: float) -> Array:
    return (progress / warmup).clip(0, 1) if warmup > 0 else np.ones_like(progress)


def _cosine_at(
    k: Array, lr: float, truncation: int, warmup: float, signals: Signals
) -> Knobs:
    """Warm-up and cosine at K = `k`, with a peak of `lr` at `truncation`."""
    k = np.minimum(k, np.maximum(signals.truncation_max, TRUNCATION_BOUNDS[0]))
    # Whole sequences: updates are as many at any K, and the rate stays as it is.
    power = np.where(signals.whole > 0, 0.0, rate_power(signals))
    peak = lr * (k / truncation) ** power
    begin = peak * warmup_cosine(signals.progress, warmup)
    end = peak * warmup_cosine(signals.next_progress, warmup)
    return make_knobs(begin, end, k)


def _linear(lr: float, truncation: int) -> Controller:
    return Linear(truncation)  # the range test gives the rate


# By the names of the command line, from a rate and a truncation. `prior` and `learned`
# join them in `rlrnn.flows`.
UNLEARNED: dict[str, Callable[..., Controller]] = {
    "constant": Constant,
    "cosine": WarmupCosine,
    "plateau": Plateau,
    "linear": _linear,
    "length_warmup": LengthWarmup,
    "adaptive": Adaptive,
}
