"""Recordings heard otherwise each time: masks and warped frequencies."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlrnn.data.audio import log_mel, mel_edges, with_deltas
from rlrnn.data.augment import (
    COLOUR,
    DECIBELS,
    Augmented,
    Changes,
    colours,
    masked,
    noisy,
    sloped,
    warped,
)
from rlrnn.data.chunks import Batches
from rlrnn.data.speech import SpeechOptions

BANDS, RATE = 20, 8000
NONE = Changes(0, 4, 0, 10, 0.0)
LENGTHS = torch.tensor([50, 30, 20, 7])


def centers() -> Tensor:
    return mel_edges(BANDS, RATE)[1:-1].float()


def source(changes: Changes, seed: int = 0) -> Augmented:
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(n, 2 * BANDS)) for n in (7, 9, 20, 21, 30, 31)]
    batches = Batches(given, [0, 1, 0, 1, 0, 1], 2, seed=0)
    mean, scale = torch.randn(2, 2 * BANDS, generator=torch.Generator().manual_seed(1))
    return Augmented(batches, changes, centers(), mean, 0.5 + scale.abs(), seed)


def mask(changes: Changes, seed: int, slopes: bool = True) -> Tensor:
    """[T, B, D]: what is silent."""
    x = torch.ones(50, len(LENGTHS), BANDS * (1 + slopes))
    generator = torch.Generator().manual_seed(seed)
    return masked(x, LENGTHS, BANDS, changes, generator) == 0


def test_bands_are_silent_at_all_times_and_in_their_slopes() -> None:
    widths = []
    for seed in range(200):
        silent = mask(replace(NONE, band_masks=1, band_width=6), seed)
        assert torch.equal(silent, silent[:1].expand_as(silent))
        assert torch.equal(silent[..., :BANDS], silent[..., BANDS:])
        for row in silent[0, :, :BANDS].int():
            widths.append(int(row.sum()))
            at = row.nonzero().flatten()  # one stretch
            assert len(at) < 2 or at[-1] - at[0] + 1 == len(at)
    counts = np.bincount(widths, minlength=7)
    assert len(counts) == 7  # uniform from 0 to 6
    np.testing.assert_allclose(counts / len(widths), 1 / 7, atol=0.05)


def test_frames_are_silent_inside_a_recording_and_a_fifth_at_most() -> None:
    ever = torch.zeros(50, len(LENGTHS), dtype=torch.bool)
    for seed in range(300):
        silent = mask(replace(NONE, time_masks=1, time_width=8), seed)
        assert (silent == silent[..., :1]).all()
        silent = silent[..., 0]
        ever |= silent
        assert (silent.sum(0) <= torch.minimum(LENGTHS // 5, torch.tensor(8))).all()
    inside = torch.arange(50).unsqueeze(1) < LENGTHS
    assert torch.equal(ever, inside)  # any frame, and none of the padding


def test_two_masks_hide_more_than_one() -> None:
    shares = [
        float(mask(replace(NONE, band_masks=n, band_width=6), 0).float().mean())
        for n in (0, 1, 4)
    ]
    assert shares[0] == 0 < shares[1] < shares[2]


def test_a_factor_of_one_changes_nothing_and_others_move_a_peak() -> None:
    x = torch.randn(3, 2, 2 * BANDS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warped(x, torch.ones(2), centers()), x)
    bump = (-0.5 * ((torch.arange(BANDS) - 8.0) / 2) ** 2).exp()
    y = warped(
        bump.expand(1, 2, BANDS).contiguous(), torch.tensor([1.2, 0.8]), centers()
    )
    hertz = [float(centers()[int(row.argmax())]) for row in y[0]]
    peak = float(centers()[8])
    assert hertz[0] == pytest.approx(1.2 * peak, rel=0.06)
    assert hertz[1] == pytest.approx(0.8 * peak, rel=0.06)


def test_warped_features_are_those_of_a_warped_sound() -> None:
    """Tones at frequencies that are 1.15 times as high."""
    step = torch.arange(2000) / RATE

    def features(factor: float) -> Tensor:
        hertz = torch.linspace(60, 3000, 150)
        level = 1 + torch.cos(hertz / 300) * 0.9
        phase = torch.arange(150) ** 2 * 1.0
        angle = 2 * torch.pi * factor * hertz[:, None] * step + phase[:, None]
        wave = (level[:, None] * torch.cos(angle)).sum(0) / 100
        return log_mel(wave, RATE, BANDS, 25, 10).mean(0)

    plain, higher = features(1.0), features(1.15)
    made = warped(plain.view(1, 1, -1), torch.tensor([1.15]), centers())[0, 0]
    inner = slice(3, 15)  # of the lowest and highest bands there is nothing to hear
    assert (made - higher)[inner].abs().mean() < 0.5 * (plain - higher)[
        inner
    ].abs().mean()


def test_noise_adds_its_power_and_nothing_is_below_the_floor() -> None:
    changes = replace(NONE, noise=10.0, range=30.0)
    silence = torch.full((5, 4000, BANDS), -20.0)
    heard = noisy(silence, changes, torch.Generator().manual_seed(0)) * DECIBELS
    assert torch.equal(heard[0], heard[-1])  # the same at all times
    assert heard.min() == pytest.approx(-30, abs=1e-4)
    level = heard[0].mean(1)  # from 30 to 10 dB below the loudest
    assert level.mean() == pytest.approx(-20, abs=0.7)
    assert level.min() >= -30.001 and level.max() < -9.99
    loud = noisy(torch.zeros_like(silence), changes, torch.Generator().manual_seed(0))
    power = (heard / DECIBELS).exp()
    known = heard > -29.9  # of what is at the floor, the power is not known
    torch.testing.assert_close(loud.exp()[known], 1 + power[known])


def test_colours_are_smooth_with_a_mean_of_zero() -> None:
    drawn = colours(4000, BANDS, torch.Generator().manual_seed(0)) * DECIBELS
    torch.testing.assert_close(drawn.mean(1), torch.zeros(4000), atol=1e-4, rtol=0)
    assert drawn.square().mean().sqrt() == pytest.approx(COLOUR, rel=0.03)
    steps = drawn.diff(dim=1).square().mean().sqrt()
    assert steps < 0.5 * COLOUR  # of white noise: 1.4


def test_slopes_are_those_of_each_recording() -> None:
    x = torch.randn(50, len(LENGTHS), BANDS, generator=torch.Generator().manual_seed(0))
    y = sloped(x, LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(y[:length, b], with_deltas(x[:length, b]))


def test_a_place_in_the_data_is_heard_the_same_and_each_pass_otherwise() -> None:
    changes = Changes(2, 4, 2, 10, 0.2, 10.0, 30.0)
    one, again, other = source(changes), source(changes), source(changes, seed=1)
    t, seen = 0, []
    for _ in range(6):
        steps = one.span(t, 8)
        chunk = one.window(t, steps)
        assert torch.equal(chunk.x, again.window(t, steps).x)
        assert not torch.equal(chunk.x, other.window(t, steps).x)
        plain = one.source.window(t, steps)
        assert chunk.x.shape == plain.x.shape and torch.equal(chunk.y, plain.y)
        seen.append(chunk.x)
        t += steps
    moved = one.to(torch.device("cpu"))
    assert torch.equal(moved.window(0, one.span(0, 8)).x, seen[0])
    assert moved.fingerprint() == one.source.fingerprint()
    assert (one.length, one.typical(8)) == (one.source.length, one.source.typical(8))


def test_without_changes_nothing_is_changed() -> None:
    plain = source(NONE)
    assert not NONE and not SpeechOptions().changes()
    steps = plain.span(0, 8)
    assert torch.equal(plain.window(0, steps).x, plain.source.window(0, steps).x)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"band_masks": -1}, "data.speech.band_masks is -1, expected at least 0"),
        ({"band_width": 41}, "data.speech.band_width is 41, expected at most"),
        ({"warp": 0.7}, "data.speech.warp is 0.7, expected 0 to 0.5"),
        (
            {"noise": 10.0},
            "data.speech.noise is 10.0, expected 0 to data.speech.top_db",
        ),
        (
            {"noise": 10.0, "top_db": 30.0, "center": True},
            "data.speech.noise is 10.0 and data.speech.center is true",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(SpeechOptions(), **setting)
    assert str(caught.value).startswith(says)
