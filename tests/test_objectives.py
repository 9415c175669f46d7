"""Losses and metrics, against torch's own, numerical integrals and enumeration."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlrnn.objectives import (
    Classes,
    Ctc,
    ForecastLoss,
    Labels,
    Numbers,
    Objective,
    edit_distance,
    macro_f1,
    pinball,
)

STEPS, BATCH, COUNT = 5, 3, 4
LOSSES: list[ForecastLoss] = ["mse", "mae", "quantile", "normal", "student"]
QUANTILES = (0.1, 0.25, 0.5, 0.9)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(loss: ForecastLoss, count: int = COUNT) -> Numbers:
    return Numbers(count, loss, QUANTILES)


def case(objective: Objective, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, targets and a mask with some positions due, drawn at random."""
    g = drawn(seed)
    shape = (STEPS, BATCH)
    out = torch.randn(*shape, objective.outputs, generator=g, dtype=torch.float64)
    mask = torch.rand(shape, generator=g) < 0.6
    if isinstance(objective, Classes):
        y = torch.randint(COUNT, shape, generator=g)
    elif isinstance(objective, Labels):
        y = (torch.rand(*shape, COUNT, generator=g) < 0.4).double()
    elif isinstance(objective, Numbers):
        y = torch.randn(*shape, COUNT, generator=g, dtype=torch.float64)
    else:
        y = torch.tensor([[0, 2, 1], [1, -1, 1], [-1, -1, 0]])
        mask = torch.arange(STEPS).unsqueeze(1) < torch.tensor([5, 3, 4])
    return out, y, mask


OBJECTIVES: list[Objective] = [
    Classes(COUNT),
    Classes(COUNT, ("a", "b", "c", "d")),
    Labels(COUNT),
    *(numbers(loss) for loss in LOSSES),
    Ctc(COUNT),
]


def slow(objective: Objective, out: Tensor, y: Tensor) -> float:
    """The loss of one position, by torch or by the book."""
    if isinstance(objective, Classes):
        return float(-out.softmax(-1).log()[int(y)])
    if isinstance(objective, Labels):
        p = torch.where(y > 0, out, -out).sigmoid()
        return -float(p.log().sum())
    assert isinstance(objective, Numbers)
    rows = out.view(COUNT, -1)
    match objective.loss:
        case "mse":
            return float(F.mse_loss(rows[:, 0], y))
        case "mae":
            return float(F.l1_loss(rows[:, 0], y))
        case "quantile":
            losses = [
                2 * (q * max(e, 0.0) + (1 - q) * max(-e, 0.0))
                for row, target in zip(rows, y, strict=True)
                for q, e in zip(QUANTILES, (target - row).tolist(), strict=True)
            ]
            return float(np.mean(losses))
        case "normal":
            return log_loss(torch.distributions.Normal(rows[:, 0], rows[:, 1].exp()), y)
        case "student":
            scale = rows[:, 1].exp()
            return log_loss(torch.distributions.StudentT(4.0, rows[:, 0], scale), y)


def log_loss(distribution: torch.distributions.Distribution, y: Tensor) -> float:
    log_p: Tensor = distribution.log_prob(y)
    return -float(log_p.mean())


# --- losses -------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES[:-1], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_total_is_the_sum_over_what_is_due(
    objective: Objective, masked: bool
) -> None:
    out, y, mask = case(objective)
    expected = sum(
        slow(objective, out[t, b], y[t, b])
        for t, b in itertools.product(range(STEPS), range(BATCH))
        if mask[t, b] or not masked
    )
    total = objective.total(out, y, mask if masked else None)
    assert float(total) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_what_is_masked_has_no_gradient(objective: Objective) -> None:
    out, y, mask = case(objective)
    out.requires_grad_()
    objective.total(out, y, mask).backward()  # type: ignore[no-untyped-call]
    assert out.grad is not None
    assert (out.grad[~mask] == 0).all()
    assert (out.grad[mask] != 0).any(-1).all()


@pytest.mark.parametrize("objective", OBJECTIVES[:-1], ids=str)
def test_windows_add_up(objective: Objective) -> None:
    """The sums over a split do not know how it was cut."""
    out, y, mask = case(objective)
    whole = objective.tally(out, y, mask)
    parts = [
        objective.tally(out[a:b], y[a:b], mask[a:b]) for a, b in ((0, 2), (2, STEPS))
    ]
    assert float(whole["loss"]) == pytest.approx(float(objective.total(out, y, mask)))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)
    everywhere = objective.tally(out, y, torch.ones_like(mask))
    for name, value in objective.tally(out, y, None).items():
        torch.testing.assert_close(value, everywhere[name])


