"""Range test + linear, length warm-up, adaptive truncation: their limits."""

import math
from typing import Any

import numpy as np
import pytest

from rlrnn.baselines import (
    UNLEARNED,
    Adaptive,
    Constant,
    LengthWarmup,
    Linear,
    WarmupCosine,
    relative_bias,
)
from rlrnn.control import (
    LR_BOUNDS,
    TRUNCATION_BOUNDS,
    Controller,
    Knobs,
    Signals,
    prior,
)


def signals(**given: Any) -> Signals:
    """Signals of one run of Adam's family, a range test behind it."""
    known = {"adaptive": 1.0, "range_lr": 3e-3, "truncation_max": 256.0, **given}
    names = Signals.__dataclass_fields__
    assert known.keys() <= names.keys()
    known.setdefault("whole", 0.0)
    return Signals(**{name: np.array([known.get(name, 0.5)]) for name in names})


def played(controller: Controller, steps: int = 40, **told: Any) -> list[Knobs]:
    """What it says over a run in which all signals but the progress stay the same."""
    state, said = controller.init(1), []
    for i in range(steps):
        place = {"progress": i / steps, "next_progress": (i + 1) / steps}
        knobs, state = controller(signals(**{**told, **place}), state)
        said.append(knobs)
    return said


def test_a_constant_can_warm_up() -> None:
    first, *others = played(Constant(0.4, 20, warmup=0.05), 20)
    assert first.lr == pytest.approx(LR_BOUNDS[0]) and first.lr_end == 0.4
    assert all(k.lr == k.lr_end == 0.4 for k in others)


@pytest.mark.parametrize(("adaptive", "power"), [(1.0, 0.5), (0.0, 1.0)])
def test_linear_falls_along_a_straight_line_from_the_range_tests_rate(
    adaptive: float, power: float
) -> None:
    said = played(Linear(64, 0.25), 40, adaptive=adaptive, range_lr=3e-3)
    rates = np.array([float(k.lr[0]) for k in said])
    peak = 3e-3 * 64**power
    assert rates.max() == pytest.approx(peak) and rates.argmax() == 10
    assert np.allclose(np.diff(rates[1:11]), peak / 10)
    assert np.allclose(np.diff(rates[10:]), -peak / 30)
    assert said[-1].lr_end == LR_BOUNDS[0]
    assert all(k.truncation == 64 for k in said)
    # where a window is whole sequences its rate is the prior's, whatever is cut
    peaks = [
        max(float(k.lr_end[0]) for k in played(some, adaptive=adaptive, whole=1.0))
        for some in (Linear(64), prior())
    ]
    assert peaks[0] == pytest.approx(peaks[1])


@pytest.mark.parametrize("last", [4, 32, 48])
def test_length_warmup_doubles_and_keeps_lambda(last: int) -> None:
    said = played(LengthWarmup(0.1, last, growth=0.5), 40)
    lengths = [int(k.truncation[0]) for k in said]
    doublings = [k for k in (4, 8, 16, 32) if k < last] + [last]
    assert sorted(set(lengths)) == doublings and lengths == sorted(lengths)
    assert all(k == last for k in lengths[20:])
    parts = [lengths[:20].count(k) for k in doublings[:-1]]
    assert max(parts, default=0) - min(parts, default=0) <= 1
    usual = played(WarmupCosine(0.1, last), 40)
    for mine, theirs in zip(said, usual, strict=True):
        scale = math.sqrt(float(mine.truncation[0]) / last)
        for a, b in ((mine.lr, theirs.lr), (mine.lr_end, theirs.lr_end)):
            if b > LR_BOUNDS[0] / scale:
                assert a == pytest.approx(scale * b)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8, 0.97])
@pytest.mark.parametrize("length", [1, 4, 32])
def test_relative_bias_is_that_of_a_linear_recurrence(beta: float, length: int) -> None:
    """h_t = beta h_{t-1} + theta: dL_s/dtheta sums beta^k over the lags k; a window's
    s-th loss sees s of them."""
    whole = sum(beta**k for k in range(10_000))
    kept = np.mean([sum(beta**k for k in range(s)) for s in range(1, length + 1)])
    bound = (whole - kept) / (2 * kept - whole) if 2 * kept > whole else np.inf
    found = relative_bias(np.array(beta), np.array(float(length)))
    assert float(found) == pytest.approx(float(bound), rel=1e-6, abs=1e-12)


def test_adaptive_takes_the_shortest_truncation_that_is_good_enough() -> None:
    def chosen(beta: float, delta: float = 0.5) -> int:
        controller = Adaptive(0.1, 16, delta)
        said = played(controller, 3, grad_decay=-math.log(beta), truncation_max=2048.0)
        return int(said[-1].truncation[0])

    lengths = [chosen(beta) for beta in (0.01, 0.8, 0.9, 0.99)]
    assert lengths[0] == TRUNCATION_BOUNDS[0] and lengths == sorted(set(lengths))
    for beta, k in zip((0.8, 0.9, 0.99), lengths[1:], strict=True):
        assert relative_bias(np.array(beta), np.array(float(k))) <= 0.5
        assert relative_bias(np.array(beta), np.array(k / 2)) > 0.5
    assert chosen(0.99999) == TRUNCATION_BOUNDS[1], "nothing is good enough"
    assert chosen(0.9, 0.05) > chosen(0.9, 0.5) > chosen(0.9, 50.0)


def test_adaptive_waits_for_a_measurement_and_averages() -> None:
    controller, state = Adaptive(0.1, 24), {"beta": np.array([np.nan])}
    for unknown in (np.nan, 0.0):
        knobs, state = controller(signals(grad_decay=unknown), state)
        assert knobs.truncation == 24
    _, state = controller(signals(grad_decay=-math.log(0.5)), state)
    assert state["beta"] == pytest.approx(0.5)
    _, state = controller(signals(grad_decay=-math.log(0.9)), state)
    assert state["beta"] == pytest.approx(0.7 * 0.5 + 0.3 * 0.9)
    for unknown in (np.nan, 0.0):
        assert controller(signals(grad_decay=unknown), state)[1] == state


def test_every_name_makes_a_controller_of_a_rate_and_a_truncation() -> None:
    for make in UNLEARNED.values():
        controller = make(lr=0.01, truncation=64)
        assert isinstance(controller, Controller)
        assert played(controller, truncation_max=64.0)[-1].truncation <= 64
