"""Recordings that are heard otherwise each time: log-mel features of a training batch
are changed at random, on the device.

Shapes: T frames, B recordings, M mel bands, D = M or, with slopes beside them, 2 M.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlrnn import seeding
from rlrnn.data.chunks import Batches, Chunk

DECIBELS = 10 / math.log(10)  # of a factor e in power
COLOUR = 4.0  # dB


@dataclass(frozen=True)
class Changes:
    """What is drawn for each recording, each time it comes.

    SpecAugment (Park et al. 2019), without its time warping: `band_masks` times up to
    `band_width` neighbouring bands are silent, `time_masks` times up to `time_width`
    frames, and at most a fifth of them. Vocal tract length perturbation (Jaitly &
    Hinton 2013): frequencies are multiplied by a factor from 1 - `warp` to 1 + `warp`.
    Noise has a level from `range` to `noise` dB below the loudest, where features are
    0; none of them is below -`range` dB.
    """

    band_masks: int
    band_width: int
    time_masks: int
    time_width: int
    warp: float | int
    noise: float | None = None
    range: float | None = None

    def __bool__(self) -> bool:
        masks = self.band_masks or self.time_masks
        return bool(masks or self.warp or self.noise is not None)


class Augmented:
    """`Batches` of features, changed: a `Source`.

    What is drawn is a function of `seed` and of the place in the data, so that a run
    that goes on from a checkpoint hears the same. `mean` and `scale` [D] are those that
    the features were normalised by; a mask is the mean.
    """

    whole = True

    def __init__(
        self,
        source: Batches,
        changes: Changes,
        centers: Float[Tensor, " M"],
        mean: Float[Tensor, " D"],
        scale: Float[Tensor, " D"],
        seed: int,
    ) -> None:
        self.source, self.changes, self.seed = source, changes, seed
        self.centers, self.mean, self.scale = centers, mean, scale
        self.batch, self.length = source.batch, source.length

    def to(self, device: torch.device) -> "Augmented":
        moved = copy.copy(self)
        moved.source = self.source.to(device)
        for name in ("centers", "mean", "scale"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def fingerprint(self) -> int:
        return self.source.fingerprint()

    def span(self, t: int, truncation: int) -> int:
        return self.source.span(t, truncation)

    def typical(self, truncation: int) -> float:
        return self.source.typical(truncation)

    def window(self, t: int, steps: int) -> Chunk:
        chunk = self.source.window(t, steps)
        assert chunk.mask is not None
        x, place = chunk.x, torch.arange(steps, device=chunk.x.device).unsqueeze(1)
        lengths = (chunk.mask * (place + 1)).amax(0)
        generator = torch.Generator(x.device)
        generator.manual_seed(seeding.derive(self.seed, t))
        if self.changes.warp:
            factor = torch.rand(x.shape[1], generator=generator, device=x.device)
            factor = 1 + self.changes.warp * (2 * factor - 1)
            x = warped(x * self.scale + self.mean, factor, self.centers)
            x = (x - self.mean) / self.scale
        if self.changes.noise is not None:
            bands = len(self.centers)
            x = (x * self.scale + self.mean)[..., :bands]
            x = noisy(x, self.changes, generator)
            if len(self.mean) > bands:
                x = sloped(x, lengths)
            x = (x - self.mean) / self.scale
        x = masked(x, lengths, len(self.centers), self.changes, generator)
        return replace(chunk, x=x)


def warped(
    x: Float[Tensor, "T B D"], factor: Float[Tensor, " B"], centers: Float[Tensor, " M"]
) -> Float[Tensor, "T B D"]:
    """Features of a voice whose frequencies are `factor` times as high, by
    interpolation between bands, whose middle frequencies (Hz, rising) are `centers`."""
    bands = len(centers)
    source = centers / factor.unsqueeze(1)  # [B, M], what each band hears, in Hz
    above = torch.searchsorted(centers, source).clamp(1, bands - 1)
    low, high = centers[above - 1], centers[above]
    share = ((source - low) / (high - low)).clamp(0, 1)
    parts = x.view(*x.shape[:2], -1, bands)
    shape = parts.shape
    left, right = (
        parts.gather(3, at.view(1, -1, 1, bands).expand(shape))
        for at in (above - 1, above)
    )
    return left.lerp(right, share.view(1, -1, 1, bands).expand(shape)).view(x.shape)


def noisy(
    x: Float[Tensor, "T B M"], changes: Changes, generator: torch.Generator
) -> Float[Tensor, "T B M"]:
    """Log-mel features with the power of a noise added, the same at all times."""
    assert changes.noise is not None and changes.range is not None
    batch, bands = x.shape[1:]
    lowest, highest = -changes.range / DECIBELS, -changes.noise / DECIBELS
    level = torch.rand(batch, 1, generator=generator, device=x.device)
    level = lowest + level * (highest - lowest)
    noise = level + colours(batch, bands, generator)
    return torch.logaddexp(x, noise).clamp_min(lowest)


def colours(batch: int, bands: int, generator: torch.Generator) -> Float[Tensor, "B M"]:
    """Smooth spectra in log power: sums of the first four cosines over the bands, whose
    mean is zero, with a deviation of COLOUR dB."""
    place = (torch.arange(bands, device=generator.device) + 0.5) / bands
    number = torch.arange(1, 5, device=generator.device).unsqueeze(1)
    draw = torch.randn(batch, 4, generator=generator, device=generator.device)
    return draw @ torch.cos(torch.pi * number * place) * (COLOUR / DECIBELS / 2**0.5)


def sloped(
    x: Float[Tensor, "T B M"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, "T B 2*M"]:
    """`audio.with_deltas` of each recording of a batch."""
    step = torch.arange(len(x), device=x.device).unsqueeze(1)

    def at(offset: int) -> Tensor:
        place = torch.minimum((step + offset).clamp_min(0), lengths - 1)
        return x.gather(0, place.unsqueeze(2).expand_as(x))

    slopes = (at(1) - at(-1) + 2 * (at(2) - at(-2))) / 10
    return torch.cat((x, slopes), 2)


def masked(
    x: Float[Tensor, "T B D"],
    lengths: Int[Tensor, " B"],
    bands: int,
    changes: Changes,
    generator: torch.Generator,
) -> Float[Tensor, "T B D"]:
    """x with zeros in bands and frames that are drawn."""
    steps, batch = x.shape[:2]
    hidden = torch.zeros(steps, batch, 1, dtype=torch.bool, device=x.device)
    frames = (lengths // 5).clamp_max(changes.time_width)
    for _ in range(changes.time_masks):
        hidden = hidden | _stretch(frames, lengths, steps, generator).t().unsqueeze(-1)
    widths = lengths.new_full((batch,), changes.band_width)
    everything = torch.full_like(widths, bands)
    for _ in range(changes.band_masks):
        silent = _stretch(widths, everything, bands, generator)  # [B, M]
        hidden = hidden | silent.repeat(1, x.shape[2] // bands)
    return x.masked_fill(hidden, 0)


def _stretch(
    most: Tensor, ends: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """[B, count]: a stretch of each row, of 0 to `most` places before `ends`."""
    draw = torch.rand(2, len(ends), generator=generator, device=ends.device)
    width = (draw[0] * (most + 1)).floor()
    begin = (draw[1] * (ends - width + 1)).floor()
    place = torch.arange(count, device=ends.device)
    begin, width = begin.unsqueeze(1), width.unsqueeze(1)
    return (begin <= place) & (place < begin + width)
