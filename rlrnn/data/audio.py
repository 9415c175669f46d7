"""Recordings: wav and flac files as waves, and waves as log-mel features.

Shapes: N samples, T frames, M mel bands.
"""

import io
import math
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from rlrnn.data.files import DataError, find, read_bytes

Wave = NDArray[np.float32]

SUFFIXES = (".wav", ".flac")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
FLOOR = 1e-6  # of a band's power: above the rounding noise of 16 bits


def recordings(path: str) -> Iterator[tuple[str, bytes]]:
    """The name and the bytes of each recording of a file, a folder, a glob or a tar
    archive, by name. Raises DataError if there is none."""
    for file in find(path, (*SUFFIXES, *ARCHIVES)):
        if not file.name.endswith(ARCHIVES):
            yield str(file), read_bytes(file)
            continue
        try:
            with tarfile.open(file) as archive:
                members = [m for m in archive if m.isfile()]
                members = [m for m in members if m.name.endswith(SUFFIXES)]
                for member in sorted(members, key=lambda m: m.name):
                    opened = archive.extractfile(member)
                    assert opened is not None
                    yield member.name, opened.read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise DataError(f"{file} is no tar archive, or damaged ({error})") from None
        if not members:
            raise DataError(f"{file} has no {' or '.join(SUFFIXES)} files")


@dataclass
class Reader:
    """Reads recordings at one rate, in Hz. `tell` warns once of what was converted."""

    rate: int
    read: int = 0
    mixed: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)

    def __call__(self, name: str, raw: bytes) -> Wave:
        """The samples [N] of a recording, channels averaged, at this rate. Raises
        DataError for what is no whole recording."""
        soundfile = _soundfile()
        _check_whole(name, raw)
        try:
            file = soundfile.SoundFile(io.BytesIO(raw))
        except soundfile.LibsndfileError as error:
            raise DataError(f"{name} is no audio file: {error.error_string}") from None
        try:
            with file:
                frames, rate = file.frames, file.samplerate
                wave = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise DataError(
                f"{name} is truncated or damaged: {error.error_string}"
            ) from None
        if len(wave) < frames:
            raise DataError(f"{name} is truncated: {len(wave)} samples of {frames}")
        if not len(wave):
            raise DataError(f"{name} has no samples")
        if not np.isfinite(wave).all():
            raise DataError(f"{name} has samples that are not finite")
        self.read += 1
        if wave.shape[1] > 1:
            self.mixed.append(name)
        if rate != self.rate:
            self.resampled.append(name)
        return resample(wave.mean(1), rate, self.rate)

    def tell(self) -> None:
        if self.mixed:
            warnings.warn(
                f"{len(self.mixed)} of {self.read} recordings have several channels, "
                f"which are averaged; the first is {self.mixed[0]}",
                stacklevel=2,
            )
        if self.resampled:
            warnings.warn(
                f"{len(self.resampled)} of {self.read} recordings have another rate, "
                f"and are resampled to {self.rate} Hz; the first is "
                f"{self.resampled[0]}",
                stacklevel=2,
            )


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError:
        raise DataError(
            "reading recordings needs soundfile: pip install 'rlrnn[speech]'"
        ) from None
    return soundfile


def _check_whole(name: str, raw: bytes) -> None:
    """Raises DataError for a wav file that ends before its samples do: libsndfile
    reads what there is, and says nothing."""
    if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(raw):
        size = int.from_bytes(raw[at + 4 : at + 8], "little")
        here = len(raw) - at - 8
        if raw[at : at + 4] == b"data":
            # 0xFFFFFFFF: written to a pipe, the size was not known
            if here < size != 0xFFFFFFFF:
                raise DataError(f"{name} is truncated: {here} bytes of {size}")
            return
        at += 8 + size + size % 2
    raise DataError(f"{name} is truncated: it has no samples")


def resample(wave: Wave, rate: int, wanted: int) -> Wave:
    """The same sound at another rate: its spectrum, cut or padded with zeros."""
    if rate == wanted:
        return wave
    # silence is added until both lengths are whole, so that the ratio is exact
    step = rate // math.gcd(rate, wanted)
    given = -(-len(wave) // step) * step
    length = given * wanted // rate
    spectrum = np.fft.rfft(wave, given)[: length // 2 + 1]
    scaled = np.fft.irfft(spectrum, length) * (length / given)
    return scaled[: -(-len(wave) * wanted // rate)].astype(np.float32)


# --- features -----------------------------------------------------------------------


def mel_edges(bands: int, rate: int) -> Float[Tensor, " edges"]:
    """M + 2 frequencies in Hz, evenly spaced in mel from 0 to half the rate; mel = 2595
    log10(1 + f / 700) (HTK)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    mels = torch.linspace(0, top, bands + 2, dtype=torch.float64)
    return 700 * (10 ** (mels / 2595) - 1)


def mel_filters(bands: int, size: int, rate: int) -> Float[Tensor, "M F"]:
    """Triangles of height 1 over the bins of a transform of `size` samples, each from
    one of `mel_edges` to the next but one."""
    edges = mel_edges(bands, rate)
    bins = torch.arange(size // 2 + 1, dtype=torch.float64) * rate / size
    left, middle, right = (edges[i : i + bands, None] for i in range(3))
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return torch.minimum(rising, falling).clamp_min(0).float()


def log_mel(
    wave: Float[Tensor, " N"],
    rate: int,
    bands: int,
    window: float | int,
    hop: float | int,
) -> Float[Tensor, "T M"]:
    """The logarithm of the power in `bands` mel bands of each frame.

    A frame is `window` ms under a Hann window; frames begin every `hop` ms, and lie
    inside the wave (one that is shorter than a frame is padded with zeros).
    """
    size, step = round(rate * window / 1000), round(rate * hop / 1000)
    wave = F.pad(wave, (0, max(0, size - len(wave))))
    hann = torch.hann_window(size, device=wave.device)
    length = 2 ** math.ceil(math.log2(size))
    spectrum = torch.fft.rfft(wave.unfold(0, size, step) * hann, length)
    power = spectrum.real.square() + spectrum.imag.square()  # [T, F]
    filters = mel_filters(bands, length, rate).to(wave.device)
    bands_: Tensor = (power @ filters.t()).clamp_min(FLOOR)
    return bands_.log()


def with_deltas(x: Float[Tensor, "T M"]) -> Float[Tensor, "T 2*M"]:
    """And their slopes: sum_n n (x_{t+n} - x_{t-n}) / (2 sum_n n^2), n = 1, 2, with the
    first and the last frame repeated (the HTK book, section 5.9)."""
    frames = len(x)
    padded = torch.cat((x[:1], x[:1], x, x[-1:], x[-1:]))
    near = padded[3 : 3 + frames] - padded[1 : 1 + frames]
    far = padded[4 : 4 + frames] - padded[:frames]
    return torch.cat((x, (near + 2 * far) / 10), 1)
