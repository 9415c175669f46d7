"""Controllers and the codec: limits, purity, batches, scale."""

import copy
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlrnn.baselines import (
    Adaptive,
    Constant,
    LengthWarmup,
    Linear,
    Plateau,
    WarmupCosine,
)
from rlrnn.control import (
    ACTIONS,
    FEATURES,
    LR_BOUNDS,
    LR_FACTORS,
    NO_OP,
    TRUNCATION_BOUNDS,
    TRUNCATION_FACTORS,
    Ablation,
    Codec,
    Controller,
    Knobs,
    NoOp,
    Signals,
    State,
    Steered,
    default_lambda,
    prior,
    visible,
    warmup_cosine,
)
from rlrnn.population import joined

Rows = list[Signals]
MEASURED = ["train_loss", "loss_noise", "probe_loss", "grad_norm", "clip_fraction"]
MEASURED += ["grad_cosine", "update_ratio", "carried_grad", "grad_decay"]


def signals(n: int = 1, **given: Any) -> Signals:
    """Signals of n runs in the middle of things, but for what is `given`."""
    usual = {
        "progress": 0.5,
        "next_progress": 0.55,
        "windows_left": 300.0,
        "train_loss": 1.5,
        "loss_noise": 0.05,
        "probe_loss": 1.6,
        "grad_norm": 0.4,
        "clip_fraction": 0.2,
        "grad_cosine": 0.1,
        "update_ratio": 0.01,
        "carried_grad": 0.03,
        "grad_decay": 0.2,
        "lr": 0.01,
        "truncation": 16.0,
        "truncation_max": 256.0,
        "range_lr": 3e-3,
        "adaptive": 1.0,
        "recovered": 0.0,
        "lr_scale": 1.0,
        "failed": 0.0,
        "whole": 0.0,
    }
    assert given.keys() <= usual.keys() == set(Signals.__dataclass_fields__)
    return Signals(
        **{k: np.full(n, given.get(k, v), np.float64) for k, v in usual.items()}
    )


def story(n: int, steps: int = 12, seed: int = 0) -> Rows:
    """What n unlike runs tell, one decision after the other."""
    rng = np.random.default_rng(seed)
    rows = []
    ends = np.linspace(0, 1, steps + 1)
    adaptive, range_lr = rng.integers(0, 2, n), 10 ** rng.uniform(-4, -1, n)
    range_lr[0] = np.nan
    for i in range(steps):
        there = rng.random(n) < (0.0 if i == 0 else 0.8)
        values = vars(signals(n))
        for name in MEASURED:
            drawn = rng.uniform(0.05, 1, n)
            values[name] = drawn if name == "probe_loss" else np.where(there, drawn, 1)
            if name != "probe_loss":
                values[name][~there] = np.nan
        values |= {
            "progress": np.full(n, ends[i]),
            "next_progress": np.full(n, ends[i + 1]),
            "windows_left": rng.uniform(0, 1000, n),
            "truncation_max": 2.0 ** rng.integers(2, 11, n),
            "adaptive": adaptive.astype(float),
            "range_lr": range_lr,
            "recovered": (~there).astype(float),
            "lr_scale": 0.5 ** rng.integers(0, 3, n),
        }
        rows.append(Signals(**values))
    return rows


def one(tree: Any, i: int) -> Any:
    """Run i of n, as a batch of one."""
    if isinstance(tree, dict):
        return {k: one(v, i) for k, v in tree.items()}
    if isinstance(tree, (Signals, Knobs)):
        return type(tree)(**one(vars(tree), i))
    return tree[i : i + 1]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (Signals, Knobs)):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True))


class Restless:
    """A player that moves all the time, each run in its own way."""

    def init(self, n: int) -> State:
        return {"count": np.zeros(n)}

    def __call__(
        self, observation: NDArray[np.float32], state: State
    ) -> tuple[NDArray[np.int64], State]:
        moves = (observation[:, :1] * 1000 + state["count"][:, None] + [0, 1]).round()
        return np.abs(moves).astype(np.int64) % ACTIONS, {"count": state["count"] + 1}