def test_who_knows_nothing_pays_the_logarithm_of_the_choices() -> None:
    zeros = torch.zeros(STEPS, BATCH, COUNT)
    y = torch.zeros(STEPS, BATCH, dtype=torch.int64)
    one = Classes(COUNT)
    figures = one.report(one.tally(zeros, y, None), float(STEPS * BATCH))
    assert figures["nats"] == pytest.approx(math.log(COUNT))
    assert figures["bits"] == pytest.approx(math.log2(COUNT))
    assert figures["perplexity"] == pytest.approx(COUNT)
    labels = Labels(COUNT).total(zeros, zeros, None)
    assert float(labels) == pytest.approx(STEPS * BATCH * COUNT * math.log(2))


# --- numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_missing_numbers_are_left_out(loss: ForecastLoss) -> None:
    objective = numbers(loss)
    out, y, mask = case(objective)
    missing = torch.zeros_like(y, dtype=torch.bool)
    missing[0, :, 1] = missing[1, 0, 2:] = missing[2, 1] = True
    holes = y.masked_fill(missing, math.nan)
    out.requires_grad_()
    total = objective.total(out, holes, None)
    total.backward()  # type: ignore[no-untyped-call]
    assert out.grad is not None and out.grad.isfinite().all()
    gradient = out.grad.view(STEPS, BATCH, COUNT, -1)
    assert (gradient[missing] == 0).all() and (gradient[~missing] != 0).any()
    # a mean over those that are there, and nothing where there is none
    alone = numbers(loss, 1)
    values = out.detach().view(STEPS, BATCH, COUNT, 1, -1)
    expected = 0.0
    for t, b in itertools.product(range(STEPS), range(BATCH)):
        known = [i for i in range(COUNT) if not missing[t, b, i]]
        losses = [
            float(alone.total(values[t, b, i, None], y[t, b, i].view(1, 1, 1), None))
            for i in known
        ]
        expected += float(np.mean(losses)) if losses else 0.0
    assert float(total.detach()) == pytest.approx(expected)
    # metrics count numbers, not steps
    sums = objective.tally(out.detach(), holes, mask)
    there = ~missing & mask.unsqueeze(-1)
    error = (objective.point(out.detach()) - y)[there]
    figures = objective.report(sums, float(mask.sum()))
    assert figures["mse"] == pytest.approx(float(error.square().mean()))
    assert figures["rmse"] == pytest.approx(math.sqrt(figures["mse"]))
    assert figures["mae"] == pytest.approx(float(error.abs().mean()))


def density(loss: ForecastLoss, y: Tensor, mean: float, scale: float) -> Tensor:
    """What `loss` is the negative logarithm of, at y [N]."""
    out = torch.tensor([mean, math.log(scale)], dtype=torch.float64)
    objective = numbers(loss, 1)
    losses = [objective.total(out.view(1, 1, 2), v.view(1, 1, 1), None) for v in y]
    return (-torch.stack(losses)).exp()


@cache
def cumulated(loss: ForecastLoss) -> tuple[Tensor, Tensor]:
    """A grid around 1, dense in the middle, and the integral of the density up to it.
    Student's tails fall as |y|^-5."""
    y = 1 + 0.5 * torch.linspace(-8, 8, 8001, dtype=torch.float64).sinh()
    p = density(loss, y, 1.0, 0.5)
    return y, torch.cumulative_trapezoid(p, y)


@pytest.mark.parametrize("loss", ["normal", "student"])
def test_densities_integrate_to_one(loss: ForecastLoss) -> None:
    _, cdf = cumulated(loss)
    assert float(cdf[-1]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("loss", ["normal", "student"])
def test_quantiles_invert_the_cumulated_density(loss: ForecastLoss) -> None:
    y, cdf = cumulated(loss)
    levels = (0.001, 0.05, 0.25, 0.5, 0.7, 0.975, 0.999)
    out = torch.tensor([[[1.0, math.log(0.5)]]], dtype=torch.float64)
    found = numbers(loss, 1).intervals(out, levels)
    assert found.shape == (1, 1, 1, len(levels))
    for level, at in zip(levels, found.flatten().tolist(), strict=True):
        before = int(torch.searchsorted(y, at))
        assert float(cdf[before - 1]) == pytest.approx(level, abs=2e-3)
    # the median is the mean, and both sides are alike
    assert float(found[0, 0, 0, 3]) == pytest.approx(1)
    ends = found[0, 0, 0, [0, -1]] - 1
    assert float(ends.sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.8])