CONTROLLERS: dict[str, Controller] = {
    "constant": Constant(0.02, 33),
    "cosine": WarmupCosine(0.02, 33, 0.1),
    "plateau": Plateau(0.02, 33, patience=1),
    "linear": Linear(33),
    "length_warmup": LengthWarmup(0.02, 33),
    "adaptive": Adaptive(0.02, 33),
    "prior": prior(),
    "restless": Steered(Restless()),
}


# --- all controllers ----------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_controllers_are_pure(name: str) -> None:
    controller = CONTROLLERS[name]
    assert isinstance(controller, Controller)
    state = controller.init(3)
    for told in story(3):
        kept = copy.deepcopy((told, state))
        knobs, after = controller(told, state)
        assert same(told, kept[0]) and same(state, kept[1])
        again, after_again = controller(told, state)
        assert same(knobs, again) and same(after, after_again)
        state = after


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_three_runs_are_three_times_one_run(name: str) -> None:
    controller = CONTROLLERS[name]
    together = controller.init(3)
    alone = [controller.init(1) for _ in range(3)]
    for told in story(3):
        knobs, together = controller(told, together)
        for i in range(3):
            mine, alone[i] = controller(one(told, i), alone[i])
            assert same(mine, one(knobs, i))
            assert same(alone[i], one(together, i))


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_knobs_have_their_kinds_and_keep_their_bounds(name: str) -> None:
    controller = CONTROLLERS[name]
    for seed in range(3):
        state = controller.init(5)
        for told in story(5, 40, seed):
            knobs, state = controller(told, state)
            for rate in (knobs.lr, knobs.lr_end):
                assert rate.shape == (5,) and rate.dtype == np.float64
                assert (rate >= LR_BOUNDS[0]).all() and (rate <= LR_BOUNDS[1]).all()
            assert knobs.truncation.dtype == np.int64
            low, high = TRUNCATION_BOUNDS
            assert (low <= knobs.truncation).all() and (knobs.truncation <= high).all()


# --- those not learned --------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_warmup_cosine_at_its_limits(warmup: float) -> None:
    def at(*progress: float) -> NDArray[np.float64]:
        return warmup_cosine(np.array(progress), warmup)

    assert at(warmup) == 1
    assert at(1.0) == pytest.approx(0, abs=1e-15)
    assert at(1.2) == pytest.approx(0, abs=1e-15)
    assert at((1 + warmup) / 2) == pytest.approx(0.5)
    if warmup:
        assert at(0.0) == 0
        assert at(warmup / 4) == pytest.approx(0.25)
        assert at(warmup * (1 - 1e-9)) == pytest.approx(1)
    shape = at(*np.linspace(0, 1, 1001))
    assert ((0 <= shape) & (shape <= 1)).all()
    peak = int(shape.argmax())
    assert (np.diff(shape[: peak + 1]) >= 0).all() and (np.diff(shape[peak:]) < 0).all()


def test_cosine_is_half_a_period_of_a_cosine() -> None:
    x = np.linspace(0, 1, 50)
    assert np.allclose(warmup_cosine(x, 0.0), (1 + np.cos(np.pi * x)) / 2)
    scheduler_steps = 49
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, scheduler_steps)
    for expected in warmup_cosine(x, 0.0):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("name", ["cosine", "prior", "restless"])
def test_rates_are_continuous_while_nobody_moves(name: str) -> None:
    controller = CONTROLLERS[name]
    if name == "restless":
        controller = Steered(NoOp(), Codec(truncation=64, warmup=0.3))
    state, before = controller.init(1), None
    for progress in range(20):
        told = signals(progress=progress / 20, next_progress=(progress + 1) / 20)
        knobs, state = controller(told, state)
        if before is not None:
            assert knobs.lr == before
        before = knobs.lr_end


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plateau_is_that_of_torch(seed: int, patience: int) -> None:
    rng = np.random.default_rng(seed)
    factor, threshold = 0.3, 0.05
    controller = Plateau(0.1, 8, factor, patience, threshold)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience, threshold=threshold, eps=0
    )
    state = controller.init(1)
    loss, rates = 3.0, set()
    for _ in range(60):
        loss *= float(np.exp(rng.normal(-0.02, 0.1)))
        knobs, state = controller(signals(probe_loss=loss), state)
        schedule.step(loss)
        expected = max(optimizer.param_groups[0]["lr"], LR_BOUNDS[0])
        assert knobs.lr[0] == pytest.approx(expected)
        assert knobs.lr == knobs.lr_end and knobs.truncation == 8
        rates.add(expected)
    assert len(rates) > 2


def test_constant_is_constant() -> None:
    told = story(4)
    for row in told:
        knobs, state = Constant(0.3, 20)(row, {})
        assert (knobs.lr == 0.3).all() and (knobs.lr_end == 0.3).all()
        assert (knobs.truncation == 20).all() and state == {}


def played(controller: Controller, steps: int = 40, **told: Any) -> list[Knobs]:
    """What it says over a run in which all signals but the progress stay the same."""
    state, said = controller.init(1), []
    for i in range(steps):
        place = {"progress": i / steps, "next_progress": (i + 1) / steps}
        knobs, state = controller(signals(**{**told, **place}), state)
        said.append(knobs)
    return said


# --- codec: actions -----------------------------------------------------------------


def act(
    action: tuple[int, int], told: Signals, state: State, codec: Codec | None = None
) -> tuple[Knobs, State]:
    actions = np.tile(action, (len(told.progress), 1)).astype(np.int64)
    return (codec or Codec()).act(actions, told, state)