def test_pinball_is_least_at_the_quantile(q: float) -> None:
    y = torch.randn(1001, generator=drawn(), dtype=torch.float64)
    guesses = torch.linspace(-3, 3, 601, dtype=torch.float64)
    losses = pinball(guesses.view(-1, 1, 1), y.expand(601, -1), (q,)).mean((1, 2))
    best = float(guesses[losses.argmin()])
    assert best == pytest.approx(float(y.quantile(q)), abs=0.02)
    # one half is the absolute error
    torch.testing.assert_close(pinball(y[:, None], 0 * y, (0.5,))[:, 0], y.abs())


def test_quantile_forecasts_give_their_quantiles() -> None:
    objective = numbers("quantile")
    out, _, _ = case(objective)
    grid = out.view(STEPS, BATCH, COUNT, len(QUANTILES))
    assert torch.equal(objective.intervals(out, (0.9, 0.1)), grid[..., [3, 0]])
    assert torch.equal(objective.point(out), grid[..., 2])
    assert torch.equal(Numbers(COUNT).point(out[..., :COUNT]), out[..., :COUNT])


def test_intervals_that_there_are_not_are_one_line() -> None:
    out = torch.zeros(1, 1, len(QUANTILES))
    with pytest.raises(ValueError, match=r"^quantile 0.2 was not trained for, .* 0.9$"):
        numbers("quantile", 1).intervals(out, (0.1, 0.2))
    with pytest.raises(ValueError, match="^loss mae gives no intervals; .*$"):
        numbers("mae", 1).intervals(out[..., :1], (0.1,))


@pytest.mark.parametrize("loss", ["quantile", "normal", "student"])
def test_coverage_counts_what_lies_between_the_outer_quantiles(
    loss: ForecastLoss,
) -> None:
    objective = numbers(loss, 1)
    if loss == "quantile":
        out = torch.tensor([-1.0, -0.5, 0.0, 1.0]).expand(1, 5, -1)
        low, high = -1.0, 1.0
    else:
        out = torch.zeros(1, 5, 2)
        low, high = objective.intervals(out, (0.1, 0.9))[0, 0, 0].tolist()
    given = [low - 0.1, low + 0.1, 0.0, high + 0.1, math.nan]
    sums = objective.tally(out, torch.tensor(given).view(1, 5, 1), None)
    assert objective.report(sums, 5.0)["coverage"] == pytest.approx(2 / 4)


def test_log_densities_say_so() -> None:
    for objective in OBJECTIVES:
        logarithmic = isinstance(objective, Numbers) and "s" == objective.unit[-1]
        assert objective.logarithmic == (logarithmic and objective.unit == "nats")
        figures = objective.report(objective.tally(*case(objective)), 5.0)
        assert objective.unit in figures
        assert all(isinstance(value, float) for value in figures.values())


# --- metrics ------------------------------------------------------------------------


def test_macro_f1_of_a_small_table() -> None:
    # truth 0: 2 right, 1 taken for 1; truth 1: 1 right; 2: never there, never guessed
    confusion = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert macro_f1(confusion) == pytest.approx((4 / 5 + 2 / 3) / 2)
    confusion[2, 0] = 1  # there, but never guessed
    assert macro_f1(confusion) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)


def test_accuracy_and_confusion_of_a_small_case() -> None:
    objective = Classes(3, ("a", "b", "c"))
    y = torch.tensor([[0, 0, 0, 1, 2]])
    guesses = torch.tensor([[0, 0, 1, 1, 1]])
    mask = torch.tensor([[True, True, True, True, False]])
    out = 9.0 * F.one_hot(guesses, 3).float()
    sums = objective.tally(out, y, mask)
    assert sums["confusion"].tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    figures = objective.report(sums, 4.0)
    assert figures["accuracy"] == 3 / 4
    assert figures["f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert "f1" not in Classes(3).report(Classes(3).tally(out, y, mask), 4.0)


def test_f1_of_labels_is_that_of_all_cells_together() -> None:
    objective = Labels(3)
    y = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 1.0]] * 2])
    out = torch.tensor([[[1.0, 1.0, -1.0], [-1.0, 1.0, -1.0]], [[1.0, 1.0, 1.0]] * 2])
    mask = torch.tensor([[True, True], [False, False]])
    # true 3, guessed 3, both 2
    figures = objective.report(objective.tally(out, y, mask), 2.0)
    assert figures["f1"] == pytest.approx(4 / 6)
    nothing = objective.tally(-out.abs(), 0 * y, mask)
    assert math.isnan(objective.report(nothing, 2.0)["f1"])