@pytest.mark.parametrize(("adaptive", "power"), [(1.0, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("truncation", [4, 16, 64])
def test_no_op_for_ever_is_warmup_and_cosine(
    truncation: int, adaptive: float, power: float
) -> None:
    codec = Codec(truncation, 0.1)
    controller = Steered(NoOp(), codec)
    state = controller.init(1)
    peak = 3e-3 * truncation**power
    expected = WarmupCosine(peak, truncation, 0.1)
    for i in range(30):
        told = signals(
            progress=i / 30, next_progress=(i + 1) / 30, adaptive=adaptive, lr=0.7
        )
        knobs, state = controller(told, state)
        theirs, _ = expected(told, {})
        assert knobs.lr == pytest.approx(theirs.lr, rel=1e-12)
        assert knobs.lr_end == pytest.approx(theirs.lr_end, rel=1e-12)
        assert knobs.truncation == truncation


def test_without_a_range_test_there_is_a_default() -> None:
    for adaptive, power in ((1.0, 0.5), (0.0, 1.0)):
        told = signals(range_lr=np.nan, adaptive=adaptive)
        base = default_lambda(np.array([power]))
        known = signals(range_lr=base, adaptive=adaptive)
        state = Codec().init(1)
        assert same(act(NO_OP, told, state)[0], act(NO_OP, known, state)[0])


def test_factors_of_the_rate_multiply() -> None:
    told = signals()
    state = Codec().init(1)
    usual = act(NO_OP, told, state)[0].lr
    product = 1.0
    for move in (4, 4, 0, 6, 2, 5, 3, 1):
        knobs, state = act((move, 1), told, state)
        product *= LR_FACTORS[move]
        assert knobs.lr == pytest.approx(product * usual)
        assert knobs.truncation == 16
    # the moves of both directions undo each other
    assert np.allclose(LR_FACTORS * LR_FACTORS[::-1], 1)
    assert np.allclose(TRUNCATION_FACTORS * TRUNCATION_FACTORS[::-1], 1)
    assert LR_FACTORS[NO_OP[0]] == 1 == TRUNCATION_FACTORS[NO_OP[1]]


@pytest.mark.parametrize(("adaptive", "power"), [(1.0, 0.5), (0.0, 1.0)])
def test_moves_of_the_truncation_keep_lambda(adaptive: float, power: float) -> None:
    told = signals(adaptive=adaptive, range_lr=1e-4)
    state = Codec().init(1)
    usual, _ = act(NO_OP, told, state)
    lambda_ = usual.lr / usual.truncation**power
    expected = 16
    for move in (2, 2, 0, 0, 0, 0, 2, 1):
        knobs, state = act((3, move), told, state)
        expected = max(4, int(expected * TRUNCATION_FACTORS[move]))
        assert knobs.truncation == expected
        assert knobs.lr / knobs.truncation**power == pytest.approx(lambda_)
    assert state["log_lambda"] == pytest.approx(0)


@pytest.mark.parametrize("adaptive", [0.0, 1.0])
def test_whole_sequences_are_never_cut(adaptive: float) -> None:
    """Shorter K would be no more updates, and moves of K are none of the rate."""
    told = signals(adaptive=adaptive, range_lr=1e-4, whole=1.0, truncation_max=64.0)
    stream = signals(adaptive=adaptive, range_lr=1e-4, truncation_max=64.0)
    state = Codec().init(1)
    usual, _ = act(NO_OP, stream, state)
    for move in (1, 0, 0, 2, 2, 2):
        knobs, state = act((3, move), told, state)
        assert knobs.truncation == 64
        assert knobs.lr == pytest.approx(usual.lr)
        assert state["previous"][0, 1] == 0
    # a stream next to it has its own
    both = joined([told, stream])
    knobs, _ = Codec().act(np.array([[3, 0], [3, 0]]), both, Codec().init(2))
    assert knobs.truncation.tolist() == [64, 8]


def test_the_truncation_stays_inside_what_there_is_room_for() -> None:
    state = Codec().init(1)
    for _ in range(12):
        knobs, state = act((3, 2), signals(truncation_max=32.0), state)
    assert knobs.truncation == 32
    # more room, and it is taken
    knobs, _ = act(NO_OP, signals(truncation_max=2048.0), state)
    assert knobs.truncation == TRUNCATION_BOUNDS[1]
    for _ in range(12):
        knobs, state = act((3, 0), signals(), state)
    assert knobs.truncation == TRUNCATION_BOUNDS[0]


@pytest.mark.parametrize("adaptive", [0.0, 1.0])
def test_the_rate_stays_inside_its_bounds_and_comes_back_at_once(
    adaptive: float,
) -> None:
    told = signals(
        progress=0.05, next_progress=0.05, adaptive=adaptive, range_lr=math.nan
    )
    for there, back, bound in ((6, 0, LR_BOUNDS[1]), (0, 6, LR_BOUNDS[0])):
        state = Codec().init(1)
        for _ in range(30):
            knobs, state = act((there, 1), told, state)
        assert knobs.lr == pytest.approx(bound)
        knobs, state = act((back, 1), told, state)
        assert knobs.lr == pytest.approx(bound * LR_FACTORS[back])


@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_the_rate_stays_near_what_a_range_test_suggests(factor: float) -> None:
    """However often it is moved; and it comes back at once."""
    told = signals(progress=0.05, next_progress=0.05, range_lr=1e-6 * factor)
    suggested = float(act(NO_OP, told, Codec().init(1))[0].lr[0])
    for there, back, bound in ((6, 2, 4), (5, 0, 4), (0, 4, 1 / 4), (2, 6, 1 / 4)):
        state = Codec().init(1)
        for _ in range(10):
            knobs, state = act((there, 1), told, state)
        assert knobs.lr == pytest.approx(bound * suggested)
        knobs, state = act((back, 1), told, state)
        assert knobs.lr == pytest.approx(bound * suggested * LR_FACTORS[back])
    # an agent without the test has nothing to stay near
    alone = Codec(ablation="no_prior")
    state = alone.init(1)
    for _ in range(10):
        knobs, state = alone.act(np.array([[5, 1]]), told, state)
    assert knobs.lr > 4 * alone.act(np.array([NO_OP]), told, alone.init(1))[0].lr


# --- codec: ablations ----------------------------------------------------------------


def test_ablations_hide_what_they_say() -> None:
    shown = {name: visible(name).sum() for name in get_args(Ablation)}
    whole = len(FEATURES)
    assert shown["open_loop"] == 1 and shown["no_bias_features"] == whole - 3
    assert {n for name, n in shown.items() if "only" in name} == {whole}
    for name in get_args(Ablation):
        codec = Codec(ablation=name)
        for told in story(3):
            full, _ = Codec().observe(told, Codec().init(3))
            seen, _ = codec.observe(told, codec.init(3))
            assert np.array_equal(seen, full * visible(name))


def test_an_open_loop_does_not_see_how_the_run_goes() -> None:
    codec = Codec(ablation="open_loop")
    a, b = signals(progress=0.3), signals(1, progress=0.3, train_loss=9.0, recovered=1)
    one, two = (codec.observe(told, codec.init(1))[0] for told in (a, b))
    assert np.array_equal(one, two)
    assert one[0, column("progress")] == pytest.approx(4 * 0.3 - 2)


@pytest.mark.parametrize("name", ["rate_only", "truncation_only"])
def test_one_knob_alone(name: Ablation) -> None:
    codec, told = Codec(ablation=name), signals()
    for action in ((6, 2), (0, 0), (3, 2)):
        mine = action[0], NO_OP[1]
        if name == "truncation_only":
            mine = NO_OP[0], action[1]
        knobs, state = act(action, told, codec.init(1), codec)
        expected, after = act(mine, told, Codec().init(1))
        assert same(knobs, expected) and same(state, after)


def test_without_a_prior_no_op_is_a_constant_default() -> None:
    controller = Steered(NoOp(), Codec(ablation="no_prior"))
    assert prior().range_test and not controller.range_test
    for adaptive, power in ((1.0, 0.5), (0.0, 1.0)):
        rate = float(default_lambda(np.array(power))) * 16**power
        for knobs in played(controller, adaptive=adaptive, range_lr=np.nan):
            assert knobs.lr == knobs.lr_end == pytest.approx(rate)
            assert knobs.truncation == 16
    moved, _ = act((4, 1), signals(), controller.codec.init(1), controller.codec)
    assert moved.lr == pytest.approx(1.3 * float(default_lambda(np.array(0.5))) * 4)


# --- codec: observations ------------------------------------------------------------


def observed(rows: Rows, action: tuple[int, int] = NO_OP) -> NDArray[np.float32]:
    """Observations [steps, n, D] of a story, under one action."""
    codec = Codec()
    state = codec.init(len(rows[0].progress))
    seen = []
    for told in rows:
        observation, state = codec.observe(told, state)
        seen.append(observation)
        _, state = act(action, told, state)
    return np.stack(seen)


def column(name: str) -> int:
    return FEATURES.index(name)


def test_observations_are_finite_bounded_and_as_many_as_the_features() -> None:
    for seed in range(3):
        for action in (NO_OP, (6, 2), (0, 0)):
            seen = observed(story(7, 30, seed), action)
            assert seen.shape == (30, 7, len(FEATURES)) and seen.dtype == np.float32
            assert np.isfinite(seen).all() and np.abs(seen).max() <= 5
    assert len(set(FEATURES)) == len(FEATURES)


@pytest.mark.parametrize("value", [np.nan, 0.0, 1e300, 1e-300])
def test_observations_survive_what_signals_may_be(value: float) -> None:
    given = {name: np.full(2, value) for name in MEASURED}
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        told = Signals(**{**vars(signals(2)), **given})
        rows = [signals(2), told, signals(2), told]
        seen = observed(rows)
        assert np.isfinite(seen).all() and np.abs(seen).max() <= 5
        every = Signals.__dataclass_fields__
        if not value > 1:
            told = Signals(**{name: np.full(2, value) for name in every})
            seen = observed([told] * 3)
            assert np.isfinite(seen).all() and np.abs(seen).max() <= 5


def test_missing_signals_are_flagged() -> None:
    for name, flag in (
        ("probe_loss", "no probe"),
        ("carried_grad", "no hidden gradient"),
    ):
        there = observed([signals()])[0, 0, column(flag)]
        missing = observed([Signals(**{**vars(signals()), name: np.array([np.nan])})])[
            0, 0, column(flag)
        ]
        assert (there, missing) == (0, 1)


def scaled(rows: Rows, factor: float) -> Rows:
    names = ("train_loss", "probe_loss", "grad_norm")
    return [Signals(**vars(r) | {n: factor * vars(r)[n] for n in names}) for r in rows]


def test_observations_do_not_know_the_unit_of_the_loss() -> None:
    """Nats or bits, only the gradient's place relative to the clip moves."""
    rows = story(4)
    a, b = observed(rows), observed(scaled(rows, 1 / math.log(2)))
    moved = np.abs(a - b).max((0, 1)) > 1e-5
    assert [FEATURES[i] for i in np.flatnonzero(moved)] == [
        "log gradient norm - log clip"
    ]


def test_one_feature_alone_knows_the_rate_that_fits_the_task() -> None:
    rows = story(4)
    other = [Signals(**vars(r) | {"range_lr": r.range_lr / 2}) for r in rows]
    seen, its = observed(rows, (2, 1)), observed(other, (2, 1))
    one = column("log(lambda of the prior / default)")
    assert np.allclose(np.delete(seen, one, 2), np.delete(its, one, 2), atol=1e-6)
    told = ~np.isnan(rows[0].range_lr)
    difference = (seen - its)[:, told, one]
    assert np.allclose(difference, np.log(2), atol=1e-6)


def test_falls_are_falls() -> None:
    rows = [signals(train_loss=1.5 * 0.99**i, probe_loss=0.98**i) for i in range(40)]
    seen = observed(rows)[:, 0]
    train, probe = (column(f"{p} loss, fall per interval") for p in ("train", "probe"))
    assert seen[0, train] == seen[0, probe] == 0  # nothing to compare with
    assert seen[1:, train] == pytest.approx(-20 * math.log(0.99), rel=1e-5)
    assert seen[1:, probe] == pytest.approx(-20 * math.log(0.98), rel=1e-5)
    # the slow averages come to the same
    for name in ("train", "probe"):
        slow = seen[:, column(f"{name} loss, fall per interval, slow average")]
        fast = seen[-1, column(f"{name} loss, fall per interval")]
        assert (np.diff(slow) >= 0).all()
        assert slow[-1] == pytest.approx(fast, rel=1e-3)


def test_a_fall_across_a_missing_loss_is_seen_when_it_is_back() -> None:
    rows = [signals(train_loss=v) for v in (1.0, np.nan, 0.9)]
    seen = observed(rows)[:, 0, column("train loss, fall per interval")]
    assert seen == pytest.approx([0, 0, -20 * math.log(0.9)])


def test_previous_actions_and_offsets_are_seen() -> None:
    told = signals()
    for i, action in enumerate(((0, 0), (3, 1), (6, 2))):
        codec = Codec()
        _, state = codec.observe(told, codec.init(1))
        _, state = act(action, told, state)
        seen, _ = codec.observe(told, state)
        assert seen[0, column("previous action, rate")] == i - 1
        assert seen[0, column("previous action, truncation")] == i - 1
        ratio = seen[0, column("log(lambda / lambda of the prior)")]
        assert ratio == pytest.approx(math.log(LR_FACTORS[action[0]]))
        assert seen[0, column("log2(K / K of the prior)")] == i - 1