# --- connectionist temporal classification ------------------------------------------


def collapsed(path: tuple[int, ...]) -> list[int]:
    """Repeats go, then blanks."""
    return [label - 1 for label, _ in itertools.groupby(path) if label]


@pytest.mark.parametrize("true", [[], [0], [1, 0], [1, 1], [0, 1, 0]])
@pytest.mark.parametrize("frames", [2, 4])
def test_ctc_is_the_sum_over_all_alignments(true: list[int], frames: int) -> None:
    objective = Ctc(2)
    out = torch.randn(4, 1, 3, generator=drawn(), dtype=torch.float64)
    p = out[:frames, 0].softmax(-1)
    expected = sum(
        math.prod(float(p[t, label]) for t, label in enumerate(path))
        for path in itertools.product(range(3), repeat=frames)
        if collapsed(path) == true
    )
    y = torch.tensor([*true, -1], dtype=torch.int64).unsqueeze(1)
    mask = (torch.arange(4) < frames).unsqueeze(1)
    found = float(objective.total(out, y, mask))
    # a string that is too long for its frames has no alignment, and no loss
    assert found == pytest.approx(-math.log(expected) if expected else 0.0)


def test_ctc_of_a_batch_is_the_sum_over_its_strings() -> None:
    objective = Ctc(COUNT)
    out, y, mask = case(objective)
    alone = [
        float(objective.total(out[:, i : i + 1], y[:, i : i + 1], mask[:, i : i + 1]))
        for i in range(BATCH)
    ]
    assert float(objective.total(out, y, mask)) == pytest.approx(sum(alone))


def test_a_string_that_is_too_long_leaves_the_gradient_finite() -> None:
    out = torch.zeros(2, 1, 3, requires_grad=True)
    y = torch.tensor([[0], [0], [1]])
    Ctc(2).total(out, y, None).backward()  # type: ignore[no-untyped-call]
    assert out.grad is not None and out.grad.isfinite().all()


def test_greedy_decoding_drops_repeats_then_blanks() -> None:
    paths = torch.tensor([[0, 1, 1, 0, 1, 2], [3, 3, 2, 2, 0, 3], [1, 2, 0, 0, 1, 1]])
    out = F.one_hot(paths.t(), 4).float()
    mask = torch.arange(6).unsqueeze(1) < torch.tensor([6, 6, 4])
    assert Ctc(3).decode(out, mask) == [[0, 0, 1], [2, 1, 2], [0, 1]]
    assert Ctc(3).decode(out, None)[2] == [0, 1, 0]
    for row, found in zip(paths.tolist(), Ctc(3).decode(out, None), strict=True):
        assert found == collapsed(tuple(row))


def test_label_error_rate_of_a_small_case() -> None:
    paths = torch.tensor([[1, 0, 1, 2], [0, 3, 0, 0], [0, 0, 0, 0]])
    out = 9.0 * F.one_hot(paths.t(), 4).float()  # 0 0 1, then 2, then nothing
    y = torch.tensor([[0, 1, 2], [1, 2, -1], [-1, -1, -1]])
    # strings 001, 2 and none: 001 -> 012 is a deletion and an insertion, 2 -> 12
    # an insertion, none -> none nothing
    sums = Ctc(3).tally(out, y, None)
    figures = Ctc(3).report(sums, 5.0)
    assert figures["label_error_rate"] == pytest.approx(3 / 5)
    assert figures["nats"] == pytest.approx(float(Ctc(3).total(out, y, None)) / 5)


@cache
def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """By its definition."""
    if not a or not b:
        return len(a) + len(b)
    kept = distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(kept, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


def test_edit_distance_is_that_of_its_definition_and_a_distance() -> None:
    rng = np.random.default_rng(0)
    words = [rng.integers(3, size=n).tolist() for n in (0, 1, 3, 5, 5, 8)]
    for a, b in itertools.product(words, words):
        found = edit_distance(a, b)
        assert found == distance(tuple(a), tuple(b)) == edit_distance(b, a)
        assert (found == 0) == (a == b)
        for c in words:
            assert found <= edit_distance(a, c) + edit_distance(c, b)
